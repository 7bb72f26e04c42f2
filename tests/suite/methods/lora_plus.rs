//! LoRA+ in ten steps, against peft's `create_loraplus_optimizer`.

use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::Device;
use burn_peft::{LoraPlus, PeftError};
use burn_peft_llama::PaddingSide;
use burn_peft_tests::fixture::{Fixture, LORA_PLUS, read_json};
use burn_peft_tests::parameters::{parameters, to_peft};
use burn_peft_tests::tolerance::{TRAINED, TRAJECTORY, assert_close, assert_close_number};

use crate::common::{load_adapted, load_base};

#[test]
fn training_follows_peft() {
    for case in LORA_PLUS {
        let fixture = Fixture::open(case);
        let device = Device::default().autodiff();
        let facts = read_json(&fixture.directory.join("expected.json"))["training"].clone();
        let mut plus = LoraPlus::new(facts["loraplus_lr_ratio"].as_f64().unwrap());
        if let Some(lr) = facts["loraplus_lr_embedding"].as_f64() {
            plus = plus.with_lr_embedding(lr);
        }
        let batch = fixture.batch(PaddingSide::Right, &device);
        let mut model = load_adapted(&fixture, &device);
        let groups = plus.groups(&model).unwrap();
        let training = &fixture.facts.training;
        let adamw = AdamWConfig::new().with_epsilon(1e-8).with_weight_decay(training.weight_decay);
        let without_decay = adamw.clone().with_weight_decay(0.0).build();
        let mut optimizer = adamw.init().with_group(groups.without_decay(), without_decay, None);
        for (step, expected) in training.losses.iter().enumerate() {
            let loss = model.loss(&batch);
            let found = f64::from(loss.clone().into_scalar::<f32>());
            assert_close_number(&format!("{case} loss before step {step}"), found, *expected, TRAJECTORY);
            let gradients = GradientsParams::from_grads(loss.backward(), &model);
            model = optimizer.step(groups.learning_rates(training.lr), model, gradients);
        }
        let found = to_peft(&model, &parameters(&model));
        let expected = fixture.with_prefix("trained.base_model");
        assert_eq!(found.len(), expected.len(), "{case}");
        for (rest, tensor) in expected {
            let key = format!("base_model{rest}");
            assert_close(&format!("{case} {key}"), &found[&key], &tensor, TRAINED);
        }
    }
}

#[test]
fn ratios_and_rates_are_checked() {
    let model = load_base("gqa-tied", &Device::default());
    for plus in [LoraPlus::new(0.5), LoraPlus::new(f64::NAN), LoraPlus::new(2.0).with_lr_embedding(-1.0)] {
        assert!(matches!(plus.groups(&model), Err(PeftError::InvalidConfig { .. })), "{plus:?}");
    }
    LoraPlus::new(1.0).groups(&model).unwrap();
}
