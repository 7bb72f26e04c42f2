//! A model from the tensors of a checkpoint.

use burn::module::Param;
use burn::tensor::{DType, Device, Element, ElementConversion, Tensor, TensorData};
use half::{bf16, f16};

use super::checkpoint::Checkpoint;
use super::transpose::put_rows;
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
        let data = match self.dtype {
            DType::BF16 => TensorData::new(self.numbers::<bf16>(path, &shape, kind)?, shape),
            DType::F16 => TensorData::new(self.numbers::<f16>(path, &shape, kind)?, shape),
            _ => TensorData::new(self.numbers::<f32>(path, &shape, kind)?, shape),
        };
        let tensor = Tensor::from_data(data, (self.device, self.dtype));
        // A GPU takes numbers when it gets to it: until then, they are in the host's memory.
        self.device.sync().map_err(|error| LlamaError::DeviceRead { source: Box::new(error) })?;
        Ok(Param::from_tensor(tensor))
    }
}

impl Loader<'_> {
    /// The numbers of a tensor as the model holds them. What they were read from is never in memory as a whole.
    fn numbers<E: Element>(&self, path: &str, shape: &[usize], kind: Kind) -> Result<Vec<E>, LlamaError> {
        let convert = |number: f32| number.elem::<E>();
        if let (Kind::Linear, &[d_in, d_out]) = (kind, shape) {
            let mut numbers = vec![convert(0.0); d_in * d_out];
            self.checkpoint.read_parts(path, d_in, |start, part| {
                put_rows(&part, start / d_in, [d_out, d_in], &mut numbers, convert);
            })?;
            return Ok(numbers);
        }
        let mut numbers = Vec::with_capacity(shape.iter().product());
        self.checkpoint.read_parts(path, 1, |_, part| numbers.extend(part.into_iter().map(convert)))?;
        Ok(numbers)
    }
}
