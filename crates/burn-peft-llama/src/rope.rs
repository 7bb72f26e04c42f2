//! Rotary position embedding in the layout of Hugging Face checkpoints: the two halves of a head rotate together.

use std::f64::consts::TAU;
use std::ops::Range;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_peft_ops::rotate;

/// How positions are encoded. The default is `rope_theta` 10000 without scaling.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the wavelengths. Default: 10000.
    pub rope_theta: f64,
    /// Change of the wavelengths for sequences longer than those of pretraining.
    pub scaling: RopeScaling,
}

impl Default for RopeConfig {
    fn default() -> Self {
        Self::new(10_000.0)
    }
}

/// Change of the wavelengths, `rope_type` in `config.json`.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum RopeScaling {
    /// None.
    #[default]
    Default,
    /// That of Llama 3.1 and later: with the wavelength in tokens `w = 2π / f` and `L` the original length, the
    /// frequency `f` stays where `w < L / high_freq_factor`, becomes `f / factor` where `w > L / low_freq_factor`, and
    /// is interpolated between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// `L` divided by it is the wavelength above which frequencies are divided.
        low_freq_factor: f64,
        /// `L` divided by it is the wavelength below which frequencies stay.
        high_freq_factor: f64,
        /// `L`, the longest sequence of pretraining in tokens.
        original_max_position_embeddings: usize,
    },
}

impl RopeConfig {
    /// Rotary embedding of this base, without scaling.
    pub fn new(rope_theta: f64) -> Self {
        Self { rope_theta, scaling: RopeScaling::Default }
    }

    /// Sets the change of the wavelengths.
    pub fn with_scaling(mut self, scaling: RopeScaling) -> Self {
        self.scaling = scaling;
        self
    }

    /// Frequency of each pair of a head of width `head_dim`, in radians per token:
    /// `rope_theta^(-2 i / head_dim)` for `i` in `0 .. head_dim / 2`, then scaled.
    fn frequencies(&self, head_dim: usize) -> Vec<f64> {
        let plain = |i| self.rope_theta.powf(-(i as f64) / head_dim as f64);
        (0..head_dim).step_by(2).map(plain).map(|frequency| self.scaling.apply(frequency)).collect()
    }
}

impl RopeConfig {
    /// What the frequencies of a head of width `head_dim` are divided by, one for each pair; `None` without scaling.
    pub(crate) fn factors(&self, head_dim: usize) -> Option<Vec<f32>> {
        let plain = Self::new(self.rope_theta).frequencies(head_dim);
        let scaled = self.frequencies(head_dim);
        let factors = plain.into_iter().zip(scaled).map(|(plain, scaled)| (plain / scaled) as f32);
        (self.scaling != RopeScaling::Default).then(|| factors.collect())
    }
}

impl RopeScaling {
    fn apply(self, frequency: f64) -> f64 {
        let Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } =
            self
        else {
            return frequency;
        };
        let waves = original_max_position_embeddings as f64 * frequency / TAU;
        if waves > high_freq_factor {
            frequency
        } else if waves < low_freq_factor {
            frequency / factor
        } else {
            let keep = (waves - low_freq_factor) / (high_freq_factor - low_freq_factor);
            // Equal factors leave no range to interpolate in.
            let keep = if keep.is_finite() { keep } else { 1.0 };
            keep * frequency + (1.0 - keep) * frequency / factor
        }
    }
}

/// The frequencies of a model; not part of its records.
#[derive(Clone, Debug)]
pub(crate) struct Rope {
    frequencies: Vec<f32>,
}

/// The rotation of a range of positions, on the device.
///
/// The first half of `sin` is negated, so that a rotation is `x * cos + swapped(x) * sin` with the halves of `x`
/// swapped. The tables for queries hold the scale of attention, `1 / sqrt(head_dim)`, so that scores need no pass of
/// their own for it. All are `[s, d]`.
#[derive(Clone, Debug)]
pub(crate) struct RotaryTables {
    cos: Tensor<2>,
    sin: Tensor<2>,
    query_cos: Tensor<2>,
    query_sin: Tensor<2>,
}

impl Rope {
    pub(crate) fn new(config: &RopeConfig, head_dim: usize) -> Self {
        let frequencies = config.frequencies(head_dim);
        Self { frequencies: frequencies.into_iter().map(|frequency| frequency as f32).collect() }
    }

    /// The rotation of `positions`.
    pub(crate) fn tables(&self, positions: Range<usize>, device: &Device, dtype: DType) -> RotaryTables {
        let half = self.frequencies.len();
        let (s, d) = (positions.len(), 2 * half);
        let scale = (d as f64).powf(-0.5);
        let mut tables = [(); 4].map(|()| Vec::with_capacity(s * d));
        for position in positions {
            for i in 0..d {
                // The angle is rounded to f32 as in transformers, which matters at long range.
                let angle = f64::from(position as f32 * self.frequencies[i % half]);
                let (sin, cos) = angle.sin_cos();
                let sin = if i < half { -sin } else { sin };
                for (table, value) in tables.iter_mut().zip([cos, sin, cos * scale, sin * scale]) {
                    table.push(value as f32);
                }
            }
        }
        let upload = |table| Tensor::from_data(TensorData::new(table, [s, d]), (device, dtype));
        let [cos, sin, query_cos, query_sin] = tables.map(upload);
        RotaryTables { cos, sin, query_cos, query_sin }
    }
}

impl RotaryTables {
    /// The rotations of these of the positions.
    pub(crate) fn of(self, positions: &[usize]) -> Self {
        let indices: Vec<i64> = positions.iter().map(|&position| position as i64).collect();
        let indices = TensorData::new(indices, [positions.len()]);
        let indices = Tensor::<1, Int>::from_data(indices, &self.cos.device());
        let Self { cos, sin, query_cos, query_sin } = self;
        let [cos, sin, query_cos, query_sin] =
            [cos, sin, query_cos, query_sin].map(|table| table.select(0, indices.clone()));
        Self { cos, sin, query_cos, query_sin }
    }

    /// Rotates queries and scales them by `1 / sqrt(head_dim)`. `[b, s, n, g, d]` to `[b, n, g, s, d]`.
    pub(crate) fn query(&self, x: Tensor<5>) -> Tensor<5> {
        rotate(x, &self.query_cos, &self.query_sin)
    }

    /// Rotates keys. `[b, s, n, g, d]` to `[b, n, g, s, d]`.
    pub(crate) fn key(&self, x: Tensor<5>) -> Tensor<5> {
        rotate(x, &self.cos, &self.sin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::values;

    const LLAMA3: RopeScaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 256,
    };

    #[test]
    fn the_halves_of_a_head_rotate_together() {
        // Width 4 and base 100: frequencies 1 and 0.1. Pairs are (x0, x2) and (x1, x3).
        let device = Device::default();
        let rope = Rope::new(&RopeConfig::new(100.0), 4);
        let tables = rope.tables(2..4, &device, DType::F32);
        let x = Tensor::<2>::from_data([[1.0, 2.0, 3.0, 4.0], [0.5, -1.0, 0.25, 2.0]], &device);
        let x = x.reshape([1, 2, 1, 1, 4]);
        let rows = [([1.0, 2.0, 3.0, 4.0], 2.0_f32), ([0.5, -1.0, 0.25, 2.0], 3.0)];
        let expected: Vec<f32> = rows
            .iter()
            .flat_map(|(x, p)| {
                let ((s0, c0), (s1, c1)) = (p.sin_cos(), (0.1 * p).sin_cos());
                [x[0] * c0 - x[2] * s0, x[1] * c1 - x[3] * s1, x[2] * c0 + x[0] * s0, x[3] * c1 + x[1] * s1]
            })
            .collect();
        let key = values(tables.key(x.clone()));
        let query = values(tables.query(x));
        for ((key, query), expected) in key.iter().zip(&query).zip(&expected) {
            assert!((key - expected).abs() < 1e-6, "{key} {expected}");
            assert!((query - expected / 2.0).abs() < 1e-6, "{query} {expected}");
        }
    }

    #[test]
    fn heads_come_before_positions() {
        let device = Device::default();
        let tables = Rope::new(&RopeConfig::default(), 2).tables(0..3, &device, DType::F32);
        let x = Tensor::<1>::from_data([0.0, 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11.], &device);
        let x = x.reshape([1, 3, 2, 1, 2]);
        let norms = |x: Tensor<5>| values(x.square().sum_dim(4));
        let rotated = tables.key(x.clone());
        assert_eq!(rotated.dims(), [1, 2, 1, 3, 2]);
        for (a, b) in norms(rotated).iter().zip(norms(x.permute([0, 2, 3, 1, 4]))) {
            assert!((a - b).abs() < 1e-3, "{a} {b}");
        }
    }

    #[test]
    fn llama3_divides_low_frequencies_keeps_high_ones_and_interpolates() {
        let (head_dim, rope_theta) = (16, 1000.0);
        let plain = RopeConfig::new(rope_theta).frequencies(head_dim);
        let scaled = RopeConfig::new(rope_theta).with_scaling(LLAMA3).frequencies(head_dim);
        let mut kinds = [0; 3];
        for (i, (plain, scaled)) in plain.iter().zip(scaled).enumerate() {
            assert!((plain - 1.0 / 1000.0_f64.powf(2.0 * i as f64 / 16.0)).abs() < 1e-12);
            let wavelength = TAU / plain;
            let expected = if wavelength < 256.0 / 4.0 {
                kinds[0] += 1;
                *plain
            } else if wavelength > 256.0 / 1.0 {
                kinds[1] += 1;
                plain / 8.0
            } else {
                kinds[2] += 1;
                let smooth = (256.0 / wavelength - 1.0) / (4.0 - 1.0);
                (1.0 - smooth) * plain / 8.0 + smooth * plain
            };
            assert!((scaled - expected).abs() < 1e-12, "{i}: {scaled} {expected}");
        }
        assert!(kinds.iter().all(|&count| count > 0), "{kinds:?}");
    }

    #[test]
    fn scores_depend_on_the_distance_alone() {
        let device = Device::default();
        let rope = Rope::new(&RopeConfig::default(), 8);
        let x = Tensor::<1>::from_data([0.3, -1., 2., 0.7, 1.1, -0.4, 0.9, 1.3], &device);
        let x = x.reshape([1, 1, 1, 1, 8]);
        let score = |q: usize, k: usize| {
            let query = rope.tables(q..q + 1, &device, DType::F32).query(x.clone());
            let key = rope.tables(k..k + 1, &device, DType::F32).key(x.clone());
            (query * key).sum().into_scalar::<f32>()
        };
        assert!((score(5, 2) - score(105, 102)).abs() < 1e-4);
        assert!((score(5, 2) - score(5, 3)).abs() > 1e-2);
    }
}
