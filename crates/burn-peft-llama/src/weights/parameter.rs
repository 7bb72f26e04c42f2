//! The parameters of a model, as its files name and shape them.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Tensor, TensorData};

use crate::error::LlamaError;
use crate::model::LlamaForCausalLm;

/// A parameter of a model.
pub(super) struct Parameter {
    pub(super) name: String,
    /// As in a file.
    pub(super) shape: Vec<usize>,
    pub(super) dtype: DType,
    /// Whether the model holds it transposed.
    pub(super) transposed: bool,
    /// Whether it belongs to an adapter.
    pub(super) adapter: bool,
    /// Reads it, as the model holds it.
    pub(super) read: Box<dyn Fn() -> Result<TensorData, LlamaError>>,
}

/// Lists the parameters of a model without making those that do not exist yet.
pub(super) fn parameters(model: &LlamaForCausalLm) -> Vec<Parameter> {
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
            let dtype = if param.is_initialized() { param.base().dtype() } else { DType::F32 };
            let param = param.clone();
            let read = move || {
                let read = |source| LlamaError::DeviceRead { source: Box::new(source) };
                param.base().try_into_data().map_err(read)
            };
            let name = self.path.join(".");
            // The parameters of a module end with `weight` or `bias`; what lies below is an adapter.
            let adapter = !matches!(self.path.last().map(String::as_str), Some("weight" | "bias"));
            let read = Box::new(read);
            self.parameters.push(Parameter { name, shape, dtype, transposed, adapter, read });
        }
    }

    let mut reader = Reader::default();
    model.visit(&mut reader);
    reader.parameters
}
