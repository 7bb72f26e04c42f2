//! One block: attention and feed-forward layer, each behind a norm and around a residual connection.

use burn::{module::Module, tensor::Tensor};

use crate::{LlamaAttention, LlamaMlp, RmsNorm, attention::Context, cache::LayerCache};

/// `x + self_attn(input_layernorm(x))`, then `x + mlp(post_attention_layernorm(x))`.
#[derive(Module, Debug)]
pub struct LlamaBlock {
    /// Attention.
    pub self_attn: LlamaAttention,
    /// Feed-forward layer.
    pub mlp: LlamaMlp,
    /// Norm before attention.
    pub input_layernorm: RmsNorm,
    /// Norm before the feed-forward layer.
    pub post_attention_layernorm: RmsNorm,
}

impl LlamaBlock {
    /// `[b, s, hidden_size]` to the same.
    pub(crate) fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        cache: Option<&mut LayerCache>,
    ) -> Tensor<3> {
        let x = x.clone() + self.self_attn.forward(self.input_layernorm.forward(x), context, cache);
        x.clone() + self.mlp.forward(self.post_attention_layernorm.forward(x))
    }
}
