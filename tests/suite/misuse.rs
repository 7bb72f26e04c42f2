//! What can be done wrong: every mistake has an error of its own, whose message says what to do, and changes nothing.
//!
//! The messages are in `snapshots/`. After a change, `INSTA_UPDATE=always cargo test misuse` writes them anew: read them
//! as somebody who has made the mistake.

use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;

use burn::module::{Lora, Module};
use burn::nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::tensor::Device;
use burn_peft::{
    Bias, CombinationType, DEFAULT_ADAPTER, InitLoraWeights, KeyMapping, LoraConfig, LoraEmbedding,
    LoraLinear, MajoritySign, PeftError, PeftModel, TargetModules,
};
use burn_peft_tests::parameters::parameters;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::load_base;

#[derive(Module, Debug)]
struct Layer {
    query: LoraLinear,
    value: Linear,
    free: LoraLinear,
    norm: LayerNorm,
}

/// Layers of every kind that mistakes are made with; `free` and `bare` have no bias.
#[derive(Module, Debug)]
struct Net {
    embed: LoraEmbedding,
    layers: Vec<Layer>,
    bare: Linear,
}

impl Net {
    fn new() -> Self {
        let device = Device::default();
        let layer = |_| Layer {
            query: LinearConfig::new(4, 4).init(&device).into(),
            value: LinearConfig::new(4, 4).init(&device),
            free: LinearConfig::new(4, 4).with_bias(false).init(&device).into(),
            norm: LayerNormConfig::new(4).init(&device),
        };
        Self {
            embed: burn::nn::EmbeddingConfig::new(7, 4).init(&device).into(),
            layers: (0..2).map(layer).collect(),
            bare: LinearConfig::new(4, 3).with_bias(false).init(&device),
        }
    }

    fn with(configs: &[(&str, LoraConfig)]) -> Self {
        let mut net = Self::new();
        for (name, config) in configs {
            net.add_adapter(name, config).unwrap();
        }
        net
    }

    fn merged() -> Self {
        let mut net = Self::with(&[("one", on(["query"])), ("two", on(["free"]))]);
        net.merge_adapter().unwrap();
        net
    }
}

fn on<const N: usize>(targets: [&str; N]) -> LoraConfig {
    LoraConfig::new(2).with_init_lora_weights(InitLoraWeights::Random).with_target_modules(targets)
}

/// A stored adapter of `query`, its configuration and its files changed.
fn stored(config: &[(&str, Value)], change: impl FnOnce(&Path)) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    Net::with(&[("x", on(["query"]))]).save_adapter("x", directory.path()).unwrap();
    let path = directory.path().join("adapter_config.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (key, value) in config {
        json[key] = value.clone();
    }
    std::fs::write(&path, json.to_string()).unwrap();
    change(directory.path());
    directory
}

/// The error of `operation`, which must leave `model` as it was.
fn refused<M: Module, T>(mut model: M, operation: impl FnOnce(&mut M) -> Result<T, PeftError>) -> PeftError {
    // By bits: NaNs do not equal themselves.
    let state = |model: &M| {
        let bits = parameters(model).into_iter().map(|(path, data)| (path, data.as_bytes().to_vec()));
        (bits.collect::<Vec<_>>(), model.adapters(), model.trainable_parameters())
    };
    let before = state(&model);
    let Err(error) = operation(&mut model) else { panic!("this was not refused") };
    assert_eq!(state(&model), before, "{error}");
    error
}

/// The message with its causes, below a title, temporary directories by a name that stays.
fn note(messages: &mut String, title: &str, error: &PeftError, directory: Option<&Path>) {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        write!(text, "\ncaused by: {error}").unwrap();
        cause = error.source();
    }
    if let Some(directory) = directory {
        text = text.replace(&directory.display().to_string(), "<directory>");
    }
    writeln!(messages, "# {title}\n{text}\n").unwrap();
}

/// Adds to `messages` what the model answers to the operation, an error of the variant.
macro_rules! misuse {
    ($messages:ident, $title:literal, $model:expr, $operation:expr, $variant:pat) => {
        let error = refused($model, $operation);
        assert!(matches!(error, $variant), "{}: {error:?}", $title);
        note(&mut $messages, $title, &error, None);
    };
}

#[test]
fn configurations() {
    use PeftError::*;
    let mut messages = String::new();
    macro_rules! refuse {
        ($title:literal, $config:expr, $variant:pat) => {
            misuse!(
                messages,
                $title,
                Net::new(),
                |net: &mut Net| net.add_adapter(DEFAULT_ADAPTER, &$config),
                $variant
            );
        };
    }
    let regex = |pattern: &str| TargetModules::Regex(pattern.to_string());
    let all_linear = || LoraConfig::new(2).with_target_modules(TargetModules::AllLinear);

    refuse!("rank 0", LoraConfig::new(0).with_target_modules(["query"]), InvalidConfig { field: "r", .. });
    refuse!("rank 0 in a pattern", on(["query"]).with_rank_pattern([("query", 0)]), InvalidConfig { .. });
    refuse!("alpha that is no number", on(["query"]).with_lora_alpha(f64::NAN), InvalidConfig { .. });
    refuse!(
        "infinite alpha in a pattern",
        on(["query"]).with_alpha_pattern([("query", f64::INFINITY)]),
        InvalidConfig { .. }
    );
    refuse!("dropout of everything", on(["query"]).with_lora_dropout(1.0), InvalidConfig { .. });
    refuse!("no targets", LoraConfig::new(2), InvalidConfig { field: "target_modules", .. });
    refuse!("an empty list of targets", on([]), InvalidConfig { field: "target_modules", .. });
    refuse!(
        "layers_pattern without layers_to_transform",
        on(["query"]).with_layers_pattern(["layers"]),
        InvalidConfig { .. }
    );
    refuse!(
        "layers_to_transform with a regular expression",
        LoraConfig::new(2).with_target_modules(regex(".*query")).with_layers_to_transform([0]),
        InvalidConfig { .. }
    );
    refuse!(
        "a target that is no regular expression",
        LoraConfig::new(2).with_target_modules(regex("(query")),
        InvalidPattern { .. }
    );
    refuse!(
        "a rank_pattern that is no regular expression",
        on(["query"]).with_rank_pattern([("[q", 3)]),
        InvalidPattern { .. }
    );

    refuse!("a misspelt target", on(["qeury"]), NoModuleMatched { .. });
    refuse!("a target of another architecture", on(["c_attn"]), NoModuleMatched { .. });
    refuse!("a target by its name in files", on(["attention.self.query"]), NoModuleMatched { .. });
    refuse!(
        "a regular expression of a part of the name",
        LoraConfig::new(2).with_target_modules(regex("query")),
        NoModuleMatched { .. }
    );
    refuse!(
        "layers that the model does not have",
        on(["query"]).with_layers_to_transform([7, 8]),
        NoModuleMatched { .. }
    );
    refuse!(
        "everything excluded",
        on(["query"]).with_exclude_modules(regex(".*")),
        AllModulesExcluded { .. }
    );
    refuse!("everything saved", on(["query"]).with_modules_to_save(["query"]), AllModulesExcluded { .. });
    refuse!(
        "everything excluded or saved",
        on(["query", "value"]).with_exclude_modules(["query"]).with_modules_to_save(["value"]),
        AllModulesExcluded { .. }
    );
    refuse!("a norm as a target", on(["norm", "query"]), UnsupportedModules { .. });
    refuse!("a whole layer as a target", on(["layers.0"]), UnsupportedModules { .. });
    refuse!(
        "modules to save that do not exist",
        on(["query"]).with_modules_to_save(["nrom"]),
        NoModuleToSave { .. }
    );
    refuse!(
        "a target that is also saved",
        on(["query", "bare"]).with_modules_to_save(["are"]),
        TargetAlsoSaved { .. }
    );
    refuse!(
        "lora_bias on an embedding",
        on(["embed", "query"]).with_lora_bias(true),
        LoraBiasUnsupported { .. }
    );
    refuse!(
        "lora_bias on a plain layer without a bias",
        on(["bare", "free"]).with_lora_bias(true),
        LoraBiasUnsupported { .. }
    );
    refuse!("dropout on plain layers", all_linear().with_lora_dropout(0.1), DropoutNeedsLoraLinear { .. });
    refuse!(
        "a key mapping that makes one name of two",
        on(["query"]).with_key_mapping(KeyMapping::new([(r"layers\.\d", "layer")])),
        AmbiguousKeyMapping { .. }
    );
    refuse!(
        "a key mapping that is no regular expression",
        on(["query"]).with_key_mapping(KeyMapping::new([("*", "")])),
        InvalidPattern { .. }
    );

    let tied = || load_base("gqa-tied", &Device::default());
    misuse!(
        messages,
        "a tied output layer as a target",
        tied(),
        |model| model.add_adapter(DEFAULT_ADAPTER, on(["q_proj", "lm_head"])),
        NoOutputLayer { .. }
    );
    misuse!(
        messages,
        "a tied output layer to be saved",
        tied(),
        |model| model.add_adapter(DEFAULT_ADAPTER, on(["q_proj"]).with_modules_to_save(["norm", "lm_head"])),
        NoOutputLayer { .. }
    );
    let foreign = Net::new().apply_lora(Lora::new(2, 4.0));
    misuse!(
        messages,
        "a model with another crate's adapters",
        foreign,
        |net| net.add_adapter(DEFAULT_ADAPTER, on(["query"])),
        ForeignReparameterization { .. }
    );
    insta::assert_snapshot!(messages);
}

#[test]
fn adapters() {
    use PeftError::*;
    let mut messages = String::new();
    let two = || Net::with(&[("one", on(["query"])), ("two", on(["query", "free"]))]);
    macro_rules! refuse {
        ($title:literal, $model:expr, $operation:expr, $variant:pat) => {
            misuse!(messages, $title, $model, $operation, $variant);
        };
    }
    refuse!("a name that is taken", two(), |net| net.add_adapter("one", on(["free"])), AdapterExists { .. });
    refuse!("a dotted name", two(), |net| net.add_adapter("v1.2", on(["free"])), InvalidAdapterName { .. });
    refuse!("an empty name", two(), |net| net.add_adapter("", on(["free"])), InvalidAdapterName { .. });
    refuse!(
        "a name that leaves the directory",
        two(),
        |net| net.add_adapter("../x", on(["free"])),
        InvalidAdapterName { .. }
    );

    refuse!(
        "activating an unknown adapter",
        two(),
        |net| net.set_adapter(&["one", "three"]),
        UnknownAdapter { .. }
    );
    refuse!(
        "activating one of a model that has none",
        Net::new(),
        |net| net.set_adapter(&["one"]),
        UnknownAdapter { .. }
    );
    refuse!("deleting an unknown adapter", two(), |net| net.delete_adapter("three"), UnknownAdapter { .. });
    let somewhere = tempfile::tempdir().unwrap();
    let path = somewhere.path();
    refuse!("saving an unknown adapter", two(), |net| net.save_adapter("three", path), UnknownAdapter { .. });
    refuse!(
        "saving a model without adapters",
        Net::new(),
        |net| net.save_adapters(path),
        UnknownAdapter { .. }
    );
    assert_eq!(std::fs::read_dir(path).unwrap().count(), 0);
    refuse!(
        "swapping an unknown adapter",
        two(),
        |net| net.hotswap_adapter("three", path),
        UnknownAdapter { .. }
    );
    refuse!(
        "a row that names an unknown adapter",
        two(),
        |net| net.for_rows(&[None, Some("three")]),
        UnknownAdapter { .. }
    );
    refuse!(
        "combining an unknown adapter",
        two(),
        |net| net.add_weighted_adapter("sum", &[("three", 1.0)], CombinationType::Cat),
        UnknownAdapter { .. }
    );

    let swap = stored(&[], |_| {});
    refuse!(
        "deleting a merged adapter",
        Net::merged(),
        |net| net.delete_adapter("one"),
        MergedAdapter { .. }
    );
    refuse!(
        "swapping a merged adapter",
        Net::merged(),
        |net| net.hotswap_adapter("one", swap.path()),
        MergedAdapter { .. }
    );
    refuse!(
        "swapping beside a merged adapter",
        Net::merged(),
        |net| net.hotswap_adapter("two", swap.path()),
        MergedAdapter { .. }
    );
    refuse!(
        "rows of a merged model",
        Net::merged(),
        |net| net.for_rows(&[Some("two")]),
        MergedAdapter { .. }
    );

    let copies = || on(["query"]).with_modules_to_save(["norm"]);
    let both = || Net::with(&[("one", copies()), ("two", copies().with_bias(Bias::All))]);
    refuse!(
        "two copies of one parameter",
        both(),
        |net| net.set_adapter(&["one", "two"]),
        ConflictingCopies { .. }
    );
    let plain = || Net::with(&[("one", on(["query", "value"]))]);
    refuse!("a row on a plain layer", plain(), |net| net.for_rows(&[Some("one"), None]), MixedBatch { .. });
    refuse!("a row with trained biases", both(), |net| net.for_rows(&[Some("two")]), MixedBatch { .. });

    let infinite = || Net::with(&[("one", on(["query"]).with_lora_alpha(1e300)), ("two", on(["free"]))]);
    refuse!("merging infinities for now", infinite(), |net| net.merge_adapter(), NonFiniteMerge { .. });
    refuse!("merging infinities for good", infinite(), |net| net.merge_and_unload(), NonFiniteMerge { .. });
    let biased = || Net::with(&[("one", on(["free", "query"]).with_lora_bias(true))]);
    refuse!(
        "merging a lora_bias without a bias",
        biased(),
        |net| net.merge_and_unload(),
        NoBiasToMergeInto { .. }
    );

    let unequal =
        || Net::with(&[("one", on(["query"])), ("two", on(["query"]).with_rank_pattern([("query", 3)]))]);
    let sources = [("one", 1.0), ("two", 0.5)];
    let ties = |density| CombinationType::Ties { density, majority_sign: MajoritySign::Total };
    refuse!(
        "combining unequal ranks",
        unequal(),
        |net| net.add_weighted_adapter("sum", &sources, CombinationType::Linear),
        UnequalRanks { .. }
    );
    refuse!(
        "a density of 0",
        two(),
        |net| net.add_weighted_adapter("sum", &sources, ties(0.0)),
        InvalidConfig { .. }
    );
    refuse!(
        "a density above 1",
        two(),
        |net| net.add_weighted_adapter("sum", &sources, ties(1.5)),
        InvalidConfig { .. }
    );
    refuse!(
        "a combination of rank 0",
        two(),
        |net| net.add_weighted_adapter("sum", &sources, CombinationType::Svd { rank: Some(0) }),
        InvalidConfig { .. }
    );
    refuse!(
        "a weight that is no number",
        two(),
        |net| net.add_weighted_adapter("sum", &[("one", f64::NAN)], CombinationType::Cat),
        InvalidConfig { .. }
    );
    refuse!(
        "combining nothing",
        two(),
        |net| net.add_weighted_adapter("sum", &[], CombinationType::Cat),
        InvalidConfig { .. }
    );
    refuse!(
        "a combination by a name that is taken",
        two(),
        |net| net.add_weighted_adapter("two", &sources, CombinationType::Cat),
        AdapterExists { .. }
    );
    refuse!(
        "combining copies",
        both(),
        |net| net.add_weighted_adapter("sum", &sources, CombinationType::Cat),
        CannotCombine { .. }
    );
    refuse!(
        "combining infinities",
        infinite(),
        |net| net.add_weighted_adapter("sum", &sources, CombinationType::Svd { rank: None }),
        NonFiniteCombination { .. }
    );
    insta::assert_snapshot!(messages);
}

#[test]
fn files() {
    use PeftError::*;
    let mut messages = String::new();
    macro_rules! refuse {
        ($title:literal, $directory:expr, $variant:pat) => {
            let directory = $directory;
            let error = refused(Net::new(), |net| net.load_adapter(DEFAULT_ADAPTER, directory.path()));
            assert!(matches!(error, $variant), "{}: {error:?}", $title);
            note(&mut messages, $title, &error, Some(directory.path()));
        };
    }
    const CONFIG: &str = "adapter_config.json";
    const TENSORS: &str = "adapter_model.safetensors";
    let remove = |name: &'static str| move |path: &Path| std::fs::remove_file(path.join(name)).unwrap();
    let broken = |name: &'static str| move |path: &Path| std::fs::write(path.join(name), "{").unwrap();
    let with = |config: &[(&str, Value)]| stored(config, |_| {});
    let renamed = |from: &'static str, to: &'static str| {
        stored(&[], |path| {
            // Names of the same length: the header stays as long as it was.
            let bytes = std::fs::read(path.join(TENSORS)).unwrap();
            let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
            let bytes = [&bytes[..at], to.as_bytes(), &bytes[at + to.len()..]].concat();
            std::fs::write(path.join(TENSORS), bytes).unwrap();
        })
    };

    refuse!("an empty directory", tempfile::tempdir().unwrap(), NoAdapter { .. });
    refuse!("no configuration", stored(&[], remove(CONFIG)), NoAdapter { .. });
    refuse!("no tensors", stored(&[], remove(TENSORS)), NoAdapter { .. });
    let pickle = |path: &Path| std::fs::rename(path.join(TENSORS), path.join("adapter_model.bin")).unwrap();
    refuse!("a pickle alone", stored(&[], pickle), NoAdapter { .. });
    refuse!("a configuration that is no JSON", stored(&[], broken(CONFIG)), Json { .. });
    refuse!("tensors that are no safetensors", stored(&[], broken(TENSORS)), Safetensors { .. });

    refuse!("another kind of adapter", with(&[("peft_type", json!("LOHA"))]), UnsupportedConfig { .. });
    refuse!(
        "an unknown initialisation",
        with(&[("init_lora_weights", json!("corda"))]),
        UnsupportedConfig { .. }
    );
    refuse!(
        "many problems at once",
        with(&[
            ("use_qalora", json!(true)),
            ("bias", json!("some")),
            ("r", json!(-1)),
            ("lora_alpha", json!("16")),
            ("layer_replication", json!([[0, 1]])),
            ("of_the_future", json!({"on": true})),
        ]),
        UnsupportedConfig { .. }
    );
    refuse!("a rank of 0", with(&[("r", json!(0))]), InvalidConfig { .. });
    refuse!(
        "targets of another model",
        with(&[("target_modules", json!(["q_proj", "v_proj"]))]),
        NoModuleMatched { .. }
    );
    refuse!("another rank than that of the tensors", with(&[("r", json!(3))]), IncompatibleAdapter { .. });
    refuse!(
        "more targets than tensors",
        with(&[("target_modules", json!(["query", "free"]))]),
        IncompatibleAdapter { .. }
    );
    refuse!(
        "a tensor by another name",
        renamed("layers.1.query.lora_A", "layers.7.query.lora_A"),
        IncompatibleAdapter { .. }
    );
    refuse!(
        "a tensor of integers",
        renamed("\"dtype\":\"F32\"", "\"dtype\":\"I32\""),
        IncompatibleAdapter { .. }
    );

    let conflicting = || on(["query"]).with_modules_to_save(["norm"]);
    let net = || {
        let mut net = Net::with(&[("one", conflicting()), ("two", on(["free"]))]);
        net.set_adapter(&["one", "two"]).unwrap();
        net
    };
    let directory = tempfile::tempdir().unwrap();
    net().save_adapter("one", directory.path()).unwrap();
    misuse!(
        messages,
        "a swap that brings a second copy",
        net(),
        |net| net.hotswap_adapter("two", directory.path()),
        ConflictingCopies { .. }
    );

    // The operating system words the cause in its own way.
    let file = directory.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = refused(net(), |net| net.save_adapter("one", file.join("inside")));
    let Io { path, .. } = &error else { panic!("{error:?}") };
    assert_eq!(error.to_string(), format!("cannot access `{}`", path.display()));
    insta::assert_snapshot!(messages);
}
