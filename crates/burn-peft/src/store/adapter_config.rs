//! `adapter_config.json`: PEFT's `LoraConfig` on disk.

use std::path::Path;

use burn_peft_files::WrongFile;
use serde_json::{Map, Value, json};

use super::files::{MLX_HINT, unreadable};
use crate::error::{ConfigProblem, PeftError};
use crate::lora::{Bias, ENSURE_WEIGHT_TYING, INIT_LORA_WEIGHTS, InitLoraWeights, LoraConfig};
use crate::target::{ALL_LINEAR, TargetModules};

/// The version of PEFT whose format is written.
const PEFT_VERSION: &str = "0.21.2";

/// What can be done about a configuration that asks for something else than LoRA as it is computed here.
const UNSUPPORTED_HINT: &str =
    "merge the adapter in Python and load the merged model, or train one without this setting";

/// Keys that PEFT writes and that this version supports at their neutral value only: `null`, `false`, or empty.
const NEUTRAL_ONLY: &[&str] = &[
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
];

/// Keys that have no effect on what a trained adapter computes; their values are written back as they were read. Those
/// that end with `_config` belong to a start of the factors, which is refused by its own name where it matters.
/// `ensure_weight_tying` has an effect on tied weights alone, so it is judged when the adapter meets a model.
const KEPT: &[&str] = &[
    "auto_mapping",
    "corda_config",
    ENSURE_WEIGHT_TYING,
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "qalora_group_size",
    "revision",
];

/// Words of [`INIT_LORA_WEIGHTS`] that choose factors and leave the base as it is: once trained, the adapter is like any other.
const FACTOR_STARTS: &[&str] = &["eva", "loftq", "mica", "orthogonal"];

/// What can be done about an adapter whose start took a part out of the base.
const CHANGED_BASE_HINT: &str = "its training changed the base model as well; convert it in PEFT when it is saved, with `path_initial_model_for_weight_conversion`, or merge it there and load the merged model";

/// What can be done about a key that PEFT does not have either.
const UNKNOWN_HINT: &str =
    "PEFT 0.21 has no such key; if the adapter works without it, delete the entry from the file";

/// Keys whose values PEFT writes by rules of its own, whatever it read.
const REWRITTEN: &[&str] = &["inference_mode", "peft_version", "runtime_config"];

/// PEFT's JSON for `config`: every key that PEFT writes, sorted, indented by 2.
pub(super) fn to_json(config: &LoraConfig, path: &Path) -> Result<Vec<u8>, PeftError> {
    let mut map: Map<String, Value> = NEUTRAL_ONLY.iter().map(|key| (key.to_string(), Value::Null)).collect();
    for key in ["use_dora", "use_qalora"] {
        map.insert(key.into(), json!(false));
    }
    let names_or_null = |names: &[String]| if names.is_empty() { Value::Null } else { json!(names) };
    let entries = [
        ("alpha_pattern", patterns_to_json(&config.alpha_pattern, |alpha| number(*alpha))),
        ("base_model_name_or_path", json!(config.base_model_name_or_path)),
        (
            "bias",
            json!(match config.bias {
                Bias::None => "none",
                Bias::All => "all",
                Bias::LoraOnly => "lora_only",
            }),
        ),
        ("exclude_modules", targets_to_json(config.exclude_modules.as_ref())),
        ("fan_in_fan_out", json!(config.fan_in_fan_out)),
        ("inference_mode", json!(true)),
        (
            INIT_LORA_WEIGHTS,
            match config.init_lora_weights {
                InitLoraWeights::KaimingUniform => json!(true),
                InitLoraWeights::Gaussian => json!("gaussian"),
                InitLoraWeights::Random => json!(false),
            },
        ),
        ("layers_pattern", names_or_null(&config.layers_pattern)),
        ("layers_to_transform", json!(config.layers_to_transform)),
        ("lora_alpha", number(config.lora_alpha)),
        ("lora_bias", json!(config.lora_bias)),
        ("lora_dropout", json!(config.lora_dropout)),
        ("modules_to_save", names_or_null(&config.modules_to_save)),
        ("peft_type", json!("LORA")),
        ("peft_version", json!(PEFT_VERSION)),
        ("r", json!(config.r)),
        ("rank_pattern", patterns_to_json(&config.rank_pattern, |r| json!(r))),
        ("target_modules", targets_to_json(config.target_modules.as_ref())),
        ("task_type", json!(config.task_type)),
        ("use_rslora", json!(config.use_rslora)),
    ];
    map.extend(entries.into_iter().map(|(key, value)| (key.to_string(), value)));
    map.extend(KEPT.iter().map(|key| (key.to_string(), kept_default(key))));
    let counts = |key: &str| key != INIT_LORA_WEIGHTS || config.init_in_file().is_some();
    map.extend(config.kept.clone().into_iter().filter(|(key, _)| counts(key)));
    map.sort_keys();
    serde_json::to_vec_pretty(&map).map_err(|source| PeftError::Json { path: path.into(), source })
}

/// What a configuration file says.
pub(super) struct Parsed {
    /// The entries that were understood; defaults for all others.
    pub(super) config: LoraConfig,
    /// Entries that were not understood and ask for nothing.
    pub(super) ignored: Vec<(String, Value)>,
    /// Entries that cannot be used.
    pub(super) problems: Vec<ConfigProblem>,
    /// The version of PEFT that wrote it.
    pub(super) peft_version: Option<String>,
}

/// Reads a JSON text as far as it goes.
///
/// # Errors
/// [`PeftError::Json`], [`PeftError::NotTheFile`], [`PeftError::NoAdapter`] for a file of another program.
pub(super) fn parse(text: &[u8], path: &Path) -> Result<Parsed, PeftError> {
    let map: Map<String, Value> = serde_json::from_slice(text)
        .map_err(|source| unreadable(path, text, PeftError::Json { path: path.into(), source }))?;
    if let Some(error) = other_format(&map, path) {
        return Err(error);
    }
    let mut config = LoraConfig::default();
    let (mut ignored, mut problems) = (vec![], vec![]);
    for (key, value) in &map {
        match read_field(&mut config, key, value) {
            Ok(Field::Understood) => {}
            Ok(Field::Ignored) => ignored.push((key.clone(), value.clone())),
            Err(hint) => {
                problems.push(ConfigProblem { field: key.clone(), found: value.to_string(), hint });
            }
        }
    }
    // The other entries of another kind of adapter mean nothing here.
    if let Some(at) = problems.iter().position(|problem| problem.field == "peft_type") {
        problems = vec![problems.swap_remove(at)];
    }
    let peft_version = map.get("peft_version").and_then(Value::as_str).map(str::to_string);
    Ok(Parsed { config, ignored, problems, peft_version })
}

/// The configuration in a JSON text, and the keys in it that were not understood and ask for nothing.
///
/// # Errors
/// [`PeftError::Json`], [`PeftError::UnsupportedConfig`] with every problem.
pub(super) fn from_json(text: &[u8], path: &Path) -> Result<(LoraConfig, Vec<String>), PeftError> {
    let Parsed { config, ignored, problems, .. } = parse(text, path)?;
    if !problems.is_empty() {
        return Err(PeftError::UnsupportedConfig { path: path.into(), problems });
    }
    Ok((config, ignored.into_iter().map(|(key, _)| key).collect()))
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

/// What PEFT writes for a key of [`KEPT`] that nobody set.
fn kept_default(key: &str) -> Value {
    match key {
        ENSURE_WEIGHT_TYING => json!(false),
        "loftq_config" => json!({}),
        "megatron_core" => json!("megatron.core"),
        "qalora_group_size" => json!(16),
        _ => Value::Null,
    }
}

/// What became of an entry.
enum Field {
    Understood,
    Ignored,
}

/// Puts one entry into `config`, or tells what is wrong with it.
fn read_field(config: &mut LoraConfig, key: &str, value: &Value) -> Result<Field, &'static str> {
    const WRONG_TYPE: &str = "the value has the wrong type for this key";
    let wrong = || WRONG_TYPE;
    let index = |value: &Value| value.as_u64().and_then(|number| usize::try_from(number).ok());
    match key {
        "peft_type" if value == "LORA" => {}
        "peft_type" => {
            return Err(
                "only adapters of type LORA can be loaded; merge this one in PEFT and load the merged model",
            );
        }
        kept if KEPT.contains(&kept) => {
            if *value != kept_default(kept) {
                config.kept.insert(key.to_string(), value.clone());
            }
        }
        rewritten if REWRITTEN.contains(&rewritten) => {}
        // Absent and null are one: the default.
        known if value.is_null() => {
            return Ok(if is_known(known) { Field::Understood } else { Field::Ignored });
        }
        "r" => config.r = index(value).ok_or_else(wrong)?,
        "lora_alpha" => config.lora_alpha = value.as_f64().ok_or_else(wrong)?,
        "lora_dropout" => config.lora_dropout = value.as_f64().ok_or_else(wrong)?,
        "use_rslora" => config.use_rslora = value.as_bool().ok_or_else(wrong)?,
        "lora_bias" => config.lora_bias = value.as_bool().ok_or_else(wrong)?,
        "fan_in_fan_out" => config.fan_in_fan_out = value.as_bool().ok_or_else(wrong)?,
        "rank_pattern" => config.rank_pattern = patterns_from_json(value, index).ok_or_else(wrong)?,
        "alpha_pattern" => {
            config.alpha_pattern = patterns_from_json(value, Value::as_f64).ok_or_else(wrong)?
        }
        "layers_to_transform" => {
            let layers = match value {
                Value::Array(layers) => layers.iter().map(index).collect(),
                layer => index(layer).map(|layer| vec![layer]),
            };
            config.layers_to_transform = Some(layers.ok_or_else(wrong)?);
        }
        "layers_pattern" => config.layers_pattern = names_from_json(value).ok_or_else(wrong)?,
        "modules_to_save" => config.modules_to_save = names_from_json(value).ok_or_else(wrong)?,
        "target_modules" => config.target_modules = Some(targets_from_json(value).ok_or_else(wrong)?),
        "exclude_modules" => {
            config.exclude_modules = Some(targets_from_json(value).ok_or_else(wrong)?)
                .filter(|targets| *targets != TargetModules::Names(Default::default()));
        }
        "base_model_name_or_path" => {
            config.base_model_name_or_path = Some(value.as_str().ok_or_else(wrong)?.to_string());
        }
        "task_type" => config.task_type = Some(value.as_str().ok_or_else(wrong)?.to_string()),
        "bias" => {
            config.bias = match value.as_str() {
                Some("none") => Bias::None,
                Some("all") => Bias::All,
                Some("lora_only") => Bias::LoraOnly,
                _ => return Err("expected \"none\", \"all\" or \"lora_only\""),
            }
        }
        INIT_LORA_WEIGHTS => match value {
            Value::Bool(true) => config.init_lora_weights = InitLoraWeights::KaimingUniform,
            Value::Bool(false) => config.init_lora_weights = InitLoraWeights::Random,
            Value::String(word) if word.eq_ignore_ascii_case("gaussian") => {
                config.init_lora_weights = InitLoraWeights::Gaussian
            }
            Value::String(word) if FACTOR_STARTS.contains(&word.as_str()) => {
                config.kept.insert(key.to_string(), value.clone());
            }
            Value::String(word) if changes_base(word) => return Err(CHANGED_BASE_HINT),
            _ => return Err("PEFT has no such start; after training it does not matter, `true` will do"),
        },
        known if is_neutral(value) => {
            return Ok(if is_known(known) { Field::Understood } else { Field::Ignored });
        }
        known if is_known(known) => return Err(UNSUPPORTED_HINT),
        _ => return Err(UNKNOWN_HINT),
    }
    Ok(Field::Understood)
}

/// Whether a start takes a part out of the base.
fn changes_base(start: &str) -> bool {
    ["corda", "lora_ga", "olora", "pissa"].contains(&start) || start.starts_with("pissa_niter_")
}

/// Whether PEFT has a key of this name that is read here, at its neutral value at least.
fn is_known(key: &str) -> bool {
    const READ: &[&str] = &[
        "alpha_pattern",
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
        "fan_in_fan_out",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "modules_to_save",
        "r",
        "rank_pattern",
        "target_modules",
        "task_type",
        "use_rslora",
    ];
    READ.contains(&key) || NEUTRAL_ONLY.contains(&key)
}

fn patterns_to_json<T>(patterns: &[(String, T)], value: impl Fn(&T) -> Value) -> Value {
    // A repeated pattern never counts after its first mention.
    let mut map = Map::new();
    for (pattern, own) in patterns {
        map.entry(pattern.clone()).or_insert_with(|| value(own));
    }
    map.sort_keys();
    Value::Object(map)
}

fn patterns_from_json<T>(value: &Value, read: impl Fn(&Value) -> Option<T>) -> Option<Vec<(String, T)>> {
    let patterns = value.as_object()?;
    patterns.iter().map(|(pattern, value)| Some((pattern.clone(), read(value)?))).collect()
}

/// A list of names, or a single one.
fn names_from_json(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::String(name) if name.is_empty() => Some(vec![]),
        Value::String(name) => Some(vec![name.clone()]),
        Value::Array(names) => names.iter().map(|name| Some(name.as_str()?.to_string())).collect(),
        _ => None,
    }
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

fn targets_from_json(value: &Value) -> Option<TargetModules> {
    match value {
        Value::String(text) if text.eq_ignore_ascii_case(ALL_LINEAR) => Some(TargetModules::AllLinear),
        Value::String(pattern) => Some(TargetModules::Regex(pattern.clone())),
        Value::Array(names) => {
            let names: Option<Vec<&str>> = names.iter().map(Value::as_str).collect();
            Some(names?.into_iter().collect())
        }
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
        let text = br#"{"peft_type": "LORA", "r": "8", "bias": "some", "use_dora": true, "brand_new": [1]}"#;
        let error = from_json(text, Path::new("dir/adapter_config.json")).unwrap_err();
        let PeftError::UnsupportedConfig { problems, .. } = &error else { panic!("{error}") };
        let fields: Vec<&str> = problems.iter().map(|problem| &*problem.field).collect();
        assert_eq!(fields, ["r", "bias", "use_dora", "brand_new"]);
        assert!(error.to_string().starts_with("cannot use the configuration in `dir/adapter_config.json`:"));
    }
}
