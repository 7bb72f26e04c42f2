//! The feed-forward layer of a block.

use burn::{
    module::Module,
    tensor::{Tensor, activation::silu},
};
use burn_peft::LoraLinear;

/// SwiGLU: `down_proj(silu(gate_proj(x)) * up_proj(x))`.
#[derive(Module, Debug)]
pub struct LlamaMlp {
    /// `hidden_size` to `intermediate_size`.
    pub gate_proj: LoraLinear,
    /// `hidden_size` to `intermediate_size`.
    pub up_proj: LoraLinear,
    /// `intermediate_size` to `hidden_size`.
    pub down_proj: LoraLinear,
}

impl LlamaMlp {
    /// Applies the layer to every position.
    ///
    /// # Shapes
    ///
    /// - input: `[b, s, hidden_size]`
    /// - output: `[b, s, hidden_size]`
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let gate = self.gate_proj.forward(x.clone());
        self.down_proj.forward(silu(gate) * self.up_proj.forward(x))
    }
}
