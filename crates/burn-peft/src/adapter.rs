//! The adapters of a parameter: the state that rides on its `Param`.

use std::collections::BTreeSet;
use std::sync::Arc;

use burn::module::{Module, Param, Reparameterization};
use burn::tensor::{DType, Device, Int, Tensor};

use crate::lora::{LoraConfig, LowRank};
use crate::tensor::{cast, like, on_kind_of};

mod site;

pub(crate) use site::{LayerKind, Site};

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
    /// A fresh update of the parameter at `site`, which lives on `device`; a copy needs the value that it starts from,
    /// flattened and without a graph.
    pub(crate) fn init(
        config: &LoraConfig,
        change: Change,
        site: &Site,
        device: &Device,
        base: Option<&Tensor<1>>,
    ) -> Option<Self> {
        Some(match change {
            Change::LowRank { r, .. } => Self::LowRank(LowRank::init(config, r, site, device)),
            Change::Shift { .. } => {
                let elements: usize = site.shape.iter().product();
                Self::Shift(Param::from_tensor(Tensor::zeros([elements], (device, DType::F32))))
            }
            Change::Copy { shift } => {
                let base = base?.clone();
                let base = on_kind_of(base, device);
                let bias = shift.map(|_| Tensor::zeros(base.shape(), (device, DType::F32)));
                Self::Copy(Copied { copy: Param::from_tensor(base), bias: bias.map(Param::from_tensor) })
            }
        })
    }
}

/// What an adapter will do to a parameter; [`Update`] without tensors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Change {
    LowRank {
        r: usize,
        lora_alpha: f64,
    },
    /// With the scaling of the shift that is added to the copy, if there is one.
    Copy {
        shift: Option<f64>,
    },
    Shift {
        scaling: f64,
    },
}

/// A trained copy of a parameter, flattened: `[elements]`.
#[derive(Module, Debug)]
pub(crate) struct Copied {
    pub(crate) copy: Param<Tensor<1>>,
    /// Adds `scaling * bias` to the copy: of a trained bias, the `lora_bias` of a layer that works through its weight.
    pub(crate) bias: Option<Param<Tensor<1>>>,
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
                // A base in f32 gets its update in f32, so that merging in 16 bits rounds once.
                let dtype = if value.dtype() == DType::F32 { DType::F32 } else { factors.a.dtype() };
                let delta = factors.product(self.info.scaling, dtype);
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

/// Whether a state still counts, or waits for `materialize()` to remove it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum AttachedState {
    #[default]
    Attached,
    Dropped,
}

/// All adapters of one parameter, sorted by name, so that the order in which updates are summed depends on names alone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Adapters {
    pub(crate) list: Vec<Adapter>,
    /// While adapters are merged, what they make of the base.
    pub(crate) merged: Option<Merged>,
    /// For a batch whose rows name their adapters: 1 where a row names this one, `[batch]`.
    pub(crate) rows: Vec<(Arc<str>, Tensor<1>)>,
    pub(crate) attached: AttachedState,
}

/// The value that merged adapters make of a parameter, kept ready.
#[derive(Debug, Clone)]
pub(crate) struct Merged {
    /// Flattened, without a graph.
    pub(crate) value: Tensor<1>,
    /// The adapters that are in it. All of them are active.
    pub(crate) names: BTreeSet<Arc<str>>,
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

    /// The names and ranks of the adapters, for the `Display` of their layer.
    pub(crate) fn describe(&self) -> String {
        let describe = |adapter: &Adapter| {
            let rank =
                adapter.low_rank().map_or("copy".to_string(), |factors| format!("r {}", factors.rank()));
            let inactive = if adapter.info.active { "" } else { ", inactive" };
            format!("{} ({rank}{inactive})", adapter.info.name)
        };
        self.list.iter().map(describe).collect::<Vec<_>>().join(", ")
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Adapter> {
        self.list.iter().find(|adapter| &*adapter.info.name == name)
    }

    /// The same adapters for a batch whose row `i` is row `rows[i]` of the one that named them.
    pub(crate) fn select_rows(mut self, rows: &Tensor<1, Int>) -> Self {
        let rows = rows.clone().inner();
        for (_, mask) in &mut self.rows {
            let rows = rows.clone().to_device(&mask.device());
            *mask = mask.clone().select(0, rows);
        }
        self
    }

    /// Whether an adapter is part of the merged value.
    pub(crate) fn is_merged(&self, name: &str) -> bool {
        self.merged.as_ref().is_some_and(|merged| merged.names.contains(name))
    }

    /// The value that the active adapters of these names make of `base`, both flattened and without a graph, in f32 at
    /// least.
    pub(crate) fn effective(&self, base: Tensor<1>, names: &BTreeSet<Arc<str>>) -> Tensor<1> {
        let wide = if base.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let active = self.active().filter(|adapter| names.contains(&adapter.info.name));
        active.fold(cast(base, wide), |value, adapter| cast(adapter.valid().apply(value), wide))
    }

    /// The merged value, or `base` where nothing is merged.
    fn start<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        match &self.merged {
            Some(merged) => like(merged.value.clone().reshape(base.shape()), &base),
            None => base,
        }
    }

    /// What a layer that works on activations starts from: the merged weight, the active copy, or `base`.
    pub(crate) fn weight<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let outer = base.dtype();
        let copies = self.active().filter(|adapter| matches!(adapter.update, Update::Copy(_)));
        let copies = copies.filter(|adapter| !self.is_merged(&adapter.info.name));
        cast(copies.fold(self.start(base), |base, adapter| adapter.apply(base)), outer)
    }

    /// `output` plus what the adapters make of a linear layer's `input`.
    pub(crate) fn add_linear<const D: usize>(&self, input: Tensor<D>, output: Tensor<D>) -> Tensor<D> {
        self.at_work().fold(output, |output, at_work| {
            let AtWork { scaling, factors, rows, is_merged } = at_work;
            match (is_merged, &factors.bias) {
                (false, _) => output + factors.forward(input.clone(), scaling, rows),
                (true, Some(bias)) => {
                    // Merged adapters are not trained.
                    let bias = like(bias.val().inner().mul_scalar(scaling), &output);
                    output + bias.unsqueeze::<D>()
                }
                (true, None) => output,
            }
        })
    }

    /// `output` plus what the adapters make of an embedding's `ids`.
    pub(crate) fn add_embedding(&self, ids: Tensor<2, Int>, output: Tensor<3>) -> Tensor<3> {
        let beside = self.at_work().filter(|at_work| !at_work.is_merged);
        beside.fold(output, |output, AtWork { scaling, factors, rows, .. }| {
            let dtype = output.dtype();
            output + cast(factors.look_up(ids.clone(), scaling, rows), dtype)
        })
    }

    /// The factors that take part in the forward pass.
    fn at_work(&self) -> impl Iterator<Item = AtWork<'_>> {
        self.list.iter().filter_map(|adapter| {
            let info = &adapter.info;
            let rows = self.rows.iter().find(|(name, _)| *name == info.name).map(|(_, rows)| rows);
            if rows.is_none() && !info.active {
                return None;
            }
            let (scaling, is_merged) = (info.scaling, self.is_merged(&info.name));
            Some(AtWork { scaling, factors: adapter.low_rank()?, rows, is_merged })
        })
    }
}

/// Factors that take part in a forward pass.
struct AtWork<'a> {
    scaling: f64,
    factors: &'a LowRank,
    /// The rows of the batch that they are for, if not all.
    rows: Option<&'a Tensor<1>>,
    /// Whether the weight has their update already.
    is_merged: bool,
}

impl Reparameterization for Adapters {
    /// A path component of its own: Burn's built-in adapters are called `lora`.
    const NAME: &'static str = "peft";

    /// `base` with the updates of the active adapters, summed in the factors' type, returned in the base's.
    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        if self.attached == AttachedState::Dropped {
            return base;
        }
        let outer = base.dtype();
        let beside = self.active().filter(|adapter| !self.is_merged(&adapter.info.name));
        cast(beside.fold(self.start(base), |value, adapter| adapter.apply(value)), outer)
    }
}
