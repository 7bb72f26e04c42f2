//! Products with a matrix of low rank, `A B`.

use burn::tensor::module::linear;
use burn::tensor::{DType, Tensor};

use super::Input;
use crate::tensor::cast;

/// `scaling * A B`, `[d_in, d_out]`, in `dtype`.
pub(crate) fn matrix(a: Tensor<2>, b: Tensor<2>, scaling: f64, dtype: DType) -> Tensor<2> {
    cast(a, dtype).mul_scalar(scaling).matmul(cast(b, dtype))
}

/// `scaling * (x A) B`, `[n, d_out]`: the dense `A B` is never formed, and the scaling meets the smallest tensor on the
/// way, `x A`.
pub(crate) fn product(x: &Input, a: Tensor<2>, b: Tensor<2>, scaling: f64) -> Tensor<2> {
    linear(x.times(a).mul_scalar(scaling), b, None)
}
