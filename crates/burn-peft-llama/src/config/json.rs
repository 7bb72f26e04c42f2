//! The configuration files of a model directory as they are written.

use serde_json::{Map, Value, json};

use super::fields::Fields;
use super::rope::RopeJson;
use super::{LlamaConfig, rope};
use crate::family::{Bias, FAMILIES, Family};
use crate::problem::{ConfigProblem, alternatives};
use crate::rope::RopeConfig;

/// Adds the tokens of `generation_config.json`.
pub(super) fn add_tokens(config: &mut LlamaConfig, json: &Map<String, Value>) -> Vec<ConfigProblem> {
    let mut fields = Fields::new(json);
    for id in fields.tokens("eos_token_id", &[]) {
        if !config.eos_token_ids.contains(&id) {
            config.eos_token_ids.push(id);
        }
    }
    // The arguments are read, and their problems found, whether they are needed or not.
    config.bos_token_id = config.bos_token_id.or(fields.token("bos_token_id", None));
    config.pad_token_id = config.pad_token_id.or(fields.token("pad_token_id", None));
    fields.problems
}

/// Reads `config.json`, the fields of both generations.
pub(super) fn read(json: &Map<String, Value>) -> (LlamaConfig, Vec<ConfigProblem>) {
    let mut fields = Fields::new(json);
    let family = family(&mut fields);
    refuse_unsupported(&mut fields, family);
    let default = LlamaConfig::of(family);
    let hidden_size = fields.or("hidden_size", default.hidden_size, Fields::size);
    let num_attention_heads = fields.or("num_attention_heads", default.num_attention_heads, Fields::size);
    let per_head = hidden_size.checked_div(num_attention_heads).unwrap_or(0);
    let scaling = fields.object("rope_scaling").map(|json| RopeJson::read(json, &mut fields.problems));
    let parameters = fields.object("rope_parameters").map(|json| RopeJson::read(json, &mut fields.problems));
    let rope_json = RopeJson::of(scaling, parameters);
    let rope_theta = rope_json.rope_theta.or(fields.number("rope_theta")).unwrap_or(default.rope.rope_theta);
    // Written as `null` it is the number of query heads in every family.
    let key_value_heads = family.defaults.num_key_value_heads.filter(|_| !fields.has("num_key_value_heads"));
    let config = LlamaConfig {
        family,
        vocab_size: fields.or("vocab_size", default.vocab_size, Fields::size),
        hidden_size,
        intermediate_size: fields.or("intermediate_size", default.intermediate_size, Fields::size),
        num_hidden_layers: fields.or("num_hidden_layers", default.num_hidden_layers, Fields::size),
        num_attention_heads,
        num_key_value_heads: fields
            .size("num_key_value_heads")
            .or(key_value_heads)
            .unwrap_or(num_attention_heads),
        head_dim: fields.size("head_dim").unwrap_or(per_head),
        max_position_embeddings: fields.or(
            "max_position_embeddings",
            default.max_position_embeddings,
            Fields::size,
        ),
        rms_norm_eps: fields.or("rms_norm_eps", default.rms_norm_eps, Fields::number),
        rope: RopeConfig::new(rope_theta).with_scaling(rope_json.scaling(&mut fields.problems)),
        tie_word_embeddings: fields.or("tie_word_embeddings", default.tie_word_embeddings, Fields::flag),
        attention_bias: fields.or("attention_bias", default.attention_bias, Fields::flag),
        mlp_bias: fields.or("mlp_bias", default.mlp_bias, Fields::flag),
        // An absent field differs from `null`.
        bos_token_id: fields.token("bos_token_id", default.bos_token_id),
        eos_token_ids: fields.tokens("eos_token_id", &default.eos_token_ids),
        pad_token_id: fields.token("pad_token_id", default.pad_token_id),
        initializer_range: fields.or("initializer_range", default.initializer_range, Fields::number),
    };
    (config, fields.problems)
}

/// The family that a file names, and the default if it names none that is known.
fn family(fields: &mut Fields<'_>) -> &'static Family {
    let (model_type, architectures) = (fields.text("model_type"), fields.texts("architectures"));
    let named = model_type.and_then(Family::named);
    let is_unknown = match model_type {
        Some(_) => named.is_none(),
        // A field that is no text is a problem already.
        None => fields.any("model_type").is_none() && fields.any("architectures").is_none(),
    };
    if is_unknown {
        let known = alternatives(FAMILIES.iter().map(|family| family.model_type));
        let found = model_type.map_or("none".to_string(), |model_type| format!("`{model_type}`"));
        fields.problem("model_type", known, found);
    }
    let default = named.unwrap_or(Family::DEFAULT);
    let Some(architectures) = architectures else { return default };
    let is_possible = |family: &&&Family| named.is_none_or(|named| named == **family);
    let possible = FAMILIES.iter().filter(is_possible).copied();
    possible.clone().find(|family| architectures.contains(&family.architecture)).unwrap_or_else(|| {
        let known = alternatives(possible.map(|family| family.architecture));
        fields.problem("architectures", known, format!("`{}`", architectures.join("`, `")));
        default
    })
}

/// Entries like those of [`Family::fixed`] that no family writes.
const FIXED: &[(&str, &[&str])] = &[("partial_rotary_factor", &["1"]), ("rope_interleaved", &["false"])];

/// Names the fields that ask for something this crate does not do.
fn refuse_unsupported(fields: &mut Fields<'_>, family: &Family) {
    for (field, allowed) in family.fixed.iter().chain(FIXED) {
        if *allowed == ["null"] && !fields.has(field) {
            fields.problem(field, "null", "no such field");
        }
        let Some(found) = fields.any(field) else { continue };
        let allowed: Vec<Value> = allowed.iter().map(|json| parsed(json)).collect();
        let is_equal =
            |value: &Value| value == found || (value.is_number() && value.as_f64() == found.as_f64());
        if !allowed.iter().any(is_equal) {
            fields.problem(field, shown(&allowed[0]), shown(found));
        }
    }
    if fields.texts("layer_types").is_some_and(|types| types.iter().any(|kind| *kind != "full_attention")) {
        fields.problem("layer_types", "`full_attention` in every layer", "another one");
    }
    if let Some(quantization) = fields.any("quantization_config") {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("an unnamed one");
        fields.problem("quantization_config", "weights in f32, f16 or bf16", format!("method `{method}`"));
    }
}

/// JSON that stands in the code.
fn parsed(json: &str) -> Value {
    serde_json::from_str(json).unwrap_or_default()
}

/// A value as messages have it.
fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => format!("`{text}`"),
        other => other.as_f64().map_or_else(|| other.to_string(), |number| number.to_string()),
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
        let mut json = json!({
            "architectures": [self.family.architecture],
            "bos_token_id": self.bos_token_id,
            "dtype": dtype,
            "eos_token_id": eos_token_id,
            "head_dim": self.head_dim,
            "hidden_size": self.hidden_size,
            "initializer_range": self.initializer_range,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": self.family.model_type,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "pad_token_id": self.pad_token_id,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": rope::to_json(&self.rope),
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_cache": true,
            "vocab_size": self.vocab_size,
        });
        for (field, allowed) in self.family.fixed {
            json[*field] = parsed(allowed[0]);
        }
        let Family { qkv_bias, o_bias, mlp_bias, .. } = self.family;
        if [qkv_bias, o_bias].contains(&&Bias::Configured) {
            json["attention_bias"] = json!(self.attention_bias);
        }
        if *mlp_bias == Bias::Configured {
            json["mlp_bias"] = json!(self.mlp_bias);
        }
        json.sort_all_objects();
        json
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::rope::tests::LLAMA3;
    use crate::config::tests::read;

    #[test]
    fn an_absent_number_of_key_heads_is_the_familys() {
        let heads = |json: &str| read(json, None).unwrap().num_key_value_heads;
        assert_eq!(heads(r#"{"model_type": "llama", "num_attention_heads": 64}"#), 64);
        assert_eq!(heads(r#"{"model_type": "qwen2", "num_attention_heads": 64}"#), 32);
        let null = r#"{"model_type": "qwen2", "num_attention_heads": 64, "num_key_value_heads": null}"#;
        assert_eq!(heads(null), 64);
    }

    #[test]
    fn a_field_that_must_be_null_must_be_there() {
        let family = Family { fixed: &[("sliding_window", &["null"])], ..*Family::DEFAULT };
        for (json, problems) in [
            (r#"{"sliding_window": null}"#, &[][..]),
            (r#"{"sliding_window": 4096}"#, &["`sliding_window`: expected null, found 4096"]),
            ("{}", &["`sliding_window`: expected null, found no such field"]),
        ] {
            let json: Map<String, Value> = serde_json::from_str(json).unwrap();
            let mut fields = Fields::new(&json);
            refuse_unsupported(&mut fields, &family);
            let found: Vec<String> = fields.problems.iter().map(ToString::to_string).collect();
            assert_eq!(found, problems);
        }
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
    fn every_field_of_a_wrong_type_is_named_with_what_was_found() {
        let text = r#"{"model_type": "llama", "vocab_size": "96", "hidden_size": null, "num_hidden_layers": 2.0,
            "rms_norm_eps": "1e-6", "tie_word_embeddings": 1, "eos_token_id": [2, null], "bos_token_id": 2.0,
            "pad_token_id": "0", "architectures": "LlamaForCausalLM", "rope_scaling": {"factor": "x"}}"#;
        let text = read(text, None).unwrap_err().to_string();
        for part in [
            "`vocab_size`: expected a whole number, found `\"96\"`",
            "`hidden_size`: expected a value, or no such field, found `null`",
            "`num_hidden_layers`: expected a whole number, found `2.0`",
            "`rms_norm_eps`: expected a number, found `\"1e-6\"`",
            "`tie_word_embeddings`: expected true or false, found `1`",
            "`eos_token_id`: expected a token id, a list of them, or null, found `[2,null]`",
            "`bos_token_id`: expected a token id or null, found `2.0`",
            "`pad_token_id`: expected a token id or null, found `\"0\"`",
            "`architectures`: expected a list of texts",
            "`factor`: expected a number, found `\"x\"`",
        ] {
            assert!(text.contains(part), "{part} is not in:\n{text}");
        }
        let text =
            read(r#"{"model_type": "llama"}"#, Some(r#"{"eos_token_id": "2"}"#)).unwrap_err().to_string();
        assert!(text.contains("generation_config.json") && text.contains("`eos_token_id`"), "{text}");
    }

    #[test]
    fn negative_tokens_are_none_as_in_old_files() {
        let text = r#"{"model_type": "llama", "pad_token_id": -1}"#;
        let config = read(text, Some(r#"{"pad_token_id": -1, "bos_token_id": -1}"#)).unwrap();
        assert_eq!((config.pad_token_id, config.bos_token_id), (None, Some(1)));
        let text =
            r#"{"model_type": "llama", "bos_token_id": -1, "eos_token_id": [2, -1], "pad_token_id": null}"#;
        let config = read(text, Some(r#"{"eos_token_id": -1, "pad_token_id": 3}"#)).unwrap();
        assert_eq!(
            (config.bos_token_id, config.eos_token_ids, config.pad_token_id),
            (None, vec![2], Some(3))
        );
        let config = read(r#"{"model_type": "llama", "eos_token_id": []}"#, None).unwrap();
        assert!(config.eos_token_ids.is_empty());
        // No row of the embedding belongs to it; transformers refuses to make such a model as well.
        let error = read(r#"{"model_type": "llama", "vocab_size": 9, "pad_token_id": 9}"#, None).unwrap_err();
        assert!(
            error.to_string().contains("`pad_token_id`: expected below `vocab_size` (9), found 9"),
            "{error}"
        );
    }

    #[test]
    fn everything_unsupported_is_named_in_one_error() {
        let text = r#"{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "hidden_act": "gelu",
            "pretraining_tp": 2, "attention_dropout": 0.1, "rope_scaling": {"type": "yarn", "factor": 2.0},
            "num_key_value_heads": 3, "quantization_config": {"quant_method": "gptq"}}"#;
        let text = read(text, None).unwrap_err().to_string();
        let known = |name: fn(&Family) -> &str| alternatives(FAMILIES.iter().map(|family| name(family)));
        assert!(known(|family| family.model_type).starts_with("`llama`"));
        for part in [
            &format!("`model_type`: expected {}, found `gpt2`", known(|family| family.model_type)),
            &format!(
                "`architectures`: expected {}, found `GPT2LMHeadModel`",
                known(|family| family.architecture)
            ),
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
    fn a_family_decides_about_biases_defaults_and_what_is_refused() {
        let config = read(r#"{"model_type": "qwen2", "attention_bias": true}"#, None).unwrap();
        assert_eq!(
            (config.vocab_size, config.intermediate_size, config.bos_token_id),
            (151_936, 22_016, None)
        );
        assert_eq!((config.has_qkv_bias(), config.has_o_bias(), config.has_mlp_bias()), (true, false, false));
        let by_class = read(r#"{"architectures": ["Qwen2ForCausalLM"]}"#, None).unwrap();
        assert_eq!(by_class.model_type(), "qwen2");
        let text = r#"{"model_type": "qwen2", "architectures": ["LlamaForCausalLM"], "use_sliding_window": true,
            "layer_types": ["full_attention", "sliding_attention"]}"#;
        let text = read(text, None).unwrap_err().to_string();
        for part in [
            "`architectures`: expected `Qwen2ForCausalLM`, found `LlamaForCausalLM`",
            "`use_sliding_window`: expected false, found true",
            "`layer_types`: expected `full_attention` in every layer",
        ] {
            assert!(text.contains(part), "{part} is not in:\n{text}");
        }
        let text = LlamaConfig::default().with_model_type("gpt2").unwrap_err().to_string();
        assert!(text.starts_with("unknown model type `gpt2`, expected `llama`"), "{text}");
    }

    #[test]
    fn a_file_of_a_family_has_the_entries_of_that_family() {
        let config = LlamaConfig::new(99, 128, 3).with_model_type("qwen2").unwrap();
        let json = config.to_json("float32");
        assert_eq!((&json["model_type"], &json["use_sliding_window"]), (&json!("qwen2"), &json!(false)));
        assert_eq!(json["architectures"], json!(["Qwen2ForCausalLM"]));
        assert!(json.get("attention_bias").is_none() && json.get("pretraining_tp").is_none());
        assert_eq!(read(&json.to_string(), None).unwrap(), config);
        let llama = LlamaConfig::default().to_json("float32");
        assert_eq!((&llama["pretraining_tp"], &llama["attention_dropout"]), (&json!(1), &json!(0.0)));
        assert_eq!((&llama["hidden_act"], &llama["mlp_bias"]), (&json!("silu"), &json!(false)));
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
