//! PEFT's default: `A` uniform, `B` zero.

use burn::tensor::Tensor;

use super::{Start, normal, uniform, zeros};
use crate::layer::Layer;

pub(super) fn factors(at: &Start, r: usize) -> (Tensor<2>, Tensor<2>) {
    let [d_in, d_out] = at.site.dims();
    if at.site.layer == Layer::Embedding {
        return (zeros(at, [d_in, r]), normal(at, [r, d_out], 1.0));
    }
    (uniform(at, [d_in, r], 1.0 / (d_in as f64).sqrt()), zeros(at, [r, d_out]))
}
