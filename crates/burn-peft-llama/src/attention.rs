//! Causal self-attention with shared key and value heads.

use burn::{
    module::Module,
    tensor::{Bool, DType, Device, Tensor, activation::softmax},
};
use burn_peft::LoraLinear;

use crate::{cache::LayerCache, rope::RotaryTables};

/// Grouped-query attention: `softmax(q kᵀ / sqrt(d) + mask) v`, where each key and value head serves
/// `num_attention_heads / num_key_value_heads` query heads.
///
/// The softmax is in f32 whatever the type of the weights, as in transformers.
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
    /// 0 where a query sees a key, negative infinity elsewhere; `None` if everything is seen.
    /// `[b or 1, 1, 1, s, t]`
    pub(crate) bias: Option<Tensor<5>>,
}

impl LlamaAttention {
    pub(crate) fn new(
        [q_proj, k_proj, v_proj, o_proj]: [LoraLinear; 4],
        num_key_value_heads: usize,
        head_dim: usize,
    ) -> Self {
        Self { q_proj, k_proj, v_proj, o_proj, num_key_value_heads, head_dim }
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
        let (k, v) = match cache {
            Some(cache) => cache.append(k, v),
            None => (k, v),
        };

        // The query heads of a group become further rows of one matrix, so keys and values are never repeated.
        let scores = q.reshape([b, n, g * s, d]).matmul(k.swap_dims(2, 3));
        let (weights, total) = masked_softmax(scores, context.bias.as_ref(), [g, s]);
        let y = weights.matmul(v);
        let y = match total {
            Some(total) => y / total,
            None => y,
        };
        let y = y.reshape([b, n, g, s, d]);
        self.o_proj.forward(y.permute([0, 3, 1, 2, 4]).reshape([b, s, n * g * d]))
    }
}

/// Up to so many keys the weights of a position sum to 1 within 1e-6.
const KEYS_OF_EXACT_SUM: usize = 512;

/// Softmax over the keys in f32, and what its result is to be divided by: `[b, n, g * s, 1]`, or nothing. Scores
/// `[b, n, g * s, t]`, bias `[b or 1, 1, 1, s, t]`.
///
/// The softmax of Burn's CPU backend (burn-flex 0.22.1) adds up the exponentials one by one in f32: 3e-6 off with 4,096
/// keys, 2e-5 with 32,768. Under autodiff it is composed of operations that are within 3e-7. Once its rows sum to 1, the
/// division can go.
fn masked_softmax(
    scores: Tensor<4>,
    bias: Option<&Tensor<5>>,
    [g, s]: [usize; 2],
) -> (Tensor<4>, Option<Tensor<4>>) {
    let dtype = scores.dtype();
    let scores = if dtype == DType::F32 { scores } else { scores.cast(DType::F32) };
    let dims @ [b, n, _, t] = scores.dims();
    let scores = match bias {
        Some(bias) => (scores.reshape([b, n, g, s, t]) + bias.clone()).reshape(dims),
        None => scores,
    };
    let weights = softmax(scores, 3);
    let is_exact = t <= KEYS_OF_EXACT_SUM || weights.is_autodiff();
    let total = (!is_exact).then(|| weights.clone().sum_dim(3));
    let cast = |x: Tensor<4>| if dtype == DType::F32 { x } else { x.cast(dtype) };
    (cast(weights), total.map(cast))
}

/// The bias of a pass over whole sequences: a position sees itself and the tokens before it, never padding.
///
/// Padding sees itself as well. Its results are used nowhere, but a row that sees nothing would be `0 / 0`.
pub(crate) fn causal_bias(mask: Option<Tensor<2, Bool>>, s: usize, device: &Device) -> Option<Tensor<5>> {
    if s == 1 {
        return None;
    }
    let hidden = Tensor::<2, Bool>::tril_mask([s, s], 0, device).unsqueeze::<3>();
    let hidden = match mask {
        Some(mask) => {
            let padding = mask.bool_not().unsqueeze_dim::<3>(1);
            let others = Tensor::<2, Bool>::diag_mask([s, s], 0, device).unsqueeze::<3>();
            let [b, _, _] = padding.dims();
            let shape = [b, s, s];
            hidden.expand(shape).bool_or(padding.expand(shape).bool_and(others.expand(shape)))
        }
        None => hidden,
    };
    Some(bias_of(hidden))
}

/// Negative infinity where a key is hidden, else 0. `[b, s, t]` to `[b, 1, 1, s, t]`.
pub(crate) fn bias_of(hidden: Tensor<3, Bool>) -> Tensor<5> {
    let zeros = Tensor::<3>::zeros(hidden.dims(), (&hidden.device(), DType::F32));
    zeros.mask_fill(hidden, f32::NEG_INFINITY).unsqueeze_dims(&[1, 1])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{LlamaConfig, RopeConfig, rope::Rope};
    use burn::nn::LinearConfig;
    use burn::tensor::Distribution;

    fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.into_data().iter::<f32>().collect()
    }

    #[test]
    fn the_bias_hides_the_future_and_padding_but_never_a_position_itself() {
        let device = Device::flex();
        let mask = Tensor::<2, Bool>::from_data([[false, true, true], [true, true, false]], &device);
        let bias = causal_bias(Some(mask), 3, &device).unwrap();
        assert_eq!(bias.dims(), [2, 1, 1, 3, 3]);
        let seen: Vec<bool> = values(bias).iter().map(|value| *value == 0.0).collect();
        let expected = [
            [[true, false, false], [false, true, false], [false, true, true]],
            [[true, false, false], [true, true, false], [true, true, true]],
        ];
        assert_eq!(seen, expected.concat().concat());
        let causal = values(causal_bias(None, 2, &device).unwrap());
        assert_eq!(causal, [0.0, f32::NEG_INFINITY, 0.0, 0.0]);
        assert!(causal_bias(None, 1, &device).is_none());
    }

    #[test]
    fn weights_of_many_keys_sum_to_one_with_and_without_a_graph() {
        for device in [Device::flex(), Device::flex().autodiff()] {
            for t in [KEYS_OF_EXACT_SUM, 4_096, 32_768] {
                let scores: Vec<f32> =
                    (0..4 * t).map(|i| ((i * 7919) % 10_007) as f32 / 1_251.0 - 4.0).collect();
                let scores = burn::tensor::TensorData::new(scores, [1, 2, 2, t]);
                let (weights, total) = masked_softmax(Tensor::from_data(scores, &device), None, [1, 2]);
                let weights = match total {
                    Some(total) => weights / total,
                    None => weights,
                };
                for row in values(weights).chunks(t) {
                    let sum: f64 = row.iter().copied().map(f64::from).sum();
                    assert!((sum - 1.0).abs() < 2e-6, "{t} keys: {sum}");
                }
            }
        }
    }

    #[test]
    fn grouped_heads_equal_attention_computed_head_by_head() {
        let device = Device::flex();
        device.seed(3);
        let (b, s, hidden, n, g, d) = (2, 3, 10, 2, 3, 4);
        let linear = |d_in, d_out| LinearConfig::new(d_in, d_out).with_bias(false).init(&device).into();
        let projections = [
            linear(hidden, n * g * d),
            linear(hidden, n * d),
            linear(hidden, n * d),
            linear(n * g * d, hidden),
        ];
        let attention = LlamaAttention::new(projections, n, d);
        // Frequencies of nearly zero: no rotation, so heads can be compared without it.
        let rope = RopeConfig { rope_theta: 1e30, ..RopeConfig::default() };
        let config = LlamaConfig { head_dim: d, rope, ..LlamaConfig::default() };
        let tables = Rope::new(&config).tables(0..1, &device, DType::F32);
        let context = Context { tables, bias: causal_bias(None, s, &device) };

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
