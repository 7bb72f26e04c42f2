//! The order of the rows of queries and keys.
//!
//! In Hugging Face's files, rotary embedding turns row `i` of a head together with row `i + d / 2`. For the
//! architecture `llama`, llama.cpp turns neighbours, `2 i` and `2 i + 1`: its files have the rows in that order.

use crate::config::LlamaConfig;

/// The number of heads by which the rows of a module are to be reordered; `None` for modules that keep their order.
pub(super) fn heads(config: &LlamaConfig, module: &str) -> Option<usize> {
    let heads = match module.rsplit('.').next() {
        Some("q_proj") => config.num_attention_heads,
        Some("k_proj") => config.num_key_value_heads,
        _ => return None,
    };
    config.family.llama_cpp.rotates_neighbours.then_some(heads)
}

/// Brings rows together that are turned together, head by head. `values` has `rows` rows, and a vector has rows of one
/// number.
pub(super) fn interleaved(values: &[f32], rows: usize, heads: usize) -> Vec<f32> {
    let (columns, half) = (values.len() / rows.max(1), rows / heads.max(1) / 2);
    let mut out = Vec::with_capacity(values.len());
    for head in 0..heads {
        for i in 0..half {
            for row in [2 * head * half + i, (2 * head + 1) * half + i] {
                out.extend_from_slice(&values[row * columns..(row + 1) * columns]);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_both_halves_of_a_head_alternate() {
        // Two heads of four rows, two columns: a row is its number, twice.
        let values: Vec<f32> = (0..8).flat_map(|row| [row as f32; 2]).collect();
        let expected: Vec<f32> =
            [0, 2, 1, 3, 4, 6, 5, 7].into_iter().flat_map(|row| [row as f32; 2]).collect();
        assert_eq!(interleaved(&values, 8, 2), expected);
        let vector: Vec<f32> = (0..6).map(|row| row as f32).collect();
        assert_eq!(interleaved(&vector, 6, 1), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
    }

    #[test]
    fn turning_neighbours_after_it_is_turning_halves_before_it() {
        const D: usize = 6;
        let turn = |x: &[f32], pairs: [[usize; 2]; D / 2]| {
            let mut out = x.to_vec();
            for (i, [a, b]) in pairs.into_iter().enumerate() {
                let (sin, cos) = (1.0 + i as f32).sin_cos();
                (out[a], out[b]) = (x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos);
            }
            out
        };
        let x: Vec<f32> = (0..D).map(|i| (i * i) as f32 - 3.0).collect();
        let halves = turn(&x, [[0, 3], [1, 4], [2, 5]]);
        let neighbours = turn(&interleaved(&x, D, 1), [[0, 1], [2, 3], [4, 5]]);
        assert_eq!(neighbours, interleaved(&halves, D, 1));
        assert_ne!(neighbours, turn(&x, [[0, 1], [2, 3], [4, 5]]));
    }

    #[test]
    fn queries_and_keys_have_their_own_number_of_heads() {
        let config = LlamaConfig::new(11, 32, 1).with_heads(4, 2);
        let of = |config: &LlamaConfig| {
            ["q_proj", "k_proj", "v_proj"]
                .map(|name| heads(config, &format!("model.layers.0.self_attn.{name}")))
        };
        assert_eq!(of(&config), [Some(4), Some(2), None]);
        assert_eq!(of(&config.with_model_type("qwen2").unwrap()), [None; 3]);
    }
}
