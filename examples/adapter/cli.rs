//! The command line: what can be asked, and what is used where nothing is set.

use std::path::PathBuf;

use burn::tensor::{DType, FloatDType};
use burn_peft_llama::GgufType;
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Looks into LoRA adapters in the format of Hugging Face PEFT, merges them into LLaMA models and writes them for llama.cpp.
#[derive(Parser, Debug)]
#[command(name = "adapter", version, max_term_width = 110)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Tells what is in an adapter and whether it can be used; needs no base model.
    ///
    /// Ends with exit code 0 if the adapter can be loaded, and with 1 if it would be refused.
    Inspect(InspectArgs),
    /// Writes a model with adapters merged into its weights, which transformers loads like any other.
    Merge(MergeArgs),
    /// Writes a GGUF file for llama.cpp: an adapter, or with `--merged` a whole model.
    Export(ExportArgs),
}

#[derive(Args, Debug, Clone)]
pub struct InspectArgs {
    /// Directory of an adapter (adapter_config.json, adapter_model.safetensors), or of several in sub-directories;
    /// owner/name on the Hub
    #[arg(value_name = "DIR|ID")]
    pub directory: PathBuf,
}

#[derive(Args, Debug, Clone)]
pub struct MergeArgs {
    /// Base model with the architecture of LLaMA or Qwen2: a directory in the Hugging Face layout, or owner/name on
    /// the Hub
    #[arg(long, value_name = "DIR|ID")]
    pub model: PathBuf,
    /// Adapters, separated by commas: directories, or owner/name on the Hub; the updates of several are summed
    #[arg(long, value_name = "DIR|ID", value_delimiter = ',', required = true)]
    pub adapter: Vec<PathBuf>,
    /// Weights of the adapters, separated by commas, as many as there are adapters [default: 1 each]
    #[arg(long, value_name = "W", value_delimiter = ',', allow_negative_numbers = true, value_parser = finite)]
    pub weights: Vec<f64>,
    /// Floating-point type of the merged model; sums are formed in f32 and rounded once
    #[arg(long, value_enum, default_value_t = Precision::Keep)]
    pub dtype: Precision,
    /// Directory to write the merged model to; it is made, and must be empty if it exists
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

#[derive(Args, Debug, Clone)]
pub struct ExportArgs {
    /// Base model with the architecture of LLaMA or Qwen2: a directory in the Hugging Face layout, or owner/name on
    /// the Hub
    #[arg(long, value_name = "DIR|ID")]
    pub model: PathBuf,
    /// The adapter; with --merged, any number of them, separated by commas, or none for the base alone
    #[arg(long, value_name = "DIR|ID", value_delimiter = ',', required_unless_present = "merged")]
    pub adapter: Vec<PathBuf>,
    /// Write the whole model with the adapters in its weights, and its tokenizer
    #[arg(long)]
    pub merged: bool,
    /// Weights of the adapters, separated by commas, as many as there are adapters; for --merged [default: 1 each]
    #[arg(long, value_name = "W", value_delimiter = ',', allow_negative_numbers = true, value_parser = finite)]
    pub weights: Vec<f64>,
    /// Floating-point type of the matrices [default: f32 of an adapter, f16 of a model]
    #[arg(long, value_enum)]
    pub dtype: Option<GgufPrecision>,
    /// File to write, such as adapter.gguf; there must be none of that name
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
}

/// Floating-point type of the matrices in a GGUF file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum GgufPrecision {
    /// 32 bits
    F32,
    /// IEEE half precision
    F16,
}

impl From<GgufPrecision> for GgufType {
    fn from(precision: GgufPrecision) -> Self {
        match precision {
            GgufPrecision::F32 => Self::F32,
            GgufPrecision::F16 => Self::F16,
        }
    }
}

/// Floating-point type of the merged model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Precision {
    /// That of the base model
    Keep,
    /// 32 bits
    F32,
    /// bfloat16
    Bf16,
    /// IEEE half precision
    F16,
}

impl Precision {
    /// The type for a base of type `base`.
    pub fn resolve(self, base: FloatDType) -> FloatDType {
        match self {
            Self::Keep => base,
            Self::F32 => FloatDType::F32,
            Self::Bf16 => FloatDType::BF16,
            Self::F16 => FloatDType::F16,
        }
    }
}

/// A type as the command line names it.
pub fn name_of(dtype: FloatDType) -> &'static str {
    match DType::from(dtype) {
        DType::BF16 => "bf16",
        DType::F16 => "f16",
        _ => "f32",
    }
}

fn finite(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() => Ok(number),
        _ => Err("expected a finite number".into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(arguments: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(["adapter"].into_iter().chain(arguments.split(' ')))
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn lists_are_separated_by_commas_and_weights_may_be_negative() {
        let cli = parse("merge --model m --adapter a,b --weights 1,-0.5 --out o").unwrap();
        let Command::Merge(args) = cli.command else { panic!("expected merge") };
        assert_eq!(args.adapter, [PathBuf::from("a"), PathBuf::from("b")]);
        assert_eq!(args.weights, [1.0, -0.5]);
        assert_eq!(args.dtype, Precision::Keep);
        let error = parse("merge --model m --adapter a --weights nan --out o").unwrap_err().to_string();
        assert!(error.contains("finite number"), "{error}");
        assert!(parse("merge --model m --out o").is_err());
        assert!(parse("inspect").is_err());
    }

    #[test]
    fn keep_is_the_type_of_the_base() {
        assert_eq!(Precision::Keep.resolve(FloatDType::BF16), FloatDType::BF16);
        assert_eq!(Precision::F32.resolve(FloatDType::BF16), FloatDType::F32);
        assert_eq!(name_of(FloatDType::F16), "f16");
    }
}
