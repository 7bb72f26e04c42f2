//! A model from the tensors of a checkpoint.

use burn::module::Param;
use burn::tensor::{DType, Device, Tensor, TensorData};

use super::checkpoint::Checkpoint;
use super::transpose::transpose;
use crate::error::LlamaError;
use crate::source::ParameterSource;

/// The parameters of a checkpoint.
pub(super) struct Loader<'a> {
    pub(super) checkpoint: Checkpoint,
    pub(super) device: &'a Device,
    pub(super) dtype: DType,
}

impl Loader<'_> {
    fn param<const D: usize>(&self, values: Vec<f32>, shape: [usize; D]) -> Param<Tensor<D>> {
        let data = TensorData::new(values, shape);
        Param::from_tensor(Tensor::from_data(data, (self.device, self.dtype)))
    }
}

impl ParameterSource for Loader<'_> {
    type Error = LlamaError;

    fn linear(
        &mut self,
        path: &str,
        shape @ [d_in, d_out]: [usize; 2],
    ) -> Result<Param<Tensor<2>>, LlamaError> {
        let values = self.checkpoint.read(path)?;
        Ok(self.param(transpose(&values, [d_out, d_in]), shape))
    }

    fn embedding(&mut self, path: &str, shape: [usize; 2]) -> Result<Param<Tensor<2>>, LlamaError> {
        let values = self.checkpoint.read(path)?;
        Ok(self.param(values, shape))
    }

    fn norm(&mut self, path: &str, d: usize) -> Result<Param<Tensor<1>>, LlamaError> {
        let values = self.checkpoint.read(path)?;
        Ok(self.param(values, [d]))
    }

    fn bias(&mut self, path: &str, d: usize) -> Result<Param<Tensor<1>>, LlamaError> {
        self.norm(path, d)
    }
}
