//! What is trained: the active adapters and nothing else.

use std::collections::BTreeSet;

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{Device, TensorData};
use burn_peft::{Bias, LoraConfig, PeftModel};
use burn_peft_tests::parameters::{gradients, is_adapter, parameters};
use burn_peft_tests::tolerance::assert_different;

use super::{Net, base, ids, random};
use crate::common::adamw;

/// Three steps of AdamW; the paths that had gradients in the first of them.
fn train(mut net: Net) -> (Net, BTreeSet<String>) {
    let device = net.devices()[0].clone();
    let mut optimizer = adamw(0.1);
    let mut trained = BTreeSet::new();
    for step in 0..3 {
        let found = GradientsParams::from_grads(net.forward(ids(&device)).square().mean().backward(), &net);
        let with_gradients: BTreeSet<String> = gradients(&net, &found).into_keys().collect();
        if step == 0 {
            trained = with_gradients;
        } else {
            assert_eq!(with_gradients, trained);
        }
        net = optimizer.step(0.05, net, found);
    }
    (net, trained)
}

fn with(configs: &[(&str, LoraConfig)]) -> Net {
    let mut net = Net::new(&Device::default().autodiff());
    for (name, config) in configs {
        net.add_adapter(name, config).unwrap();
    }
    net
}

#[test]
fn gradients_land_on_the_active_adapters_alone() {
    let configs = [
        ("one", random(2, ["up", "token", "conv"])),
        ("two", random(3, ["up", "down"]).with_bias(Bias::All)),
        ("three", random(2, ["down", "position"]).with_lora_bias(false)),
    ];
    for active in [&["one"][..], &["two"], &["one", "three"], &["one", "two", "three"]] {
        let mut net = with(&configs);
        net.set_adapter(active).unwrap();
        let (bits, before) = (base(&net), parameters(&net));
        let (net, trained) = train(net);
        let of_active = |path: &&String| active.iter().any(|name| path.contains(&format!(".peft.{name}.")));
        let expected: BTreeSet<String> = before.keys().filter(of_active).cloned().collect();
        assert_eq!(trained, expected);
        assert_eq!(base(&net), bits);
        for (path, value) in parameters(&net) {
            assert_eq!(value != before[&path], expected.contains(&path), "{path}");
        }
    }
}

#[test]
fn copies_are_trained_and_the_base_keeps_its_bits() {
    let saving = random(2, ["up"]).with_modules_to_save(["norm", "down"]);
    for (config, copies) in [
        (random(2, ["up"]).with_bias(Bias::All), &["conv.bias", "down.bias", "norm.beta", "up.bias"][..]),
        (random(2, ["up", "conv"]).with_bias(Bias::LoraOnly), &["conv.bias", "up.bias"]),
        (saving, &["down.bias", "down.weight", "norm.beta", "norm.gamma"]),
    ] {
        let net = with(&[("default", config)]);
        let (bits, fresh) = (base(&net), parameters(&net));
        let bare = Net::new(&Device::default().autodiff()).output();
        let (net, _) = train(net);
        assert_eq!(base(&net), bits);
        let trained = parameters(&net);
        let copied: Vec<&str> =
            trained.keys().filter_map(|path| path.strip_suffix(".peft.default.copy")).collect();
        assert_eq!(copied, copies);
        for path in copies {
            let copy = format!("{path}.peft.default.copy");
            assert_ne!(trained[&copy], fresh[&copy], "{path}");
        }
        // Where PEFT has trained the base's own biases, the base is lost.
        assert_eq!(net.without_adapters().unwrap().output(), bare);
        assert_different("trained", &net.output(), &bare);
        let mut unloaded = net;
        unloaded.unload().unwrap();
        assert_eq!(base(&unloaded), bits);
        assert_eq!(unloaded.output(), bare);
    }
}

#[test]
fn merged_adapters_are_not_trained_and_neither_are_the_weights_under_them() {
    let device = Device::default().autodiff();
    let mut net = with(&[("one", random(2, ["up", "token"])), ("two", random(2, ["down"]))]).unfreeze();
    net.set_adapter(&["one"]).unwrap();
    net.merge_adapter().unwrap();
    let loss = net.forward(ids(&device)).square().mean();
    let found = gradients(&net, &GradientsParams::from_grads(loss.backward(), &net));
    let expected: BTreeSet<String> =
        base(&net).into_keys().filter(|path| !["up.weight", "token.weight"].contains(&&**path)).collect();
    assert_eq!(found.into_keys().collect::<BTreeSet<_>>(), expected);
}

#[test]
fn a_models_copies_are_trained_apart() {
    let net = with(&[("one", random(2, ["up", "token"]))]);
    let before = net.output();
    let (trained, _) = train(net.clone());
    assert_different("trained", &trained.output(), &before);
    assert_eq!(net.output(), before);
    let factors = |net: &Net| -> Vec<TensorData> {
        parameters(net).into_iter().filter(|(path, _)| is_adapter(path)).map(|(_, data)| data).collect()
    };
    assert_ne!(factors(&net), factors(&trained));
}
