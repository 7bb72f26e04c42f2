//! What steps computed, on the device until somebody reads it.

use burn::module::Module;
use burn::tensor::Tensor;

use super::mean_loss::{MeanLoss, scalar};
use crate::error::LlamaError;
use crate::gradient::Squares;
use crate::parameters::parameters;

/// The numbers of one step.
pub(super) struct StepNumbers {
    /// From 1.
    pub(super) step: usize,
    /// The examples that it learnt from.
    pub(super) examples: Vec<usize>,
    /// The sum of the losses of the labelled tokens, `[1]`.
    pub(super) loss: Tensor<1>,
    pub(super) num_targets: usize,
    /// Of the gradients before clipping. `None` for a step of a process before this one, which has checked them.
    pub(super) squares: Option<Squares>,
}

/// Mean loss over some steps and norm of the gradients of the last one.
pub(super) struct Read {
    pub(super) loss: Option<f64>,
    pub(super) grad_norm: Option<f64>,
}

/// Reads the numbers of some steps.
///
/// # Errors
/// [`LlamaError::NotFinite`] for the first one that is infinite or not a number, [`LlamaError::DeviceRead`].
pub(super) fn read<M: Module>(steps: &[StepNumbers], model: &M) -> Result<Read, LlamaError> {
    let mut mean = MeanLoss::default();
    for step in steps {
        mean.add((step.loss.clone(), step.num_targets));
    }
    let (Some(sum), count) = mean.total() else { return Ok(Read { loss: None, grad_norm: None }) };
    // All of them at once: a read waits until the device has done what it was asked for.
    let alike = |norm: &Tensor<1>| norm.clone().to_device(&sum.device()).cast(sum.dtype());
    let norms: Vec<_> = steps.iter().filter_map(|step| Some(alike(&step.squares.as_ref()?.norm))).collect();
    let numbers = Tensor::cat(std::iter::once(sum).chain(norms).collect(), 0).try_into_data();
    let numbers = numbers.map_err(|error| LlamaError::DeviceRead { source: Box::new(error) })?;
    let numbers: Vec<f64> = numbers.iter().collect();
    let loss = Some(numbers[0] / count as f64);
    let grad_norm = numbers[1..].last().copied();
    if numbers.iter().copied().all(f64::is_finite) {
        return Ok(Read { loss, grad_norm });
    }
    for step in steps {
        if let Some((what, value)) = culprit(step, model)? {
            return Err(LlamaError::NotFinite {
                what,
                value,
                step: step.step,
                examples: step.examples.clone(),
            });
        }
    }
    Ok(Read { loss, grad_norm })
}

/// The first number of a step that is not finite, and what it is.
fn culprit<M: Module>(step: &StepNumbers, model: &M) -> Result<Option<(String, f64)>, LlamaError> {
    let loss = scalar(step.loss.clone())?;
    let of_loss = || ("the loss".to_string(), loss / step.num_targets as f64);
    let Some(squares) = &step.squares else { return Ok((!loss.is_finite()).then(of_loss)) };
    let sums = squares.sums.clone().try_into_data();
    let sums = sums.map_err(|error| LlamaError::DeviceRead { source: Box::new(error) })?;
    // With gradient checkpointing, a gradient that is not finite spoils the loss, but no other gradient.
    if !loss.is_finite() && !sums.iter::<f64>().any(f64::is_finite) {
        return Ok(Some(of_loss()));
    }
    let bad = sums.iter::<f64>().zip(&squares.parameters).find(|(sum, _)| !sum.is_finite());
    Ok(match bad {
        Some((sum, id)) => {
            let parameter = parameters(model).into_iter().find(|parameter| parameter.id == *id);
            let name = parameter.map(|parameter| parameter.name).unwrap_or_default();
            Some((format!("the squared norm of the gradient of `{name}`"), sum))
        }
        None => {
            let norm = scalar(squares.norm.clone())?;
            (!norm.is_finite()).then(|| ("the norm of the gradients".to_string(), norm))
        }
    })
}
