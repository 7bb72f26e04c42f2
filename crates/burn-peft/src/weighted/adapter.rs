//! The combined adapter of a whole model.

use std::collections::BTreeSet;

use burn::module::Module;
use burn::tensor::Tensor;

use super::Source;
use crate::adapter::Adapter;
use crate::combination_type::CombinationType;
use crate::config::{LoraConfig, Targeting};
use crate::error::PeftError;
use crate::method::{Summand, Update, low_rank};
use crate::plan::{InjectionReport, Plan, Target};
use crate::seam::Layout;

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
        let found = format!("{weight} for `{source}`");
        return Err(PeftError::invalid("weights", "finite numbers", found));
    }
    let ranks: Vec<usize> = sources.iter().map(|(source, _)| greatest_rank(layout, source)).collect();
    let rank = combination_type.rank(&ranks)?;
    let (config, paths) = combined_config(layout, sources, rank)?;

    let plan = Plan::exactly(layout, name, &config, &paths)?;
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

fn greatest_rank(layout: &Layout, name: &str) -> usize {
    let updates = layout.states.of(name).flat_map(|(_, adapter)| &adapter.updates);
    let factors = updates.filter_map(|update| update.method.summand(update)?.factors);
    factors.map(|(a, _)| a.dims()[1]).max().unwrap_or(0)
}

/// The configuration of the first source with scaling 1, and the paths of the weights that the sources adapt.
fn combined_config(
    layout: &Layout,
    sources: &[(&str, f64)],
    rank: usize,
) -> Result<(LoraConfig, BTreeSet<String>), PeftError> {
    let mut paths = BTreeSet::new();
    let mut lora_bias = false;
    let mut first: Option<&LoraConfig> = None;
    for (source, _) in sources {
        for (path, adapter) in layout.states.of(source) {
            let info = &adapter.info;
            let cannot =
                || PeftError::CannotCombine { name: source.to_string(), parameter: info.site.full_name() };
            let config = info.config.as_lora().ok_or_else(cannot)?;
            first.get_or_insert(config);
            lora_bias |= config.lora_bias;
            for update in &adapter.updates {
                if update.method.summand(update).ok_or_else(cannot)?.factors.is_some() {
                    paths.insert(path.clone());
                }
            }
        }
    }
    let first = first.cloned().unwrap_or_default();
    let config = LoraConfig {
        r: rank,
        lora_alpha: rank as f64,
        lora_dropout: first.lora_dropout,
        lora_bias,
        fan_in_fan_out: first.fan_in_fan_out,
        targeting: Targeting { key_mapping: first.targeting.key_mapping, ..Targeting::default() },
        file: first.file,
        ..LoraConfig::default()
    };
    Ok((config, paths))
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
            let Some(Summand { factors, bias }) = update.method.summand(update) else { continue };
            sources.extend(factors.map(|(a, b)| Source { a, b, scaling, weight: *weight }));
            let part = bias.map(|bias| bias.mul_scalar(weight * scaling));
            sum = match (sum, part) {
                (Some(sum), Some(part)) => Some(sum + part),
                (sum, part) => sum.or(part),
            };
        }
    }
    // A part that no source has stays as it starts, so that the adapter is whole.
    let mut values: Vec<(&str, Tensor<2>)> = sum.map(|sum| (low_rank::BIAS, sum)).into_iter().collect();
    if !sources.is_empty() {
        let (a, b) = combination_type.combine(&sources, rank)?;
        values.extend([(low_rank::A, a), (low_rank::B, b)]);
    }
    target.fresh_with(&values)
}
