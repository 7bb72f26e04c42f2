//! The same on the host, in f64, as the formulas are written.

use nalgebra::DMatrix;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

pub(super) type Matrix = DMatrix<f64>;

/// Nearly normally distributed numbers: sums of 12 uniform ones (Irwin and Hall).
pub(super) fn normal(count: usize, seed: u64) -> Vec<f64> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..count).map(|_| (0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.0).collect()
}

/// The largest difference, relative to the largest expected number. Infinite if something found is not finite, if the counts
/// differ, or if nothing but zeros is expected.
pub(super) fn deviation(found: &[f64], expected: &[f64]) -> f64 {
    if found.len() != expected.len() || found.iter().any(|x| !x.is_finite()) {
        return f64::INFINITY;
    }
    let largest = expected.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
    if largest == 0.0 {
        return f64::INFINITY;
    }
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / largest
}

/// `softmax(q kᵀ) v` where position `i` of sequence `r` sees those from `padding[r]` to `i`. `q` is `[b, n, g, s, d]`, `k` and
/// `v` are `[b, n, s, d]`.
pub(super) fn masked_attention(
    [b, n, g, s, d]: [usize; 5],
    [q, k, v]: [&[f64]; 3],
    padding: &[usize],
) -> Vec<f64> {
    let mut y = vec![0.0; b * n * g * s * d];
    for (row, y) in y.chunks_mut(d).enumerate() {
        let (i, head) = (row % s, row / (s * g));
        let keys = padding[head / n].min(i)..=i;
        let dot = |j: usize| -> f64 {
            let (q, k) = (&q[row * d..][..d], &k[(head * s + j) * d..][..d]);
            q.iter().zip(k).map(|(q, k)| q * k).sum()
        };
        let scores: Vec<f64> = keys.clone().map(dot).collect();
        let max = scores.iter().copied().fold(f64::MIN, f64::max);
        let total: f64 = scores.iter().map(|score| (score - max).exp()).sum();
        for (j, score) in keys.zip(scores) {
            let weight = (score - max).exp() / total;
            for (y, v) in y.iter_mut().zip(&v[(head * s + j) * d..][..d]) {
                *y += weight * v;
            }
        }
    }
    y
}

/// What each row of a table gets of the gradient of what was looked up.
pub(super) fn table_gradient(rows: usize, ids: &[i64], dy: &Matrix) -> Matrix {
    let mut gradient = Matrix::zeros(rows, dy.ncols());
    for (i, &id) in ids.iter().enumerate() {
        let mut row = gradient.row_mut(id as usize);
        row += dy.row(i);
    }
    gradient
}
