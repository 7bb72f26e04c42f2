//! Losses added up without waiting for the device.

use burn::tensor::{FloatDType, Tensor};

use crate::LlamaError;

/// A mean loss that stays on the device until it is asked for.
#[derive(Default)]
pub(super) struct MeanLoss {
    pub(super) sum: Option<Tensor<1>>,
    pub(super) count: usize,
}

impl MeanLoss {
    /// Adds the sum of the losses of `count` tokens.
    pub(super) fn add(&mut self, (sum, count): (Tensor<1>, usize)) {
        let sum = sum.cast(FloatDType::F32);
        self.sum = Some(match self.sum.take() {
            Some(before) => before + sum,
            None => sum,
        });
        self.count += count;
    }

    /// Reads the mean and begins anew.
    pub(super) fn take(&mut self) -> Result<Option<f64>, LlamaError> {
        let Self { sum, count } = std::mem::take(self);
        sum.map(|sum| Ok(scalar(sum)? / count as f64)).transpose()
    }
}

pub(super) fn scalar(tensor: Tensor<1>) -> Result<f64, LlamaError> {
    tensor.try_into_scalar::<f64>().map_err(|error| LlamaError::DeviceRead { source: error.into() })
}
