//! Products of a few rows of activations with a part of a weight, which is read once for all of them.

use pulp::{Arch, Simd, WithSimd};

use crate::flex::Matrix;

/// Lines that are added to a row at a time, so that the row is read and written once for all of them.
const ADDED: usize = 8;
/// Lines that are multiplied with a row at a time, so that the row is read once for all of them.
const MULTIPLIED: usize = 4;

/// `y[r][j] = Σ_i x[r][i] lines[i][j]`. The rows of `y` lie in one piece.
pub(super) fn sum_of_lines(x: &[&[f32]], lines: Matrix<'_>, y: &mut [f32]) {
    y.fill(0.0);
    Arch::new().dispatch(SumOfLines { x, lines, y });
}

/// `y[r][i] = Σ_j x[r][j] lines[i][j]`. The rows of `y` lie in one piece.
pub(super) fn dots_with_lines(x: &[&[f32]], lines: Matrix<'_>, y: &mut [f32]) {
    Arch::new().dispatch(DotsWithLines { x, lines, y });
}

fn line(lines: Matrix<'_>, i: usize) -> &[f32] {
    &lines.numbers[i * lines.strides[0].unsigned_abs()..][..lines.columns]
}

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
            let group: [_; ADDED] = std::array::from_fn(|n| line(lines, i + n));
            for (x, y) in x.iter().zip(y.chunks_exact_mut(lines.columns)) {
                add(simd, group, &x[i..], y);
            }
        }
        for i in grouped..lines.rows {
            for (x, y) in x.iter().zip(y.chunks_exact_mut(lines.columns)) {
                add(simd, [line(lines, i)], &x[i..], y);
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
            let group: [_; MULTIPLIED] = std::array::from_fn(|n| line(lines, i + n));
            for (x, y) in x.iter().zip(y.chunks_exact_mut(lines.rows)) {
                y[i..i + MULTIPLIED].copy_from_slice(&dots(simd, group, x));
            }
        }
        for i in grouped..lines.rows {
            for (x, y) in x.iter().zip(y.chunks_exact_mut(lines.rows)) {
                [y[i]] = dots(simd, [line(lines, i)], x);
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
