//! Products of numbers in bf16, for processors that multiply those faster than f32.

use std::cell::Cell;
#[cfg(target_arch = "x86_64")]
use std::sync::LazyLock;

use burn::tensor::bf16;
use gemmkit::{MatMut, MatRef, Parallelism, gemm};
use rayon::prelude::*;

use super::WIDENED_AT_ONCE;
use super::stored::{Stored, widen};
use crate::flex::{TASK, vectorised, zeros};

/// The most numbers of the input and the output that are in bf16 at a time: as many bytes as what is widened.
const ROUNDED_AT_ONCE: usize = 2 * WIDENED_AT_ONCE;
/// But with so many rows, reading the weight takes less time than multiplying.
const FEWEST_ROWS: usize = 128;

thread_local! {
    static IS_ALLOWED: Cell<bool> = const { Cell::new(true) };
}

/// Whether products may round their input: not within [`in_full_precision`].
pub(super) fn is_allowed() -> bool {
    IS_ALLOWED.get()
}

pub(super) fn in_full_precision<R>(f: impl FnOnce() -> R) -> R {
    struct Before(bool);
    impl Drop for Before {
        fn drop(&mut self) {
            IS_ALLOWED.set(self.0);
        }
    }
    let _before = Before(IS_ALLOWED.replace(false));
    f()
}

/// Whether the processor multiplies numbers in bf16 faster than in f32, with the instructions that gemmkit knows.
///
/// AMD's since Zen 4 do. With the same instructions, a training step on an Intel Xeon (Sapphire Rapids)
/// took 1.09 times as long as in f32.
pub(super) fn is_faster() -> bool {
    #[cfg(test)]
    if tests::IS_FASTER.get() {
        return true;
    }
    #[cfg(target_arch = "x86_64")]
    {
        static IS_FASTER: LazyLock<bool> = LazyLock::new(|| {
            let vendor = raw_cpuid::CpuId::new().get_vendor_info();
            vendor.is_some_and(|vendor| vendor.as_str() == "AuthenticAMD")
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bf16")
        });
        *IS_FASTER
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// `x W`, row by row, of an `x` that lies row by row: `x` rounded to bf16, sums in f32, which are rounded to bf16.
pub(super) fn product(x: &[f32], weight: Stored<'_, bf16>) -> Vec<f32> {
    let (d_in, d_out, strides) = match weight.is_by_row {
        true => (weight.lines, weight.length, [weight.apart as isize, 1]),
        false => (weight.length, weight.lines, [1, weight.apart as isize]),
    };
    let rows = (ROUNDED_AT_ONCE / (d_in + d_out)).max(FEWEST_ROWS);
    let weight = MatRef::new(weight.numbers, d_in, d_out, strides[0], strides[1]);
    let mut y = zeros(x.len() / d_in * d_out);
    let (mut rounded, mut product) = (vec![], vec![]);
    for (x, y) in x.chunks(rows * d_in).zip(y.chunks_mut(rows * d_out)) {
        rounded.resize(x.len(), bf16::ZERO);
        by_all_threads(x, &mut rounded, round);
        product.resize(y.len(), bf16::ZERO);
        let x = MatRef::from_row_major(&rounded, x.len() / d_in, d_in);
        let of_rows = MatMut::from_row_major(&mut product, x.rows(), d_out);
        gemm(bf16::ONE, x, weight, bf16::ZERO, of_rows, Parallelism::Rayon(0));
        by_all_threads(&product, y, widen);
    }
    y
}

fn by_all_threads<A: Sync, B: Send>(from: &[A], to: &mut [B], f: impl Fn(&[A], &mut [B]) + Sync) {
    from.par_chunks(TASK).zip(to.par_chunks_mut(TASK)).for_each(|(from, to)| f(from, to));
}

/// To the nearest, and to the even one of two that are equally near.
fn round(numbers: &[f32], rounded: &mut [bf16]) {
    vectorised(|| {
        for (rounded, number) in rounded.iter_mut().zip(numbers) {
            let bits = number.to_bits();
            // bf16 is the upper half of f32. What is added carries into it from a lower half above the middle.
            let upper = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
            *rounded = if number.is_nan() { bf16::NAN } else { bf16::from_bits(upper) };
        }
    });
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    thread_local! {
        /// Makes the processor one of those.
        pub(in crate::linear) static IS_FASTER: Cell<bool> = const { Cell::new(false) };
    }

    #[test]
    fn rounding_is_that_of_half() {
        let mut numbers: Vec<f32> = (0..1 << 16).map(|i| f32::from_bits(i << 15 | i & 1)).collect();
        numbers.extend([0x3f80_8000, 0x3f81_8000, 0x7f7f_ffff, 0xff7f_ffff, 0x0000_8000].map(f32::from_bits));
        let mut found = vec![bf16::ZERO; numbers.len()];
        round(&numbers, &mut found);
        for (number, found) in numbers.iter().zip(found) {
            let expected = bf16::from_f32(*number);
            assert!(found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(), "{number}");
        }
    }

    #[test]
    fn full_precision_ends_with_its_scope() {
        assert!(is_allowed());
        in_full_precision(|| {
            in_full_precision(|| assert!(!is_allowed()));
            assert!(!is_allowed());
        });
        assert!(is_allowed());
        let failed = std::panic::catch_unwind(|| in_full_precision(|| assert!(is_allowed())));
        assert!(failed.is_err() && is_allowed());
    }

    /// A product of rounded numbers, rounded, however the weight lies: one piece of rows and several, a long sum.
    #[test]
    fn products_are_exact_but_for_rounding() {
        for (n, d_in, d_out) in [(1, 1, 1), (17, 70, 33), (300, 5000, 2500), (40, 49_152, 8)] {
            let drawn = |count: usize, seed: f32| -> Vec<f32> {
                (0..count).map(|i| ((i as f32 * 0.37 + seed) * 12.9).sin()).collect()
            };
            let x = drawn(n * d_in, 0.0);
            let stored: Vec<bf16> = drawn(d_in * d_out, 0.5).into_iter().map(bf16::from_f32).collect();
            for is_by_row in [true, false] {
                let (lines, length) = if is_by_row { (d_in, d_out) } else { (d_out, d_in) };
                let weight = Stored { numbers: &stored, lines, length, apart: length, is_by_row };
                let found = product(&x, weight);
                for (at, found) in found.iter().enumerate().step_by(found.len().div_ceil(50)) {
                    let (row, column) = (at / d_out, at % d_out);
                    let each = (0..d_in).map(|i| {
                        let weight = stored[if is_by_row { i * d_out + column } else { column * d_in + i }];
                        bf16::from_f32(x[row * d_in + i]).to_f64() * weight.to_f64()
                    });
                    let (sum, size) =
                        each.fold((0.0, 0.0), |(sum, size), each| (sum + each, size + each.abs()));
                    let bound = sum.abs() / 256.0 + 1e-6 * size;
                    assert!(
                        (f64::from(*found) - sum).abs() <= bound,
                        "{found}, {sum}, {n} x {d_in} x {d_out}"
                    );
                }
            }
        }
    }
}
