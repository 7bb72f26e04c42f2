//! Adapter directories: what peft wrote is read and written again, and what does not fit is named.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::tensor::{Device, TensorData};
use burn_peft::{DEFAULT_ADAPTER, LoadOptions, LoraConfig, PeftError, PeftModel, TensorProblem};
use burn_peft_llama::PaddingSide;
use burn_peft_tests::fixture::{
    ADAPTERS, Fixture, directory, read_facts, read_file, read_json, write_adapter,
};
use burn_peft_tests::parameters::{parameters, to_peft};
use burn_peft_tests::tolerance::{FORWARD, assert_close};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::common::{SIDES, load_adapted, load_base, masked_logits};

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
        for device in [Device::default(), Device::default().autodiff()] {
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
    let device = Device::default();
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

    let mut model = load_base("gqa-tied", &Device::default());
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
        ("mha-biased-embedding-head", "base_model.model.model.embed_tokens.base_layer.weight"),
        ("mha-biased-embedding-head", "base_model.model.lm_head.base_layer.weight"),
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
            let mut model = load_base(fixture.facts.base.as_ref().unwrap(), &Device::default());
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
    let mut model = load_base("rope-scaled", &Device::default());
    let error = model.load_adapter(DEFAULT_ADAPTER, Fixture::open("gqa-tied-qv").directory).unwrap_err();
    assert!(matches!(error, PeftError::IncompatibleAdapter { .. }), "{error}");
}

#[test]
fn what_is_not_computed_here_is_refused_by_name() {
    let unsupported = [
        ("peft_type", json!("LOHA")),
        ("alora_invocation_tokens", json!([5, 7])),
        ("arrow_config", json!({"top_k": 3})),
        ("bias", json!("some")),
        ("init_lora_weights", json!("corda")),
        ("kasa_config", json!({"beta": 1.0})),
        ("layer_replication", json!([[0, 2], [1, 2]])),
        ("layers_to_transform", json!([-1])),
        ("monteclora_config", json!({"num_samples": 8})),
        ("r", json!("3")),
        ("target_parameters", json!(["mlp.experts.gate_up_proj"])),
        ("trainable_token_indices", json!(["a"])),
        ("use_bdlora", json!({"nblocks": 2})),
        ("use_qalora", json!(true)),
        ("velora_config", json!({"num_groups": 4})),
        ("a_setting_of_the_future", json!(0.5)),
    ];
    let initializations = ["pissa_niter_4", "pissa_niter_x", "corda", "lora_ga", "mitra"];
    let initializations = initializations.map(|name| ("init_lora_weights", json!(name)));
    let refused = |changes: &[(&str, Value)]| -> Vec<String> {
        let fixture = Fixture::open("gqa-tied-qv");
        let mut changed = fixture.config();
        for (field, value) in changes {
            changed[*field] = value.clone();
        }
        let directory = tempfile::tempdir().unwrap();
        write_adapter(directory.path(), &changed, &fixture.adapter_tensors());
        let mut model = load_base("gqa-tied", &Device::default());
        let error = model.load_adapter(DEFAULT_ADAPTER, directory.path()).unwrap_err();
        assert!(model.adapters().is_empty());
        let PeftError::UnsupportedConfig { problems, .. } = &error else { panic!("{changes:?}: {error}") };
        for (field, value) in changes {
            assert!(error.to_string().contains(&format!("`{field}` is {value}")), "{field}: {error}");
        }
        problems.iter().map(|problem| problem.field.clone()).collect()
    };
    for change in unsupported.iter().chain(&initializations) {
        assert_eq!(refused(std::slice::from_ref(change)), [change.0]);
    }
    // Of another kind of adapter, nothing else is said.
    let others: Vec<(&str, Value)> =
        unsupported.iter().filter(|(field, _)| *field != "peft_type").cloned().collect();
    let all: BTreeSet<String> = refused(&others).into_iter().collect();
    assert_eq!(all, others.iter().map(|(field, _)| field.to_string()).collect());
}

#[test]
fn weights_of_the_base_in_a_file_are_taken_for_what_they_are() {
    // As `save_embedding_layers=True` writes them.
    let fixture = Fixture::open("mha-biased-qv-rslora");
    let mut base = load_base("mha-biased", &Device::default());
    let table = parameters(&base)["model.embed_tokens.weight"].clone();
    let key = "base_model.model.model.embed_tokens.weight";
    let mut tensors = fixture.adapter_tensors();
    tensors.insert(key.into(), table.clone());
    let directory = tempfile::tempdir().unwrap();
    write_adapter(directory.path(), &fixture.config(), &tensors);
    base.load_adapter(DEFAULT_ADAPTER, directory.path()).unwrap();

    let mut other: Vec<f32> = table.iter().collect();
    other[3] += 1.0;
    tensors.insert(key.into(), TensorData::new(other, table.shape().clone()));
    write_adapter(directory.path(), &fixture.config(), &tensors);
    let error = base.load_adapter("other", directory.path()).unwrap_err();
    let PeftError::IncompatibleAdapter { problems, .. } = &error else { panic!("{error}") };
    assert_eq!(problems[..], [TensorProblem::OtherBase { key: key.into() }]);
}

#[test]
fn patterns_whose_order_matters_are_written_so_that_they_mean_the_same() {
    let mut model = load_base("gqa-tied", &Device::default());
    // In alphabetical order the second one would count everywhere.
    let config = LoraConfig::new(3)
        .with_target_modules(["q_proj", "v_proj"])
        .with_rank_pattern([(r"layers\.1\.self_attn\.q_proj", 5), ("._proj", 2)]);
    model.add_adapter(DEFAULT_ADAPTER, &config).unwrap();
    let directory = tempfile::tempdir().unwrap();
    model.save_adapter(DEFAULT_ADAPTER, directory.path()).unwrap();
    let mut again = load_base("gqa-tied", &Device::default());
    let report = again.load_adapter(DEFAULT_ADAPTER, directory.path()).unwrap();
    let ranks: Vec<usize> = report.injection.modules.iter().filter_map(|module| module.r).collect();
    assert_eq!(ranks, [2, 2, 5, 2]);
}

#[derive(Deserialize)]
struct OtherConfigs {
    tensors: String,
    configs: Vec<String>,
}

#[test]
fn configurations_of_old_releases_and_flags_without_effect_mean_the_same() {
    let device = Device::default();
    for case in ["old", "fan-in-fan-out"] {
        let others: OtherConfigs = read_facts(&directory(case));
        let fixture = Fixture::open(&others.tensors);
        let model = load_adapted(&fixture, &device);
        for name in &others.configs {
            let other = directory(case).join(name);
            let there = tempfile::tempdir().unwrap();
            write_adapter(there.path(), &config(&other), &fixture.adapter_tensors());
            let mut loaded = load_base(fixture.facts.base.as_ref().unwrap(), &device);
            let report = loaded.load_adapter(DEFAULT_ADAPTER, there.path()).unwrap();
            assert!(report.ignored_keys.is_empty(), "{name}: {report}");
            for side in SIDES {
                let batch = fixture.batch(side, &device);
                let logits = masked_logits(&loaded, &batch);
                assert_eq!(logits, masked_logits(&model, &batch), "{name}");
                assert_close(name, &logits, fixture.logits(side), FORWARD);
            }

            let again = tempfile::tempdir().unwrap();
            loaded.save_adapter(DEFAULT_ADAPTER, again.path()).unwrap();
            let mut expected = fixture.config();
            // peft takes the flag back when it meets a linear layer. Here it has no effect and is handed on.
            expected["fan_in_fan_out"] = json!(name == "asked");
            assert_eq!(config(again.path()), expected, "{name}");
        }
    }
}

#[test]
fn lenient_loading_reports_the_same_problems_and_loads_what_fits() {
    let fixture = Fixture::open("gqa-tied-layers");
    let key = |projection: &str, factor: &str| {
        format!("base_model.model.model.layers.1.{projection}.lora_{factor}.weight")
    };
    let mut broken = fixture.adapter_tensors();
    let count = broken.len();
    broken.remove(&key("self_attn.q_proj", "B"));
    broken.insert(key("self_attn.v_proj", "A"), TensorData::new(vec![0.5_f32; 3 * 31], [3, 31]));
    broken.insert(key("self_attn.o_proj", "A"), TensorData::new(vec![0.5_f32; 3 * 32], [3, 32]));
    let directory = tempfile::tempdir().unwrap();
    write_adapter(directory.path(), &fixture.config(), &broken);

    let mut model = load_base("gqa-tied", &Device::default());
    let error = model.load_adapter(DEFAULT_ADAPTER, directory.path()).unwrap_err();
    let PeftError::IncompatibleAdapter { problems, .. } = error else { panic!("{error}") };
    assert_eq!(problems.len(), 3, "{problems:?}");
    let report = model
        .load_adapter_with(DEFAULT_ADAPTER, directory.path(), &LoadOptions::new().with_lenient(true))
        .unwrap();
    assert_eq!(report.problems, problems);
    assert_eq!(report.tensors, count - 2);
    assert!(report.to_string().contains(&key("self_attn.q_proj", "B")), "{report}");

    let found = to_peft(&model, &parameters(&model));
    assert_eq!(found.len(), count);
    for (key_there, tensor) in &found {
        if *key_there == key("self_attn.q_proj", "B") {
            assert!(tensor.iter::<f32>().all(|value| value == 0.0), "a fresh `B` is zero");
        } else if *key_there == key("self_attn.v_proj", "A") {
            let bound = 1.0 / 32_f32.sqrt();
            assert!(tensor.iter::<f32>().all(|value| value.abs() <= bound), "a fresh `A` is within {bound}");
            assert!(tensor.iter::<f32>().any(|value| value != 0.0), "a fresh `A` is not zero");
        } else {
            assert_eq!(*tensor, broken[key_there], "{key_there}");
        }
    }
}

/// peft 0.4 wrote trained biases under another key and 0.10 to 0.13 not at all; peft ignores the first and misses
/// nothing in the second. Here both are said, and lenient loading leaves the bias as it is in the base.
#[test]
fn biases_that_old_releases_misplaced_are_missed() {
    let fixture = Fixture::open("mha-biased-bias-lora-only");
    let moved = |key: &str| key.replace(".base_layer.bias", ".bias");
    let is_bias = |key: &str| key.ends_with(".base_layer.bias");
    let all = fixture.adapter_tensors();
    let without: BTreeMap<_, _> = all.clone().into_iter().filter(|(key, _)| !is_bias(key)).collect();
    let misplaced: BTreeMap<_, _> = all.iter().map(|(key, data)| (moved(key), data.clone())).collect();
    let biases = all.len() - without.len();
    for (tensors, unexpected) in [(without, 0), (misplaced, biases)] {
        let directory = tempfile::tempdir().unwrap();
        write_adapter(directory.path(), &fixture.config(), &tensors);
        let mut model = load_base("mha-biased", &Device::default());
        let base = parameters(&model);
        let error = model.load_adapter(DEFAULT_ADAPTER, directory.path()).unwrap_err();
        let PeftError::IncompatibleAdapter { problems, .. } = &error else { panic!("{error}") };
        let is_missing =
            |problem: &&TensorProblem| matches!(problem, TensorProblem::Missing { key, .. } if is_bias(key));
        assert_eq!(problems.iter().filter(is_missing).count(), biases, "{error}");
        assert_eq!(problems.len(), biases + unexpected, "{error}");

        let lenient = LoadOptions::new().with_lenient(true);
        let report = model.load_adapter_with(DEFAULT_ADAPTER, directory.path(), &lenient).unwrap();
        assert_eq!(&report.problems, problems);
        let loaded = parameters(&model);
        for path in &report.injection.copied_parameters {
            let copy = &loaded[&format!("{path}.peft.default.copy")];
            assert!(copy.iter::<f32>().eq(base[path].iter::<f32>()), "{path}");
        }
    }
}

#[test]
fn the_least_configuration_that_peft_reads_is_read() {
    let fixture = Fixture::open("gqa-tied-qv");
    let directory = tempfile::tempdir().unwrap();
    let least = json!({"peft_type": "LORA", "target_modules": ["v_proj", "q_proj"], "r": 3});
    write_adapter(directory.path(), &least, &tensors(&fixture.directory));
    let mut model = load_base("gqa-tied", &Device::default());
    model.load_adapter(DEFAULT_ADAPTER, directory.path()).unwrap();
    let again = tempfile::tempdir().unwrap();
    model.save_adapter(DEFAULT_ADAPTER, again.path()).unwrap();
    let config = config(again.path());
    assert_eq!((&config["lora_alpha"], &config["lora_dropout"]), (&json!(8), &json!(0.0)));
    assert_eq!((&config["use_rslora"], &config["init_lora_weights"]), (&json!(false), &json!(true)));
}
