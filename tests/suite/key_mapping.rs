//! A module that was not made for Hugging Face's files: Burn's own encoder with the names of BERT.

use std::collections::BTreeMap;
use std::path::Path;

use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft::{
    Bias, InitLoraWeights, KeyMapping, LoadOptions, LoraConfig, PeftError, PeftModel, TargetModules,
};
use burn_peft_tests::fixture::read_tensors;
use burn_peft_tests::parameters::{is_adapter, parameters, transposed, with_changed};
use burn_peft_tests::tolerance::assert_different;
use serde_json::{Value, json};

/// The paths of `TransformerEncoder` as the names that `BertModel` has.
fn bert() -> KeyMapping {
    KeyMapping::new([
        (r"^layers\.(\d+)\.", "encoder.layer.$1."),
        (r"\.mha\.(query|key|value)\.", ".attention.self.$1."),
        (r"\.mha\.output\.", ".attention.output.dense."),
        (r"\.norm_1\.", ".attention.output.LayerNorm."),
        (r"\.pwff\.linear_inner\.", ".intermediate.dense."),
        (r"\.pwff\.linear_outer\.", ".output.dense."),
        (r"\.norm_2\.", ".output.LayerNorm."),
    ])
}

/// Two layers of width 8, 12 inside.
fn encoder() -> TransformerEncoder {
    TransformerEncoderConfig::new(8, 12, 2, 2).with_dropout(0.0).init(&Device::default())
}

fn config() -> LoraConfig {
    LoraConfig::new(2)
        .with_lora_alpha(6.0)
        .with_init_lora_weights(InitLoraWeights::Random)
        .with_key_mapping(bert())
}

fn output(model: &TransformerEncoder) -> TensorData {
    let wave = |i: i64| Tensor::<1, burn::tensor::Int>::arange(i..i + 48, &Device::default()).float().sin();
    model.forward(TransformerEncoderInput::new(wave(3).reshape([2, 3, 8]))).into_data()
}

/// Copies start at the base's values; these are others.
fn move_copies(model: TransformerEncoder) -> TransformerEncoder {
    with_changed(model, |path, data| {
        let moved = || data.iter::<f32>().map(|number| number * 1.5 + 0.25).collect::<Vec<_>>();
        (is_adapter(path) && path.ends_with(".copy")).then(|| TensorData::new(moved(), data.shape()))
    })
}

fn tensors(directory: &Path) -> BTreeMap<String, TensorData> {
    read_tensors(&std::fs::read(directory.join("adapter_model.safetensors")).unwrap())
}

/// Everything at once: attention, a rank of its own, norms that are saved whole, trained biases.
///
/// A plain `LayerNorm` would also be the one behind the embeddings of `BertModel`, which an encoder alone does not have:
/// PEFT could not load the file.
fn adapted() -> TransformerEncoder {
    let mut model = encoder();
    let config = config()
        .with_target_modules(["attention.self.query", "attention.self.value", "intermediate.dense"])
        .with_rank_pattern([(r"layer\.1\.attention\.self\.query", 3)])
        .with_modules_to_save(["output.LayerNorm"])
        .with_bias(Bias::LoraOnly);
    model.add_adapter("default", &config).unwrap();
    move_copies(model)
}

#[test]
fn modules_are_meant_by_their_names_in_files() {
    let adapt = |config: LoraConfig| {
        let report = encoder().add_adapter("default", &config).unwrap();
        let modules =
            report.modules.into_iter().map(|module| (module.path, module.r.unwrap())).collect::<Vec<_>>();
        (modules, report.copied_parameters)
    };
    let paths = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<String>>();

    let query = config()
        .with_target_modules(["attention.self.query"])
        .with_rank_pattern([(r"layer\.1\.attention\.self\.query", 5)]);
    let expected = [("layers.0.mha.query".to_string(), 2), ("layers.1.mha.query".to_string(), 5)];
    assert_eq!(adapt(query), (expected.to_vec(), vec![]));

    let dense = config()
        .with_target_modules(TargetModules::Regex(r"encoder\.layer\.\d+\.output\.dense".into()))
        .with_modules_to_save(["attention.output.LayerNorm"]);
    let (modules, copied) = adapt(dense);
    assert_eq!(modules.len(), 2);
    assert!(modules.iter().all(|(path, _)| path.ends_with("pwff.linear_outer")));
    assert_eq!(
        copied,
        paths(&[
            "layers.0.norm_1.beta",
            "layers.0.norm_1.gamma",
            "layers.1.norm_1.beta",
            "layers.1.norm_1.gamma"
        ])
    );

    // `output.dense` is two modules in each layer of BERT.
    let both = config().with_target_modules(["output.dense"]).with_exclude_modules(["layer.0.output.dense"]);
    let (modules, _) = adapt(both.with_layers_to_transform([0]).with_layers_pattern(["layer"]));
    assert_eq!(modules, [("layers.0.mha.output".to_string(), 2)]);

    // Norms have a bias in files, `beta` in Burn.
    let all = config().with_target_modules(["query"]).with_bias(Bias::All);
    let (_, copied) = adapt(all);
    assert_eq!(copied.len(), 2 * 8);
    assert!(copied.contains(&"layers.1.norm_2.beta".to_string()));
}

#[test]
fn files_have_the_names_and_the_layout_of_bert() {
    let model = adapted();
    let directory = tempfile::tempdir().unwrap();
    model.save_adapter("default", directory.path()).unwrap();
    let written = tensors(directory.path());

    let mut expected = BTreeMap::new();
    let values = parameters(&model);
    for layer in 0..2 {
        let mut put = |key: &str, path: &str, is_matrix: bool| {
            let value = &values[&format!("layers.{layer}.{path}")];
            let value = if is_matrix {
                transposed(value)
            } else {
                TensorData::new(value.iter::<f32>().collect::<Vec<_>>(), [value.num_elements()])
            };
            expected.insert(format!("base_model.model.encoder.layer.{layer}.{key}"), value);
        };
        for (name, path) in [
            ("attention.self.query", "mha.query"),
            ("attention.self.value", "mha.value"),
            ("intermediate.dense", "pwff.linear_inner"),
        ] {
            put(&format!("{name}.lora_A.weight"), &format!("{path}.weight.peft.default.a"), true);
            put(&format!("{name}.lora_B.weight"), &format!("{path}.weight.peft.default.b"), true);
            put(&format!("{name}.base_layer.bias"), &format!("{path}.bias.peft.default.copy"), false);
        }
        for (name, path) in [("attention.output.LayerNorm", "norm_1"), ("output.LayerNorm", "norm_2")] {
            put(&format!("{name}.weight"), &format!("{path}.gamma.peft.default.copy"), false);
            put(&format!("{name}.bias"), &format!("{path}.beta.peft.default.copy"), false);
        }
    }
    assert_eq!(written, expected);
    assert_eq!(
        written["base_model.model.encoder.layer.1.attention.self.query.lora_A.weight"].shape()[..],
        [3, 8]
    );

    let config: Value =
        serde_json::from_slice(&std::fs::read(directory.path().join("adapter_config.json")).unwrap())
            .unwrap();
    let targets = json!(["attention.self.query", "attention.self.value", "intermediate.dense"]);
    assert_eq!(config["target_modules"], targets);
    assert_eq!(config["modules_to_save"], json!(["output.LayerNorm"]));
}

#[test]
fn a_module_saved_whole_is_written_as_torch_has_it() {
    let mut model = encoder();
    let saving = config().with_target_modules(["query"]).with_modules_to_save(["intermediate.dense"]);
    model.add_adapter("default", &saving).unwrap();
    let directory = tempfile::tempdir().unwrap();
    model.save_adapter("default", directory.path()).unwrap();
    let weight = &tensors(directory.path())["base_model.model.encoder.layer.0.intermediate.dense.weight"];
    assert_eq!(*weight, transposed(&parameters(&model)["layers.0.pwff.linear_inner.weight"]));
}

#[test]
fn the_same_mapping_brings_the_same_bits_back() {
    let model = adapted();
    let directory = tempfile::tempdir().unwrap();
    model.save_adapter("default", directory.path()).unwrap();
    let mut again = model.clone();
    again.unload().unwrap();
    assert_different("adapted", &output(&model), &output(&again));
    let options = LoadOptions::new().with_key_mapping(bert());
    let report = again.load_adapter_with("default", directory.path(), &options).unwrap();
    assert_eq!(report.tensors, tensors(directory.path()).len());
    assert!(report.problems.is_empty());
    assert_eq!(parameters(&again), parameters(&model));
    assert_eq!(output(&again), output(&model));

    // What was loaded with a mapping is saved with it.
    let second = tempfile::tempdir().unwrap();
    again.save_adapter("default", second.path()).unwrap();
    assert_eq!(tensors(second.path()), tensors(directory.path()));
}

#[test]
fn without_the_mapping_the_error_asks_for_one() {
    let model = adapted();
    let directory = tempfile::tempdir().unwrap();
    model.save_adapter("default", directory.path()).unwrap();
    let mut other = encoder();
    let before = parameters(&other);
    let error = other.load_adapter("default", directory.path()).unwrap_err();
    assert!(matches!(error, PeftError::NoModuleMatched { .. }), "{error:?}");
    insta::assert_snapshot!(error, @r#"
    no module matched `target_modules` ["attention.self.query", "attention.self.value", "intermediate.dense"]
    hint: the closest modules are `query`, `value`; in code, a `KeyMapping` gives them the names of a file
    "#);

    // Targets that are named alike in both find the modules, and none of the tensors.
    let mut model = encoder();
    model.add_adapter("default", config().with_target_modules(["query"])).unwrap();
    model.save_adapter("default", directory.path()).unwrap();
    let error = other.load_adapter("default", directory.path()).unwrap_err();
    assert!(matches!(error, PeftError::IncompatibleAdapter { .. }), "{error:?}");
    assert!(error.to_string().contains("`LoadOptions` can rename keys"), "{error}");
    assert_eq!(parameters(&other), before);
    assert!(other.adapters().is_empty());
}
