//! The model's hyperparameters, read from and written as `config.json`.

mod fields;
mod json;
mod rope;

use std::path::Path;

use crate::error::LlamaError;
use crate::family::{FAMILIES, Family};
use crate::file;
use crate::problem::{ConfigProblem, alternatives};
use crate::rope::RopeConfig;

/// The file that [`LlamaConfig::load`] reads.
pub(crate) const CONFIG_FILE: &str = "config.json";
const GENERATION_CONFIG_FILE: &str = "generation_config.json";

/// Bound of every size in a configuration.
const LARGEST_SIZE: usize = 1 << 24;

/// The hyperparameters of a LLaMA model, with the names of `config.json`.
///
/// The default is the one of transformers' `LlamaConfig`, which is LLaMA 7B. [`load`](Self::load) also reads the
/// configurations of other families that are variations of LLaMA, such as Qwen2; [`model_type`](Self::model_type) is
/// the family's name.
///
/// ```
/// use burn_peft_llama::LlamaConfig;
///
/// let config = LlamaConfig::new(512, 64, 2).with_heads(4, 2);
/// assert_eq!((config.intermediate_size, config.head_dim), (256, 16));
/// ```
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    pub(crate) family: &'static Family,
    /// Number of token ids. Default: 32000.
    pub vocab_size: usize,
    /// Width of the residual stream. Default: 4096.
    pub hidden_size: usize,
    /// Width between the projections of the feed-forward layer. Default: 11008.
    pub intermediate_size: usize,
    /// Number of blocks. Default: 32.
    pub num_hidden_layers: usize,
    /// Number of query heads. Default: 32.
    pub num_attention_heads: usize,
    /// Number of key and value heads, a divisor of the query heads. Default: as many.
    pub num_key_value_heads: usize,
    /// Width of one head, even. Default: `hidden_size / num_attention_heads`.
    pub head_dim: usize,
    /// Longest sequence the model was made for, in tokens. It limits nothing here. Default: 2048.
    pub max_position_embeddings: usize,
    /// Added to the mean square before its root is taken. Default: 1e-6.
    pub rms_norm_eps: f64,
    /// How positions are encoded.
    pub rope: RopeConfig,
    /// Whether the output layer is the embedding table. Default: `false`.
    pub tie_word_embeddings: bool,
    /// Whether the four projections of attention have a bias, in a family that leaves it open. Qwen2 does not: queries,
    /// keys and values have one, the output has none. Default: `false`.
    pub attention_bias: bool,
    /// Whether the three projections of the feed-forward layer have a bias, in a family that leaves it open. Default:
    /// `false`.
    pub mlp_bias: bool,
    /// Token that begins a text. Default: 1.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text, those of `generation_config.json` included. Default: 2.
    pub eos_token_ids: Vec<u32>,
    /// Token that fills up batches. Default: none.
    pub pad_token_id: Option<u32>,
    /// Standard deviation of freshly initialised weights. Default: 0.02.
    pub initializer_range: f64,
}

impl Default for LlamaConfig {
    fn default() -> Self {
        Self::of(Family::DEFAULT)
    }
}

impl LlamaConfig {
    /// What transformers makes of a `config.json` that says nothing but its family.
    fn of(family: &'static Family) -> Self {
        Self {
            family,
            vocab_size: family.defaults.vocab_size,
            hidden_size: 4096,
            intermediate_size: family.defaults.intermediate_size,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: family.defaults.num_key_value_heads.unwrap_or(32),
            head_dim: 128,
            max_position_embeddings: family.defaults.max_position_embeddings,
            rms_norm_eps: 1e-6,
            rope: RopeConfig::default(),
            tie_word_embeddings: family.defaults.tie_word_embeddings,
            attention_bias: false,
            mlp_bias: false,
            bos_token_id: family.defaults.bos_token_id,
            eos_token_ids: family.defaults.eos_token_ids.to_vec(),
            pad_token_id: None,
            initializer_range: 0.02,
        }
    }

    /// A configuration of the given size with transformers' defaults for the rest: heads of width 64 (one head if
    /// `hidden_size` is no multiple of it), as many of them for keys and values, and a feed-forward width of
    /// `4 * hidden_size`.
    pub fn new(vocab_size: usize, hidden_size: usize, num_hidden_layers: usize) -> Self {
        let heads = if hidden_size.is_multiple_of(64) { (hidden_size / 64).max(1) } else { 1 };
        let sized = Self { vocab_size, hidden_size, num_hidden_layers, ..Self::default() };
        Self { intermediate_size: 4 * hidden_size, ..sized }.with_heads(heads, heads)
    }

    /// The family's name in `config.json`, such as `llama`.
    pub fn model_type(&self) -> &'static str {
        self.family.model_type
    }

    /// Sets the family by its name in `config.json`, see [`model_type`](Self::model_type). Which layers have biases
    /// follows from it; other hyperparameters stay.
    ///
    /// # Errors
    /// [`LlamaError::UnknownName`] if there is no such family.
    pub fn with_model_type(mut self, model_type: &str) -> Result<Self, LlamaError> {
        self.family = Family::named(model_type).ok_or_else(|| LlamaError::UnknownName {
            what: "model type",
            name: model_type.to_string(),
            expected: alternatives(FAMILIES.iter().map(|family| family.model_type)),
        })?;
        Ok(self)
    }

    /// Sets the number of query heads and of key and value heads, and with them the width of one head.
    pub fn with_heads(mut self, query: usize, key_value: usize) -> Self {
        self.num_attention_heads = query;
        self.num_key_value_heads = key_value;
        self.head_dim = self.hidden_size.checked_div(query).unwrap_or(0);
        self
    }

    /// Sets the width between the projections of the feed-forward layer.
    pub fn with_intermediate_size(mut self, intermediate_size: usize) -> Self {
        self.intermediate_size = intermediate_size;
        self
    }

    /// Sets whether the output layer is the embedding table.
    pub fn with_tie_word_embeddings(mut self, tie_word_embeddings: bool) -> Self {
        self.tie_word_embeddings = tie_word_embeddings;
        self
    }

    /// Sets how positions are encoded.
    pub fn with_rope(mut self, rope: RopeConfig) -> Self {
        self.rope = rope;
        self
    }

    /// Reads `config.json` of a model directory, as transformers 5 and its predecessors write it, and adds the end
    /// tokens of `generation_config.json` if there is one. Where a file has `rope_scaling` beside `rope_parameters`,
    /// the former counts, as in transformers. A negative token id, which old files have where there is no token, is
    /// none.
    ///
    /// # Errors
    /// - [`LlamaError::ReadFile`] if `config.json` cannot be read,
    /// - [`LlamaError::WrongFile`] if one of the files is something else, such as a git-LFS pointer,
    /// - [`LlamaError::Json`] if one of the files is malformed,
    /// - [`LlamaError::Config`] with every field that has another type, is not supported or makes no sense: an unknown
    ///   family, an activation other than `silu`, positions other than `default` and `llama3`, a window of attention,
    ///   quantized weights, dropout.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self, LlamaError> {
        let dir = dir.as_ref();
        let path = dir.join(CONFIG_FILE);
        let text = file::read_in_model(dir, CONFIG_FILE)?;
        let (mut config, mut problems) = json::read(&file::parse(&path, &text)?);
        let unread: Vec<_> = problems.iter().map(|problem| problem.field).collect();
        problems.extend(config.problems().into_iter().filter(|problem| !unread.contains(&problem.field)));
        if !problems.is_empty() {
            return Err(LlamaError::Config { path, problems });
        }

        let path = dir.join(GENERATION_CONFIG_FILE);
        if let Some(text) = file::read_optional(&path, "it holds the end tokens")? {
            let problems = json::add_tokens(&mut config, &file::parse(&path, &text)?);
            if !problems.is_empty() {
                return Err(LlamaError::Config { path, problems });
            }
        }
        Ok(config)
    }

    /// Whether `q_proj`, `k_proj` and `v_proj` have a bias.
    pub(crate) fn has_qkv_bias(&self) -> bool {
        self.family.qkv_bias.is_there(self.attention_bias)
    }

    /// Whether `o_proj` has a bias.
    pub(crate) fn has_o_bias(&self) -> bool {
        self.family.o_bias.is_there(self.attention_bias)
    }

    /// Whether the projections of the feed-forward layer have a bias.
    pub(crate) fn has_mlp_bias(&self) -> bool {
        self.family.mlp_bias.is_there(self.mlp_bias)
    }

    /// What makes no sense about the sizes.
    pub(crate) fn problems(&self) -> Vec<ConfigProblem> {
        let mut problems = vec![];
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
        ];
        let mut problem = |field, expected: String, found: String| {
            problems.push(ConfigProblem::new(field, expected, found));
        };
        for (field, size) in sizes {
            if size == 0 {
                problem(field, "a positive number".to_string(), size.to_string());
            }
            // Far above any model, and far below what would overflow where sizes are multiplied.
            if size > LARGEST_SIZE {
                problem(field, format!("at most {LARGEST_SIZE}"), size.to_string());
            }
        }
        for (field, number) in [("rms_norm_eps", self.rms_norm_eps), ("rope_theta", self.rope.rope_theta)] {
            if !(number > 0.0 && number.is_finite()) {
                problem(field, "a positive number".to_string(), number.to_string());
            }
        }
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if kv_heads > 0 && !heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of `num_attention_heads` ({heads})");
            problem("num_key_value_heads", expected, kv_heads.to_string());
        }
        if let Some(id) = self.pad_token_id.filter(|&id| id as usize >= self.vocab_size) {
            problem("pad_token_id", format!("below `vocab_size` ({})", self.vocab_size), id.to_string());
        }
        if !self.head_dim.is_multiple_of(2) {
            problem("head_dim", "an even number".to_string(), self.head_dim.to_string());
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn read(config: &str, generation: Option<&str>) -> Result<LlamaConfig, LlamaError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(CONFIG_FILE), config).unwrap();
        if let Some(generation) = generation {
            std::fs::write(dir.path().join(GENERATION_CONFIG_FILE), generation).unwrap();
        }
        LlamaConfig::load(dir.path())
    }

    #[test]
    fn end_tokens_are_one_or_many_and_those_of_the_generation_config_join() {
        let config =
            read(r#"{"model_type": "llama", "eos_token_id": 5}"#, Some(r#"{"eos_token_id": [7, 5]}"#))
                .unwrap();
        assert_eq!(config.eos_token_ids, [5, 7]);
        let text = r#"{"model_type": "llama", "eos_token_id": [1, 2], "pad_token_id": null}"#;
        let config = read(text, Some(r#"{"eos_token_id": 9, "pad_token_id": 4}"#)).unwrap();
        assert_eq!((config.eos_token_ids.as_slice(), config.pad_token_id), ([1, 2, 9].as_slice(), Some(4)));
    }

    #[test]
    fn incomplete_or_senseless_files_are_errors() {
        assert!(read("{}", None).unwrap_err().to_string().contains("`model_type`: expected `llama`"));
        let text = r#"{"model_type": "llama", "rope_parameters": {"rope_type": "llama3", "factor": 0}}"#;
        let text = read(text, None).unwrap_err().to_string();
        assert!(text.contains("`factor`") && text.contains("`original_max_position_embeddings`"), "{text}");
        let zero = read(r#"{"model_type": "llama", "num_attention_heads": 0, "rms_norm_eps": 0}"#, None);
        let text = zero.unwrap_err().to_string();
        assert!(text.contains("`num_attention_heads`: expected a positive number, found 0"), "{text}");
        assert!(text.contains("`rms_norm_eps`"), "{text}");
        assert!(matches!(read(r#"{"vocab_size": -1}"#, None), Err(LlamaError::Config { .. })));
        assert!(matches!(read("[]", None), Err(LlamaError::Json { .. })));
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(LlamaConfig::load(dir.path()), Err(LlamaError::ReadFile { .. })));
    }
}
