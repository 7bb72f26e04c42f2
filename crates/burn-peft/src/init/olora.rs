//! The first columns of a QR decomposition of the weight.

use burn::tensor::Tensor;

use super::{Start, check_rank, finite};
use crate::error::PeftError;
use crate::ops::singular;

/// With PyTorch's weight `W = Q R`, `[d_out, d_in]`, the first `r` columns of `Q` depend on the first `r` columns of `W`
/// alone, and the first `r` rows of `R` are `Q_rᵀ W`.
///
/// # Errors
/// [`PeftError::InvalidConfig`] for a rank above the smaller dimension.
pub(super) fn factors(at: &Start, r: usize) -> Result<(Tensor<2>, Tensor<2>), PeftError> {
    check_rank(at, r)?;
    let w = finite(at)?;
    let q = singular::orthonormal(w.clone().narrow(0, 0, r).transpose());
    Ok((w.matmul(q.clone()), q.transpose()))
}
