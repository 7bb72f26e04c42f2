//! Adapters folded into the weights, for good or for now.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{GradientsParams, SgdConfig};
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use burn_peft::{Bias, LoraConfig, LoraLinear, PeftError, PeftModel};
use burn_peft_tests::parameters::{is_adapter, parameters, with_changed};
use burn_peft_tests::tolerance::{REORDERED, assert_close, assert_different};

use super::{Net, base, ids, poisoned, random, stir};

/// Everything that an adapter can have.
fn config() -> LoraConfig {
    random(3, ["token", "up", "down", "conv"]).with_modules_to_save(["norm"])
}

fn adapted(device: &Device) -> Net {
    let mut net = Net::new(device);
    net.add_adapter("one", config()).unwrap();
    net.add_adapter("two", random(2, ["up", "position", "down"])).unwrap();
    net.set_adapter(&["one", "two"]).unwrap();
    stir(net)
}

/// The model with its base in another type.
fn in_type(net: Net, dtype: FloatDType) -> Net {
    with_changed(net, |path, data| {
        let is_factor = is_adapter(path) && !path.ends_with(".copy");
        (!is_factor).then(|| data.convert_dtype(dtype.into()))
    })
}

fn values(data: &TensorData) -> Vec<f32> {
    data.clone().convert::<f32>().iter().collect()
}

#[test]
fn unmerging_gives_every_bit_of_the_base_back() {
    for device in [Device::default(), Device::default().autodiff()] {
        for dtype in [FloatDType::F32, FloatDType::BF16, FloatDType::F16] {
            if !device.supports_dtype(dtype) {
                continue;
            }
            let mut net = in_type(adapted(&device), dtype);
            let (bits, all) = (base(&net), parameters(&net));
            for _ in 0..2 {
                let report = net.merge_adapter().unwrap();
                assert_eq!(report.largest_error == 0.0, dtype == FloatDType::F32, "{report}");
                assert!(net.adapters().iter().all(|status| status.merged));
                net.unmerge_adapter().unwrap();
                assert!(net.adapters().iter().all(|status| status.active && !status.merged));
            }
            assert_eq!(base(&net), bits);
            assert_eq!(parameters(&net), all);
        }
    }
}

#[test]
fn a_merged_model_computes_what_the_adapted_one_does_and_merging_again_changes_nothing() {
    for device in [Device::default(), Device::default().autodiff()] {
        let mut net = adapted(&device);
        let (before, bare) = (net.output(), net.without_adapters().unwrap().output());
        net.merge_adapter().unwrap();
        let merged = net.output();
        assert_close("merged", &merged, &before, REORDERED);
        assert_different("merged", &merged, &bare);
        net.merge_adapter().unwrap();
        assert_eq!(net.output(), merged);
        assert_eq!(net.without_adapters().unwrap().output(), bare);

        let mut unloaded = net.clone();
        unloaded.merge_and_unload().unwrap();
        assert_eq!(unloaded.output(), merged);
        assert!(unloaded.adapters().is_empty());
        net.unmerge_adapter().unwrap();
        assert_eq!(net.output(), before);
    }
}

#[test]
fn a_merged_weight_of_16_bits_is_the_sum_in_f32_rounded_once() {
    for dtype in [DType::BF16, DType::F16] {
        if !Device::default().supports_dtype(dtype) {
            continue;
        }
        let mut net = in_type(adapted(&Device::default()), FloatDType::from(dtype));
        let before = parameters(&net);
        let sums = sums(&before);
        let report = net.merge_and_unload().unwrap();
        let merged = parameters(&net);

        let mut errors = BTreeMap::new();
        for (path, sum) in &sums {
            assert_eq!(merged[path].dtype(), dtype, "{path}");
            let rounded = TensorData::new(sum.clone(), [sum.len()]).convert_dtype(dtype);
            assert_eq!(values(&merged[path]), values(&rounded), "{path}");
            let pairs = sum.iter().zip(values(&rounded));
            errors.insert(path, pairs.map(|(exact, rounded)| (rounded - exact).abs()).fold(0.0, f32::max));
        }
        assert_eq!(report.largest_error, errors.values().copied().fold(0.0, f32::max));
        // Several may have it.
        assert_eq!(errors[&report.worst_parameter.unwrap()], report.largest_error);
        let copied = ["norm.beta", "norm.gamma"].map(str::to_string);
        assert_eq!(report.parameters.len(), sums.len() + copied.len());
        assert!(copied.iter().all(|path| report.parameters.contains(path)));
    }
}

/// What the adapters of [`adapted`] make of the weights, `W + Σ scaling * A B`, as the crate sums it: in f32, adapters by
/// name.
fn sums(parameters: &BTreeMap<String, TensorData>) -> Vec<(String, Vec<f32>)> {
    let device = Device::default();
    let weights = ["token", "position", "up", "down", "conv"].map(|module| format!("{module}.weight"));
    weights
        .into_iter()
        .map(|path| {
            let base = &parameters[&path];
            let elements = base.shape().num_elements();
            let mut sum =
                Tensor::<1>::from_data(TensorData::new(values(base), [elements]), (&device, DType::F32));
            for (name, r) in [("one", 3.0), ("two", 2.0)] {
                let Some(a) = parameters.get(&format!("{path}.peft.{name}.a")) else { continue };
                let a = Tensor::<2>::from_data(a.clone(), &device);
                let b = Tensor::<2>::from_data(parameters[&format!("{path}.peft.{name}.b")].clone(), &device);
                let delta = a.mul_scalar(3.0 / r).matmul(b);
                let delta = if path.starts_with("conv") { delta.transpose() } else { delta };
                sum = sum + delta.reshape([elements]);
            }
            let sum = values(&sum.into_data());
            (path, sum)
        })
        .collect()
}

#[test]
fn merged_adapters_cannot_be_deleted_and_others_can() {
    let mut net = adapted(&Device::default());
    net.set_adapter(&["one"]).unwrap();
    net.merge_adapter().unwrap();
    let merged = net.output();
    let error = net.delete_adapter("one").unwrap_err();
    assert!(matches!(error, PeftError::MergedAdapter { ref name } if name == "one"), "{error}");
    assert_eq!(net.output(), merged);
    net.delete_adapter("two").unwrap();
    assert_eq!(net.output(), merged);
    net.unmerge_adapter().unwrap();
    net.delete_adapter("one").unwrap();
    assert_eq!(net.output(), Net::new(&Device::default()).output());
}

#[test]
fn what_is_not_finite_is_never_merged() {
    let biased = || {
        let mut net = Net::new(&Device::default());
        net.add_adapter("one", random(2, ["up"]).with_lora_bias(true)).unwrap();
        stir(net)
    };
    let mut cases = vec![
        (poisoned(adapted(&Device::default()), "up.weight.peft.two.a", f32::NAN), "up"),
        (poisoned(adapted(&Device::default()), "conv.weight.peft.one.b", f32::INFINITY), "conv"),
        (poisoned(adapted(&Device::default()), "norm.gamma.peft.one.copy", f32::NAN), "norm.gamma"),
        (poisoned(biased(), "up.weight.peft.one.bias", f32::NAN), "up.bias"),
    ];
    if Device::default().supports_dtype(FloatDType::F16) {
        // In range for the sum and not for the weight.
        cases.push((poisoned(in_type(biased(), FloatDType::F16), "up.weight.peft.one.a", 1e6), "up"));
    }
    for (mut net, culprit) in cases {
        // By bits: NaNs do not equal themselves.
        let bits = |net: &Net| {
            let all = parameters(net).into_iter();
            all.map(|(path, data)| (path, data.as_bytes().to_vec())).collect::<Vec<_>>()
        };
        let before = (bits(&net), net.adapters());
        for unload in [true, false] {
            let result = if unload { net.merge_and_unload() } else { net.merge_adapter() };
            if culprit == "up.bias" && !unload {
                // It stays beside the weights.
                net.unmerge_adapter().unwrap();
                continue;
            }
            let error = result.unwrap_err();
            assert!(
                matches!(&error, PeftError::NonFiniteMerge { modules, .. } if *modules == [culprit]),
                "{error}"
            );
            assert_eq!((bits(&net), net.adapters()), before, "{culprit}");
        }
    }
}

#[test]
fn nothing_stale_is_left_after_a_step_or_a_record() {
    let device = Device::default().autodiff();
    let mut net = adapted(&device).unfreeze();
    net.set_adapter(&["two"]).unwrap();
    net.merge_adapter().unwrap();
    let before = net.output();
    let fresh = |net: &Net| {
        let directory = tempfile::tempdir().unwrap();
        net.save_adapter("two", directory.path()).unwrap();
        let mut fresh = net.clone();
        fresh.unload().unwrap();
        fresh.load_adapter("two", directory.path()).unwrap();
        fresh
    };

    // The layers that are not merged are trained.
    let loss = net.forward(ids(&device)).square().mean();
    let gradients = GradientsParams::from_grads(loss.backward(), &net);
    assert!(!gradients.is_empty());
    let mut stepped = SgdConfig::new().init().step(0.5, net.clone(), gradients);
    assert!(stepped.adapters().iter().all(|status| !status.merged));
    assert_different("step", &stepped.output(), &before);
    assert_eq!(stepped.output(), fresh(&stepped).output());
    stepped.merge_adapter().unwrap();
    assert_close("merged again", &stepped.output(), &fresh(&stepped).output(), REORDERED);

    let loaded = net.clone().load_record(stepped.clone().into_record());
    assert!(loaded.adapters().iter().all(|status| !status.merged));
    assert_eq!(loaded.output(), fresh(&stepped).output());
    assert_eq!(net.output(), before, "the merged model itself stays as it was");
}

#[derive(Module, Debug)]
struct Layer {
    proj: LoraLinear,
}

#[test]
fn a_bias_of_the_update_is_merged_into_the_bias_of_the_layer_or_stays_beside_it() {
    let device = Device::default();
    for with_bias in [true, false] {
        let linear = LinearConfig::new(4, 3).with_bias(with_bias).init(&device);
        let mut layer = Layer { proj: linear.into() };
        layer.add_adapter("one", random(2, ["proj"]).with_lora_bias(true)).unwrap();
        layer.add_adapter("two", random(2, ["proj"]).with_lora_bias(true)).unwrap();
        layer.set_adapter(&["one", "two"]).unwrap();
        let mut layer = stir(layer);
        let x = Tensor::<2>::from_data([[0.3, -1.0, 0.7, 2.0]], &device);
        let before = layer.proj.forward(x.clone()).into_data();
        let bits = parameters(&layer);

        layer.merge_adapter().unwrap();
        assert_close("merged for now", &layer.proj.forward(x.clone()).into_data(), &before, REORDERED);
        layer.unmerge_adapter().unwrap();
        assert_eq!(layer.proj.forward(x.clone()).into_data(), before);

        let result = layer.merge_and_unload();
        if with_bias {
            assert_eq!(result.unwrap().parameters, ["proj.bias", "proj.weight"]);
            assert_close("merged for good", &layer.proj.forward(x.clone()).into_data(), &before, REORDERED);
            let plain: Linear = layer.proj.into();
            assert_close("plain", &plain.forward(x).into_data(), &before, REORDERED);
        } else {
            let error = result.unwrap_err();
            assert!(matches!(&error, PeftError::NoBiasToMergeInto { name, .. } if name == "one"), "{error}");
            assert_eq!(parameters(&layer), bits);
        }
    }
}

#[test]
fn trained_biases_are_merged_and_unloaded() {
    let mut net = Net::new(&Device::default());
    let bare = net.output();
    net.add_adapter("one", random(2, ["up"]).with_bias(Bias::All)).unwrap();
    let mut net = stir(net);
    let before = net.output();
    let mut merged = net.clone();
    merged.merge_and_unload().unwrap();
    assert_close("merged", &merged.output(), &before, REORDERED);
    net.unload().unwrap();
    assert_eq!(net.output(), bare);
}

#[test]
fn the_lora_bias_of_a_merged_adapter_is_not_trained() {
    let mut net = Net::new(&Device::default().autodiff());
    net.add_adapter("one", random(3, ["up"]).with_lora_bias(true)).unwrap();
    let gradients = |net: &Net| {
        let loss = net.forward(ids(&net.devices()[0])).powi_scalar(2).mean();
        GradientsParams::from_grads(loss.backward(), net).len()
    };
    assert_eq!(gradients(&net), 3);
    net.merge_adapter().unwrap();
    let input = Tensor::<2>::ones([2, 6], &net.devices()[0]).require_grad();
    let loss = net.up.forward(input).mean();
    assert!(GradientsParams::from_grads(loss.backward(), &net).is_empty());
}
