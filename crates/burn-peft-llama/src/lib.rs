//! LLaMA for [Burn](burn), made for training: Hugging Face checkpoints, masks, chat templates, loss at the labelled
//! positions, adapters from [`burn_peft`]. Models of the Qwen2 family work as well.
//!
//! # Example
//!
//! ```
//! use burn::tensor::{Device, Int, Tensor};
//! use burn_peft::{LoraConfig, PeftModel};
//! use burn_peft_llama::{GenerateOptions, LlamaConfig};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Device::flex();
//! let mut model = LlamaConfig::new(100, 32, 2).with_heads(4, 2).init(&device);
//!
//! let input_ids = Tensor::<2, Int>::from_data([[1, 5, 9], [1, 7, 3]], &device);
//! assert_eq!(model.forward(input_ids, None).dims(), [2, 3, 100]);
//!
//! model.add_adapter("default", &LoraConfig::new(8).with_target_modules(["q_proj", "v_proj"]))?;
//! let options = GenerateOptions::new().with_max_new_tokens(4);
//! let answers = model.generate(&[vec![1, 5, 9], vec![1]], &options)?;
//! assert!(answers.len() == 2 && answers.iter().all(|ids| ids.len() <= 4));
//! # Ok(())
//! # }
//! ```
//!
//! # Operations
//! | | |
//! |---|---|
//! | Load, save | [`LlamaForCausalLm::from_pretrained`], [`save_pretrained`](LlamaForCausalLm::save_pretrained), [`to_dtype`](LlamaForCausalLm::to_dtype); [`LlamaConfig::load`], or [`LlamaConfig::init`] for random weights |
//! | Add, switch, merge adapters | the methods of [`burn_peft::PeftModel`]; [`untie_lm_head`](LlamaForCausalLm::untie_lm_head) before an adapter of a tied output layer |
//! | Text to tokens | [`Tokenizer::load`], [`ChatTemplate`], [`Message`]; [`Tokenizer::encode_conversation`] labels the answers |
//! | Files of examples | [`Dataset`], [`Splits`]; [`Dataset::encode`] with [`EncodeOptions`] |
//! | Tokens to batches | [`Example`], [`Collator`], [`Packing`], [`Batch`] |
//! | Train, interrupted or not | [`Trainer`] with [`TrainingConfig`]; [`Checkpoint`]; [`MemoryEstimate`]; for a loop of your own [`LlamaForCausalLm::loss`], [`clip_grad_norm`], [`LrSchedule`] |
//! | Measure | [`evaluate`], [`LlamaForCausalLm::forward`] |
//! | Generate | [`LlamaForCausalLm::generate`] with [`GenerateOptions`] |
//! | Files | [`merge_directory`]: adapters merged from directories to a directory; [`GgufAdapter`], [`GgufModel`]: files for llama.cpp |
//!
//! The parameters have the names of Hugging Face checkpoints, so adapters need no key mapping. [`LlamaConfig::model_type`]
//! is the name of the family.
//!
//! # Features
//! - `flex`, on by default: the kernels of `burn-peft` for Flex, Burn's CPU backend, which comes with them.
//! - `hub`, off by default: `resolve` and `resolve_adapter` fetch a model or an adapter from the Hugging Face Hub into the cache that
//!   other tools use, and return its directory.
//! - `train`, off by default: `LlamaForCausalLm` implements the traits of burn-train, for Burn's own learner. It brings the CPU backend and
//!   burn-dataset with it.
//! - `cuda`, `rocm`, `wgpu`, `vulkan`, `metal`, off by default: Burn's backends for GPUs, passed through.
//!
//! # What it is not
//! It is no inference server: there are no quantized weights, no paged cache, no speculative decoding. It is no
//! collection of architectures either: a family is here if it is LLaMA with variations. The crate has no command line;
//! [the repository](https://github.com/burn-peft/burn-peft) has examples with one.
//!
//! # How to go on
//! - [Adapt your model](https://github.com/burn-peft/burn-peft/blob/main/docs/src/guide.md), and
//!   [several adapters](https://github.com/burn-peft/burn-peft/blob/main/docs/src/adapters.md)
//! - [The experiment on a real model](https://github.com/burn-peft/burn-peft/blob/main/docs/src/real-model.md)
//! - [Fine-tune on your examples](https://github.com/burn-peft/burn-peft/blob/main/docs/src/finetune.md), or
//!   [with Burn's learner](https://github.com/burn-peft/burn-peft/blob/main/docs/src/burn-train.md)
//! - [`examples/pokemon`](https://github.com/burn-peft/burn-peft/tree/main/examples/pokemon): from data to an adapter, with
//!   evaluation

mod attention;
mod batch;
mod block;
mod cache;
mod chat_template;
mod config;
mod conversation;
mod dataset;
mod error;
mod family;
mod file;
mod generate;
mod gguf;
mod gradient;
mod gradient_checkpointing;
mod head;
#[cfg(feature = "hub")]
mod hub;
mod known_gradients;
#[cfg(feature = "train")]
mod learner;
mod loss;
mod merge;
mod message;
mod mlp;
mod model;
mod norm;
mod packing;
mod parameters;
mod problem;
mod rope;
mod sampler;
mod schedule;
mod source;
#[cfg(test)]
mod testing;
mod tokenizer;
mod train;
mod weights;

pub use attention::LlamaAttention;
pub use batch::{Batch, Collator, PaddingSide};
pub use block::LlamaBlock;
pub use burn_peft_files::{TensorFileError, WrongFile};
pub use burn_peft_ops::TokenTree;
pub use chat_template::ChatTemplate;
pub use config::LlamaConfig;
pub use conversation::{Example, IGNORE_INDEX, Labels};
pub use dataset::{Content, Dataset, EncodeOptions, Encoded, EncodingReport, Place, Record, Splits, TooLong};
pub use error::LlamaError;
pub use generate::GenerateOptions;
pub use gguf::{GgufAdapter, GgufModel, GgufType, check_gguf_output, gguf_obstacles};
pub use gradient::clip_grad_norm;
#[cfg(feature = "hub")]
pub use hub::{FetchProgress, HubProblem, ModelId, resolve, resolve_adapter};
#[cfg(feature = "train")]
pub use learner::{TrainingOutput, ValidationOutput};
pub use merge::{MergedDirectory, check_output, merge_directory, stored_dtype};
pub use message::Message;
pub use mlp::LlamaMlp;
pub use model::{Llama, LlamaForCausalLm};
pub use norm::RmsNorm;
pub use packing::{PackedBatch, Packing};
pub use problem::{ConfigProblem, RecordProblem, WeightProblem};
pub use rope::{RopeConfig, RopeScaling};
pub use sampler::Sampling;
pub use schedule::{LrSchedule, Schedule};
pub use tokenizer::{SpecialTokens, Tokenizer};
pub use train::{
    CausalLmLoss, Checkpoint, CheckpointDifference, Evaluation, MemoryEstimate, StepReport, Trainer,
    TrainingConfig, evaluate,
};

/// The examples in the chapter on Burn's learner compile and run.
#[cfg(all(doctest, feature = "train"))]
#[doc = include_str!("../../../docs/src/burn-train.md")]
struct BurnTrain;
