//! Conversions that cost nothing when there is nothing to do.

use burn::tensor::Tensor;
use burn_peft_ops::{cast, on_kind_of};

/// `tensor`, which has no graph, on the kind of device that `other` is on.
pub(crate) fn like<const D: usize, const E: usize>(tensor: Tensor<D>, other: &Tensor<E>) -> Tensor<D> {
    on_kind_of(cast(tensor, other.dtype()), &other.device())
}

/// Whether a tensor has no infinity and no NaN.
pub(crate) fn is_finite<const D: usize>(tensor: &Tensor<D>) -> bool {
    tensor.clone().is_finite().all().into_scalar()
}
