//! The combined adapter of a whole model.

use std::collections::BTreeSet;
use std::sync::Arc;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Device, Tensor};

use super::{CombinationType, Source};
use crate::adapter::{Adapter, Change, Update};
use crate::error::PeftError;
use crate::inject::{InjectionReport, Plan, Target};
use crate::lora::{Bias, LoraConfig, LowRank};
use crate::seam::Layout;
use crate::target::TargetModules;
use crate::tensor::on_kind_of;

/// Adds the adapter `name` that combines `sources`, names with their weights, to the states of `layout`.
pub(crate) fn add(
    layout: &mut Layout,
    name: &str,
    sources: &[(&str, f64)],
    combination_type: CombinationType,
) -> Result<InjectionReport, PeftError> {
    let combination_type = combination_type.for_adapters(sources.len());
    combination_type.validate()?;
    if let Some((source, weight)) = sources.iter().find(|(_, weight)| !weight.is_finite()) {
        return Err(PeftError::InvalidConfig {
            field: "weights",
            expected: "finite numbers",
            found: format!("{weight} for `{source}`"),
        });
    }
    let ranks: Vec<usize> = sources.iter().map(|(source, _)| greatest_rank(layout, source)).collect();
    let rank = combination_type.rank(&ranks)?;
    let config = combined_config(layout, sources, rank)?;

    let plan = plan(layout, name, config, sources)?;
    let config = plan.config.clone();
    let mut combined = vec![];
    for target in &plan.targets {
        let state = layout.states.get(&target.path);
        let parts: Vec<(&Adapter, f64)> =
            sources.iter().filter_map(|(source, weight)| Some((state?.get(source)?, *weight))).collect();
        combined.push((target.path.clone(), combine(&parts, combination_type, rank, &config)?));
    }
    let mut combined = combined.into_iter();
    plan.add_to(&mut layout.states, |target| {
        let (path, update) = combined.next()?;
        debug_assert_eq!(path, target.path);
        // A bias that no source has starts from zero, so that the adapter is whole.
        let Some(update) = update else { return target.fresh(&plan.config, None) };
        Some(update.map(&mut OnKindOf(&target.device)))
    });
    Ok(plan.into_report())
}

/// Puts parameters without a graph on the kind of device that this one is.
struct OnKindOf<'a>(&'a Device);

impl ModuleMapper for OnKindOf<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| on_kind_of(tensor, self.0))
    }
}

/// The plan for exactly the parameters that the sources adapt.
///
/// Names are matched by their end as well. Where that would mean other modules too, an expression names them exactly.
fn plan(layout: &Layout, name: &str, config: LoraConfig, sources: &[(&str, f64)]) -> Result<Plan, PeftError> {
    let has_source = |target: &Target| {
        let state = layout.states.get(&target.path);
        sources.iter().any(|(source, _)| state.is_some_and(|state| state.get(source).is_some()))
    };
    let is_exact = |plan: &Plan| {
        let mut weights =
            plan.targets.iter().filter(|target| matches!(target.change, Change::LowRank { .. }));
        weights.all(has_source)
    };
    let plan = Plan::new(layout, name, &config)?;
    let Some(TargetModules::Names(names)) = config.target_modules.as_ref().filter(|_| !is_exact(&plan))
    else {
        return Ok(plan);
    };
    let escaped: Vec<String> = names.iter().map(|name| fancy_regex::escape(name).into_owned()).collect();
    let exact = config.with_target_modules(TargetModules::Regex(escaped.join("|")));
    Plan::new(layout, name, &exact)
}

fn greatest_rank(layout: &Layout, name: &str) -> usize {
    let adapters = layout.states.values().filter_map(|state| state.get(name));
    adapters.filter_map(|adapter| Some(adapter.low_rank()?.rank())).max().unwrap_or(0)
}

/// The configuration of the first source, with scaling 1 and exactly the modules that the sources adapt.
fn combined_config(layout: &Layout, sources: &[(&str, f64)], rank: usize) -> Result<LoraConfig, PeftError> {
    let mut paths = vec![];
    let mut lora_bias = false;
    let mut first: Option<Arc<LoraConfig>> = None;
    for (source, _) in sources {
        let adapters = layout.states.iter().filter_map(|(path, state)| Some((path, state.get(source)?)));
        for (path, adapter) in adapters {
            let info = &adapter.info;
            first.get_or_insert_with(|| info.config.clone());
            lora_bias |= info.config.lora_bias;
            match &adapter.update {
                Update::LowRank(_) => paths.push(path),
                Update::Shift(_) => {}
                Update::Copy(_) => {
                    return Err(PeftError::CannotCombine {
                        name: source.to_string(),
                        parameter: format!("{}.{}", info.site.name, info.site.parameter),
                    });
                }
            }
        }
    }
    let first = first.map(|config| LoraConfig::clone(&config)).unwrap_or_default();
    // By the mapping of the new adapter: a source may have another one.
    let mapping = first.key_mapping.compile()?;
    let mut modules = BTreeSet::new();
    for path in paths {
        let name = mapping.apply(path)?;
        modules.extend(name.rsplit_once('.').map(|(module, _)| module.to_string()));
    }
    Ok(LoraConfig {
        r: rank,
        lora_alpha: rank as f64,
        use_rslora: false,
        rank_pattern: vec![],
        alpha_pattern: vec![],
        target_modules: Some(TargetModules::Names(modules)),
        exclude_modules: None,
        layers_to_transform: None,
        layers_pattern: vec![],
        modules_to_save: vec![],
        bias: Bias::None,
        lora_bias,
        ..first
    })
}

/// The combined update of one parameter, on plain tensors.
fn combine(
    parts: &[(&Adapter, f64)],
    combination_type: CombinationType,
    rank: usize,
    config: &LoraConfig,
) -> Result<Option<Update>, PeftError> {
    let mut sources = vec![];
    let mut sum: Option<Tensor<1>> = None;
    let mut width = None;
    for (adapter, weight) in parts {
        let scaling = adapter.info.scaling;
        let adapter = adapter.valid();
        let bias = match adapter.update {
            Update::LowRank(LowRank { a, b, bias, .. }) => {
                let b = b.val();
                width = Some((b.dims()[1], b.device()));
                sources.push(Source { a: a.val(), b, scaling, weight: *weight });
                bias
            }
            Update::Shift(shift) => Some(shift),
            Update::Copy(_) => None,
        };
        if let Some(bias) = bias {
            let part = bias.val().mul_scalar(weight * scaling);
            sum = Some(match sum {
                Some(sum) => sum + part,
                None => part,
            });
        }
    }
    let Some((d_out, device)) = width else {
        return Ok(sum.map(|sum| Update::Shift(burn::module::Param::from_tensor(sum))));
    };
    let (a, b) = combination_type.combine(&sources, rank)?;
    // On plain layers the bias is another parameter's.
    let shows_its_input = parts.iter().any(|(adapter, _)| adapter.info.site.kind.in_activation_space());
    let bias =
        (config.lora_bias && shows_its_input).then(|| sum.unwrap_or_else(|| Tensor::zeros([d_out], &device)));
    Ok(Some(Update::LowRank(LowRank::new(a, b, bias, config.lora_dropout))))
}
