//! Several adapters of one weight made into one.

use burn::tensor::Tensor;

use crate::combination_type::CombinationType;
use crate::error::PeftError;
use crate::tensor::is_finite;

mod adapter;
mod low_rank;
#[cfg(test)]
mod reference;
mod sum;

pub(crate) use adapter::add;

use low_rank::{compress, pad, truncate};
use sum::{Merge, Pruning};

/// One adapter of a weight and its part in the combination.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    /// `A`, `[d_in, r]`, without a graph.
    pub(crate) a: Tensor<2>,
    /// `B`, `[r, d_out]`, without a graph.
    pub(crate) b: Tensor<2>,
    pub(crate) scaling: f64,
    pub(crate) weight: f64,
}

impl CombinationType {
    /// The kind that is computed for this many adapters: PEFT combines one alone as `linear`.
    ///
    /// That is about the adapters that the user names. A layer that only one of several has is combined as asked.
    pub(crate) fn for_adapters(self, count: usize) -> Self {
        if count == 1 { Self::Linear } else { self }
    }

    /// Checks every value.
    pub(crate) fn validate(&self) -> Result<(), PeftError> {
        let density = match *self {
            Self::Cat | Self::Linear | Self::Svd { .. } => 1.0,
            Self::Ties { density, .. }
            | Self::TiesSvd { density, .. }
            | Self::DareLinear { density }
            | Self::DareTies { density, .. }
            | Self::MagnitudePrune { density } => density,
        };
        if !(density > 0.0 && density <= 1.0) {
            return Err(PeftError::invalid("density", "a number in (0, 1]", density));
        }
        match *self {
            Self::Svd { rank: Some(0) } | Self::TiesSvd { rank: Some(0), .. } => {
                Err(PeftError::invalid("rank", "a positive integer", 0))
            }
            _ => Ok(()),
        }
    }

    /// The rank of the result for adapters of these ranks.
    pub(crate) fn rank(&self, ranks: &[usize]) -> Result<usize, PeftError> {
        let none = || PeftError::invalid("adapters", "at least one adapter", "none");
        let greatest = ranks.iter().copied().max().ok_or_else(none)?;
        match *self {
            Self::Cat => Ok(ranks.iter().sum()),
            Self::Svd { rank } | Self::TiesSvd { rank, .. } => Ok(rank.unwrap_or(greatest)),
            _ if ranks.iter().all(|&rank| rank == greatest) => Ok(greatest),
            _ => Err(PeftError::UnequalRanks { combination_type: *self, ranks: ranks.to_vec() }),
        }
    }

    /// Factors of shape `[d_in, rank]` and `[rank, d_out]`, whose scaling is 1.
    ///
    /// `rank` is what [`rank`](Self::rank) gives for all adapters of the combination. A layer may have only some of them.
    pub(crate) fn combine(
        &self,
        sources: &[Source],
        rank: usize,
    ) -> Result<(Tensor<2>, Tensor<2>), PeftError> {
        let ranks: Vec<usize> = sources.iter().map(|source| source.a.dims()[1]).collect();
        self.rank(&ranks)?;
        let (a, b) = match self.rule() {
            Rule::Cat => concatenate(sources),
            Rule::Svd => {
                let (a, b) = concatenate(sources);
                let (left, core, right) = compress(self.finite(a)?, self.finite(b)?);
                let (a, b) = truncate(self.finite(core)?, rank);
                (left.matmul(a), b.matmul(right))
            }
            Rule::Updates(merge) => {
                let updates = sources.iter().map(|source| {
                    (source.a.clone().mul_scalar(source.scaling).matmul(source.b.clone()), source.weight)
                });
                truncate(self.finite(merge.apply(updates))?, rank)
            }
            Rule::Factors(merge) => {
                let halves = |source: &Source| {
                    let weight = source.weight * source.scaling;
                    (weight.abs().sqrt().copysign(weight), weight.abs().sqrt())
                };
                let a = merge.apply(sources.iter().map(|source| (source.a.clone(), halves(source).0)));
                let b = merge.apply(sources.iter().map(|source| (source.b.clone(), halves(source).1)));
                (a, b)
            }
        };
        let (a, b) = (self.finite(a)?, self.finite(b)?);
        Ok(pad(a, b, rank))
    }

    fn rule(&self) -> Rule {
        let merge = |pruning, election| Merge { pruning, election };
        match *self {
            Self::Cat => Rule::Cat,
            Self::Svd { .. } => Rule::Svd,
            Self::Linear => Rule::Factors(merge(Pruning::None, None)),
            Self::Ties { density, majority_sign } => {
                Rule::Factors(merge(Pruning::Magnitude(density), Some(majority_sign)))
            }
            Self::TiesSvd { density, majority_sign, .. } => {
                Rule::Updates(merge(Pruning::Magnitude(density), Some(majority_sign)))
            }
            Self::DareLinear { density } => Rule::Factors(merge(Pruning::Random(density), None)),
            Self::DareTies { density, majority_sign } => {
                Rule::Factors(merge(Pruning::Random(density), Some(majority_sign)))
            }
            Self::MagnitudePrune { density } => Rule::Factors(merge(Pruning::Magnitude(density), None)),
        }
    }

    /// The tensor, if it has no infinity and no NaN: Burn's decomposition need not converge for those, and panics then.
    fn finite(&self, tensor: Tensor<2>) -> Result<Tensor<2>, PeftError> {
        if is_finite(&tensor) {
            Ok(tensor)
        } else {
            Err(PeftError::NonFiniteCombination { combination_type: *self })
        }
    }
}

/// What a kind works on.
enum Rule {
    Cat,
    Svd,
    /// Merges the updates, then truncates.
    Updates(Merge),
    /// Merges the `A`s and merges the `B`s.
    Factors(Merge),
}

/// `[w₁ s₁ A₁, ..]` and `[B₁; ..]`, whose product is the sum of the updates.
fn concatenate(sources: &[Source]) -> (Tensor<2>, Tensor<2>) {
    let a = sources.iter().map(|source| source.a.clone().mul_scalar(source.weight * source.scaling));
    let b = sources.iter().map(|source| source.b.clone());
    (Tensor::cat(a.collect(), 1), Tensor::cat(b.collect(), 0))
}

#[cfg(test)]
mod tests {
    use super::reference::{Matrix, elected_mean, sum};
    use super::*;
    use crate::combination_type::MajoritySign;

    const D_IN: usize = 9;
    const D_OUT: usize = 7;
    const TIES: CombinationType = CombinationType::Ties { density: 0.4, majority_sign: MajoritySign::Total };
    const TIES_SVD: CombinationType =
        CombinationType::TiesSvd { density: 0.4, majority_sign: MajoritySign::Total, rank: None };
    const DARE_TIES: CombinationType =
        CombinationType::DareTies { density: 0.4, majority_sign: MajoritySign::Total };

    /// An adapter in plain numbers.
    #[derive(Clone)]
    struct Plain {
        a: Matrix,
        b: Matrix,
        scaling: f64,
        weight: f64,
    }

    impl Plain {
        fn update(&self) -> Matrix {
            self.a.matmul(&self.b).scale(self.scaling)
        }
    }

    /// Adapters of these ranks, with different scalings and weights of both signs.
    fn adapters(ranks: &[usize]) -> Vec<Plain> {
        const SCALINGS: [f64; 3] = [1.5, 2.5, 0.5];
        const WEIGHTS: [f64; 3] = [0.7, -1.3, 1.6];
        let plain = |(i, &r): (usize, &usize)| Plain {
            a: Matrix::noise(D_IN, r, 2 * i as u64),
            b: Matrix::noise(r, D_OUT, 2 * i as u64 + 1),
            scaling: SCALINGS[i],
            weight: WEIGHTS[i],
        };
        ranks.iter().enumerate().map(plain).collect()
    }

    fn sources(adapters: &[Plain]) -> Vec<Source> {
        let source = |plain: &Plain| Source {
            a: plain.a.tensor(),
            b: plain.b.tensor(),
            scaling: plain.scaling,
            weight: plain.weight,
        };
        adapters.iter().map(source).collect()
    }

    fn combine(kind: CombinationType, adapters: &[Plain]) -> (Matrix, Matrix) {
        let ranks: Vec<usize> = adapters.iter().map(|plain| plain.a.cols).collect();
        let rank = kind.rank(&ranks).unwrap();
        let (a, b) = kind.combine(&sources(adapters), rank).unwrap();
        assert_eq!((a.dims(), b.dims()), ([D_IN, rank], [rank, D_OUT]));
        (Matrix::of(&a), Matrix::of(&b))
    }

    fn updates(adapters: &[Plain]) -> Vec<(Matrix, f64)> {
        adapters.iter().map(|plain| (plain.update(), plain.weight)).collect()
    }

    /// What plain loops make of weighted tensors.
    type Merged<'a> = &'a dyn Fn(&[(Matrix, f64)]) -> Matrix;

    /// The factors with their weights, first all `A`, then all `B`.
    fn factors(adapters: &[Plain]) -> [Vec<(Matrix, f64)>; 2] {
        let root = |plain: &Plain| (plain.weight * plain.scaling).abs().sqrt();
        [
            adapters.iter().map(|plain| (plain.a.clone(), root(plain) * plain.weight.signum())).collect(),
            adapters.iter().map(|plain| (plain.b.clone(), root(plain))).collect(),
        ]
    }

    fn pruned(tensors: &[(Matrix, f64)], density: f64) -> Vec<(Matrix, f64)> {
        tensors.iter().map(|(tensor, weight)| (tensor.keep_greatest(density), *weight)).collect()
    }

    #[track_caller]
    fn assert_close(found: &Matrix, expected: &Matrix) {
        let size = expected.greatest_difference(&Matrix::zeros(expected.rows, expected.cols));
        assert!(size > 0.1, "nothing to compare");
        let error = found.greatest_difference(expected) / size;
        assert!(error < 5e-6, "relative error {error}");
    }

    #[test]
    fn cat_is_the_sum_of_the_updates() {
        let adapters = adapters(&[2, 3, 4]);
        let (a, b) = combine(CombinationType::Cat, &adapters);
        assert_eq!(a.cols, 9);
        assert_close(&a.matmul(&b), &sum(&updates(&adapters)));
        // The second adapter's columns start at 2.
        let second = Matrix::from_fn(D_IN, 3, |i, j| a.at(i, j + 2));
        assert_close(&second, &adapters[1].a.scale(-1.3 * 2.5));
    }

    #[test]
    fn kinds_that_act_on_factors_are_those_of_plain_loops() {
        let adapters = adapters(&[3, 3, 3]);
        let [a, b] = factors(&adapters);
        let check = |kind, expect: Merged| {
            let found = combine(kind, &adapters);
            assert_close(&found.0, &expect(&a));
            assert_close(&found.1, &expect(&b));
        };
        check(CombinationType::Linear, &sum);
        check(CombinationType::MagnitudePrune { density: 0.4 }, &|list| sum(&pruned(list, 0.4)));
        for majority_sign in [MajoritySign::Total, MajoritySign::Frequency] {
            for density in [0.4, 1.0] {
                check(CombinationType::Ties { density, majority_sign }, &|list| {
                    elected_mean(&pruned(list, density), majority_sign)
                });
            }
            // Nothing is random here.
            check(CombinationType::DareTies { density: 1.0, majority_sign }, &|list| {
                elected_mean(list, majority_sign)
            });
        }
        check(CombinationType::DareLinear { density: 1.0 }, &sum);
    }

    #[test]
    fn linear_has_the_cross_terms_of_the_documentation() {
        let adapters = adapters(&[2, 2]);
        let (a, b) = combine(CombinationType::Linear, &adapters);
        let [one, two] = [&adapters[0], &adapters[1]];
        let cross = (0.7f64 * 1.5 * 1.3 * 2.5).sqrt();
        // w₁ s₁ > 0 > w₂ s₂
        let cross = one.a.matmul(&two.b).add(&two.a.matmul(&one.b).scale(-1.0)).scale(cross);
        assert_close(&a.matmul(&b), &sum(&updates(&adapters)).add(&cross));
    }

    #[test]
    fn dare_prunes_each_factor_and_keeps_the_weights() {
        let adapters = adapters(&[3]);
        let [a, b] = factors(&adapters);
        for kind in [CombinationType::DareLinear { density: 0.4 }, DARE_TIES] {
            let found = combine(kind, &adapters);
            for (found, (factor, weight)) in [(&found.0, &a[0]), (&found.1, &b[0])] {
                for (x, original) in found.values.iter().zip(&factor.values) {
                    let kept = original * weight / 0.4;
                    // One sign of two is elected: a negative element is the only one, so it stays.
                    assert!(*x == 0.0 || (x - kept).abs() < 1e-5, "{kind}: {x} from {original}");
                }
            }
        }
    }

    #[test]
    fn svd_is_the_closest_matrix_of_its_rank() {
        let adapters = adapters(&[2, 3, 4]);
        let total = sum(&updates(&adapters));
        for rank in [Some(1), Some(2), Some(6), None] {
            let (a, b) = combine(CombinationType::Svd { rank }, &adapters);
            assert_close(&a.matmul(&b), &total.best_approximation(rank.unwrap_or(4)));
            let identity = Matrix::from_fn(a.cols, a.cols, |i, j| if i == j { 1.0 } else { 0.0 });
            assert_close(&a.transpose().matmul(&a), &identity);
        }
        // As much as a layer can have, and more.
        for rank in [7, 8] {
            let (a, b) = combine(CombinationType::Svd { rank: Some(rank) }, &adapters);
            assert_close(&a.matmul(&b), &total);
            assert_eq!(a.cols, rank);
        }
    }

    #[test]
    fn svd_of_adapters_that_cancel_is_zero() {
        let mut adapters = adapters(&[2, 2]);
        adapters[1] = Plain { weight: -0.7, ..adapters[0].clone() };
        let (a, b) = combine(CombinationType::Svd { rank: None }, &adapters);
        assert!(a.matmul(&b).values.iter().all(|x| x.abs() < 1e-6));
        let twice = Plain { weight: 0.35, ..adapters[0].clone() };
        adapters[1] = twice;
        let (a, b) = combine(CombinationType::Svd { rank: Some(3) }, &adapters);
        assert_close(&a.matmul(&b), &adapters[0].update().scale(1.05));
    }

    #[test]
    fn ties_svd_is_the_closest_matrix_to_the_dense_merge() {
        let adapters = adapters(&[2, 3, 4]);
        for majority_sign in [MajoritySign::Total, MajoritySign::Frequency] {
            let dense = elected_mean(&pruned(&updates(&adapters), 0.4), majority_sign);
            for rank in [Some(2), None] {
                let kind = CombinationType::TiesSvd { density: 0.4, majority_sign, rank };
                let (a, b) = combine(kind, &adapters);
                assert_close(&a.matmul(&b), &dense.best_approximation(rank.unwrap_or(4)));
            }
        }
    }

    #[test]
    fn one_adapter_alone_is_only_weighted() {
        for kind in [CombinationType::Cat, CombinationType::Svd { rank: Some(1) }, TIES, TIES_SVD, DARE_TIES]
        {
            assert_eq!(kind.for_adapters(1), CombinationType::Linear);
            assert_eq!(kind.for_adapters(2), kind);
        }
        for weight in [0.8, -0.8] {
            let alone = [Plain { weight, ..adapters(&[3])[0].clone() }];
            let (a, b) = combine(CombinationType::Linear, &alone);
            assert_close(&a.matmul(&b), &alone[0].update().scale(weight));
        }
    }

    #[test]
    fn a_layer_that_some_adapters_lack_still_has_the_rank_of_the_result() {
        let adapters = adapters(&[2]);
        for kind in [CombinationType::Cat, CombinationType::Svd { rank: None }] {
            let (a, b) = kind.combine(&sources(&adapters), 5).unwrap();
            assert_eq!((a.dims(), b.dims()), ([D_IN, 5], [5, D_OUT]));
            let expected = adapters[0].update().scale(adapters[0].weight);
            assert_close(&Matrix::of(&a.matmul(b)), &expected);
        }
    }

    #[test]
    fn ranks_follow_the_kind() {
        let svd = |rank| CombinationType::Svd { rank };
        assert_eq!(CombinationType::Cat.rank(&[2, 3, 2]).unwrap(), 7);
        assert_eq!(svd(None).rank(&[2, 3, 2]).unwrap(), 3);
        assert_eq!(svd(Some(6)).rank(&[2, 3, 2]).unwrap(), 6);
        assert_eq!(TIES_SVD.rank(&[4, 3]).unwrap(), 4);
        for kind in [CombinationType::Linear, TIES, DARE_TIES] {
            assert_eq!(kind.rank(&[3, 3]).unwrap(), 3);
        }
        assert_eq!(
            TIES.rank(&[4, 3]).unwrap_err().to_string(),
            "combining adapters as `ties` needs adapters of one rank, found ranks 4, 3\n\
             hint: `cat` and `svd` take adapters of any ranks"
        );
        assert_eq!(
            CombinationType::Cat.rank(&[]).unwrap_err().to_string(),
            "invalid `adapters`: expected at least one adapter, found none"
        );
    }

    #[test]
    fn each_bad_value_is_named_with_its_range() {
        let message = |kind: CombinationType| kind.validate().unwrap_err().to_string();
        for (density, found) in [(0.0, "0"), (-0.5, "-0.5"), (1.5, "1.5"), (f64::NAN, "NaN")] {
            let expected = format!("invalid `density`: expected a number in (0, 1], found {found}");
            let majority_sign = MajoritySign::Total;
            for kind in [
                CombinationType::Ties { density, majority_sign },
                CombinationType::TiesSvd { density, majority_sign, rank: None },
                CombinationType::DareLinear { density },
                CombinationType::DareTies { density, majority_sign },
                CombinationType::MagnitudePrune { density },
            ] {
                assert_eq!(message(kind), expected);
            }
        }
        let rank = Some(0);
        let ties_svd = CombinationType::TiesSvd { density: 0.4, majority_sign: MajoritySign::Total, rank };
        for kind in [CombinationType::Svd { rank }, ties_svd] {
            assert_eq!(message(kind), "invalid `rank`: expected a positive integer, found 0");
        }
        for kind in [CombinationType::Cat, CombinationType::Linear, TIES, TIES_SVD, DARE_TIES] {
            assert!(kind.validate().is_ok());
        }
    }

    #[test]
    fn non_finite_numbers_are_refused_by_every_kind() {
        let kinds = [
            CombinationType::Cat,
            CombinationType::Linear,
            CombinationType::Svd { rank: None },
            TIES,
            TIES_SVD,
            CombinationType::MagnitudePrune { density: 0.4 },
        ];
        let mut bad_factor = adapters(&[2, 2]);
        bad_factor[1].b.values[3] = f64::INFINITY;
        let mut bad_weight = adapters(&[2, 2]);
        bad_weight[0].weight = f64::NAN;
        let mut overflow = adapters(&[2, 2]);
        for plain in &mut overflow {
            (plain.a, plain.b) = (plain.a.scale(1e30), plain.b.scale(1e30));
        }
        for kind in kinds {
            for adapters in [&bad_factor, &bad_weight] {
                let error = kind.combine(&sources(adapters), 2).unwrap_err();
                let expected = format!("combining adapters as `{kind}` gives non-finite numbers");
                assert!(error.to_string().starts_with(&expected), "{error}");
            }
        }
        for kind in [CombinationType::Svd { rank: None }, TIES_SVD] {
            assert!(kind.combine(&sources(&overflow), 2).is_err());
        }
    }

    #[test]
    fn kinds_have_the_names_of_peft() {
        let names =
            [CombinationType::Svd { rank: None }, TIES, TIES_SVD, DARE_TIES].map(|kind| kind.to_string());
        assert_eq!(names, ["svd", "ties", "ties_svd", "dare_ties"]);
    }
}
