//! A model from the tensors of a checkpoint.

use burn::module::Param;
use burn::tensor::{DType, Device, Tensor, TensorData};

use super::checkpoint::Checkpoint;
use super::transpose::transpose;
use crate::error::LlamaError;
use crate::source::{Kind, Source};

/// The parameters of a checkpoint.
pub(super) struct Loader<'a> {
    pub(super) checkpoint: Checkpoint,
    pub(super) device: &'a Device,
    pub(super) dtype: DType,
}

impl Source for Loader<'_> {
    type Error = LlamaError;

    fn parameter<const D: usize>(
        &mut self,
        path: &str,
        shape: [usize; D],
        kind: Kind,
    ) -> Result<Param<Tensor<D>>, LlamaError> {
        let mut values = self.checkpoint.read(path)?;
        if let (Kind::Linear, &[d_in, d_out]) = (kind, shape.as_slice()) {
            values = transpose(&values, [d_out, d_in]);
        }
        let data = TensorData::new(values, shape);
        Ok(Param::from_tensor(Tensor::from_data(data, (self.device, self.dtype))))
    }
}
