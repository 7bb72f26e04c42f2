//! Any adapter as one of plain LoRA.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{DType, Distribution, Tensor};

use crate::adapter::{Adapter, AdapterInfo, Adapters};
use crate::config::{LoraConfig, Targeting};
use crate::error::PeftError;
use crate::method::low_rank;
use crate::ops::singular;
use crate::plan::{InjectionReport, Plan};
use crate::seam::{BaseParameter, Layout};
use crate::tensor::is_finite;

/// The rank that [`convert_to_lora`](crate::PeftModel::convert_to_lora) gives to every module.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LoraRank {
    /// This one, at least 1; where a weight has a smaller dimension, that.
    Exactly(usize),
    /// For each module the smallest with which its update keeps this share of the sum of its squared singular values, in
    /// `(0, 1]`.
    Share(f64),
}

impl From<usize> for LoraRank {
    fn from(rank: usize) -> Self {
        Self::Exactly(rank)
    }
}

/// Adds the adapter `name` of plain LoRA that changes the weights as `source` does, as closely as `rank` allows.
pub(crate) fn add(
    layout: &mut Layout,
    name: &str,
    source: &str,
    rank: LoraRank,
) -> Result<InjectionReport, PeftError> {
    let is_valid = match rank {
        LoraRank::Exactly(rank) => rank > 0,
        LoraRank::Share(share) => share > 0.0 && share <= 1.0,
    };
    if !is_valid {
        return Err(PeftError::invalid("rank", "1 or more, or a share in (0, 1]", format!("{rank:?}")));
    }
    let mut found: BTreeMap<String, (Tensor<2>, Tensor<2>)> = BTreeMap::new();
    let (mut config, mut ranks) = (LoraConfig::default(), vec![]);
    for parameter in &layout.parameters {
        let Some(adapter) = layout.states.get(&parameter.path).and_then(|state| state.get(source)) else {
            continue;
        };
        let AdapterInfo { site, config: own, .. } = &adapter.info;
        let is_tied = adapter.updates.iter().any(|update| update.method.is_read_by_tied_output());
        let bias = layout.bias_of(site).map(BaseParameter::value);
        let constant = adapter.valid().constant(bias.as_ref());
        if !site.is_adaptable() || adapter.replaces() || constant.is_some() || is_tied {
            let (name, parameter) = (source.to_string(), site.full_name());
            return Err(PeftError::CannotConvert { name, parameter });
        }
        config.targeting =
            Targeting { key_mapping: own.targeting().key_mapping.clone(), ..Targeting::default() };
        config.file = own.file().clone();
        let (a, b) = factors(parameter, adapter, rank)?;
        ranks.push((format!("^{}", fancy_regex::escape(&site.name)), a.dims()[1]));
        found.insert(parameter.path.clone(), (a, b));
    }
    config.r = ranks.iter().map(|(_, rank)| *rank).max().unwrap_or(1);
    config.lora_alpha = config.r as f64;
    ranks.retain(|(_, rank)| *rank != config.r);
    config.alpha_pattern = ranks.iter().map(|(name, rank)| (name.clone(), *rank as f64)).collect();
    config.rank_pattern = ranks;

    let plan = Plan::exactly(layout, name, &config, &found.keys().cloned().collect())?;
    let mut updates = vec![];
    for target in &plan.targets {
        let factors = found.remove(&target.parameter.path);
        let values = factors.map(|(a, b)| vec![(low_rank::A, a), (low_rank::B, b)]);
        updates.push(target.fresh_with(&values.unwrap_or_default())?);
    }
    plan.add_to(&mut layout.states, updates);
    Ok(plan.into_report())
}

/// `A = U S` and `B = Vᵀ` of the leading singular triplets of what `adapter` changes the parameter by.
///
/// # Errors
/// [`PeftError::NonFiniteWeight`].
fn factors(
    parameter: &BaseParameter,
    adapter: &Adapter,
    rank: LoraRank,
) -> Result<(Tensor<2>, Tensor<2>), PeftError> {
    let name = adapter.info.name.clone();
    let alone = Adapters { list: vec![adapter.clone().set_active(true)], ..Adapters::default() };
    let base = parameter.value();
    let change = alone.effective(base.clone(), &[name].into()) - base.cast(DType::F32);
    let change = adapter.info.site.to_matrix(change);
    if !is_finite(&change) {
        return Err(PeftError::NonFiniteWeight { modules: vec![adapter.info.site.name.clone()] });
    }
    let [n, m] = change.dims();
    let random = |columns| Tensor::random([m, columns], Distribution::Normal(0.0, 1.0), &change.device());
    let r = match rank {
        LoraRank::Exactly(rank) => rank.min(n).min(m),
        // Squares of what still matters may be lost in the rounding of the sum of all.
        LoraRank::Share(share) if share >= 1.0 => n.min(m),
        LoraRank::Share(share) => {
            let total: f64 = change.to_data().iter::<f64>().map(|x| x * x).sum();
            let mut r = 1;
            loop {
                // Twice as many each time: few are asked for as a rule.
                let tried = (2 * r).min(n).min(m);
                let (_, values, _) = singular::leading(&change, tried, random);
                let squares: Vec<f64> = values.into_data().iter::<f64>().map(|value| value * value).collect();
                let mut kept = squares.iter().scan(0.0, |sum, square| {
                    *sum += square;
                    Some(*sum)
                });
                // The sum of all of them need not be all of the total: they are rounded.
                match kept.position(|kept| kept >= share * total) {
                    Some(at) => break at + 1,
                    None if tried == n.min(m) => break tried,
                    None => r = tried,
                }
            }
        }
    };
    let (u, values, v) = singular::leading(&change, r, random);
    Ok((u * values, v.transpose()))
}
