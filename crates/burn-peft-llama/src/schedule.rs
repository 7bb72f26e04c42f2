//! Learning-rate schedules, named and defined as in transformers.

use std::f64::consts::PI;
use std::fmt;
use std::str::FromStr;

use burn::lr_scheduler::{LrScheduler, LrSchedulerRecord};
use serde::{Deserialize, Serialize};

use crate::error::LlamaError;
use crate::problem::alternatives;

/// How the learning rate changes over a training.
///
/// With `w` warm-up steps, `t` steps in all and optimizer steps counted from 0, step `i` has the base rate times a
/// factor. All but [`Constant`](Self::Constant) rise as `i / w` while `i < w`; afterwards, with
/// `p = (i - w) / (t - w)`, the factor is the one given with each variant. As in transformers, the first step of a
/// warm-up has rate 0.
///
/// Burn's own schedulers cannot express this: they start above 0. Past the end, the linear one holds its value and the
/// cosine one rises again.
///
/// ```
/// use burn_peft_llama::Schedule;
///
/// # fn main() -> Result<(), burn_peft_llama::LlamaError> {
/// let schedule: Schedule = "linear".parse()?;
/// assert_eq!(schedule.factor(5, 10, 110), 0.5);
/// assert_eq!(schedule.factor(60, 10, 110), 0.5);
/// # Ok(())
/// # }
/// ```
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// `linear`: `1 - p`.
    #[default]
    Linear,
    /// `cosine`: `(1 + cos(pi p)) / 2`.
    Cosine,
    /// `constant`: 1 throughout, warm-up steps are ignored.
    Constant,
    /// `constant_with_warmup`: 1.
    ConstantWithWarmup,
}

const NAMES: [(Schedule, &str); 4] = [
    (Schedule::Linear, "linear"),
    (Schedule::Cosine, "cosine"),
    (Schedule::Constant, "constant"),
    (Schedule::ConstantWithWarmup, "constant_with_warmup"),
];

impl Schedule {
    /// The factor of the base learning rate at optimizer step `step`, counted from 0, of `total` steps of which
    /// the first `warmup` are warm-up. Past the end, the last value holds.
    pub fn factor(self, step: usize, warmup: usize, total: usize) -> f64 {
        if self == Self::Constant {
            return 1.0;
        }
        if step < warmup {
            return step as f64 / warmup as f64;
        }
        let progress = (step - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
        match self {
            Self::Linear => (1.0 - progress).max(0.0),
            Self::Cosine => 0.5 * (1.0 + (PI * progress.min(1.0)).cos()),
            Self::Constant | Self::ConstantWithWarmup => 1.0,
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(schedule, _)| schedule == self).map_or("", |(_, name)| name);
        f.pad(name)
    }
}

impl FromStr for Schedule {
    type Err = LlamaError;

    fn from_str(name: &str) -> Result<Self, LlamaError> {
        NAMES.iter().find(|(_, known)| *known == name).map(|(schedule, _)| *schedule).ok_or_else(|| {
            LlamaError::UnknownName {
                what: "schedule",
                name: name.to_string(),
                expected: alternatives(NAMES.iter().map(|(_, name)| *name)),
            }
        })
    }
}

/// A [`Schedule`] in motion, as Burn's learner takes it: each `step` gives the rate of the next optimizer step.
#[derive(Clone, Debug, PartialEq)]
pub struct LrSchedule {
    schedule: Schedule,
    learning_rate: f64,
    warmup: usize,
    total: usize,
    step: usize,
}

impl LrSchedule {
    /// A schedule with base rate `learning_rate` over `total` optimizer steps, the first `warmup` being warm-up.
    pub fn new(schedule: Schedule, learning_rate: f64, warmup: usize, total: usize) -> Self {
        Self { schedule, learning_rate, warmup, total, step: 0 }
    }
}

impl LrScheduler for LrSchedule {
    fn step(&mut self) -> f64 {
        let factor = self.schedule.factor(self.step, self.warmup, self.total);
        self.step += 1;
        self.learning_rate * factor
    }

    fn to_record(&self) -> LrSchedulerRecord {
        LrSchedulerRecord::new().with_scalar("step", self.step as u64)
    }

    fn load_record(&mut self, record: LrSchedulerRecord) {
        if let Some(step) = record.scalar::<u64>("step") {
            self.step = step as usize;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(schedule: Schedule) -> Vec<f64> {
        let mut schedule = LrSchedule::new(schedule, 0.5, 2, 6);
        (0..8).map(|_| schedule.step()).collect()
    }

    fn assert_close(actual: &[f64], expected: &[f64]) {
        assert_eq!(actual.len(), expected.len());
        for (a, e) in actual.iter().zip(expected) {
            assert!((a - e).abs() < 1e-12, "{actual:?} != {expected:?}");
        }
    }

    #[test]
    fn each_schedule_warms_up_and_decays_as_in_transformers() {
        // get_scheduler(name, optimizer with lr 0.5, num_warmup_steps=2, num_training_steps=6)
        assert_close(&rates(Schedule::Linear), &[0.0, 0.25, 0.5, 0.375, 0.25, 0.125, 0.0, 0.0]);
        let r = 0.25 * 0.5f64.sqrt();
        assert_close(&rates(Schedule::Cosine), &[0.0, 0.25, 0.5, 0.25 + r, 0.25, 0.25 - r, 0.0, 0.0]);
        assert_close(&rates(Schedule::Constant), &[0.5; 8]);
        assert_close(&rates(Schedule::ConstantWithWarmup), &[0.0, 0.25, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]);
    }

    #[test]
    fn without_warm_up_the_first_step_has_the_full_rate() {
        for (schedule, _) in NAMES {
            assert_eq!(schedule.factor(0, 0, 10), 1.0);
        }
    }

    #[test]
    fn a_warm_up_as_long_as_the_training_divides_by_nothing() {
        assert_eq!(Schedule::Linear.factor(3, 3, 3), 1.0);
        assert_eq!(Schedule::Cosine.factor(9, 3, 3), 0.0);
    }

    #[test]
    fn names_round_trip_and_others_are_refused() {
        for (schedule, name) in NAMES {
            assert_eq!(schedule.to_string(), name);
            assert_eq!(name.parse::<Schedule>().unwrap(), schedule);
            assert_eq!(serde_json::to_string(&schedule).unwrap(), format!("\"{name}\""));
        }
        let error = "exponential".parse::<Schedule>().unwrap_err().to_string();
        assert!(error.contains("`exponential`") && error.contains("`cosine`"), "{error}");
    }

    #[test]
    fn a_record_resumes_where_it_was_taken() {
        let mut one = LrSchedule::new(Schedule::Cosine, 1.0, 1, 9);
        for _ in 0..4 {
            one.step();
        }
        let mut two = LrSchedule::new(Schedule::Cosine, 1.0, 1, 9);
        two.load_record(one.to_record());
        assert_eq!(two.step(), one.step());
        assert_ne!(two.step(), LrSchedule::new(Schedule::Cosine, 1.0, 1, 9).step());
    }
}
