//! Conversions that cost nothing when there is nothing to do.

use burn::tensor::{DType, Tensor};

/// `tensor`, which has no graph, on the kind of device that `other` is on.
pub(crate) fn like<const D: usize, const E: usize>(tensor: Tensor<D>, other: &Tensor<E>) -> Tensor<D> {
    let tensor = cast(tensor, other.dtype());
    if other.is_autodiff() && !tensor.is_autodiff() { Tensor::from_inner(tensor) } else { tensor }
}

/// `Tensor::cast` that costs nothing when there is nothing to do, and leaves quantized tensors to the operation that
/// reads them.
pub(crate) fn cast<const D: usize>(tensor: Tensor<D>, dtype: DType) -> Tensor<D> {
    if tensor.dtype() == dtype || !tensor.dtype().is_float() || !dtype.is_float() {
        tensor
    } else {
        tensor.cast(dtype)
    }
}
