//! Progress reports.

use std::time::Duration;

/// What happened in one optimizer step.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// The step, from 1.
    pub step: usize,
    /// Steps of the whole training.
    pub total_steps: usize,
    /// Passes over the examples so far, such as 1.5.
    pub epoch: f64,
    /// The step's learning rate.
    pub learning_rate: f64,
    /// Mean loss per labelled token over the steps since the last one that had a loss; `None` between them.
    pub loss: Option<f64>,
    /// Norm of the step's gradients before clipping, where there is a loss.
    pub grad_norm: Option<f64>,
    /// Tokens seen so far, without padding.
    pub num_tokens: usize,
    /// Time spent in steps, those before a resume included.
    pub elapsed: Duration,
    /// At the first step, the trained parameters that got no gradient: the loss of this step does not depend on them. An
    /// adapter of which none got one is an error.
    pub without_gradient: Vec<String>,
}

impl StepReport {
    /// Tokens per second of the time spent in steps, without padding.
    pub fn tokens_per_second(&self) -> f64 {
        self.num_tokens as f64 / self.elapsed.as_secs_f64().max(f64::MIN_POSITIVE)
    }
}
