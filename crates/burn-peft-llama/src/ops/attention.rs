//! Scaled dot-product attention with shared key and value heads.

use burn::tensor::activation::softmax;
use burn::tensor::{DType, Tensor};

use super::cast;

/// `softmax(q kᵀ + bias) v` for each head, where `g` query heads share one head of keys and values.
///
/// The queries are scaled already. The softmax is in f32 whatever the type of the scores, as in transformers.
///
/// # Shapes
/// - q: `[b, n, g, s, d]`
/// - k, v: `[b, n, t, d]`
/// - bias: `[b or 1, 1, 1, s, t]`, 0 where a query sees a key and negative infinity elsewhere; `None` if it sees all
/// - output: `[b, n, g, s, d]`
pub(crate) fn attention(q: Tensor<5>, k: Tensor<4>, v: Tensor<4>, bias: Option<&Tensor<5>>) -> Tensor<5> {
    let dims @ [b, n, g, s, d] = q.dims();
    // The query heads of a group become further rows of one matrix, so keys and values are never repeated.
    let scores = q.reshape([b, n, g * s, d]).matmul(k.swap_dims(2, 3));
    let (weights, total) = masked_softmax(scores, bias, [g, s]);
    let y = weights.matmul(v);
    let y = if let Some(total) = total { y / total } else { y };
    y.reshape(dims)
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
    let scores = cast(scores, DType::F32);
    let dims @ [b, n, _, t] = scores.dims();
    let scores = match bias {
        Some(bias) => (scores.reshape([b, n, g, s, t]) + bias.clone()).reshape(dims),
        None => scores,
    };
    let weights = softmax(scores, 3);
    let is_exact = t <= KEYS_OF_EXACT_SUM || weights.is_autodiff();
    let total = (!is_exact).then(|| weights.clone().sum_dim(3));
    (cast(weights, dtype), total.map(|total| cast(total, dtype)))
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::testing::values;

    #[test]
    fn weights_of_many_keys_sum_to_one_with_and_without_a_graph() {
        for device in [Device::flex(), Device::flex().autodiff()] {
            for t in [KEYS_OF_EXACT_SUM, 4_096, 32_768] {
                let scores: Vec<f32> =
                    (0..4 * t).map(|i| ((i * 7919) % 10_007) as f32 / 1_251.0 - 4.0).collect();
                let scores = TensorData::new(scores, [1, 2, 2, t]);
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
}
