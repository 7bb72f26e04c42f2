//! Conversions that cost nothing when there is nothing to do.

use burn::tensor::{Device, Tensor};
use burn_peft_ops::cast;

/// `tensor`, which has no graph, on the kind of device that `other` is on.
pub(crate) fn like<const D: usize, const E: usize>(tensor: Tensor<D>, other: &Tensor<E>) -> Tensor<D> {
    on_kind_of(cast(tensor, other.dtype()), &other.device())
}

/// `tensor`, which has no graph, with autodiff where `device` has it.
///
/// `Tensor::from_inner` alone gives it the default checkpointing strategy, and an operation on tensors of two strategies
/// panics.
pub(crate) fn on_kind_of<const D: usize>(tensor: Tensor<D>, device: &Device) -> Tensor<D> {
    match device.gradient_checkpointing_strategy() {
        Some(strategy) => Tensor::from_inner(tensor).with_gradient_checkpointing_strategy(strategy),
        None => tensor,
    }
}

/// Whether a tensor has no infinity and no NaN.
pub(crate) fn is_finite<const D: usize>(tensor: &Tensor<D>) -> bool {
    tensor.clone().is_finite().all().into_scalar()
}
