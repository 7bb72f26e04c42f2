//! LLaMA for Burn, made for training.

mod batch;
mod chat_template;
mod conversation;
mod error;
mod file;
mod gradient;
#[cfg(feature = "hub")]
mod hub;
#[cfg(feature = "train")]
mod learner;
mod schedule;
mod tokenizer;
mod train;

pub use batch::{Batch, Collator, PaddingSide};
pub use chat_template::ChatTemplate;
pub use conversation::{Example, IGNORE_INDEX, Labels, Message};
pub use error::LlamaError;
pub use gradient::clip_grad_norm;
#[cfg(feature = "hub")]
pub use hub::{ModelId, resolve};
#[cfg(feature = "train")]
pub use learner::TrainingOutput;
pub use schedule::{LrSchedule, Schedule};
pub use tokenizer::{SpecialTokens, Tokenizer};
pub use train::{CausalLmLoss, Evaluation, StepReport, TrainingConfig, evaluate, fit};
