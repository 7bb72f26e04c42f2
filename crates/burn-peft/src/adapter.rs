//! The adapters of a parameter: the state that rides on its `Param`.

use std::sync::Arc;

use burn::module::{Module, Param, Reparameterization};
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::module::{embedding, linear};
use burn::tensor::{DType, Device, Distribution, Int, Tensor};

use crate::inject::{Change, Target};
use crate::lora::{InitLoraWeights, LoraConfig};
use crate::seam::AttachedState;

/// Which kind of layer a parameter belongs to; it decides what an adapter can do there and how PEFT stores it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LayerKind {
    /// `nn::Linear`, seen by its adapter in weight space.
    Linear,
    /// `LoraLinear`, seen by its adapter in activation space.
    LoraLinear,
    /// `nn::Embedding`, in weight space.
    Embedding,
    /// `LoraEmbedding`, in activation space.
    LoraEmbedding,
    /// `nn::conv::Conv1d`, `Conv2d`, `Conv3d`, in weight space.
    Conv,
    /// Anything else: no update of low rank, but a trained copy.
    Other,
}

impl LayerKind {
    pub(crate) fn is_linear(self) -> bool {
        matches!(self, Self::Linear | Self::LoraLinear)
    }

    pub(crate) fn is_embedding(self) -> bool {
        matches!(self, Self::Embedding | Self::LoraEmbedding)
    }

    /// Whether the layer shows its input to its adapters.
    pub(crate) fn in_activation_space(self) -> bool {
        matches!(self, Self::LoraLinear | Self::LoraEmbedding)
    }
}

/// A parameter that adapters can belong to.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Site {
    /// The module's path in the Burn model.
    pub(crate) module: String,
    /// The module's name in Hugging Face files.
    pub(crate) name: String,
    /// The parameter's own name there, `weight` or `bias` as a rule.
    pub(crate) parameter: String,
    pub(crate) kind: LayerKind,
    pub(crate) shape: Vec<usize>,
}

impl Site {
    /// The sizes `[d_in, d_out]` between which an update of low rank maps.
    ///
    /// A convolution's weight `[out, in, kernel..]` is seen as the matrix from `in * kernel..` to `out`.
    pub(crate) fn factor_dims(&self) -> [usize; 2] {
        match (self.kind, &self.shape[..]) {
            (LayerKind::Conv, [out, rest @ ..]) => [rest.iter().product(), *out],
            (_, [d_in, d_out]) => [*d_in, *d_out],
            _ => [0, 0],
        }
    }
}

/// What an adapter is besides its tensors.
#[derive(Debug, Clone)]
pub(crate) struct AdapterInfo {
    pub(crate) name: Arc<str>,
    pub(crate) config: Arc<LoraConfig>,
    pub(crate) site: Arc<Site>,
    pub(crate) active: bool,
    pub(crate) scaling: f64,
}

/// One adapter of one parameter.
#[derive(Module, Debug)]
pub(crate) struct Adapter {
    pub(crate) update: Update,
    #[module(skip)]
    pub(crate) info: AdapterInfo,
}

/// What an adapter does to a parameter.
#[derive(Module, Debug)]
pub(crate) enum Update {
    /// Adds `scaling * A B` to a weight.
    LowRank(LowRank),
    /// Takes the parameter's place: `modules_to_save`, and biases that are trained.
    Copy(Copied),
    /// Adds `scaling * shift` to a bias, `[d_out]`: the `lora_bias` of a layer that works through its weight.
    Shift(Param<Tensor<1>>),
}

impl Update {
    /// A fresh update for `target`; a copy needs the value that it starts from, flattened and without a graph.
    pub(crate) fn init(config: &LoraConfig, target: &Target, base: Option<&Tensor<1>>) -> Option<Self> {
        let device = &target.device;
        Some(match target.change {
            Change::LowRank { r, .. } => Self::LowRank(LowRank::init(config, r, &target.site, device)),
            Change::Shift { .. } => {
                let elements: usize = target.site.shape.iter().product();
                Self::Shift(Param::from_tensor(Tensor::zeros([elements], (device, DType::F32))))
            }
            Change::Copy { shift } => {
                let base = base?.clone();
                let base = if device.is_autodiff() { Tensor::from_inner(base) } else { base };
                let bias = shift.map(|_| Tensor::zeros(base.shape(), (device, DType::F32)));
                Self::Copy(Copied { copy: Param::from_tensor(base), bias: bias.map(Param::from_tensor) })
            }
        })
    }
}

/// A trained copy of a parameter, flattened: `[elements]`.
#[derive(Module, Debug)]
pub(crate) struct Copied {
    pub(crate) copy: Param<Tensor<1>>,
    /// Adds `scaling * bias` to the copy: of a trained bias, the `lora_bias` of a layer that works through its weight.
    pub(crate) bias: Option<Param<Tensor<1>>>,
}

/// The factors of an update, in Burn's layout, the transposes of PEFT's `lora_A.weight [r, d_in]` and
/// `lora_B.weight [d_out, r]`.
#[derive(Module, Debug)]
pub(crate) struct LowRank {
    /// `A`, `[d_in, r]`.
    pub(crate) a: Param<Tensor<2>>,
    /// `B`, `[r, d_out]`.
    pub(crate) b: Param<Tensor<2>>,
    /// `[d_out]`: PEFT's `lora_B.bias`, the `lora_bias` of a layer that works on activations.
    pub(crate) bias: Option<Param<Tensor<1>>>,
    pub(crate) dropout: Dropout,
}

impl LowRank {
    /// Fresh factors of rank `r` for a parameter that lives on `device`.
    ///
    /// They are f32 whatever the weight's type is, as PEFT's `autocast_adapter_dtype` has it.
    pub(crate) fn init(config: &LoraConfig, r: usize, site: &Site, device: &Device) -> Self {
        let [d_in, d_out] = site.factor_dims();
        let (a, b) = match config.init_lora_weights {
            InitLoraWeights::KaimingUniform | InitLoraWeights::Gaussian if site.kind.is_embedding() => {
                (Start::Zeros, Start::Normal(1.0))
            }
            InitLoraWeights::KaimingUniform => (Start::Uniform(1.0 / (d_in as f64).sqrt()), Start::Zeros),
            InitLoraWeights::Gaussian => (Start::Normal(1.0 / r as f64), Start::Zeros),
            InitLoraWeights::Random => {
                (Start::Uniform(1.0 / (d_in as f64).sqrt()), Start::Uniform(1.0 / (r as f64).sqrt()))
            }
        };
        let bias = (config.lora_bias && site.kind.in_activation_space())
            .then(|| Tensor::zeros([d_out], (device, DType::F32)));
        Self::new(a.tensor([d_in, r], device), b.tensor([r, d_out], device), bias, config.lora_dropout)
    }

    pub(crate) fn new(a: Tensor<2>, b: Tensor<2>, bias: Option<Tensor<1>>, dropout: f64) -> Self {
        Self {
            a: Param::from_tensor(a),
            b: Param::from_tensor(b),
            bias: bias.map(Param::from_tensor),
            dropout: DropoutConfig::new(dropout).init(),
        }
    }

    pub(crate) fn rank(&self) -> usize {
        self.a.lazy_shape()[1]
    }

    /// `scaling * A B`, `[d_in, d_out]`, in the factors' type.
    fn product(&self, scaling: f64) -> Tensor<2> {
        self.a.val().mul_scalar(scaling).matmul(self.b.val())
    }

    /// `scaling * (dropout(x) A) B + scaling * bias`, `[.., d_in]` to `[.., d_out]`, in the type of `x`. With `rows`,
    /// only for the rows of the batch, the first axis, where it is 1.
    ///
    /// The scaling meets the smallest tensor on the way, `x A`, and takes dropout's `1 / (1 - p)` along.
    fn forward<const D: usize>(&self, x: Tensor<D>, scaling: f64, rows: Option<&Tensor<1>>) -> Tensor<D> {
        let outer = x.dtype();
        let x = cast(x, self.a.dtype());
        let (x, factor) = if self.drops(&x) {
            (zero_some(x, self.dropout.prob), scaling / (1.0 - self.dropout.prob))
        } else {
            (x, scaling)
        };
        let hidden = linear(x, self.a.val(), None).mul_scalar(factor);
        cast(self.expand(hidden, scaling, rows), outer)
    }

    /// `scaling * A[ids] B`, `[batch, sequence]` to `[batch, sequence, d_out]`: the rows of `A` that are asked for, never
    /// the dense table.
    fn look_up(&self, ids: Tensor<2, Int>, scaling: f64, rows: Option<&Tensor<1>>) -> Tensor<3> {
        self.expand(embedding(self.a.val(), ids).mul_scalar(scaling), scaling, rows)
    }

    /// `hidden B + scaling * bias` where `rows` allows it.
    fn expand<const D: usize>(&self, hidden: Tensor<D>, scaling: f64, rows: Option<&Tensor<1>>) -> Tensor<D> {
        let mask = rows.map(|rows| {
            let (batch, asked) = (hidden.shape()[0], rows.shape()[0]);
            assert!(batch == asked, "the batch has {batch} rows, adapters were named for {asked}");
            let mut shape = [1; D];
            shape[0] = batch;
            like(rows.clone().reshape(shape), &hidden)
        });
        let hidden = match &mask {
            Some(mask) => hidden * mask.clone(),
            None => hidden,
        };
        let output = linear(hidden, self.b.val(), None);
        let Some(bias) = &self.bias else { return output };
        let bias = bias.val().mul_scalar(scaling).unsqueeze::<D>();
        match mask {
            Some(mask) => output + bias * mask,
            None => output + bias,
        }
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

impl Adapter {
    /// An inactive adapter.
    pub(crate) fn new(update: Update, info: AdapterInfo) -> Self {
        Self { update, info }.set_active(false)
    }

    /// Active adapters take part in the forward pass and are trained; the others do neither.
    pub(crate) fn set_active(mut self, active: bool) -> Self {
        self.info.active = active;
        self.set_require_grad(active)
    }

    pub(crate) fn low_rank(&self) -> Option<&LowRank> {
        match &self.update {
            Update::LowRank(factors) => Some(factors),
            _ => None,
        }
    }

    /// How many parameters it has.
    pub(crate) fn num_elements(&self) -> usize {
        match &self.update {
            Update::LowRank(factors) => {
                let bias = factors.bias.as_ref().map_or(0, |bias| bias.lazy_shape().num_elements());
                factors.a.lazy_shape().num_elements() + factors.b.lazy_shape().num_elements() + bias
            }
            Update::Copy(Copied { copy, bias }) => {
                let bias = bias.as_ref().map_or(0, |bias| bias.lazy_shape().num_elements());
                copy.lazy_shape().num_elements() + bias
            }
            Update::Shift(param) => param.lazy_shape().num_elements(),
        }
    }

    /// `value` with this adapter's update.
    fn apply<const D: usize>(&self, value: Tensor<D>) -> Tensor<D> {
        let add = |value: Tensor<D>, delta: Tensor<D>| cast(value, delta.dtype()) + delta;
        let shape = value.shape();
        let shifted = |value: Tensor<D>, bias: &Param<Tensor<1>>| {
            let shape = value.shape();
            add(value, bias.val().mul_scalar(self.info.scaling).reshape(shape))
        };
        match &self.update {
            Update::LowRank(factors) => {
                let delta = factors.product(self.info.scaling);
                let delta = if self.info.site.kind == LayerKind::Conv { delta.transpose() } else { delta };
                add(value, delta.reshape(shape))
            }
            Update::Copy(Copied { copy, bias }) => {
                let copy = copy.val().reshape(shape);
                match bias {
                    Some(bias) => shifted(copy, bias),
                    None => copy,
                }
            }
            Update::Shift(bias) => shifted(value, bias),
        }
    }
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
    fn tensor(&self, shape: [usize; 2], device: &Device) -> Tensor<2> {
        let options = (device, DType::F32);
        match *self {
            Self::Zeros => Tensor::zeros(shape, options),
            Self::Uniform(bound) => Tensor::random(shape, Distribution::Uniform(-bound, bound), options),
            Self::Normal(std) => Tensor::random(shape, Distribution::Normal(0.0, std), options),
        }
    }
}

/// All adapters of one parameter, sorted by name: the order in which updates are summed hangs on nothing else.
#[derive(Debug, Clone, Default)]
pub(crate) struct Adapters {
    pub(crate) list: Vec<Adapter>,
    /// The value that the active adapters make of the base, kept ready while they are merged. Flattened, without a
    /// graph.
    pub(crate) merged: Option<Tensor<1>>,
    /// For a batch whose rows name their adapters: 1 where a row names this one, `[batch]`.
    pub(crate) rows: Vec<(Arc<str>, Tensor<1>)>,
    pub(crate) attached: AttachedState,
}

impl Adapters {
    pub(crate) fn insert(&mut self, adapter: Adapter) {
        let at = self.list.partition_point(|other| other.info.name < adapter.info.name);
        self.list.insert(at, adapter);
    }

    /// The active adapters in the order in which they are applied: a copy, which takes the parameter's place, before the
    /// updates that are added to it.
    pub(crate) fn active(&self) -> impl Iterator<Item = &Adapter> {
        let active = |are_copies: bool| {
            self.list.iter().filter(move |adapter| {
                adapter.info.active && matches!(adapter.update, Update::Copy(_)) == are_copies
            })
        };
        active(true).chain(active(false))
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Adapter> {
        self.list.iter().find(|adapter| &*adapter.info.name == name)
    }

    /// The value that the active adapters make of `base`, both flattened and without a graph, in the widest type
    /// involved.
    pub(crate) fn effective(&self, base: Tensor<1>) -> Tensor<1> {
        self.active().fold(base, |value, adapter| adapter.valid().apply(value))
    }

    /// What a layer that works on activations starts from: the merged weight, the active copy, or `base`.
    pub(crate) fn weight<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        if let Some(merged) = &self.merged {
            return like(merged.clone().reshape(base.shape()), &base);
        }
        let copies = self.active().filter(|adapter| matches!(adapter.update, Update::Copy(_)));
        let outer = base.dtype();
        cast(copies.fold(base, |base, adapter| adapter.apply(base)), outer)
    }

    /// `output` plus what the adapters make of a linear layer's `input`.
    pub(crate) fn add_linear<const D: usize>(&self, input: Tensor<D>, output: Tensor<D>) -> Tensor<D> {
        self.at_work().fold(output, |output, (scaling, factors, rows)| match (&self.merged, &factors.bias) {
            (None, _) => output + factors.forward(input.clone(), scaling, rows),
            (Some(_), Some(bias)) => {
                let bias = cast(bias.val().mul_scalar(scaling), output.dtype());
                output + bias.unsqueeze::<D>()
            }
            (Some(_), None) => output,
        })
    }

    /// `output` plus what the adapters make of an embedding's `ids`.
    pub(crate) fn add_embedding(&self, ids: Tensor<2, Int>, output: Tensor<3>) -> Tensor<3> {
        if self.merged.is_some() {
            return output;
        }
        self.at_work().fold(output, |output, (scaling, factors, rows)| {
            let dtype = output.dtype();
            output + cast(factors.look_up(ids.clone(), scaling, rows), dtype)
        })
    }

    /// The factors that take part in the forward pass, each with its scaling and the rows that it is for.
    fn at_work(&self) -> impl Iterator<Item = (f64, &LowRank, Option<&Tensor<1>>)> {
        self.list.iter().filter_map(|adapter| {
            let info = &adapter.info;
            let rows = self.rows.iter().find(|(name, _)| *name == info.name).map(|(_, rows)| rows);
            if rows.is_none() && !info.active {
                return None;
            }
            Some((info.scaling, adapter.low_rank()?, rows))
        })
    }
}

impl Reparameterization for Adapters {
    /// A path component of its own: Burn's built-in adapters are called `lora`.
    const NAME: &'static str = "peft";

    /// `base` with the updates of the active adapters, summed in the factors' type, returned in the base's.
    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        if self.attached == AttachedState::Dropped {
            return base;
        }
        if self.merged.is_some() {
            return self.weight(base);
        }
        let outer = base.dtype();
        cast(self.active().fold(base, |value, adapter| adapter.apply(value)), outer)
    }
}

/// `tensor`, which has no graph, on the kind of device that `other` is on.
fn like<const D: usize, const E: usize>(tensor: Tensor<D>, other: &Tensor<E>) -> Tensor<D> {
    let tensor = cast(tensor, other.dtype());
    if other.is_autodiff() && !tensor.is_autodiff() { Tensor::from_inner(tensor) } else { tensor }
}

/// `Tensor::cast` that costs nothing when there is nothing to do, and leaves quantized tensors to the operation that
/// reads them.
pub(crate) fn cast<const D: usize>(tensor: Tensor<D>, dtype: DType) -> Tensor<D> {
    if tensor.dtype() == dtype || !tensor.dtype().is_float() || !dtype.is_float() {
        tensor
    } else {
        tensor.cast(dtype)
    }
}
