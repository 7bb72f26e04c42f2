//! The command line.

use std::path::PathBuf;

use anyhow::{Result, bail};
use burn_peft_examples::arguments::{Precision, at_least_one, not_negative, share};
use burn_peft_examples::device::DeviceName;
use burn_peft_llama::{GenerateOptions, Sampling};
use clap::Parser;

/// Lets a language model answer: a prompt, or with none each line of standard input as the next turn of a conversation.
///
/// Answers appear on standard output as they are written, the speed on standard error. A model without a chat template
/// goes on with the text.
#[derive(Parser, Debug, Clone)]
#[command(name = "generate", version, max_term_width = 110)]
pub struct Args {
    /// Base model: a directory in the Hugging Face layout, or owner/name on the Hub
    #[arg(long, value_name = "DIR|ID")]
    pub model: String,
    /// Adapters in PEFT's format, separated by commas: directories, or owner/name on the Hub; what several add is summed
    #[arg(long, visible_alias = "adapter-path", value_name = "DIR|ID", value_delimiter = ',')]
    pub adapter: Vec<String>,
    /// Weights of the adapters, separated by commas, as many as there are adapters [default: 1 each]
    #[arg(
        long,
        value_name = "W",
        value_delimiter = ',',
        allow_negative_numbers = true,
        requires = "adapter"
    )]
    pub weights: Vec<f64>,
    /// What to answer; without it, standard input is a conversation
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// Text of the system message
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Go on with the text as it is, without the chat template
    #[arg(long, conflicts_with = "system")]
    pub raw: bool,
    /// The date that chat templates see, such as 2026-07-26 [default: today]
    #[arg(long, value_name = "DATE")]
    pub date: Option<String>,
    /// Write the logits of each position of the prompt to this safetensors file, as `logits`, with `input_ids`
    #[arg(long, value_name = "FILE", requires = "prompt")]
    pub logits: Option<PathBuf>,

    /// Most tokens of an answer
    #[arg(long, visible_alias = "max-tokens", default_value_t = 256, value_parser = at_least_one, value_name = "N", help_heading = "Sampling")]
    pub max_new_tokens: usize,
    /// 0 takes the most probable token; higher values draw, and favour improbable tokens more
    #[arg(long, visible_alias = "temp", default_value_t = 0.0, value_parser = not_negative, allow_negative_numbers = true, help_heading = "Sampling")]
    pub temperature: f64,
    /// Draw among the most probable tokens that together reach this probability
    #[arg(long, default_value_t = 1.0, value_parser = share, allow_negative_numbers = true, value_name = "P", requires = "temperature", help_heading = "Sampling")]
    pub top_p: f64,
    /// Draw among so many most probable tokens
    #[arg(long, value_parser = at_least_one, value_name = "K", requires = "temperature", help_heading = "Sampling")]
    pub top_k: Option<usize>,
    /// Seed of what is drawn
    #[arg(long, default_value_t = 0, requires = "temperature", help_heading = "Sampling")]
    pub seed: u64,

    /// Where to compute; everything but the CPU needs a cargo feature of that name
    #[arg(long, value_enum, default_value_t = DeviceName::Cpu, help_heading = "Computation")]
    pub device: DeviceName,
    /// Floating-point type of the model
    #[arg(long, value_enum, default_value_t = Precision::F32, help_heading = "Computation")]
    pub dtype: Precision,
}

impl Args {
    /// How to choose tokens.
    pub fn options(&self) -> GenerateOptions {
        let Self { temperature, top_p, top_k, seed, .. } = *self;
        let sampling = if temperature == 0.0 {
            Sampling::Greedy
        } else {
            Sampling::TopP { temperature, top_p, top_k, seed }
        };
        GenerateOptions::new().with_max_new_tokens(self.max_new_tokens).with_sampling(sampling)
    }

    /// What is to be told if answers may be longer than the `length` that a model was made for.
    pub fn note(&self, length: usize) -> Option<String> {
        let most = self.max_new_tokens;
        (most > length)
            .then(|| format!("note: `--max-new-tokens {most}`: the model was made for up to {length} tokens"))
    }

    /// The weight of each adapter.
    pub fn weights(&self) -> Result<Vec<f64>> {
        let (weights, adapters) = (self.weights.len(), self.adapter.len());
        if weights > 0 && weights != adapters {
            bail!("expected as many `--weights` as adapters, {adapters}, found {weights}");
        }
        Ok(if weights == 0 { vec![1.0; adapters] } else { self.weights.clone() })
    }
}
