//! Adapters as plain LoRA of another rank, and scales after the fact.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};
use burn_peft::{LoraConfig, LoraRank, PeftError, PeftModel};
use burn_peft_llama::PaddingSide;
use burn_peft_tests::fixture::{Fixture, directory, read_file, read_json};
use burn_peft_tests::tolerance::{COMBINED, REORDERED, assert_close, assert_different};
use serde::Deserialize;

use crate::common::{load_adapted, load_base, masked_logits};

#[derive(Deserialize)]
struct Conversion {
    name: String,
    case: String,
    rank: f64,
    ranks: BTreeMap<String, usize>,
}

/// Of plain LoRA the updates and ranks are those of peft. Of DoRA peft converts the factors alone; here the whole change is.
#[test]
fn the_closest_update_of_the_rank_is_that_of_peft() {
    let conversions = read_json(&directory("converted").join("expected.json"))["conversions"].clone();
    let conversions: Vec<Conversion> = serde_json::from_value(conversions).unwrap();
    let stored = read_file(&directory("converted").join("expected.safetensors"));
    let device = Device::default();
    device.seed(2);
    for Conversion { name, case, rank, ranks } in conversions {
        let mut model = load_adapted(&Fixture::open(&case), &device);
        let rank = if rank < 1.0 { LoraRank::Share(rank) } else { LoraRank::Exactly(rank as usize) };
        let report = model.convert_to_lora("plain", "default", rank).unwrap();
        let is_dora = case.contains("dora");
        let found: BTreeMap<String, usize> =
            report.modules.iter().map(|module| (module.path.clone(), module.r.unwrap())).collect();
        assert!(is_dora || found == ranks, "{name}: {found:?}, peft has {ranks:?}");

        let directory = tempfile::tempdir().unwrap();
        model.save_adapter("plain", directory.path()).unwrap();
        model.unload().unwrap();
        model.load_adapter("default", directory.path()).unwrap();
        for module in found.keys() {
            let update = super::update(&model, module, 1.0);
            let key = format!("{name}.delta.{module}");
            if !is_dora {
                assert_close(&key, &update, &stored[&key], COMBINED);
                continue;
            }
            // What is left is no more than the share that was allowed, of the true change.
            let change = &stored[&format!("{case}.change.{module}")];
            let norm = |data: &mut dyn Iterator<Item = f64>| data.map(|x| x * x).sum::<f64>();
            let left = norm(&mut change.iter::<f64>().zip(update.iter::<f64>()).map(|(a, b)| a - b));
            let whole = norm(&mut change.iter::<f64>());
            if let LoraRank::Share(share) = rank {
                assert!(left <= (1.0 - share) * whole * 1.001, "{key}: {left} of {whole}");
            }
            assert!(left < 0.9 * whole, "{key}: {left} of {whole}");
        }
    }
}

#[test]
fn a_conversion_of_full_rank_computes_what_the_adapter_does() {
    let device = Device::default();
    for case in ["gqa-tied-dora", "mha-biased-tokens", "mha-biased-dora-embedding"] {
        let fixture = Fixture::open(case);
        let mut model = load_adapted(&fixture, &device);
        let batch = fixture.batch(PaddingSide::Right, &device);
        let expected = masked_logits(&model, &batch);
        model.convert_to_lora("plain", "default", LoraRank::Share(1.0)).unwrap();
        model.set_adapter(&["plain"]).unwrap();
        let found = masked_logits(&model, &batch);
        assert_close(case, &found, &expected, REORDERED);
        assert_different(case, &found, &masked_logits(&model.without_adapters().unwrap(), &batch));
    }
}

#[test]
fn what_is_more_than_changes_of_weights_is_refused() {
    for case in ["mha-biased-bias-all", "mha-biased-save-head", "mha-biased-lora-bias", "gqa-tied-tokens"] {
        let mut model = load_adapted(&Fixture::open(case), &Device::default());
        let error = model.convert_to_lora("plain", "default", 2).unwrap_err();
        assert!(matches!(error, PeftError::CannotConvert { .. }), "{case}: {error}");
        assert_eq!(model.adapters().len(), 1);
    }
    let mut model = load_adapted(&Fixture::open("gqa-tied-qv"), &Device::default());
    for rank in [LoraRank::Exactly(0), LoraRank::Share(0.0), LoraRank::Share(1.5)] {
        let error = model.convert_to_lora("plain", "default", rank).unwrap_err();
        assert!(matches!(error, PeftError::InvalidConfig { field: "rank", .. }), "{error}");
    }
}

#[test]
fn a_scale_multiplies_the_configured_scaling_once_and_is_saved() {
    let device = Device::default();
    let fixture = Fixture::open("gqa-tied-dora");
    let batch = fixture.batch(PaddingSide::Right, &device);
    let mut model = load_adapted(&fixture, &device);
    let before = masked_logits(&model, &batch);
    model.set_scale("default", 3.0).unwrap();
    model.set_scale("default", 2.0).unwrap();
    let scaled = masked_logits(&model, &batch);
    assert_different("scaled", &scaled, &before);

    let directory = tempfile::tempdir().unwrap();
    model.save_adapter("default", directory.path()).unwrap();
    let config = LoraConfig::from_pretrained(directory.path()).unwrap();
    let own = LoraConfig::from_pretrained(&fixture.directory).unwrap();
    assert_eq!(config.lora_alpha, 2.0 * own.lora_alpha);
    let mut again = load_base("gqa-tied", &device);
    again.load_adapter("default", directory.path()).unwrap();
    assert_eq!(masked_logits(&again, &batch), scaled);

    model.set_scale("default", 1.0).unwrap();
    assert_eq!(masked_logits(&model, &batch), before);
    assert!(matches!(model.set_scale("default", f64::NAN), Err(PeftError::InvalidConfig { .. })));
    assert!(matches!(model.set_scale("other", 1.0), Err(PeftError::UnknownAdapter { .. })));
    model.merge_adapter().unwrap();
    assert!(matches!(model.set_scale("default", 1.0), Err(PeftError::MergedAdapter { .. })));
}

#[test]
fn tensors_can_be_reached_with_their_graph() {
    let device = Device::default().autodiff();
    let model = load_adapted(&Fixture::open("gqa-tied-dora"), &device);
    let tensors = model.adapter_tensors("default").unwrap();
    assert_eq!(tensors.len(), 18);
    let magnitudes = tensors.iter().filter(|tensor| tensor.name == "magnitude");
    let penalty =
        magnitudes.fold(Tensor::<1>::zeros([1], &device), |sum, tensor| sum + tensor.tensor.clone().sum());
    let gradients = penalty.backward();
    for tensor in &tensors {
        let gradient = tensor.tensor.grad(&gradients).map(|gradient| gradient.into_data());
        let ones = (tensor.name == "magnitude").then(|| {
            let dims = tensor.tensor.dims();
            TensorData::new(vec![1.0f32; dims[0] * dims[1]], dims)
        });
        assert_eq!(gradient, ones, "{}", tensor.path);
    }
}
