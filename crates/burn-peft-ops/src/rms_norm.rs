//! Normalisation by the root mean square.

#[cfg(feature = "flex")]
mod flex;

use burn::tensor::{DType, Tensor};

use crate::cast;

/// `x / sqrt(mean(x²) + epsilon) * weight`, with the mean over the last axis.
///
/// The mean and the division are in f32, or f64 if `x` is, and the product is in the type of `x`, as in transformers. A
/// weight of another type is converted to it. On Burn's CPU backend (Flex) it is one pass, forward and backward, that keeps
/// `x` and one number for each row.
///
/// # Shapes
/// - x: `[.., d]`
/// - weight: `[d]`
/// - output: `[.., d]`
///
/// # Panics
/// If the widths differ.
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, epsilon: f64) -> Tensor<D> {
    assert_eq!(weight.dims()[0], x.dims()[D - 1], "width of the weight, and of what it scales");
    let weight = cast(weight, x.dtype());
    #[cfg(feature = "flex")]
    if flex::has_kernel(&x, &weight) {
        return flex::rms_norm(x, weight, epsilon);
    }
    let dtype = x.dtype();
    let x = if dtype == DType::F64 { x } else { cast(x, DType::F32) };
    let inverse = (x.clone().square().mean_dim(D - 1) + epsilon).sqrt().recip();
    cast(x * inverse, dtype) * weight.unsqueeze()
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::testing::{Checked, normal, values};

    #[test]
    fn values_and_gradients_are_those_in_f64() {
        for device in [Device::flex().autodiff(), Device::flex().autodiff().gradient_checkpointing()] {
            for [n, d] in [[1, 5], [3, 17], [300, 576], [5, 8192], [20_000, 16]] {
                let x = normal([n, d], 3.0, 1);
                let weight = normal([1, d], 1.0, 2) + 1.0;
                let dy = normal([1, n, d], 1.0, 3);
                let of =
                    |[x, weight]: [Tensor<2>; 2]| rms_norm(x.unsqueeze::<3>(), weight.reshape([d]), 1e-5);
                let found = Checked::of(of, [&x, &weight], &dy, &device, DType::F32);
                let expected = Checked::of(of, [&x, &weight], &dy, &device, DType::F64);
                found.assert_close(&expected, 2e-6);
            }
        }
    }

    #[test]
    fn a_row_of_zeros_stays_and_views_are_read_as_they_are() {
        let device = Device::flex().autodiff();
        // One row is a column here.
        let x = Tensor::<2>::from_data([[0.0, 3.0], [0.0, 4.0]], &device).require_grad();
        let weight = Tensor::<1>::from_data([2.0, 0.5], &device);
        let y = rms_norm(x.clone().transpose(), weight, 1e-6);
        let gradient = x.grad(&y.clone().sum().backward()).unwrap();
        let root = 12.5_f32.sqrt();
        for (found, expected) in values(y).into_iter().zip([0.0, 0.0, 6.0 / root, 2.0 / root]) {
            assert!((found - expected).abs() < 1e-6);
        }
        let gradient = values(gradient.transpose());
        assert!((gradient[0] / 2000.0 - 1.0).abs() < 1e-6 && (gradient[1] / 500.0 - 1.0).abs() < 1e-6);
        assert!(gradient[2..].iter().all(|x| x.abs() < 1.0));
    }

    /// A single number would be the weight of every column without a kernel.
    #[test]
    #[should_panic(expected = "width of the weight")]
    fn a_weight_of_another_width_is_refused() {
        let x = Tensor::<2>::ones([3, 4], (&Device::flex(), DType::F64));
        rms_norm(x, Tensor::ones([1], &Device::flex()), 1e-5);
    }
}
