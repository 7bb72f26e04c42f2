//! Low-rank adaptation.
//!
//! ```text
//!            d_out                       r         d_out
//!        ┌───────────┐                ┌─────┐   ┌───────────┐
//!        │           │                │     │ r │     B     │   B = 0 at the start
//!   d_in │  W frozen │ + scaling * d_in  A  │   └───────────┘
//!        │           │                │     │        A ~ U(-1/sqrt(d_in), 1/sqrt(d_in))
//!        └───────────┘                └─────┘        scaling = lora_alpha / r
//! ```
mod config;
mod embedding;
mod factors;
mod linear;
mod transparent;

pub use config::{Bias, InitLoraWeights, LoraConfig};
pub(crate) use config::{ENSURE_WEIGHT_TYING, INIT_LORA_WEIGHTS, Ranks};
pub use embedding::LoraEmbedding;
pub(crate) use factors::LowRank;
pub use linear::LoraLinear;
