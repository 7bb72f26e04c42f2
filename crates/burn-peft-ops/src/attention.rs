//! Scaled dot-product attention with shared key and value heads.

#[cfg(feature = "flex")]
mod flex;

use burn::tensor::activation::softmax;
use burn::tensor::{DType, Tensor};

use crate::token_tree::Places;
use crate::{CausalMask, cast};

/// `softmax(q kᵀ + mask) v` for each head, where `g` query heads share one head of keys and values.
///
/// The queries are scaled already. The softmax is in f32 whatever the type of the scores, as in transformers, or in f64 if
/// they are. On Burn's CPU backend (Flex), scores exist for one block of queries at a time, and backward computes them anew:
/// the operation keeps its inputs and two numbers for each row. Keys behind the last query of a block are left out.
///
/// # Shapes
/// - q: `[b, n, g, s, d]`
/// - k, v: `[b, n, t, d]`
/// - mask: of `s` queries and `t` keys
/// - output: `[b, n, g, s, d]`
///
/// # Panics
/// If the shapes do not fit, those of the mask included.
pub fn attention(q: Tensor<5>, k: Tensor<4>, v: Tensor<4>, mask: &CausalMask) -> Tensor<5> {
    let dims @ [b, n, g, s, d] = q.dims();
    assert_eq!([s, k.dims()[2]], mask.dims(), "numbers of queries and keys, and those of the mask");
    assert_eq!(k.dims(), v.dims(), "shapes of keys and values");
    assert_eq!(
        [b, n, d],
        [k.dims()[0], k.dims()[1], k.dims()[3]],
        "batch, heads and width of queries and keys"
    );
    if let Some(sequences) = mask.batch() {
        assert_eq!(sequences, b, "sequences of the attention mask, and of the batch");
    }
    #[cfg(feature = "flex")]
    if flex::has_kernel(&q, &k, &v) {
        return flex::attention(q, k, v, mask);
    }
    if let Some(tree) = mask.tree() {
        let places = mask.places(tree, &q.device());
        return if tree.is_empty() { q } else { of_tree(q, k, v, places) };
    }
    // The query heads of a group become further rows of one matrix, so keys and values are never repeated.
    let scores = q.reshape([b, n, g * s, d]).matmul(k.swap_dims(2, 3));
    let bias = mask.bias(&scores.device());
    let (weights, total) = masked_softmax(scores, bias, [g, s]);
    let y = weights.matmul(v);
    let y = if let Some(total) = total { y / total } else { y };
    y.reshape(dims)
}

/// Attention in a row of tokens, `b` being 1: each segment of the tree gets a sequence of its own.
fn of_tree(q: Tensor<5>, k: Tensor<4>, v: Tensor<4>, places: &Places) -> Tensor<5> {
    let dims @ [_, n, g, _, d] = q.dims();
    let Places { dims: [rows, s], tokens, places, mask } = places;
    let (rows, s) = (*rows, *s);
    let q = q.select(3, tokens.clone()).reshape([n, g, rows, s, d]).permute([2, 0, 1, 3, 4]);
    let [k, v] = [k, v].map(|x| x.select(2, tokens.clone()).reshape([n, rows, s, d]).swap_dims(0, 1));
    let y = attention(q, k, v, mask);
    let y = y.permute([1, 2, 0, 3, 4]).reshape([n, g, rows * s, d]);
    y.select(2, places.clone()).reshape(dims)
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
    let scores = if dtype == DType::F64 { scores } else { cast(scores, DType::F32) };
    let dims @ [b, n, _, t] = scores.dims();
    let scores = match bias {
        Some(bias) => {
            (scores.clone().reshape([b, n, g, s, t]) + cast(bias.clone(), scores.dtype())).reshape(dims)
        }
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

#[cfg(all(test, feature = "flex"))]
mod kernel_tests {
    use burn::tensor::{Bool, Device, TensorData};

    use super::*;
    use crate::TokenTree;
    use crate::testing::{Checked, deviation, normal, values, wide};

    /// Padding on the left in the first sequence, on the right in the second, in the middle of the third, and so on.
    fn tokens(b: usize, t: usize) -> Tensor<2, Bool> {
        let is_token = |row: usize, i: usize| match row % 4 {
            0 => i >= t / 3,
            1 => i < t - t / 4,
            2 => i < t / 2 || i > t / 2 + 2,
            _ => true,
        };
        let tokens: Vec<bool> = (0..b * t).map(|i| is_token(i / t, i % t)).collect();
        Tensor::from_data(TensorData::new(tokens, [b, t]), &Device::flex())
    }

    #[test]
    fn values_and_gradients_are_those_in_f64() {
        for device in [Device::flex().autodiff(), Device::flex().autodiff().gradient_checkpointing()] {
            for [b, n, g, s, t, d] in [
                [1, 1, 1, 1, 1, 2],
                [2, 3, 1, 5, 5, 8],
                [4, 2, 3, 92, 92, 64],
                [3, 1, 4, 1, 70, 16],
                [1, 2, 2, 130, 200, 32],
            ] {
                for mask in [CausalMask::new(s, t), CausalMask::new(s, t).with_tokens(tokens(b, t))] {
                    // Queries, keys and values in one tensor, each a view of it.
                    let qkv = normal([b, n, (g * s + 2 * t), d], 1.0, 1);
                    let dy = normal([b, n, g, s, d], 1.0, 2);
                    let of = |[qkv]: [Tensor<4>; 1]| {
                        let q = qkv.clone().narrow(2, 0, g * s).reshape([b, n, g, s, d]);
                        let k = qkv.clone().narrow(2, g * s, t);
                        // Values as the model has them: positions before heads in memory.
                        let v = qkv.narrow(2, g * s + t, t).swap_dims(1, 2) * 1.0;
                        attention(q, k, v.swap_dims(1, 2), &mask)
                    };
                    let found = Checked::of(of, [&qkv], &dy, &device, DType::F32);
                    let expected = Checked::of(of, [&qkv], &dy, &device, DType::F64);
                    found.assert_close(&expected, 3e-6);
                }
            }
        }
    }

    /// Sequences of 9, 150 and 40 tokens, the second of which shares 5 with the first, the third 130 with the second; then
    /// one of its own, of 80.
    fn tree() -> TokenTree {
        let mut behind = vec![];
        let mut run = |first: Option<usize>, count: usize| {
            behind.push(first);
            (1..count).for_each(|_| behind.push(Some(behind.len() - 1)));
        };
        run(None, 9);
        run(Some(4), 145);
        run(Some(9 + 124), 20);
        run(None, 80);
        TokenTree::new(&behind)
    }

    #[test]
    fn in_a_tree_each_token_gets_what_it_would_alone() {
        let tree = tree();
        let mask = CausalMask::of_tree(tree.clone());
        let (n, g, s, d) = (2, 3, tree.len(), 16);
        let [q, dy] = [1, 2].map(|seed| normal([1, n, g, s, d], 1.0, seed));
        let [k, v] = [3, 4].map(|seed| normal([1, n, s, d], 1.0, seed));
        // Each path by itself: the ways to the ends of the sequences.
        let paths: [Vec<usize>; 4] = [
            (0..9).collect(),
            (0..5).chain(9..154).collect(),
            (0..5).chain(9..134).chain(154..174).collect(),
            (174..254).collect(),
        ];
        for device in [Device::flex().autodiff(), Device::flex().autodiff().gradient_checkpointing()] {
            let of = |[qkv]: [Tensor<4>; 1]| {
                let q = qkv.clone().narrow(2, 0, g * s).reshape([1, n, g, s, d]);
                let [k, v] = [0, s].map(|start| qkv.clone().narrow(2, g * s + start, s));
                attention(q, k, v, &mask)
            };
            let qkv = Tensor::cat(vec![q.clone().reshape([1, n, g * s, d]), k.clone(), v.clone()], 2);
            let found = Checked::of(of, [&qkv], &dy, &device, DType::F32);
            found.assert_close(&Checked::of(of, [&qkv], &dy, &device, DType::F64), 3e-6);
        }
        let y = attention(q.clone(), k.clone(), v.clone(), &mask);
        for path in paths {
            let indices: Vec<i64> = path.iter().map(|&i| i as i64).collect();
            let indices = Tensor::from_data(TensorData::new(indices, [path.len()]), &Device::flex());
            let [k, v] = [&k, &v].map(|x| x.clone().select(2, indices.clone()));
            let alone = CausalMask::new(path.len(), path.len());
            let expected = attention(q.clone().select(3, indices.clone()), k, v, &alone);
            let found = y.clone().select(3, indices);
            assert!(deviation(&wide(&values(found)), &wide(&values(expected))) < 1e-6);
        }
    }

    #[test]
    #[should_panic(expected = "sequences of the attention mask")]
    fn a_tree_is_for_one_row() {
        let x = normal([2, 1, 2, 2], 1.0, 1);
        let mask = CausalMask::of_tree(TokenTree::new(&[None, Some(0)]));
        attention(x.clone().unsqueeze_dim(2), x.clone(), x, &mask);
    }

    /// As many keys as a long text has.
    #[test]
    fn weights_of_many_keys_sum_to_one() {
        let t = 32_768;
        let (q, k) = (normal([1, 1, 1, 1, 8], 1.0, 1), normal([1, 1, t, 8], 1.0, 2));
        let v = Tensor::ones([1, 1, t, 8], &Device::flex());
        assert!(flex::has_kernel(&q, &k, &v));
        let y = wide(&values(attention(q, k, v, &CausalMask::new(1, t))));
        assert!(deviation(&y, &[1.0; 8]) < 1e-6, "{y:?}");
    }

    #[test]
    #[should_panic(expected = "sequences of the attention mask")]
    fn a_mask_of_another_batch_is_refused() {
        let x = normal([3, 1, 4, 2], 1.0, 1);
        let mask = CausalMask::new(4, 4).with_tokens(tokens(1, 4));
        attention(x.clone().unsqueeze_dim(2), x.clone(), x, &mask);
    }

    /// As while an answer is written: one query, keys and values are views of larger buffers, padding on the left.
    #[test]
    fn a_query_with_a_cache_sees_what_it_would_in_the_whole_sequence() {
        let (b, n, g, t, d) = (2, 2, 3, 70, 8);
        let q = normal([b, n, g, t, d], 1.0, 1);
        let [k, v] = [2, 3].map(|seed| normal([b, n, t + 30, d], 1.0, seed).narrow(2, 7, t));
        let whole = CausalMask::new(t, t).with_tokens(tokens(b, t));
        let last = CausalMask::new(1, t).with_tokens(tokens(b, t));
        let expected = attention(q.clone(), k.clone(), v.clone(), &whole).narrow(3, t - 1, 1);
        let found = attention(q.narrow(3, t - 1, 1), k, v, &last);
        assert!(deviation(&wide(&values(found)), &wide(&values(expected))) < 1e-6);
    }

    /// Longer sums than products make at once.
    #[test]
    fn gradients_of_many_keys_are_those_in_f64() {
        let (device, t) = (Device::flex().autodiff(), 9_000);
        let kv = normal([1, 2, t, 4], 1.0, 1);
        let q = normal([1, 1, 2, 2, 4], 1.0, 2);
        let dy = normal([1, 1, 2, 2, 4], 1.0, 3);
        let of = |[kv]: [Tensor<4>; 1]| {
            let q = Tensor::from_data(q.to_data(), (&kv.device(), kv.dtype()));
            let (k, v) = (kv.clone().narrow(1, 0, 1), kv.narrow(1, 1, 1));
            attention(q, k, v, &CausalMask::new(2, t))
        };
        let found = Checked::of(of, [&kv], &dy, &device, DType::F32);
        found.assert_close(&Checked::of(of, [&kv], &dy, &device, DType::F64), 3e-6);
    }

    #[test]
    fn what_is_infinite_or_nan_shows() {
        let device = Device::flex();
        let ones = Tensor::<4>::ones([1, 1, 2, 2], &device);
        for bad in [f32::NAN, f32::INFINITY] {
            let k = Tensor::<4>::from_data([[[[1.0, 1.0], [bad, 1.0]]]], &device);
            let y = values(attention(ones.clone().unsqueeze_dim(2), k, ones.clone(), &CausalMask::new(2, 2)));
            assert_eq!(y[..2], [1.0, 1.0]);
            assert!(y[2..].iter().all(|y| y.is_nan()), "{y:?}");
        }
    }
}
