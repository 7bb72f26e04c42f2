//! `A` normal, `B` zero.

use burn::tensor::Tensor;

use super::{Start, normal, zeros};

pub(super) fn factors(at: &Start, r: usize) -> (Tensor<2>, Tensor<2>) {
    let [d_in, d_out] = at.site.dims();
    (normal(at, [d_in, r], 1.0 / r as f64), zeros(at, [r, d_out]))
}
