//! The gate of the feed-forward layer.

use burn::tensor::Tensor;
use burn::tensor::activation::silu;

/// `silu(gate) * up`, where `silu(x) = x / (1 + exp(-x))`.
///
/// # Shapes
/// - gate, up and output: the same
pub(crate) fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    silu(gate) * up
}
