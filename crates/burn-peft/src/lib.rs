//! Parameter-efficient fine-tuning for [Burn](burn): LoRA on any [`Module`](burn::module::Module), in the format of
//! Hugging Face [PEFT](https://github.com/huggingface/peft).
//!
//! - [`PeftModel`] adds adapters to a model, switches, merges, saves and loads them. Every module has its methods.
//! - [`LoraConfig`] says which modules are adapted and how, with PEFT's names and defaults.
//! - [`LoraLinear`] is `nn::Linear` made fast for adapters: one type in the model's struct changes, nothing else.
//!
//! Plain `nn::Linear` and `nn::Embedding` inside a model that cannot be changed work as well, through their dense
//! weight. Parameters, gradients, optimizers, records and devices are Burn's own; a backend is chosen by Burn's
//! features in the program that uses this crate.
//!
//! # Example
//! ```
//! use burn::nn::transformer::TransformerEncoderConfig;
//! use burn::tensor::Device;
//! use burn_peft::{LoraConfig, PeftModel};
//!
//! # fn main() -> Result<(), burn_peft::PeftError> {
//! let device = Device::default().autodiff();
//! let mut encoder = TransformerEncoderConfig::new(16, 32, 4, 2).init(&device);
//!
//! let config = LoraConfig::new(8).with_lora_alpha(16.0).with_target_modules(["query", "value"]);
//! let report = encoder.add_adapter("default", &config)?;
//!
//! assert_eq!(report.modules.len(), 4);
//! assert_eq!(encoder.trainable_parameters().trainable, report.num_params());
//! # Ok(())
//! # }
//! ```

mod adapter;
mod combination_type;
mod config;
mod convert;
mod error;
mod init;
mod key_mapping;
mod layer;
mod layers;
mod lora_plus;
mod merge;
mod method;
mod model;
mod ops;
mod pattern;
mod plan;
mod seam;
mod states;
mod status;
mod store;
mod summary;
mod target;
mod tensor;
mod weighted;

pub use burn_peft_files::WrongFile;
pub use combination_type::{CombinationType, MajoritySign};
pub use config::{Bias, FileFields, LoraConfig, PeftConfig, Targeting, TokenIndices};
pub use convert::LoraRank;
pub use error::{ConfigProblem, PeftError, TensorProblem};
pub use init::InitLoraWeights;
pub use key_mapping::KeyMapping;
pub use layers::{LoraEmbedding, LoraLinear};
pub use lora_plus::{LoraPlus, LoraPlusGroups};
pub use merge::MergeReport;
pub use model::{AdapterTensor, DEFAULT_ADAPTER, PeftModel};
pub use plan::{AdaptedModule, InjectionReport, TargetCoverage};
pub use status::AdapterStatus;
pub use store::{AdapterDirectory, LoadOptions, LoadReport, StoredModule, StoredTensor, TensorRole};
pub use summary::ParameterSummary;
pub use target::TargetModules;
