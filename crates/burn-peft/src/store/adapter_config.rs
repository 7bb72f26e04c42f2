//! `adapter_config.json`.

use std::path::Path;

use burn_peft_files::WrongFile;
use serde_json::{Map, Value};

use super::files::{MLX_HINT, unreadable};
use crate::config::{Parsed, PeftConfig};
use crate::error::PeftError;

/// PEFT's JSON for `config`, indented by 2.
pub(super) fn to_json(config: &PeftConfig, path: &Path) -> Result<Vec<u8>, PeftError> {
    serde_json::to_vec_pretty(&config.to_map())
        .map_err(|source| PeftError::Json { path: path.into(), source })
}

/// The configuration in a JSON text, and the keys in it that were not understood and ask for nothing.
///
/// # Errors
/// [`PeftError::Json`], [`PeftError::NotTheFile`], [`PeftError::NoAdapter`] for a file of another program,
/// [`PeftError::UnsupportedConfig`] with every problem.
pub(super) fn from_json(text: &[u8], path: &Path) -> Result<(PeftConfig, Vec<String>), PeftError> {
    understood(parse(text, path)?, path)
}

/// The configuration, if it was understood, and the keys that were not and ask for nothing.
///
/// # Errors
/// [`PeftError::UnsupportedConfig`] with every problem.
pub(super) fn understood(parsed: Parsed, path: &Path) -> Result<(PeftConfig, Vec<String>), PeftError> {
    let Parsed { config, ignored, problems, .. } = parsed;
    if !problems.is_empty() {
        return Err(PeftError::UnsupportedConfig { path: path.into(), problems });
    }
    Ok((config, ignored.into_iter().map(|(key, _)| key).collect()))
}

/// Reads a JSON text as far as it goes.
///
/// # Errors
/// [`PeftError::Json`], [`PeftError::NotTheFile`], [`PeftError::NoAdapter`] for a file of another program.
pub(super) fn parse(text: &[u8], path: &Path) -> Result<Parsed, PeftError> {
    let map: Map<String, Value> = serde_json::from_slice(text)
        .map_err(|source| unreadable(path, text, PeftError::Json { path: path.into(), source }))?;
    match other_format(&map, path) {
        Some(error) => Err(error),
        None => Ok(PeftConfig::parse(&map)),
    }
}

/// The error about a file that another program wrote under the same name.
fn other_format(map: &Map<String, Value>, path: &Path) -> Option<PeftError> {
    if map.contains_key("peft_type") {
        return None;
    }
    let has = |keys: &[&str]| keys.iter().any(|key| map.contains_key(*key));
    let (reason, hint) = if has(&["lora_parameters", "fine_tune_type"]) {
        ("it is an adapter of mlx-lm, which has a format of its own", MLX_HINT)
    } else if has(&["error"]) {
        return Some(PeftError::NotTheFile { path: path.into(), found: WrongFile::ServerMessage });
    } else if has(&["model_type", "architectures"]) {
        ("its configuration is a whole model's", "give the directory that PEFT's `save_pretrained` wrote")
    } else if has(&["model_class", "adapter_class"]) {
        (
            "it is an adapter of AdapterHub, which has a format of its own",
            "train it with PEFT, or merge it there",
        )
    } else {
        return None;
    };
    let directory = path.parent().unwrap_or(path).into();
    Some(PeftError::NoAdapter { path: directory, reason: reason.into(), hint: hint.into() })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{Bias, InitLoraWeights, LoraConfig, TargetModules};

    #[test]
    fn the_keys_are_those_that_peft_writes_in_order() {
        let config = LoraConfig::new(8).with_lora_alpha(16.0).with_target_modules(["v_proj", "q_proj"]);
        let json = String::from_utf8(to_json(&config.into(), Path::new("x")).unwrap()).unwrap();
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
            LoraConfig::new(4)
                .with_target_modules(["q"])
                .with_rank_pattern([("a", 3), ("b", 2)])
                .with_alpha_pattern([("a", 0.5), ("b", 2.0)])
                .with_layers_to_transform([1, 0])
                .with_layers_pattern(["h"])
                .with_bias(Bias::LoraOnly)
                .with_modules_to_save(["norm", "lm_head"]),
            LoraConfig::new(4).with_target_modules(["q"]).with_lora_bias(true),
        ] {
            let config = PeftConfig::from(config);
            let json = to_json(&config, path).unwrap();
            assert_eq!(from_json(&json, path).unwrap(), (config, vec![]));
        }
    }

    #[test]
    fn what_has_no_effect_is_written_as_it_was_read() {
        let path = Path::new("x");
        let text =
            br#"{"peft_type": "LORA", "target_modules": ["q"], "revision": "v1", "qalora_group_size": 32,
            "auto_mapping": {"base_model_class": "Net", "parent_library": "lib"}, "megatron_core": "core",
            "fan_in_fan_out": true, "layers_to_transform": 3, "layers_pattern": "h", "use_rslora": null}"#;
        let (config, ignored) = from_json(text, path).unwrap();
        assert!(ignored.is_empty());
        let written: Map<String, Value> = serde_json::from_slice(&to_json(&config, path).unwrap()).unwrap();
        assert_eq!(written["revision"], "v1");
        assert_eq!(written["qalora_group_size"], 32);
        assert_eq!(written["auto_mapping"]["base_model_class"], "Net");
        assert_eq!(written["megatron_core"], "core");
        assert_eq!(written["fan_in_fan_out"], true);
        assert_eq!(written["layers_to_transform"], json!([3]));
        assert_eq!(written["layers_pattern"], json!(["h"]));
        assert_eq!(written["use_rslora"], false);
        assert_eq!(written.len(), 41);
    }

    #[test]
    fn every_problem_is_listed() {
        let text =
            br#"{"peft_type": "LORA", "r": "8", "bias": "some", "use_qalora": true, "brand_new": [1]}"#;
        let error = from_json(text, Path::new("dir/adapter_config.json")).unwrap_err();
        let PeftError::UnsupportedConfig { problems, .. } = &error else { panic!("{error}") };
        let fields: Vec<&str> = problems.iter().map(|problem| &*problem.field).collect();
        assert_eq!(fields, ["r", "bias", "use_qalora", "brand_new"]);
        assert!(error.to_string().starts_with("cannot use the configuration in `dir/adapter_config.json`:"));
    }
}
