//! The command line.

use std::path::PathBuf;

use burn_peft::TargetModules;
use burn_peft_examples::arguments::{
    Decay, Precision, at_least_one, at_least_two, not_negative, positive, probability, targets,
};
use burn_peft_examples::device::DeviceName;
use burn_peft_llama::{Labels, Packing, TooLong};
use clap::{Parser, ValueEnum};

/// Fine-tunes a language model on your examples, with LoRA. The result is an adapter in PEFT's format.
///
/// The file has one JSON object in each line, or is a JSON list: {"messages": [{"role", "content"}, ..]},
/// {"prompt", "completion"}, {"instruction", "input", "output"}, {"conversations": [{"from", "value"}, ..]} or {"text"}.
///
/// What will be trained is shown first; with --dry-run, nothing more is done. Ctrl-C saves a checkpoint and prints the
/// command that goes on; the result is, bit for bit on the CPU, that of a run that was not interrupted.
///
/// The aliases are the words of mlx-lm, PEFT and transformers.
#[derive(Parser, Debug, Clone)]
#[command(name = "finetune", version, max_term_width = 110)]
pub struct Args {
    /// Base model: a directory in the Hugging Face layout, or owner/name on the Hub
    #[arg(long, value_name = "DIR|ID")]
    pub model: String,
    /// Examples: a file, or a directory with train.jsonl and perhaps valid.jsonl and test.jsonl
    #[arg(long, value_name = "FILE|DIR")]
    pub data: PathBuf,
    /// Directory for the adapter, checkpoints, metrics.jsonl and the plot of the loss
    #[arg(long, visible_alias = "adapter-path", default_value = "out/finetune", value_name = "DIR")]
    pub out: PathBuf,
    /// Go on from the last checkpoint in --out; begin if there is none
    #[arg(long)]
    pub resume: bool,
    /// Show what would be trained, and end
    #[arg(long)]
    pub dry_run: bool,

    /// What is learnt of conversations and completions; texts are learnt whole
    #[arg(long, value_enum, default_value_t = Loss::Answers, help_heading = "Examples")]
    pub loss: Loss,
    /// Learn answers only: the default, as mlx-lm calls it
    #[arg(long, conflicts_with = "loss", help_heading = "Examples")]
    pub mask_prompt: bool,
    /// Most tokens of an example [default: what the model was made for, and at most 2048]
    #[arg(long, visible_alias = "max-seq-length", value_parser = at_least_two, value_name = "N", help_heading = "Examples")]
    pub max_length: Option<usize>,
    /// What becomes of longer ones
    #[arg(long, value_enum, default_value_t = Longer::Cut, help_heading = "Examples")]
    pub too_long: Longer,
    /// Share of the examples that is held out if there is no file `valid` [default: 0.05, none of less than 40 examples]
    #[arg(long, value_parser = probability, allow_negative_numbers = true, value_name = "SHARE", help_heading = "Examples")]
    pub valid_split: Option<f64>,
    /// The date that chat templates see, such as 2026-07-26 [default: today; with --resume, the day the run began]
    #[arg(long, value_name = "DATE", help_heading = "Examples")]
    pub date: Option<String>,
    /// How many examples are shown as tokens
    #[arg(long, default_value_t = 2, value_name = "N", help_heading = "Examples")]
    pub show: usize,

    /// Rank of the adapter
    #[arg(long, visible_alias = "lora-r", default_value_t = 16, value_parser = at_least_one, help_heading = "LoRA")]
    pub rank: usize,
    /// Scale of the adapter's update: it is multiplied by alpha / rank [default: twice the rank]
    #[arg(long, visible_alias = "lora-alpha", value_parser = positive, allow_negative_numbers = true, help_heading = "LoRA")]
    pub alpha: Option<f64>,
    /// Dropout on the adapter's input, 0 to below 1
    #[arg(long, visible_alias = "lora-dropout", default_value_t = 0.0, value_parser = probability, allow_negative_numbers = true, help_heading = "LoRA")]
    pub dropout: f64,
    /// Modules to adapt: `all-linear` alone, or names separated by commas such as `q_proj,v_proj`
    #[arg(long, visible_alias = "target-modules", default_value = "all-linear", value_parser = targets, help_heading = "LoRA")]
    pub targets: TargetModules,
    /// Multiply by alpha / sqrt(rank) instead (rsLoRA)
    #[arg(long, help_heading = "LoRA")]
    pub use_rslora: bool,
    /// Train a magnitude for each column of the weights too (DoRA)
    #[arg(long, help_heading = "LoRA")]
    pub use_dora: bool,
    /// Train this adapter further instead of a new one: a directory in PEFT's format, or owner/name on the Hub
    #[arg(long, value_name = "DIR|ID", conflicts_with_all = ["rank", "alpha", "dropout", "targets", "use_rslora", "use_dora"], help_heading = "LoRA")]
    pub adapter: Option<PathBuf>,

    /// Highest learning rate of AdamW
    #[arg(long, default_value_t = 2e-4, value_parser = positive, allow_negative_numbers = true, value_name = "LR", help_heading = "Training")]
    pub learning_rate: f64,
    /// Passes over the examples
    #[arg(long, visible_alias = "num-train-epochs", default_value_t = 3, value_parser = at_least_one, value_name = "N", help_heading = "Training")]
    pub epochs: usize,
    /// Optimizer steps, instead of passes
    #[arg(long, visible_alias = "iters", value_parser = at_least_one, value_name = "N", conflicts_with = "epochs", help_heading = "Training")]
    pub max_steps: Option<usize>,
    /// Examples in a batch
    #[arg(long, default_value_t = 8, value_parser = at_least_one, value_name = "N", help_heading = "Training")]
    pub batch_size: usize,
    /// Batches per optimizer step
    #[arg(long, visible_alias = "grad-accumulation-steps", default_value_t = 1, value_parser = at_least_one, value_name = "N", help_heading = "Training")]
    pub grad_accumulation: usize,
    /// What the learning rate does after the warm-up
    #[arg(long, visible_alias = "lr-scheduler-type", value_enum, default_value_t = Decay::Linear, help_heading = "Training")]
    pub schedule: Decay,
    /// Steps over which the learning rate rises from 0 [default: 3 % of all]
    #[arg(long, value_name = "STEPS", help_heading = "Training")]
    pub warmup: Option<usize>,
    /// AdamW's weight decay
    #[arg(long, default_value_t = 0.0, value_parser = not_negative, allow_negative_numbers = true, help_heading = "Training")]
    pub weight_decay: f64,
    /// Largest norm of all gradients together; 0 for no limit
    #[arg(long, default_value_t = 1.0, value_parser = not_negative, allow_negative_numbers = true, value_name = "NORM", help_heading = "Training")]
    pub max_grad_norm: f64,
    /// LoRA+: how many times as high the learning rate of B is as that of A
    #[arg(long, value_parser = positive, value_name = "RATIO", help_heading = "Training")]
    pub loraplus_lr_ratio: Option<f64>,
    /// Seed of the adapter, of the order of the examples, of dropout and of what is held out
    #[arg(long, default_value_t = 42, help_heading = "Training")]
    pub seed: u64,
    /// Stop when the held-out loss has not become less for so many measurements
    #[arg(long, value_parser = at_least_one, value_name = "N", help_heading = "Training")]
    pub patience: Option<usize>,

    /// Steps between two reports of the loss [default: a hundredth of the run, at most 10]
    #[arg(long, visible_alias = "steps-per-report", value_parser = at_least_one, value_name = "STEPS", help_heading = "Reports and checkpoints")]
    pub log_every: Option<usize>,
    /// Steps between two measurements of the held-out loss [default: as --save-every]
    #[arg(long, visible_alias = "steps-per-eval", value_parser = at_least_one, value_name = "STEPS", help_heading = "Reports and checkpoints")]
    pub eval_every: Option<usize>,
    /// Steps between two checkpoints [default: a tenth of the run]
    #[arg(long, value_parser = at_least_one, value_name = "STEPS", help_heading = "Reports and checkpoints")]
    pub save_every: Option<usize>,
    /// How many checkpoints are kept, beside the one with the least held-out loss
    #[arg(long, default_value_t = 2, value_parser = at_least_one, value_name = "N", help_heading = "Reports and checkpoints")]
    pub save_total_limit: usize,

    /// Where to compute; everything but the CPU needs a cargo feature of that name
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu, help_heading = "Computation")]
    pub device: DeviceName,
    /// How the tokens of a batch lie; losses are the same, but for the masks of dropout
    #[arg(long, value_enum, default_value_t = Rows::SharedPrefix, help_heading = "Computation")]
    pub packing: Rows,
    /// Computes each block a second time instead of keeping what it computed: less memory, up to 1.5 times the time
    #[arg(long, help_heading = "Computation")]
    pub gradient_checkpointing: bool,
    /// Floating-point type of the base model; the adapter is trained in f32
    #[arg(long, value_enum, default_value_t = Precision::F32, help_heading = "Computation")]
    pub dtype: Precision,
}

/// What is learnt of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Loss {
    /// All answers
    Answers,
    /// The last answer
    LastAnswer,
    /// Every token
    Everything,
}

impl From<Loss> for Labels {
    fn from(loss: Loss) -> Self {
        match loss {
            Loss::Answers => Self::Answers,
            Loss::LastAnswer => Self::LastAnswer,
            Loss::Everything => Self::Everything,
        }
    }
}

/// How the tokens of a batch lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Rows {
    /// In one row without padding, and what examples begin with in common once
    SharedPrefix,
    /// In one row without padding
    Packed,
    /// In a row for each example, filled up
    Padded,
}

impl From<Rows> for Packing {
    fn from(rows: Rows) -> Self {
        match rows {
            Rows::SharedPrefix => Self::SharedPrefix,
            Rows::Packed => Self::Packed,
            Rows::Padded => Self::Padded,
        }
    }
}

/// What becomes of examples that are too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Longer {
    /// They lose their end
    Cut,
    /// They are left out
    Drop,
    /// They are an error
    Refuse,
}

impl From<Longer> for TooLong {
    fn from(longer: Longer) -> Self {
        match longer {
            Longer::Cut => Self::Cut,
            Longer::Drop => Self::Drop,
            Longer::Refuse => Self::Refuse,
        }
    }
}
