//! Dropout.

#[cfg(feature = "flex")]
mod flex;

use std::cell::Cell;

use burn::tensor::{DType, Device, Distribution, Tensor};

use crate::linear;

thread_local! {
    static NEXT_SEED: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Runs `f`, within which this thread's dropout depends on `seed` alone: the second time, it drops the same.
///
/// Burn's CPU backend (Flex) takes its random bits from the seed. On other backends, each dropout seeds the generator of the
/// device first, which threads that use the device at the same time can interfere with. Inside of a rayon pool, `f` may run
/// other jobs of the pool while it waits, which then take seeds as well: call it from a thread of its own.
///
/// # Example
/// ```
/// use burn::tensor::{Device, Tensor};
/// use burn_peft_ops::{with_dropout_seed, zero_some};
///
/// let x = Tensor::<1>::ones([1000], &Device::flex());
/// let dropped = || with_dropout_seed(7, || zero_some(x.clone(), 0.5)).into_data();
/// assert_eq!(dropped(), dropped());
/// ```
pub fn with_dropout_seed<R>(seed: u64, f: impl FnOnce() -> R) -> R {
    struct Before(Option<u64>);
    impl Drop for Before {
        fn drop(&mut self) {
            NEXT_SEED.set(self.0);
        }
    }
    // Mixed, so that seeds which lie as far apart as two draws do not lead to the same ones.
    let _before = Before(NEXT_SEED.replace(Some(mixed(seed))));
    f()
}

/// Between two states of the generator of G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators", 2014.
const STRIDE: u64 = 0x9e37_79b9_7f4a_7c15;

/// The seed of the next dropout, if it is not the device that decides.
fn next_seed() -> Option<u64> {
    let next = NEXT_SEED.get()?.wrapping_add(STRIDE);
    NEXT_SEED.set(Some(next));
    Some(mixed(next))
}

/// What that generator gives for a state.
fn mixed(state: u64) -> u64 {
    let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// The seed that the next dropout has: of [`with_dropout_seed`], or else from the generator of the device.
pub fn next_dropout_seed(device: &Device) -> u64 {
    next_seed().unwrap_or_else(|| {
        let drawn = Tensor::<1>::random([3], Distribution::Default, (device, DType::F32)).into_data();
        // Each has 24 random bits.
        drawn.iter::<f32>().fold(0, |seed, x| (seed << 21) ^ (x * 16_777_216.0) as u64)
    })
}

/// `x` with each element replaced by 0 with probability `prob`, the others as they were.
///
/// `nn::Dropout` draws Bernoulli numbers, which cost Burn's CPU backend twice the time of uniform ones, and multiplies
/// twice, forward and backward. On that backend (Flex), 16 random bits for each element come from a generator that is
/// much faster than the device's, which gives it its seed; `prob` is rounded to a multiple of 2⁻¹⁶ there, and backward
/// draws the same bits again instead of keeping a mask.
///
/// # Panics
/// If `prob` is not between 0 and 1.
pub fn zero_some<const D: usize>(x: Tensor<D>, prob: f64) -> Tensor<D> {
    assert!((0.0..=1.0).contains(&prob), "the probability {prob} is not between 0 and 1");
    #[cfg(feature = "flex")]
    if flex::has_kernel(&x) {
        return flex::zero_some(x, prob);
    }
    if let Some(seed) = next_seed() {
        x.device().seed(seed);
    }
    let uniform = Tensor::<D>::random(x.shape(), Distribution::Default, (&x.device(), DType::F32));
    x.mask_fill(uniform.lower_elem(prob), 0.0)
}

/// `zero_some(x) A`: a product behind dropout.
///
/// On Burn's CPU backend (Flex), what is kept for backward is `x` as it was, so layers that read the same `x` keep one
/// tensor, where dropout and product one after the other keep a copy of `x` each.
///
/// # Shapes
/// - x: `[n, d_in]`
/// - a: `[d_in, r]`
/// - output: `[n, r]`
///
/// # Panics
/// If the shapes do not fit, or `prob` is not between 0 and 1.
pub fn dropped_product(x: Tensor<2>, a: Tensor<2>, prob: f64) -> Tensor<2> {
    assert!((0.0..=1.0).contains(&prob), "the probability {prob} is not between 0 and 1");
    #[cfg(feature = "flex")]
    if flex::has_kernel(&x) && flex::has_kernel(&a) {
        return flex::dropped_product(x, a, prob);
    }
    linear(zero_some(x, prob), a, None)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn what_is_kept_is_as_it_was_and_backward_drops_the_same() {
        for device in [Device::flex().autodiff(), Device::flex().autodiff().gradient_checkpointing()] {
            let x = Tensor::<2>::random([70, 1030], Distribution::Uniform(1.0, 2.0), &device).require_grad();
            #[cfg(feature = "flex")]
            assert!(flex::has_kernel(&x));
            // Not as it lies in memory.
            let y = zero_some(x.clone().transpose(), 0.4);
            let dx = x.grad(&(y.clone() * 3.0).sum().backward()).unwrap().transpose().into_data();
            let (x, y) = (x.transpose().into_data(), y.into_data());
            let mut kept = 0;
            for ((x, y), dx) in x.iter::<f32>().zip(y.iter::<f32>()).zip(dx.iter::<f32>()) {
                assert!((y == x && dx == 3.0) || (y == 0.0 && dx == 0.0), "{x} {y} {dx}");
                kept += usize::from(y == x);
            }
            assert!((0.55..0.65).contains(&(kept as f64 / 72_100.0)), "{kept}");
        }
    }

    #[test]
    fn no_seed_leads_to_the_draws_of_another_one() {
        let draws = |seed| with_dropout_seed(seed, || [(); 8].map(|()| next_seed().unwrap()));
        let mut seen: Vec<u64> = (0..8).flat_map(|i: u64| draws(i.wrapping_mul(STRIDE))).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 64);
    }

    #[test]
    fn a_seed_decides_what_is_dropped() {
        // Composed, it is the device that draws, for other tests at the same time as well.
        let x = |dtype| Tensor::<1>::ones([1000], (&Device::flex().autodiff(), dtype));
        let drop = |dtype| zero_some(x(dtype), 0.5).into_data();
        let two = |seed, dtype| with_dropout_seed(seed, || [drop(dtype), drop(dtype)]);
        assert!((0..1_000).any(|_| two(3, DType::F64) == two(3, DType::F64)));
        if !cfg!(feature = "flex") {
            return;
        }
        let [first, second] = two(3, DType::F32);
        let nested =
            with_dropout_seed(3, || [drop(DType::F32), two(9, DType::F32)[0].clone(), drop(DType::F32)]);
        assert_eq!([&nested[0], &nested[2]], [&first, &second]);
        assert!(first != second && first != nested[1] && first != two(4, DType::F32)[0]);
        assert_ne!(drop(DType::F32), drop(DType::F32));
    }

    #[test]
    fn nothing_and_everything_can_be_dropped() {
        let x = Tensor::<1>::ones([100_000], &Device::flex());
        assert_eq!(zero_some(x.clone(), 0.0).sum().into_scalar::<f32>(), 100_000.0);
        assert_eq!(zero_some(x, 1.0).sum().into_scalar::<f32>(), 0.0);
    }

    #[test]
    #[should_panic(expected = "columns of the left")]
    fn a_product_of_shapes_that_do_not_fit_is_refused() {
        let of = |shape: [usize; 2]| Tensor::<2>::ones(shape, &Device::flex());
        dropped_product(of([3, 4]), of([8, 2]), 0.5);
    }

    #[test]
    fn a_product_behind_dropout_has_the_gradients_of_what_was_kept() {
        for device in [Device::flex().autodiff(), Device::flex().autodiff().gradient_checkpointing()] {
            let random = |shape| Tensor::<2>::random(shape, Distribution::Default, &device).require_grad();
            let (n, d_in, r) = (300, 200, 4);
            let (x, a) = (random([n, d_in]), random([d_in, r]));
            // One column tells what was kept: a product with the unit matrix.
            let y = dropped_product(x.clone(), Tensor::<2>::eye(d_in, &device), 0.3);
            let gradients = y.clone().sum().backward();
            let kept = x.grad(&gradients).unwrap();
            assert!(((x.clone().inner() * kept - y.inner()).abs().max().into_scalar::<f32>()) < 1e-6);

            let y = dropped_product(x.clone() * 1.0, a.clone(), 0.3);
            let gradients = (y.clone() * y.clone()).sum().backward();
            // d(y²)/dx = 2 y Aᵀ where x was kept, and dA = 2 keptᵀ y.
            let dx = x.grad(&gradients).unwrap();
            let kept = dx.clone().not_equal_elem(0.0);
            let slope = y.clone().inner().mul_scalar(2.0);
            let all = slope.clone().matmul(a.clone().inner().transpose());
            let off = (dx - all.mask_fill(kept.clone().bool_not(), 0.0)).abs().max().into_scalar::<f32>();
            assert!(off < 1e-3, "{off}");
            let x_kept = x.clone().inner().mask_fill(kept.clone().bool_not(), 0.0);
            let da = x_kept.clone().transpose().matmul(slope);
            let off = (a.grad(&gradients).unwrap() - da.clone()).abs().max() / da.abs().max();
            assert!(off.into_scalar::<f32>() < 1e-5);
            let off = (x_kept.matmul(a.inner()) - y.inner()).abs().max().into_scalar::<f32>();
            assert!(off < 1e-4, "{off}");
            let share = kept.int().sum().into_scalar::<i64>() as f64 / (n * d_in) as f64;
            assert!((share - 0.7).abs() < 0.02, "{share}");
        }
    }
}
