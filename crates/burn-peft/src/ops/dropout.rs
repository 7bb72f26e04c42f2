//! Dropout.

#[cfg(feature = "flex")]
mod flex;

use burn::tensor::{DType, Distribution, Tensor};

/// `x` with each element replaced by 0 with probability `prob`, the others as they were.
///
/// `nn::Dropout` draws Bernoulli numbers, which cost Burn's CPU backend twice the time of uniform ones, and multiplies
/// twice, forward and backward. On that backend (Flex), 16 random bits for each element come from a generator that is
/// much faster than the device's, which gives it its seed; `prob` is rounded to a multiple of 2⁻¹⁶ there, and backward
/// draws the same bits again instead of keeping a mask.
pub(crate) fn zero_some<const D: usize>(x: Tensor<D>, prob: f64) -> Tensor<D> {
    #[cfg(feature = "flex")]
    if flex::has_kernel(&x) {
        return flex::zero_some(x, prob);
    }
    let uniform = Tensor::<D>::random(x.shape(), Distribution::Default, (&x.device(), DType::F32));
    x.mask_fill(uniform.lower_elem(prob), 0.0)
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
}
