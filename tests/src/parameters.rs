//! Parameters and gradients of a model by name.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
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

/// The model with other values in those parameters for which `change` gives some, from their path and what they were. They may
/// have another type; what is trained stays so.
pub fn with_changed<M: Module>(model: M, change: impl FnMut(&str, TensorData) -> Option<TensorData>) -> M {
    struct Changer<F>(F, Vec<String>);

    impl<F: FnMut(&str, TensorData) -> Option<TensorData>> ModuleMapper for Changer<F> {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.1.push(name.to_string());
        }

        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.1.pop();
        }

        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let Some(data) = (self.0)(&self.1.join("."), param.base().to_data()) else { return param };
            param.map(|tensor| {
                let dtype = data.dtype();
                let changed = Tensor::from_data(data, (&tensor.device(), dtype));
                changed.set_require_grad(tensor.is_require_grad())
            })
        }
    }

    model.map(&mut Changer(change, vec![]))
}

/// The model with other factors of an adapter: as large as `InitLoraWeights::Random` draws them, but always the same. The
/// generator of a device is shared with tests that run at the same time.
pub fn with_fixed_factors<M: Module>(model: M, adapter: &str) -> M {
    let ends = ["a", "b"].map(|factor| format!(".peft.{adapter}.{factor}"));
    with_changed(model, |path, data| {
        if !ends.iter().any(|end| path.ends_with(end)) {
            return None;
        }
        let (start, shape) = (path.bytes().map(f64::from).sum::<f64>(), data.shape());
        let bound = 1.0 / (shape[0] as f64).sqrt();
        // Squares, so that no row is a sum of others.
        let number = |i: usize| (bound * (start + (i * i) as f64).sin()) as f32;
        let numbers: Vec<f32> = (0..shape.num_elements()).map(number).collect();
        Some(TensorData::new(numbers, shape))
    })
}

/// A tensor of a checkpoint or a gradient of it as Burn has it: linear weights are `[d_in, d_out]` there, `[d_out, d_in]`
/// in torch.
pub fn from_torch(name: &str, data: &TensorData) -> TensorData {
    let module = name.strip_suffix(".weight").unwrap_or(name);
    if data.shape().len() == 2 && !is_embedding(module) { transposed(data) } else { data.clone() }
}

/// The entries of `by_path` that belong to adapter `default` of `model`, values or gradients, as peft has them: by their
/// key in `adapter_model.safetensors`, in torch's layout.
///
/// # Panics
/// If one of them belongs to another adapter.
pub fn to_peft<M: Module>(model: &M, by_path: &BTreeMap<String, TensorData>) -> BTreeMap<String, TensorData> {
    let all = parameters(model);
    let adapters = by_path.iter().filter(|(path, _)| is_adapter(path));
    let convert = |(path, data): (&String, &TensorData)| {
        let place = Place::of(path);
        let base = all[&format!("{}.{}", place.module, place.parameter)].shape();
        let is_adapted = all.contains_key(&format!("{}.weight{MARK}a", place.module));
        (place.peft_key(is_adapted), place.to_torch(data, base))
    };
    adapters.map(convert).collect()
}

/// What precedes the last component in the path of a parameter of adapter `default`.
const MARK: &str = ".peft.default.";

/// Where a parameter of an adapter is.
struct Place<'a> {
    module: &'a str,
    /// The base parameter that it belongs to, `weight` or `bias`.
    parameter: &'a str,
    /// `a`, `b`, `bias`, `copy`, `magnitude` or `tokens`.
    part: &'a str,
}

impl<'a> Place<'a> {
    fn of(path: &'a str) -> Self {
        let (base, part) = path.split_once(MARK).unwrap_or_else(|| panic!("`{path}` is no adapter's"));
        let (module, parameter) = base.rsplit_once('.').unwrap();
        Self { module, parameter, part }
    }

    /// peft moves the parameters of a module that it adapts into `base_layer`.
    fn peft_key(&self, is_adapted: bool) -> String {
        let Self { module, parameter, part } = self;
        let suffix = match (*part, is_embedding(module)) {
            ("a", false) => "lora_A.weight",
            ("b", false) => "lora_B.weight",
            ("a", true) => "lora_embedding_A",
            ("b", true) => "lora_embedding_B",
            ("bias", false) => "lora_B.bias",
            ("magnitude", _) => "lora_magnitude_vector",
            ("tokens", _) => "token_adapter.trainable_tokens_delta",
            ("copy", _) if is_adapted => &format!("base_layer.{parameter}"),
            ("copy", _) => parameter,
            _ => panic!("unknown part `{part}` of `{module}`"),
        };
        format!("base_model.model.{module}.{suffix}")
    }

    /// A part of an adapter in torch's layout; `base` is the shape of the base parameter in Burn's.
    ///
    /// The factors of a convolution are convolutions: `A` has the base's kernel, `B` one of 1.
    fn to_torch(&self, data: &TensorData, base: &[usize]) -> TensorData {
        let is_convolution = base.len() > 2;
        match self.part {
            "a" | "b" => {
                let factor = transposed(data);
                let [rows, columns] = [factor.shape()[0], factor.shape()[1]];
                match (is_convolution, self.part) {
                    (false, _) => factor,
                    (true, "a") => shaped(&factor, &[&[rows], &base[1..]].concat()),
                    (true, _) => shaped(&factor, &[&[rows, columns], &vec![1; base.len() - 2][..]].concat()),
                }
            }
            "copy" => {
                let copy = shaped(data, base);
                let is_linear = base.len() == 2 && !is_embedding(self.module);
                if is_linear { transposed(&copy) } else { copy }
            }
            "tokens" => data.clone(),
            "magnitude" if is_convolution => {
                let channels = data.shape()[1];
                shaped(data, &[&[1, channels], &vec![1; base.len() - 2][..]].concat())
            }
            // Vectors are one row in memory.
            _ => shaped(data, &[data.shape()[1]]),
        }
    }
}

/// Embeddings are told by their names: `embed`, `embedding`, `embed_tokens`.
fn is_embedding(module: &str) -> bool {
    module.rsplit('.').next().is_some_and(|name| name.starts_with("embed"))
}

/// The same values of f32 in another shape.
fn shaped(data: &TensorData, shape: &[usize]) -> TensorData {
    TensorData::new(data.iter::<f32>().collect::<Vec<_>>(), shape.to_vec())
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
