//! What methods beyond plain LoRA compute, against what peft computed. Whole adapters of theirs are among the cases of
//! `lora_parity` and `training_parity`.

mod conversion;
mod dora;
mod lora_plus;
mod starts;
mod tokens;

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::nn::LinearConfig;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft::{LoraLinear, PeftModel};
use burn_peft_tests::parameters::{is_adapter, with_changed};

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
fn with_values<M: Module>(model: M, values: &[(&str, TensorData)]) -> M {
    with_changed(model, |path, _| {
        let (_, last) = path.rsplit_once('.').filter(|_| is_adapter(path))?;
        values.iter().find(|(name, _)| *name == last).map(|(_, value)| value.clone())
    })
}
