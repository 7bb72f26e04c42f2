//! Factors to and from safetensors bytes.
//!
//! The `safetensors` crate is used directly: burn-store writes a module's own parameters under the module's own paths,
//! and here neither the paths nor the layout nor the set of tensors are the module's.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use burn::tensor::{DType, Device, Tensor, TensorData};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};

use crate::error::{PeftError, TensorProblem};

/// The bytes of a safetensors file with these tensors and the metadata that PyTorch's readers ask for.
pub(super) fn to_bytes(path: &Path, tensors: &BTreeMap<String, Tensor<2>>) -> Result<Vec<u8>, PeftError> {
    let stored: Vec<(&String, Dtype, Vec<usize>, TensorData)> = tensors
        .iter()
        .map(|(key, tensor)| {
            let data = tensor.to_data();
            let dtype = match data.dtype() {
                DType::F16 => Dtype::F16,
                DType::BF16 => Dtype::BF16,
                _ => Dtype::F32,
            };
            let data = if dtype == Dtype::F32 { data.convert::<f32>() } else { data };
            (key, dtype, tensor.dims().to_vec(), data)
        })
        .collect();
    let error = |source| PeftError::Safetensors { path: path.into(), source };
    let views = stored
        .iter()
        .map(|(key, dtype, shape, data)| Ok((*key, TensorView::new(*dtype, shape.clone(), data.as_bytes())?)))
        .collect::<Result<Vec<_>, _>>()
        .map_err(error)?;
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    serialize(views, Some(metadata)).map_err(error)
}

/// Hands out the tensors of a file one by one.
pub(super) struct Reader<'a> {
    file: SafeTensors<'a>,
    taken: Vec<String>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(path: &Path, bytes: &'a [u8]) -> Result<Self, PeftError> {
        let file = SafeTensors::deserialize(bytes)
            .map_err(|source| PeftError::Safetensors { path: path.into(), source })?;
        Ok(Self { file, taken: vec![] })
    }

    /// The tensor `key`, in f32, if it has the expected shape.
    pub(super) fn take(
        &mut self,
        key: &str,
        expected: [usize; 2],
        device: &Device,
    ) -> Result<Tensor<2>, TensorProblem> {
        let view = self
            .file
            .tensor(key)
            .map_err(|_| TensorProblem::Missing { key: key.to_string(), closest: None })?;
        self.taken.push(key.to_string());
        if view.shape() != expected {
            return Err(TensorProblem::Shape {
                key: key.to_string(),
                expected: expected.to_vec(),
                found: view.shape().to_vec(),
            });
        }
        let bytes = view.data();
        let values: Vec<f32> = match view.dtype() {
            Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::F16 => bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
            Dtype::BF16 => {
                bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect()
            }
            other => {
                return Err(TensorProblem::DType { key: key.to_string(), found: format!("{other:?}") });
            }
        };
        Ok(Tensor::from_data(TensorData::new(values, expected), (device, DType::F32)))
    }

    /// Keys that nobody took, sorted.
    pub(super) fn leftover(&self) -> Vec<String> {
        let names = self.file.names().into_iter().map(ToString::to_string);
        let mut names: Vec<String> = names.filter(|name| !self.taken.contains(name)).collect();
        names.sort();
        names
    }
}
