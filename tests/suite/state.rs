//! What changes and what does not: gradients, base weights, switches, records, merging and unloading.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Distribution, Tensor, TensorData};
use burn_peft::{InitLoraWeights, LoraConfig, LoraLinear, PeftModel, TargetModules};
use burn_peft_llama::{Batch, LlamaForCausalLm, PaddingSide};
use burn_peft_tests::fixture::Fixture;
use burn_peft_tests::parameters::{base_parameters, gradients, is_adapter, parameters};
use burn_peft_tests::tolerance::{REORDERED, assert_close, assert_different};

use crate::common::{adamw, load_base, masked_logits};

const BASE: &str = "mha-biased";

fn all_linear() -> LoraConfig {
    LoraConfig::new(3).with_lora_alpha(5.0).with_target_modules(TargetModules::AllLinear)
}

fn random(targets: [&str; 2]) -> LoraConfig {
    LoraConfig::new(2)
        .with_lora_alpha(3.0)
        .with_target_modules(targets)
        .with_init_lora_weights(InitLoraWeights::Random)
}

fn batch(device: &Device) -> Batch {
    Fixture::open(BASE).batch(PaddingSide::Left, device)
}

fn step(
    model: LlamaForCausalLm,
    batch: &Batch,
    optimizer: &mut burn::optim::ModuleOptimizer,
) -> (LlamaForCausalLm, BTreeMap<String, TensorData>) {
    let found = GradientsParams::from_grads(model.loss(batch).backward(), &model);
    let by_path = gradients(&model, &found);
    (optimizer.step(1e-2, model, found), by_path)
}

fn is_zero(data: &TensorData) -> bool {
    data.iter::<f32>().all(|value| value == 0.0)
}

#[test]
fn only_adapters_get_gradients_and_every_one_of_them_does() {
    let device = Device::default().autodiff();
    let mut model = load_base(BASE, &device);
    model.add_adapter("default", all_linear().with_lora_dropout(0.1)).unwrap();
    let (batch, mut optimizer) = (batch(&device), adamw(0.0));

    let paths: Vec<String> = parameters(&model).into_keys().filter(|path| is_adapter(path)).collect();
    assert_eq!(paths.len(), 2 * 2 * 7);
    let (model, first) = step(model, &batch, &mut optimizer);
    assert_eq!(first.keys().cloned().collect::<Vec<_>>(), paths);
    // B starts at zero, and A is reached only through it.
    assert!(first.iter().all(|(path, gradient)| is_zero(gradient) == path.ends_with(".a")));
    let (_, second) = step(model, &batch, &mut optimizer);
    assert_eq!(second.keys().cloned().collect::<Vec<_>>(), paths);
    assert!(second.values().all(|gradient| !is_zero(gradient)));
}

#[test]
fn training_leaves_every_bit_of_the_base() {
    let device = Device::default().autodiff();
    let mut model = load_base(BASE, &device);
    let before = parameters(&model);
    model.add_adapter("default", all_linear().with_lora_dropout(0.2)).unwrap();
    let fresh = parameters(&model);
    let (batch, mut optimizer) = (batch(&device), adamw(0.1));
    for _ in 0..4 {
        model = step(model, &batch, &mut optimizer).0;
    }
    assert_eq!(base_parameters(&model), before);
    let trained = parameters(&model);
    assert!(fresh.iter().filter(|(path, _)| is_adapter(path)).all(|(path, factor)| trained[path] != *factor));

    model.unload().unwrap();
    assert_eq!(parameters(&model), before);
    assert_eq!(masked_logits(&model, &batch), masked_logits(&load_base(BASE, &device), &batch));
}

#[test]
fn a_fresh_adapter_changes_nothing() {
    let device = Device::default();
    let mut model = load_base(BASE, &device);
    let before = masked_logits(&model, &batch(&device));
    model.add_adapter("default", all_linear()).unwrap();
    assert_eq!(masked_logits(&model, &batch(&device)), before);
}

#[test]
fn dropout_acts_in_training_and_not_in_validation() {
    let device = Device::default().autodiff();
    let mut model = load_base(BASE, &device);
    let config = random(["q_proj", "up_proj"]).with_lora_dropout(0.5);
    model.add_adapter("default", &config).unwrap();
    let batch = batch(&device);
    assert_different("two passes", &masked_logits(&model, &batch), &masked_logits(&model, &batch));

    let (valid, batch) = (model.valid(), self::batch(&Device::default()));
    assert_eq!(masked_logits(&valid, &batch), masked_logits(&valid, &batch));
}

#[test]
fn validation_and_back_keeps_values_and_what_is_trained() {
    let device = Device::default().autodiff();
    let mut model = load_base(BASE, &device);
    model.add_adapter("default", random(["q_proj", "down_proj"])).unwrap();
    let plain = batch(&Device::default());
    let valid = model.valid();
    assert_close("valid", &masked_logits(&valid, &plain), &masked_logits(&model, &batch(&device)), REORDERED);
    assert_eq!(valid.trainable_parameters(), model.trainable_parameters());

    let again = valid.train();
    assert_eq!(parameters(&again), parameters(&model));
    assert_eq!(again.adapters(), model.adapters());
    let (_, expected) = step(model, &batch(&device), &mut adamw(0.0));
    let (_, found) = step(again, &batch(&device), &mut adamw(0.0));
    assert_eq!(found, expected);
}

#[test]
fn records_carry_adapters_into_a_model_of_the_same_structure() {
    let device = Device::default();
    let adapted = || {
        let mut model = load_base(BASE, &device);
        model.add_adapter("default", random(["q_proj", "gate_proj"])).unwrap();
        model
    };
    let (source, target) = (adapted(), adapted());
    assert_ne!(parameters(&source), parameters(&target));
    let expected = masked_logits(&source, &batch(&device));
    assert_different("other factors", &masked_logits(&target, &batch(&device)), &expected);

    let values = parameters(&source);
    let target = target.load_record(source.into_record());
    assert_eq!(parameters(&target), values);
    assert_eq!(masked_logits(&target, &batch(&device)), expected);
}

#[test]
fn adapters_are_switched_summed_and_disabled() {
    let device = Device::default();
    let batch = batch(&device);
    let mut model = load_base(BASE, &device);
    let base = masked_logits(&model, &batch);
    model.add_adapter("one", random(["q_proj", "up_proj"])).unwrap();
    model.add_adapter("two", random(["v_proj", "up_proj"])).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let alone = |name: &str| {
        let path = directory.path().join(name);
        model.save_adapter(name, &path).unwrap();
        let mut alone = load_base(BASE, &device);
        alone.load_adapter(name, &path).unwrap();
        masked_logits(&alone, &batch)
    };
    let (one, two) = (alone("one"), alone("two"));

    let active: Vec<(String, bool)> =
        model.adapters().into_iter().map(|status| (status.name, status.active)).collect();
    assert_eq!(active, [("one".to_string(), true), ("two".to_string(), false)]);
    assert_eq!(masked_logits(&model, &batch), one);
    model.set_adapter(&["two"]).unwrap();
    assert_eq!(masked_logits(&model, &batch), two);
    model.set_adapter(&[]).unwrap();
    assert_eq!(masked_logits(&model, &batch), base);

    model.set_adapter(&["one", "two"]).unwrap();
    let both = masked_logits(&model, &batch);
    for other in [&one, &two, &base] {
        assert_different("both", &both, other);
    }
    // One merged into the weights, the other on top of it.
    let mut merged = model.clone();
    merged.delete_adapter("two").unwrap();
    merged.merge_and_unload().unwrap();
    merged.load_adapter("two", directory.path().join("two")).unwrap();
    assert_close("one after the other", &masked_logits(&merged, &batch), &both, REORDERED);
}

#[test]
fn only_the_active_adapter_is_trained() {
    let device = Device::default().autodiff();
    let batch = batch(&device);
    let mut model = load_base(BASE, &device);
    model.add_adapter("one", random(["q_proj", "up_proj"])).unwrap();
    model.add_adapter("two", random(["v_proj", "up_proj"])).unwrap();
    let mut optimizer = adamw(0.0);
    for name in ["one", "two", "one"] {
        model.set_adapter(&[name]).unwrap();
        let before = parameters(&model);
        let (trained, found) = step(model, &batch, &mut optimizer);
        model = trained;
        let after = parameters(&model);
        let of_active = |path: &String| path.contains(&format!(".peft.{name}."));
        assert_eq!(found.len(), 2 * 2 * 2);
        assert!(found.keys().all(of_active));
        assert!(before.iter().all(|(path, value)| (after[path] != *value) == of_active(path)));
    }
}

fn encoder(device: &Device) -> TransformerEncoder {
    TransformerEncoderConfig::new(16, 24, 4, 2).with_dropout(0.0).init(device)
}

#[test]
fn a_plain_burn_module_is_adapted_through_its_weights() {
    let device = Device::default().autodiff();
    let mut model = encoder(&device);
    let x = Tensor::<3>::random([2, 5, 16], Distribution::Normal(0.0, 1.0), &device);
    let forward = |model: &TransformerEncoder| model.forward(TransformerEncoderInput::new(x.clone()));
    let base = forward(&model).into_data();
    let bits = parameters(&model);
    let config = random(["query", "linear_inner"]).with_lora_alpha(4.0);
    let report = model.add_adapter("default", &config).unwrap();
    assert_eq!(report.modules.len(), 4);
    assert!(report.modules.iter().all(|module| !module.activation_space));

    let adapted = forward(&model);
    assert_different("adapted", &adapted.clone().into_data(), &base);
    let found =
        gradients(&model, &GradientsParams::from_grads(adapted.clone().square().mean().backward(), &model));
    assert_eq!(found.len(), 8);
    assert!(found.iter().all(|(path, gradient)| is_adapter(path) && !is_zero(gradient)));

    let mut merged = model.clone();
    merged.merge_and_unload().unwrap();
    assert_close("merged", &forward(&merged).into_data(), &adapted.into_data(), REORDERED);
    assert_different("merged", &forward(&merged).into_data(), &base);
    model.unload().unwrap();
    assert_eq!(parameters(&model), bits);
    assert_eq!(forward(&model).into_data(), base);
}

#[test]
fn weight_space_and_activation_space_agree_in_values_and_gradients() {
    #[derive(Module, Debug)]
    struct Block<L> {
        up: L,
        down: L,
    }

    let device = Device::default().autodiff();
    let layer = |d_in, d_out| burn::nn::LinearConfig::new(d_in, d_out).init(&device);
    let mut plain = Block { up: layer(12, 20), down: layer(20, 12) };
    plain.add_adapter("default", random(["up", "down"])).unwrap();
    // The same parameters, adapters included, in a graph of their own.
    let copy = plain.clone().fork(&device);
    let fast = Block { up: LoraLinear::from(copy.up), down: LoraLinear::from(copy.down) };
    assert_eq!(parameters(&fast), parameters(&plain));

    let x = Tensor::<2>::random([7, 12], Distribution::Normal(0.0, 1.0), &device);
    let through_weights = plain.down.forward(plain.up.forward(x.clone()).tanh());
    let through_activations = fast.down.forward(fast.up.forward(x).tanh());
    assert_close(
        "output",
        &through_activations.clone().into_data(),
        &through_weights.clone().into_data(),
        REORDERED,
    );
    let of = |output: Tensor<2>| output.square().mean().backward();
    let expected = gradients(&plain, &GradientsParams::from_grads(of(through_weights), &plain));
    let found = gradients(&fast, &GradientsParams::from_grads(of(through_activations), &fast));
    assert_eq!(found.len(), 4);
    for (path, gradient) in &expected {
        assert_close(path, &found[path], gradient, REORDERED);
    }
}
