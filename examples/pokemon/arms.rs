//! The arms of the experiment: two ways to prompt, three ways to fine-tune.

use std::fmt;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use burn_peft::{DEFAULT_ADAPTER, PeftModel};
use burn_peft_examples::model::adapting;
use clap::ValueEnum;
use serde::Serialize;

use crate::cli::ExperimentArgs;
use crate::evaluation::{Outcome, Score};
use crate::provenance::Provenance;
use crate::setting::{Setting, Training};

/// One way to get the answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Arm {
    /// The instruction alone
    ZeroShot,
    /// The instruction and answered examples
    FewShot,
    /// All weights are trained, at the learning rate that torch's AdamW has as its default
    Careless,
    /// All weights are trained, at a learning rate of their own
    Full,
    /// An adapter is trained, the weights stay
    Lora,
    /// A saved adapter; chosen by `--adapter`
    #[value(skip)]
    Adapter,
}

impl Arm {
    /// The arms that `--arms` knows, in the order of the report.
    pub const ALL: [Self; 5] = [Self::ZeroShot, Self::FewShot, Self::Careless, Self::Full, Self::Lora];

    /// Whether something is trained.
    pub fn trains(self) -> bool {
        matches!(self, Self::Careless | Self::Full | Self::Lora)
    }

    /// What the report calls it.
    pub fn title(self) -> &'static str {
        match self {
            Self::ZeroShot => "prompting, zero-shot",
            Self::FewShot => "prompting, few-shot",
            Self::Careless => "full, careless rate",
            Self::Full => "full fine-tuning",
            Self::Lora => "LoRA",
            Self::Adapter => "saved adapter",
        }
    }

    /// Accuracy in percent that the original article gives, for Llama-3.2-1B-Instruct.
    pub fn article(self) -> Option<&'static str> {
        match self {
            Self::ZeroShot | Self::FewShot => Some("17.5 %"),
            Self::Careless | Self::Full => Some("collapsed"),
            Self::Lora => Some("67.21 %"),
            Self::Adapter => None,
        }
    }

    /// The same as a share, where the article gives a number.
    pub fn article_share(self) -> Option<f64> {
        match self {
            Self::ZeroShot | Self::FewShot => Some(0.175),
            Self::Lora => Some(0.6721),
            Self::Careless | Self::Full | Self::Adapter => None,
        }
    }
}

impl fmt::Display for Arm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.to_possible_value().as_ref().map_or("adapter", |value| value.get_name()))
    }
}

/// What came out of one arm with one seed.
#[derive(Clone, Debug, Serialize)]
pub struct ArmResult {
    pub arm: Arm,
    pub seed: u64,
    pub outcomes: Vec<Outcome>,
    /// The other abilities after fine-tuning, in the order of the probes; none for an arm that changes no weight.
    pub abilities: Vec<Score>,
    pub training: Option<Training>,
    /// All of it, evaluation included.
    pub seconds: f64,
}

/// Runs one arm; the LoRA arm saves its adapter into `adapter`.
pub fn run(arm: Arm, setting: &Setting<'_>, args: &ExperimentArgs, adapter: &Path) -> Result<ArmResult> {
    let start = Instant::now();
    let subject = setting.subject;
    let mut abilities = Vec::new();
    let mut training = None;
    let outcomes = match arm {
        Arm::ZeroShot => setting.evaluate(&subject.model, &subject.prompt, arm.title())?,
        Arm::FewShot => {
            // The split has shuffled them already.
            let shots = &setting.split.train[..args.shots.min(setting.split.train.len())];
            setting.evaluate(&subject.model, &subject.prompt.clone().with_shots(shots), arm.title())?
        }
        Arm::Careless | Arm::Full | Arm::Lora => {
            let trained = match arm {
                Arm::Careless => setting.full(&args.careless_training(subject.kind), arm.title())?,
                Arm::Full => setting.full(&args.full_training(subject.kind), arm.title())?,
                _ => {
                    let config = subject.lora_config(args.rank, &args.lora);
                    setting.lora(&config, &args.lora_training(subject.kind), arm.title())?
                }
            };
            if arm == Arm::Lora {
                // In this order an adapter never stands beside the provenance of another.
                Provenance::forget(adapter)?;
                trained.model.save_adapter(DEFAULT_ADAPTER, adapter)?;
                Provenance { seed: setting.seed, split: setting.split.fingerprint() }.write(adapter)?;
            }
            abilities = subject.probe(&trained.model)?;
            training = Some(trained.training);
            setting.evaluate(&trained.model, &subject.prompt, arm.title())?
        }
        Arm::Adapter => {
            let mut model = subject.model.clone();
            let dir = args.adapter.as_deref().unwrap_or(adapter);
            adapting(&mut model, |model| model.load_adapter(DEFAULT_ADAPTER, dir))?;
            abilities = subject.probe(&model)?;
            setting.evaluate(&model, &subject.prompt, arm.title())?
        }
    };
    let seconds = start.elapsed().as_secs_f64();
    Ok(ArmResult { arm, seed: setting.seed, outcomes, abilities, training, seconds })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_on_the_command_line_and_in_files_are_the_same() {
        for arm in [Arm::ZeroShot, Arm::FewShot, Arm::Careless, Arm::Full, Arm::Lora, Arm::Adapter] {
            assert_eq!(serde_json::to_value(arm).unwrap(), serde_json::json!(arm.to_string()));
        }
        assert_eq!(Arm::from_str("zero-shot", false), Ok(Arm::ZeroShot));
        assert!(Arm::from_str("adapter", false).is_err());
    }
}
