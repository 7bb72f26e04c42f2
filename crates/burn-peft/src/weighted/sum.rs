//! Weighted sums and means of tensors of one shape, of some of their elements.

use burn::tensor::{Distribution, Tensor, TensorData};

use crate::combination_type::MajoritySign;

/// A weighted merge of tensors of one shape.
pub(super) struct Merge {
    pub(super) pruning: Pruning,
    pub(super) election: Option<MajoritySign>,
}

/// Which elements of a tensor are kept.
pub(super) enum Pruning {
    None,
    /// This share of them, the greatest by magnitude.
    Magnitude(f64),
    /// Each with this probability, scaled to keep the expectation.
    Random(f64),
}

impl Merge {
    /// The merge of at least one tensor, each with its weight.
    pub(super) fn apply(&self, tensors: impl Iterator<Item = (Tensor<2>, f64)>) -> Tensor<2> {
        let (pruned, weights): (Vec<_>, Vec<_>) =
            tensors.map(|(tensor, weight)| (self.pruning.apply(tensor), weight as f32)).unzip();
        let stacked: Tensor<3> = Tensor::stack(pruned, 0);
        let shape = [weights.len(), 1, 1];
        let weights = Tensor::<3>::from_data(TensorData::new(weights, shape), &stacked.device());
        let merged = match self.election {
            None => (stacked * weights).sum_dim(0),
            Some(method) => {
                let agrees = method.agreement(&stacked);
                let count = agrees.clone().sum_dim(0).clamp_min(1.0);
                (stacked * weights * agrees).sum_dim(0) / count
            }
        };
        merged.squeeze_dim(0)
    }
}

impl MajoritySign {
    /// 1 where an element has the sign elected over dimension 0, 0 elsewhere.
    fn agreement(self, stacked: &Tensor<3>) -> Tensor<3> {
        let signs = stacked.clone().sign();
        let votes = match self {
            Self::Total => stacked.clone(),
            Self::Frequency => signs.clone(),
        };
        let positive = votes.sum_dim(0).greater_equal_elem(0.0).float();
        let elected = positive.mul_scalar(2.0).sub_scalar(1.0);
        (signs * elected).greater_elem(0.0).float()
    }
}

impl Pruning {
    fn apply(&self, tensor: Tensor<2>) -> Tensor<2> {
        match *self {
            Self::Magnitude(density) if density < 1.0 => keep_greatest(tensor, density),
            Self::Random(density) if density < 1.0 => {
                let kept = tensor.random_like(Distribution::Bernoulli(density));
                (tensor * kept).div_scalar(density)
            }
            _ => tensor,
        }
    }
}

/// The `⌊density n⌋` elements of the greatest magnitude, the first ones among equals; 0 in place of the others.
fn keep_greatest(tensor: Tensor<2>, density: f64) -> Tensor<2> {
    let (shape, device) = (tensor.dims(), tensor.device());
    let mut values: Vec<f32> = tensor.into_data().iter::<f32>().collect();
    let kept = (density * values.len() as f64) as usize;
    let pruned = values.len() - kept;
    let mut order: Vec<usize> = (0..values.len()).collect();
    if kept > 0 {
        order.select_nth_unstable_by(pruned, |&i, &j| {
            values[i].abs().total_cmp(&values[j].abs()).then(j.cmp(&i))
        });
    }
    for &element in &order[..pruned] {
        values[element] = 0.0;
    }
    Tensor::from_data(TensorData::new(values, shape), &device)
}

#[cfg(test)]
mod tests {
    use super::super::reference::{Matrix, elected_mean, sum};
    use super::*;

    fn three() -> Vec<(Matrix, f64)> {
        [(1, 0.7), (2, -1.3), (3, 1.6)].map(|(seed, weight)| (Matrix::noise(7, 5, seed), weight)).into()
    }

    fn merged(pruning: Pruning, election: Option<MajoritySign>, tensors: &[(Matrix, f64)]) -> Matrix {
        let tensors = tensors.iter().map(|(tensor, weight)| (tensor.tensor(), *weight));
        Matrix::of(&Merge { pruning, election }.apply(tensors))
    }

    #[test]
    fn sums_and_elected_means_are_those_of_plain_loops() {
        for tensors in [three(), three()[..2].to_vec()] {
            for density in [0.2, 0.4, 1.0] {
                let pruned: Vec<_> =
                    tensors.iter().map(|(tensor, weight)| (tensor.keep_greatest(density), *weight)).collect();
                let result = merged(Pruning::Magnitude(density), None, &tensors);
                assert!(result.greatest_difference(&sum(&pruned)) < 1e-6);
                for method in [MajoritySign::Total, MajoritySign::Frequency] {
                    let result = merged(Pruning::Magnitude(density), Some(method), &tensors);
                    let error = result.greatest_difference(&elected_mean(&pruned, method));
                    assert!(error < 1e-6, "{method:?} at density {density}: {error}");
                }
            }
        }
        let [total, frequency] = [MajoritySign::Total, MajoritySign::Frequency]
            .map(|method| merged(Pruning::None, Some(method), &three()));
        assert!(total.greatest_difference(&frequency) > 0.1);
    }

    #[test]
    fn signs_are_elected_before_weighting_and_a_draw_is_positive() {
        let tensors = [(vec![0.9, -0.9, 0.5, 0.0], -2.0), (vec![-0.1, 0.1, -0.5, 0.0], 10.0)]
            .map(|(values, weight)| (Matrix { rows: 2, cols: 2, values }, weight));
        let expected = |values: [f64; 4]| Matrix { rows: 2, cols: 2, values: values.to_vec() };
        let total = merged(Pruning::None, Some(MajoritySign::Total), &tensors);
        assert!(total.greatest_difference(&expected([-1.8, 1.8, -1.0, 0.0])) < 1e-6, "{total:?}");
        let frequency = merged(Pruning::None, Some(MajoritySign::Frequency), &tensors);
        assert!(frequency.greatest_difference(&expected([-1.8, 1.0, -1.0, 0.0])) < 1e-6, "{frequency:?}");
    }

    #[test]
    fn pruning_keeps_the_exact_number_of_elements() {
        let kept = |values: &[f64], density| {
            let matrix = Matrix { rows: 2, cols: values.len() / 2, values: values.to_vec() };
            Matrix::of(&keep_greatest(matrix.tensor(), density)).values
        };
        let equal = [1.0, -1.0, 1.0, 0.5, -1.0, 1.0];
        assert_eq!(kept(&equal, 0.5), [1.0, -1.0, 1.0, 0.0, 0.0, 0.0]);
        assert_eq!(kept(&equal, 0.7), [1.0, -1.0, 1.0, 0.0, -1.0, 0.0]);
        assert_eq!(kept(&equal, 0.99), [1.0, -1.0, 1.0, 0.0, -1.0, 1.0]);
        assert_eq!(kept(&[0.1, -3.0, 2.0, 0.2], 0.25), [0.0, -3.0, 0.0, 0.0]);
        // ⌊0.1 * 6⌋ = 0.
        assert_eq!(kept(&equal, 0.1), [0.0; 6]);
    }

    #[test]
    fn random_pruning_keeps_its_share_and_rescales() {
        let (matrix, density) = (Matrix::noise(200, 150, 9), 0.3);
        let pruned = Matrix::of(&Pruning::Random(density).apply(matrix.tensor()));
        let kept = pruned.values.iter().filter(|&&x| x != 0.0).count();
        for (x, original) in pruned.values.iter().zip(&matrix.values) {
            assert!(*x == 0.0 || (x - original / density).abs() < 1e-5, "{x} from {original}");
        }
        // Six standard deviations.
        let n = matrix.values.len() as f64;
        let bound = 6.0 * (n * density * (1.0 - density)).sqrt();
        assert!((kept as f64 - density * n).abs() < bound, "{kept} of {n}");
        assert_eq!(Matrix::of(&Pruning::Random(1.0).apply(matrix.tensor())), matrix);
    }
}
