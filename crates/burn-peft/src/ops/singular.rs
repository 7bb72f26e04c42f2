//! Leading singular triplets. Large products run where the weight is; what is small runs on the host, in double precision.

use burn::tensor::{Tensor, TensorData};
use nalgebra::{DMatrix, SVD, SymmetricEigen};

/// A smaller dimension up to which everything is decomposed at once.
const SMALL: usize = 256;
/// More columns than asked for make the leading ones come out sooner.
const MORE: usize = 8;
/// About how many columns a basis has before it starts anew from its best.
const COLUMNS: usize = 192;
/// When a singular value counts as settled, relative to the greatest.
const SETTLED: f64 = 1e-6;
/// A bound on starts; a few suffice.
const STARTS: usize = 40;

/// `U_r` (`[n, r]`), the `r` greatest singular values (`[1, r]`, descending) and `V_r` (`[m, r]`) of `w`, `[n, m]`, with
/// `r <= min(n, m)`. `random(columns)` draws a matrix `[m, columns]`.
///
/// Block Lanczos with restarts ([Musco & Musco, 2015](https://arxiv.org/abs/1504.05477) on why few rounds suffice): a basis of
/// `W x, (W Wᵀ) W x, ..`, orthonormal all through, until the singular values in it have settled.
pub(crate) fn leading(
    w: &Tensor<2>,
    r: usize,
    random: impl Fn(usize) -> Tensor<2>,
) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    let smaller = w.dims().into_iter().min().unwrap_or(0);
    let width = r + MORE;
    if smaller <= SMALL.max(3 * width) {
        return exact(w, r);
    }
    let columns = COLUMNS.max(3 * width).min(smaller);
    let mut start = w.clone().matmul(random(width));
    let mut last: Vec<f64> = vec![];
    for _ in 1..STARTS {
        let (u, values, v) = ritz(w, basis(w, start, columns));
        let greatest = values.first().copied().unwrap_or(0.0);
        let has_settled = last.iter().zip(&values).take(r).all(|(a, b)| (a - b).abs() <= SETTLED * greatest);
        if !last.is_empty() && has_settled {
            return narrowed(u, &values, v, r);
        }
        start = u.narrow(1, 0, width);
        last = values;
    }
    let (u, values, v) = ritz(w, basis(w, start, columns));
    narrowed(u, &values, v, r)
}

/// As [`leading`], from a whole decomposition.
fn exact(w: &Tensor<2>, r: usize) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    let [n, m] = w.dims();
    // Of a tall matrix, or of the transpose of a wide one.
    let host = if n < m { to_host(w).transpose() } else { to_host(w) };
    let svd = SVD::new(host, true, true);
    let (Some(long), Some(short)) = (svd.u, svd.v_t) else {
        // Both were asked for.
        return narrowed(w.clone(), svd.singular_values.as_slice(), w.clone(), r);
    };
    let (long, short) = (to_tensor(&long, w), to_tensor(&short.transpose(), w));
    let (u, v) = if n < m { (short, long) } else { (long, short) };
    narrowed(u, svd.singular_values.as_slice(), v, r)
}

/// As [`leading`], from `rounds` rounds of subspace iteration with `r` columns: PyTorch's `svd_lowrank`.
pub(crate) fn rough(
    w: &Tensor<2>,
    r: usize,
    rounds: usize,
    random: impl Fn(usize) -> Tensor<2>,
) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    let mut q = orthonormal(w.clone().matmul(random(r)));
    for _ in 0..rounds {
        let turned = orthonormal(w.clone().transpose().matmul(q));
        q = orthonormal(w.clone().matmul(turned));
    }
    let (u, values, v) = ritz(w, q);
    narrowed(u, &values, v, r)
}

/// An orthonormal basis of at most `columns` columns that begins with the span of `start`.
fn basis(w: &Tensor<2>, start: Tensor<2>, columns: usize) -> Tensor<2> {
    let width = start.dims()[1];
    let mut block = orthonormal(start);
    let mut basis = block.clone();
    while basis.dims()[1] + width <= columns {
        let next = w.clone().matmul(w.clone().transpose().matmul(block));
        // Twice: what is left after the first time may be small, and is then mostly rounding.
        block = orthonormal(beside(&basis, orthonormal(beside(&basis, next))));
        basis = Tensor::cat(vec![basis, block.clone()], 1);
    }
    basis
}

/// `x` without its part in the span of `basis`.
fn beside(basis: &Tensor<2>, x: Tensor<2>) -> Tensor<2> {
    let part = basis.clone().matmul(basis.clone().transpose().matmul(x.clone()));
    x - part
}

/// The singular triplets of `w` within the span of `q`, the greatest first.
fn ritz(w: &Tensor<2>, q: Tensor<2>) -> (Tensor<2>, Vec<f64>, Tensor<2>) {
    let turned = w.clone().transpose().matmul(q.clone());
    let host = to_host(&turned);
    let eigen = SymmetricEigen::new(host.tr_mul(&host));
    let mut order: Vec<usize> = (0..eigen.eigenvalues.len()).collect();
    order.sort_by(|&i, &j| eigen.eigenvalues[j].total_cmp(&eigen.eigenvalues[i]));
    let values: Vec<f64> = order.iter().map(|&i| eigen.eigenvalues[i].max(0.0).sqrt()).collect();
    let vectors =
        DMatrix::from_columns(&order.iter().map(|&i| eigen.eigenvectors.column(i)).collect::<Vec<_>>());
    let v = {
        let mut v = &host * &vectors;
        for (mut column, value) in v.column_iter_mut().zip(&values) {
            column /= value.max(f64::MIN_POSITIVE);
        }
        v
    };
    (q.matmul(to_tensor(&vectors, w)), values, to_tensor(&v, w))
}

fn narrowed(u: Tensor<2>, values: &[f64], v: Tensor<2>, r: usize) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    let values: Vec<f32> = values[..r].iter().map(|&value| value as f32).collect();
    let values = Tensor::from_data(TensorData::new(values, [1, r]), &u.device());
    (u.narrow(1, 0, r), values, v.narrow(1, 0, r))
}

/// Orthonormal columns that span what the columns of `x` do, in their order: `Q` of a QR decomposition.
pub(crate) fn orthonormal(x: Tensor<2>) -> Tensor<2> {
    to_tensor(&to_host(&x).qr().q(), &x)
}

fn to_host(tensor: &Tensor<2>) -> DMatrix<f64> {
    let [rows, columns] = tensor.dims();
    DMatrix::from_row_iterator(rows, columns, tensor.to_data().iter::<f64>())
}

/// On the device of `like`, in f32.
fn to_tensor(matrix: &DMatrix<f64>, like: &Tensor<2>) -> Tensor<2> {
    let values: Vec<f32> = matrix.transpose().iter().map(|&value| value as f32).collect();
    Tensor::from_data(TensorData::new(values, [matrix.nrows(), matrix.ncols()]), &like.device())
}
