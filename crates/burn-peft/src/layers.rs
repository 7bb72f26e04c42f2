//! The layers that work on activations.

mod embedding;
mod linear;
mod transparent;

pub use embedding::LoraEmbedding;
pub use linear::LoraLinear;
