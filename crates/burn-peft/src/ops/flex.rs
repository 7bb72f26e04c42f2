//! Burn's CPU backend.

use burn::backend::DispatchTensorKind;
use burn::tensor::Tensor;

/// Whether a tensor is on Flex, with autodiff or without.
pub(super) fn is_on_flex<const D: usize>(tensor: &Tensor<D>) -> bool {
    match tensor.clone().into_dispatch().kind {
        DispatchTensorKind::Autodiff(inner) => matches!(*inner, DispatchTensorKind::Flex(_)),
        kind => matches!(kind, DispatchTensorKind::Flex(_)),
    }
}
