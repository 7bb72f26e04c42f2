//! Two factors that are not zero, with a product that is.

use burn::tensor::Tensor;

use super::{Start, normal};
use crate::error::PeftError;
use crate::ops::singular;

/// How much smaller the factors are than what they are drawn from.
const SHRINK: f64 = 0.1;

/// # Errors
/// [`PeftError::InvalidConfig`] for an odd rank.
pub(super) fn factors(at: &Start, r: usize) -> Result<(Tensor<2>, Tensor<2>), PeftError> {
    if !r.is_multiple_of(2) {
        let expected = "an even rank for `init_lora_weights` \"orthogonal\"";
        return Err(PeftError::invalid("r", expected, format!("{r} for `{}`", at.site.name)));
    }
    let ([d_in, d_out], half) = (at.site.dims(), r / 2);
    let q = singular::orthonormal(normal(at, [r, r], 1.0)).transpose();
    let (odd, even) = (q.clone().narrow(0, 0, half), q.narrow(0, half, half));
    let a = normal(at, [d_in, half], SHRINK).matmul(odd);
    let b = even.transpose().matmul(normal(at, [half, d_out], SHRINK));
    Ok((a, b))
}
