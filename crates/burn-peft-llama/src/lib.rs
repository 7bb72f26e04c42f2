//! LLaMA for Burn, made for training.
//!
//! - [`LlamaForCausalLm`] is the model, loaded from and saved to Hugging Face directories
//!   ([`from_pretrained`](LlamaForCausalLm::from_pretrained), [`save_pretrained`](LlamaForCausalLm::save_pretrained))
//!   or made by [`LlamaConfig::init`]. Its parameters have the names of those checkpoints and its projections take the
//!   adapters of [`burn_peft`]. Qwen2 is read as well; [`LlamaConfig::model_type`] tells the family.
//! - [`Tokenizer`], [`ChatTemplate`] and [`Message`] turn conversations into tokens and labels, [`Collator`] turns
//!   those into a [`Batch`].
//! - [`LlamaForCausalLm::loss`] computes logits only where a label is; [`fit`] trains, [`evaluate`] measures.
//! - [`LlamaForCausalLm::generate`] continues a batch of prompts.
//! - [`merge_directory`] writes a model with adapters merged into its weights.
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

mod attention;
mod batch;
mod block;
mod cache;
mod chat_template;
mod config;
mod conversation;
mod error;
mod family;
mod file;
mod generate;
mod gradient;
mod head;
#[cfg(feature = "hub")]
mod hub;
#[cfg(feature = "train")]
mod learner;
mod loss;
mod mask;
mod merge;
mod message;
mod mlp;
mod model;
mod norm;
mod ops;
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
pub use chat_template::ChatTemplate;
pub use config::LlamaConfig;
pub use conversation::{Example, IGNORE_INDEX, Labels};
pub use error::LlamaError;
pub use generate::GenerateOptions;
pub use gradient::clip_grad_norm;
#[cfg(feature = "hub")]
pub use hub::{ModelId, resolve};
#[cfg(feature = "train")]
pub use learner::{TrainingOutput, ValidationOutput};
pub use merge::{MergedDirectory, check_output, merge_directory, stored_dtype};
pub use message::Message;
pub use mlp::LlamaMlp;
pub use model::{Llama, LlamaForCausalLm};
pub use norm::RmsNorm;
pub use problem::{ConfigProblem, WeightProblem};
pub use rope::{RopeConfig, RopeScaling};
pub use sampler::Sampling;
pub use schedule::{LrSchedule, Schedule};
pub use tokenizer::{SpecialTokens, Tokenizer};
pub use train::{CausalLmLoss, Evaluation, StepReport, TrainingConfig, evaluate, fit};
