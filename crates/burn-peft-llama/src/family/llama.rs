//! LLaMA, and the models that call themselves so, such as SmolLM2.

use super::{Bias, Defaults, Family, LlamaCpp};

pub(crate) const FAMILY: Family = Family {
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    qkv_bias: Bias::Configured,
    o_bias: Bias::Configured,
    mlp_bias: Bias::Configured,
    fixed: &[
        ("hidden_act", &["\"silu\"", "\"swish\""]),
        ("attention_dropout", &["0.0"]),
        ("pretraining_tp", &["1"]),
    ],
    defaults: Defaults {
        vocab_size: 32_000,
        intermediate_size: 11_008,
        max_position_embeddings: 2048,
        num_key_value_heads: None,
        tie_word_embeddings: false,
        bos_token_id: Some(1),
        eos_token_ids: &[2],
    },
    llama_cpp: LlamaCpp {
        architecture: "llama",
        rotates_neighbours: true,
        scales_rope: true,
        has_head_dim: true,
    },
};
