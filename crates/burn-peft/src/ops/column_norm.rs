//! The norms of the columns of `W + scaling * A B`.

use burn::tensor::{DType, Tensor};
use burn_peft_ops::cast;

/// `‖w_j + scaling * (A B)_j‖₂` for every column `j`, `[1, d_out]`, in f32 and without a graph.
///
/// `A B` is not formed: with `C = Aᵀ W` (`[r, d_out]`) and the Gram matrix `G = Aᵀ A` (`[r, r]`), the square of the norm is
/// `‖w_j‖² + Σ_k B_kj (2 scaling C + scaling² G B)_kj`. Rounding can take it below zero where the update all but cancels
/// the weight; it is 0 then.
pub(crate) fn column_norm(w: &Tensor<2>, a: Tensor<2>, b: Tensor<2>, scaling: f64) -> Tensor<2> {
    let plain = |tensor: Tensor<2>| {
        let tensor = if tensor.is_autodiff() { tensor.inner() } else { tensor };
        cast(tensor, DType::F32)
    };
    let (w, a, b) = (plain(w.clone()), plain(a), plain(b));
    let turned = a.clone().transpose();
    let cross = turned.clone().matmul(w.clone()).mul_scalar(2.0 * scaling);
    let gram = turned.matmul(a).matmul(b.clone()).mul_scalar(scaling * scaling);
    let update = (b * (cross + gram)).sum_dim(0);
    ((w.clone() * w).sum_dim(0) + update).clamp_min(0.0).sqrt()
}
