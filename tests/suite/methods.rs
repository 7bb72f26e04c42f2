//! What methods beyond plain LoRA compute, against what peft computed. Whole adapters of theirs are among the cases of
//! `lora_parity` and `training_parity`.

mod conversion;
mod dora;
mod lora_plus;
mod starts;
mod tokens;

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, Param};
use burn::nn::LinearConfig;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft::{LoraLinear, PeftModel};

/// One layer.
#[derive(Module, Debug)]
struct One {
    layer: LoraLinear,
}

impl One {
    /// A layer without a bias whose weight is this one, `[d_in, d_out]`.
    fn new(weight: TensorData, device: &Device) -> Self {
        let [d_in, d_out] = [weight.shape()[0], weight.shape()[1]];
        let mut layer = LinearConfig::new(d_in, d_out).with_bias(false).init(device);
        layer.weight = Param::from_tensor(Tensor::from_data(weight, device));
        Self { layer: layer.into() }
    }
}

/// The tensors of adapter `default` by the module's path and their name.
fn tensors<M: PeftModel>(model: &M) -> BTreeMap<(String, &'static str), Tensor<2>> {
    let tensors = model.adapter_tensors("default").unwrap().into_iter();
    tensors.map(|tensor| ((tensor.module, tensor.name), tensor.tensor)).collect()
}

/// `scaling * A B` of a module, in torch's layout `[d_out, d_in]`.
fn update<M: PeftModel>(model: &M, module: &str, scaling: f64) -> TensorData {
    let tensors = tensors(model);
    let [a, b] = ["a", "b"].map(|name| tensors[&(module.to_string(), name)].clone());
    a.matmul(b).mul_scalar(scaling).transpose().into_data()
}

/// Gives the tensors of adapters with these names other values.
struct Set<'a>(&'a [(&'a str, TensorData)], Vec<String>);

impl ModuleMapper for Set<'_> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.1.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.1.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let is_adapter = self.1.iter().any(|name| name == "peft");
        let value =
            self.0.iter().find(|(name, _)| is_adapter && self.1.last().is_some_and(|last| last == name));
        match value {
            Some((_, value)) => param.map(|tensor| {
                let value = Tensor::from_data(value.clone(), &tensor.device());
                value.set_require_grad(tensor.is_require_grad())
            }),
            None => param,
        }
    }
}

fn with_values<M: Module>(model: M, values: &[(&str, TensorData)]) -> M {
    model.map(&mut Set(values, vec![]))
}
