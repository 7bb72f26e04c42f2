//! The adapters of a weight: the state that rides on its `Param`.

use std::sync::Arc;

use burn::module::{Module, Param, Reparameterization};
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::module::linear;
use burn::tensor::{DType, Distribution, Tensor};

use crate::lora::{InitLoraWeights, LoraConfig};
use crate::seam::AttachedState;

/// Which kind of layer a weight belongs to; it decides how the factors start and what PEFT calls them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LayerKind {
    /// `nn::Linear`, seen by its adapter in weight space.
    Linear,
    /// `LoraLinear`, seen by its adapter in activation space.
    LoraLinear,
    /// `nn::Embedding`, in weight space.
    Embedding,
}

impl LayerKind {
    pub(crate) fn is_linear(self) -> bool {
        self != Self::Embedding
    }
}

/// What an adapter is besides its tensors.
#[derive(Debug, Clone)]
pub(crate) struct AdapterInfo {
    pub(crate) name: Arc<str>,
    pub(crate) kind: LayerKind,
    pub(crate) active: bool,
    pub(crate) scaling: f64,
    pub(crate) config: Arc<LoraConfig>,
}

/// One adapter of one weight: the update `scaling * A B`.
///
/// The factors are kept in Burn's layout, the transposes of PEFT's `lora_A.weight [r, d_in]` and
/// `lora_B.weight [d_out, r]`.
#[derive(Module, Debug)]
pub(crate) struct Adapter {
    /// `A`, `[d_in, r]`.
    pub(crate) a: Param<Tensor<2>>,
    /// `B`, `[r, d_out]`.
    pub(crate) b: Param<Tensor<2>>,
    pub(crate) dropout: Dropout,
    #[module(skip)]
    pub(crate) info: AdapterInfo,
}

impl Adapter {
    /// A fresh adapter for a weight of shape `[d_in, d_out]` whose parameter lives on `device`.
    ///
    /// The factors are f32 whatever the weight's type is, as PEFT's `autocast_adapter_dtype` has it.
    pub(crate) fn init(
        name: Arc<str>,
        config: Arc<LoraConfig>,
        kind: LayerKind,
        [d_in, d_out]: [usize; 2],
        device: &burn::tensor::Device,
    ) -> Self {
        let r = config.r;
        let (a, b) = match (kind, config.init_lora_weights) {
            (LayerKind::Embedding, InitLoraWeights::KaimingUniform | InitLoraWeights::Gaussian) => {
                (Start::Zeros, Start::Normal(1.0))
            }
            (_, InitLoraWeights::KaimingUniform) => {
                (Start::Uniform(1.0 / (d_in as f64).sqrt()), Start::Zeros)
            }
            (_, InitLoraWeights::Gaussian) => (Start::Normal(1.0 / r as f64), Start::Zeros),
            (_, InitLoraWeights::Random) => {
                (Start::Uniform(1.0 / (d_in as f64).sqrt()), Start::Uniform(1.0 / (r as f64).sqrt()))
            }
        };
        Self::new(name, config, kind, a.tensor([d_in, r], device), b.tensor([r, d_out], device))
    }

    /// An inactive adapter with the given factors.
    pub(crate) fn new(
        name: Arc<str>,
        config: Arc<LoraConfig>,
        kind: LayerKind,
        a: Tensor<2>,
        b: Tensor<2>,
    ) -> Self {
        let adapter = Self {
            a: Param::from_tensor(a),
            b: Param::from_tensor(b),
            dropout: DropoutConfig::new(config.lora_dropout).init(),
            info: AdapterInfo { name, kind, active: false, scaling: config.scaling(), config },
        };
        adapter.set_active(false)
    }

    /// Active adapters take part in the forward pass and are trained; the others do neither.
    pub(crate) fn set_active(mut self, active: bool) -> Self {
        self.info.active = active;
        self.set_require_grad(active)
    }

    /// `scaling * A B`, `[d_in, d_out]`, in the factors' type.
    pub(crate) fn delta_weight(&self) -> Tensor<2> {
        self.a.val().mul_scalar(self.info.scaling).matmul(self.b.val())
    }

    /// `scaling * (dropout(x) A) B`, `[.., d_in]` to `[.., d_out]`, in the type of `x`.
    ///
    /// The scaling meets the smallest tensor on the way, `x A`, and takes dropout's `1 / (1 - p)` along.
    pub(crate) fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let outer = x.dtype();
        let x = cast(x, self.a.dtype());
        let (x, scaling) = if self.drops(&x) {
            (zero_some(x, self.dropout.prob), self.info.scaling / (1.0 - self.dropout.prob))
        } else {
            (x, self.info.scaling)
        };
        let hidden = linear(x, self.a.val(), None).mul_scalar(scaling);
        cast(linear(hidden, self.b.val(), None), outer)
    }

    /// Whether dropout acts, by the rules of `nn::Dropout`: while training, on a layer that was not frozen.
    fn drops<const D: usize>(&self, x: &Tensor<D>) -> bool {
        self.dropout.prob > 0.0 && self.dropout.training.is_enabled() && x.device().is_autodiff()
    }
}

/// Each element with probability `prob` replaced by 0.
///
/// `nn::Dropout` draws Bernoulli numbers, which cost Burn's CPU backend twice the time of uniform ones, and multiplies
/// twice, forward and backward.
fn zero_some<const D: usize>(x: Tensor<D>, prob: f64) -> Tensor<D> {
    let uniform = Tensor::<D>::random(x.shape(), Distribution::Default, (&x.device(), DType::F32));
    x.mask_fill(uniform.lower_elem(prob), 0.0)
}

/// A distribution that a factor starts from.
enum Start {
    Zeros,
    /// `U(-bound, bound)`.
    Uniform(f64),
    /// `N(0, std²)`.
    Normal(f64),
}

impl Start {
    fn tensor(&self, shape: [usize; 2], device: &burn::tensor::Device) -> Tensor<2> {
        let options = (device, DType::F32);
        match *self {
            Self::Zeros => Tensor::zeros(shape, options),
            Self::Uniform(bound) => Tensor::random(shape, Distribution::Uniform(-bound, bound), options),
            Self::Normal(std) => Tensor::random(shape, Distribution::Normal(0.0, std), options),
        }
    }
}

/// All adapters of one weight, in the order in which they were added.
#[derive(Debug, Clone, Default)]
pub(crate) struct Adapters {
    pub(crate) list: Vec<Adapter>,
    pub(crate) attached: AttachedState,
}

impl Adapters {
    pub(crate) fn active(&self) -> impl Iterator<Item = &Adapter> {
        self.list.iter().filter(|adapter| adapter.info.active)
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Adapter> {
        self.list.iter().find(|adapter| &*adapter.info.name == name)
    }
}

impl Reparameterization for Adapters {
    /// A path component of its own: Burn's built-in adapters are called `lora`.
    const NAME: &'static str = "peft";

    /// `base + Σ scaling * A B` over the active adapters, summed in the factors' type, returned in the base's.
    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        if self.attached == AttachedState::Dropped {
            return base;
        }
        let outer = base.dtype();
        let sum = self.active().fold(base, |weight, adapter| {
            let delta = adapter.delta_weight().reshape(weight.shape());
            cast(weight, delta.dtype()) + delta
        });
        cast(sum, outer)
    }
}

impl Adapters {
    /// The weight that the active adapters make of `base`, computed without a graph.
    pub(crate) fn effective<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let base = if base.is_autodiff() { base.inner() } else { base };
        self.valid().apply(base)
    }
}

/// `Tensor::cast` that costs nothing when there is nothing to do, and leaves quantized tensors to the operation that
/// reads them.
fn cast<const D: usize>(tensor: Tensor<D>, dtype: DType) -> Tensor<D> {
    if tensor.dtype() == dtype || !tensor.dtype().is_float() || !dtype.is_float() {
        tensor
    } else {
        tensor.cast(dtype)
    }
}
