//! The model's hyperparameters, read from and written as `config.json`.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::{LlamaError, RopeConfig, RopeScaling, file};

/// The file that [`LlamaConfig::load`] reads.
pub(crate) const CONFIG_FILE: &str = "config.json";
const GENERATION_CONFIG_FILE: &str = "generation_config.json";

/// The hyperparameters of a LLaMA model, with the names of `config.json`.
///
/// The default is the one of transformers' `LlamaConfig`, which is LLaMA 7B.
///
/// ```
/// use burn_peft_llama::LlamaConfig;
///
/// let config = LlamaConfig::new(512, 64, 2).with_heads(4, 2);
/// assert_eq!((config.intermediate_size, config.head_dim), (256, 16));
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
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
    /// Whether the four projections of attention have a bias. Default: `false`.
    pub attention_bias: bool,
    /// Whether the three projections of the feed-forward layer have a bias. Default: `false`.
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
        Self {
            vocab_size: 32000,
            hidden_size: 4096,
            intermediate_size: 11008,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: 32,
            head_dim: 128,
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-6,
            rope: RopeConfig::default(),
            tie_word_embeddings: false,
            attention_bias: false,
            mlp_bias: false,
            bos_token_id: Some(1),
            eos_token_ids: vec![2],
            pad_token_id: None,
            initializer_range: 0.02,
        }
    }
}

/// One field of a `config.json` that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigProblem {
    /// The field.
    pub field: &'static str,
    /// What is allowed.
    pub expected: String,
    /// What was found.
    pub found: String,
}

impl std::fmt::Display for ConfigProblem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}`: expected {}, found {}", self.field, self.expected, self.found)
    }
}

/// Bound of every size in a configuration.
const LARGEST_SIZE: usize = 1 << 24;

/// A token id or a list of them.
#[derive(Deserialize)]
#[serde(untagged)]
enum TokenIds {
    One(u32),
    Many(Vec<u32>),
}

impl TokenIds {
    fn into_vec(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}

/// `config.json`; the fields of both generations.
#[derive(Deserialize)]
struct Json {
    model_type: Option<String>,
    architectures: Option<Vec<String>>,
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    rope_interleaved: Option<bool>,
    partial_rotary_factor: Option<f64>,
    head_dim: Option<usize>,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    rope_parameters: Option<RopeJson>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RopeJson>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    // The tokens have defaults of their own, so an absent field differs from `null`.
    #[serde(default = "default_bos")]
    bos_token_id: Option<u32>,
    #[serde(default = "default_eos")]
    eos_token_id: Option<TokenIds>,
    pad_token_id: Option<u32>,
    initializer_range: Option<f64>,
    hidden_act: Option<String>,
    pretraining_tp: Option<f64>,
    attention_dropout: Option<f64>,
    quantization_config: Option<Value>,
}

fn default_bos() -> Option<u32> {
    Some(1)
}

fn default_eos() -> Option<TokenIds> {
    Some(TokenIds::One(2))
}

#[derive(Deserialize, Default)]
struct RopeJson {
    rope_theta: Option<f64>,
    rope_type: Option<String>,
    /// The name of `rope_type` in the oldest files.
    #[serde(rename = "type")]
    old_type: Option<String>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<usize>,
}

/// The fields of `generation_config.json` that matter here.
#[derive(Deserialize, Default)]
struct GenerationJson {
    bos_token_id: Option<u32>,
    eos_token_id: Option<TokenIds>,
    pad_token_id: Option<u32>,
}

impl LlamaConfig {
    /// A configuration of the given size with transformers' defaults for the rest: heads of width 64 (one head if
    /// `hidden_size` is no multiple of it), as many of them for keys and values, and a feed-forward width of
    /// `4 * hidden_size`.
    pub fn new(vocab_size: usize, hidden_size: usize, num_hidden_layers: usize) -> Self {
        let heads = if hidden_size.is_multiple_of(64) { (hidden_size / 64).max(1) } else { 1 };
        let sized = Self { vocab_size, hidden_size, num_hidden_layers, ..Self::default() };
        Self { intermediate_size: 4 * hidden_size, ..sized }.with_heads(heads, heads)
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
    /// tokens of `generation_config.json` if there is one.
    ///
    /// # Errors
    ///
    /// - [`LlamaError::ReadText`] if `config.json` cannot be read,
    /// - [`LlamaError::ConfigJson`] if one of the files is malformed,
    /// - [`LlamaError::Config`] with every field that is not supported or makes no sense: another architecture, an
    ///   activation other than `silu`, positions other than `default` and `llama3`, quantized weights, dropout.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self, LlamaError> {
        let dir = dir.as_ref();
        let path = dir.join(CONFIG_FILE);
        let text = file::read(&path, "expected a model directory in the Hugging Face layout")?;
        let json: Json = parse(&path, &text)?;
        let (mut config, mut problems) = json.into_config();
        problems.extend(config.problems());
        if !problems.is_empty() {
            return Err(LlamaError::Config { path, problems });
        }

        let path = dir.join(GENERATION_CONFIG_FILE);
        if let Some(text) = file::read_optional(&path, "it holds the end tokens")? {
            let generation: GenerationJson = parse(&path, &text)?;
            for id in generation.eos_token_id.map(TokenIds::into_vec).unwrap_or_default() {
                if !config.eos_token_ids.contains(&id) {
                    config.eos_token_ids.push(id);
                }
            }
            config.bos_token_id = config.bos_token_id.or(generation.bos_token_id);
            config.pad_token_id = config.pad_token_id.or(generation.pad_token_id);
        }
        Ok(config)
    }

    /// The `config.json` that transformers 5 reads, for weights of type `dtype` (`float32`, `bfloat16`, ..).
    pub(crate) fn to_json(&self, dtype: &str) -> Value {
        let mut rope = json!({ "rope_theta": self.rope.rope_theta });
        match self.rope.scaling {
            RopeScaling::Default => rope["rope_type"] = json!("default"),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                rope["rope_type"] = json!("llama3");
                rope["factor"] = json!(factor);
                rope["low_freq_factor"] = json!(low_freq_factor);
                rope["high_freq_factor"] = json!(high_freq_factor);
                rope["original_max_position_embeddings"] = json!(original_max_position_embeddings);
            }
        }
        let eos_token_id = match self.eos_token_ids.as_slice() {
            [] => Value::Null,
            [id] => json!(id),
            ids => json!(ids),
        };
        json!({
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "dtype": dtype,
            "eos_token_id": eos_token_id,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": self.initializer_range,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "mlp_bias": self.mlp_bias,
            "model_type": "llama",
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "pad_token_id": self.pad_token_id,
            "pretraining_tp": 1,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": rope,
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_cache": true,
            "vocab_size": self.vocab_size,
        })
    }

    /// What makes no sense about the sizes.
    pub(crate) fn problems(&self) -> Vec<ConfigProblem> {
        let mut problems = Vec::new();
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
        ];
        let positive = |problems: &mut Vec<_>, field, valid: bool, found: String| {
            if !valid {
                problems.push(ConfigProblem { field, expected: "a positive number".to_owned(), found });
            }
        };
        for (field, size) in sizes {
            positive(&mut problems, field, size > 0, size.to_string());
            // Far above any model, and far below what would overflow where sizes are multiplied.
            if size > LARGEST_SIZE {
                let expected = format!("at most {LARGEST_SIZE}");
                problems.push(ConfigProblem { field, expected, found: size.to_string() });
            }
        }
        let numbers = [("rms_norm_eps", self.rms_norm_eps), ("rope_theta", self.rope.rope_theta)];
        for (field, number) in numbers {
            positive(&mut problems, field, number > 0.0 && number.is_finite(), number.to_string());
        }
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if kv_heads > 0 && !heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of `num_attention_heads` ({heads})");
            problems.push(ConfigProblem {
                field: "num_key_value_heads",
                expected,
                found: kv_heads.to_string(),
            });
        }
        if !self.head_dim.is_multiple_of(2) {
            let (expected, found) = ("an even number".to_owned(), self.head_dim.to_string());
            problems.push(ConfigProblem { field: "head_dim", expected, found });
        }
        problems
    }
}

fn parse<T: serde::de::DeserializeOwned>(path: &Path, text: &str) -> Result<T, LlamaError> {
    serde_json::from_str(text).map_err(|source| LlamaError::ConfigJson { path: path.to_owned(), source })
}

impl Json {
    fn into_config(self) -> (LlamaConfig, Vec<ConfigProblem>) {
        let mut problems = self.unsupported();
        let default = LlamaConfig::default();
        let hidden_size = self.hidden_size.unwrap_or(default.hidden_size);
        let num_attention_heads = self.num_attention_heads.unwrap_or(default.num_attention_heads);
        let per_head = hidden_size.checked_div(num_attention_heads).unwrap_or(0);
        let rope_json = self.rope_parameters.or(self.rope_scaling).unwrap_or_default();
        let config = LlamaConfig {
            vocab_size: self.vocab_size.unwrap_or(default.vocab_size),
            hidden_size,
            intermediate_size: self.intermediate_size.unwrap_or(default.intermediate_size),
            num_hidden_layers: self.num_hidden_layers.unwrap_or(default.num_hidden_layers),
            num_attention_heads,
            num_key_value_heads: self.num_key_value_heads.unwrap_or(num_attention_heads),
            head_dim: self.head_dim.unwrap_or(per_head),
            max_position_embeddings: self.max_position_embeddings.unwrap_or(default.max_position_embeddings),
            rms_norm_eps: self.rms_norm_eps.unwrap_or(default.rms_norm_eps),
            rope: RopeConfig {
                rope_theta: rope_json.rope_theta.or(self.rope_theta).unwrap_or(default.rope.rope_theta),
                scaling: rope_json.scaling(&mut problems),
            },
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(default.tie_word_embeddings),
            attention_bias: self.attention_bias.unwrap_or(default.attention_bias),
            mlp_bias: self.mlp_bias.unwrap_or(default.mlp_bias),
            bos_token_id: self.bos_token_id,
            eos_token_ids: self.eos_token_id.map(TokenIds::into_vec).unwrap_or_default(),
            pad_token_id: self.pad_token_id,
            initializer_range: self.initializer_range.unwrap_or(default.initializer_range),
        };
        (config, problems)
    }

    /// The fields that ask for something this crate does not do.
    fn unsupported(&self) -> Vec<ConfigProblem> {
        let mut problems = Vec::new();
        let mut refuse = |field, expected: &str, found: String| {
            problems.push(ConfigProblem { field, expected: expected.to_owned(), found });
        };
        match &self.model_type {
            Some(model_type) if model_type != "llama" => {
                refuse("model_type", "`llama`", format!("`{model_type}`"));
            }
            None if self.architectures.is_none() => refuse("model_type", "`llama`", "none".to_owned()),
            _ => {}
        }
        if let Some(architectures) = &self.architectures
            && !architectures.iter().any(|name| name == "LlamaForCausalLM")
        {
            refuse("architectures", "`LlamaForCausalLM`", format!("`{}`", architectures.join("`, `")));
        }
        if let Some(act) = self.hidden_act.as_ref().filter(|act| !["silu", "swish"].contains(&act.as_str())) {
            refuse("hidden_act", "`silu`", format!("`{act}`"));
        }
        if let Some(tp) = self.pretraining_tp.filter(|&tp| tp != 1.0) {
            refuse("pretraining_tp", "1", tp.to_string());
        }
        if let Some(dropout) = self.attention_dropout.filter(|&dropout| dropout != 0.0) {
            refuse("attention_dropout", "0", dropout.to_string());
        }
        if self.rope_interleaved == Some(true) {
            refuse("rope_interleaved", "false: halves of a head are rotated", "true".to_owned());
        }
        if let Some(share) = self.partial_rotary_factor.filter(|&share| share != 1.0) {
            refuse("partial_rotary_factor", "1", share.to_string());
        }
        if let Some(quantization) = self.quantization_config.as_ref().filter(|value| !value.is_null()) {
            let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("an unnamed one");
            refuse("quantization_config", "weights in f32, f16 or bf16", format!("method `{method}`"));
        }
        problems
    }
}

impl RopeJson {
    fn scaling(&self, problems: &mut Vec<ConfigProblem>) -> RopeScaling {
        match self.rope_type.as_deref().or(self.old_type.as_deref()) {
            None | Some("default") => RopeScaling::Default,
            Some("llama3") => {
                let mut number = |field, value: Option<f64>| match value {
                    Some(value) if value > 0.0 && value.is_finite() => value,
                    other => {
                        let found = other.map_or("none".to_owned(), |value| value.to_string());
                        let expected = "a positive number, as `rope_type` is `llama3`".to_owned();
                        problems.push(ConfigProblem { field, expected, found });
                        1.0
                    }
                };
                let factor = number("factor", self.factor);
                let low_freq_factor = number("low_freq_factor", self.low_freq_factor);
                let high_freq_factor = number("high_freq_factor", self.high_freq_factor);
                let length = self.original_max_position_embeddings.map(|length| length as f64);
                let length = number("original_max_position_embeddings", length);
                if high_freq_factor < low_freq_factor {
                    problems.push(ConfigProblem {
                        field: "high_freq_factor",
                        expected: format!("at least `low_freq_factor` ({low_freq_factor})"),
                        found: high_freq_factor.to_string(),
                    });
                }
                RopeScaling::Llama3 {
                    factor,
                    low_freq_factor,
                    high_freq_factor,
                    original_max_position_embeddings: length as usize,
                }
            }
            Some(other) => {
                problems.push(ConfigProblem {
                    field: "rope_type",
                    expected: "`default` or `llama3`".to_owned(),
                    found: format!("`{other}`"),
                });
                RopeScaling::Default
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(config: &str, generation: Option<&str>) -> Result<LlamaConfig, LlamaError> {
        let dir = tempfile::tempdir().unwrap();
        file::write(&dir.path().join(CONFIG_FILE), config).unwrap();
        if let Some(generation) = generation {
            file::write(&dir.path().join(GENERATION_CONFIG_FILE), generation).unwrap();
        }
        LlamaConfig::load(dir.path())
    }

    const LLAMA3: RopeScaling = RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };

    #[test]
    fn both_generations_of_rope_fields_are_read() {
        let llama3 = r#""factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192"#;
        let texts = [
            format!(
                r#"{{"model_type": "llama", "rope_parameters": {{"rope_theta": 5e5, "rope_type": "llama3", {llama3}}}}}"#
            ),
            format!(
                r#"{{"model_type": "llama", "rope_theta": 500000, "rope_scaling": {{"rope_type": "llama3", {llama3}}}}}"#
            ),
            format!(
                r#"{{"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {{"type": "llama3", {llama3}}}}}"#
            ),
        ];
        for text in texts {
            let config = read(&text, None).unwrap();
            assert_eq!(config.rope, RopeConfig { rope_theta: 5e5, scaling: LLAMA3 });
        }
        let plain =
            read(r#"{"model_type": "llama", "rope_theta": 7.0, "rope_scaling": null}"#, None).unwrap();
        assert_eq!(plain.rope, RopeConfig { rope_theta: 7.0, scaling: RopeScaling::Default });
    }

    #[test]
    fn absent_fields_have_the_defaults_of_transformers() {
        assert_eq!(read(r#"{"model_type": "llama"}"#, None).unwrap(), LlamaConfig::default());
        let text = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 96, "num_attention_heads": 6,
            "bos_token_id": null, "eos_token_id": null, "head_dim": null}"#;
        let config = read(text, None).unwrap();
        assert_eq!((config.head_dim, config.num_key_value_heads), (16, 6));
        assert_eq!((config.bos_token_id, config.eos_token_ids.as_slice()), (None, [].as_slice()));
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
    fn everything_unsupported_is_named_in_one_error() {
        let text = r#"{"model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_act": "gelu",
            "pretraining_tp": 2, "attention_dropout": 0.1, "rope_scaling": {"type": "yarn", "factor": 2.0},
            "num_key_value_heads": 3, "quantization_config": {"quant_method": "gptq"}}"#;
        let text = read(text, None).unwrap_err().to_string();
        for part in [
            "`model_type`: expected `llama`, found `mistral`",
            "`architectures`: expected `LlamaForCausalLM`, found `MistralForCausalLM`",
            "`hidden_act`: expected `silu`, found `gelu`",
            "`pretraining_tp`: expected 1, found 2",
            "`attention_dropout`: expected 0, found 0.1",
            "`rope_type`: expected `default` or `llama3`, found `yarn`",
            "`num_key_value_heads`: expected a divisor of `num_attention_heads` (32), found 3",
            "`quantization_config`: expected weights in f32, f16 or bf16, found method `gptq`",
            "config.json",
        ] {
            assert!(text.contains(part), "{part} is not in:\n{text}");
        }
    }

    #[test]
    fn incomplete_or_senseless_files_are_errors() {
        assert!(
            read("{}", None).unwrap_err().to_string().contains("`model_type`: expected `llama`, found none")
        );
        let text = r#"{"model_type": "llama", "rope_parameters": {"rope_type": "llama3", "factor": 0}}"#;
        let text = read(text, None).unwrap_err().to_string();
        assert!(text.contains("`factor`") && text.contains("`original_max_position_embeddings`"), "{text}");
        let zero = read(r#"{"model_type": "llama", "num_attention_heads": 0, "rms_norm_eps": 0}"#, None);
        let text = zero.unwrap_err().to_string();
        assert!(text.contains("`num_attention_heads`: expected a positive number, found 0"), "{text}");
        assert!(text.contains("`rms_norm_eps`"), "{text}");
        assert!(matches!(read(r#"{"vocab_size": -1}"#, None), Err(LlamaError::ConfigJson { .. })));
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(LlamaConfig::load(dir.path()), Err(LlamaError::ReadText { .. })));
    }

    #[test]
    fn what_is_written_reads_back() {
        let mut config = LlamaConfig::new(99, 128, 3).with_heads(4, 2).with_intermediate_size(200);
        config.rope = RopeConfig { rope_theta: 5e5, scaling: LLAMA3 };
        config = LlamaConfig {
            max_position_embeddings: 77,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: true,
            attention_bias: true,
            mlp_bias: true,
            bos_token_id: None,
            eos_token_ids: vec![4, 5],
            pad_token_id: Some(6),
            initializer_range: 0.5,
            ..config
        };
        let text = config.to_json("bfloat16").to_string();
        assert!(text.contains(r#""dtype":"bfloat16""#));
        assert_eq!(read(&text, None).unwrap(), config);
        config.eos_token_ids = vec![];
        assert_eq!(read(&config.to_json("float32").to_string(), None).unwrap(), config);
    }
}
