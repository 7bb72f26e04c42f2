//! Causal self-attention with shared key and value heads.

use burn::module::Module;
use burn::tensor::Tensor;
use burn_peft::LoraLinear;
use burn_peft_ops::{CausalMask, attention};

use crate::cache::LayerCache;
use crate::config::LlamaConfig;
use crate::rope::RotaryTables;
use crate::source::Source;

/// Grouped-query attention: `softmax(q kᵀ / sqrt(d) + mask) v`, where each key and value head serves
/// `num_attention_heads / num_key_value_heads` query heads.
#[derive(Module, Debug)]
pub struct LlamaAttention {
    /// `hidden_size` to `num_attention_heads * head_dim`.
    pub q_proj: LoraLinear,
    /// `hidden_size` to `num_key_value_heads * head_dim`.
    pub k_proj: LoraLinear,
    /// `hidden_size` to `num_key_value_heads * head_dim`.
    pub v_proj: LoraLinear,
    /// `num_attention_heads * head_dim` to `hidden_size`.
    pub o_proj: LoraLinear,
    num_key_value_heads: usize,
    head_dim: usize,
}

/// What all layers of a forward pass share.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    pub(crate) tables: RotaryTables,
    pub(crate) mask: CausalMask,
}

impl LlamaAttention {
    pub(crate) fn build<S: Source>(config: &LlamaConfig, from: &mut S, path: &str) -> Result<Self, S::Error> {
        let (hidden, d) = (config.hidden_size, config.head_dim);
        let (queries, keys) = (config.num_attention_heads * d, config.num_key_value_heads * d);
        let (qkv_bias, o_bias) = (config.has_qkv_bias(), config.has_o_bias());
        Ok(Self {
            q_proj: from.layer(&format!("{path}.q_proj"), [hidden, queries], qkv_bias)?,
            k_proj: from.layer(&format!("{path}.k_proj"), [hidden, keys], qkv_bias)?,
            v_proj: from.layer(&format!("{path}.v_proj"), [hidden, keys], qkv_bias)?,
            o_proj: from.layer(&format!("{path}.o_proj"), [queries, hidden], o_bias)?,
            num_key_value_heads: config.num_key_value_heads,
            head_dim: d,
        })
    }

    /// `[b, s, hidden_size]` to the same. The keys are those of `x`, behind those in the cache.
    pub(crate) fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        cache: Option<&mut LayerCache>,
    ) -> Tensor<3> {
        let ([b, s, _], n, d) = (x.dims(), self.num_key_value_heads, self.head_dim);
        let q = self.q_proj.forward(x.clone());
        let g = q.dims()[2] / (n * d);
        let q = context.tables.query(q.reshape([b, s, n, g, d]));
        let k = context.tables.key(self.k_proj.forward(x.clone()).reshape([b, s, n, 1, d]));
        let v = self.v_proj.forward(x).reshape([b, s, n, d]).swap_dims(1, 2);
        let k = k.reshape([b, n, s, d]);
        let (k, v) = if let Some(cache) = cache { cache.append(k, v) } else { (k, v) };
        let y = attention(q, k, v, &context.mask);
        self.o_proj.forward(y.permute([0, 3, 1, 2, 4]).reshape([b, s, n * g * d]))
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::activation::softmax;
    use burn::tensor::{Bool, DType, Device, Distribution};

    use super::*;
    use crate::rope::{Rope, RopeConfig};
    use crate::testing::values;

    #[test]
    fn grouped_heads_equal_attention_computed_head_by_head() {
        let device = Device::default();
        device.seed(3);
        let (b, s, hidden, n, g, d) = (2, 3, 10, 2, 3, 4);
        let config = LlamaConfig::new(5, hidden, 1).with_heads(n * g, n);
        let config = LlamaConfig { head_dim: d, initializer_range: 0.2, ..config };
        let attention = config.init(&device).model.layers[0].self_attn.clone();
        // Frequencies of nearly zero: no rotation, so heads can be compared without it.
        let rope = RopeConfig { rope_theta: 1e30, ..RopeConfig::default() };
        let tables = Rope::new(&rope, d).tables(0..1, &device, DType::F32);
        let context = Context { tables, mask: CausalMask::new(s, s) };

        let x = Tensor::<3>::random([b, s, hidden], Distribution::Normal(0.0, 2.0), &device);
        let y = attention.forward(x.clone(), &context, None);
        let q = attention.q_proj.forward(x.clone());
        let (k, v) = (attention.k_proj.forward(x.clone()), attention.v_proj.forward(x));
        let head = |x: &Tensor<3>, i: usize| x.clone().narrow(2, i * d, d);
        let heads = (0..n * g)
            .map(|i| {
                let scores = head(&q, i).matmul(head(&k, i / g).swap_dims(1, 2)) / 2.0;
                let hidden = Tensor::<2, Bool>::tril_mask([s, s], 0, &device).unsqueeze::<3>();
                softmax(scores.mask_fill(hidden.expand([b, s, s]), -1e9), 2).matmul(head(&v, i / g))
            })
            .collect();
        let expected = attention.o_proj.forward(Tensor::cat(heads, 2));
        for (y, expected) in values(y).iter().zip(values(expected)) {
            assert!((y - expected).abs() < 1e-5, "{y} {expected}");
        }
    }
}
