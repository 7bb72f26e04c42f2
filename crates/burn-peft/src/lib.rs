//! Parameter-efficient fine-tuning for [Burn](burn): LoRA and its relatives on any [`Module`](burn::module::Module), in
//! the format of Hugging Face [PEFT](https://github.com/huggingface/peft).
//!
//! - [`PeftModel`] adds adapters to a model, switches, merges, saves and loads them. Every module has its methods.
//! - [`LoraConfig`] says which modules are adapted and how, with PEFT's names and defaults: LoRA, rsLoRA,
//!   [DoRA](LoraConfig::use_dora), [starts](InitLoraWeights) such as PiSSA and OLoRA,
//!   [trained tokens](LoraConfig::trainable_token_indices), trained biases and whole modules.
//! - [`LoraLinear`] and [`LoraEmbedding`] are the activation-space layers: `nn::Linear` and `nn::Embedding` made fast for
//!   adapters. In the model's struct one type changes, and nothing else.
//!
//! Plain layers inside a model that you cannot change work as well, through their dense weight. Parameters, gradients,
//! optimizers, records and devices are Burn's own. The program that uses this crate chooses a backend, by Burn's
//! features.
//!
//! # Features
//! - `flex`, on by default: kernels of this crate for Flex, Burn's CPU backend, which comes with it. Without, everything is
//!   composed of Burn's operations, as it is on other backends in any case.
//! - `cuda`, `rocm`, `wgpu`, `vulkan`, `metal`: Burn's backends for GPUs, passed through. [`check_device`] tells whether one of
//!   them computes what it should.
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
//!
//! # Operations
//! | | |
//! |---|---|
//! | Add | [`add_adapter`](PeftModel::add_adapter), [`delete_adapter`](PeftModel::delete_adapter) |
//! | Switch | [`set_adapter`](PeftModel::set_adapter), [`set_scale`](PeftModel::set_scale); as a copy: [`without_adapters`](PeftModel::without_adapters), [`for_rows`](PeftModel::for_rows), [`select_rows`](PeftModel::select_rows) |
//! | Combine | [`add_weighted_adapter`](PeftModel::add_weighted_adapter), [`convert_to_lora`](PeftModel::convert_to_lora) |
//! | Merge | for now: [`merge_adapter`](PeftModel::merge_adapter), [`merge_adapters`](PeftModel::merge_adapters), [`unmerge_adapter`](PeftModel::unmerge_adapter); for good: [`merge_and_unload`](PeftModel::merge_and_unload), [`unload`](PeftModel::unload) |
//! | Files | [`save_adapter`](PeftModel::save_adapter), [`save_adapters`](PeftModel::save_adapters), [`load_adapter`](PeftModel::load_adapter), [`load_adapter_with`](PeftModel::load_adapter_with), [`hotswap_adapter`](PeftModel::hotswap_adapter); without a model: [`AdapterDirectory`], [`LoraConfig::from_pretrained`], [`LoraConfig::save_pretrained`] |
//! | Inspect | [`adapters`](PeftModel::adapters), [`trainable_parameters`](PeftModel::trainable_parameters), [`adapter_tensors`](PeftModel::adapter_tensors), [`batch_rows`](PeftModel::batch_rows) |
//! | Devices | [`check_device`] |
//! | Train | Burn's optimizers find the active adapters by themselves; [`LoraPlus`] gives them learning rates of their own |
//!
//! # What it is not
//! It has no models, tokenizers, training loops or downloads:
//! [burn-peft-llama](https://docs.rs/burn-peft-llama) has them for LLaMA and Qwen2. It adapts no quantized weights. Adapters
//! of other kinds than LoRA (LoHa, IA³, prompt tuning and others) are refused by name.
//!
//! # How to go on
//! - [Adapt your model](https://github.com/burn-peft/burn-peft/blob/main/docs/src/guide.md)
//! - [Several adapters](https://github.com/burn-peft/burn-peft/blob/main/docs/src/adapters.md)
//! - [More than LoRA](https://github.com/burn-peft/burn-peft/blob/main/docs/src/methods.md): DoRA, PiSSA and OLoRA, trained
//!   tokens, LoRA+, conversion
//! - [Compatibility with PEFT](https://github.com/burn-peft/burn-peft/blob/main/docs/src/peft-compatibility.md), key by key
//! - [Why it is built this way](https://github.com/burn-peft/burn-peft/blob/main/docs/src/design.md)

mod adapter;
mod combination_type;
mod config;
mod convert;
mod device_check;
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
#[cfg(test)]
mod testing;
mod weighted;

pub use burn_peft_files::WrongFile;
#[doc(inline)]
pub use burn_peft_ops::linear;
pub use combination_type::{CombinationType, MajoritySign};
pub use config::{Bias, FileFields, LoraConfig, PeftConfig, Targeting, TokenIndices};
pub use convert::LoraRank;
pub use device_check::{
    Deviation, DeviceCheck, DeviceError, DeviceInfo, backend_name, check_device, device_info,
};
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
