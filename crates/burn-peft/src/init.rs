//! How the factors of an update of low rank start: a file for each way, the list of them, and PEFT's words.

mod gaussian;
mod kaiming_uniform;
mod olora;
mod orthogonal;
mod pissa;
mod random;

use std::fmt;

use burn::tensor::{DType, Device, Distribution, Tensor};
use burn_peft_ops::cast;
use serde_json::Value;

use crate::error::PeftError;
use crate::layer::{Layer, Site};
use crate::tensor::is_finite;

/// Where the tensors of a method start.
pub(crate) struct Start<'a> {
    pub(crate) site: &'a Site,
    /// Where the parameter lives, without autodiff.
    pub(crate) device: Device,
    /// The base, flattened and without a graph.
    pub(crate) value: &'a dyn Fn() -> Tensor<1>,
}

impl Start<'_> {
    /// The base as a matrix of [`Site::dims`].
    pub(crate) fn base(&self) -> Tensor<2> {
        self.site.to_matrix((self.value)())
    }

    /// The same in f32.
    pub(crate) fn matrix(&self) -> Tensor<2> {
        cast(self.base(), DType::F32)
    }
}

/// How the factors `A` (`[d_in, r]`) and `B` (`[r, d_out]`) start. PEFT's `init_lora_weights`.
///
/// An embedding has one start of its own: `A` (`[vocabulary, r]`) is zero and `B` is drawn from `N(0, 1)`. Only
/// [`Random`](Self::Random) is the same for all layers.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum InitLoraWeights {
    /// `A ~ U(-1/sqrt(d_in), 1/sqrt(d_in))`, `B = 0`: PEFT's `true`, Kaiming-uniform with `a = sqrt(5)`.
    #[default]
    KaimingUniform,
    /// `A ~ N(0, 1/r²)`, standard deviation `1/r`, `B = 0`: PEFT's `"gaussian"`.
    Gaussian,
    /// `A ~ U(±1/sqrt(d_in))`, `B ~ U(±1/sqrt(r))`: PEFT's `false`. The fresh adapter is not a no-op; for tests.
    Random,
    /// `A = N Q₁ / 10`, `B = Q₂ᵀ N' / 10` with `N` and `N'` drawn from `N(0, 1)` and the rows of `Q₁` and `Q₂` (`r / 2` each)
    /// orthogonal to each other: neither factor is zero, and `A B` is. Needs an even rank; not for convolutions. PEFT's
    /// `"orthogonal"`.
    Orthogonal,
    /// Factors from a QR decomposition of the weight: with `Wᵀ = Q R`, `Bᵀ` is the first `r` columns of `Q` and `Aᵀ` the
    /// first `r` rows of `R`. Not for convolutions. PEFT's `"olora"`
    /// ([OLoRA, Büyükakyüz, 2024](https://arxiv.org/abs/2406.01775)).
    ///
    /// The start is a part of the weight, and `A B` acts beside the rest, `W - scaling A₀ B₀`. PEFT subtracts this part from
    /// the base. Here the base stays as it is, and `A₀` and `B₀` are kept beside it. The adapter is saved like one that PEFT
    /// has converted: as plain LoRA of twice the rank.
    Olora,
    /// The `r` leading singular triplets of the weight: with `W = U S Vᵀ`, `A = U_r sqrt(S_r / scaling)` and
    /// `B = sqrt(S_r / scaling) V_rᵀ`. Not for convolutions. PEFT's `"pissa"`
    /// ([PiSSA, Meng et al., 2024](https://arxiv.org/abs/2404.02948)).
    ///
    /// As with [`Olora`](Self::Olora), the start is a part of the weight, and the base stays as it is.
    Pissa,
    /// As [`Pissa`](Self::Pissa), from this many rounds of a randomised decomposition: faster, and only close to the leading
    /// triplets. PEFT's `"pissa_niter_[number]"`. An adapter that was saved in PEFT without conversion cannot be loaded,
    /// since its start cannot be computed again.
    PissaNiter(usize),
    /// A start that is not computed here, by PEFT's word for it: `eva`, `loftq` or `mica`. A trained adapter loads, because
    /// it no longer depends on its start. A new adapter cannot have it.
    Elsewhere(&'static str),
}

/// Starts with a word of their own. The last ones choose factors by rules that need data, and leave the base as it is.
const NAMED: &[InitLoraWeights] = &[
    InitLoraWeights::Gaussian,
    InitLoraWeights::Orthogonal,
    InitLoraWeights::Olora,
    InitLoraWeights::Pissa,
    InitLoraWeights::Elsewhere("eva"),
    InitLoraWeights::Elsewhere("loftq"),
    InitLoraWeights::Elsewhere("mica"),
];

/// Words of starts that take a part out of the base by rules that need data.
const NEED_DATA: &[&str] = &["corda", "lora_ga"];

const NITER: &str = "pissa_niter_";

/// What can be done about an adapter whose start cannot be computed again.
const CHANGED_BASE_HINT: &str = "its training changed the base model too; save it in PEFT with `path_initial_model_for_weight_conversion`, or merge it there and load the merged model";

/// PEFT's word, `true` for the default.
impl fmt::Display for InitLoraWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.to_json() {
            Value::String(word) => f.write_str(&word),
            value => write!(f, "{value}"),
        }
    }
}

impl InitLoraWeights {
    /// PEFT's word.
    pub(crate) fn to_json(self) -> Value {
        match self {
            Self::KaimingUniform => Value::Bool(true),
            Self::Random => Value::Bool(false),
            Self::Gaussian => "gaussian".into(),
            Self::Orthogonal => "orthogonal".into(),
            Self::Olora => "olora".into(),
            Self::Pissa => "pissa".into(),
            Self::PissaNiter(rounds) => format!("{NITER}{rounds}").into(),
            Self::Elsewhere(word) => word.into(),
        }
    }

    /// The start that PEFT's word means, or what can be done about it.
    pub(crate) fn from_json(value: &Value) -> Result<Self, &'static str> {
        const UNKNOWN: &str = "PEFT has no such start; if the adapter is trained, set it to `true`";
        match value {
            Value::Bool(true) => Ok(Self::KaimingUniform),
            Value::Bool(false) => Ok(Self::Random),
            Value::String(word) => {
                let word = word.to_ascii_lowercase();
                if NEED_DATA.contains(&&*word) {
                    return Err(CHANGED_BASE_HINT);
                }
                let rounds = word.strip_prefix(NITER).and_then(|rounds| rounds.parse().ok());
                let known = NAMED.iter().copied().find(|start| start.to_json() == *word);
                rounds.map(Self::PissaNiter).or(known).ok_or(UNKNOWN)
            }
            _ => Err(UNKNOWN),
        }
    }

    /// What keeps an adapter that is read from a file with this start from being the one that was saved: PEFT computes the
    /// start anew, and this one comes out differently each time.
    pub(crate) fn unreadable(self) -> Option<&'static str> {
        matches!(self, Self::PissaNiter(_)).then_some(CHANGED_BASE_HINT)
    }

    /// Whether the start is a part of the base, to be taken off again.
    pub(crate) fn is_part_of_base(self) -> bool {
        matches!(self, Self::Olora | Self::Pissa | Self::PissaNiter(_))
    }

    /// The start at a layer of this kind: an embedding has its own, whatever the word.
    pub(crate) fn at(self, layer: Layer) -> Self {
        if layer == Layer::Embedding && self != Self::Random { Self::KaimingUniform } else { self }
    }

    /// Whether it is defined for convolutions.
    pub(crate) fn allows_convolutions(self) -> bool {
        matches!(self, Self::KaimingUniform | Self::Gaussian | Self::Random | Self::Elsewhere(_))
    }

    /// `A`, `[d_in, r]`, and `B`, `[r, d_out]`, in f32 and without a graph.
    ///
    /// # Errors
    /// [`PeftError::InvalidConfig`] for a rank that the start cannot have.
    pub(crate) fn factors(
        self,
        at: &Start,
        r: usize,
        scaling: f64,
    ) -> Result<(Tensor<2>, Tensor<2>), PeftError> {
        Ok(match self {
            Self::KaimingUniform | Self::Elsewhere(_) => kaiming_uniform::factors(at, r),
            Self::Gaussian => gaussian::factors(at, r),
            Self::Random => random::factors(at, r),
            Self::Orthogonal => orthogonal::factors(at, r)?,
            Self::Olora => olora::factors(at, r)?,
            Self::Pissa => pissa::factors(at, r, scaling, None)?,
            Self::PissaNiter(rounds) => pissa::factors(at, r, scaling, Some(rounds))?,
        })
    }
}

/// `U(-bound, bound)`
fn uniform(at: &Start, shape: [usize; 2], bound: f64) -> Tensor<2> {
    Tensor::random(shape, Distribution::Uniform(-bound, bound), (&at.device, DType::F32))
}

/// `N(0, std²)`
fn normal(at: &Start, shape: [usize; 2], std: f64) -> Tensor<2> {
    Tensor::random(shape, Distribution::Normal(0.0, std), (&at.device, DType::F32))
}

fn zeros(at: &Start, shape: [usize; 2]) -> Tensor<2> {
    Tensor::zeros(shape, (&at.device, DType::F32))
}

/// # Errors
/// [`PeftError::InvalidConfig`] if a rank is greater than the smaller side of a weight that the start is taken from.
fn check_rank(at: &Start, r: usize) -> Result<(), PeftError> {
    let smaller = at.site.dims().into_iter().min().unwrap_or(0);
    if r <= smaller {
        return Ok(());
    }
    let expected = "at most the smaller dimension of every layer for a start from the weight";
    let found = format!("{r} for `{}`, whose smaller dimension is {smaller}", at.site.name);
    Err(PeftError::invalid("r", expected, found))
}

/// The weight that a start is taken from: decompositions do not end on infinities and NaNs.
///
/// # Errors
/// [`PeftError::NonFiniteWeight`].
fn finite(at: &Start) -> Result<Tensor<2>, PeftError> {
    let w = at.matrix();
    if is_finite(&w) {
        Ok(w)
    } else {
        Err(PeftError::NonFiniteWeight { modules: vec![at.site.name.clone()] })
    }
}
