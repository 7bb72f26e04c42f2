//! Model families: the variations of LLaMA, each described by one constant in a file of its own.
//!
//! Reading and writing `config.json` and building a model follow the constant; nothing else names a family. A
//! difference that no family here has yet becomes a field of [`Family`] and one branch in the layer that it concerns:
//! norms on queries and keys in `attention.rs`, another activation in `mlp.rs`, `1 + weight` in `norm.rs`, a
//! window of attention in `mask.rs`, a scaled embedding in `model.rs`.

use std::fmt;

/// Each name is a file that describes a family in a constant `FAMILY`.
macro_rules! families {
    ($($name:ident),*) => {
        $(mod $name;)*

        /// Every family that can be read.
        pub(crate) const FAMILIES: &[&Family] = &[$(&$name::FAMILY),*];
    };
}

families![llama, qwen2];

/// What distinguishes a family from others.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Family {
    /// `model_type` in `config.json`.
    pub(crate) model_type: &'static str,
    /// The class in transformers, which `architectures` in `config.json` names.
    pub(crate) architecture: &'static str,
    /// Biases of `q_proj`, `k_proj` and `v_proj`; `attention_bias` configures them.
    pub(crate) qkv_bias: Bias,
    /// The bias of `o_proj`; `attention_bias` configures it.
    pub(crate) o_bias: Bias,
    /// Biases of the feed-forward layer; `mlp_bias` configures them.
    pub(crate) mlp_bias: Bias,
    /// Entries of `config.json` that may have these values only, as JSON. Other values ask for something that is not
    /// computed here. The first value is written. If `null` alone is allowed, the entry must be there: left
    /// out, it has another value in transformers.
    pub(crate) fixed: &'static [(&'static str, &'static [&'static str])],
    /// What a `config.json` leaves out.
    pub(crate) defaults: Defaults,
    /// What llama.cpp makes of it.
    pub(crate) llama_cpp: LlamaCpp,
}

/// How llama.cpp computes a family.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct LlamaCpp {
    /// `general.architecture` of its files.
    pub(crate) architecture: &'static str,
    /// Whether rotary embedding turns neighbours together, not halves of a head.
    pub(crate) rotates_neighbours: bool,
    /// Whether `rope_freqs.weight` is read.
    pub(crate) scales_rope: bool,
    /// Whether a head may have another width than `hidden_size / num_attention_heads`.
    pub(crate) has_head_dim: bool,
}

/// Whether layers have a bias.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bias {
    /// In every model of the family.
    Always,
    /// In no model of the family.
    Never,
    /// Where `config.json` says so.
    Configured,
}

/// The values of transformers for entries that `config.json` leaves out, where families differ.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Defaults {
    pub(crate) vocab_size: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) max_position_embeddings: usize,
    /// `None` for the number of query heads.
    pub(crate) num_key_value_heads: Option<usize>,
    pub(crate) tie_word_embeddings: bool,
    pub(crate) bos_token_id: Option<u32>,
    pub(crate) eos_token_ids: &'static [u32],
}

impl Family {
    /// The family of a model that names none.
    pub(crate) const DEFAULT: &'static Self = &llama::FAMILY;

    /// The family of that `model_type`.
    pub(crate) fn named(model_type: &str) -> Option<&'static Self> {
        FAMILIES.iter().copied().find(|family| family.model_type == model_type)
    }
}

impl fmt::Debug for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.model_type)
    }
}

impl Bias {
    /// Whether there is a bias in a model whose configuration says `configured`.
    pub(crate) fn is_there(self, configured: bool) -> bool {
        self == Self::Always || (self == Self::Configured && configured)
    }
}
