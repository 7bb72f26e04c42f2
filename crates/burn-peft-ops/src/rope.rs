//! The rotation of rotary position embeddings.

#[cfg(feature = "flex")]
mod flex;

use burn::tensor::Tensor;

/// `x * cos + swapped(x) * sin`, where `swapped` exchanges the halves of a head, with the heads moved before the
/// positions.
///
/// With `sin` negated in its first half, that rotates each pair `(x[i], x[i + d / 2])` by the angle of its position. The
/// tables are constants. On Burn's CPU backend (Flex) it is one pass, forward and backward, that keeps the tables alone.
///
/// # Shapes
/// - x: `[b, s, n, g, d]`
/// - cos, sin: `[s, d]`
/// - output: `[b, n, g, s, d]`
///
/// # Panics
/// If `d` is odd, or the shapes do not fit.
pub fn rotate(x: Tensor<5>, cos: &Tensor<2>, sin: &Tensor<2>) -> Tensor<5> {
    let (cos, sin) = (&cos.clone().detach(), &sin.clone().detach());
    #[cfg(feature = "flex")]
    if flex::has_kernel(&x, cos, sin) {
        return flex::rotate(x, cos, sin);
    }
    let half = x.dims()[4] / 2;
    let halves = vec![x.clone().narrow(4, half, half), x.clone().narrow(4, 0, half)];
    // Exchanging the axes first lets the multiplications write the new order; no copy is made for it.
    let order = [0, 2, 3, 1, 4];
    let swapped = Tensor::cat(halves, 4).permute(order);
    x.permute(order) * cos.clone().unsqueeze() + swapped * sin.clone().unsqueeze()
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::{DType, Device};

    use super::*;
    use crate::testing::{Checked, normal};

    #[test]
    fn values_and_gradients_are_those_in_f64() {
        for device in [Device::flex().autodiff(), Device::flex().autodiff().gradient_checkpointing()] {
            for [b, s, n, g, d] in [[1, 1, 1, 1, 2], [2, 5, 3, 1, 6], [3, 70, 2, 4, 64]] {
                let x = normal([b, s, n, g, d], 1.0, 1);
                let [cos, sin] = [2, 3].map(|seed| normal([s, d], 1.0, seed));
                let dy = normal([b, n, s, g, d], 1.0, 4);
                let of = |[x]: [Tensor<5>; 1]| {
                    let like =
                        |table: &Tensor<2>| Tensor::from_data(table.to_data(), (&x.device(), x.dtype()));
                    let (cos, sin) = (like(&cos), like(&sin));
                    // Attention gives a gradient whose axes lie in another order.
                    rotate(x, &cos, &sin).swap_dims(2, 3)
                };
                let found = Checked::of(of, [&x], &dy, &device, DType::F32);
                let expected = Checked::of(of, [&x], &dy, &device, DType::F64);
                found.assert_close(&expected, 1e-6);
            }
        }
    }
}
