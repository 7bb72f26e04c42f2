//! Dropout.

use burn::tensor::{DType, Distribution, Tensor};

/// `x` with each element replaced by 0 with probability `prob`, the others as they were.
///
/// `nn::Dropout` draws Bernoulli numbers, which cost Burn's CPU backend twice the time of uniform ones, and multiplies
/// twice, forward and backward.
pub(crate) fn zero_some<const D: usize>(x: Tensor<D>, prob: f64) -> Tensor<D> {
    let uniform = Tensor::<D>::random(x.shape(), Distribution::Default, (&x.device(), DType::F32));
    x.mask_fill(uniform.lower_elem(prob), 0.0)
}
