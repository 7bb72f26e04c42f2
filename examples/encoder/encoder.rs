//! The model: BERT as a Burn module, with names of its own.

use burn::module::Module;
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, LinearConfig};
use burn::tensor::activation::{gelu, softmax};
use burn::tensor::{Bool, Device, Int, Tensor};
use burn_peft::LoraLinear;
use serde::Deserialize;

/// What `config.json` says about the shape of the model.
#[derive(Deserialize, Clone, Debug)]
pub struct EncoderConfig {
    pub model_type: String,
    pub hidden_act: String,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub max_position_embeddings: usize,
    pub type_vocab_size: usize,
    pub layer_norm_eps: f64,
}

/// Token ids to embeddings of sentences.
#[derive(Module, Debug)]
pub struct Encoder {
    words: Embedding,
    positions: Embedding,
    segments: Embedding,
    norm: LayerNorm,
    blocks: Vec<Block>,
}

#[derive(Module, Debug)]
struct Block {
    attention: Attention,
    attention_norm: LayerNorm,
    up: LoraLinear,
    down: LoraLinear,
    output_norm: LayerNorm,
}

#[derive(Module, Debug)]
struct Attention {
    query: LoraLinear,
    key: LoraLinear,
    value: LoraLinear,
    output: LoraLinear,
    heads: usize,
}

impl EncoderConfig {
    /// A model with random weights.
    pub fn init(&self, device: &Device) -> Encoder {
        let (width, inner) = (self.hidden_size, self.intermediate_size);
        let table = |rows| EmbeddingConfig::new(rows, width).init(device);
        let linear = |from, to| LoraLinear::from(LinearConfig::new(from, to).init(device));
        let norm = || LayerNormConfig::new(width).with_epsilon(self.layer_norm_eps).init(device);
        let block = |_| Block {
            attention: Attention {
                query: linear(width, width),
                key: linear(width, width),
                value: linear(width, width),
                output: linear(width, width),
                heads: self.num_attention_heads,
            },
            attention_norm: norm(),
            up: linear(width, inner),
            down: linear(inner, width),
            output_norm: norm(),
        };
        Encoder {
            words: table(self.vocab_size),
            positions: table(self.max_position_embeddings),
            segments: table(self.type_vocab_size),
            norm: norm(),
            blocks: (0..self.num_hidden_layers).map(block).collect(),
        }
    }
}

impl Encoder {
    /// One unit vector for each sentence: the mean of what its tokens became.
    ///
    /// # Shapes
    /// - ids and mask: `[batch, length]`; the mask is true where there is a token
    /// - output: `[batch, hidden_size]`
    pub fn embed(&self, ids: Tensor<2, Int>, mask: Tensor<2, Bool>) -> Tensor<2> {
        mean(self.forward(ids, mask.clone()), mask)
    }

    fn forward(&self, ids: Tensor<2, Int>, mask: Tensor<2, Bool>) -> Tensor<3> {
        let positions = Tensor::arange(0..ids.dims()[1] as i64, &ids.device()).unsqueeze();
        let x = self.words.forward(ids.clone())
            + self.positions.forward(positions)
            + self.segments.forward(ids.zeros_like());
        let x = self.norm.forward(x);
        self.blocks.iter().fold(x, |x, block| block.forward(x, mask.clone()))
    }
}

impl Block {
    fn forward(&self, x: Tensor<3>, mask: Tensor<2, Bool>) -> Tensor<3> {
        let x = self.attention_norm.forward(x.clone() + self.attention.forward(x, mask));
        let inner = gelu(self.up.forward(x.clone()));
        self.output_norm.forward(x + self.down.forward(inner))
    }
}

impl Attention {
    fn forward(&self, x: Tensor<3>, mask: Tensor<2, Bool>) -> Tensor<3> {
        let [batch, length, width] = x.dims();
        let size = width / self.heads;
        let split = |x: Tensor<3>| x.reshape([batch, length, self.heads, size]).swap_dims(1, 2);
        let query = split(self.query.forward(x.clone()));
        let key = split(self.key.forward(x.clone()));
        let value = split(self.value.forward(x));
        let scores = query.matmul(key.transpose()).div_scalar((size as f64).sqrt());
        let padding = mask.bool_not().reshape([batch, 1, 1, length]);
        let mixed = softmax(scores.mask_fill(padding, -1e9), 3).matmul(value);
        self.output.forward(mixed.swap_dims(1, 2).reshape([batch, length, width]))
    }
}

/// The mean over tokens, `[batch, length, width]` to `[batch, width]`, scaled to length 1.
pub fn mean(x: Tensor<3>, mask: Tensor<2, Bool>) -> Tensor<2> {
    let mask: Tensor<3> = mask.float().unsqueeze_dim(2);
    let mean = (x * mask.clone()).sum_dim(1) / mask.sum_dim(1);
    let mean: Tensor<2> = mean.squeeze_dim(1);
    let norm = mean.clone().powi_scalar(2).sum_dim(1).sqrt();
    mean / norm.clamp_min(1e-12)
}
