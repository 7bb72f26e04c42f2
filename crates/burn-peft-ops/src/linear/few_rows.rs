//! Products of a few rows with a matrix that is large, which is read once for all of them.

use pulp::{Arch, Simd, WithSimd};

use crate::flex::Matrix;

/// Rows so few that reading the matrix takes longer than multiplying.
pub(super) const MOST_ROWS: usize = 16;
/// The most numbers that [`product`] should add one after the other: the error grows with their count.
pub(super) const LONGEST_SUM: usize = 128;
/// Numbers that it adds side by side, at least, if columns lie in one piece.
pub(super) const SIDE_BY_SIDE: usize = 8;

/// Lines that are added to a row at a time, so that the row is read and written once for all of them.
pub(super) const ADDED: usize = 8;
/// Lines that are multiplied with a row at a time, so that the row is read once for all of them.
const MULTIPLIED: usize = 4;

/// `y = x w`, by one thread. Numbers lie in one piece: those of each row of `x`, those of each row or of each column of `w`, and
/// all of `y`.
pub(super) fn product(x: Matrix<'_>, w: Matrix<'_>, y: &mut [f32]) {
    assert_eq!((x.columns, y.len()), (w.rows, x.rows * w.columns), "shapes of a product");
    let x: Vec<&[f32]> = (0..x.rows).map(|row| x.row(row)).collect();
    if w.strides[1] == 1 {
        y.fill(0.0);
        Arch::new().dispatch(SumOfLines { x: &x, lines: w, y });
    } else {
        Arch::new().dispatch(DotsWithLines { x: &x, lines: w.turned(), y });
    }
}

/// `y[r][j] += Σ_i x[r][i] lines[i][j]`
struct SumOfLines<'a> {
    x: &'a [&'a [f32]],
    lines: Matrix<'a>,
    y: &'a mut [f32],
}

impl WithSimd for SumOfLines<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, lines, y } = self;
        let grouped = lines.rows - lines.rows % ADDED;
        for i in (0..grouped).step_by(ADDED) {
            let group: [_; ADDED] = std::array::from_fn(|n| lines.row(i + n));
            for (x, y) in x.iter().zip(y.chunks_exact_mut(lines.columns)) {
                add(simd, group, &x[i..], y);
            }
        }
        for i in grouped..lines.rows {
            for (x, y) in x.iter().zip(y.chunks_exact_mut(lines.columns)) {
                add(simd, [lines.row(i)], &x[i..], y);
            }
        }
    }
}

/// Adds the lines to `y`, each times its number in `x`.
// Loops instead of closures: a closure that is not inlined would have no vector instructions.
#[inline(always)]
fn add<S: Simd, const N: usize>(simd: S, lines: [&[f32]; N], x: &[f32], y: &mut [f32]) {
    let (y, rest) = S::as_mut_simd_f32s(y);
    let parts = lines.map(S::as_simd_f32s);
    let vectors = parts.map(|(vectors, _)| &vectors[..y.len()]);
    let mut factors = [simd.splat_f32s(0.0); N];
    for n in 0..N {
        factors[n] = simd.splat_f32s(x[n]);
    }
    for (j, y) in y.iter_mut().enumerate() {
        for n in 0..N {
            *y = simd.mul_add_e_f32s(vectors[n][j], factors[n], *y);
        }
    }
    for (j, y) in rest.iter_mut().enumerate() {
        for n in 0..N {
            *y += parts[n].1[j] * x[n];
        }
    }
}

/// `y[r][i] = Σ_j x[r][j] lines[i][j]`
struct DotsWithLines<'a> {
    x: &'a [&'a [f32]],
    lines: Matrix<'a>,
    y: &'a mut [f32],
}

impl WithSimd for DotsWithLines<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, lines, y } = self;
        let grouped = lines.rows - lines.rows % MULTIPLIED;
        for i in (0..grouped).step_by(MULTIPLIED) {
            let group: [_; MULTIPLIED] = std::array::from_fn(|n| lines.row(i + n));
            for (x, y) in x.iter().zip(y.chunks_exact_mut(lines.rows)) {
                y[i..i + MULTIPLIED].copy_from_slice(&dots(simd, group, x));
            }
        }
        for i in grouped..lines.rows {
            for (x, y) in x.iter().zip(y.chunks_exact_mut(lines.rows)) {
                [y[i]] = dots(simd, [lines.row(i)], x);
            }
        }
    }
}

/// `x · line` of each line.
#[inline(always)]
fn dots<S: Simd, const N: usize>(simd: S, lines: [&[f32]; N], x: &[f32]) -> [f32; N] {
    let (x, rest) = S::as_simd_f32s(x);
    let parts = lines.map(S::as_simd_f32s);
    let vectors = parts.map(|(vectors, _)| &vectors[..x.len()]);
    let mut sums = [simd.splat_f32s(0.0); N];
    for (j, x) in x.iter().enumerate() {
        for n in 0..N {
            sums[n] = simd.mul_add_e_f32s(*x, vectors[n][j], sums[n]);
        }
    }
    let mut dots = [0.0; N];
    for n in 0..N {
        dots[n] = simd.reduce_sum_f32s(sums[n]);
        for (x, number) in rest.iter().zip(parts[n].1) {
            dots[n] += x * number;
        }
    }
    dots
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{deviation, drawn_numbers, wide};

    /// Both directions, with lines and numbers that are left over, and rows that lie apart.
    #[test]
    fn products_are_those_in_f64() {
        for [rows, d_in, d_out] in
            [[1, 1, 1], [2, 7, 5], [3, 8, 16], [5, 13, 37], [16, 70, 33], [2, 2048, 130]]
        {
            let (x, w) = (drawn_numbers(rows * (d_in + 3), 1.0, 1), drawn_numbers(d_in * d_out, 1.0, 2));
            let x = Matrix { numbers: &x, rows, columns: d_in, strides: [d_in as isize + 3, 1] };
            for w in [Matrix::new(&w, d_in, d_out), Matrix::new(&w, d_out, d_in).turned()] {
                let [of_rows, of_columns] = w.strides.map(isize::unsigned_abs);
                let expected = (0..rows * d_out).map(|i| {
                    let of_input = |(k, x): (usize, &f32)| {
                        f64::from(*x) * f64::from(w.numbers[k * of_rows + i % d_out * of_columns])
                    };
                    x.row(i / d_out).iter().enumerate().map(of_input).sum::<f64>()
                });
                let mut y = vec![f32::NAN; rows * d_out];
                product(x, w, &mut y);
                let off = deviation(&wide(&y), &expected.collect::<Vec<_>>());
                assert!(off < 2e-6, "{off}, {rows} x {d_in} x {d_out}");
            }
        }
    }
}
