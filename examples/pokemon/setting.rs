//! A base model with everything that it is asked with, and one division of the species to train it on.

use anyhow::{Context, Result};
use burn::module::Module;
use burn::tensor::Device;
use burn_peft::{DEFAULT_ADAPTER, LoraConfig, PeftModel};
use burn_peft_examples::model::adapting;
use burn_peft_examples::progress::Progress;
use burn_peft_llama::{
    Collator, Example, Labels, LlamaConfig, LlamaForCausalLm, PaddingSide, Tokenizer, Trainer,
    TrainingConfig, evaluate,
};
use serde::Serialize;

use crate::arms::Arm;
use crate::base::{Base, Kind, name_or_path};
use crate::checks;
use crate::cli::{BaseArgs, LoraArgs, TrainingSettings};
use crate::data::{Species, Split};
use crate::evaluation::{self, Outcome, Score};
use crate::forgetting::Probe;
use crate::prompt::{Prompt, default_system};

/// Held-out species that the loss is measured on during training: enough for a curve.
const CURVE_SPECIES: usize = 96;

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

/// A model after its training.
pub struct Trained {
    pub model: LlamaForCausalLm,
    pub training: Training,
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

/// A base model and what it is asked.
pub struct Subject<'a> {
    args: &'a BaseArgs,
    /// What the report calls the base.
    pub name: String,
    pub kind: Kind,
    pub tokenizer: Tokenizer,
    pub prompt: Prompt,
    pub model: LlamaForCausalLm,
    pub probes: Vec<Probe>,
    /// What the base scores in them.
    pub before: Vec<Score>,
}

impl<'a> Subject<'a> {
    /// Loads the base that `args` name, and checks that it fits what `arms` will do with `species`.
    pub fn load(args: &'a BaseArgs, device: &Device, species: &[Species], arms: &[Arm]) -> Result<Self> {
        let base = Base::new(args.model.as_deref())?;
        let tokenizer = Tokenizer::load(base.path())?;
        let kind = Kind::of(&tokenizer);
        let system = args.system.clone().unwrap_or_else(|| default_system(kind));
        let prompt = Prompt::new(system);
        checks::prompts(&base, &tokenizer, &prompt, arms, species)?;

        let device = device.clone().autodiff();
        let model = LlamaForCausalLm::from_pretrained_as(base.path(), &device, args.dtype.into())?;
        if LlamaConfig::load(base.path())?.tie_word_embeddings && !model.config().tie_word_embeddings {
            println!("note: config.json says tied, and the weights have another `lm_head`; it is used");
        }
        if arms.iter().any(|arm| arm.trains()) {
            checks::training(&base, &model, &tokenizer, &prompt, species)?;
        }
        let probes = Probe::of(kind, species);
        let name = base.name();
        let mut subject = Self { args, name, kind, tokenizer, prompt, model, probes, before: Vec::new() };
        subject.before = subject.probe(&subject.model)?;
        Ok(subject)
    }

    /// An adapter of this base.
    pub fn lora_config(&self, rank: usize, args: &LoraArgs) -> LoraConfig {
        LoraConfig::new(rank)
            .with_lora_alpha(args.alpha)
            .with_lora_dropout(args.dropout(self.kind))
            .with_target_modules(args.targets.clone())
            .with_base_model_name_or_path(name_or_path(self.args.model.as_deref()))
            .with_task_type("CAUSAL_LM")
    }

    /// Whether `config` fits the model, found out on a copy; `rank` is the option of its rank. What is remarkable about it
    /// is printed.
    pub fn check(&self, config: &LoraConfig, rank: &str) -> Result<()> {
        checks::rank(config.r, rank, &self.model)?;
        let mut adapted = self.model.clone();
        let add = |model: &mut LlamaForCausalLm| model.add_adapter(DEFAULT_ADAPTER, config);
        let report = adapting(&mut adapted, add).context("`--targets`")?;
        if adapted.lm_head.is_some() && self.model.lm_head.is_none() {
            println!(
                "note: `lm_head` shares its table with the embedding; for LoRA it gets a weight of its own"
            );
        }
        for target in &report.unmatched_targets {
            println!("note: nothing in the model is called `{target}`");
        }
        for part in report.coverage.iter().filter(|part| !part.missing_layers.is_empty()) {
            println!("note: {part}");
        }
        Ok(())
    }

    /// How many of the held-out species are asked for.
    pub fn asked(&self, split: &Split) -> usize {
        self.args.limit.unwrap_or(usize::MAX).min(split.test.len())
    }

    /// The other abilities of a model.
    pub fn probe(&self, model: &LlamaForCausalLm) -> Result<Vec<Score>> {
        let run = |probe: &Probe| probe.run(model, &self.tokenizer, self.args.eval_batch_size);
        self.probes.iter().map(run).collect()
    }
}

/// One seed of an experiment on a base.
pub struct Setting<'a> {
    pub subject: &'a Subject<'a>,
    pub split: Split,
    pub seed: u64,
}

impl Setting<'_> {
    /// Asks for the types of the held-out species.
    pub fn evaluate(&self, model: &LlamaForCausalLm, prompt: &Prompt, title: &str) -> Result<Vec<Outcome>> {
        let Subject { args, tokenizer, .. } = self.subject;
        let test = &self.split.test[..self.subject.asked(&self.split)];
        evaluation::evaluate(model, tokenizer, prompt, test, args.eval_batch_size, title)
    }

    /// Trains all weights of a copy of the base.
    pub fn full(&self, settings: &TrainingSettings, title: &str) -> Result<Trained> {
        self.train(self.subject.model.clone(), settings, title)
    }

    /// Trains an adapter on a copy of the base. With the same seed, it starts with the same numbers on every device.
    pub fn lora(&self, config: &LoraConfig, settings: &TrainingSettings, title: &str) -> Result<Trained> {
        // Each backend has a generator of its own, so the numbers are those of the CPU.
        let cpu = Device::flex().autodiff();
        cpu.seed(self.seed);
        let mut on_cpu = self.subject.model.clone().to_device(&cpu);
        adapting(&mut on_cpu, |model| model.add_adapter(DEFAULT_ADAPTER, config))?;
        let start = tempfile::tempdir().context("a directory for the start of an adapter")?;
        on_cpu.save_adapter(DEFAULT_ADAPTER, start.path())?;
        drop(on_cpu);

        let mut model = self.subject.model.clone();
        adapting(&mut model, |model| model.load_adapter(DEFAULT_ADAPTER, start.path()))?;
        self.train(model, settings, title)
    }

    fn train(
        &self,
        mut model: LlamaForCausalLm,
        settings: &TrainingSettings,
        title: &str,
    ) -> Result<Trained> {
        let Subject { args, tokenizer, prompt, .. } = self.subject;
        let examples = |species| examples(tokenizer, prompt, species);
        let held_out = examples(&self.split.test[..CURVE_SPECIES.min(self.split.test.len())])?;
        let examples = examples(&self.split.train)?;
        let collator = collator(tokenizer)?;
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
        let progress = Progress::new(title, total);
        let mut trainer = Trainer::new(&config, examples, &collator)?;
        while let Some(report) = trainer.step(&mut model)? {
            if let Some(loss) = report.loss {
                training.train.push(Point { step: report.step, loss });
                progress.report(report.step, &format!("loss {loss:.3}"));
            }
            if report.step % eval_every == 0 || report.step == 1 || report.step == total {
                let loss = evaluate(&model, &held_out, &collator, args.eval_batch_size)?.loss;
                training.held_out.push(Point { step: report.step, loss });
            }
            training.steps = report.step;
            training.seconds = report.elapsed.as_secs_f64();
        }
        progress.finish();
        Ok(Trained { model: model.valid(), training })
    }
}
