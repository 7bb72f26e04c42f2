//! The arms of the experiment: two ways to prompt, two ways to fine-tune.

use std::fmt;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use burn::module::Module;
use burn::tensor::Device;
use burn_peft::{DEFAULT_ADAPTER, LoraConfig, PeftError, PeftModel};
use burn_peft_llama::{
    Collator, Example, Labels, LlamaForCausalLm, PaddingSide, Tokenizer, Trainer, TrainingConfig, evaluate,
};
use clap::ValueEnum;
use serde::Serialize;

use crate::base::{Kind, name_or_path};
use crate::cli::{ExperimentArgs, TrainingSettings};
use crate::data::{Species, Split};
use crate::evaluation::{self, Outcome, Score};
use crate::forgetting::Probe;
use crate::prompt::Prompt;
use crate::provenance::Provenance;
use burn_peft_examples::progress::Progress;

/// Held-out species that the loss is measured on during training: enough for a curve.
const CURVE_SPECIES: usize = 96;

/// One way to get the answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Arm {
    /// The instruction alone
    ZeroShot,
    /// The instruction and answered examples
    FewShot,
    /// All weights are trained
    Full,
    /// An adapter is trained, the weights stay
    Lora,
    /// A saved adapter; chosen by `--adapter`
    #[value(skip)]
    Adapter,
}

impl Arm {
    /// The arms that `--arms` knows, in the order of the report.
    pub const ALL: [Self; 4] = [Self::ZeroShot, Self::FewShot, Self::Full, Self::Lora];

    /// Whether something is trained.
    pub fn trains(self) -> bool {
        matches!(self, Self::Full | Self::Lora)
    }

    /// What the report calls it.
    pub fn title(self) -> &'static str {
        match self {
            Self::ZeroShot => "prompting, zero-shot",
            Self::FewShot => "prompting, few-shot",
            Self::Full => "full fine-tuning",
            Self::Lora => "LoRA",
            Self::Adapter => "saved adapter",
        }
    }

    /// Accuracy in percent that the original article gives, for Llama-3.2-1B-Instruct.
    pub fn article(self) -> Option<&'static str> {
        match self {
            Self::ZeroShot | Self::FewShot => Some("17.5 %"),
            Self::Full => Some("collapsed"),
            Self::Lora => Some("67.21 %"),
            Self::Adapter => None,
        }
    }

    /// The same as a share, where the article gives a number.
    pub fn article_share(self) -> Option<f64> {
        match self {
            Self::ZeroShot | Self::FewShot => Some(0.175),
            Self::Lora => Some(0.6721),
            Self::Full | Self::Adapter => None,
        }
    }
}

impl fmt::Display for Arm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.to_possible_value().as_ref().map_or("adapter", |value| value.get_name()))
    }
}

/// One point of a loss curve.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Point {
    pub step: usize,
    pub loss: f64,
}

/// What training an arm took and showed.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Training {
    pub steps: usize,
    /// Time of the steps alone, without the measurements on held-out species.
    pub seconds: f64,
    /// How it was trained, in words.
    pub settings: String,
    pub trainable: String,
    /// Mean loss of the answer tokens over the last logged steps.
    pub train: Vec<Point>,
    /// The same on held-out species.
    pub held_out: Vec<Point>,
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

/// The adapter that the LoRA arm trains.
pub fn lora_config(args: &ExperimentArgs, kind: Kind) -> LoraConfig {
    LoraConfig::new(args.rank)
        .with_lora_alpha(args.alpha)
        .with_lora_dropout(args.lora_dropout(kind))
        .with_target_modules(args.targets.clone())
        .with_base_model_name_or_path(name_or_path(args.model.as_deref()))
        .with_task_type("CAUSAL_LM")
}

/// Puts an adapter onto `model`. If it is for an output layer that shares the embedding's table, the output layer gets a
/// weight of its own first, which changes no answer.
///
/// # Errors
/// Those of `adapt`.
pub fn adapting<T>(
    model: &mut LlamaForCausalLm,
    adapt: impl Fn(&mut LlamaForCausalLm) -> Result<T, PeftError>,
) -> Result<T, PeftError> {
    match adapt(model) {
        Err(PeftError::NoOutputLayer { .. }) => {
            model.untie_lm_head();
            adapt(model)
        }
        adapted => adapted,
    }
}

/// Questions and their answers. The model learns the answers.
pub fn examples(tokenizer: &Tokenizer, prompt: &Prompt, species: &[Species]) -> Result<Vec<Example>> {
    let encode =
        |one: &Species| Ok(tokenizer.encode_conversation(&prompt.conversation(one), Labels::LastAnswer)?);
    species.iter().map(encode).collect()
}

/// Pads as generation does.
pub fn collator(tokenizer: &Tokenizer) -> Result<Collator> {
    let pad = tokenizer.pad_token_id().context(
        "the tokenizer has neither a padding nor an end token\nhint: name the end token as `eos_token` in `tokenizer_config.json`",
    )?;
    Ok(Collator::new(pad).with_side(PaddingSide::Left))
}

/// What all arms of one seed share.
pub struct Setting<'a> {
    pub args: &'a ExperimentArgs,
    pub base: &'a LlamaForCausalLm,
    pub kind: Kind,
    pub tokenizer: &'a Tokenizer,
    pub device: &'a Device,
    pub prompt: Prompt,
    pub probes: &'a [Probe],
    pub split: Split,
    pub seed: u64,
}

impl Setting<'_> {
    /// Runs one arm; the LoRA arm saves its adapter into `adapter`.
    pub fn run(&self, arm: Arm, adapter: &Path) -> Result<ArmResult> {
        let start = Instant::now();
        let (outcomes, abilities, training) = match arm {
            Arm::ZeroShot => (self.evaluate(self.base, &self.prompt, arm)?, Vec::new(), None),
            Arm::FewShot => {
                // The split has shuffled them already.
                let shots = &self.split.train[..self.args.shots.min(self.split.train.len())];
                let prompt = self.prompt.clone().with_shots(shots);
                (self.evaluate(self.base, &prompt, arm)?, Vec::new(), None)
            }
            Arm::Full => {
                let (model, training) =
                    self.train(arm, self.base.clone(), &self.args.full_training(self.kind))?;
                (self.evaluate(&model, &self.prompt, arm)?, self.probe(&model)?, Some(training))
            }
            Arm::Lora => {
                let mut model = self.base.clone();
                self.device.seed(self.seed);
                let config = lora_config(self.args, self.kind);
                let report = adapting(&mut model, |model| model.add_adapter(DEFAULT_ADAPTER, &config))?;
                for target in &report.unmatched_targets {
                    println!("note: nothing in the model is called `{target}`");
                }
                for part in report.coverage.iter().filter(|part| !part.missing_layers.is_empty()) {
                    println!("note: {part}");
                }
                let (model, training) = self.train(arm, model, &self.args.lora_training(self.kind))?;
                // In this order an adapter never stands beside the provenance of another.
                Provenance::forget(adapter)?;
                model.save_adapter(DEFAULT_ADAPTER, adapter)?;
                Provenance { seed: self.seed, split: self.split.fingerprint() }.write(adapter)?;
                (self.evaluate(&model, &self.prompt, arm)?, self.probe(&model)?, Some(training))
            }
            Arm::Adapter => {
                let mut model = self.base.clone();
                let dir = self.args.adapter.as_deref().unwrap_or(adapter);
                adapting(&mut model, |model| model.load_adapter(DEFAULT_ADAPTER, dir))?;
                (self.evaluate(&model, &self.prompt, arm)?, self.probe(&model)?, None)
            }
        };
        Ok(ArmResult {
            arm,
            seed: self.seed,
            outcomes,
            abilities,
            training,
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    /// The other abilities of a model.
    pub fn probe(&self, model: &LlamaForCausalLm) -> Result<Vec<Score>> {
        let run = |probe: &Probe| probe.run(model, self.tokenizer, self.args.eval_batch_size);
        self.probes.iter().map(run).collect()
    }

    fn evaluate(&self, model: &LlamaForCausalLm, prompt: &Prompt, arm: Arm) -> Result<Vec<Outcome>> {
        let test = &self.split.test[..self.args.limit.unwrap_or(usize::MAX).min(self.split.test.len())];
        evaluation::evaluate(model, self.tokenizer, prompt, test, self.args.eval_batch_size, arm.title())
    }

    fn train(
        &self,
        arm: Arm,
        mut model: LlamaForCausalLm,
        settings: &TrainingSettings,
    ) -> Result<(LlamaForCausalLm, Training)> {
        let examples = |species| examples(self.tokenizer, &self.prompt, species);
        let held_out = examples(&self.split.test[..CURVE_SPECIES.min(self.split.test.len())])?;
        let examples = examples(&self.split.train)?;
        let collator = collator(self.tokenizer)?;
        let total = examples.len().div_ceil(settings.batch_size) * settings.epochs;
        let config = TrainingConfig::new()
            .with_learning_rate(settings.learning_rate)
            .with_epochs(settings.epochs)
            .with_batch_size(settings.batch_size)
            .with_warmup_steps(settings.warmup)
            .with_schedule(settings.decay.into())
            .with_seed(self.seed)
            .with_log_every(settings.log_every.unwrap_or(total.div_ceil(16)));
        let eval_every = settings.eval_every.unwrap_or(total.div_ceil(8));

        let mut training = Training {
            settings: settings.to_string(),
            trainable: model.trainable_parameters().to_string(),
            ..Training::default()
        };
        let progress = Progress::new(arm.title(), total);
        let mut trainer = Trainer::new(&config, examples, &collator)?;
        while let Some(report) = trainer.step(&mut model)? {
            if let Some(loss) = report.loss {
                training.train.push(Point { step: report.step, loss });
                progress.report(report.step, &format!("loss {loss:.3}"));
            }
            if report.step % eval_every == 0 || report.step == 1 || report.step == total {
                let loss = evaluate(&model, &held_out, &collator, self.args.eval_batch_size)?.loss;
                training.held_out.push(Point { step: report.step, loss });
            }
            training.steps = report.step;
            training.seconds = report.elapsed.as_secs_f64();
        }
        progress.finish();
        Ok((model.valid(), training))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_on_the_command_line_and_in_files_are_the_same() {
        for arm in [Arm::ZeroShot, Arm::FewShot, Arm::Full, Arm::Lora, Arm::Adapter] {
            assert_eq!(serde_json::to_value(arm).unwrap(), serde_json::json!(arm.to_string()));
        }
        assert_eq!(Arm::from_str("zero-shot", false), Ok(Arm::ZeroShot));
        assert!(Arm::from_str("adapter", false).is_err());
    }
}
