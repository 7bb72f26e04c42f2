//! Two adapters on one LLaMA, against what peft computed.

use std::collections::BTreeMap;

use burn::optim::GradientsParams;
use burn::tensor::{Device, TensorData};
use burn_peft::{DEFAULT_ADAPTER, PeftModel};
use burn_peft_llama::{Batch, Collator, Example, LlamaForCausalLm, PaddingSide};
use burn_peft_tests::fixture::{PAD_TOKEN_ID, directory, read_facts, read_tensors};
use burn_peft_tests::parameters::{gradients, parameters, transposed};
use burn_peft_tests::tolerance::{
    FORWARD, GRADIENT, LOSS, REORDERED, assert_close, assert_close_number, assert_different,
};
use serde::Deserialize;

use crate::common::{SIDES, load_base, masked_logits};

const CASE: &str = "two-adapters";

/// Every set of adapters of the fixture by its name there.
const SETS: [(&str, &[&str]); 3] = [("one", &["one"]), ("two", &["two"]), ("both", &["one", "two"])];

#[derive(Deserialize)]
struct Facts {
    base: String,
    adapters: Vec<String>,
    adapter_names: Vec<String>,
    losses: BTreeMap<String, f64>,
}

struct TwoAdapters {
    facts: Facts,
    tensors: BTreeMap<String, TensorData>,
}

impl TwoAdapters {
    fn open() -> Self {
        let path = directory(CASE);
        let bytes = std::fs::read(path.join("expected.safetensors")).unwrap();
        Self { facts: read_facts(&path), tensors: read_tensors(&bytes) }
    }

    fn model(&self, device: &Device) -> LlamaForCausalLm {
        let mut model = load_base(&self.facts.base, device);
        for name in &self.facts.adapters {
            model.load_adapter(name, directory(CASE).join(name)).unwrap();
        }
        model
    }

    /// The sequences as a batch, which must be what Python made of them.
    fn batch(&self, side: PaddingSide, device: &Device) -> Batch {
        let [ids, mask, labels] = ["input_ids", "attention_mask", "labels"]
            .map(|name| self.data(&format!("right.{name}")).iter::<i64>().collect::<Vec<_>>());
        let width = self.data("right.input_ids").shape()[1];
        let rows = ids.chunks(width).zip(mask.chunks(width)).zip(labels.chunks(width));
        let examples: Vec<Example> = rows
            .map(|((ids, mask), labels)| {
                let length = mask.iter().filter(|real| **real == 1).count();
                let input_ids = ids[..length].iter().map(|id| u32::try_from(*id).unwrap()).collect();
                Example { input_ids, labels: labels[..length].to_vec() }
            })
            .collect();
        let batch = Collator::new(PAD_TOKEN_ID).with_side(side).collate(&examples, device).unwrap();
        let prefix = if side == PaddingSide::Right { "right" } else { "left" };
        let expected: Vec<i64> = self.data(&format!("{prefix}.input_ids")).iter().collect();
        assert_eq!(batch.input_ids.to_data().iter::<i64>().collect::<Vec<_>>(), expected);
        batch
    }

    fn data(&self, name: &str) -> &TensorData {
        &self.tensors[name]
    }

    /// The adapters that the rows of the mixed batch name.
    fn rows(&self) -> Vec<Option<&str>> {
        self.facts.adapter_names.iter().map(|name| (name != "__base__").then_some(&**name)).collect()
    }
}

#[test]
fn logits_of_each_of_both_and_of_none_are_those_of_peft() {
    let fixture = TwoAdapters::open();
    for device in [Device::default(), Device::default().autodiff()] {
        let batch = fixture.batch(PaddingSide::Right, &device);
        let mut model = fixture.model(&device);
        let base = masked_logits(&load_base(&fixture.facts.base, &device), &batch);
        let disabled = masked_logits(&model.without_adapters().unwrap(), &batch);
        assert_eq!(disabled, base);
        assert_close("base", &disabled, fixture.data("base.logits"), FORWARD);
        for (which, names) in SETS {
            model.set_adapter(names).unwrap();
            let logits = masked_logits(&model, &batch);
            assert_close(which, &logits, fixture.data(&format!("{which}.logits")), FORWARD);
            assert_different(which, &logits, &base);

            model.merge_adapter().unwrap();
            let merged = masked_logits(&model, &batch);
            assert_close(which, &merged, fixture.data(&format!("{which}.merged.logits")), FORWARD);
            assert_close(which, &merged, &logits, REORDERED);
            model.unmerge_adapter().unwrap();
            assert_eq!(masked_logits(&model, &batch), logits, "{which}");

            let mut unloaded = model.clone();
            unloaded.merge_and_unload().unwrap();
            assert_eq!(masked_logits(&unloaded, &batch), merged, "{which}");
        }
    }
}

#[test]
fn losses_and_gradients_are_those_of_peft_and_land_on_the_active_alone() {
    let fixture = TwoAdapters::open();
    let device = Device::default().autodiff();
    let batch = fixture.batch(PaddingSide::Right, &device);
    let mut model = fixture.model(&device);
    for (which, names) in SETS {
        model.set_adapter(names).unwrap();
        let loss = model.loss(&batch);
        let value = f64::from(loss.clone().into_scalar::<f32>());
        assert_close_number(which, value, fixture.facts.losses[which], LOSS);

        let found = gradients(&model, &GradientsParams::from_grads(loss.backward(), &model));
        let prefix = format!("{which}.grad.");
        let expected =
            fixture.tensors.range(prefix.clone()..).take_while(|(key, _)| key.starts_with(&prefix));
        let mut count = 0;
        for (key, gradient) in expected {
            let (adapter, key) = key[prefix.len()..].split_once('.').unwrap();
            assert_close(key, &transposed(&found[&path_of(key, adapter)]), gradient, GRADIENT);
            count += 1;
        }
        assert_eq!(found.len(), count, "{which}: {:?}", found.keys());
    }
}

/// The path of an adapter's factor.
fn path_of(key: &str, adapter: &str) -> String {
    let module = key.strip_prefix("base_model.model.").unwrap();
    let (module, factor) = match module.strip_suffix(".lora_A.weight") {
        Some(module) => (module, "a"),
        None => (module.strip_suffix(".lora_B.weight").unwrap(), "b"),
    };
    format!("{module}.weight.peft.{adapter}.{factor}")
}

#[test]
fn rows_with_adapters_of_their_own_are_those_of_peft() {
    let fixture = TwoAdapters::open();
    let model = fixture.model(&Device::default());
    let before = parameters(&model);
    let mixed = model.for_rows(&fixture.rows()).unwrap();
    for (side, prefix) in SIDES.into_iter().zip(["right", "left"]) {
        let batch = fixture.batch(side, &Device::default());
        let logits = masked_logits(&mixed, &batch);
        assert_close(prefix, &logits, fixture.data(&format!("{prefix}.mixed.logits")), FORWARD);
    }
    assert_eq!(parameters(&model), before);
    assert_eq!(model.adapters(), fixture.model(&Device::default()).adapters());
}

#[test]
fn every_adapter_is_saved_where_peft_looks_for_it() {
    let fixture = TwoAdapters::open();
    let device = Device::default();
    let batch = fixture.batch(PaddingSide::Left, &device);
    let mut model = fixture.model(&device);
    model.load_adapter(DEFAULT_ADAPTER, directory("gqa-tied-rslora")).unwrap();
    let root = tempfile::tempdir().unwrap();
    // The LLaMA's own method of this name writes the base.
    let saved = model.save_adapters(root.path().join("all")).unwrap();
    let root = root.path().join("all");
    assert_eq!(saved, [root.clone(), root.join("one"), root.join("two")]);
    let mut entries: Vec<String> = std::fs::read_dir(&root)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    entries.sort();
    assert_eq!(entries, ["adapter_config.json", "adapter_model.safetensors", "one", "two"]);

    let mut again = load_base(&fixture.facts.base, &device);
    for (name, place) in [(DEFAULT_ADAPTER, &saved[0]), ("one", &saved[1]), ("two", &saved[2])] {
        again.load_adapter(name, place).unwrap();
    }
    assert_eq!(parameters(&again), parameters(&model));
    for names in [&["two"][..], &[DEFAULT_ADAPTER], &["one", "two", DEFAULT_ADAPTER]] {
        model.set_adapter(names).unwrap();
        again.set_adapter(names).unwrap();
        assert_eq!(masked_logits(&again, &batch), masked_logits(&model, &batch), "{names:?}");
    }
}
