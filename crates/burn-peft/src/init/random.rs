//! Both factors uniform.

use burn::tensor::Tensor;

use super::{Start, uniform};

pub(super) fn factors(at: &Start, r: usize) -> (Tensor<2>, Tensor<2>) {
    let [d_in, d_out] = at.site.dims();
    (uniform(at, [d_in, r], 1.0 / (d_in as f64).sqrt()), uniform(at, [r, d_out], 1.0 / (r as f64).sqrt()))
}
