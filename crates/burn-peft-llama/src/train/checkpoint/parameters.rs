//! The trained parameters of a model: to a file and back.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Tensor, TensorData};
use burn_peft_files::{TensorFileError, WrongFile};
use safetensors::{Dtype, SafeTensors};

use super::optimizer::{self, ParameterState};
use super::state::CheckpointDifference;
use crate::error::LlamaError;
use crate::parameters::{Parameter, parameters};
use crate::weights::writer::Entry;

/// Whether a checkpoint holds the values of a parameter: it is trained, or was perhaps trained before, or is a part of how
/// an adapter started.
pub(super) fn is_saved(parameter: &Parameter) -> bool {
    parameter.is_trained() || parameter.adapter
}

/// The name of a parameter in the file.
fn key(parameter: &str) -> String {
    format!("parameter.{parameter}")
}

/// The parameters that go into the checkpoint of `step`.
///
/// # Errors
/// [`LlamaError::NotFinite`] if one of their numbers is infinite or not a number.
pub(super) fn entries<M: Module>(model: &M, step: usize) -> Result<Vec<Entry>, LlamaError> {
    let entry = |parameter: Parameter| {
        let data = (parameter.read)()?;
        refuse_other_numbers(&data, || format!("`{}`", parameter.name), step)?;
        Ok(Entry {
            name: key(&parameter.name),
            shape: data.shape().to_vec(),
            dtype: data.dtype(),
            read: Box::new(move || Ok(data.as_bytes().to_vec())),
        })
    };
    parameters(model).into_iter().filter(is_saved).map(entry).collect()
}

/// # Errors
/// [`LlamaError::NotFinite`] if a number of the tensor `name` is infinite or none.
pub(super) fn refuse_other_numbers(
    data: &TensorData,
    name: impl FnOnce() -> String,
    step: usize,
) -> Result<(), LlamaError> {
    match data.iter::<f64>().find(|number| !number.is_finite()) {
        Some(value) => {
            let what = format!("a number of {}", name());
            Err(LlamaError::NotFinite { what, value, step, examples: vec![] })
        }
        None => Ok(()),
    }
}

/// The tensors of a checkpoint.
pub(super) struct Values(BTreeMap<String, (DType, Vec<usize>, Vec<u8>)>);

impl Values {
    pub(super) fn open(path: &Path) -> Result<Self, LlamaError> {
        let hint = "it belongs to a checkpoint of the trainer";
        let bytes =
            std::fs::read(path).map_err(|source| LlamaError::ReadFile { path: path.into(), source, hint })?;
        let malformed = |source| match WrongFile::detect(&bytes) {
            Some(found) => LlamaError::WrongFile { path: path.into(), found },
            None => LlamaError::WeightsFile(TensorFileError::Format { path: path.into(), source }),
        };
        let file = SafeTensors::deserialize(&bytes).map_err(malformed)?;
        let value = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
            let dtype = match view.dtype() {
                Dtype::F64 => DType::F64,
                Dtype::F16 => DType::F16,
                Dtype::BF16 => DType::BF16,
                Dtype::F32 => DType::F32,
                _ => return None,
            };
            Some((name, (dtype, view.shape().to_vec(), view.data().to_vec())))
        };
        Ok(Self(file.tensors().into_iter().filter_map(value).collect()))
    }

    /// Type, shape and bytes of a tensor.
    pub(super) fn get(&self, key: &str) -> Option<(DType, &[usize], &[u8])> {
        self.0.get(key).map(|(dtype, shape, bytes)| (*dtype, &shape[..], &bytes[..]))
    }

    /// Whether there is a value of a parameter.
    pub(super) fn has(&self, parameter: &str) -> bool {
        self.0.contains_key(&key(parameter))
    }

    /// Which of the tensors do not fit the trained parameters of `model`, or are missing.
    pub(super) fn differences<M: Module>(
        &self,
        model: &M,
        optimizer: &BTreeMap<String, ParameterState>,
    ) -> Vec<CheckpointDifference> {
        let mut found = vec![];
        let mut wanted = vec![];
        let names: Vec<Parameter> = parameters(model);
        for parameter in names.iter().filter(|parameter| is_saved(parameter) || self.has(&parameter.name)) {
            let shape = parameter.shape_in_memory();
            let now = match is_saved(parameter) {
                true => format!("{:?}{shape:?}", parameter.dtype),
                false => "frozen".to_string(),
            };
            let key = key(&parameter.name);
            let then = self.get(&key).map(|(dtype, shape, _)| format!("{dtype:?}{shape:?}"));
            let then = then.unwrap_or_else(|| "not trained".to_string());
            if now != then {
                found.push(CheckpointDifference::new(format!("`{}`", parameter.name), then, now));
            }
            wanted.push(key);
        }
        for (name, state) in optimizer {
            let Some(parameter) = names.iter().find(|parameter| parameter.name == *name) else {
                found.push(CheckpointDifference::new(format!("`{name}`"), "trained", "none"));
                wanted.extend(state.tensors.iter().map(|tensor| optimizer::key(name, tensor)));
                continue;
            };
            let shape = parameter.shape_in_memory();
            if state.rank() != Some(shape.len()) {
                let rank = state.rank().map_or("none".to_string(), |rank| rank.to_string());
                found.push(CheckpointDifference::new(
                    format!("rank of `{name}`"),
                    rank,
                    shape.len().to_string(),
                ));
            }
            for key in state.tensors.iter().map(|tensor| optimizer::key(name, tensor)) {
                let then = self.get(&key).map_or("missing".to_string(), |(_, shape, _)| format!("{shape:?}"));
                let now = format!("{shape:?}");
                if now != then {
                    found.push(CheckpointDifference::new(format!("`{key}`"), then, now));
                }
                wanted.push(key);
            }
        }
        let unknown = self.0.keys().filter(|key| !wanted.contains(key));
        found.extend(unknown.map(|key| CheckpointDifference::new(format!("`{key}`"), "one", "none")));
        found
    }

    /// `model` with the parameters of the checkpoint.
    pub(super) fn fill<M: Module>(&self, model: M) -> M {
        struct Fill<'a> {
            values: &'a Values,
            path: Vec<String>,
        }

        impl ModuleMapper for Fill<'_> {
            fn enter_module(&mut self, name: &str, _container: &str) {
                self.path.push(name.to_string());
            }

            fn exit_module(&mut self, _name: &str, _container: &str) {
                self.path.pop();
            }

            fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                let Some((dtype, shape, bytes)) = self.values.get(&key(&self.path.join("."))) else {
                    return param;
                };
                let data = TensorData::from_bytes_vec(bytes.to_vec(), shape.to_vec(), dtype);
                param.map(|old| {
                    let new = Tensor::from_data(data, (&old.device(), dtype));
                    new.set_require_grad(old.is_require_grad())
                })
            }
        }

        model.map(&mut Fill { values: self, path: vec![] })
    }
}
