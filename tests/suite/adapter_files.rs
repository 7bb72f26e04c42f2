//! Adapter directories: what peft wrote is read and written again, and what does not fit is named.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{Device, TensorData};
use burn_peft::{DEFAULT_ADAPTER, LoraConfig, PeftError, PeftModel, TensorProblem};
use burn_peft_llama::{Collator, Example, LlamaForCausalLm, PaddingSide, Tokenizer};
use burn_peft_tests::fixture::{ADAPTERS, Fixture, read_file, read_json, write_adapter};
use burn_peft_tests::parameters::parameters;
use serde_json::{Value, json};

use crate::common::{load_adapted, load_base, masked_logits};

/// The directory to export to, for `tests/check_in_python.py`.
const EXPORT: &str = "BURN_PEFT_EXPORT";

fn tensors(directory: &Path) -> BTreeMap<String, TensorData> {
    read_file(&directory.join("adapter_model.safetensors"))
}

fn config(directory: &Path) -> Value {
    read_json(&directory.join("adapter_config.json"))
}

#[test]
fn what_peft_wrote_is_written_again_with_the_same_tensors_and_the_same_configuration() {
    for case in ADAPTERS {
        let fixture = Fixture::open(case);
        for device in [Device::flex(), Device::flex().autodiff()] {
            let model = load_adapted(&fixture, &device);
            let directory = tempfile::tempdir().unwrap();
            model.save_adapter(DEFAULT_ADAPTER, directory.path()).unwrap();

            let mut expected = tensors(&fixture.directory);
            // peft adds the table of an adapted embedding, which belongs to the base.
            expected.retain(|key, _| !key.ends_with(".base_layer.weight"));
            assert_eq!(tensors(directory.path()), expected, "{case}");

            let mut found = config(directory.path());
            if let Some(names) = found["target_modules"].as_array_mut() {
                names.sort_by_key(ToString::to_string);
            }
            assert_eq!(found, config(&fixture.directory), "{case}");
        }
    }
}

#[test]
fn a_saved_adapter_comes_back_with_the_same_bits_under_any_name() {
    let device = Device::flex();
    for case in ADAPTERS {
        let fixture = Fixture::open(case);
        let batch = fixture.batch(PaddingSide::Left, &device);
        let model = load_adapted(&fixture, &device);
        let directory = tempfile::tempdir().unwrap();
        model.save_adapter(DEFAULT_ADAPTER, directory.path()).unwrap();

        let mut again = load_base(fixture.facts.base.as_ref().unwrap(), &device);
        again.load_adapter("other", directory.path()).unwrap();
        assert_eq!(masked_logits(&again, &batch), masked_logits(&model, &batch), "{case}");
        let renamed = |path: String| path.replace(".peft.other.", ".peft.default.");
        let found: BTreeMap<_, _> =
            parameters(&again).into_iter().map(|(path, data)| (renamed(path), data)).collect();
        assert_eq!(found, parameters(&model), "{case}");
    }
}

#[test]
fn every_tensor_that_does_not_fit_is_named_and_the_model_stays_as_it_was() {
    let fixture = Fixture::open("gqa-tied-qv");
    let key = |layer, projection, factor| {
        format!("base_model.model.model.layers.{layer}.self_attn.{projection}.lora_{factor}.weight")
    };
    let mut broken = tensors(&fixture.directory);
    let removed = broken.remove(&key(0, "q_proj", "A")).unwrap();
    broken.insert(key(7, "q_proj", "A"), removed);
    let wide = TensorData::new(vec![0.5_f32; 3 * 31], [3, 31]);
    broken.insert(key(1, "v_proj", "A"), wide);
    let directory = tempfile::tempdir().unwrap();
    write_adapter(directory.path(), &config(&fixture.directory), &broken);

    let mut model = load_base("gqa-tied", &Device::flex());
    let before = parameters(&model);
    let error = model.load_adapter(DEFAULT_ADAPTER, directory.path()).unwrap_err();
    let PeftError::IncompatibleAdapter { problems, .. } = &error else { panic!("{error}") };
    let has = |wanted: &dyn Fn(&TensorProblem) -> bool| problems.iter().any(wanted);
    assert_eq!(problems.len(), 3, "{error}");
    assert!(
        has(&|p| matches!(p, TensorProblem::Missing { key: k, .. } if *k == key(0, "q_proj", "A"))),
        "{error}"
    );
    assert!(
        has(&|p| matches!(p, TensorProblem::Unexpected { key: k, .. } if *k == key(7, "q_proj", "A"))),
        "{error}"
    );
    assert!(
        has(&|p| matches!(p, TensorProblem::Shape { key: k, .. } if *k == key(1, "v_proj", "A"))),
        "{error}"
    );
    assert_eq!(parameters(&model), before);
    assert!(model.adapters().is_empty());
}

#[test]
fn the_adapted_weight_in_a_file_must_be_the_models_up_to_rounding() {
    for (case, key) in [
        ("gqa-tied-embedding", "base_model.model.model.embed_tokens.base_layer.weight"),
        ("mha-biased-head", "base_model.model.lm_head.base_layer.weight"),
    ] {
        let fixture = Fixture::open(case);
        let load = |change: &dyn Fn(f32) -> f32| {
            let mut changed = tensors(&fixture.directory);
            let weight = &changed[key];
            let mut values: Vec<f32> = weight.iter().collect();
            values[5] = change(values[5]);
            let weight = TensorData::new(values, weight.shape().clone());
            changed.insert(key.into(), weight);
            let directory = tempfile::tempdir().unwrap();
            write_adapter(directory.path(), &config(&fixture.directory), &changed);
            let mut model = load_base(fixture.facts.base.as_ref().unwrap(), &Device::flex());
            model.load_adapter(DEFAULT_ADAPTER, directory.path())
        };
        // To the nearest bfloat16.
        load(&|value| f32::from_bits((value.to_bits() + 0x8000) & 0xffff_0000)).unwrap();
        let error = load(&|value| value * 1.01).unwrap_err();
        let PeftError::IncompatibleAdapter { problems, .. } = &error else { panic!("{error}") };
        assert_eq!(problems[..], [TensorProblem::OtherBase { key: key.into() }]);
    }
}

#[test]
fn an_adapter_for_another_model_is_refused() {
    let mut model = load_base("rope-scaled", &Device::flex());
    let error = model.load_adapter(DEFAULT_ADAPTER, Fixture::open("gqa-tied-qv").directory).unwrap_err();
    assert!(matches!(error, PeftError::IncompatibleAdapter { .. }), "{error}");
}

#[test]
fn what_is_not_computed_here_is_refused_by_name() {
    let fixture = Fixture::open("gqa-tied-qv");
    for (field, value) in [
        ("use_dora", json!(true)),
        ("bias", json!("some")),
        ("init_lora_weights", json!("pissa")),
        ("peft_type", json!("LOHA")),
    ] {
        let mut changed = config(&fixture.directory);
        changed[field] = value;
        let directory = tempfile::tempdir().unwrap();
        write_adapter(directory.path(), &changed, &tensors(&fixture.directory));
        let mut model = load_base("gqa-tied", &Device::flex());
        let error = model.load_adapter(DEFAULT_ADAPTER, directory.path()).unwrap_err();
        assert!(error.to_string().contains(&format!("`{field}`")), "{field}: {error}");
    }
}

#[test]
fn the_least_configuration_that_peft_reads_is_read() {
    let fixture = Fixture::open("gqa-tied-qv");
    let directory = tempfile::tempdir().unwrap();
    let least = json!({"peft_type": "LORA", "target_modules": ["v_proj", "q_proj"], "r": 3});
    write_adapter(directory.path(), &least, &tensors(&fixture.directory));
    let mut model = load_base("gqa-tied", &Device::flex());
    model.load_adapter(DEFAULT_ADAPTER, directory.path()).unwrap();
    let again = tempfile::tempdir().unwrap();
    model.save_adapter(DEFAULT_ADAPTER, again.path()).unwrap();
    let config = config(again.path());
    assert_eq!((&config["lora_alpha"], &config["lora_dropout"]), (&json!(8), &json!(0.0)));
    assert_eq!((&config["use_rslora"], &config["init_lora_weights"]), (&json!(false), &json!(true)));
}

/// Not a test of its own: writes a base, an adapter and logits that `check_in_python.py` compares.
#[test]
fn export_for_python() {
    let Some(root) = std::env::var_os(EXPORT) else {
        println!("skipped: `{EXPORT}` names no directory to export to");
        return;
    };
    let device = Device::flex();
    for case in ADAPTERS {
        let fixture = Fixture::open(case);
        let directory = Path::new(&root).join(case);
        let base = load_base(fixture.facts.base.as_ref().unwrap(), &device);
        base.save_pretrained(directory.join("base")).unwrap();
        let mut model = base;
        model.load_adapter(DEFAULT_ADAPTER, &fixture.directory).unwrap();
        export(&directory, &model, &fixture);
    }

    // One that was never in Python, with every setting away from its default.
    let fixture = Fixture::open("rope-scaled");
    let directory = Path::new(&root).join("new");
    let mut model = load_base("rope-scaled", &device);
    model.save_pretrained(directory.join("base")).unwrap();
    let config = LoraConfig::new(5)
        .with_lora_alpha(7.5)
        .with_use_rslora(true)
        .with_lora_dropout(0.1)
        .with_target_modules(burn_peft::TargetModules::Regex(r".*\.(q|k|down)_proj".into()))
        .with_exclude_modules(["layers.1.mlp.down_proj"])
        .with_init_lora_weights(burn_peft::InitLoraWeights::Random);
    model.add_adapter(DEFAULT_ADAPTER, &config).unwrap();
    export(&directory, &model, &fixture);
}

/// Not a test of its own: logits of any base model with any adapter, such as those that the Pokémon experiment saved.
#[test]
fn export_any_adapter_for_python() {
    let paths = [EXPORT, "BURN_PEFT_EXPORT_BASE", "BURN_PEFT_EXPORT_ADAPTER"].map(std::env::var_os);
    let [Some(root), Some(base), Some(adapter)] = paths else {
        println!("skipped: no base and adapter to export");
        return;
    };
    let mut model = LlamaForCausalLm::from_pretrained(Path::new(&base), &Device::flex()).unwrap();
    model.load_adapter(DEFAULT_ADAPTER, &adapter).unwrap();
    let tokenizer = Tokenizer::load(Path::new(&base)).unwrap();
    let examples: Vec<Example> = ["Pikachu is an Electric-type Pokémon.", "Types:"]
        .map(|text| tokenizer.encode_document(text).unwrap())
        .into();
    let collator = Collator::new(0).with_side(PaddingSide::Left);
    let batch = collator.collate(&examples, &Device::flex()).unwrap();
    let expected = json!({
        "input_ids": rows(&batch.input_ids.to_data()),
        "attention_mask": rows(&batch.attention_mask.clone().int().into_data()),
        "logits": rows_of_floats(&masked_logits(&model, &batch)),
    });
    std::fs::create_dir_all(&root).unwrap();
    std::fs::write(Path::new(&root).join("expected.json"), expected.to_string()).unwrap();
}

fn export(directory: &Path, model: &burn_peft_llama::LlamaForCausalLm, fixture: &Fixture) {
    model.save_adapter(DEFAULT_ADAPTER, directory.join("adapter")).unwrap();
    let batch = fixture.batch(PaddingSide::Left, &Device::flex());
    let rows = |name: &str| rows(fixture.data(name));
    let expected = json!({
        "input_ids": rows("left.input_ids"),
        "attention_mask": rows("left.attention_mask"),
        "logits": rows_of_floats(&masked_logits(model, &batch)),
    });
    std::fs::write(directory.join("expected.json"), expected.to_string()).unwrap();
}

fn rows(data: &TensorData) -> Vec<Vec<i64>> {
    data.iter::<i64>().collect::<Vec<_>>().chunks(data.shape()[1]).map(<[i64]>::to_vec).collect()
}

fn rows_of_floats(data: &TensorData) -> Vec<Vec<Vec<f32>>> {
    let values: Vec<f32> = data.iter().collect();
    let (width, depth) = (data.shape()[1], data.shape()[2]);
    values.chunks(width * depth).map(|row| row.chunks(depth).map(<[f32]>::to_vec).collect()).collect()
}
