//! What the layers compute, as functions of tensors that know no layer, configuration or adapter.
//!
//! A faster body for one of them is a change of its file alone.

pub(crate) mod attention;
pub(crate) mod cross_entropy;
pub(crate) mod rms_norm;
pub(crate) mod rope;
pub(crate) mod sum;
pub(crate) mod swiglu;

use burn::tensor::{DType, Tensor};

/// The tensor in another type, itself where it has that type.
pub(crate) fn cast<const D: usize>(x: Tensor<D>, dtype: DType) -> Tensor<D> {
    if x.dtype() == dtype { x } else { x.cast(dtype) }
}
