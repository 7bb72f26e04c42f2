//! The leading singular triplets of the weight.

use burn::tensor::Tensor;

use super::{Start, check_rank, finite, normal};
use crate::error::PeftError;
use crate::ops::singular;

/// # Errors
/// [`PeftError::InvalidConfig`] for a rank above the smaller dimension.
pub(super) fn factors(
    at: &Start,
    r: usize,
    scaling: f64,
    rounds: Option<usize>,
) -> Result<(Tensor<2>, Tensor<2>), PeftError> {
    check_rank(at, r)?;
    if scaling <= 0.0 {
        let expected = "a number above 0 for a start from singular values";
        let found = format!("a scaling of {scaling} for `{}`", at.site.name);
        return Err(PeftError::invalid("lora_alpha", expected, found));
    }
    let w = finite(at)?;
    let random = |columns| normal(at, [at.site.dims()[1], columns], 1.0);
    let (u, values, v) = match rounds {
        None => singular::leading(&w, r, random),
        Some(rounds) => singular::rough(&w, r, rounds, random),
    };
    let half = values.div_scalar(scaling).sqrt();
    Ok((u * half.clone(), half.transpose() * v.transpose()))
}
