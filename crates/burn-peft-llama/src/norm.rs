//! Normalisation by the root mean square.

use burn::{
    module::{Module, Param},
    tensor::{DType, Tensor},
};

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
    pub(crate) fn new(weight: Param<Tensor<1>>, epsilon: f64) -> Self {
        Self { weight, epsilon }
    }

    /// Normalises the last axis.
    ///
    /// # Shapes
    ///
    /// - input: `[.., d]`
    /// - output: `[.., d]`
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let dtype = x.dtype();
        let x = if dtype == DType::F32 { x } else { x.cast(DType::F32) };
        let inverse = (x.clone().square().mean_dim(D - 1) + self.epsilon).sqrt().recip();
        let y = x * inverse;
        let y = if dtype == DType::F32 { y } else { y.cast(dtype) };
        y * self.weight.val().unsqueeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn values_match_the_formula_in_both_types() {
        let device = Device::flex();
        let weight = Tensor::<1>::from_data([1.0, 2.0, -1.0], &device);
        let x = Tensor::<2>::from_data([[3.0, -4.0, 12.0], [0.5, 0.0, 0.25]], &device);
        let norm = RmsNorm::new(Param::from_tensor(weight.clone()), 0.1);
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

        // 300² overflows f16, so the f16 result is right only if the mean is taken in f32.
        let half = RmsNorm::new(Param::from_tensor(weight.cast(DType::F16)), 0.1);
        let y = half.forward((x * 100.0).cast(DType::F16));
        assert_eq!(y.dtype(), DType::F16);
        let y: Vec<f32> = y.cast(DType::F32).into_data().iter::<f32>().collect();
        assert!((y[0] - 3.0 / (169.0_f32 / 3.0).sqrt()).abs() < 1e-2, "{y:?}");
    }
}
