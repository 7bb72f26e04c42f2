//! Cross-entropy on Burn's CPU backend: the logits become their gradient in place.

use burn::backend::flex::FlexTensor;
use burn::backend::ops::IntTensorOps;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Int, IntDType, Tensor};
use rayon::prelude::*;

use super::Slope;
use crate::exp::{exponentiate, largest, sum_of_exponentials};
use crate::flex::{contiguous, is_readable, numbers, numbers_mut, tensor, vectorised};

/// Whether [`loss`] and [`loss_and_slope`] are for these logits: those without autodiff.
pub(super) fn has_kernel(logits: &Tensor<2>) -> bool {
    is_readable(logits) && !logits.is_autodiff()
}

pub(super) fn loss(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    Tensor::from_dispatch(Dispatch::sum_of_losses(logits.into_dispatch(), targets.into_dispatch()))
}

pub(super) fn loss_and_slope(logits: Tensor<2>, targets: Tensor<1, Int>) -> (Tensor<1>, Slope) {
    let (loss, numbers, total) = Dispatch::losses_and_slopes(logits.into_dispatch(), targets.into_dispatch());
    let slope = Slope { numbers: Tensor::from_dispatch(numbers), total: Tensor::from_dispatch(total) };
    (Tensor::from_dispatch(loss), slope)
}

#[backend_extension(Flex)]
trait CrossEntropy: Backend {
    /// The loss, `[1]`.
    fn sum_of_losses(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self>;

    /// The loss, `[1]`, and the parts of [`Slope`].
    fn losses_and_slopes(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);
}

impl CrossEntropy for Flex {
    fn sum_of_losses(logits: FlexTensor, targets: FlexTensor) -> FlexTensor {
        let logits = contiguous(logits);
        let [_, vocab] = logits.layout().shape().dims();
        let rows = numbers(&logits).par_chunks_exact(vocab).zip(ids(targets, vocab));
        let losses = rows.map(|(row, target)| {
            vectorised(|| {
                let max = largest(row);
                loss_of(max, sum_of_exponentials(row, max), row[target])
            })
        });
        sum(losses.collect())
    }

    fn losses_and_slopes(logits: FlexTensor, targets: FlexTensor) -> (FlexTensor, FlexTensor, FlexTensor) {
        let mut logits = contiguous(logits);
        let [n, vocab] = logits.layout().shape().dims();
        let targets = ids(targets, vocab);
        let (losses, totals) = match numbers_mut(&mut logits) {
            Some(rows) => in_place(rows, &targets, vocab),
            // Somebody else holds them.
            None => {
                let mut rows = numbers(&logits).to_vec();
                let found = in_place(&mut rows, &targets, vocab);
                logits = tensor(rows, [n, vocab]);
                found
            }
        };
        (sum(losses), logits, tensor(totals, [n, 1]))
    }
}

/// Turns logits into `total` times the gradient, and returns the losses and totals of the rows.
fn in_place(logits: &mut [f32], targets: &[usize], vocab: usize) -> (Vec<f64>, Vec<f32>) {
    let rows = logits.par_chunks_exact_mut(vocab).zip(targets);
    let each = rows.map(|(row, &target)| {
        vectorised(|| {
            let (max, logit) = (largest(row), row[target]);
            let sum = exponentiate(row, max);
            row[target] -= sum as f32;
            (loss_of(max, sum, logit), sum as f32)
        })
    });
    each.unzip()
}

/// `log Σ exp(logits) - logits[target]`. The difference of the logits is exact where they are close, and the loss small.
fn loss_of(max: f32, sum: f64, logit: f32) -> f64 {
    f64::from(max - logit) + sum.ln()
}

fn sum(losses: Vec<f64>) -> FlexTensor {
    tensor(vec![losses.iter().sum::<f64>() as f32], [1])
}

/// The tokens of a vocabulary.
fn ids(targets: FlexTensor, vocab: usize) -> Vec<usize> {
    let targets = Flex::int_cast(targets, IntDType::I64).to_contiguous();
    let start = targets.layout().start_offset();
    let ids = &targets.storage::<i64>()[start..][..targets.layout().num_elements()];
    let within = |&id: &i64| {
        let is_token = usize::try_from(id).is_ok_and(|token| token < vocab);
        assert!(is_token, "the target {id} is no token: there are {vocab}");
        id as usize
    };
    ids.iter().map(within).collect()
}
