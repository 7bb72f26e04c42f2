//! Losses added up without waiting for the device.

use burn::tensor::{FloatDType, Tensor};
use burn_peft_ops::RunningSum;

use crate::error::LlamaError;

/// A mean loss that stays on the device until it is asked for.
#[derive(Default)]
pub(super) struct MeanLoss {
    sum: RunningSum,
    pub(super) count: usize,
}

impl MeanLoss {
    /// Adds the sum of the losses of `count` tokens.
    pub(super) fn add(&mut self, (sum, count): (Tensor<1>, usize)) {
        self.sum.add(sum.cast(FloatDType::F32));
        self.count += count;
    }

    /// The sum of the losses, if there are any, and the number of their tokens.
    pub(super) fn total(self) -> (Option<Tensor<1>>, usize) {
        (self.sum.total(), self.count)
    }

    /// Reads the mean and begins anew.
    pub(super) fn take(&mut self) -> Result<Option<f64>, LlamaError> {
        let (sum, count) = std::mem::take(self).total();
        sum.map(|sum| Ok(scalar(sum)? / count as f64)).transpose()
    }
}

/// Reads one number.
pub(super) fn scalar(tensor: Tensor<1>) -> Result<f64, LlamaError> {
    tensor.try_into_scalar::<f64>().map_err(|error| LlamaError::DeviceRead { source: error.into() })
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn the_mean_of_many_batches_is_that_in_f64() {
        let mut mean = MeanLoss::default();
        for _ in 0..5_000 {
            mean.add((Tensor::from_data([0.1_f32], &Device::default()), 2));
        }
        let found = mean.take().unwrap().unwrap();
        // One after the other, the sum would be 1.4e-5 off.
        assert!((found / (f64::from(0.1_f32) / 2.0) - 1.0).abs() < 3e-7, "{found}");
        assert!(mean.take().unwrap().is_none());
    }
}
