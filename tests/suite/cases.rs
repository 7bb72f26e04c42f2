//! Adapters that people really have, `tests/fixtures/cases`: what peft makes of them, or the message that says what to do.

use std::collections::BTreeSet;
use std::error::Error;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft::{
    AdapterDirectory, DEFAULT_ADAPTER, InitLoraWeights, LoraConfig, PeftError, PeftModel, TargetModules,
    TensorRole,
};
use burn_peft_llama::{LlamaConfig, LlamaForCausalLm};
use burn_peft_tests::fixture::directory;
use burn_peft_tests::parameters::{is_adapter, parameters, with_changed};
use burn_peft_tests::tolerance::{FORWARD, REORDERED, assert_close, assert_different};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

fn case(name: &str) -> PathBuf {
    directory("cases").join(name)
}

fn base(name: &str) -> LlamaForCausalLm {
    LlamaForCausalLm::from_pretrained(case(name), &Device::default()).unwrap()
}

/// The logits of the sequence that `expected.json` is about.
fn logits(model: &LlamaForCausalLm) -> TensorData {
    let ids = Tensor::<2, Int>::from_data([[1, 5, 9, 33, 70, 4, 12, 90]], &Device::default());
    model.forward(ids, None).into_data()
}

/// What peft computes.
fn expected(name: &str) -> TensorData {
    let json: Value =
        serde_json::from_slice(&std::fs::read(case(name).join("expected.json")).unwrap()).unwrap();
    let logits: Vec<f32> =
        json["logits"].as_array().unwrap().iter().map(|value| value.as_f64().unwrap() as f32).collect();
    let vocab_size = logits.len() / 8;
    TensorData::new(logits, [1, 8, vocab_size])
}

/// The base with the adapter in `adapter`, which must not be the base itself.
fn adapted(base_name: &str, adapter: &Path) -> LlamaForCausalLm {
    let mut model = base(base_name);
    let before = logits(&model);
    model.load_adapter(DEFAULT_ADAPTER, adapter).unwrap();
    assert_different("the adapter", &logits(&model), &before);
    model
}

/// The error of loading the adapter in `adapter`, which must leave the model as it was.
fn refused(base_name: &str, adapter: &Path) -> PeftError {
    let mut model = base(base_name);
    let before = parameters(&model);
    let error = model.load_adapter(DEFAULT_ADAPTER, adapter).unwrap_err();
    assert_eq!(parameters(&model), before);
    error
}

/// The message with its causes, without what changes from run to run.
fn text(error: &PeftError, directory: &Path) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!("\ncaused by: {error}"));
        cause = error.source();
    }
    text.replace(&directory.display().to_string(), "<directory>")
}

/// A copy of a case with another configuration and other keys.
fn changed(name: &str, config: &[(&str, Value)], key: impl Fn(&str) -> String) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    let mut json: Value = serde_json::from_slice(&std::fs::read(case(name).join(CONFIG)).unwrap()).unwrap();
    for (field, value) in config {
        json[*field] = value.clone();
    }
    std::fs::write(copy.path().join(CONFIG), json.to_string()).unwrap();
    let bytes = std::fs::read(case(name).join(TENSORS)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let renamed = file.tensors().into_iter().map(|(name, view)| (key(&name), view));
    std::fs::write(copy.path().join(TENSORS), safetensors::serialize(renamed, None).unwrap()).unwrap();
    copy
}

fn same(key: &str) -> String {
    key.to_string()
}

/// Numbers in the factors, so that an adapter does something.
fn fill<M: Module>(model: M) -> M {
    with_changed(model, |path, data| {
        let seed: usize = path.bytes().map(usize::from).sum();
        let value = |i: usize| (((i * 37 + seed * 11) % 101) as f32 / 101.0 - 0.5) * 0.6;
        let values = || (0..data.shape().num_elements()).map(value).collect::<Vec<f32>>();
        is_adapter(path).then(|| TensorData::new(values(), data.shape()))
    })
}

mod values {
    use super::*;

    #[test]
    fn adapters_load_with_pefts_logits() {
        for (name, base) in [
            ("a04-lookahead-regex", "base-untied"),
            ("a09-eva", "base-untied"),
            ("b01-default-in-keys", "base-untied"),
            ("b06-embedding-layers", "base-untied"),
            ("b18e-save-embed-tied", "base-tied"),
        ] {
            let directory = AdapterDirectory::open(case(name)).unwrap();
            assert!(directory.problems().is_empty(), "{name}: {:?}", directory.problems());
            assert_close(name, &logits(&adapted(base, &case(name))), &expected(name), FORWARD);
        }
    }

    #[test]
    fn a_saved_embedding_under_a_tied_output_layer_merges_to_what_it_computes() {
        let name = "b18e-save-embed-tied";
        let model = adapted("base-tied", &case(name));
        let mut merged = model.clone();
        merged.merge_and_unload().unwrap();
        assert_close("merged", &logits(&merged), &expected(name), FORWARD);
        assert!(!merged.config().tie_word_embeddings);

        let directory = tempfile::tempdir().unwrap();
        merged.save_pretrained(directory.path()).unwrap();
        let loaded = LlamaForCausalLm::from_pretrained(directory.path(), &Device::default()).unwrap();
        assert_close("saved and loaded", &logits(&loaded), &expected(name), FORWARD);

        let mut for_now = model;
        for_now.merge_adapter().unwrap();
        assert_close("merged for now", &logits(&for_now), &expected(name), FORWARD);
    }

    #[test]
    fn an_adapted_embedding_under_a_tied_output_layer_merges_to_what_it_computes() {
        let config = LoraConfig::new(3)
            .with_lora_alpha(7.0)
            .with_init_lora_weights(InitLoraWeights::Random)
            .with_target_modules(["embed_tokens", "q_proj"]);
        let mut model = base("base-tied");
        model.add_adapter("default", &config).unwrap();
        let exact = logits(&model);
        assert_different("adapted", &exact, &logits(&base("base-tied")));

        let mut for_now = model.clone();
        for_now.merge_adapter().unwrap();
        assert_close("merged for now", &logits(&for_now), &exact, REORDERED);
        let mut merged = model.clone();
        merged.merge_and_unload().unwrap();
        assert_close("merged", &logits(&merged), &exact, REORDERED);
        assert!(merged.adapters().is_empty() && merged.lm_head.is_some());
        // So it does from the state that is merged for now.
        for_now.merge_and_unload().unwrap();
        assert_close("merged twice", &logits(&for_now), &exact, REORDERED);

        // Code that knows of no output layer gets an error and not another model.
        let before = parameters(&model);
        let error = PeftModel::merge_and_unload(&mut model).unwrap_err();
        assert!(
            matches!(&error, PeftError::TiedOutput { parameters } if parameters == &["model.embed_tokens.weight"])
        );
        assert_eq!(parameters(&model), before);
        insta::assert_snapshot!(error.to_string());
        // Untied, or without the embedding, there is nothing to refuse.
        model.untie_lm_head();
        PeftModel::merge_and_unload(&mut model).unwrap();
        assert_close("untied before", &logits(&model), &exact, REORDERED);
        let mut model = base("base-tied");
        model.add_adapter("default", LoraConfig::new(2).with_target_modules(["q_proj"])).unwrap();
        model.merge_and_unload().unwrap();
        assert!(model.config().tie_word_embeddings && model.lm_head.is_none());
    }

    #[test]
    fn names_of_adapters_in_keys_are_left_out() {
        let exact = expected("b01-default-in-keys");
        let key = |key: &str| key.replace(".default.", ".mine.");
        let other = changed("b01-default-in-keys", &[], key);
        assert_close("another name", &logits(&adapted("base-untied", other.path())), &exact, FORWARD);
        assert!(AdapterDirectory::open(other.path()).unwrap().problems().is_empty());

        // Embeddings have the name at the end of the key, modules that are saved whole behind the name of a wrapper.
        let directory = tempfile::tempdir().unwrap();
        let mut model = base("base-untied");
        let config = LoraConfig::new(2).with_init_lora_weights(InitLoraWeights::Random);
        let config = config.with_target_modules(["embed_tokens"]).with_modules_to_save(["lm_head"]);
        model.add_adapter("default", &config).unwrap();
        let model = fill(model);
        model.save_adapter("default", directory.path()).unwrap();
        let bytes = std::fs::read(directory.path().join(TENSORS)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let named = |key: &str| match key {
            key if key.contains("lora_embedding") => format!("{key}.default"),
            key => key.replace("lm_head.weight", "lm_head.modules_to_save.default.weight"),
        };
        let renamed: Vec<(String, TensorView)> =
            file.tensors().into_iter().map(|(key, view)| (named(&key), view)).collect();
        assert!(renamed.iter().all(|(key, _)| key.contains("default")));
        std::fs::write(directory.path().join(TENSORS), safetensors::serialize(renamed, None).unwrap())
            .unwrap();
        let loaded = adapted("base-untied", directory.path());
        assert_eq!(logits(&loaded), logits(&model));
        let modules = AdapterDirectory::open(directory.path()).unwrap().modules().to_vec();
        assert!(modules.len() == 1 && modules[0].is_embedding(), "{modules:?}");
    }

    #[test]
    fn weights_of_the_base_beside_the_adapter_are_the_bases_own_and_not_another() {
        let directory = AdapterDirectory::open(case("b06-embedding-layers")).unwrap();
        let roles: BTreeSet<&str> = directory
            .tensors()
            .iter()
            .filter(|tensor| tensor.role == TensorRole::BaseLayer)
            .map(|tensor| &*tensor.module)
            .collect();
        assert_eq!(roles, BTreeSet::from(["lm_head", "model.embed_tokens"]));
        // The tied base has other weights in them.
        let error = refused("base-tied", &case("b06-embedding-layers"));
        assert!(error.to_string().contains("is not the weight of this model"), "{error}");

        // Under a tied output layer, PEFT writes the table twice.
        let table = "base_model.model.model.embed_tokens.weight";
        let bytes = std::fs::read(case("base-tied").join("model.safetensors")).unwrap();
        let weights = SafeTensors::deserialize(&bytes).unwrap();
        let embedding = weights.tensor("model.embed_tokens.weight").unwrap();
        let adapter = std::fs::read(case("b18e-save-embed-tied").join(TENSORS)).unwrap();
        let adapter = SafeTensors::deserialize(&adapter).unwrap();
        let factors = adapter.tensors().into_iter().filter(|(key, _)| key.contains("lora_"));
        let mut tensors: Vec<(String, TensorView)> = factors.collect();
        tensors.push((table.to_string(), embedding.clone()));
        tensors.push(("base_model.model.lm_head.weight".into(), embedding));
        let copy = changed("b18e-save-embed-tied", &[("modules_to_save", Value::Null)], same);
        std::fs::write(copy.path().join(TENSORS), safetensors::serialize(tensors, None).unwrap()).unwrap();
        adapted("base-tied", copy.path());
        assert!(AdapterDirectory::open(copy.path()).unwrap().problems().is_empty());
    }

    #[test]
    fn the_start_of_the_factors_does_not_matter_after_training() {
        let exact = expected("a09-eva");
        for start in ["orthogonal", "loftq", "mica"] {
            let loftq = json!({"loftq_bits": 4, "loftq_iter": 1});
            let config = [("init_lora_weights", json!(start)), ("loftq_config", loftq.clone())];
            let copy = changed("a09-eva", &config, same);
            let model = adapted("base-untied", copy.path());
            assert_close(start, &logits(&model), &exact, FORWARD);
            // It is written back as it was read.
            let again = tempfile::tempdir().unwrap();
            model.save_adapter(DEFAULT_ADAPTER, again.path()).unwrap();
            let json: Value =
                serde_json::from_slice(&std::fs::read(again.path().join(CONFIG)).unwrap()).unwrap();
            assert_eq!((&json["init_lora_weights"], &json["loftq_config"]), (&json!(start), &loftq));
            assert_eq!(json["eva_config"]["rho"], 2.0);
        }
        // But a new adapter cannot start like that here.
        let config = LoraConfig::from_pretrained(case("a09-eva")).unwrap();
        assert_eq!(config.init_lora_weights.to_string(), "eva");
        let error = base("base-untied").add_adapter("new", &config).unwrap_err().to_string();
        assert_eq!(
            error,
            "invalid `init_lora_weights`: expected a start that can be computed here; `eva`, `loftq` and `mica` only load trained adapters, found eva"
        );
        // What the caller sets takes the place of the file's word.
        let config = config.with_init_lora_weights(InitLoraWeights::Gaussian);
        base("base-untied").add_adapter("new", &config).unwrap();
    }

    #[test]
    fn ensure_weight_tying_counts_where_something_tied_is_adapted() {
        let tying = [("ensure_weight_tying", json!(true))];
        let copy = changed("b01-default-in-keys", &tying, same);
        let model = adapted("base-untied", copy.path());
        assert_close("tying", &logits(&model), &expected("b01-default-in-keys"), FORWARD);
        let again = tempfile::tempdir().unwrap();
        model.save_adapter(DEFAULT_ADAPTER, again.path()).unwrap();
        let json: Value = serde_json::from_slice(&std::fs::read(again.path().join(CONFIG)).unwrap()).unwrap();
        assert_eq!(json["ensure_weight_tying"], true);

        let copy = changed("b18e-save-embed-tied", &tying, same);
        let error = refused("base-tied", copy.path()).to_string();
        assert_eq!(
            error,
            "invalid `ensure_weight_tying`: expected false, or no target that is tied to the output layer, found true, \
             and `model.embed_tokens` among the targets"
        );
    }
}

mod refusals {
    use super::*;

    #[test]
    fn keys_that_all_begin_otherwise_are_told_as_one_cause() {
        let mut told = String::new();
        let mut tell = |title: &str, directory: &Path| {
            let error = refused("base-untied", directory);
            assert!(matches!(error, PeftError::KeyPrefix { .. }), "{title}: {error}");
            told.push_str(&format!("# {title}\n{}\n", text(&error, directory)));
            let alone = AdapterDirectory::open(directory).unwrap().problems();
            let alone: Vec<String> = alone.iter().map(|problem| text(problem, directory)).collect();
            told.push_str(&format!(
                "without a model: {}\n\n",
                alone.join("\n").lines().next().unwrap_or("nothing")
            ));
        };
        tell("no prefix", &case("b02-no-prefix"));
        let twice = changed("b02-no-prefix", &[], |key| format!("base_model.model.base_model.model.{key}"));
        tell("twice", twice.path());
        let compiled = changed("b02-no-prefix", &[], |key| format!("_orig_mod.base_model.model.{key}"));
        tell("torch.compile", compiled.path());
        let inside = changed("b02-no-prefix", &[], |key| format!("base_model.model.language_model.{key}"));
        tell("inside another model", inside.path());
        // Weights of the base beside the factors begin like them.
        let front = "base_model.model.";
        let compiled = changed("b06-embedding-layers", &[], |key| format!("_orig_mod.{key}"));
        tell("beside the base's weights", compiled.path());
        insta::assert_snapshot!(told);
        // Where only some keys lack the prefix, that is not how all begin: renaming would damage the others.
        let half = |key: &str| match key.contains("layers.0") {
            true => format!("{front}{key}"),
            false => key.to_string(),
        };
        let error = refused("base-untied", changed("b02-no-prefix", &[], half).path());
        assert!(matches!(error, PeftError::IncompatibleAdapter { .. }), "{error}");
    }

    #[test]
    fn what_does_not_fit_a_large_model_is_told_in_some_twenty_lines() {
        let device = Device::default();
        let config = LlamaConfig::new(32, 16, 32).with_heads(2, 2);
        let mut model = config.init(&device);
        model
            .add_adapter("default", LoraConfig::new(2).with_target_modules(TargetModules::AllLinear))
            .unwrap();
        let directory = tempfile::tempdir().unwrap();
        model.save_adapter("default", directory.path()).unwrap();
        let path = directory.path().join(TENSORS);
        let bytes = std::fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let renamed = |key: String| key.replace("mlp", "ffn");
        let tensors = file.tensors().into_iter().map(|(key, view)| (renamed(key), view));
        std::fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
        let error = config.init(&device).load_adapter("default", directory.path()).unwrap_err();
        let lines = text(&error, directory.path());
        assert!(lines.lines().count() <= 20, "{lines}");
        // The nearest name is one of the same layer.
        let named = "missing `base_model.model.model.layers.0.mlp.gate_proj.lora_A.weight` (closest: \
                     `base_model.model.model.layers.0.ffn.gate_proj.lora_A.weight`)";
        let PeftError::IncompatibleAdapter { problems, .. } = &error else { panic!("{error}") };
        assert!(problems.iter().any(|problem| problem.to_string() == named), "{lines}");
    }

    #[test]
    fn files_that_are_something_else_are_called_what_they_are() {
        let mut told = String::new();
        let mut tell = |title: &str, directory: &Path| {
            let error = refused("base-untied", directory);
            let alone = AdapterDirectory::open(directory).unwrap_err();
            assert_eq!(error.to_string(), alone.to_string());
            told.push_str(&format!("# {title}\n{}\n\n", text(&error, directory)));
        };
        tell("git-LFS pointer", &case("b10-lfs-pointer"));
        tell("mlx-lm", &case("b13-mlx"));
        let with = |name: &str, bytes: &[u8]| {
            let copy = changed("b02-no-prefix", &[], same);
            std::fs::write(copy.path().join(name), bytes).unwrap();
            copy
        };
        let pointer = std::fs::read(case("b10-lfs-pointer").join(TENSORS)).unwrap();
        tell("a pointer for a configuration", with(CONFIG, &pointer).path());
        tell("a web page", with(TENSORS, b"<!DOCTYPE html>\n<html><title>Log in</title>").path());
        tell("a pickle", with(TENSORS, b"PK\x03\x04 archive/data.pkl").path());
        tell("an empty file", with(TENSORS, b"").path());
        tell("neither", with(TENSORS, &[0xff; 64]).path());
        tell("AdapterHub", with(CONFIG, br#"{"config": {}, "hidden_size": 8, "model_class": "X"}"#).path());
        tell("an answer", with(CONFIG, br#"{"error": "Repository not found"}"#).path());
        tell("a model's configuration", with(CONFIG, br#"{"model_type": "llama", "hidden_size": 8}"#).path());
        tell("a whole model", &case("base-tied"));
        let parent = tempfile::tempdir().unwrap();
        std::fs::create_dir(parent.path().join("mine")).unwrap();
        std::fs::copy(case("a09-eva").join(CONFIG), parent.path().join("mine").join(CONFIG)).unwrap();
        tell("its parent", parent.path());
        let mlx = tempfile::tempdir().unwrap();
        std::fs::write(mlx.path().join("adapters.safetensors"), b"").unwrap();
        tell("mlx-lm without a configuration", mlx.path());
        tell("no directory", &parent.path().join("absent"));
        insta::assert_snapshot!(told);
    }

    #[test]
    fn keys_of_two_adapters_in_one_file_are_refused() {
        let copy = changed("b01-default-in-keys", &[], |key| {
            if key.contains("layers.0") { key.replace(".default.", ".other.") } else { key.to_string() }
        });
        let error = refused("base-untied", copy.path());
        assert!(matches!(error, PeftError::NoAdapter { .. }));
        assert!(error.to_string().contains("several adapters, `default`, `other`"), "{error}");

        let copy = changed("b01-default-in-keys", &[], |key| {
            if key.contains("layers.0.self_attn.q_proj.lora_A") {
                "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight".into()
            } else {
                key.to_string()
            }
        });
        let error = refused("base-untied", copy.path()).to_string();
        assert!(error.contains("with the name of an adapter and without it"), "{error}");
    }

    #[test]
    fn settings_that_no_peft_has_can_be_deleted_and_others_cannot() {
        let error = refused("base-untied", &case("a11-unknown-value"));
        insta::assert_snapshot!(text(&error, &case("a11-unknown-value")));
        let cleared =
            [("unsloth_fixed", json!(false)), ("lora_dtype", Value::Null), ("use_unsloth", Value::Null)];
        let copy = changed("a11-unknown-value", &cleared, same);
        let mut model = base("base-untied");
        let report = model.load_adapter(DEFAULT_ADAPTER, copy.path()).unwrap();
        assert_eq!(report.ignored_keys, ["unsloth_fixed", "lora_dtype", "use_unsloth"]);
        assert_close("a11", &logits(&model), &expected("a11-unknown-value"), FORWARD);
        for (start, part) in
            [("pissa_niter_4", "changed the base"), ("corda", "changed the base"), ("magic", "no such start")]
        {
            let copy = changed("a09-eva", &[("init_lora_weights", json!(start))], same);
            let error = refused("base-untied", copy.path()).to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_broken_expression_is_one_on_every_base() {
        let broken = || LoraConfig::new(2).with_target_modules(TargetModules::Regex(".*(lm_head".into()));
        for name in ["base-tied", "base-untied"] {
            let error = base(name).add_adapter("default", broken()).unwrap_err();
            assert_eq!(error.to_string(), "invalid regular expression `.*(lm_head`");
        }
        // One that only excludes the output layer asks for none.
        let excluding = r"^(?!.*lm_head).*\.q_proj";
        let config = LoraConfig::new(2).with_target_modules(TargetModules::Regex(excluding.into()));
        base("base-tied").add_adapter("default", &config).unwrap();
    }
}

mod reports {
    use super::*;

    #[test]
    fn layers_without_a_target_and_patterns_without_a_module_are_told() {
        let directory = tempfile::tempdir().unwrap();
        let mut model = LlamaConfig::new(32, 16, 12).with_heads(2, 2).init(&Device::default());
        let config = LoraConfig::new(2)
            .with_target_modules(TargetModules::Regex(r".*\.(q_proj|\d*[02468]\.self_attn\.v_proj)".into()))
            .with_rank_pattern([("q_proj", 4), ("k_proj", 3)])
            .with_alpha_pattern([(r"layers\.99\..*", 1.0)]);
        let report = model.add_adapter("default", &config).unwrap();
        assert_eq!(report.unmatched_rank_patterns, ["k_proj"]);
        assert_eq!(report.unmatched_alpha_patterns, [r"layers\.99\..*"]);
        assert_eq!(
            report.to_string(),
            "adapter `default`: 18 modules adapted (self_attn.q_proj 12, self_attn.v_proj 6); no adapted module matches \
             the `rank_pattern` k_proj; no adapted module matches the `alpha_pattern` layers\\.99\\..*"
        );
        // What was loaded tells the same.
        model.save_adapter("default", directory.path()).unwrap();
        model.unload().unwrap();
        let loaded = model.load_adapter("default", directory.path()).unwrap();
        assert_eq!(loaded.injection, report);
    }

    #[test]
    fn a_layer_that_lacks_a_target_shows() {
        use burn::nn::{Linear, LinearConfig};
        use burn_peft::LoraLinear;

        #[derive(Module, Debug)]
        struct Layer {
            q_proj: LoraLinear,
            v_proj: Option<Linear>,
        }
        #[derive(Module, Debug)]
        struct Net {
            layers: Vec<Layer>,
        }
        let device = Device::default();
        let linear = || LinearConfig::new(4, 4).init(&device);
        let lacks = |i: usize| [5, 7, 8, 9, 29].contains(&i);
        let layer = |i| Layer { q_proj: linear().into(), v_proj: (!lacks(i)).then(linear) };
        let net = Net { layers: (0..30).map(layer).collect() };
        let mut model = WithStack { model: net };
        #[derive(Module, Debug)]
        struct WithStack {
            model: Net,
        }
        let config = LoraConfig::new(2).with_target_modules(["q_proj", "v_proj"]);
        let report = model.clone().add_adapter("default", &config).unwrap();
        assert_eq!(report.coverage[1].missing_layers, [5, 7, 8, 9, 29]);
        assert!(
            report.to_string().contains("(q_proj 30, v_proj 25 of 30, not in layers 5, 7-9, 29)"),
            "{report}"
        );
        // Only what was asked for is missing.
        let some = config.clone().with_layers_to_transform([4, 5, 6]);
        let report = model.clone().add_adapter("default", &some).unwrap();
        assert!(report.to_string().contains("(q_proj 3, v_proj 2 of 3, not in layers 5)"), "{report}");
        let without = config.with_exclude_modules(TargetModules::Regex(r".*\.[5-9]\..*".into()));
        let report = model.add_adapter("default", &without).unwrap();
        assert!(report.to_string().contains("(q_proj 25, v_proj 24 of 25, not in layers 29)"), "{report}");
    }

    /// What is in `target_modules` of the file.
    fn written(model: &LlamaForCausalLm) -> (Value, TempDir) {
        let directory = tempfile::tempdir().unwrap();
        model.save_adapter("default", directory.path()).unwrap();
        let json: Value =
            serde_json::from_slice(&std::fs::read(directory.path().join(CONFIG)).unwrap()).unwrap();
        (json["target_modules"].clone(), directory)
    }

    #[test]
    fn long_lists_of_targets_are_written_short() {
        let names = |modules: &[&str]| -> Vec<String> {
            let of_layer = |i| modules.iter().map(move |module| format!("model.layers.{i}.{module}"));
            (0..10).flat_map(of_layer).collect()
        };
        let base = || LlamaConfig::new(32, 16, 10).with_heads(2, 2).init(&Device::default());
        let check = |config: LoraConfig, expected: Value| {
            let mut model = base();
            model.add_adapter("default", &config).unwrap();
            let model = fill(model);
            let (targets, directory) = written(&model);
            assert_eq!(targets, expected);
            // And the file means the same modules.
            let mut again = base();
            again.load_adapter("default", directory.path()).unwrap();
            let adapters = |model: &LlamaForCausalLm| {
                let mut all = parameters(model);
                all.retain(|path, _| is_adapter(path));
                all
            };
            assert_eq!(adapters(&again), adapters(&model));
        };
        let lora = || LoraConfig::new(2);
        let all = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"];
        check(lora().with_target_modules(TargetModules::AllLinear), json!(all));
        let listed = names(&["self_attn.q_proj", "self_attn.v_proj"]);
        check(
            lora().with_target_modules(listed.iter().cloned().collect::<TargetModules>()),
            json!(["q_proj", "v_proj"]),
        );
        // Nineteen are written as they are.
        let some: Vec<String> = listed[..19].to_vec();
        check(lora().with_target_modules(some.iter().cloned().collect::<TargetModules>()), json!(some));
        // Not all of a kind: no end of a name will do for that kind.
        let listed = names(&["self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"]);
        let most: Vec<String> =
            listed.iter().filter(|name| *name != "model.layers.3.self_attn.v_proj").cloned().collect();
        // The shortest ends that no other module has, as PEFT chooses them: `0.self_attn.v_proj` and so on.
        let of_layer = |i: usize| format!("{i}.self_attn.v_proj");
        let mut expected: Vec<String> = (0..10).filter(|i| *i != 3).map(of_layer).collect();
        expected.extend(["k_proj".to_string(), "q_proj".to_string()]);
        check(lora().with_target_modules(most.iter().cloned().collect::<TargetModules>()), json!(expected));
        // A full name is matched in every layer, and its end is not.
        let filtered = lora()
            .with_target_modules(listed.iter().cloned().collect::<TargetModules>())
            .with_layers_to_transform([1, 2]);
        check(filtered, json!(listed.iter().collect::<BTreeSet<_>>()));
        let excluding = lora().with_target_modules(TargetModules::AllLinear).with_exclude_modules(["o_proj"]);
        check(excluding, json!(all));
    }
}

mod subsets {
    use super::*;

    /// Two adapters, active together, one of them with rsLoRA; on plain and activation-space layers alike.
    fn two() -> LlamaForCausalLm {
        let mut model = base("base-untied");
        let one = LoraConfig::new(3).with_lora_alpha(7.0).with_target_modules([
            "q_proj",
            "down_proj",
            "embed_tokens",
        ]);
        let two = LoraConfig::new(4).with_lora_alpha(3.0).with_use_rslora(true);
        model.add_adapter("one", &one).unwrap();
        model.add_adapter("two", two.with_target_modules(["q_proj", "v_proj", "embed_tokens"])).unwrap();
        let mut model = fill(model);
        model.set_adapter(&["one", "two"]).unwrap();
        model
    }

    #[test]
    fn of_two_active_adapters_one_is_merged_and_the_other_works_beside_it() {
        let model = two();
        let (both, mut alone) = (logits(&model), model.clone());
        alone.set_adapter(&["one"]).unwrap();
        assert_different("one of two", &logits(&alone), &both);
        for name in ["one", "two"] {
            let mut merged = model.clone();
            let report = merged.merge_adapters(&[name]).unwrap();
            assert_eq!(report.parameters.len(), 5, "{report:?}");
            let states: Vec<(bool, bool)> =
                merged.adapters().iter().map(|status| (status.active, status.merged)).collect();
            assert_eq!(states, [(true, name == "one"), (true, name == "two")]);
            assert_close(name, &logits(&merged), &both, REORDERED);
            // The other one is still there to be merged, and both can be taken off again.
            let mut all = merged.clone();
            all.merge_adapters(&[if name == "one" { "two" } else { "one" }]).unwrap();
            assert!(all.adapters().iter().all(|status| status.merged));
            assert_close("both, one after the other", &logits(&all), &both, REORDERED);
            let mut at_once = model.clone();
            at_once.merge_adapter().unwrap();
            assert_eq!(logits(&at_once), logits(&all));
            merged.unmerge_adapter().unwrap();
            assert_eq!((parameters(&merged), logits(&merged)), (parameters(&model), both.clone()));
            // For good, too.
            all.merge_and_unload().unwrap();
            assert_close("for good", &logits(&all), &both, REORDERED);
        }
    }

    #[test]
    fn what_cannot_be_merged_apart_is_refused() {
        let mut model = two();
        model.set_adapter(&["one"]).unwrap();
        assert!(
            matches!(model.merge_adapters(&["two"]), Err(PeftError::InactiveAdapter { name }) if name == "two")
        );
        assert!(matches!(model.merge_adapters(&["three"]), Err(PeftError::InactiveAdapter { .. })));
        let saving = LoraConfig::new(2).with_target_modules(["v_proj"]).with_modules_to_save(["down_proj"]);
        model.add_adapter("saving", &saving).unwrap();
        model.set_adapter(&["one", "saving"]).unwrap();
        let error = model.merge_adapters(&["one"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "adapter `one` cannot be merged without `saving`, which has a trained copy of \
             `model.layers.0.mlp.down_proj.weight`\nhint: merge both"
        );
        model.merge_adapters(&["saving"]).unwrap();
        model.merge_adapters(&["one", "saving"]).unwrap();
        assert!(model.adapters().iter().all(|status| status.merged == status.active));
    }
}
