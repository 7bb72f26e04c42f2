//! Folding adapters into weights.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Tensor};
use burn_peft_ops::cast;

use crate::adapter::{Adapter, Adapters, Merged};
use crate::error::PeftError;
use crate::layer::Space;
use crate::seam::{Layout, attach};
use crate::states::States;
use crate::summary::count;
use crate::tensor::{is_finite, like};

/// What merging did to the weights.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MergeReport {
    /// Paths of the parameters that were merged.
    pub parameters: Vec<String>,
    /// The largest difference between a merged value and the sum that was formed for it, in the weights' units: what
    /// rounding to the type of the base cost. 0 for a base in f32.
    pub largest_error: f32,
    /// The parameter with the largest error, if there is an error.
    pub worst_parameter: Option<String>,
}

impl fmt::Display for MergeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} merged, largest rounding error {:.1e}",
            count(self.parameters.len(), "parameter"),
            self.largest_error
        )?;
        match &self.worst_parameter {
            Some(worst) => write!(f, " at {worst}"),
            None => Ok(()),
        }
    }
}

/// Values by path, flattened, without a graph: each as it was summed, with the type that it is rounded to.
type Sums = BTreeMap<String, (Tensor<1>, DType)>;

/// Merged values by path, flattened, without a graph.
type Values = BTreeMap<String, Tensor<1>>;

/// Keeps the values that the active adapters make, or those of them that are named, ready in the states, from which
/// [`PeftModel::unmerge_adapter`](crate::PeftModel) takes them off again. What was merged before stays merged.
pub(crate) fn merge<M: Module>(model: &mut M, names: Option<&[&str]>) -> Result<MergeReport, PeftError> {
    let mut layout = Layout::of(model)?;
    layout.states.refuse_rows()?;
    let mut chosen = active_adapters(&layout.states);
    if let Some(names) = names {
        for name in names {
            if !chosen.contains(*name) {
                return Err(PeftError::InactiveAdapter { name: name.to_string() });
            }
        }
        let merged = layout.states.values().filter_map(|state| state.merged.as_ref());
        let merged: BTreeSet<Arc<str>> = merged.flat_map(|merged| merged.names.clone()).collect();
        chosen.retain(|name| names.contains(&&**name) || merged.contains(name));
        refuse_covered(&layout.states, &chosen)?;
    }
    let sums = effective_values(&layout, &chosen);
    let (merged, report) = round(sums, &chosen)?;
    for (path, value) in merged {
        if let Some(state) = layout.states.get_mut(&path) {
            let own = state.active().map(|adapter| adapter.info.name.clone());
            let names = own.filter(|name| chosen.contains(name)).collect();
            state.merged = Some(Merged { value, names });
        }
    }
    attach(model, layout.states, false);
    Ok(report)
}

/// Folds the active adapters into the parameters and removes every adapter.
///
/// All merged values are computed and checked before the first one is put into the model.
pub(crate) fn merge_and_unload<M: Module>(model: &mut M) -> Result<MergeReport, PeftError> {
    let layout = Layout::of(model)?;
    layout.states.refuse_rows()?;
    let active = active_adapters(&layout.states);
    let mut sums = effective_values(&layout, &active);
    let tied = layout.tied_tables.iter().map(|module| format!("{module}.weight"));
    let parts_ways = |path: &String| {
        let updates = layout.states.get(path).into_iter().flat_map(Adapters::active);
        updates.flat_map(|adapter| &adapter.updates).any(|update| !update.method.is_read_by_tied_output())
    };
    let tied: Vec<String> = tied.filter(parts_ways).collect();
    if !tied.is_empty() {
        return Err(PeftError::TiedOutput { parameters: tied });
    }
    add_constants(&layout, &mut sums)?;
    let (merged, report) = round(sums, &active)?;
    attach(model, States::default(), false);
    *model = model.clone().map(&mut Placer { path: vec![], values: merged });
    Ok(report)
}

/// # Errors
/// [`PeftError::CoveredByCopy`] if one of the chosen adapters changes a parameter that an active one, which is not chosen,
/// replaces.
fn refuse_covered(states: &States, chosen: &BTreeSet<Arc<str>>) -> Result<(), PeftError> {
    for state in states.values() {
        let is_chosen = |adapter: &&Adapter| chosen.contains(&adapter.info.name);
        let copy = state.active().find(|adapter| adapter.replaces() && !is_chosen(adapter));
        if let (Some(copy), Some(adapter)) = (copy, state.active().find(is_chosen)) {
            return Err(PeftError::CoveredByCopy {
                name: adapter.info.name.to_string(),
                copy: copy.info.name.to_string(),
                parameter: copy.info.site.full_name(),
            });
        }
    }
    Ok(())
}

fn active_adapters(states: &States) -> BTreeSet<Arc<str>> {
    states.values().flat_map(Adapters::active).map(|adapter| adapter.info.name.clone()).collect()
}

/// What these active adapters make of the base, in f32 where the base is narrower.
fn effective_values(layout: &Layout, names: &BTreeSet<Arc<str>>) -> Sums {
    let mut sums = Sums::new();
    for parameter in &layout.parameters {
        let Some(state) = layout.states.get(&parameter.path) else { continue };
        if state.active().any(|adapter| names.contains(&adapter.info.name)) {
            let sum = state.effective(parameter.value(), names);
            sums.insert(parameter.path.clone(), (sum, parameter.dtype));
        }
    }
    sums
}

/// Adds what adapters of layers that work on activations add whatever the input is, their `lora_bias`, to the sums of the
/// layers' biases.
///
/// # Errors
/// [`PeftError::NoBiasToMergeInto`].
fn add_constants(layout: &Layout, sums: &mut Sums) -> Result<(), PeftError> {
    let mut homeless: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut added = vec![];
    let active = layout.states.values().flat_map(Adapters::active);
    for adapter in active.filter(|adapter| adapter.info.site.space == Space::Activations) {
        let info = &adapter.info;
        let bias = layout.bias_of(&info.site).map(|bias| {
            let sum = sums.get(&bias.path).cloned();
            let (value, dtype) = sum.unwrap_or_else(|| (bias.value(), bias.dtype));
            (bias.path.clone(), value, dtype)
        });
        let Some(constant) = adapter.valid().constant(bias.as_ref().map(|(_, value, _)| value)) else {
            continue;
        };
        match bias {
            Some(bias) => added.push((bias, constant)),
            None => homeless.entry(info.name.to_string()).or_default().push(info.site.module.clone()),
        }
    }
    for ((path, value, dtype), constant) in added {
        let (sum, _) = sums.remove(&path).unwrap_or((value, dtype));
        let constant = constant.reshape(sum.shape());
        sums.insert(path, (cast(sum, constant.dtype()) + constant, dtype));
    }
    match homeless.pop_first() {
        Some((name, modules)) => Err(PeftError::NoBiasToMergeInto { name, modules }),
        None => Ok(()),
    }
}

/// Rounds every sum once, to the type of the base.
///
/// # Errors
/// [`PeftError::NonFiniteMerge`].
fn round(sums: Sums, names: &BTreeSet<Arc<str>>) -> Result<(Values, MergeReport), PeftError> {
    let mut report = MergeReport::default();
    let mut merged = Values::new();
    let mut broken = vec![];
    for (path, (exact, dtype)) in sums {
        let value = cast(exact.clone(), dtype);
        if !is_finite(&value) {
            broken.push(path.strip_suffix(".weight").unwrap_or(&path).to_string());
            continue;
        }
        if exact.dtype() != dtype {
            let error: f32 =
                (cast(value.clone(), DType::F32) - exact.cast(DType::F32)).abs().max().into_scalar();
            if error > report.largest_error {
                report.largest_error = error;
                report.worst_parameter = Some(path.clone());
            }
        }
        report.parameters.push(path.clone());
        merged.insert(path, value);
    }
    if !broken.is_empty() {
        let names: Vec<&str> = names.iter().map(|name| &**name).collect();
        return Err(PeftError::NonFiniteMerge { name: names.join("+"), modules: broken });
    }
    Ok((merged, report))
}

/// Puts the merged values in the place of the old ones; ids and training state stay.
struct Placer {
    path: Vec<String>,
    values: Values,
}

impl ModuleMapper for Placer {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(value) = self.values.remove(&self.path.join(".")) else { return param };
        param.map(|base| like(value.reshape(base.shape()), &base).set_require_grad(base.is_require_grad()))
    }
}
