//! Qwen2 and Qwen2.5: queries, keys and values have a bias.

use super::{Bias, Defaults, Family, LlamaCpp};

pub(crate) const FAMILY: Family = Family {
    model_type: "qwen2",
    architecture: "Qwen2ForCausalLM",
    qkv_bias: Bias::Always,
    o_bias: Bias::Never,
    mlp_bias: Bias::Never,
    fixed: &[
        ("hidden_act", &["\"silu\"", "\"swish\""]),
        ("attention_dropout", &["0.0"]),
        ("use_sliding_window", &["false"]),
    ],
    defaults: Defaults {
        vocab_size: 151_936,
        intermediate_size: 22_016,
        max_position_embeddings: 32_768,
        num_key_value_heads: Some(32),
        tie_word_embeddings: false,
        bos_token_id: None,
        eos_token_ids: &[],
    },
    llama_cpp: LlamaCpp {
        architecture: "qwen2",
        rotates_neighbours: false,
        scales_rope: false,
        has_head_dim: false,
    },
};
