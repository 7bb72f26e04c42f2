//! Ten steps of AdamW lead where torch and peft get.

use burn::tensor::Device;
use burn_peft_llama::PaddingSide;
use burn_peft_tests::fixture::{ADAPTERS, BASES, Fixture};
use burn_peft_tests::parameters::{base_parameters, parameters, to_peft};
use burn_peft_tests::tolerance::{TRAINED, TRAJECTORY, assert_close, assert_close_number};

use crate::common::{load_adapted, load_base, masked_logits, train};

#[test]
fn lora_training_follows_peft() {
    for case in ADAPTERS {
        let fixture = Fixture::open(case);
        let device = Device::default().autodiff();
        let batch = fixture.batch(PaddingSide::Right, &device);
        let (model, losses) = train(load_adapted(&fixture, &device), &batch, &fixture.facts.training);
        let loss = assert_losses(case, &losses, &fixture.facts.training.losses);

        let (found, expected) =
            (to_peft(&model, &parameters(&model)), fixture.with_prefix("trained.base_model"));
        assert_eq!(found.len(), expected.len(), "{case}");
        let tensors = expected.iter().map(|(rest, tensor)| {
            let key = format!("base_model{rest}");
            assert_close(&format!("{case} {key}"), &found[&key], tensor, TRAINED)
        });
        let tensors = tensors.fold(0.0, f64::max);
        let logits = masked_logits(&model, &batch);
        let logits = assert_close(case, &logits, fixture.data("trained.logits"), TRAINED);
        println!("{case}: losses deviate by {loss:.1e}, tensors by {tensors:.1e}, logits by {logits:.1e}");

        let base = load_base(fixture.facts.base.as_ref().unwrap(), &device);
        assert_eq!(base_parameters(&model), parameters(&base), "{case}: the base has changed");
    }
}

#[test]
fn full_fine_tuning_follows_torch() {
    for case in BASES {
        let fixture = Fixture::open(case);
        let device = Device::default().autodiff();
        let batch = fixture.batch(PaddingSide::Right, &device);
        let (_, losses) = train(load_base(case, &device), &batch, &fixture.facts.training);
        let loss = assert_losses(case, &losses, &fixture.facts.training.losses);
        println!("{case}: losses deviate by {loss:.1e}");
    }
}

fn assert_losses(case: &str, found: &[f64], expected: &[f64]) -> f64 {
    let deviations = found.iter().zip(expected).enumerate().map(|(step, (&found, &expected))| {
        assert_close_number(&format!("{case} loss before step {step}"), found, expected, TRAJECTORY)
    });
    assert_eq!(found.len(), expected.len());
    assert!(found.last() < found.first(), "{case}: nothing was learnt");
    deviations.fold(0.0, f64::max)
}
