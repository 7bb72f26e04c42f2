//! What several of the tests do: load models and adapters of the fixtures, compute what the fixtures hold.

use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::{Device, TensorData};
use burn_peft::{DEFAULT_ADAPTER, PeftModel};
use burn_peft_llama::{Batch, LlamaForCausalLm, PaddingSide};
use burn_peft_tests::fixture::{Fixture, Training, directory};

pub(crate) const SIDES: [PaddingSide; 2] = [PaddingSide::Right, PaddingSide::Left];

/// The base model of that case.
pub(crate) fn load_base(case: &str, device: &Device) -> LlamaForCausalLm {
    LlamaForCausalLm::from_pretrained(directory(case), device).unwrap()
}

/// The base model of an adapter's case with the adapter; its head is its own if the adapter is on it.
pub(crate) fn load_adapted(fixture: &Fixture, device: &Device) -> LlamaForCausalLm {
    let mut model = load_base(fixture.facts.base.as_ref().unwrap(), device);
    model.load_adapter(DEFAULT_ADAPTER, &fixture.directory).unwrap();
    model
}

/// Logits, zero at padding, where they mean nothing.
pub(crate) fn masked_logits(model: &LlamaForCausalLm, batch: &Batch) -> TensorData {
    let logits = model.forward(batch.input_ids.clone(), Some(batch.attention_mask.clone()));
    let real = batch.attention_mask.clone().float().unsqueeze_dim::<3>(2);
    (logits * real).into_data()
}

/// torch's AdamW with its defaults.
pub(crate) fn adamw(weight_decay: f32) -> ModuleOptimizer {
    AdamWConfig::new().with_epsilon(1e-8).with_weight_decay(weight_decay).init()
}

/// Trains as the fixture was trained; the loss before each step comes back.
pub(crate) fn train(
    model: LlamaForCausalLm,
    batch: &Batch,
    training: &Training,
) -> (LlamaForCausalLm, Vec<f64>) {
    let mut optimizer = adamw(training.weight_decay);
    let mut losses = Vec::new();
    let model = (0..training.losses.len()).fold(model, |model, _| {
        let loss = model.loss(batch);
        losses.push(f64::from(loss.clone().into_scalar::<f32>()));
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        optimizer.step(training.lr, model, gradients)
    });
    (model, losses)
}
