//! The command line.

use std::path::PathBuf;

use burn_peft_examples::arguments::{at_least_one, at_least_two, positive};
use burn_peft_examples::device::DeviceName;
use clap::Parser;

/// Adapts an encoder of sentences with LoRA: afterwards, sentences of one label are close to each other.
///
/// The encoder is a Burn module of this example. Its weights come from any BERT directory in the Hugging Face layout, and the
/// adapter fits the same model in Python's peft.
#[derive(Parser, Debug, Clone)]
#[command(name = "encoder", version, max_term_width = 110)]
pub struct Args {
    /// Base model: a directory with config.json, model.safetensors and tokenizer.json of a BERT model
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Sentences: a label, a tab and a sentence in each line; the last two fifths are held out [default: messages to a
    /// company, by what they are for]
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Directory for the adapter, and for the embeddings of the held-out sentences
    #[arg(long, default_value = "out/encoder", value_name = "DIR")]
    pub out: PathBuf,

    /// Rank of the adapter; its alpha is twice the rank
    #[arg(long, default_value_t = 8, value_parser = at_least_one)]
    pub rank: usize,
    /// Learning rate of AdamW
    #[arg(long, default_value_t = 1e-3, value_parser = positive, allow_negative_numbers = true, value_name = "LR")]
    pub learning_rate: f64,
    /// Passes over the sentences
    #[arg(long, default_value_t = 8, value_parser = at_least_one, value_name = "N")]
    pub epochs: usize,
    /// Sentences in a batch
    #[arg(long, default_value_t = 24, value_parser = at_least_two, value_name = "N")]
    pub batch_size: usize,
    /// Seed of the adapter and of the order of the sentences
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// Where to compute; everything but the CPU needs a cargo feature of that name
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu)]
    pub device: DeviceName,
}
