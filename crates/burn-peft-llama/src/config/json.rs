//! The configuration files of a model directory as they are written.

use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    ConfigProblem, LlamaConfig,
    rope::{self, RopeJson},
};
use crate::RopeConfig;

/// A token id or a list of them.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum TokenIds {
    One(u32),
    Many(Vec<u32>),
}

impl TokenIds {
    pub(super) fn into_vec(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}

/// `config.json`; the fields of both generations.
#[derive(Deserialize)]
pub(super) struct Json {
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

/// The fields of `generation_config.json` that matter here.
#[derive(Deserialize, Default)]
pub(super) struct GenerationJson {
    pub(super) bos_token_id: Option<u32>,
    pub(super) eos_token_id: Option<TokenIds>,
    pub(super) pad_token_id: Option<u32>,
}

impl Json {
    pub(super) fn into_config(self) -> (LlamaConfig, Vec<ConfigProblem>) {
        let mut problems = self.unsupported();
        let default = LlamaConfig::default();
        let hidden_size = self.hidden_size.unwrap_or(default.hidden_size);
        let num_attention_heads = self.num_attention_heads.unwrap_or(default.num_attention_heads);
        let per_head = hidden_size.checked_div(num_attention_heads).unwrap_or(0);
        let rope_json = RopeJson::of(self.rope_scaling, self.rope_parameters);
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

impl LlamaConfig {
    /// The `config.json` that transformers 5 reads, for weights of type `dtype` (`float32`, `bfloat16`, ..).
    pub(crate) fn to_json(&self, dtype: &str) -> Value {
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
            "rope_parameters": rope::to_json(&self.rope),
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_cache": true,
            "vocab_size": self.vocab_size,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{rope::tests::LLAMA3, tests::read};

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
