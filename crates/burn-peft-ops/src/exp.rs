//! The exponential function in vector instructions.

/// Where `e^x` begins to be 0: it would be smaller than the smallest normal number.
const SMALLEST: f32 = -87.33;
/// Above the largest finite `e^x`.
const LARGEST: f32 = 89.0;
/// Added to a number below 2²², it leaves the nearest whole number in the last bits.
const ROUND: f32 = 12_582_912.0;

/// `e^x` within 2e-7 of it, 0 below -87.33, infinite from 88.38 on.
///
/// Written so that the compiler makes vector instructions of a loop over it, which it cannot of `f32::exp`. With
/// `x = n ln 2 + r`, it is `2ⁿ e^r`; the polynomial for `e^r` and `ln 2` in two parts are those of the Cephes library
/// (S. Moshier, `expf`).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let bounded = x.clamp(SMALLEST, LARGEST);
    let shifted = bounded * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = bounded - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    let y = (p * r * r + r + 1.0) * power;
    if x < SMALLEST { 0.0 } else { y }
}

/// Numbers that are compared or added up side by side.
const LANES: usize = 16;
/// Numbers whose sum is in f32; the sums of so many are added in f64.
const SUMMED: usize = 1024;

/// The largest number, at least the smallest finite one. NaN does not count.
#[inline(always)]
pub(crate) fn largest(row: &[f32]) -> f32 {
    let (lanes, rest) = row.as_chunks::<LANES>();
    let mut largest = [f32::MIN; LANES];
    for numbers in lanes {
        for (largest, number) in largest.iter_mut().zip(numbers) {
            *largest = if *number > *largest { *number } else { *largest };
        }
    }
    largest.iter().chain(rest).fold(f32::MIN, |a, b| if *b > a { *b } else { a })
}

/// Replaces each number by `e^(x - max)` and returns their sum, within 1e-6 also of a whole vocabulary.
#[inline(always)]
pub(crate) fn exponentiate(row: &mut [f32], max: f32) -> f64 {
    let mut sum = 0.0;
    for row in row.chunks_mut(SUMMED) {
        let (lanes, rest) = row.as_chunks_mut::<LANES>();
        let mut sums = [0.0; LANES];
        for numbers in lanes {
            for (sum, number) in sums.iter_mut().zip(numbers) {
                *number = exp(*number - max);
                *sum += *number;
            }
        }
        for number in &mut *rest {
            *number = exp(*number - max);
        }
        sum += f64::from(sums.iter().chain(&*rest).sum::<f32>());
    }
    sum
}

/// `Σ e^(x - max)`, within 1e-6 also of a whole vocabulary.
#[inline(always)]
pub(crate) fn sum_of_exponentials(row: &[f32], max: f32) -> f64 {
    let mut copy = [0.0; SUMMED];
    let sums = row.chunks(SUMMED).map(|row| {
        let copy = &mut copy[..row.len()];
        copy.copy_from_slice(row);
        exponentiate(copy, max)
    });
    sums.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_exponent_of_two_is_right_and_the_ends_are_safe() {
        let mut worst: f64 = 0.0;
        for i in -873_000..883_000 {
            let x = i as f32 * 1e-4;
            worst = worst.max((f64::from(exp(x)) / f64::from(x).exp() - 1.0).abs());
        }
        assert!(worst < 2e-7, "{worst:e}");
        assert_eq!([f32::NEG_INFINITY, -1e30, -88.0].map(exp), [0.0; 3]);
        assert_eq!([88.5, 1e30, f32::INFINITY].map(exp), [f32::INFINITY; 3]);
        assert!(exp(f32::NAN).is_nan() && exp(0.0) == 1.0);
    }

    #[test]
    fn sums_of_a_vocabulary_are_those_in_f64() {
        for n in [1, 15, 17, 1025, 49_152, 128_256] {
            let row: Vec<f32> = (0..n).map(|i| ((i * 7919) % 10_007) as f32 / 1_251.0 - 4.0).collect();
            let max = largest(&row);
            assert_eq!(max, row.iter().copied().fold(f32::MIN, f32::max));
            let expected: f64 = row.iter().map(|x| (f64::from(*x) - f64::from(max)).exp()).sum();
            let mut replaced = row.clone();
            let sums = [exponentiate(&mut replaced, max), sum_of_exponentials(&row, max)];
            for sum in sums {
                assert!((sum / expected - 1.0).abs() < 1e-6, "{n}: {sum} {expected}");
            }
            assert!(replaced.iter().zip(&row).all(|(y, x)| *y == exp(x - max)));
        }
        assert_eq!(largest(&[f32::NEG_INFINITY; 20]), f32::MIN);
        assert!(sum_of_exponentials(&[f32::NAN; 20], 0.0).is_nan());
    }
}
