//! Reading adapters onto a model.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::module::Param;
use burn::tensor::Tensor;

use super::files::AdapterFiles;
use super::keys::{self, Entry, Part};
use super::prefix::OtherPrefix;
use super::{LoadOptions, LoadReport, adapted_names, adapter_config, tensors};
use crate::adapter::{Copied, Update};
use crate::error::{PeftError, TensorProblem, closest_key};
use crate::inject::{Plan, Target, parameters};
use crate::lora::LowRank;
use crate::seam::Layout;
use crate::target::OUTPUT_LAYER;
use crate::tensor::cast;

/// Gives the base model's values at paths, flattened.
type BaseValues<'a> = dyn Fn(&BTreeSet<String>) -> BTreeMap<String, Tensor<1>> + 'a;

/// The tensors of a file by the parameter they belong to, flattened.
type Found = BTreeMap<(String, Part), Tensor<1>>;

/// Reads the adapter in `directory` and adds it to the states of `layout` under `name`.
pub(crate) fn load(
    layout: &mut Layout,
    name: &str,
    directory: &Path,
    options: &LoadOptions,
    base_values: &BaseValues,
) -> Result<LoadReport, PeftError> {
    let mut files = AdapterFiles::read(directory)?;
    let (mut config, ignored_keys) = adapter_config::from_json(&files.config, &files.config_path)?;
    config.key_mapping = options.key_mapping.clone();
    let plan = Plan::new(layout, name, &config)?;
    let bytes = files.tensors()?;
    let path = files.tensor_path;

    let mut stored = tensors::Reader::new(&path, &bytes)?;
    let mut problems = vec![];
    let adapted = adapted_names(plan.targets.iter().map(|target| (&*target.site, target.change)));
    let mut found = take_targets(&plan, &adapted, &mut stored, &mut problems);
    problems.extend(compare_base(layout, &plan, &adapted, &mut stored, base_values)?);
    problems.extend(unexpected(&plan, &stored));
    if !problems.is_empty() && !options.lenient {
        return Err(refused(&path, problems, found.is_empty()));
    }

    let tensors = found.len();
    let copies = base_values(&plan.copied());
    plan.add_to(&mut layout.states, |target| {
        Some(update(&plan, target, target.fresh(&plan.config, copies.get(&target.path))?, &mut found))
    });
    Ok(LoadReport { injection: plan.into_report(), tensors, ignored_keys, problems: with_closest(problems) })
}

/// Takes the tensors that the plan asks for.
fn take_targets(
    plan: &Plan,
    adapted: &BTreeSet<String>,
    stored: &mut tensors::Reader,
    problems: &mut Vec<TensorProblem>,
) -> Found {
    let mut found = Found::new();
    for target in &plan.targets {
        let is_adapted = adapted.contains(&target.site.name);
        for entry in keys::entries(&target.site, target.change, plan.config.lora_bias, is_adapted) {
            match stored.take(&entry.key, &entry.shape, &target.device) {
                Ok(tensor) => {
                    found.insert((target.path.clone(), entry.part), tensor);
                }
                Err(problem) => problems.push(problem),
            }
        }
    }
    found
}

/// Takes the weights of the base that PEFT adds, of an adapted embedding or output layer, and with
/// `save_embedding_layers` of any. They say nothing new, or the adapter is for another base model.
///
/// # Errors
/// [`PeftError::InvalidPattern`], [`PeftError::EndlessPattern`], [`PeftError::AmbiguousKeyMapping`].
fn compare_base(
    layout: &Layout,
    plan: &Plan,
    adapted: &BTreeSet<String>,
    stored: &mut tensors::Reader,
    base_values: &BaseValues,
) -> Result<Vec<TensorProblem>, PeftError> {
    let copied = plan.copied();
    let mut repeated = vec![];
    for (parameter, site) in parameters(layout, &plan.config.key_mapping)? {
        let mut entries = vec![];
        // A copy is the adapter's own; only a tied output layer still reads the base then.
        if !copied.contains(&parameter.path) {
            entries.push(keys::base(&site, adapted.contains(&site.name)));
        }
        if layout.tied_tables.contains(&site.module) && site.parameter == "weight" {
            // The output layer of a tied model has no weight of its own here, and PEFT writes one.
            let key = keys::join(OUTPUT_LAYER, "weight");
            entries.push(Entry { key, shape: site.shape.clone(), part: Part::Copy });
        }
        entries.retain(|entry| stored.has(&entry.key));
        repeated.extend(entries.into_iter().map(|entry| (parameter, site.clone(), entry)));
    }
    let paths = repeated.iter().map(|(parameter, _, _)| parameter.path.clone()).collect();
    let base = base_values(&paths);
    let mut problems = vec![];
    for (parameter, site, Entry { key, shape, .. }) in repeated {
        let Some(base) = base.get(&parameter.path) else { continue };
        match stored.take(&key, &shape, &parameter.device) {
            Ok(tensor) => {
                let tensor = keys::copy_from_file(tensor, &site);
                if !tensors::equal_up_to_rounding(&tensor, base) {
                    problems.push(TensorProblem::OtherBase { key });
                }
            }
            Err(problem) => problems.push(problem),
        }
    }
    Ok(problems)
}

/// The tensors that nothing took.
fn unexpected(plan: &Plan, stored: &tensors::Reader) -> Vec<TensorProblem> {
    let leftover = stored.leftover().into_iter();
    let leftover = leftover.filter(|key| !keys::is_written_again(key, plan.config.bias));
    leftover.map(|key| TensorProblem::Unexpected { key, closest: None }).collect()
}

/// The error about tensors that do not fit: the common cause, if there is one. Where some keys are right, how all of them
/// begin is not the cause.
fn refused(path: &Path, problems: Vec<TensorProblem>, is_nothing_found: bool) -> PeftError {
    let (missing, unexpected) = named(&problems);
    match OtherPrefix::between(&unexpected, &missing).filter(|_| is_nothing_found) {
        Some(other) => other.refused(path),
        None => PeftError::IncompatibleAdapter { path: path.into(), problems: with_closest(problems) },
    }
}

/// The keys that are missing, and those that are not expected.
fn named(problems: &[TensorProblem]) -> (Vec<String>, Vec<String>) {
    let (mut missing, mut unexpected) = (vec![], vec![]);
    for problem in problems {
        match problem {
            TensorProblem::Missing { key, .. } => missing.push(key.clone()),
            TensorProblem::Unexpected { key, .. } => unexpected.push(key.clone()),
            _ => {}
        }
    }
    (missing, unexpected)
}

/// The same problems, with the nearest of the missing keys for each unexpected one, and the other way round.
fn with_closest(mut problems: Vec<TensorProblem>) -> Vec<TensorProblem> {
    // Nobody reads more of them, and comparing every key with every other takes long.
    const COMPARED: usize = 32;
    let (missing, unexpected) = named(&problems);
    for problem in problems.iter_mut().take(COMPARED) {
        match problem {
            TensorProblem::Missing { key, closest } => *closest = closest_key(key, &unexpected),
            TensorProblem::Unexpected { key, closest } => *closest = closest_key(key, &missing),
            _ => {}
        }
    }
    problems
}

/// `fresh` with the values that were found for it.
fn update(plan: &Plan, target: &Target, fresh: Update, found: &mut Found) -> Update {
    let mut take = |part| found.remove(&(target.path.clone(), part));
    match fresh {
        Update::LowRank(fresh) => {
            let a = take(Part::A).map_or(fresh.a.val(), |a| keys::factor_from_file(a, fresh.rank()));
            let [_, d_out] = target.site.factor_dims();
            let b = take(Part::B).map_or(fresh.b.val(), |b| keys::factor_from_file(b, d_out));
            let bias = fresh.bias.map(|fresh| take(Part::Bias).unwrap_or(fresh.val()));
            Update::LowRank(LowRank::new(a, b, bias, plan.config.lora_dropout))
        }
        Update::Shift(fresh) => Update::Shift(take(Part::Bias).map_or(fresh, Param::from_tensor)),
        Update::Copy(fresh) => {
            let dtype = fresh.copy.val().dtype();
            let stored = |copy| Param::from_tensor(cast(keys::copy_from_file(copy, &target.site), dtype));
            Update::Copy(Copied {
                copy: take(Part::Copy).map_or(fresh.copy, stored),
                bias: fresh.bias.map(|fresh| take(Part::Bias).map_or(fresh, Param::from_tensor)),
            })
        }
    }
}
