//! Adapters of convolutions and of other plain layers, in a model that is no language model.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::{Module, Param};
use burn::nn::conv::{Conv1d, Conv1dConfig, Conv2d, Conv2dConfig};
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig, PaddingConfig2d};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft::{DEFAULT_ADAPTER, LoraEmbedding, LoraLinear, PeftError, PeftModel};
use burn_peft_tests::fixture::{TOYS, directory, read_facts, read_file, read_json, write_adapter};
use burn_peft_tests::parameters::{base_parameters, from_torch, gradients, parameters, to_peft};
use burn_peft_tests::tolerance::{
    FORWARD, GRADIENT, LOSS, REORDERED, assert_close, assert_close_number, assert_different,
};
use serde::Deserialize;

/// The model of `tests/fixtures/toy.py`.
#[derive(Module, Debug)]
struct Toy {
    embedding: Embedding,
    conv1d: Conv1d,
    conv2d: Conv2d,
    pointwise: Conv2d,
    linear: Linear,
}

/// The same with layers that show their input to their adapters, where there are such layers.
#[derive(Module, Debug)]
struct WrappedToy {
    embedding: LoraEmbedding,
    conv1d: Conv1d,
    conv2d: Conv2d,
    pointwise: Conv2d,
    linear: LoraLinear,
}

/// Either of them.
trait ToyModel: PeftModel + From<Toy> {
    /// `[batch, 13]` to `[batch, 7]`.
    fn forward(&self, ids: Tensor<2, Int>) -> Tensor<2>;
}

impl ToyModel for Toy {
    fn forward(&self, ids: Tensor<2, Int>) -> Tensor<2> {
        let x = middle(self.embedding.forward(ids), &self.conv1d, &self.conv2d, &self.pointwise);
        self.linear.forward(x)
    }
}

impl ToyModel for WrappedToy {
    fn forward(&self, ids: Tensor<2, Int>) -> Tensor<2> {
        let x = middle(self.embedding.forward(ids), &self.conv1d, &self.conv2d, &self.pointwise);
        self.linear.forward(x)
    }
}

/// `[batch, 13, 8]` to `[batch, 24]`.
fn middle(x: Tensor<3>, conv1d: &Conv1d, conv2d: &Conv2d, pointwise: &Conv2d) -> Tensor<2> {
    let x = conv1d.forward(x.swap_dims(1, 2)).tanh();
    let x = conv2d.forward(x.reshape([-1, 2, 4, 6])).tanh();
    pointwise.forward(x).tanh().flatten(1, 3)
}

impl From<Toy> for WrappedToy {
    fn from(Toy { embedding, conv1d, conv2d, pointwise, linear }: Toy) -> Self {
        Self { embedding: embedding.into(), conv1d, conv2d, pointwise, linear: linear.into() }
    }
}

#[derive(Deserialize)]
struct Facts {
    loss: f64,
    adapted_modules: Vec<String>,
    num_trainable_parameters: usize,
}

/// One of the cases.
struct Case {
    name: &'static str,
    facts: Facts,
    expected: BTreeMap<String, TensorData>,
}

impl Case {
    fn open(name: &'static str) -> Self {
        let directory = directory(name);
        let expected = read_file(&directory.join("expected.safetensors"));
        Self { name, facts: read_facts(&directory), expected }
    }

    fn all() -> impl Iterator<Item = Self> {
        TOYS.into_iter().map(Self::open)
    }

    fn base<M: ToyModel>(&self, device: &Device) -> M {
        let stored = read_file(&directory(self.name).join("model.safetensors"));
        let data = |name: &str| from_torch(name, &stored[name]);
        fn param<const D: usize>(data: TensorData, device: &Device) -> Param<Tensor<D>> {
            Param::from_tensor(Tensor::from_data(data, device))
        }
        let padded = PaddingConfig2d::Explicit(1, 1, 1, 1);
        let mut toy = Toy {
            embedding: EmbeddingConfig::new(11, 8).init(device),
            conv1d: Conv1dConfig::new(8, 8, 3).with_stride(2).init(device),
            conv2d: Conv2dConfig::new([2, 5], [3, 3]).with_stride([2, 2]).with_padding(padded).init(device),
            pointwise: Conv2dConfig::new([5, 4], [1, 1]).with_bias(false).init(device),
            linear: LinearConfig::new(24, 7).init(device),
        };
        toy.embedding.weight = param(data("embedding.weight"), device);
        toy.conv1d.weight = param(data("conv1d.weight"), device);
        toy.conv1d.bias = Some(param(data("conv1d.bias"), device));
        toy.conv2d.weight = param(data("conv2d.weight"), device);
        toy.conv2d.bias = Some(param(data("conv2d.bias"), device));
        toy.pointwise.weight = param(data("pointwise.weight"), device);
        toy.linear.weight = param(data("linear.weight"), device);
        toy.linear.bias = Some(param(data("linear.bias"), device));
        toy.into()
    }

    fn adapted<M: ToyModel>(&self, device: &Device) -> M {
        let mut toy: M = self.base(device);
        toy.load_adapter(DEFAULT_ADAPTER, directory(self.name)).unwrap();
        toy
    }

    fn ids(&self, device: &Device) -> Tensor<2, Int> {
        Tensor::from_data(self.expected["input_ids"].clone(), device)
    }

    fn output<M: ToyModel>(&self, toy: &M, device: &Device) -> TensorData {
        toy.forward(self.ids(device)).into_data()
    }
}

#[test]
fn outputs_of_base_adapted_and_merged_model_are_those_of_peft() {
    check_outputs::<Toy>();
    check_outputs::<WrappedToy>();
}

fn check_outputs<M: ToyModel>() {
    for case in Case::all() {
        let name = case.name;
        for device in [Device::default(), Device::default().autodiff()] {
            let base = case.output(&case.base::<M>(&device), &device);
            let worst_base = assert_close(name, &base, &case.expected["base.output"], FORWARD);
            let mut toy: M = case.adapted(&device);
            let before = parameters(&toy);
            let adapted = case.output(&toy, &device);
            let worst = assert_close(name, &adapted, &case.expected["output"], FORWARD);
            assert_different(name, &adapted, &base);

            toy.merge_adapter().unwrap();
            let for_now = case.output(&toy, &device);
            assert_close(name, &for_now, &case.expected["merged.output"], FORWARD);
            assert_close(name, &for_now, &adapted, REORDERED);
            toy.unmerge_adapter().unwrap();
            assert_eq!(parameters(&toy), before, "{name}");
            assert_eq!(case.output(&toy, &device), adapted, "{name}");
            assert_eq!(case.output(&toy.without_adapters().unwrap(), &device), base, "{name}");

            toy.merge_and_unload().unwrap();
            let merged = case.output(&toy, &device);
            let worst_merged = assert_close(name, &merged, &case.expected["merged.output"], FORWARD);
            assert!(toy.adapters().is_empty());
            println!(
                "{name}: outputs deviate by {worst_base:.1e} (base), {worst:.1e} (adapted), {worst_merged:.1e} (merged)"
            );
        }
    }
}

#[test]
fn gradients_are_those_of_peft_and_the_base_has_none() {
    check_gradients::<Toy>();
    check_gradients::<WrappedToy>();
}

fn check_gradients<M: ToyModel>() {
    for case in Case::all() {
        let name = case.name;
        let device = Device::default().autodiff();
        let toy: M = case.adapted(&device);
        let loss = toy.forward(case.ids(&device)).square().sum();
        let value = f64::from(loss.clone().into_scalar::<f32>());
        assert_close_number(name, value, case.facts.loss, LOSS);
        assert_eq!(toy.trainable_parameters().trainable, case.facts.num_trainable_parameters, "{name}");

        let found = gradients(&toy, &GradientsParams::from_grads(loss.backward(), &toy));
        let count = found.len();
        let found = to_peft(&toy, &found);
        let expected =
            case.expected.iter().filter_map(|(key, data)| Some((key.strip_prefix("grad.")?, data)));
        let expected: BTreeMap<&str, &TensorData> = expected.collect();
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{name}");
        assert_eq!(count, expected.len(), "{name}: the base has gradients");
        let worst = expected.iter().map(|(key, gradient)| {
            assert_close(&format!("{name} gradient of {key}"), &found[*key], gradient, GRADIENT)
        });
        println!("{name}: gradients deviate by {:.1e}", worst.fold(0.0, f64::max));
        assert_eq!(base_parameters(&toy), parameters(&case.base::<M>(&device)), "{name}");
    }
}

#[test]
fn files_are_written_as_peft_wrote_them() {
    check_files::<Toy>();
    check_files::<WrappedToy>();
}

fn check_files<M: ToyModel>() {
    for case in Case::all() {
        let toy: M = case.adapted(&Device::default());
        let (written, there) = (tempfile::tempdir().unwrap(), directory(case.name));
        toy.save_adapter(DEFAULT_ADAPTER, written.path()).unwrap();
        let both = |file: &str| [written.path().join(file), there.join(file)];
        let [found, expected] = both("adapter_model.safetensors").map(|path| read_file(&path));
        assert_eq!(found, expected, "{}", case.name);
        let [mut found, expected] = both("adapter_config.json").map(|path| read_json(&path));
        found["target_modules"].as_array_mut().unwrap().sort_by_key(ToString::to_string);
        assert_eq!(found, expected, "{}", case.name);
    }
}

#[test]
fn dropout_is_refused_on_plain_layers_that_do_not_show_their_input() {
    for case in Case::all() {
        let there = directory(case.name);
        let mut config = read_json(&there.join("adapter_config.json"));
        config["lora_dropout"] = 0.1.into();
        let changed = tempfile::tempdir().unwrap();
        write_adapter(changed.path(), &config, &read_file(&there.join("adapter_model.safetensors")));
        let mut toy: Toy = case.base(&Device::default());
        let error = toy.load_adapter(DEFAULT_ADAPTER, changed.path()).unwrap_err();
        let PeftError::DropoutNeedsLoraLinear { modules } = &error else { panic!("{error}") };
        let mut expected = case.facts.adapted_modules.clone();
        // What an embedding is given are ids, on which dropout does not act.
        expected.retain(|module| module != "embedding");
        assert_eq!(modules.len(), expected.len());
        assert!(expected.iter().all(|module| modules.contains(module)), "{error}");
    }
}

/// Writes the case as `check_in_python.py` reads it.
pub(crate) fn export(root: &Path) {
    for case in Case::all() {
        let device = Device::default();
        let directory = root.join(case.name);
        let adapter = directory.join("adapter");
        std::fs::create_dir_all(directory.join("base")).unwrap();
        let weights = burn_peft_tests::fixture::directory(case.name).join("model.safetensors");
        std::fs::copy(weights, directory.join("base/model.safetensors")).unwrap();
        let mut toy: Toy = case.adapted(&device);
        toy.save_adapters(adapter).unwrap();
        let rows = |data: &TensorData| -> Vec<Vec<f32>> {
            let values: Vec<f32> = data.iter().collect();
            values.chunks(data.shape()[1]).map(<[f32]>::to_vec).collect()
        };
        let adapted = case.output(&toy, &device);
        toy.merge_and_unload().unwrap();
        let expected = serde_json::json!({
            "input_ids": rows(&case.expected["input_ids"]),
            "base.output": rows(&case.output(&case.base::<Toy>(&device), &device)),
            "output": rows(&adapted),
            "merged.output": rows(&case.output(&toy, &device)),
        });
        std::fs::write(directory.join("expected.json"), expected.to_string()).unwrap();
    }
}
