//! The command line: what can be set, what it means, and what is used where nothing is set.

use std::collections::HashSet;
use std::fmt;
use std::path::PathBuf;

use burn_peft::TargetModules;
use burn_peft_examples::arguments::{Decay, Precision, at_least_one, positive, probability, targets};
use clap::{Args, Parser, Subcommand};

use crate::arms::Arm;
use crate::base::Kind;
use burn_peft_examples::device::DeviceName;

/// What does LoRA change? Asks a language model for the types of Pokémon species it was never asked about, before and
/// after fine-tuning: by prompting, after full fine-tuning, and after LoRA fine-tuning.
///
/// Without options the experiment runs on a small base model that is part of this program, on the CPU, in a few
/// minutes. `--model` takes any LLaMA in the Hugging Face layout instead.
#[derive(Parser, Debug)]
#[command(name = "pokemon", version, args_conflicts_with_subcommands = true, max_term_width = 110)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub experiment: ExperimentArgs,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Builds a base model like the embedded one from scratch: text, tokenizer, training, a Hugging Face directory. The
    /// experiment on it is `--model DIR`.
    Pretrain(PretrainArgs),
    /// Which learning rates and ranks are best? Trains with each, LoRA and all weights, and draws accuracy against what
    /// is forgotten.
    Sweep(SweepArgs),
}

#[derive(Args, Debug, Clone)]
pub struct PretrainArgs {
    /// Directory to write the model to; it is made, and must be empty if it exists
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Species to write about, a CSV file; the one that is part of the program if not given
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Number of optimizer steps, 1 or more
    #[arg(long, default_value_t = 2000, value_parser = at_least_one)]
    pub steps: usize,
    /// Sequences in a batch, 1 or more
    #[arg(long, default_value_t = 16, value_parser = at_least_one)]
    pub batch_size: usize,
    /// Tokens in a sequence, 32 or more: documents are packed into sequences of this length
    #[arg(long, default_value_t = 160, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(32..=4096))]
    pub length: usize,
    /// Peak learning rate of AdamW, above 0; cosine decay after a linear warm-up
    #[arg(long, default_value_t = 2e-3, value_parser = positive, allow_negative_numbers = true)]
    pub learning_rate: f64,
    /// Steps of linear warm-up
    #[arg(long, default_value_t = 100)]
    pub warmup: usize,
    /// Tokens in the vocabulary, 512 or more
    #[arg(long, default_value_t = 2048, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(512..=65536))]
    pub vocab_size: usize,
    /// Width of the model, a multiple of 16 (8 attention heads of an even size)
    #[arg(long, default_value_t = 256, value_parser = multiple_of_16)]
    pub hidden_size: usize,
    /// Number of blocks, 1 or more
    #[arg(long, default_value_t = 4, value_parser = at_least_one)]
    pub layers: usize,
    /// Seed of the weights and of the text
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Steps between two lines of the log, 1 or more
    #[arg(long, default_value_t = 20, value_parser = at_least_one)]
    pub log_every: usize,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu)]
    pub device: DeviceName,
}

/// What a saved adapter has decided already, or has no use for.
const WITHOUT_ADAPTER: [&str; 16] = [
    "arms",
    "seeds",
    "shots",
    "rank",
    "alpha",
    "dropout",
    "targets",
    "batch_size",
    "learning_rate",
    "epochs",
    "full_learning_rate",
    "full_epochs",
    "schedule",
    "warmup",
    "log_every",
    "eval_every",
];

/// What is asked, and where it is computed.
#[derive(Args, Debug, Clone)]
pub struct BaseArgs {
    /// Base model: a directory in the Hugging Face layout (config.json, model.safetensors, tokenizer.json, chat
    /// template) with the LLaMA architecture, or owner/name on the Hub; the embedded
    /// base model if not given. One that `pretrain` made, recognised by its chat template, works like the embedded one;
    /// the defaults below for `--model` are those of any other
    #[arg(long, value_name = "DIR|ID", help_heading = "Experiment")]
    pub model: Option<String>,
    /// Species of at least 5 evolution families: a CSV file with the columns
    /// number,name,primary,secondary,generation,family; the file that is part of the program (all 1025 species) if
    /// not given
    #[arg(long, value_name = "FILE", help_heading = "Experiment")]
    pub data: Option<PathBuf>,
    /// Evaluate at most so many held-out species, 1 or more: for a quick look [default: all]
    #[arg(long, value_parser = at_least_one, value_name = "N", help_heading = "Experiment")]
    pub limit: Option<usize>,
    /// System text of every prompt; an empty one sends no system message [default: an instruction, which for `--model` also lists the 18 types]
    #[arg(long, value_name = "TEXT", help_heading = "Experiment")]
    pub system: Option<String>,

    /// Where to compute; everything but the CPU needs a cargo feature of that name
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu, help_heading = "Computation")]
    pub device: DeviceName,
    /// Floating-point type of the base model; adapters are trained in f32, and full fine-tuning needs f32 or bf16
    #[arg(long, value_enum, default_value_t = Precision::F32, help_heading = "Computation")]
    pub dtype: Precision,
    /// Prompts that are answered at once, 1 or more
    #[arg(long, default_value_t = 32, value_parser = at_least_one, value_name = "N", help_heading = "Computation")]
    pub eval_batch_size: usize,
}

/// What adapters are like, but for their rank.
#[derive(Args, Debug, Clone)]
pub struct LoraArgs {
    /// Scale of the adapter's update, above 0: it is multiplied by alpha / rank
    #[arg(long, default_value_t = 32.0, value_parser = positive, allow_negative_numbers = true, help_heading = "LoRA")]
    pub alpha: f64,
    /// Dropout on the adapter's input, 0 to below 1 [default: 0, with --model 0.05]
    #[arg(long, value_parser = probability, allow_negative_numbers = true, help_heading = "LoRA")]
    pub dropout: Option<f64>,
    /// Modules to adapt: `all-linear` alone, or names separated by commas such as `q_proj,v_proj`
    #[arg(long, default_value = "all-linear", value_parser = targets, help_heading = "LoRA")]
    pub targets: TargetModules,
}

impl LoraArgs {
    /// Dropout of the adapter. What `pretrain` makes is so small that dropout only slows it down.
    pub fn dropout(&self, kind: Kind) -> f64 {
        self.dropout.unwrap_or(match kind {
            Kind::Pretrained => 0.0,
            Kind::General => 0.05,
        })
    }
}

/// How training goes, whatever is trained.
#[derive(Args, Debug, Clone)]
pub struct LoopArgs {
    /// Examples in a training batch, 1 or more
    #[arg(long, default_value_t = 16, value_parser = at_least_one, value_name = "N", help_heading = "Training")]
    pub batch_size: usize,
    /// How the learning rate goes on after the warm-up
    #[arg(long, value_enum, default_value_t = Decay::Linear, help_heading = "Training")]
    pub schedule: Decay,
    /// Steps of linear warm-up
    #[arg(long, default_value_t = 20, value_name = "STEPS", help_heading = "Training")]
    pub warmup: usize,
}

/// Options of the experiment. Those without a default take the one of the base model, see [`ExperimentArgs::lora_training`].
#[derive(Args, Debug, Clone)]
pub struct ExperimentArgs {
    #[command(flatten)]
    pub base: BaseArgs,
    /// Evaluate only this adapter, a directory in PEFT's format, or owner/name on the Hub; nothing
    /// is trained, so no option about training goes with it
    #[arg(long, value_name = "DIR|ID", help_heading = "Experiment", conflicts_with_all = WITHOUT_ADAPTER)]
    pub adapter: Option<PathBuf>,
    /// Arms to run, separated by commas; one that is given twice runs once
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Arm::ALL, help_heading = "Experiment")]
    pub arms: Vec<Arm>,
    /// Seed of the split, of the adapter and of the order of the training examples; with `--seeds`, the first one
    /// [default: 0, with --adapter the one it was trained with]
    #[arg(long, help_heading = "Experiment")]
    pub seed: Option<u64>,
    /// Number of seeds to run, 1 or more; the table gives mean and range over them
    #[arg(long, default_value_t = 1, value_parser = at_least_one, help_heading = "Experiment")]
    pub seeds: usize,
    /// Examples in the few-shot prompt, 1 to 64
    #[arg(long, default_value_t = 8, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=64), help_heading = "Experiment")]
    pub shots: usize,
    /// Directory for report, plots, predictions and the adapter. Report, plots and predictions of an earlier run are
    /// replaced or removed; its adapters stay until one is trained in their place, and the report names them
    #[arg(long, default_value = "out/pokemon", value_name = "DIR", help_heading = "Experiment")]
    pub out: PathBuf,

    /// Rank of the adapter, from 1 to the width of the model
    #[arg(long, default_value_t = 16, value_parser = at_least_one, help_heading = "LoRA")]
    pub rank: usize,
    #[command(flatten)]
    pub lora: LoraArgs,

    #[command(flatten)]
    pub training: LoopArgs,
    /// Peak learning rate of the LoRA arm, above 0 [default: 3e-4, with --model 5e-4]
    #[arg(long, value_parser = positive, allow_negative_numbers = true, value_name = "LR", help_heading = "Training")]
    pub learning_rate: Option<f64>,
    /// Passes of the LoRA arm over the training species, 1 or more [default: 4]
    #[arg(long, value_parser = at_least_one, value_name = "N", help_heading = "Training")]
    pub epochs: Option<usize>,
    /// Peak learning rate of the arm `full`, above 0 [default: 1e-4, the best of `sweep`; with --model 5e-5]
    #[arg(long, value_parser = positive, allow_negative_numbers = true, value_name = "LR", help_heading = "Training")]
    pub full_learning_rate: Option<f64>,
    /// Passes of the arms `careless` and `full` over the training species, 1 or more [default: 4, with --model 2]
    #[arg(long, value_parser = at_least_one, value_name = "N", help_heading = "Training")]
    pub full_epochs: Option<usize>,
    /// Steps between two points of the training loss, 1 or more [default: a sixteenth of the run]
    #[arg(long, value_parser = at_least_one, value_name = "STEPS", help_heading = "Training")]
    pub log_every: Option<usize>,
    /// Steps between two measurements of the loss on held-out species, 1 or more [default: an eighth of the run]
    #[arg(long, value_parser = at_least_one, value_name = "STEPS", help_heading = "Training")]
    pub eval_every: Option<usize>,
}

/// Options of the sweep.
#[derive(Args, Debug, Clone)]
pub struct SweepArgs {
    #[command(flatten)]
    pub base: BaseArgs,
    /// Seed of the first split, adapter and order. The default is not a seed of the experiment, whose held-out species
    /// are not to choose its settings
    #[arg(long, default_value_t = 1000, help_heading = "Experiment")]
    pub seed: u64,
    /// Number of seeds to run, 1 or more; every point is a mean over them
    #[arg(long, default_value_t = 1, value_parser = at_least_one, help_heading = "Experiment")]
    pub seeds: usize,
    /// Directory for the table and the plots
    #[arg(long, default_value = "out/sweep", value_name = "DIR", help_heading = "Experiment")]
    pub out: PathBuf,

    /// Ranks of the adapters, separated by commas
    #[arg(long, value_delimiter = ',', default_values_t = [4, 16, 64], value_parser = at_least_one, value_name = "R", help_heading = "LoRA")]
    pub ranks: Vec<usize>,
    #[command(flatten)]
    pub lora: LoraArgs,

    #[command(flatten)]
    pub training: LoopArgs,
    /// Peak learning rates of LoRA, separated by commas
    #[arg(long, value_delimiter = ',', default_values_t = [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2], value_parser = positive, allow_negative_numbers = true, value_name = "LR", help_heading = "Training")]
    pub learning_rates: Vec<f64>,
    /// Peak learning rates of full fine-tuning, separated by commas
    #[arg(long, value_delimiter = ',', default_values_t = [3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3], value_parser = positive, allow_negative_numbers = true, value_name = "LR", help_heading = "Training")]
    pub full_learning_rates: Vec<f64>,
    /// Passes over the training species, 1 or more, for everything that is trained. With more than one, many rates of
    /// the embedded base are equally good
    #[arg(long, default_value_t = 1, value_parser = at_least_one, value_name = "N", help_heading = "Training")]
    pub epochs: usize,
}

/// How one arm is trained.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainingSettings {
    pub learning_rate: f64,
    pub epochs: usize,
    pub batch_size: usize,
    pub warmup: usize,
    pub decay: Decay,
    pub log_every: Option<usize>,
    pub eval_every: Option<usize>,
}

impl fmt::Display for TrainingSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { learning_rate, epochs, batch_size, warmup, decay, .. } = self;
        let s = |count: &usize| if *count == 1 { "" } else { "s" };
        write!(
            f,
            "peak learning rate {learning_rate:e}, {epochs} epoch{} in batches of {batch_size}, ",
            s(epochs)
        )?;
        write!(f, "{warmup} step{} of warm-up, then {}", s(warmup), format!("{decay:?}").to_lowercase())
    }
}

impl ExperimentArgs {
    /// What is run: the saved adapter, or the arms, each once.
    pub fn arms(&self) -> Vec<Arm> {
        if self.adapter.is_some() {
            return vec![Arm::Adapter];
        }
        let mut given = HashSet::new();
        self.arms.iter().copied().filter(|arm| given.insert(*arm)).collect()
    }

    /// How the LoRA arm is trained.
    pub fn lora_training(&self, kind: Kind) -> TrainingSettings {
        let learning_rate = match kind {
            Kind::Pretrained => 3e-4,
            Kind::General => 5e-4,
        };
        self.training(self.learning_rate.unwrap_or(learning_rate), self.epochs.unwrap_or(4))
    }

    /// How the arm is trained that trains all weights at a rate that was chosen for it.
    pub fn full_training(&self, kind: Kind) -> TrainingSettings {
        let (learning_rate, epochs) = match kind {
            Kind::Pretrained => (1e-4, 4),
            Kind::General => (5e-5, 2),
        };
        self.training(self.full_learning_rate.unwrap_or(learning_rate), self.full_epochs.unwrap_or(epochs))
    }

    /// The same at the rate that a first try may have: the default of torch's AdamW.
    pub fn careless_training(&self, kind: Kind) -> TrainingSettings {
        TrainingSettings { learning_rate: 1e-3, ..self.full_training(kind) }
    }

    fn training(&self, learning_rate: f64, epochs: usize) -> TrainingSettings {
        TrainingSettings {
            log_every: self.log_every,
            eval_every: self.eval_every,
            ..self.training.settings(learning_rate, epochs)
        }
    }
}

impl LoopArgs {
    /// A training with this peak learning rate and number of passes.
    pub fn settings(&self, learning_rate: f64, epochs: usize) -> TrainingSettings {
        TrainingSettings {
            learning_rate,
            epochs,
            batch_size: self.batch_size,
            warmup: self.warmup,
            decay: self.schedule,
            log_every: None,
            eval_every: None,
        }
    }
}

fn multiple_of_16(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(number) if number > 0 && number.is_multiple_of(16) => Ok(number),
        _ => Err("expected a multiple of 16".into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(arguments: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from([&["pokemon"], arguments].concat())
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn defaults_depend_on_the_base() {
        let args = parse(&[]).unwrap().experiment;
        assert_eq!(args.arms, Arm::ALL);
        let of = |settings: TrainingSettings| (settings.learning_rate, settings.epochs);
        assert_eq!(of(args.lora_training(Kind::Pretrained)), (3e-4, 4));
        assert_eq!(of(args.full_training(Kind::Pretrained)), (1e-4, 4));
        assert_eq!(of(args.careless_training(Kind::Pretrained)), (1e-3, 4));
        assert_eq!(args.lora.dropout(Kind::Pretrained), 0.0);
        assert_eq!(of(args.lora_training(Kind::General)), (5e-4, 4));
        assert_eq!(of(args.full_training(Kind::General)), (5e-5, 2));
        assert_eq!(args.lora.dropout(Kind::General), 0.05);

        let set = parse(&["--dropout", "0", "--epochs", "7", "--learning-rate", "2e-4"]).unwrap().experiment;
        assert_eq!(set.lora.dropout(Kind::General), 0.0);
        assert_eq!(of(set.lora_training(Kind::General)), (2e-4, 7));
    }

    #[test]
    fn settings_are_told_in_words() {
        let args = parse(&["--epochs", "1", "--warmup", "1", "--schedule", "cosine"]).unwrap().experiment;
        let text = "peak learning rate 3e-4, 1 epoch in batches of 16, 1 step of warm-up, then cosine";
        assert_eq!(args.lora_training(Kind::Pretrained).to_string(), text);
        let text = args.careless_training(Kind::Pretrained).to_string();
        assert!(text.starts_with("peak learning rate 1e-3, 4 epochs in batches of 16"), "{text}");
    }

    #[test]
    fn wrong_values_are_named_with_what_is_expected() {
        for (arguments, expected) in [
            (["--rank", "0"], "1 or more"),
            (["--alpha", "-1"], "above 0"),
            (["--dropout", "1"], "below 1"),
            (["--learning-rate", "nan"], "above 0"),
            (["--targets", "all-linear,q_proj"], "stands alone"),
            (["--targets", ","], "at least one name"),
            (["--device", "tpu"], "possible values"),
            (["--arms", "few-shot,lroa"], "possible values"),
        ] {
            let text = parse(&arguments).unwrap_err().to_string();
            assert!(text.contains(expected) && text.contains(arguments[0]), "{text}");
        }
    }

    #[test]
    fn options_of_training_are_refused_beside_an_adapter() {
        let command = Cli::command();
        let headings = [Some("LoRA"), Some("Training")];
        let training = command.get_arguments().filter(|one| headings.contains(&one.get_help_heading()));
        let names: Vec<&str> = training.filter_map(|one| one.get_long()).collect();
        assert_eq!(names.len(), 13);
        for name in names.into_iter().chain(["arms", "seeds", "shots"]) {
            let option = format!("--{name}");
            let value = match name {
                "arms" => "lora",
                "targets" => "q_proj",
                "schedule" => "cosine",
                "dropout" => "0",
                _ => "1",
            };
            assert!(parse(&[&option, value]).is_ok(), "{name}");
            let text = parse(&["--adapter", "dir", &option, value]).unwrap_err().to_string();
            assert!(text.contains("--adapter") && text.contains(&option), "{text}");
        }
        assert!(parse(&["--adapter", "dir", "--seed", "1", "--limit", "2"]).is_ok());
    }

    #[test]
    fn arms_are_a_list_and_pretrain_needs_a_directory() {
        let cli = parse(&["--arms", "zero-shot,lora"]).unwrap();
        assert_eq!(cli.experiment.arms(), [Arm::ZeroShot, Arm::Lora]);
        let twice = parse(&["--arms", "lora,full,lora"]).unwrap().experiment;
        assert_eq!(twice.arms(), [Arm::Lora, Arm::Full]);
        assert!(parse(&["pretrain"]).is_err());
        let Some(Command::Pretrain(args)) = parse(&["pretrain", "--out", "x"]).unwrap().command else {
            panic!("expected the subcommand");
        };
        assert_eq!(args.out, PathBuf::from("x"));
    }
}
