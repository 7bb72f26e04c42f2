//! `adapter_config.json`: PEFT's `LoraConfig` on disk.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::error::PeftError;
use crate::lora::{Bias, InitLoraWeights, LoraConfig};
use crate::target::{ALL_LINEAR, TargetModules};

/// The version of PEFT whose format is written.
const PEFT_VERSION: &str = "0.21.2";

/// What can be done about a configuration that asks for something else than LoRA as it is computed here.
const UNSUPPORTED_HINT: &str =
    "merge the adapter in Python and load the merged model, or train one without this setting";

/// Keys that PEFT writes and that this version supports at their neutral value only: `null`, `false`, or empty.
const NEUTRAL_ONLY: &[&str] = &[
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_bias",
    "lora_ga_config",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
];

/// Keys that have no effect on what an adapter computes.
const WITHOUT_EFFECT: &[&str] = &[
    "auto_mapping",
    "inference_mode",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
];

/// PEFT's JSON for `config`: every key that PEFT writes, sorted, indented by 2.
pub(super) fn to_json(config: &LoraConfig, path: &Path) -> Result<Vec<u8>, PeftError> {
    let mut map: Map<String, Value> = NEUTRAL_ONLY.iter().map(|key| (key.to_string(), Value::Null)).collect();
    for key in ["ensure_weight_tying", "fan_in_fan_out", "lora_bias", "use_dora", "use_qalora"] {
        map.insert(key.into(), json!(false));
    }
    for key in ["alpha_pattern", "loftq_config", "rank_pattern"] {
        map.insert(key.into(), json!({}));
    }
    let entries = [
        ("auto_mapping", Value::Null),
        ("base_model_name_or_path", json!(config.base_model_name_or_path)),
        (
            "bias",
            json!(match config.bias {
                Bias::None => "none",
            }),
        ),
        ("exclude_modules", targets_to_json(config.exclude_modules.as_ref())),
        ("inference_mode", json!(true)),
        (
            "init_lora_weights",
            match config.init_lora_weights {
                InitLoraWeights::KaimingUniform => json!(true),
                InitLoraWeights::Gaussian => json!("gaussian"),
                InitLoraWeights::Random => json!(false),
            },
        ),
        ("lora_alpha", number(config.lora_alpha)),
        ("lora_dropout", json!(config.lora_dropout)),
        ("megatron_config", Value::Null),
        ("megatron_core", json!("megatron.core")),
        ("peft_type", json!("LORA")),
        ("peft_version", json!(PEFT_VERSION)),
        ("qalora_group_size", json!(16)),
        ("r", json!(config.r)),
        ("revision", Value::Null),
        ("target_modules", targets_to_json(config.target_modules.as_ref())),
        ("task_type", json!(config.task_type)),
        ("use_rslora", json!(config.use_rslora)),
    ];
    map.extend(entries.into_iter().map(|(key, value)| (key.to_string(), value)));
    map.sort_keys();
    serde_json::to_vec_pretty(&map).map_err(|source| PeftError::Json { path: path.into(), source })
}

/// The configuration in a JSON text, and the keys in it that were not understood and ask for nothing.
pub(super) fn from_json(text: &[u8], path: &Path) -> Result<(LoraConfig, Vec<String>), PeftError> {
    let map: Map<String, Value> =
        serde_json::from_slice(text).map_err(|source| PeftError::Json { path: path.into(), source })?;
    let mut config = LoraConfig::default();
    let mut ignored = Vec::new();
    for (key, value) in &map {
        let unsupported =
            |hint| PeftError::UnsupportedConfig { field: key.clone(), found: value.to_string(), hint };
        let wrong = || unsupported("the value has the wrong type for this key");
        match key.as_str() {
            "peft_type" if value == "LORA" => {}
            "peft_type" => return Err(unsupported("only adapters of type LORA can be loaded")),
            "r" => config.r = value.as_u64().and_then(|r| usize::try_from(r).ok()).ok_or_else(wrong)?,
            "lora_alpha" => config.lora_alpha = value.as_f64().ok_or_else(wrong)?,
            "lora_dropout" => config.lora_dropout = value.as_f64().ok_or_else(wrong)?,
            "use_rslora" => config.use_rslora = value.as_bool().ok_or_else(wrong)?,
            "target_modules" => config.target_modules = targets_from_json(value).ok_or_else(wrong)?,
            "exclude_modules" => config.exclude_modules = targets_from_json(value).ok_or_else(wrong)?,
            "base_model_name_or_path" => {
                config.base_model_name_or_path = text_or_null(value).ok_or_else(wrong)?
            }
            "task_type" => config.task_type = text_or_null(value).ok_or_else(wrong)?,
            "bias" if value == "none" => config.bias = Bias::None,
            "init_lora_weights" => {
                config.init_lora_weights = match value {
                    Value::Bool(true) => InitLoraWeights::KaimingUniform,
                    Value::Bool(false) => InitLoraWeights::Random,
                    Value::String(name) if name == "gaussian" => InitLoraWeights::Gaussian,
                    _ => return Err(unsupported(UNSUPPORTED_HINT)),
                }
            }
            known if WITHOUT_EFFECT.contains(&known) => {}
            known if is_neutral(value) => {
                if !NEUTRAL_ONLY.contains(&known) {
                    ignored.push(key.clone());
                }
            }
            _ => return Err(unsupported(UNSUPPORTED_HINT)),
        }
    }
    Ok((config, ignored))
}

/// Whether a value asks for nothing.
fn is_neutral(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
        _ => false,
    }
}

/// Whole numbers are written as PEFT's users write them, `16` and not `16.0`.
fn number(value: f64) -> Value {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    if value.fract() == 0.0 && value.abs() < EXACT { json!(value as i64) } else { json!(value) }
}

fn targets_to_json(targets: Option<&TargetModules>) -> Value {
    match targets {
        None => Value::Null,
        Some(TargetModules::Names(names)) => json!(names),
        Some(TargetModules::Regex(pattern)) => json!(pattern),
        Some(TargetModules::AllLinear) => json!(ALL_LINEAR),
    }
}

fn targets_from_json(value: &Value) -> Option<Option<TargetModules>> {
    match value {
        Value::Null => Some(None),
        Value::String(text) if text.eq_ignore_ascii_case(ALL_LINEAR) => Some(Some(TargetModules::AllLinear)),
        Value::String(pattern) => Some(Some(TargetModules::Regex(pattern.clone()))),
        Value::Array(names) => {
            let names: Option<Vec<&str>> = names.iter().map(Value::as_str).collect();
            Some(Some(names?.into_iter().collect()))
        }
        _ => None,
    }
}

fn text_or_null(value: &Value) -> Option<Option<String>> {
    match value {
        Value::Null => Some(None),
        Value::String(text) => Some(Some(text.clone())),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_are_those_that_peft_writes_in_order() {
        let config = LoraConfig::new(8).with_lora_alpha(16.0).with_target_modules(["v_proj", "q_proj"]);
        let json = String::from_utf8(to_json(&config, Path::new("x")).unwrap()).unwrap();
        let map: Map<String, Value> = serde_json::from_str(&json).unwrap();
        let keys: Vec<&String> = map.keys().collect();
        assert_eq!(keys.len(), 41);
        assert!(keys.is_sorted());
        assert_eq!(map["lora_alpha"].to_string(), "16");
        assert_eq!(map["target_modules"], json!(["q_proj", "v_proj"]));
    }

    #[test]
    fn a_configuration_survives_its_file() {
        let path = Path::new("x");
        for config in [
            LoraConfig::new(3)
                .with_lora_alpha(0.5)
                .with_lora_dropout(0.05)
                .with_use_rslora(true)
                .with_init_lora_weights(InitLoraWeights::Gaussian)
                .with_task_type("CAUSAL_LM")
                .with_base_model_name_or_path("owner/name")
                .with_target_modules(TargetModules::Regex(".*q".into()))
                .with_exclude_modules(["x"]),
            LoraConfig::new(2).with_target_modules(TargetModules::AllLinear),
        ] {
            let json = to_json(&config, path).unwrap();
            assert_eq!(from_json(&json, path).unwrap(), (config, vec![]));
        }
    }
}
