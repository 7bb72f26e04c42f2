//! The adapters of a parameter: the state that rides on its `Param`.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Arc;

use burn::module::{Module, Param, Reparameterization};
use burn::tensor::module::embedding;
use burn::tensor::{DType, Int, Tensor};
use burn_peft_ops::{activation_dtype, cast, linear};

use crate::config::PeftConfig;
use crate::layer::Site;
use crate::method::{Pass, Update};
use crate::ops::Input;
use crate::tensor::like;

/// What an adapter is besides its updates.
#[derive(Debug, Clone)]
pub(crate) struct AdapterInfo {
    pub(crate) name: Arc<str>,
    pub(crate) config: Arc<PeftConfig>,
    pub(crate) site: Arc<Site>,
    /// Whether the parameter is the weight of a module that is a target.
    pub(crate) is_target: bool,
    pub(crate) active: bool,
    /// The factor of [`set_scale`](crate::PeftModel::set_scale).
    pub(crate) scale: f64,
}

/// One adapter of one parameter.
#[derive(Module, Debug)]
pub(crate) struct Adapter {
    /// At least one, in the order in which they act.
    pub(crate) updates: Vec<Update>,
    #[module(skip)]
    pub(crate) info: AdapterInfo,
}

impl Adapter {
    /// Active adapters take part in the forward pass and are trained; the others do neither.
    pub(crate) fn set_active(mut self, active: bool) -> Self {
        self.info.active = active;
        self.set_trained(active)
    }

    fn set_trained(mut self, trained: bool) -> Self {
        let train = |update: Update| {
            update.map_parts(|spec, tensor| tensor.set_require_grad(trained && spec.is_trained))
        };
        self.updates = self.updates.into_iter().map(train).collect();
        self
    }

    /// How many parameters it has.
    pub(crate) fn num_params(&self) -> usize {
        self.updates.iter().map(Update::num_params).sum()
    }

    /// Whether it takes the parameter's place.
    pub(crate) fn replaces(&self) -> bool {
        self.updates.iter().any(|update| update.method.replaces())
    }

    /// The rank, if one of its methods has one.
    pub(crate) fn rank(&self) -> Option<usize> {
        self.updates.iter().find_map(|update| update.method.rank())
    }

    /// What it adds to the output of a layer that works on activations whatever the input is, `[1, d_out]`; `bias` is the
    /// layer's own.
    pub(crate) fn constant(&self, bias: Option<&Tensor<1>>) -> Option<Tensor<2>> {
        let constants = self.updates.iter().filter_map(|update| update.method.constant(update, bias));
        constants.reduce(|sum, next| sum + next)
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

/// A weight as a layer that works on activations needs it.
struct Weight {
    /// What the layer multiplies with: the merged weight, or `base`.
    start: Tensor<2>,
    /// The base, or the active copy in its place.
    base: Tensor<2>,
}

/// How an adapter takes part in a forward pass.
#[derive(Clone, Copy)]
struct Acting {
    /// Its change of the weight is in the merged weight already.
    is_merged: bool,
    /// Only some rows of the batch name it.
    is_for_some_rows: bool,
}

impl Acting {
    /// The update as this forward pass has it: merged adapters are not trained.
    fn seen(self, update: &Update) -> Cow<'_, Update> {
        match self.is_merged {
            true => Cow::Owned(update.clone().map_parts(|_, tensor| tensor.set_require_grad(false))),
            false => Cow::Borrowed(update),
        }
    }
}

impl Adapters {
    /// The adapters of the parameter `param`, if it has any.
    pub(crate) fn of<const D: usize>(param: &Param<Tensor<D>>) -> Option<&Self> {
        param.reparameterization::<Self>()
    }

    pub(crate) fn insert(&mut self, adapter: Adapter) {
        let at = self.list.partition_point(|other| other.info.name < adapter.info.name);
        self.list.insert(at, adapter);
    }

    pub(crate) fn active(&self) -> impl Iterator<Item = &Adapter> {
        self.list.iter().filter(|adapter| adapter.info.active)
    }

    /// The names and ranks of the adapters, for the `Display` of their layer.
    pub(crate) fn describe(&self) -> String {
        let describe = |adapter: &Adapter| {
            let names: Vec<&str> =
                adapter.updates.iter().flat_map(Update::parts).map(|(spec, _)| spec.name).collect();
            let rank = adapter.rank().map_or_else(|| names.join(" and "), |rank| format!("r {rank}"));
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
        let [first, ..] = &self.list[..] else { return base };
        let (site, elements) = (&first.info.site, base.dims());
        let wide = if base.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let active: Vec<Adapter> = self
            .active()
            .filter(|adapter| names.contains(&adapter.info.name))
            .map(|adapter| adapter.valid())
            .collect();
        let base = cast(site.to_matrix(base), wide);
        let base = with_copies(base, active.iter());
        site.to_parameter(with_changes(base.clone(), &base, active.iter()), elements)
    }

    /// The weight that the layer multiplies with, and the one that methods compare it with.
    fn weight(&self, base: Tensor<2>) -> Weight {
        let outer = base.dtype();
        let base = cast(with_copies(base, self.active()), outer);
        let start = match &self.merged {
            Some(merged) => like(merged.value.clone().reshape(base.shape()), &base),
            None => base.clone(),
        };
        Weight { start, base }
    }

    /// `x W + b + Σ` what the adapters add, `[.., d_in]` to `[.., d_out]`: the forward pass of a linear layer that works on
    /// activations.
    pub(crate) fn linear<const D: usize>(
        &self,
        weight: &Param<Tensor<2>>,
        bias: Option<Tensor<1>>,
        x: Tensor<D>,
    ) -> Tensor<D> {
        let weight = self.weight(weight.base());
        let bias = bias.map(|bias| cast(bias, x.dtype()));
        let d_in = x.shape()[D - 1];
        let n = x.shape().num_elements() / d_in.max(1);
        let rows = x.clone().reshape([n, d_in]);
        let change = self.sum(&x, |update, acting| match acting.is_merged {
            true => None,
            false => update.method.input(update, &rows),
        });
        let is_changed = change.is_some();
        let output = match (change, &self.merged) {
            // Changes add up: those of the input do not meet what is merged.
            (Some(change), Some(_)) => {
                linear(x, weight.start.clone(), bias.clone()) + linear(change, weight.base.clone(), None)
            }
            (change, _) => linear(plus(x, change), weight.start.clone(), bias.clone()),
        };
        let is_plain = !is_changed && self.merged.is_none();
        self.add_to(output, is_plain, Input::Activations(rows), &weight, bias)
    }

    /// `W[ids] + Σ` what the adapters add, `[batch, sequence]` to `[batch, sequence, d_out]`: the forward pass of an
    /// embedding that works on activations.
    pub(crate) fn embedding(&self, weight: &Param<Tensor<2>>, ids: Tensor<2, Int>) -> Tensor<3> {
        let weight = self.weight(weight.base());
        let output = embedding(weight.start.clone(), ids.clone());
        // What is added to a row in 16 bits is not rounded to them.
        let dtype = activation_dtype(&output);
        let output = cast(output, dtype);
        let [batch, sequence] = ids.dims();
        let input = Input::Ids(ids.reshape([batch * sequence]));
        self.add_to(output, self.merged.is_none(), input, &weight, None)
    }

    /// `x Wᵀ`, `[n, d_out]` to `[n, rows of W]`: an output layer that is tied to the embedding with the table `weight`. It
    /// reads the table below the adapters, but for changes that PEFT ties as well.
    pub(crate) fn tied(&self, weight: &Param<Tensor<2>>, x: Tensor<2>) -> Tensor<2> {
        let table = weight.base();
        let output = linear(x.clone(), table.clone().transpose(), None);
        let added =
            self.sum(&output, |update, acting| update.method.forward_tied(&acting.seen(update), &x, &table));
        plus(output, added)
    }

    /// Whether an active adapter changes what [`tied`](Self::tied) gives.
    pub(crate) fn trains_tied_output(&self) -> bool {
        let mut updates = self.active().flat_map(|adapter| &adapter.updates);
        updates.any(|update| update.method.is_read_by_tied_output())
    }

    /// The output of a layer that works on activations with what the adapters add to it. `is_plain` says that it is, up to
    /// now, what the base makes of `input`.
    fn add_to<const D: usize>(
        &self,
        output: Tensor<D>,
        is_plain: bool,
        input: Input,
        weight: &Weight,
        bias: Option<Tensor<1>>,
    ) -> Tensor<D> {
        let shape = output.shape();
        let d_out = shape[D - 1];
        let n = shape.num_elements() / d_out.max(1);
        // What the layer gives from its base alone, without its bias.
        let product = || match &bias {
            _ if !is_plain => input.times(weight.base.clone()),
            None => output.clone().reshape([n, d_out]),
            Some(bias) => output.clone().reshape([n, d_out]) - bias.clone().unsqueeze::<2>(),
        };
        let added = self.sum(&output, |update, acting| {
            let pass = Pass {
                input: &input,
                product: &product,
                base: &weight.base,
                drops: !acting.is_for_some_rows,
            };
            let forward = if acting.is_merged { None } else { update.method.forward(update, &pass) };
            match (forward, update.method.constant(&acting.seen(update), bias.as_ref())) {
                (Some(forward), Some(constant)) => Some(forward + constant),
                (forward, constant) => forward.or(constant.map(|constant| constant.expand([n, d_out]))),
            }
        });
        plus(output, added)
    }

    /// The sum of what `each` gives for the updates at work, in the shape and type of `like`; where rows of a batch name
    /// their adapters, only in the rows that name it.
    fn sum<const D: usize>(
        &self,
        like: &Tensor<D>,
        each: impl Fn(&Update, Acting) -> Option<Tensor<2>>,
    ) -> Option<Tensor<D>> {
        let (shape, outer) = (like.shape(), like.dtype());
        let mut sum: Option<Tensor<D>> = None;
        for adapter in &self.list {
            let info = &adapter.info;
            let rows = self.rows.iter().find(|(name, _)| *name == info.name).map(|(_, rows)| rows);
            if rows.is_none() && !info.active {
                continue;
            }
            let acting = Acting { is_merged: self.is_merged(&info.name), is_for_some_rows: rows.is_some() };
            for update in &adapter.updates {
                let Some(added) = each(update, acting) else { continue };
                let added = cast(added, outer).reshape(shape.clone());
                let added = match rows {
                    Some(rows) => only_in(rows, added, shape[0]),
                    None => added,
                };
                sum = Some(match sum {
                    Some(sum) => sum + added,
                    None => added,
                });
            }
        }
        sum
    }
}

fn plus<const D: usize>(tensor: Tensor<D>, added: Option<Tensor<D>>) -> Tensor<D> {
    match added {
        Some(added) => tensor + added,
        None => tensor,
    }
}

/// `base`, or what takes its place.
fn with_copies<'a>(base: Tensor<2>, adapters: impl Iterator<Item = &'a Adapter>) -> Tensor<2> {
    let copies = adapters.flat_map(|adapter| &adapter.updates).filter(|update| update.method.replaces());
    copies.fold(base, |value, copy| {
        let base = value.clone();
        copy.method.apply(copy, value, &base)
    })
}

/// `value` with the changes that do not replace it.
fn with_changes<'a>(
    value: Tensor<2>,
    base: &Tensor<2>,
    adapters: impl Iterator<Item = &'a Adapter>,
) -> Tensor<2> {
    let changes = adapters.flat_map(|adapter| &adapter.updates).filter(|update| !update.method.replaces());
    changes.fold(value, |value, update| update.method.apply(update, value, base))
}

/// `added`, 0 where `rows` does not allow it: masked instead of multiplied, so infinities and NaNs stay in their rows.
fn only_in<const D: usize>(rows: &Tensor<1>, added: Tensor<D>, batch: usize) -> Tensor<D> {
    let asked = rows.shape()[0];
    assert!(batch == asked, "the batch has {batch} rows, adapters were named for {asked}");
    let mut shape = [1; D];
    shape[0] = batch;
    let is_other = like(rows.clone(), &added).equal_elem(0.0).reshape(shape).expand(added.shape());
    added.mask_fill(is_other, 0.0)
}

impl Reparameterization for Adapters {
    /// A path component of its own: Burn's built-in adapters are called `lora`.
    const NAME: &'static str = "peft";

    /// `base` with the updates of the active adapters, summed in the factors' type, returned in the base's.
    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let [first, ..] = &self.list[..] else { return base };
        if self.attached == AttachedState::Dropped {
            return base;
        }
        let (site, shape, outer) = (&first.info.site, base.dims(), base.dtype());
        let base = with_copies(site.to_matrix(base), self.active());
        let start = match &self.merged {
            Some(merged) => like(site.to_matrix(merged.value.clone()), &base),
            None => base.clone(),
        };
        let beside = self.active().filter(|adapter| !self.is_merged(&adapter.info.name));
        cast(site.to_parameter(with_changes(start, &base, beside), shape), outer)
    }
}

#[cfg(test)]
mod tests {
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::{Device, Distribution, Tolerance};

    use super::*;
    use crate::error::PeftError;
    use crate::init::Start;
    use crate::method::{Method, TensorSpec};
    use crate::{InitLoraWeights, LoraConfig, LoraLinear, PeftModel};

    #[derive(Module, Debug)]
    struct Model {
        proj: LoraLinear,
    }

    /// Multiplies the input of a layer, or its output, by `l`.
    #[derive(Debug)]
    struct Scale {
        is_of_input: bool,
    }

    impl Scale {
        /// `l - 1`, `[1, d_in]` or `[1, d_out]`.
        fn gain(of: &Update) -> Tensor<2> {
            of["l"].val() - 1.0
        }
    }

    impl Method for Scale {
        fn tensors(&self, site: &Site) -> Vec<TensorSpec> {
            let [d_in, d_out] = site.dims();
            vec![TensorSpec::constant("l", [1, if self.is_of_input { d_in } else { d_out }])]
        }

        fn start(&self, at: &Start) -> Result<Vec<Tensor<2>>, PeftError> {
            let dims = self.tensors(at.site)[0].dims;
            Ok(vec![Tensor::random(dims, Distribution::Uniform(1.5, 2.5), &at.device)])
        }

        fn apply(&self, of: &Update, value: Tensor<2>, base: &Tensor<2>) -> Tensor<2> {
            let gain = if self.is_of_input { Self::gain(of).transpose() } else { Self::gain(of) };
            value + base.clone() * gain
        }

        fn input(&self, of: &Update, x: &Tensor<2>) -> Option<Tensor<2>> {
            self.is_of_input.then(|| x.clone() * Self::gain(of))
        }

        fn forward(&self, of: &Update, pass: &Pass) -> Option<Tensor<2>> {
            (!self.is_of_input).then(|| (pass.product)() * Self::gain(of))
        }

        fn constant(&self, of: &Update, bias: Option<&Tensor<1>>) -> Option<Tensor<2>> {
            let bias = bias.filter(|_| !self.is_of_input)?;
            Some(bias.clone().unsqueeze::<2>() * Self::gain(of))
        }
    }

    #[test]
    fn changes_of_input_output_and_weight_add_up_whatever_is_merged() {
        let device = Device::default();
        device.seed(11);
        let mut model = Model { proj: LinearConfig::new(4, 3).init(&device).into() };
        let config = LoraConfig::new(2)
            .with_use_dora(true)
            .with_init_lora_weights(InitLoraWeights::Random)
            .with_target_modules(["proj"]);
        model.add_adapter("dora", &config).unwrap();
        let mut dora = Adapters::of(&model.proj.weight).unwrap().list[0].clone();
        // Now its magnitudes are not the norms of the columns.
        dora.updates[0].scaling *= 2.0;
        model.unload().unwrap();
        let Linear { weight, bias } = model.proj.into();
        let bias = bias.unwrap().val();
        let mut adapters = Adapters::default();
        let scale = |name: &str, is_of_input| {
            let (method, info) = (Scale { is_of_input }, dora.info.clone());
            let value = || weight.val().flatten(0, 1);
            let at = Start { site: &info.site, device: device.clone(), value: &value };
            let tensors = method.start(&at).unwrap();
            let updates = vec![Update::new(Arc::new(method), &info.site, tensors)];
            Adapter { updates, info: AdapterInfo { name: name.into(), ..info } }
        };
        for adapter in [dora.clone(), scale("input", true), scale("output", false)] {
            adapters.insert(adapter);
        }
        let names =
            |names: &[&str]| names.iter().map(|name| Arc::from(*name)).collect::<BTreeSet<Arc<str>>>();
        let effective = |kept: &[&str]| adapters.effective(weight.val().flatten(0, 1), &names(kept));

        let x = Tensor::<2>::random([5, 4], Distribution::Normal(0.0, 1.0), &device);
        let dense = effective(&["dora", "input", "output"]).reshape([4, 3]);
        let own = adapters.get("output").unwrap().constant(Some(&bias)).unwrap();
        let expected = linear(x.clone(), dense, Some(bias.clone())) + own;
        for merged in [&[][..], &["output"], &["input"], &["dora", "input"], &["dora", "input", "output"]] {
            let mut adapters = adapters.clone();
            let value = Merged { value: effective(merged), names: names(merged) };
            adapters.merged = (!merged.is_empty()).then_some(value);
            let found = adapters.linear(&weight, Some(bias.clone()), x.clone());
            let tolerance = Tolerance::absolute(1e-5);
            found.into_data().assert_approx_eq::<f32>(&expected.to_data(), tolerance);
        }
    }
}
