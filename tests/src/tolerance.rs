//! Every tolerance of the tests, and the comparison that uses them.

use burn::tensor::{DType, Device, TensorData};

/// How far a tensor may be from the expected one: the largest absolute difference, relative to the largest magnitude of
/// the expected tensor.
///
/// Relative to the tensor and not to the element: an element that is small because large terms cancel in it carries the
/// rounding errors of those terms.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance(pub f64);

/// Forward passes in f32 against another implementation in f32.
pub const FORWARD: Tolerance = Tolerance(1e-5);

/// Gradients in f32 against another implementation in f32. Measured: 7.4e-6, of the case `mha-biased-patterns`;
/// the rest is for processors that sum in another order.
pub const GRADIENT: Tolerance = Tolerance(2e-5);

/// Operations with all tensors in f16 against f64. Measured on Burn's CPU backend, without kernels: 1.8e-2, of a product with
/// one row, where that adds up in f16; else 6.7e-3.
pub const IN_F16: Tolerance = Tolerance(3e-2);

/// Operations with all tensors in bf16 against f64. Measured as above: 4.2e-2, of the gradient of attention's keys, else 3.6e-2.
pub const IN_BF16: Tolerance = Tolerance(8e-2);

/// A loss against another implementation's.
pub const LOSS: Tolerance = Tolerance(2e-6);

/// Losses of ten optimizer steps: rounding errors grow with every step.
pub const TRAJECTORY: Tolerance = Tolerance(1e-5);

/// Tensors after ten optimizer steps. AdamW divides by the gradient's magnitude, so small gradients pass on their
/// rounding errors in full: in f64 the same steps lead as far from torch's f32. Measured: 2.4e-5, of the tensors of
/// `mha-biased-bias-all` and of the logits of `mha-biased-all-linear`.
pub const TRAINED: Tolerance = Tolerance(5e-5);

/// The same sums in another order: merged against adapted, weight space against activation space.
pub const REORDERED: Tolerance = Tolerance(1e-5);

/// Combined adapters: a singular value decomposition in f32 against another one.
pub const COMBINED: Tolerance = Tolerance(1e-5);

/// Logits of a real model of 30 blocks, absolute: its logits are about 20.
pub const REAL_LOGITS: f64 = 1e-3;

/// A loss over a real vocabulary, or of a real model, in f32 against f64. Measured: 1.4e-7; with exponentials added up one
/// by one 6.8e-7 for 49,152 of them, 3.5e-6 for 128,256 and for the model.
pub const LOSS_F64: Tolerance = Tolerance(4e-7);

/// The gradients of a loss over a real vocabulary in f32 against f64. With kernels, on Burn's CPU backend, measured: 7.1e-7;
/// with exponentials added up one by one 4.7e-6 for 49,152 of them and 2.7e-5 for 128,256. Elsewhere, most likely the product
/// with the output layer's weight adds up as many numbers as there are tokens in one piece; measured on SwiftShader through
/// WGPU: 1.9e-5 and 1.2e-4, while the gradient of that weight, which has no such sum, is within 2e-7.
pub fn gradient_f64() -> Tolerance {
    Tolerance(if Device::default() == Device::flex() { 1.5e-6 } else { 2e-4 })
}

/// The loss of sequences that share a row, or of blocks that are computed again, against that of padded rows, all in f32.
/// Measured: no difference.
pub const PACKED_LOSS: Tolerance = Tolerance(5e-6);

/// The gradients of the same. Measured on the experiment's base: up to 2.5e-5, of 13 random adapters on the CPU; 3.2e-7 of one
/// on SwiftShader through WGPU. In f64, they agree within 1e-12, as a unit test of `packing.rs` shows.
pub const PACKED_GRADIENT: Tolerance = Tolerance(6e-5);

/// The gradients of the adapter of a real model of 30 blocks in f32 against f64. Measured: 1.5e-5, and 5.4e-5 for torch;
/// with exponentials added up one by one 1.1e-3.
pub const REAL_GRADIENT: Tolerance = Tolerance(5e-5);

/// Two results closer than this, relative to the magnitude, are no different computations.
pub const DIFFERENT: f64 = 1e-2;

/// Asserts that `actual` is `expected` within `tolerance` and returns the relative deviation.
///
/// # Panics
/// If shapes differ, or the deviation is larger, or a value is no number; the message has the name, both deviations,
/// and where the largest one is.
#[track_caller]
pub fn assert_close(name: &str, actual: &TensorData, expected: &TensorData, tolerance: Tolerance) -> f64 {
    let deviation = Deviation::between(name, actual, expected);
    assert!(
        deviation.relative() <= tolerance.0,
        "`{name}`: {deviation}, expected at most {:.1e} relative",
        tolerance.0
    );
    deviation.relative()
}

/// Asserts that the values differ by more than rounding can explain.
///
/// # Panics
/// If they do not.
#[track_caller]
pub fn assert_different(name: &str, actual: &TensorData, other: &TensorData) {
    let deviation = Deviation::between(name, actual, other);
    assert!(deviation.relative() > DIFFERENT, "`{name}`: expected a difference, found {deviation}");
}

/// Asserts that two losses, or other single numbers, agree.
///
/// # Panics
/// If they do not.
#[track_caller]
pub fn assert_close_number(name: &str, actual: f64, expected: f64, tolerance: Tolerance) -> f64 {
    let data = |value: f64| TensorData::new(vec![value], [1]);
    assert_close(name, &data(actual), &data(expected), tolerance)
}

/// The largest difference of two tensors.
struct Deviation {
    absolute: f64,
    magnitude: f64,
    /// Flat index of the largest difference, and both values there.
    at: (usize, f64, f64),
}

impl Deviation {
    #[track_caller]
    fn between(name: &str, actual: &TensorData, expected: &TensorData) -> Self {
        assert_eq!(actual.shape(), expected.shape(), "`{name}`: expected shape on the right");
        let (actual, expected) = (values(actual), values(expected));
        let mut found = Self { absolute: 0.0, magnitude: 0.0, at: (0, 0.0, 0.0) };
        for (i, (&a, &e)) in actual.iter().zip(&expected).enumerate() {
            assert!(a.is_finite() && e.is_finite(), "`{name}`: {a} and {e} at {i}");
            found.magnitude = found.magnitude.max(e.abs());
            if (a - e).abs() > found.absolute {
                found.absolute = (a - e).abs();
                found.at = (i, a, e);
            }
        }
        found
    }

    fn relative(&self) -> f64 {
        if self.absolute == 0.0 { 0.0 } else { self.absolute / self.magnitude }
    }
}

impl std::fmt::Display for Deviation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (i, a, e) = self.at;
        let (absolute, relative) = (self.absolute, self.relative());
        write!(f, "found {a} instead of {e} at {i}, {absolute:.1e} absolute, {relative:.1e} relative")
    }
}

fn values(data: &TensorData) -> Vec<f64> {
    match data.dtype() {
        DType::F64 => data.iter::<f64>().collect(),
        _ => data.iter::<f32>().map(f64::from).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(values: [f32; 3]) -> TensorData {
        TensorData::new(values.to_vec(), [3])
    }

    #[test]
    fn the_deviation_is_relative_to_the_largest_magnitude() {
        let deviation = assert_close("x", &data([1.0, 0.0, 4.0]), &data([1.0, 0.002, 4.0]), Tolerance(1e-3));
        assert!((deviation - 0.0005).abs() < 1e-6);
    }

    #[test]
    #[should_panic(expected = "`x`: found 4.5 instead of 4 at 2, 5.0e-1 absolute, 1.2e-1 relative")]
    fn the_message_has_name_place_and_both_deviations() {
        assert_close("x", &data([1.0, 0.0, 4.5]), &data([1.0, 0.0, 4.0]), Tolerance(1e-3));
    }

    #[test]
    #[should_panic(expected = "NaN")]
    fn what_is_no_number_is_never_close() {
        assert_close("x", &data([1.0, f32::NAN, 4.0]), &data([1.0, 0.0, 4.0]), Tolerance(1.0));
    }

    #[test]
    #[should_panic(expected = "expected a difference")]
    fn equal_tensors_are_not_different() {
        assert_different("x", &data([1.0, 2.0, 3.0]), &data([1.0, 2.0, 3.0]));
    }
}
