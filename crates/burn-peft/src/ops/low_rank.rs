//! Products with a matrix of low rank, `A B`.

use burn::tensor::{DType, Tensor};
use burn_peft_ops::{cast, linear};

use super::Input;

/// `scaling * A B`, `[d_in, d_out]`, in `dtype`.
pub(crate) fn matrix(a: Tensor<2>, b: Tensor<2>, scaling: f64, dtype: DType) -> Tensor<2> {
    cast(a, dtype).mul_scalar(scaling).matmul(cast(b, dtype))
}

/// `scaling * (x A) B`, `[n, d_out]`: the dense `A B` is never formed, and the scaling meets the smallest tensor on the
/// way, `x A`.
pub(crate) fn product(x: &Input, a: Tensor<2>, b: Tensor<2>, scaling: f64) -> Tensor<2> {
    product_behind_dropout(x, 0.0, a, b, scaling)
}

/// `scaling * (dropout(x) A) B`, `[n, d_out]`, where `prob` is the probability with which dropout zeroes an element.
pub(crate) fn product_behind_dropout(
    x: &Input,
    prob: f64,
    a: Tensor<2>,
    b: Tensor<2>,
    scaling: f64,
) -> Tensor<2> {
    // Dropout's 1 / (1 - p) goes along with the scaling.
    let (product, factor) = x.dropped_times(prob, a);
    linear(product.mul_scalar(scaling * factor), b, None)
}
