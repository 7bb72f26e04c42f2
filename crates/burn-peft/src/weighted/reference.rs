//! The formulas in plain loops and double precision, for tests.

use burn::tensor::{Device, Tensor, TensorData};

use crate::combination_type::MajoritySign;

/// A matrix of plain numbers.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Matrix {
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Row by row.
    pub(super) values: Vec<f64>,
}

impl Matrix {
    pub(super) fn from_fn(rows: usize, cols: usize, value: impl Fn(usize, usize) -> f64) -> Self {
        let values = (0..rows * cols).map(|at| value(at / cols, at % cols)).collect();
        Self { rows, cols, values }
    }

    pub(super) fn zeros(rows: usize, cols: usize) -> Self {
        Self::from_fn(rows, cols, |_, _| 0.0)
    }

    /// Different numbers in (-1, 1), all of them exact in f32, from a generator of its own.
    pub(super) fn noise(rows: usize, cols: usize, seed: u64) -> Self {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1);
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 41) as f64 + 0.5) / (1u64 << 22) as f64 - 1.0
        };
        let values = (0..rows * cols).map(|_| f64::from(next() as f32)).collect();
        Self { rows, cols, values }
    }

    /// `size` orthonormal columns: the first ones of the reflection along `noise(rows, 1, seed)`.
    pub(super) fn orthonormal(rows: usize, size: usize, seed: u64) -> Self {
        let v = Self::noise(rows, 1, seed).values;
        let norm: f64 = v.iter().map(|x| x * x).sum();
        Self::from_fn(rows, size, |i, j| f64::from(u8::from(i == j)) - 2.0 * v[i] * v[j] / norm)
    }

    pub(super) fn at(&self, row: usize, col: usize) -> f64 {
        self.values[row * self.cols + col]
    }

    pub(super) fn transpose(&self) -> Self {
        Self::from_fn(self.cols, self.rows, |i, j| self.at(j, i))
    }

    pub(super) fn matmul(&self, other: &Self) -> Self {
        assert_eq!(self.cols, other.rows);
        Self::from_fn(self.rows, other.cols, |i, j| {
            (0..self.cols).map(|k| self.at(i, k) * other.at(k, j)).sum()
        })
    }

    pub(super) fn scale(&self, factor: f64) -> Self {
        Self::from_fn(self.rows, self.cols, |i, j| factor * self.at(i, j))
    }

    pub(super) fn add(&self, other: &Self) -> Self {
        assert_eq!((self.rows, self.cols), (other.rows, other.cols));
        Self::from_fn(self.rows, self.cols, |i, j| self.at(i, j) + other.at(i, j))
    }

    /// Each column times a number of its own.
    pub(super) fn scale_columns(&self, factors: &[f64]) -> Self {
        Self::from_fn(self.rows, self.cols, |i, j| self.at(i, j) * factors[j])
    }

    pub(super) fn greatest_difference(&self, other: &Self) -> f64 {
        self.add(&other.scale(-1.0)).values.iter().fold(0.0, |most, x| x.abs().max(most))
    }

    pub(super) fn tensor(&self) -> Tensor<2> {
        let values: Vec<f32> = self.values.iter().map(|&x| x as f32).collect();
        Tensor::from_data(TensorData::new(values, [self.rows, self.cols]), &Device::default())
    }

    pub(super) fn of(tensor: &Tensor<2>) -> Self {
        let [rows, cols] = tensor.dims();
        Self { rows, cols, values: tensor.to_data().iter::<f64>().collect() }
    }

    /// The elements of the greatest magnitude, found by sorting all of them.
    pub(super) fn keep_greatest(&self, density: f64) -> Self {
        let mut order: Vec<usize> = (0..self.values.len()).collect();
        order.sort_by(|&i, &j| self.values[j].abs().total_cmp(&self.values[i].abs()));
        let mut kept = Self::zeros(self.rows, self.cols);
        for &at in order.iter().take((density * self.values.len() as f64) as usize) {
            kept.values[at] = self.values[at];
        }
        kept
    }

    /// The closest matrix of this rank, by one-sided Jacobi rotations.
    pub(super) fn best_approximation(&self, rank: usize) -> Self {
        let (mut scaled, n) = (self.clone(), self.cols);
        let mut right = Self::from_fn(n, n, |i, j| f64::from(u8::from(i == j)));
        let dot = |m: &Self, p: usize, q: usize| (0..m.rows).map(|i| m.at(i, p) * m.at(i, q)).sum::<f64>();
        for _ in 0..60 {
            for (p, q) in (0..n).flat_map(|p| (p + 1..n).map(move |q| (p, q))) {
                let (pp, qq, pq) = (dot(&scaled, p, p), dot(&scaled, q, q), dot(&scaled, p, q));
                let (sin, cos) = (0.5 * (2.0 * pq).atan2(pp - qq)).sin_cos();
                for m in [&mut scaled, &mut right] {
                    for i in 0..m.rows {
                        let (x, y) = (m.at(i, p), m.at(i, q));
                        m.values[i * n + p] = cos * x + sin * y;
                        m.values[i * n + q] = cos * y - sin * x;
                    }
                }
            }
        }
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&p, &q| dot(&scaled, q, q).total_cmp(&dot(&scaled, p, p)));
        let kept: Vec<f64> = (0..n).map(|p| f64::from(u8::from(order[..rank.min(n)].contains(&p)))).collect();
        scaled.scale_columns(&kept).matmul(&right.transpose())
    }
}

/// `Σ weight tensor`.
pub(super) fn sum(tensors: &[(Matrix, f64)]) -> Matrix {
    let zero = Matrix::zeros(tensors[0].0.rows, tensors[0].0.cols);
    tensors.iter().fold(zero, |sum, (tensor, weight)| sum.add(&tensor.scale(*weight)))
}

/// The mean of the weighted elements that have the elected sign.
pub(super) fn elected_mean(tensors: &[(Matrix, f64)], method: MajoritySign) -> Matrix {
    Matrix::from_fn(tensors[0].0.rows, tensors[0].0.cols, |i, j| {
        let elements = || tensors.iter().map(|(tensor, weight)| (tensor.at(i, j), weight));
        let positive = match method {
            MajoritySign::Total => elements().map(|(x, _)| x).sum::<f64>() >= 0.0,
            MajoritySign::Frequency => {
                elements().filter(|(x, _)| *x > 0.0).count() >= elements().filter(|(x, _)| *x < 0.0).count()
            }
        };
        let agreeing: Vec<f64> = elements()
            .filter(|(x, _)| if positive { *x > 0.0 } else { *x < 0.0 })
            .map(|(x, weight)| x * weight)
            .collect();
        agreeing.iter().sum::<f64>() / agreeing.len().max(1) as f64
    })
}
