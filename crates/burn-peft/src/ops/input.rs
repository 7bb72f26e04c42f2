//! The input of any layer.

use burn::tensor::module::embedding;
use burn::tensor::{Int, Tensor};

use burn_peft_ops::{cast, dropped_product, linear, zero_some};

/// What a layer that works on activations has been given.
#[derive(Debug, Clone)]
pub(crate) enum Input {
    /// `[n, d_in]`
    Activations(Tensor<2>),
    /// Rows to look up, `[n]`: what rows of zeros with a single 1 would be.
    Ids(Tensor<1, Int>),
}

impl Input {
    /// `x M`, `[n, columns of M]`, in the wider of both types; for ids the rows `M[ids]`, never more of `M`.
    pub(crate) fn times(&self, matrix: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Activations(x) => linear(as_wide_as(x.clone(), &matrix), matrix, None),
            Self::Ids(ids) => {
                let [n, columns] = [ids.dims()[0], matrix.dims()[1]];
                embedding(matrix, ids.clone().reshape([1, n])).reshape([n, columns])
            }
        }
    }

    /// `dropout(x) M` without the factor that keeps the mean, and that factor; see [`dropped`](Self::dropped).
    pub(crate) fn dropped_times(&self, prob: f64, matrix: Tensor<2>) -> (Tensor<2>, f64) {
        match self {
            Self::Activations(x) if prob > 0.0 => {
                let x = as_wide_as(x.clone(), &matrix);
                (dropped_product(x, matrix, prob), 1.0 / (1.0 - prob))
            }
            other => (other.times(matrix), 1.0),
        }
    }

    /// The input with elements zeroed, each with probability `prob`, at least as wide as `like`, and the factor `1 / (1 - prob)`
    /// that keeps its mean. Ids stay as they are.
    pub(crate) fn dropped(&self, prob: f64, like: &Tensor<2>) -> (Self, f64) {
        match self {
            Self::Activations(x) if prob > 0.0 => {
                let x = zero_some(as_wide_as(x.clone(), like), prob);
                (Self::Activations(x), 1.0 / (1.0 - prob))
            }
            other => (other.clone(), 1.0),
        }
    }

    pub(crate) fn is_autodiff(&self) -> bool {
        match self {
            Self::Activations(x) => x.device().is_autodiff(),
            Self::Ids(_) => true,
        }
    }
}

/// `x`, in the type of `like` if that has more bits.
fn as_wide_as(x: Tensor<2>, like: &Tensor<2>) -> Tensor<2> {
    if like.dtype().size() > x.dtype().size() { cast(x, like.dtype()) } else { x }
}
