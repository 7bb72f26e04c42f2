//! Linear layers whose weight is, as a rule, not trained.

#[cfg(feature = "flex")]
mod few_rows;
#[cfg(feature = "flex")]
mod flex;
#[cfg(feature = "flex")]
mod rounded;
#[cfg(feature = "flex")]
mod stored;

use burn::tensor::{DType, Tensor};

use crate::cast;

/// `y = x W + b`, as [`burn::tensor::module::linear`] computes it, made for a `W` that is not trained.
///
/// Of a `W` that is not trained, nothing is kept for backward but `W` itself, and its gradient is never computed:
/// `dx = dy Wᵀ`. The type of `x` is that of the result, whatever the types of `W` and `b`: bf16 and f16 are ways to store
/// them. On Burn's CPU backend (Flex), products read their operands as they lie in memory, also if they are transposed
/// views, and a `W` in bf16 or f16 is widened to f32 a part at a time, in both directions. Elsewhere, and for a weight that
/// is quantized, it is Burn's `linear`.
///
/// On processors that multiply numbers in bf16 faster than in f32 (AMD's with AVX512-BF16, since Zen 4), more than 16
/// rows of `x` meet a `W` in bf16 without widening it: `x` and the result are rounded to bf16, sums are in f32; in
/// backward `dy` and `dx` likewise. [`in_full_precision`] keeps f32.
///
/// # Shapes
/// - x: `[.., d_in]`
/// - weight: `[d_in, d_out]`
/// - bias: `[d_out]`
/// - output: `[.., d_out]`
///
/// # Panics
/// If the shapes do not fit.
///
/// # Example
/// ```
/// use burn::tensor::{Device, Tensor};
///
/// let device = Device::flex().autodiff();
/// let x = Tensor::<2>::from_data([[1.0, 2.0]], &device).require_grad();
/// let table = Tensor::<2>::from_data([[3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], &device);
/// let y = burn_peft_ops::linear(x.clone(), table.transpose(), None);
/// assert_eq!(y.to_data().try_to_vec::<f32>().unwrap(), [11.0, 17.0, 23.0]);
/// let dx = x.grad(&y.sum().backward()).unwrap();
/// assert_eq!(dx.to_data().try_to_vec::<f32>().unwrap(), [15.0, 18.0]);
/// ```
pub fn linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
    let bias = bias.map(|bias| cast(bias, x.dtype()));
    #[cfg(feature = "flex")]
    if flex::has_kernel(&x, &weight) {
        let mut shape = x.dims();
        let [d_in, d_out] = weight.dims();
        let n: usize = shape[..D - 1].iter().product();
        let y = flex::product(x.reshape([n, d_in]), weight);
        let y = match bias {
            Some(bias) => y + bias.unsqueeze(),
            None => y,
        };
        shape[D - 1] = d_out;
        return y.reshape(shape);
    }
    let weight = cast(weight, x.dtype());
    burn::tensor::module::linear(x, weight, bias)
}

/// The type that activations have in a model with this weight: its own, but f32 for bf16 and f16 on Burn's CPU backend
/// (Flex), whose kernels take f32, and weights that are stored in 16 bits.
pub fn activation_dtype<const D: usize>(weight: &Tensor<D>) -> DType {
    #[cfg(feature = "flex")]
    if crate::flex::is_on_flex(weight) && is_half(weight.dtype()) {
        return DType::F32;
    }
    weight.dtype()
}

/// Runs `f`, within which [`linear`] rounds no activation to bf16, nor does the backward of what was computed there.
///
/// For output layers: the logits of two tokens that are rounded are often equal. `torch.autocast(enabled=False)` is the
/// like of it.
///
/// # Example
/// ```
/// use burn::tensor::{DType, Device, Tensor};
/// use burn_peft_ops::{in_full_precision, linear};
///
/// let device = Device::flex();
/// let x = Tensor::<2>::full([20, 1], 1.001, &device);
/// let table = Tensor::<2>::ones([1, 5], (&device, DType::BF16));
/// let logits = in_full_precision(|| linear(x, table, None));
/// assert!(logits.to_data().try_to_vec::<f32>().unwrap().iter().all(|logit| *logit == 1.001));
/// ```
pub fn in_full_precision<R>(f: impl FnOnce() -> R) -> R {
    #[cfg(feature = "flex")]
    return rounded::in_full_precision(f);
    #[cfg(not(feature = "flex"))]
    f()
}

/// The most numbers of a weight in 16 bits that [`linear`] widens at a time: so many stay in a processor's cache.
pub const WIDENED_AT_ONCE: usize = 1 << 20;

#[cfg(feature = "flex")]
fn is_half(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::BF16)
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::{DType, Device, Distribution, Tolerance, s};

    use super::*;
    use crate::testing::{Checked, normal, values};

    /// Output and gradient of the input.
    fn both(
        f: impl Fn(Tensor<3>, Tensor<2>) -> Tensor<3>,
        x: &Tensor<3>,
        w: &Tensor<2>,
        dy: &Tensor<3>,
    ) -> Option<(Tensor<3>, Tensor<3>)> {
        let x = Tensor::<3>::from_inner(x.clone()).require_grad();
        let y = f(x.clone(), Tensor::from_inner(w.clone()));
        let mut gradients = (y.clone() * Tensor::from_inner(dy.clone())).sum().backward();
        Some((y.inner(), x.grad_remove(&mut gradients)?))
    }

    /// Several shapes and layouts, against f64; a vocabulary and a single row as well. The numbers are always the same: drawn
    /// anew, the three sums of the last case sometimes cancel so far that what remains is as small as their rounding.
    #[test]
    fn outputs_and_gradients_are_exact() {
        let burns = |x, w| burn::tensor::module::linear(x, w, None);
        for (batch, n, d_in, d_out) in [
            (1, 1, 1, 1),
            (1, 1, 70, 33),
            (2, 3, 64, 48),
            (3, 37, 96, 200),
            (1, 5, 64, 49_152),
            (1, 1, 20, 9_000),
            (1, 4, 1_100, 300),
            (1, 1, 3, 70_000),
        ] {
            let x = normal([batch, n, d_in], 0.5, 1);
            let dy = normal([batch, n, d_out], 0.5, 2);
            let dense = normal([d_in, d_out], 0.5, 3);
            let turned = normal([d_out, d_in], 0.5, 4).transpose();
            let part = normal([d_in + 3, d_out + 2], 0.5, 5).narrow(0, 2, d_in).narrow(1, 1, d_out);
            for w in [dense, turned, part] {
                let [x64, dy64] = [&x, &dy].map(|tensor| tensor.clone().cast(DType::F64));
                let expected = both(burns, &x64, &w.clone().cast(DType::F64), &dy64).unwrap();
                let found = both(|x, w| linear(x, w, None), &x, &w, &dy).unwrap();
                let own = both(burns, &x, &w, &dy).unwrap();
                for (found, own, expected) in [(found.0, own.0, expected.0), (found.1, own.1, expected.1)] {
                    let off = |tensor: Tensor<3>| -> f64 {
                        let off = (tensor.cast(DType::F64) - expected.clone()).abs().max();
                        off.into_scalar::<f64>() / expected.clone().abs().max().into_scalar::<f64>()
                    };
                    let (found, own) = (off(found), off(own));
                    assert!(found < 2e-6, "{found}, Burn's {own}, {batch} x {n} x {d_in} x {d_out}");
                }
            }
        }
    }

    /// Of equal numbers, whose rounding errors all go the same way.
    #[test]
    fn long_sums_for_few_rows_are_exact() {
        let device = Device::flex();
        for [n, d_in, d_out] in [[1, 40_000, 1], [3, 40_000, 2], [2, 49_152, 130]] {
            let x = Tensor::<2>::full([n, d_in], 0.1, &device);
            let dense = Tensor::<2>::full([d_in, d_out], 0.3, &device);
            let turned = Tensor::<2>::full([d_out, d_in], 0.3, &device).transpose();
            let expected = d_in as f64 * f64::from(0.1_f32) * f64::from(0.3_f32);
            for w in [dense, turned] {
                for y in values(linear(x.clone(), w, None)) {
                    let off = (f64::from(y) / expected - 1.0).abs();
                    assert!(off < 5e-6, "{off}, {n} x {d_in} x {d_out}");
                }
            }
        }
    }

    /// Against the numbers that are stored, widened to f64: of one part, of many, of a table with a real vocabulary.
    #[test]
    fn a_weight_in_16_bits_is_as_exact_as_its_numbers() {
        let burns = |x, w| burn::tensor::module::linear(x, w, None);
        for dtype in [DType::BF16, DType::F16] {
            for (n, d_in, d_out) in [
                (1, 1, 1),
                (1, 70, 33),
                (5, 64, 48),
                (130, 3000, 400),
                (1, 576, 1536),
                (3, 64, 49_152),
                (20, 300, 9_000),
            ] {
                let random = |shape: [usize; 2], seed| normal(shape, 0.5, seed);
                let (x, dy) = (random([n, d_in], 1).unsqueeze::<3>(), random([n, d_out], 2).unsqueeze());
                let dense = random([d_in, d_out], 3).cast(dtype);
                let turned = random([d_out, d_in], 4).cast(dtype).transpose();
                let part =
                    random([d_in + 3, d_out + 2], 5).cast(dtype).narrow(0, 2, d_in).narrow(1, 1, d_out);
                let every_second = random([d_in, 2 * d_out], 6).cast(dtype).slice_dim(1, s![..;2]);
                for w in [dense, turned, part, every_second] {
                    let [x64, dy64] = [&x, &dy].map(|tensor: &Tensor<3>| tensor.clone().cast(DType::F64));
                    let expected = both(burns, &x64, &w.clone().cast(DType::F64), &dy64).unwrap();
                    let exact = |x, w| in_full_precision(|| linear(x, w, None));
                    let found = both(exact, &x, &w, &dy).unwrap();
                    for (found, expected) in [(found.0, expected.0), (found.1, expected.1)] {
                        assert_eq!(found.dtype(), DType::F32);
                        let off =
                            (found.cast(DType::F64) - expected.clone()).abs().max().into_scalar::<f64>();
                        let off = off / expected.abs().max().into_scalar::<f64>();
                        assert!(off < 2e-6, "{off}, {dtype:?}, {n} x {d_in} x {d_out}");
                    }
                }
            }
        }
    }

    /// On processors that are faster at it: views, both directions, few rows and full precision, which nothing rounds.
    #[test]
    fn products_with_a_weight_in_bf16_are_rounded_where_that_is_faster() {
        use super::rounded::tests::IS_FASTER;
        let burns = |x, w| burn::tensor::module::linear(x, w, None);
        let random = |shape: [usize; 2], seed| normal(shape, 0.5, seed);
        for (n, is_rounded) in [(130, true), (16, false)] {
            let (d_in, d_out) = (300, 400);
            let (x, dy) = (random([n, d_in], 1).unsqueeze::<3>(), random([n, d_out], 2).unsqueeze());
            let turned = random([d_out, d_in], 4).cast(DType::BF16).transpose();
            let part =
                random([d_in + 3, d_out + 2], 5).cast(DType::BF16).narrow(0, 2, d_in).narrow(1, 1, d_out);
            let every_second = random([d_in, 2 * d_out], 6).cast(DType::BF16).slice_dim(1, s![..;2]);
            for w in [turned, part, every_second] {
                let [x64, dy64] = [&x, &dy].map(|tensor: &Tensor<3>| tensor.clone().cast(DType::F64));
                let expected = both(burns, &x64, &w.clone().cast(DType::F64), &dy64).unwrap();
                IS_FASTER.set(true);
                let found = both(|x, w| linear(x, w, None), &x, &w, &dy).unwrap();
                let full = both(|x, w| in_full_precision(|| linear(x, w, None)), &x, &w, &dy).unwrap();
                IS_FASTER.set(false);
                for (found, full, expected) in [(found.0, full.0, expected.0), (found.1, full.1, expected.1)]
                {
                    let off = |tensor: Tensor<3>| {
                        let off = (tensor.cast(DType::F64) - expected.clone()).abs().max();
                        off.into_scalar::<f64>() / expected.clone().abs().max().into_scalar::<f64>()
                    };
                    let (found, full) = (off(found), off(full));
                    assert!(
                        full < 2e-6 && found < 1e-2 && (found > 1e-4) == is_rounded,
                        "{n}: {found} {full}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_trained_weight_in_16_bits_gets_its_gradient_and_a_bias_is_widened() {
        let device = Device::flex().autodiff();
        let w = Tensor::<2>::from_data([[1.0, 2.0]], (&device, DType::BF16)).require_grad();
        let bias = Tensor::<1>::from_data([0.5, 0.25], (&device, DType::F16));
        let x = Tensor::<2>::from_data([[3.0], [4.0]], &device);
        let y = linear(x, w.clone(), Some(bias));
        let gradient = w.grad(&y.clone().sum().backward()).unwrap();
        assert_eq!((gradient.dtype(), values(gradient.cast(DType::F32))), (DType::BF16, vec![7.0, 7.0]));
        assert_eq!((y.dtype(), values(y)), (DType::F32, vec![3.5, 6.25, 4.5, 8.25]));
    }

    #[test]
    fn a_gradient_that_is_expanded_or_turned_is_one_too() {
        let device = Device::flex().autodiff();
        let x = Tensor::<2>::random([6, 40], Distribution::Default, &device).require_grad();
        let w = Tensor::<2>::random([40, 30], Distribution::Default, &device);
        for reduce in
            [|y: Tensor<2>| y.sum(), |y: Tensor<2>| y.transpose().slice([3..20, 0..6]).powi_scalar(2).sum()]
        {
            let gradient = |y: Tensor<2>| x.grad(&reduce(y).backward()).unwrap().to_data();
            let found = gradient(linear(x.clone(), w.clone(), None));
            let expected = gradient(x.clone().matmul(w.clone()));
            found.assert_approx_eq(&expected, Tolerance::<f32>::rel_abs(1e-5, 1e-5));
        }
    }

    #[test]
    fn a_weight_that_is_trained_gets_its_gradient() {
        for device in [Device::flex().autodiff(), Device::flex().autodiff().gradient_checkpointing()] {
            for dtype in [DType::F32, DType::BF16] {
                let x = Tensor::<2>::ones([2, 3], (&device, dtype)).require_grad();
                let w = Tensor::<2>::ones([3, 4], (&device, dtype)).require_grad();
                let bias = Tensor::<1>::ones([4], (&device, dtype));
                let y = linear(x.clone(), w.clone() * 2.0, Some(bias));
                assert_eq!(values(y.clone()), [7.0; 8]);
                let gradients = y.sum().backward();
                assert_eq!(values(w.grad(&gradients).unwrap()), [4.0; 12]);
                assert_eq!(values(x.grad(&gradients).unwrap()), [8.0; 6]);
            }
        }
    }

    /// Few rows and many, a weight that is a view and one that is not.
    #[test]
    fn gradients_of_trained_weights_are_those_in_f64() {
        let device = Device::flex().autodiff();
        for (n, d) in [(3, 7), (300, 40), (9_001, 5)] {
            let x_and_w = normal([1, n * d + d * d], 1.0, 1);
            let dy = normal([n, d], 1.0, 2);
            for is_turned in [false, true] {
                let of = |[both]: [Tensor<2>; 1]| {
                    let x = both.clone().narrow(1, 0, n * d).reshape([n, d]);
                    let w = both.narrow(1, n * d, d * d).reshape([d, d]);
                    linear(x, if is_turned { w.transpose() } else { w }, None)
                };
                let found = Checked::of(of, [&x_and_w], &dy, &device, DType::F32);
                found.assert_close(&Checked::of(of, [&x_and_w], &dy, &device, DType::F64), 1e-6);
            }
        }
    }

    #[test]
    fn frozen_on_devices_with_gradient_checkpointing() {
        let device = Device::flex().autodiff().gradient_checkpointing();
        let x = Tensor::<2>::ones([2, 3], &device).require_grad();
        let w = Tensor::<2>::ones([3, 4], &device);
        assert!(flex::has_kernel(&x, &w));
        let y = linear(x.clone().exp(), w, None);
        let dx = x.grad(&y.sum().backward()).unwrap().to_data().try_to_vec::<f32>().unwrap();
        assert!(dx.iter().all(|dx| (dx - 4.0 * 1f32.exp()).abs() < 1e-5), "{dx:?}");
    }
}
