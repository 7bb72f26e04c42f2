//! Progress reports.

use std::time::Duration;

/// What happened in one optimizer step.
#[non_exhaustive]
#[derive(Clone, Debug)]
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
    /// Norm of the step's gradients before clipping, where there is a loss and clipping is on.
    pub grad_norm: Option<f64>,
    /// Tokens seen so far, without padding.
    pub num_tokens: usize,
    /// Time since the training began.
    pub elapsed: Duration,
}

impl StepReport {
    /// Tokens per second since the training began, without padding.
    pub fn tokens_per_second(&self) -> f64 {
        self.num_tokens as f64 / self.elapsed.as_secs_f64().max(f64::MIN_POSITIVE)
    }
}
