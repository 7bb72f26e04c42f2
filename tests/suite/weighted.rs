//! Combinations of adapters are those that peft's `add_weighted_adapter` makes.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::nn::{Embedding, Linear, LinearConfig};
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft::{
    CombinationType, InitLoraWeights, LoraConfig, LoraEmbedding, LoraLinear, MajoritySign, PeftError,
    PeftModel,
};
use burn_peft_tests::fixture::{directory, read_facts, read_file, write_adapter};
use burn_peft_tests::parameters::{parameters, transposed};
use burn_peft_tests::tolerance::{COMBINED, FORWARD, assert_close};
use serde::Deserialize;
use serde_json::json;

/// Adapters work on activations.
#[derive(Module, Debug)]
struct Wrapped {
    embed: LoraEmbedding,
    linear: LoraLinear,
}

/// Adapters work through the weights.
#[derive(Module, Debug)]
struct Plain {
    embed: Embedding,
    linear: Linear,
}

/// `weighted/expected.json`.
#[derive(Deserialize)]
struct Facts {
    sources: Vec<Source>,
    combinations: Vec<Combination>,
}

#[derive(Deserialize)]
struct Source {
    name: String,
    r: usize,
    lora_alpha: f64,
    use_rslora: bool,
    scaling: f64,
}

#[derive(Deserialize)]
struct Combination {
    name: String,
    r: usize,
    combination_type: String,
    adapters: Vec<String>,
    weights: Vec<f64>,
    density: Option<f64>,
    svd_rank: Option<usize>,
    majority_sign_method: String,
}

impl Combination {
    fn kind(&self) -> CombinationType {
        let majority_sign = match &*self.majority_sign_method {
            "total" => MajoritySign::Total,
            "frequency" => MajoritySign::Frequency,
            other => panic!("unknown method {other}"),
        };
        let (density, rank) = (self.density.unwrap_or(f64::NAN), self.svd_rank);
        match &*self.combination_type {
            "cat" => CombinationType::Cat,
            "linear" => CombinationType::Linear,
            "svd" => CombinationType::Svd { rank },
            "ties" => CombinationType::Ties { density, majority_sign },
            "ties_svd" => CombinationType::TiesSvd { density, majority_sign, rank },
            "magnitude_prune" => CombinationType::MagnitudePrune { density },
            other => panic!("unknown kind {other}"),
        }
    }

    fn sources(&self) -> Vec<(&str, f64)> {
        self.adapters.iter().map(String::as_str).zip(self.weights.iter().copied()).collect()
    }
}

/// The facts, and the tensors by name.
fn truth() -> (Facts, BTreeMap<String, TensorData>) {
    let directory = directory("weighted");
    (read_facts(&directory), read_file(&directory.join("expected.safetensors")))
}

/// The two layers with weights of zero, so that merged weights are the updates themselves.
fn layers(device: &Device) -> (Embedding, Linear) {
    let zeros = |shape: [usize; 2]| Param::from_tensor(Tensor::zeros(shape, device));
    (Embedding { weight: zeros([9, 6]) }, Linear { weight: zeros([6, 11]), bias: None })
}

fn wrapped(device: &Device) -> Wrapped {
    let (embed, linear) = layers(device);
    Wrapped { embed: embed.into(), linear: linear.into() }
}

fn plain(device: &Device) -> Plain {
    let (embed, linear) = layers(device);
    Plain { embed, linear }
}

/// Loads every source from files.
fn with_sources<M: PeftModel>(mut model: M, facts: &Facts, tensors: &BTreeMap<String, TensorData>) -> M {
    for source in &facts.sources {
        let keys = [
            ("embed.lora_A", "embed.lora_embedding_A"),
            ("embed.lora_B", "embed.lora_embedding_B"),
            ("linear.lora_A", "linear.lora_A.weight"),
            ("linear.lora_B", "linear.lora_B.weight"),
        ];
        let stored = keys.map(|(name, key)| {
            (format!("base_model.model.{key}"), tensors[&format!("{}.{name}", source.name)].clone())
        });
        let config = json!({
            "peft_type": "LORA",
            "target_modules": ["embed", "linear"],
            "r": source.r,
            "lora_alpha": source.lora_alpha,
            "use_rslora": source.use_rslora,
        });
        let directory = tempfile::tempdir().unwrap();
        write_adapter(directory.path(), &config, &stored.into());
        model.load_adapter(&source.name, directory.path()).unwrap();
        let status = model.adapters().into_iter().find(|status| status.name == source.name).unwrap();
        assert_eq!(status.config.as_lora().unwrap().scaling(), source.scaling);
    }
    model
}

/// What one adapter does to both weights, in torch's layout.
fn deltas<M: PeftModel>(model: &M, adapter: &str) -> [(&'static str, TensorData); 2] {
    let mut merged = model.clone();
    merged.set_adapter(&[adapter]).unwrap();
    merged.merge_and_unload().unwrap();
    let merged = parameters(&merged);
    [("embed", merged["embed.weight"].clone()), ("linear", transposed(&merged["linear.weight"]))]
}

fn check<M: PeftModel>(model: M, label: &str) {
    let (facts, tensors) = truth();
    let model = with_sources(model, &facts, &tensors);
    for Source { name, .. } in &facts.sources {
        for (layer, delta) in deltas(&model, name) {
            assert_close(
                &format!("{name} {layer}"),
                &delta,
                &tensors[&format!("{name}.{layer}.delta")],
                FORWARD,
            );
        }
    }
    assert_eq!(facts.combinations.len(), 18);
    for combination in &facts.combinations {
        let mut model = model.clone();
        let name = &*combination.name;
        let before = parameters(&model);
        let report = model.add_weighted_adapter(name, &combination.sources(), combination.kind()).unwrap();
        assert_eq!(report.modules.len(), 2, "{name}");
        assert!(report.modules.iter().all(|module| module.r == Some(combination.r)), "{name}: {report:?}");
        let status = model.adapters().into_iter().find(|status| status.name == name).unwrap();
        assert_eq!(status.config.as_lora().unwrap().scaling(), 1.0, "{name}");
        assert!(!status.active, "{name}");

        let after = parameters(&model);
        assert!(before.iter().all(|(path, data)| after[path] == *data), "{name}: a source has changed");
        let factor = after[&format!("linear.weight.peft.{name}.a")].shape().to_vec();
        assert_eq!(factor, [6, combination.r], "{name}");
        for (layer, delta) in deltas(&model, name) {
            let expected = &tensors[&format!("{name}.{layer}.delta")];
            let deviation = assert_close(&format!("{name} {layer}"), &delta, expected, COMBINED);
            println!("{label}, {name}: {layer} deviates by {deviation:.1e}");
        }
    }
}

#[test]
fn combinations_in_activation_space_are_those_of_peft() {
    for device in [Device::default(), Device::default().autodiff()] {
        check(wrapped(&device), "activation space");
    }
}

#[test]
fn combinations_in_weight_space_are_those_of_peft() {
    for device in [Device::default(), Device::default().autodiff()] {
        check(plain(&device), "weight space");
    }
}

#[test]
fn unequal_ranks_are_refused_by_every_kind_that_merges_factors() {
    let (facts, tensors) = truth();
    let majority_sign = MajoritySign::Total;
    for kind in [
        CombinationType::Linear,
        CombinationType::Ties { density: 0.4, majority_sign },
        CombinationType::DareLinear { density: 0.4 },
        CombinationType::DareTies { density: 0.4, majority_sign },
        CombinationType::MagnitudePrune { density: 0.4 },
    ] {
        let mut model = with_sources(wrapped(&Device::default()), &facts, &tensors);
        let before = (parameters(&model), model.adapters());
        let sources = [("first", -0.6), ("narrow", 1.2)];
        let error = model.add_weighted_adapter("mixed", &sources, kind).unwrap_err();
        let PeftError::UnequalRanks { combination_type, ranks } = &error else { panic!("{error}") };
        assert_eq!((*combination_type, &ranks[..]), (kind, &[4, 3][..]));
        assert_eq!((parameters(&model), model.adapters()), before);
    }
}

#[test]
fn only_modules_of_the_sources_are_adapted_whatever_their_names_end_with() {
    #[derive(Module, Debug)]
    struct Inner {
        q: LoraLinear,
    }
    #[derive(Module, Debug)]
    struct Outer {
        q: LoraLinear,
        z: Inner,
    }
    let device = Device::default();
    let layer = || LoraLinear::from(LinearConfig::new(4, 3).init(&device));
    let mut model = Outer { q: layer(), z: Inner { q: layer() } };
    let config = LoraConfig::new(2)
        .with_init_lora_weights(InitLoraWeights::Random)
        .with_target_modules(["q"])
        .with_exclude_modules(["z.q"]);
    model.add_adapter("a", &config).unwrap();
    model.add_adapter("b", &config).unwrap();
    let report = model.add_weighted_adapter("both", &[("a", 1.0), ("b", 0.0)], CombinationType::Cat).unwrap();
    let paths: Vec<&str> = report.modules.iter().map(|module| &*module.path).collect();
    assert_eq!(paths, ["q"]);
}
