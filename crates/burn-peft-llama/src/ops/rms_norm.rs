//! Normalisation by the root mean square.

use burn::tensor::{DType, Tensor};

use super::cast;

/// `x / sqrt(mean(x²) + epsilon) * weight`, with the mean over the last axis.
///
/// The mean and the division are in f32 whatever the type of `x`, and the product is in the type of `x`, as in
/// transformers.
///
/// # Shapes
/// - x: `[.., d]`
/// - weight: `[d]`
/// - output: `[.., d]`
pub(crate) fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, epsilon: f64) -> Tensor<D> {
    let dtype = x.dtype();
    let x = cast(x, DType::F32);
    let inverse = (x.clone().square().mean_dim(D - 1) + epsilon).sqrt().recip();
    cast(x * inverse, dtype) * weight.unsqueeze()
}
