//! The gate of the feed-forward layer.

#[cfg(feature = "flex")]
mod flex;

use burn::tensor::Tensor;
use burn::tensor::activation::silu;

/// `silu(gate) * up`, where `silu(x) = x / (1 + exp(-x))`.
///
/// On Burn's CPU backend (Flex) it is one pass, forward and backward, that keeps `gate` and `up` and nothing else.
///
/// # Shapes
/// - gate, up and output: the same
///
/// # Panics
/// If the shapes differ.
pub fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    assert_eq!(gate.shape(), up.shape(), "shapes of the gate and of what it gates");
    #[cfg(feature = "flex")]
    if flex::has_kernel(&gate, &up) {
        return flex::swiglu(gate, up);
    }
    silu(gate) * up
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::{DType, Device};

    use super::*;
    use crate::testing::{Checked, deviation, normal, values, wide};

    #[test]
    fn values_and_gradients_are_those_in_f64() {
        for device in [Device::flex().autodiff(), Device::flex().autodiff().gradient_checkpointing()] {
            for shape in [[1, 1], [3, 85], [70, 1536]] {
                let [gate, up, dy] = [1, 2, 3].map(|seed| normal(shape, 4.0, seed));
                let of = |x: [Tensor<2>; 2]| {
                    let [gate, up] = x;
                    swiglu(gate, up)
                };
                let found = Checked::of(of, [&gate, &up], &dy, &device, DType::F32);
                let expected = Checked::of(of, [&gate, &up], &dy, &device, DType::F64);
                found.assert_close(&expected, 1e-6);
            }
        }
    }

    #[test]
    fn views_and_expanded_gradients_are_read_as_they_are() {
        let device = Device::flex().autodiff();
        let both = Tensor::<2>::from_data(normal([40, 60], 1.0, 1).to_data(), &device).require_grad();
        let of = |both: Tensor<2>, f: fn(Tensor<2>, Tensor<2>) -> Tensor<2>| {
            let (gate, up) = (both.clone().narrow(1, 3, 20).transpose(), both.narrow(1, 30, 20).transpose());
            f(gate, up)
        };
        let gradient = |y: Tensor<2>| values(both.grad(&y.sum().backward()).unwrap());
        let found = gradient(of(both.clone(), swiglu));
        let expected = gradient(of(both.clone(), |gate, up| silu(gate) * up));
        assert!(deviation(&wide(&found), &wide(&expected)) < 1e-6);
    }

    #[test]
    fn far_from_zero_it_is_the_identity_or_zero() {
        let gate = Tensor::<1>::from_data([-1e30, -200.0, -90.0, 90.0, 200.0, 1e30], &Device::flex());
        assert!(flex::has_kernel(&gate, &gate));
        let y = swiglu(gate.clone(), gate.ones_like()).into_data().try_to_vec::<f32>().unwrap();
        assert_eq!(y[3..], [90.0, 200.0, 1e30]);
        assert!(y[..3].iter().all(|y| y.abs() < 1e-30), "{y:?}");
    }
}
