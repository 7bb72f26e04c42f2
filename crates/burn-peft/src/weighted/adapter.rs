//! The combined adapter of a whole model.

use std::collections::BTreeSet;

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use super::Source;
use crate::adapter::Adapter;
use crate::combination_type::CombinationType;
use crate::config::{LoraConfig, PeftConfig, Targeting};
use crate::error::PeftError;
use crate::method::{Parts, Update, low_rank};
use crate::plan::{InjectionReport, Plan, Target};
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

    let plan = plan(layout, name, &config.into(), sources)?;
    let mut updates = vec![];
    for target in &plan.targets {
        let state = layout.states.get(&target.parameter.path);
        let parts: Vec<(&Adapter, f64)> =
            sources.iter().filter_map(|(source, weight)| Some((state?.get(source)?, *weight))).collect();
        updates.push(combine(target, &parts, combination_type, rank)?);
    }
    plan.add_to(&mut layout.states, updates);
    Ok(plan.into_report())
}

/// The plan for exactly the parameters that the sources adapt.
///
/// Names are matched by their end as well. Where that would mean other modules too, an expression names them exactly.
fn plan(
    layout: &Layout,
    name: &str,
    config: &PeftConfig,
    sources: &[(&str, f64)],
) -> Result<Plan, PeftError> {
    let has_source = |target: &Target| {
        let state = layout.states.get(&target.parameter.path);
        sources.iter().any(|(source, _)| state.is_some_and(|state| state.get(source).is_some()))
    };
    let plan = Plan::new(layout, name, config)?;
    let mut weights = plan.targets.iter().filter(|target| target.site.is_adaptable());
    let is_exact = weights.all(has_source);
    let Some(TargetModules::Names(names)) = config.targeting().target_modules.as_ref().filter(|_| !is_exact)
    else {
        return Ok(plan);
    };
    let escaped: Vec<String> = names.iter().map(|name| fancy_regex::escape(name).into_owned()).collect();
    let mut exact = config.clone();
    exact.targeting_mut().target_modules = Some(TargetModules::Regex(escaped.join("|")));
    Plan::new(layout, name, &exact)
}

fn greatest_rank(layout: &Layout, name: &str) -> usize {
    let updates = layout.states.of(name).flat_map(|(_, adapter)| &adapter.updates);
    let ranks = updates.filter_map(|update| match update.method.parts(update)? {
        Parts::Factors { a, .. } => Some(a.dims()[1]),
        Parts::Shift(_) => None,
    });
    ranks.max().unwrap_or(0)
}

/// The configuration of the first source, with scaling 1 and exactly the modules that the sources adapt.
fn combined_config(layout: &Layout, sources: &[(&str, f64)], rank: usize) -> Result<LoraConfig, PeftError> {
    let mut paths = vec![];
    let mut lora_bias = false;
    let mut first: Option<&LoraConfig> = None;
    for (source, _) in sources {
        for (path, adapter) in layout.states.of(source) {
            let info = &adapter.info;
            let cannot = || PeftError::CannotCombine {
                name: source.to_string(),
                parameter: info.site.full_name(),
            };
            let config = info.config.as_lora().ok_or_else(cannot)?;
            first.get_or_insert(config);
            lora_bias |= config.lora_bias;
            for update in &adapter.updates {
                match update.method.parts(update).ok_or_else(cannot)? {
                    Parts::Factors { .. } => paths.push(path),
                    Parts::Shift(_) => {}
                }
            }
        }
    }
    let first = first.cloned().unwrap_or_default();
    // By the mapping of the new adapter: a source may have another one.
    let key_mapping = first.targeting.key_mapping;
    let mapping = key_mapping.compile()?;
    let mut modules = BTreeSet::new();
    for path in paths {
        let name = mapping.apply(path)?;
        modules.extend(name.rsplit_once('.').map(|(module, _)| module.to_string()));
    }
    Ok(LoraConfig {
        r: rank,
        lora_alpha: rank as f64,
        lora_dropout: first.lora_dropout,
        lora_bias,
        fan_in_fan_out: first.fan_in_fan_out,
        targeting: Targeting { key_mapping, ..Targeting::new(TargetModules::Names(modules)) },
        file: first.file,
        ..LoraConfig::default()
    })
}

/// The combined updates of one parameter.
fn combine(
    target: &Target,
    parts: &[(&Adapter, f64)],
    combination_type: CombinationType,
    rank: usize,
) -> Result<Vec<Update>, PeftError> {
    let mut sources = vec![];
    let mut sum: Option<Tensor<2>> = None;
    for (adapter, weight) in parts {
        let adapter = adapter.valid();
        for update in &adapter.updates {
            let scaling = update.scaling;
            let constant = match update.method.parts(update) {
                Some(Parts::Factors { a, b, bias }) => {
                    sources.push(Source { a, b, scaling, weight: *weight });
                    bias
                }
                Some(Parts::Shift(shift)) => Some(shift),
                None => None,
            };
            let part = constant.map(|constant| constant.mul_scalar(weight * scaling));
            sum = match (sum, part) {
                (Some(sum), Some(part)) => Some(sum + part),
                (sum, part) => sum.or(part),
            };
        }
    }
    let factors = if sources.is_empty() { None } else { Some(combination_type.combine(&sources, rank)?) };
    // A part that no source has stays as it starts, so that the adapter is whole.
    let replaced = |update: Update| {
        update.map_parts(|spec, fresh| {
            let value = match (spec.name, &factors, &sum) {
                (low_rank::A, Some((a, _)), _) => a,
                (low_rank::B, Some((_, b)), _) => b,
                (low_rank::BIAS, _, Some(sum)) => sum,
                _ => return fresh,
            };
            Param::from_tensor(on_kind_of(value.clone(), &target.parameter.device))
        })
    };
    Ok(target.fresh()?.into_iter().map(replaced).collect())
}
