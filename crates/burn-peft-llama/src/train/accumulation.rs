//! Gradients of several batches as if they were one.

use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::Tensor;

use super::CausalLmLoss;
use super::check::hint;
use super::mean_loss::MeanLoss;
use crate::batch::Batch;
use crate::error::LlamaError;

/// The gradient of the mean loss over all labelled tokens of several batches, and that loss as sum and count.
pub(super) fn window_grads<M: CausalLmLoss>(
    model: &M,
    window: &[Batch],
) -> Result<(GradientsParams, (Tensor<1>, usize)), LlamaError> {
    let total: usize = window.iter().map(|batch| batch.num_targets).sum();
    let mut accumulator = GradientsAccumulator::new();
    let mut losses = MeanLoss::default();
    for batch in window {
        let loss = model.loss(batch);
        if !loss.is_tracked() {
            // Burn panics if there is nothing to walk.
            return Err(LlamaError::NotTrainable { hint: hint(model) });
        }
        losses.add((loss.clone().inner() * batch.num_targets as f64, batch.num_targets));
        // The mean of means would weigh the tokens of short batches more.
        let loss = if window.len() == 1 { loss } else { loss * (batch.num_targets as f64 / total as f64) };
        accumulator.accumulate(model, GradientsParams::from_grads(loss.backward(), model));
    }
    let grads = accumulator.grads();
    match losses.total() {
        (Some(sum), count) if !grads.is_empty() => Ok((grads, (sum, count))),
        _ => Err(LlamaError::NotTrainable { hint: "the loss does not depend on any trainable parameter" }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Collator;
    use crate::train::mean_loss::scalar;
    use crate::train::tests::{Bigram, autodiff, examples, furthest};

    #[test]
    fn accumulated_batches_give_the_gradient_of_one_large_batch() {
        let model = Bigram::new(&autodiff());
        let collator = Collator::new(7);
        let rows = examples();
        // 1, 5 and 4 labelled tokens: the mean of the means is another gradient.
        let parts = [&rows[0..1], &rows[4..5], &rows[3..4]];
        let whole = collator.collate(&parts.concat(), &autodiff()).unwrap();
        let parts: Vec<Batch> =
            parts.iter().map(|rows| collator.collate(rows, &autodiff()).unwrap()).collect();
        let counts: Vec<usize> = parts.iter().map(|part| part.num_targets).collect();
        assert_eq!(counts, [1, 5, 4]);
        let (grads, (sum, count)) = window_grads(&model, &parts).unwrap();
        let (expected, (expected_sum, _)) = window_grads(&model, &[whole]).unwrap();
        assert_eq!(count, 10);
        assert!((scalar(sum).unwrap() - scalar(expected_sum).unwrap()).abs() < 1e-5);
        let id = model.head.weight.id;
        let values = |grads: &GradientsParams| -> Vec<f32> {
            grads.get::<2>(id).unwrap().into_data().iter::<f32>().collect()
        };
        assert!(furthest(&values(&grads), &values(&expected)) < 1e-6);
        let mut means = GradientsAccumulator::new();
        for part in &parts {
            let loss = model.loss(part) / 3.0;
            means.accumulate(&model, GradientsParams::from_grads(loss.backward(), &model));
        }
        assert!(furthest(&values(&means.grads()), &values(&expected)) > 1e-3);
    }
}
