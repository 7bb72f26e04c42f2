//! The norms of the model.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn_peft_ops::rms_norm;

use crate::config::LlamaConfig;
use crate::source::{Kind, Source};

/// `y = x / sqrt(mean(x²) + eps) * weight` over the last axis.
///
/// The mean and the division are in f32 whatever the type of `x`, as in transformers.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// `[d]`
    pub weight: Param<Tensor<1>>,
    epsilon: f64,
}

impl RmsNorm {
    pub(crate) fn build<S: Source>(config: &LlamaConfig, from: &mut S, path: &str) -> Result<Self, S::Error> {
        let weight = from.parameter(&format!("{path}.weight"), [config.hidden_size], Kind::Norm)?;
        Ok(Self { weight, epsilon: config.rms_norm_eps })
    }

    /// Normalises the last axis.
    ///
    /// # Shapes
    /// - input: `[.., d]`
    /// - output: `[.., d]`
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        rms_norm(x, self.weight.val(), self.epsilon)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{DType, Device};

    #[test]
    fn values_match_the_formula_in_both_types() {
        let device = Device::default();
        let weight = Tensor::<1>::from_data([1.0, 2.0, -1.0], &device);
        let x = Tensor::<2>::from_data([[3.0, -4.0, 12.0], [0.5, 0.0, 0.25]], &device);
        let norm = RmsNorm { weight: Param::from_tensor(weight.clone()), epsilon: 0.1 };
        let y: Vec<f32> = norm.forward(x.clone()).into_data().iter::<f32>().collect();
        let rows = [[3.0_f32, -4.0, 12.0], [0.5, 0.0, 0.25]];
        let expected: Vec<f32> = rows
            .iter()
            .flat_map(|row| {
                let mean = row.iter().map(|x| x * x).sum::<f32>() / 3.0;
                let root = (mean + 0.1).sqrt();
                [row[0] / root, 2.0 * row[1] / root, -row[2] / root]
            })
            .collect();
        for (y, expected) in y.iter().zip(&expected) {
            assert!((y - expected).abs() < 1e-6, "{y} {expected}");
        }

        // A GPU may lack f16.
        let device = Device::flex();
        let (weight, x) = (weight.to_device(&device), x.to_device(&device));
        // 300² overflows f16, so the f16 result is right only if the mean is taken in f32.
        let half = RmsNorm { weight: Param::from_tensor(weight.cast(DType::F16)), epsilon: 0.1 };
        let y = half.forward((x * 100.0).cast(DType::F16));
        assert_eq!(y.dtype(), DType::F16);
        let y: Vec<f32> = y.cast(DType::F32).into_data().iter::<f32>().collect();
        assert!((y[0] - 3.0 / (169.0_f32 / 3.0).sqrt()).abs() < 1e-2, "{y:?}");
    }
}
