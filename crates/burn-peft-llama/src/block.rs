//! One block: attention and feed-forward layer, each behind a norm and around a residual connection.

use burn::module::Module;
use burn::tensor::Tensor;

use crate::attention::{Context, LlamaAttention};
use crate::cache::LayerCache;
use crate::config::LlamaConfig;
use crate::mlp::LlamaMlp;
use crate::norm::RmsNorm;
use crate::source::Source;

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
    pub(crate) fn build<S: Source>(config: &LlamaConfig, from: &mut S, path: &str) -> Result<Self, S::Error> {
        let norm = |from: &mut S, name: &str| RmsNorm::build(config, from, &format!("{path}.{name}"));
        Ok(Self {
            self_attn: LlamaAttention::build(config, from, &format!("{path}.self_attn"))?,
            mlp: LlamaMlp::build(config, from, &format!("{path}.mlp"))?,
            input_layernorm: norm(from, "input_layernorm")?,
            post_attention_layernorm: norm(from, "post_attention_layernorm")?,
        })
    }

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

#[cfg(test)]
mod tests {
    use burn::module::Param;
    use burn::nn::Linear;
    use burn::tensor::{DType, Device, TensorData};
    use burn_peft::LoraLinear;

    use super::*;
    use crate::rope::Rope;
    use crate::testing::{assert_close, model, values};
    use burn_peft_ops::CausalMask;

    const SHAPE: [usize; 3] = [2, 3, 16];

    /// A block with norms that differ, and what it reads beside its input.
    fn block() -> (LlamaBlock, Context) {
        let device = Device::default();
        let model = model(&device, false);
        let tables =
            Rope::new(&model.config().rope, model.config().head_dim).tables(0..SHAPE[1], &device, DType::F32);
        let context = Context { tables, mask: CausalMask::new(SHAPE[1], SHAPE[1]) };
        (model.model.layers[0].clone(), context)
    }

    fn tensor(values: Vec<f32>) -> Tensor<3> {
        Tensor::from_data(TensorData::new(values, SHAPE), &Device::default())
    }

    fn input() -> Vec<f32> {
        (0..SHAPE.iter().product()).map(|i: usize| ((i * 29 + 7) % 53) as f32 / 10.0 - 2.6).collect()
    }

    /// A layer of the same shape that answers nothing.
    fn silenced(layer: &LoraLinear) -> LoraLinear {
        let weight = Param::from_tensor(Tensor::zeros(layer.weight.dims(), &Device::default()));
        Linear { weight, bias: None }.into()
    }

    fn sum(a: &[f32], b: &[f32]) -> Vec<f32> {
        a.iter().zip(b).map(|(a, b)| a + b).collect()
    }

    /// `x / sqrt(mean(x²) + eps) * weight` position by position, with the `eps` of the default configuration.
    fn normalised(x: &[f32], norm: &RmsNorm) -> Vec<f32> {
        let weight = values(norm.weight.val());
        let position = |x: &[f32]| {
            let mean = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
            let root = (mean + 1e-6).sqrt();
            x.iter().zip(&weight).map(|(x, weight)| x / root * weight).collect::<Vec<_>>()
        };
        x.chunks(SHAPE[2]).flat_map(position).collect()
    }

    #[test]
    fn with_silent_outputs_it_is_the_identity() {
        let (mut block, context) = block();
        block.self_attn.o_proj = silenced(&block.self_attn.o_proj);
        block.mlp.down_proj = silenced(&block.mlp.down_proj);
        assert_eq!(values(block.forward(tensor(input()), &context, None)), input());
    }

    #[test]
    fn each_part_reads_its_own_norm_and_adds_to_what_came_in() {
        let (block, context) = block();
        let x = input();
        let attention =
            block.self_attn.forward(tensor(normalised(&x, &block.input_layernorm)), &context, None);
        let middle = sum(&x, &values(attention));
        let mlp = block.mlp.forward(tensor(normalised(&middle, &block.post_attention_layernorm)));
        let expected = sum(&middle, &values(mlp));
        let found = values(block.forward(tensor(x), &context, None));
        assert_close(&found, &expected, 1e-4);
        let furthest = found.iter().zip(input()).map(|(y, x)| (y - x).abs()).fold(0.0, f32::max);
        assert!(furthest > 0.5, "the parts must matter: {furthest}");
    }

    #[test]
    fn what_a_part_adds_does_not_grow_with_the_residual_stream() {
        let (block, context) = block();
        let mut attention_alone = block.clone();
        attention_alone.mlp.down_proj = silenced(&block.mlp.down_proj);
        let mut mlp_alone = block.clone();
        mlp_alone.self_attn.o_proj = silenced(&block.self_attn.o_proj);
        for block in [attention_alone, mlp_alone] {
            let added = |scale: f32| {
                let x: Vec<f32> = input().iter().map(|x| x * scale).collect();
                let y = values(block.forward(tensor(x.clone()), &context, None));
                y.iter().zip(x).map(|(y, x)| y - x).collect::<Vec<_>>()
            };
            assert!(added(1.0).iter().any(|added| added.abs() > 0.1));
            assert_close(&added(16.0), &added(1.0), 1e-3);
        }
    }
}
