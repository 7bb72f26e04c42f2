//! The parameters of a model, as its files name and shape them.

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::tensor::{DType, Int, Tensor, TensorData};

use crate::error::LlamaError;

/// A parameter of a model.
pub(crate) struct Parameter {
    pub(crate) id: ParamId,
    pub(crate) name: String,
    /// As in a file.
    pub(crate) shape: Vec<usize>,
    pub(crate) dtype: DType,
    /// Whether the model holds it transposed.
    pub(crate) transposed: bool,
    /// Whether it belongs to an adapter.
    pub(crate) adapter: bool,
    trained: Box<dyn Fn() -> bool>,
    /// Reads it, as the model holds it.
    pub(crate) read: Box<dyn Fn() -> Result<TensorData, LlamaError>>,
    /// Reads as many of its elements, evenly spread; all elements of a quantized one.
    pub(crate) sample: Box<dyn Fn(usize) -> Result<TensorData, LlamaError>>,
}

impl Parameter {
    /// Whether it requires a gradient. Makes it if it does not exist yet.
    pub(crate) fn is_trained(&self) -> bool {
        (self.trained)()
    }

    pub(crate) fn shape_in_memory(&self) -> Vec<usize> {
        let mut shape = self.shape.clone();
        if self.transposed {
            shape.reverse();
        }
        shape
    }
}

/// Whether a parameter requires a gradient. Makes those that do not exist yet.
pub(crate) fn is_trained<M: Module>(module: &M) -> bool {
    trained_numbers(module) > 0
}

/// How many numbers require a gradient. Makes parameters that do not exist yet.
pub(crate) fn trained_numbers<M: Module>(module: &M) -> usize {
    #[derive(Default)]
    struct Trained(usize);

    impl ModuleVisitor for Trained {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let value = param.base();
            if value.is_require_grad() {
                self.0 += value.shape().num_elements();
            }
        }
    }

    let mut trained = Trained::default();
    module.visit(&mut trained);
    trained.0
}

/// Lists the parameters of a model without making those that do not exist yet.
pub(crate) fn parameters<M: Module>(model: &M) -> Vec<Parameter> {
    #[derive(Default)]
    struct Reader {
        path: Vec<String>,
        containers: Vec<String>,
        parameters: Vec<Parameter>,
    }

    impl ModuleVisitor for Reader {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.push(name.to_string());
            self.containers.push(container.to_string());
        }

        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.pop();
            self.containers.pop();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let mut shape = param.lazy_shape().to_vec();
            let transposed = D == 2 && self.containers.last().is_some_and(|last| last == "Struct:Linear");
            if transposed {
                shape.reverse();
            }
            let is_own = |name: &String| name == "weight" || name == "bias";
            let (last, above) =
                self.path.split_last().map_or((false, &[][..]), |(last, above)| (is_own(last), above));
            let (trained, read, sample) = (param.clone(), param.clone(), param.clone());
            self.parameters.push(Parameter {
                id: param.id,
                name: self.path.join("."),
                shape,
                dtype: if param.is_initialized() { param.base().dtype() } else { DType::F32 },
                transposed,
                // The parameters of a module end with `weight` or `bias`; what lies below is an adapter.
                adapter: !last || above.iter().any(is_own),
                trained: Box::new(move || trained.base().is_require_grad()),
                read: Box::new(move || data(read.base())),
                sample: Box::new(move |count| data(spread(sample.base(), count))),
            });
        }
    }

    let mut reader = Reader::default();
    model.visit(&mut reader);
    reader.parameters
}

fn data<const D: usize>(tensor: Tensor<D>) -> Result<TensorData, LlamaError> {
    tensor.try_into_data().map_err(|source| LlamaError::DeviceRead { source: Box::new(source) })
}

/// `count` elements of a tensor, evenly spread, the first and the last among them; all of them if there are no more, or if
/// they are packed.
fn spread<const D: usize>(tensor: Tensor<D>, count: usize) -> Tensor<D> {
    let tensor = if tensor.is_autodiff() { tensor.inner() } else { tensor };
    let elements = tensor.shape().num_elements();
    if elements <= count || matches!(tensor.dtype(), DType::QFloat(_)) {
        return tensor;
    }
    let indices: Vec<i64> = (0..count).map(|i| (i * (elements - 1) / (count - 1)) as i64).collect();
    let indices = Tensor::<1, Int>::from_data(TensorData::new(indices, [count]), &tensor.device());
    let mut shape = [1; D];
    shape[D - 1] = count;
    tensor.reshape([elements]).select(0, indices).reshape(shape)
}
