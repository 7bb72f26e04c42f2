//! Parameters and gradients of a model by name.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Tensor, TensorData};

/// The values of all parameters by path, adapters' included: `….q_proj.weight`, `….q_proj.weight.peft.default.a`.
pub fn parameters<M: Module>(model: &M) -> BTreeMap<String, TensorData> {
    collect(model, None)
}

/// The parameters of the base model only.
pub fn base_parameters<M: Module>(model: &M) -> BTreeMap<String, TensorData> {
    let mut parameters = parameters(model);
    parameters.retain(|path, _| !is_adapter(path));
    parameters
}

/// The gradients of those parameters that have one.
pub fn gradients<M: Module>(model: &M, gradients: &GradientsParams) -> BTreeMap<String, TensorData> {
    collect(model, Some(gradients))
}

/// Whether a parameter belongs to an adapter.
pub fn is_adapter(path: &str) -> bool {
    path.contains(".peft.")
}

/// A tensor of a checkpoint or a gradient of it as Burn has it: linear weights are `[d_in, d_out]` there, `[d_out, d_in]`
/// in torch.
pub fn from_torch(name: &str, data: &TensorData) -> TensorData {
    if data.shape().len() == 2 && !name.contains("embed_tokens.weight") {
        transposed(data)
    } else {
        data.clone()
    }
}

/// The name of an adapter's parameter in `adapter_model.safetensors`.
///
/// # Panics
/// If `path` is not that of an adapter's parameter.
pub fn peft_key(path: &str) -> String {
    let (weight, factor) =
        path.split_once(".peft.default.").unwrap_or_else(|| panic!("`{path}` is no adapter's"));
    let module = weight.strip_suffix(".weight").unwrap();
    let suffix = match (module.ends_with("embed_tokens"), factor) {
        (false, "a") => "lora_A.weight",
        (false, "b") => "lora_B.weight",
        (true, "a") => "lora_embedding_A",
        (true, "b") => "lora_embedding_B",
        _ => panic!("unknown factor in `{path}`"),
    };
    format!("base_model.model.{module}.{suffix}")
}

/// The adapters' entries of `by_path` as peft has them: by its key, transposed.
pub fn to_peft(by_path: &BTreeMap<String, TensorData>) -> BTreeMap<String, TensorData> {
    let adapters = by_path.iter().filter(|(path, _)| is_adapter(path));
    adapters.map(|(path, data)| (peft_key(path), transposed(data))).collect()
}

/// The transpose of a matrix of f32.
pub fn transposed(data: &TensorData) -> TensorData {
    let (rows, columns) = (data.shape()[0], data.shape()[1]);
    let values: Vec<f32> = data.iter::<f32>().collect();
    let turned = (0..columns).flat_map(|column| (0..rows).map(move |row| (row, column)));
    TensorData::new(turned.map(|(row, column)| values[row * columns + column]).collect(), [columns, rows])
}

fn collect<M: Module>(model: &M, gradients: Option<&GradientsParams>) -> BTreeMap<String, TensorData> {
    let mut collector = Collector { path: vec![], gradients, found: BTreeMap::new() };
    model.visit(&mut collector);
    collector.found
}

/// Collects values, or gradients if there are any.
struct Collector<'a> {
    path: Vec<String>,
    gradients: Option<&'a GradientsParams>,
    found: BTreeMap<String, TensorData>,
}

impl ModuleVisitor for Collector<'_> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = match self.gradients {
            None => Some(param.base()),
            Some(gradients) => gradients.get::<D>(param.id),
        };
        if let Some(tensor) = tensor {
            self.found.insert(self.path.join("."), tensor.into_data());
        }
    }
}
