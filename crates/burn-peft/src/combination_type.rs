//! The ways to combine adapters.

use std::fmt;

/// How adapters are combined into one: the `combination_type` of PEFT's `add_weighted_adapter`, which
/// [`Display`](fmt::Display) prints.
///
/// Below, `Aᵢ` (`[d_in, rᵢ]`), `Bᵢ` (`[rᵢ, d_out]`) and `sᵢ` are the factors and the scaling of the `i`-th adapter at a
/// layer, whose update is `sᵢ Aᵢ Bᵢ`, and `wᵢ` is its weight, of any sign. The result is `A` (`[d_in, r]`) and `B`
/// (`[r, d_out]`) with a scaling of 1. One adapter alone is always combined as [`Linear`](Self::Linear):
/// `A B = w₁ s₁ A₁ B₁`. Adapters with DoRA, trained tokens or trained copies cannot be combined.
///
/// | | acts on | rank `r` |
/// |---|---|---|
/// | [`Cat`](Self::Cat) | the update, exactly | sum of the ranks |
/// | [`Svd`](Self::Svd) | the update, best approximation of rank `r` | chosen, or the greatest |
/// | [`TiesSvd`](Self::TiesSvd) | the update | chosen, or the greatest |
/// | the others | each factor by itself | that of every adapter, which must be the same |
///
/// # Kinds that act on each factor
/// They make `A` of all `Aᵢ` with weights `sign(wᵢ sᵢ) √|wᵢ sᵢ|`, and `B` of all `Bᵢ` with weights `√|wᵢ sᵢ|`. The
/// product then has cross terms besides the sum of the updates: for two adapters and [`Linear`](Self::Linear),
///
/// `A B = w₁ s₁ A₁ B₁ + w₂ s₂ A₂ B₂ + √|w₁ s₁ w₂ s₂| (±A₁ B₂ ± A₂ B₁)`
///
/// with the signs of `w₁ s₁` and `w₂ s₂`. That is PEFT's definition. Adapters trained apart have unrelated factors, and
/// the cross terms are noise; [`Cat`](Self::Cat) and [`Svd`](Self::Svd) have none.
///
/// # Pruning and elected signs
/// The `density` d is in `(0, 1]`. Pruning by magnitude keeps exactly the `⌊d n⌋` elements of greatest magnitude of a tensor
/// of `n`, and the first among equal ones. Random pruning keeps each element with probability `d` and multiplies it by
/// `1 / d`. A density of 1 prunes nothing.
///
/// Where signs are elected, each element has one sign for all adapters. It comes from the pruned tensors before they are
/// weighted (see [`MajoritySign`]). The result is the mean of the weighted elements that have this sign, or 0 if none has.
///
/// # Differences from PEFT
/// This is what PEFT 0.21.2 computes, with these exceptions.
/// - There, the result has the `use_rslora` of the first adapter. With rsLoRA its scaling is therefore `√r` instead of 1,
///   and the update is too large by this factor. Here the scaling is 1.
/// - There, a `rank` above the smaller dimension of a layer is an error or, for a square layer, gives factors of another
///   rank than the configuration's. Here they are padded with zeros.
/// - PEFT's `svd_clamp`, and its `dare_linear_svd`, `dare_ties_svd` and `magnitude_prune_svd`, are not available.
/// - There, biases of adapters (`lora_bias`) are ignored. Here the result has `Σ wᵢ sᵢ biasᵢ`.
///
/// # References
/// - [Editing Models with Task Arithmetic, Ilharco et al., 2022](https://arxiv.org/abs/2212.04089): weighted sums
/// - [TIES-Merging, Yadav et al., 2023](https://arxiv.org/abs/2306.01708): pruning by magnitude and elected signs
/// - [DARE, Yu et al., 2023](https://arxiv.org/abs/2311.03099): random pruning
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum CombinationType {
    /// The sum of the updates, exactly: `A = [w₁ s₁ A₁, w₂ s₂ A₂, ..]` side by side, `B = [B₁; B₂; ..]` one below the
    /// other. PEFT's `cat`.
    Cat,

    /// `A = Σ sign(wᵢ sᵢ) √|wᵢ sᵢ| Aᵢ`, `B = Σ √|wᵢ sᵢ| Bᵢ`. PEFT's `linear`.
    ///
    /// Not the sum of the updates: see [above](Self#kinds-that-act-on-each-factor).
    Linear,

    /// The matrix of rank `r` that is closest to the sum of the updates: with the singular value decomposition
    /// `Σ wᵢ sᵢ Aᵢ Bᵢ = U S Vᵀ`, `A` is the first `r` columns of `U` and `B` the first `r` rows of `S Vᵀ`. PEFT's `svd`
    /// and its default.
    ///
    /// The sum is never formed. The decompositions run on the host in time `O((d_in + d_out) R² + R³)` with `R` the sum
    /// of the ranks.
    Svd {
        /// `r`, at least 1. Default: the greatest rank among the adapters. PEFT's `svd_rank`.
        rank: Option<usize>,
    },

    /// TIES on each factor: pruned by magnitude, signs elected. PEFT's `ties`.
    Ties {
        /// The share of elements that is kept, in `(0, 1]`.
        density: f64,
        /// How signs are elected. PEFT's `majority_sign_method`.
        majority_sign: MajoritySign,
    },

    /// TIES on the updates `sᵢ Aᵢ Bᵢ` with weights `wᵢ`, then the closest matrix of rank `r` as for [`Svd`](Self::Svd).
    /// PEFT's `ties_svd`.
    ///
    /// The combined update is dense. Its singular value decomposition runs on one core of the host, in time
    /// `O(d_in d_out min(d_in, d_out))` for every layer: a second or less for dimensions of hundreds, tens of seconds
    /// for 2048 by 2048, and eight times as much for every doubling.
    TiesSvd {
        /// The share of elements that is kept, in `(0, 1]`.
        density: f64,
        /// How signs are elected. PEFT's `majority_sign_method`.
        majority_sign: MajoritySign,
        /// `r`, at least 1. Default: the greatest rank among the adapters. PEFT's `svd_rank`.
        rank: Option<usize>,
    },

    /// [`Linear`](Self::Linear) of randomly pruned factors. PEFT's `dare_linear`.
    ///
    /// Random numbers come from the device's generator (see `Device::seed`).
    DareLinear {
        /// The probability with which an element is kept, in `(0, 1]`.
        density: f64,
    },

    /// Randomly pruned factors, signs elected. PEFT's `dare_ties`.
    ///
    /// Random numbers come from the device's generator (see `Device::seed`).
    DareTies {
        /// The probability with which an element is kept, in `(0, 1]`.
        density: f64,
        /// How signs are elected. PEFT's `majority_sign_method`.
        majority_sign: MajoritySign,
    },

    /// [`Linear`](Self::Linear) of factors pruned by magnitude. PEFT's `magnitude_prune`.
    MagnitudePrune {
        /// The share of elements that is kept, in `(0, 1]`.
        density: f64,
    },
}

/// PEFT's name of the kind.
impl fmt::Display for CombinationType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cat => "cat",
            Self::Linear => "linear",
            Self::Svd { .. } => "svd",
            Self::Ties { .. } => "ties",
            Self::TiesSvd { .. } => "ties_svd",
            Self::DareLinear { .. } => "dare_linear",
            Self::DareTies { .. } => "dare_ties",
            Self::MagnitudePrune { .. } => "magnitude_prune",
        })
    }
}

/// How the sign of an element is elected over several tensors; a draw is positive. PEFT's `majority_sign_method`.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MajoritySign {
    /// The sign of the sum of the elements. PEFT's `"total"`.
    #[default]
    Total,
    /// The sign that more of the elements have. PEFT's `"frequency"`.
    Frequency,
}
