//! The loss of a model on examples it is not trained on.

use std::cmp::Reverse;

use super::check::{check_examples, device};
use super::mean_loss::MeanLoss;
use super::{CausalLmLoss, TrainingConfig};
use crate::batch::Collator;
use crate::conversation::Example;
use crate::error::LlamaError;

/// What [`evaluate`] measures.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// Mean loss per labelled token, in nats.
    pub loss: f64,
    /// Number of labelled tokens.
    pub num_targets: usize,
}

impl Evaluation {
    /// The exponential of the loss.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}

/// The mean loss of `model` per labelled token of `examples`, in batches of `batch_size` of like length.
///
/// A model that is being trained is evaluated as `model.valid()`: without gradients and dropout.
///
/// # Errors
/// [`LlamaError::InvalidOption`] if `batch_size` is 0, those of [`Collator::collate`], and
/// [`LlamaError::DeviceRead`] if the loss cannot be read.
pub fn evaluate<M: CausalLmLoss>(
    model: &M,
    examples: &[Example],
    collator: &Collator,
    batch_size: usize,
) -> Result<Evaluation, LlamaError> {
    TrainingConfig::new().with_batch_size(batch_size).check()?;
    check_examples(examples, collator, model.vocab_size())?;
    let device = device(model)?;
    let model = if device.is_autodiff() { model.valid() } else { model.clone() };
    let device = device.inner();
    let mut order: Vec<&Example> = examples.iter().collect();
    order.sort_by_key(|example| Reverse(example.input_ids.len()));
    let mut mean = MeanLoss::default();
    for batch in order.chunks(batch_size) {
        let batch: Vec<Example> = batch.iter().copied().cloned().collect();
        let batch = collator.collate(&batch, &device)?;
        mean.add((model.loss(&batch) * batch.num_targets as f64, batch.num_targets));
    }
    let num_targets = mean.count;
    Ok(Evaluation { loss: mean.take()?.unwrap_or(f64::NAN), num_targets })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::tests::{Bigram, autodiff, examples};

    #[test]
    fn the_loss_is_the_mean_over_tokens_whatever_the_batches() {
        let model = Bigram::new(&autodiff());
        let at = |batch_size| evaluate(&model, &examples(), &Collator::new(7), batch_size);
        let whole = at(21).unwrap();
        assert_eq!(whole.num_targets, examples().iter().map(Example::num_targets).sum::<usize>());
        for batch_size in [1, 4] {
            let parts = at(batch_size).unwrap();
            assert_eq!(parts.num_targets, whole.num_targets);
            assert!((parts.loss - whole.loss).abs() < 1e-5, "{parts:?} {whole:?}");
        }
        assert!(matches!(at(0), Err(LlamaError::InvalidOption { option: "batch_size", .. })));
    }
}
