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
mod linear;

use burn::module::Content;

use crate::adapter::Adapters;

pub use config::{Bias, InitLoraWeights, LoraConfig};
pub use embedding::LoraEmbedding;
pub use linear::LoraLinear;

/// The names and ranks of a layer's adapters, for its `Display`.
fn display_adapters(adapters: Option<&Adapters>, content: Content) -> Content {
    let Some(adapters) = adapters else { return content };
    let describe = |adapter: &crate::adapter::Adapter| {
        let rank = adapter.low_rank().map_or("copy".to_string(), |factors| format!("r {}", factors.rank()));
        let inactive = if adapter.info.active { "" } else { ", inactive" };
        format!("{} ({rank}{inactive})", adapter.info.name)
    };
    let names: Vec<String> = adapters.list.iter().map(describe).collect();
    content.add("adapters", &names.join(", "))
}
