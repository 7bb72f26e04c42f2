//! Clipping of gradients by their global norm.

use burn::module::{Module, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{DType, FloatDType, Tensor};
use burn_peft_ops::sum_all;

/// Scales all gradients of `module` together so that their common norm is at most `max_norm`, and returns them with
/// the norm they had, `[1]`.
///
/// With the norm `n`, the square root of the sum of the squares of all gradients, every gradient is multiplied by
/// `min(1, max_norm / (n + 1e-6))`, as by torch's `clip_grad_norm_`. Burn's own `GradientClipping::Norm` clips each
/// tensor by its own norm instead, which changes the direction of the step.
///
/// The norm is summed in f32 and stays on the device: nothing waits for it unless the caller reads it.
pub fn clip_grad_norm<M: Module>(
    module: &M,
    grads: GradientsParams,
    max_norm: f64,
) -> (GradientsParams, Option<Tensor<1>>) {
    let Some(squares) = Squares::of(module, &grads) else { return (grads, None) };
    (clip(module, grads, &squares.norm, max_norm), Some(squares.norm))
}

/// Multiplies all gradients by `min(1, max_norm / (norm + 1e-6))`.
pub(crate) fn clip<M: Module>(
    module: &M,
    grads: GradientsParams,
    norm: &Tensor<1>,
    max_norm: f64,
) -> GradientsParams {
    let factor = norm.clone().add_scalar(1e-6).recip().mul_scalar(max_norm).clamp_max(1.0);
    let mut scale = Scale { grads, factor };
    module.visit(&mut scale);
    scale.grads
}

/// The sum of the squares of each gradient, in f32.
pub(crate) struct Squares {
    /// The parameters, in the order of the module.
    pub(crate) parameters: Vec<ParamId>,
    /// One for each of them, on the device of the first one, `[n]`.
    pub(crate) sums: Tensor<1>,
    /// The norm of all gradients together, `[1]`.
    pub(crate) norm: Tensor<1>,
}

impl Squares {
    /// Of all gradients of `module`; `None` if there are none.
    pub(crate) fn of<M: Module>(module: &M, grads: &GradientsParams) -> Option<Self> {
        struct Visitor<'a> {
            grads: &'a GradientsParams,
            parameters: Vec<ParamId>,
            sums: Vec<Tensor<1>>,
        }

        impl ModuleVisitor for Visitor<'_> {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                let Some(grad) = self.grads.get::<D>(param.id) else { return };
                let grad = match grad.dtype() {
                    // The sum of squares overflows f16 and loses its digits in bf16.
                    DType::F16 | DType::BF16 => grad.cast(FloatDType::F32),
                    _ => grad,
                };
                let sum = sum_all(grad.square());
                self.parameters.push(param.id);
                self.sums.push(match self.sums.first() {
                    None => sum,
                    Some(first) => sum.to_device(&first.device()),
                });
            }
        }

        let mut visitor = Visitor { grads, parameters: vec![], sums: vec![] };
        module.visit(&mut visitor);
        let Visitor { parameters, sums, .. } = visitor;
        if sums.is_empty() {
            return None;
        }
        let sums = Tensor::cat(sums, 0);
        Some(Self { parameters, norm: sum_all(sums.clone()).sqrt(), sums })
    }
}

/// Multiplies all gradients by one factor.
struct Scale {
    grads: GradientsParams,
    factor: Tensor<1>,
}

impl ModuleVisitor for Scale {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(grad) = self.grads.remove::<D>(param.id) {
            let factor = self.factor.clone().to_device(&grad.device()).cast(grad.dtype());
            self.grads.register(param.id, grad * factor.unsqueeze());
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::{Device, Tolerance};

    use super::*;

    fn linear(device: &Device) -> Linear {
        LinearConfig::new(2, 2).init(device)
    }

    /// Gradients [[3, 0], [0, 4]] of the weight and [12, 0] of the bias: a norm of 13.
    fn grads(module: &Linear, dtype: FloatDType) -> GradientsParams {
        let device = Device::default();
        let mut grads = GradientsParams::new();
        let weight = Tensor::<2>::from_floats([[3.0, 0.0], [0.0, 4.0]], &device).cast(dtype);
        grads.register(module.weight.id, weight);
        let bias = module.bias.as_ref().unwrap().id;
        grads.register(bias, Tensor::<1>::from_floats([12.0, 0.0], &device).cast(dtype));
        grads
    }

    fn values(module: &Linear, grads: &GradientsParams) -> Vec<f32> {
        let weight = grads.get::<2>(module.weight.id).unwrap().into_data();
        let bias = grads.get::<1>(module.bias.as_ref().unwrap().id).unwrap().into_data();
        weight.iter::<f32>().chain(bias.iter::<f32>()).collect()
    }

    #[test]
    fn the_norm_is_over_all_tensors_and_the_direction_stays() {
        let module = linear(&Device::default().autodiff());
        let (clipped, norm) = clip_grad_norm(&module, grads(&module, FloatDType::F32), 1.3);
        assert!((norm.unwrap().into_scalar::<f32>() - 13.0).abs() < 1e-5);
        for (value, expected) in values(&module, &clipped).iter().zip([0.3, 0.0, 0.0, 0.4, 1.2, 0.0]) {
            assert!((value - expected).abs() < 1e-6, "{value} != {expected}");
        }
        assert_eq!(clipped.len(), 2);
    }

    #[test]
    fn small_gradients_stay_as_they_are() {
        let module = linear(&Device::default().autodiff());
        let (clipped, norm) = clip_grad_norm(&module, grads(&module, FloatDType::F32), 20.0);
        assert_eq!(values(&module, &clipped), [3.0, 0.0, 0.0, 4.0, 12.0, 0.0]);
        norm.unwrap().into_data().assert_approx_eq::<f32>(&[13.0f32].into(), Tolerance::absolute(1e-5));
    }

    #[test]
    fn f16_gradients_do_not_overflow_and_keep_their_type() {
        // A GPU may lack the type.
        let device = Device::flex();
        let module = linear(&device.clone().autodiff());
        let mut large = GradientsParams::new();
        let value = Tensor::<2>::full([2, 2], 30000.0, &device).cast(FloatDType::F16);
        large.register(module.weight.id, value);
        let (clipped, norm) = clip_grad_norm(&module, large, 1.0);
        assert!((norm.unwrap().into_scalar::<f32>() - 60000.0).abs() < 40.0);
        let grad = clipped.get::<2>(module.weight.id).unwrap();
        assert_eq!(grad.dtype(), DType::F16);
        assert!(grad.into_data().iter::<f32>().all(|value| (value - 0.5).abs() < 1e-3));
    }

    #[test]
    fn the_norm_of_a_large_tensor_is_that_in_f64() {
        let device = Device::default();
        for (rows, columns) in [(4_000, 1_000), (3, 700_001), (9_000_001, 1)] {
            let weight = Tensor::<2>::full([rows, columns], 0.01, &device);
            let linear = Linear { weight: Param::from_tensor(weight.clone()), bias: None };
            let mut grads = GradientsParams::new();
            grads.register(linear.weight.id, weight);
            let norm = clip_grad_norm(&linear, grads, 1.0).1.unwrap().into_scalar::<f32>();
            let expected = f64::from(0.01_f32 * 0.01_f32) * (rows * columns) as f64;
            // Burn's sum is 2.6e-4 off, 1.3e-4 for the norm.
            let found = f64::from(norm) / expected.sqrt();
            assert!((found - 1.0).abs() < 1e-6, "{rows} x {columns}: {found}");
        }
    }

    #[test]
    fn no_gradients_have_no_norm() {
        let module = linear(&Device::default().autodiff());
        assert!(clip_grad_norm(&module, GradientsParams::new(), 1.0).1.is_none());
    }
}
