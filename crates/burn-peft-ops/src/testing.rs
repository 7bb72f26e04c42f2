//! What the tests of several operations need: random numbers, and values with gradients that can be compared.

use burn::tensor::{DType, Device, Tensor, TensorData};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// The vocabularies of SmolLM2 and Llama 3.
pub(crate) const REAL_VOCABULARIES: [usize; 2] = [49_152, 128_256];

pub(crate) fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// Nearly from N(0, std²), by Irwin and Hall.
pub(crate) fn drawn_numbers(count: usize, std: f32, seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..count).map(|_| std * ((0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0)).collect()
}

/// A tensor of [`drawn_numbers`], without autodiff.
pub(crate) fn normal<const D: usize>(shape: [usize; D], std: f32, seed: u64) -> Tensor<D> {
    let numbers = drawn_numbers(shape.iter().product(), std, seed);
    Tensor::from_data(TensorData::new(numbers, shape), &Device::flex())
}

pub(crate) fn wide(numbers: &[f32]) -> Vec<f64> {
    numbers.iter().copied().map(f64::from).collect()
}

/// Largest difference, relative to the largest expected magnitude.
pub(crate) fn deviation(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / largest
}

/// The values of a function of tensors, then the gradient of each of them.
pub(crate) struct Checked(Vec<Vec<f64>>);

impl Checked {
    /// Of `f(inputs)` with the gradient `dy`, computed on `device` in `dtype`.
    pub(crate) fn of<const N: usize, const D: usize, const E: usize>(
        f: impl Fn([Tensor<D>; N]) -> Tensor<E>,
        inputs: [&Tensor<D>; N],
        dy: &Tensor<E>,
        device: &Device,
        dtype: DType,
    ) -> Self {
        let inputs =
            inputs.map(|input| Tensor::<D>::from_data(input.to_data(), (device, dtype)).require_grad());
        let y = f(inputs.clone());
        let dy = Tensor::<E>::from_data(dy.to_data(), (device, dtype));
        let gradients = (y.clone() * dy).sum().backward();
        let of_inputs = inputs.map(|input| match input.grad(&gradients) {
            Some(gradient) => gradient.into_data().iter::<f64>().collect(),
            None => vec![],
        });
        let mut all = vec![y.into_data().iter::<f64>().collect()];
        all.extend(of_inputs);
        Self(all)
    }

    /// Each within `tolerance` of the largest magnitude.
    #[track_caller]
    pub(crate) fn assert_close(&self, expected: &Self, tolerance: f64) {
        for (i, (found, expected)) in self.0.iter().zip(&expected.0).enumerate() {
            let what = if i == 0 { "value".to_string() } else { format!("gradient of input {}", i - 1) };
            let off = deviation(found, expected);
            assert!(off < tolerance, "{what}: {off:e} off");
        }
    }
}
