//! An adapted model computes what peft computes.

use std::collections::BTreeSet;

use burn::optim::GradientsParams;
use burn::tensor::Device;
use burn_peft::{DEFAULT_ADAPTER, LoraConfig, PeftModel, TargetModules};
use burn_peft_llama::PaddingSide;
use burn_peft_tests::fixture::{ADAPTERS, Fixture};
use burn_peft_tests::parameters::{gradients, to_peft};
use burn_peft_tests::tolerance::{
    FORWARD, GRADIENT, LOSS, REORDERED, assert_close, assert_close_number, assert_different,
};

use crate::common::{SIDES, load_adapted, load_base, masked_logits};

#[test]
fn the_same_modules_are_adapted_and_the_same_parameters_counted() {
    for case in ADAPTERS {
        let fixture = Fixture::open(case);
        let mut model = load_base(fixture.facts.base.as_ref().unwrap(), &Device::flex());
        let report = model.load_adapter(DEFAULT_ADAPTER, &fixture.directory).unwrap();
        let found: BTreeSet<&str> = report.injection.modules.iter().map(|module| &*module.path).collect();
        let expected: BTreeSet<&str> = fixture.facts.adapted_modules.iter().map(String::as_str).collect();
        assert_eq!(found, expected, "{case}");
        assert_eq!(
            Some(model.trainable_parameters().to_string()),
            fixture.facts.trainable_parameters,
            "{case}"
        );
    }
}

#[test]
fn all_linear_is_what_peft_takes_it_for() {
    for case in ["gqa-tied-rslora", "mha-biased-all-linear"] {
        let fixture = Fixture::open(case);
        let mut model = load_base(fixture.facts.base.as_ref().unwrap(), &Device::flex());
        let config = LoraConfig::new(2).with_target_modules(TargetModules::AllLinear);
        let report = model.add_adapter(DEFAULT_ADAPTER, &config).unwrap();
        let found: BTreeSet<&str> = report.modules.iter().map(|module| &*module.path).collect();
        let expected: BTreeSet<&str> = fixture.facts.adapted_modules.iter().map(String::as_str).collect();
        assert_eq!(found, expected, "{case}");
    }
}

#[test]
fn logits_are_those_of_peft() {
    for case in ADAPTERS {
        let fixture = Fixture::open(case);
        let model = load_adapted(&fixture, &Device::flex());
        let base = load_base(fixture.facts.base.as_ref().unwrap(), &Device::flex());
        for side in SIDES {
            let batch = fixture.batch(side, &Device::flex());
            let logits = masked_logits(&model, &batch);
            let deviation = assert_close(&format!("{case} logits"), &logits, fixture.logits(side), FORWARD);
            assert_different(case, &logits, &masked_logits(&base, &batch));
            println!("{case}, {side:?} padding: logits deviate by {deviation:.1e}");
        }
    }
}

#[test]
fn loss_and_gradients_of_all_adapter_tensors_are_those_of_peft() {
    for case in ADAPTERS {
        let fixture = Fixture::open(case);
        let device = Device::flex().autodiff();
        let model = load_adapted(&fixture, &device);
        for side in SIDES {
            let loss = model.loss(&fixture.batch(side, &device));
            let value = f64::from(loss.clone().into_scalar::<f32>());
            let deviation = assert_close_number(&format!("{case} loss"), value, fixture.facts.loss, LOSS);

            let found = gradients(&model, &GradientsParams::from_grads(loss.backward(), &model));
            let count = found.len();
            let found = to_peft(&found);
            let expected = fixture.with_prefix("grad.");
            assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{case}");
            assert_eq!(count, expected.len(), "{case}: the base has gradients");
            let worst = expected.iter().map(|(key, gradient)| {
                assert_close(&format!("{case} gradient of {key}"), &found[key], gradient, GRADIENT)
            });
            let worst = worst.fold(0.0, f64::max);
            println!("{case}, {side:?} padding: loss deviates by {deviation:.1e}, gradients by {worst:.1e}");
        }
    }
}

#[test]
fn merged_logits_are_those_of_peft_and_not_those_of_the_base() {
    for case in ADAPTERS {
        let fixture = Fixture::open(case);
        // peft itself merges the embedding's adapter into the tied head as well.
        if !fixture.has("merged.logits") {
            assert_eq!(case, "gqa-tied-embedding");
            continue;
        }
        for device in [Device::flex(), Device::flex().autodiff()] {
            let batch = fixture.batch(PaddingSide::Right, &device);
            let base = load_base(fixture.facts.base.as_ref().unwrap(), &device);
            let mut model = load_adapted(&fixture, &device);
            let adapted = masked_logits(&model, &batch);
            model.merge_and_unload().unwrap();
            let merged = masked_logits(&model, &batch);
            let deviation = assert_close(case, &merged, fixture.data("merged.logits"), FORWARD);
            assert_close(case, &merged, &adapted, REORDERED);
            assert_different(case, &merged, &masked_logits(&base, &batch));
            assert!(model.adapters().is_empty());
            println!("{case}: merged logits deviate by {deviation:.1e}");
        }
    }
}
