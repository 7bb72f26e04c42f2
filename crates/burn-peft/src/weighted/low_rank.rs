//! Low-rank factors of a matrix.

use burn::linalg::svd;
use burn::tensor::Tensor;

/// Bound on the sweeps that a singular value may take; a few suffice, and Burn panics at the bound.
const SWEEPS: usize = 200;

/// `left`, `core` and `right` with `left core right = a b`: orthonormal columns, a matrix no larger than the rank of
/// the factors, and orthonormal rows. The factors are finite.
///
/// Each factor is decomposed by itself. Burn's `qr` would do as well, but makes a square matrix of the longer
/// dimension, which is the vocabulary for an embedding.
pub(super) fn compress(a: Tensor<2>, b: Tensor<2>) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    let (left, a_values, a_right) = svd::<2, 1>(a, SWEEPS);
    let (b_left, b_values, right) = svd::<2, 1>(b, SWEEPS);
    let a_core = a_values.unsqueeze_dim::<2>(1) * a_right;
    let b_core = b_left * b_values.unsqueeze_dim::<2>(0);
    (left, a_core.matmul(b_core), right)
}

/// Factors of the closest matrix of rank `rank`: orthonormal columns, and the singular values in the second. All of a
/// matrix that has no such rank.
pub(super) fn truncate(matrix: Tensor<2>, rank: usize) -> (Tensor<2>, Tensor<2>) {
    let (u, values, vt) = svd::<2, 1>(matrix, SWEEPS);
    let kept = rank.min(values.dims()[0]);
    let b = values.unsqueeze_dim::<2>(1) * vt;
    (u.narrow(1, 0, kept), b.narrow(0, 0, kept))
}

/// Columns and rows of zeros up to `rank`.
pub(super) fn pad(a: Tensor<2>, b: Tensor<2>, rank: usize) -> (Tensor<2>, Tensor<2>) {
    let ([d_in, r], [_, d_out], device) = (a.dims(), b.dims(), a.device());
    if r >= rank {
        return (a, b);
    }
    let a = Tensor::cat(vec![a, Tensor::zeros([d_in, rank - r], &device)], 1);
    let b = Tensor::cat(vec![b, Tensor::zeros([rank - r, d_out], &device)], 0);
    (a, b)
}

#[cfg(test)]
mod tests {
    use super::super::reference::Matrix;
    use super::*;

    /// `U diag(values) Vᵀ` with `U` and `V` orthonormal.
    fn with_values(rows: usize, cols: usize, values: &[f64]) -> Matrix {
        let (u, v) = (Matrix::orthonormal(rows, values.len(), 1), Matrix::orthonormal(cols, values.len(), 2));
        u.scale_columns(values).matmul(&v.transpose())
    }

    fn assert_orthonormal_columns(tensor: Tensor<2>) {
        let gram = Matrix::of(&tensor.clone().transpose().matmul(tensor));
        let identity = Matrix::from_fn(gram.rows, gram.rows, |i, j| if i == j { 1.0 } else { 0.0 });
        assert!(gram.greatest_difference(&identity) < 1e-5, "{gram:?}");
    }

    #[test]
    fn truncation_keeps_the_greatest_singular_values() {
        let values = [5.0, 3.0, 2.0, 0.5];
        for (rows, cols) in [(9, 6), (6, 9), (7, 7), (40, 4), (4, 40)] {
            let matrix = with_values(rows, cols, &values);
            for rank in 1..=4 {
                let kept: Vec<f64> =
                    values.iter().enumerate().map(|(i, x)| if i < rank { *x } else { 0.0 }).collect();
                let (a, b) = truncate(matrix.tensor(), rank);
                assert_eq!((a.dims(), b.dims()), ([rows, rank], [rank, cols]));
                let product = Matrix::of(&a.clone().matmul(b));
                let error = product.greatest_difference(&with_values(rows, cols, &kept));
                assert!(error < 1e-5, "{rows} x {cols}, rank {rank}: {error}");
                assert_orthonormal_columns(a);
            }
        }
    }

    #[test]
    fn a_matrix_of_lower_rank_is_reproduced() {
        for (rows, cols) in [(12, 5), (5, 12)] {
            for values in [&[4.0, 4.0, 1.0][..], &[0.0, 0.0], &[3.0, 0.0]] {
                let matrix = with_values(rows, cols, values);
                let (a, b) = truncate(matrix.tensor(), 4);
                assert!(Matrix::of(&a.clone().matmul(b)).greatest_difference(&matrix) < 1e-5);
                assert_orthonormal_columns(a);
            }
        }
    }

    #[test]
    fn compression_keeps_the_product_of_factors_of_any_shape_and_rank() {
        // The last factors have columns that are multiples of each other.
        let multiple = Matrix::from_fn(8, 6, |i, j| (i as f64 - 3.0) * (j as f64 + 1.0) / 10.0);
        let pairs = [
            (Matrix::noise(30, 4, 1), Matrix::noise(4, 9, 2)),
            (Matrix::noise(5, 8, 3), Matrix::noise(8, 20, 4)),
            (Matrix::noise(5, 8, 5), Matrix::noise(8, 3, 6)),
            (multiple, Matrix::noise(6, 10, 7)),
        ];
        for (a, b) in pairs {
            let (left, core, right) = compress(a.tensor(), b.tensor());
            assert!(core.dims().iter().all(|&size| size <= a.cols));
            assert_orthonormal_columns(left.clone());
            assert_orthonormal_columns(right.clone().transpose());
            let product = Matrix::of(&left.matmul(core).matmul(right));
            assert!(product.greatest_difference(&a.matmul(&b)) < 1e-5);
        }
    }

    #[test]
    fn padding_adds_zeros_and_nothing_else() {
        let (a, b) = (Matrix::noise(5, 2, 1), Matrix::noise(2, 3, 2));
        let (padded_a, padded_b) = pad(a.tensor(), b.tensor(), 4);
        let expected_a = Matrix::from_fn(5, 4, |i, j| if j < 2 { a.at(i, j) } else { 0.0 });
        let expected_b = Matrix::from_fn(4, 3, |i, j| if i < 2 { b.at(i, j) } else { 0.0 });
        assert_eq!((Matrix::of(&padded_a), Matrix::of(&padded_b)), (expected_a, expected_b));
        let (same_a, same_b) = pad(a.tensor(), b.tensor(), 2);
        assert_eq!((Matrix::of(&same_a), Matrix::of(&same_b)), (a, b));
    }
}
