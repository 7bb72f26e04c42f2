//! Reading adapters onto a model.

use std::collections::BTreeSet;
use std::path::Path;

use burn::module::Param;
use burn_peft_files::closest_key;
use burn_peft_ops::cast;

use super::files::AdapterFiles;
use super::prefix::OtherPrefix;
use super::{LoadOptions, LoadReport, adapter_config, keys, tensors};
use crate::error::{PeftError, TensorProblem};
use crate::method::Update;
use crate::plan::{Plan, Target, parameters};
use crate::seam::Layout;
use crate::target::OUTPUT_LAYER;

/// Reads the adapter in `directory` and adds it to the states of `layout` under `name`.
pub(crate) fn load(
    layout: &mut Layout,
    name: &str,
    directory: &Path,
    options: &LoadOptions,
) -> Result<LoadReport, PeftError> {
    let mut files = AdapterFiles::read(directory)?;
    let parsed = adapter_config::parse(&files.config, &files.config_path)?.with_tensors();
    let (mut config, ignored_keys) = adapter_config::understood(parsed, &files.config_path)?;
    config.targeting_mut().key_mapping = options.key_mapping.clone();
    let plan = Plan::new(layout, name, &config)?;
    let bytes = files.tensors()?;
    let path = files.tensor_path;

    let mut stored = tensors::Reader::new(&path, &bytes)?;
    let (mut updates, mut problems) = (vec![], vec![]);
    for target in &plan.targets {
        let fresh = target.fresh()?.into_iter();
        updates.push(fresh.map(|fresh| filled(target, fresh, &mut stored, &mut problems)).collect());
    }
    let tensors = stored.count();
    problems.extend(compare_base(layout, &plan, &mut stored)?);
    problems.extend(unexpected(&plan, &stored));
    if !problems.is_empty() && !options.lenient {
        return Err(refused(&path, problems, tensors == 0));
    }

    plan.add_to(&mut layout.states, updates);
    Ok(LoadReport { injection: plan.into_report(), tensors, ignored_keys, problems: with_closest(problems) })
}

/// The update with the tensors of the file in the place of those it starts with; one that does not fit is a problem, and
/// stays as it starts.
fn filled(
    target: &Target,
    fresh: Update,
    stored: &mut tensors::Reader,
    problems: &mut Vec<TensorProblem>,
) -> Update {
    fresh.map_parts(|spec, fresh| {
        if !spec.is_trained {
            return fresh;
        }
        match stored.take(&keys::join(&target.site.name, &spec.key), &spec.shape, &target.parameter.device) {
            Ok(tensor) => Param::from_tensor(spec.to_memory(cast(tensor, fresh.dtype()))),
            Err(problem) => {
                problems.push(problem);
                fresh
            }
        }
    })
}

/// Takes the weights of the base that PEFT adds, of an adapted embedding or output layer, and with
/// `save_embedding_layers` of any. They say nothing new, or the adapter is for another base model.
///
/// # Errors
/// [`PeftError::InvalidPattern`], [`PeftError::EndlessPattern`], [`PeftError::AmbiguousKeyMapping`].
fn compare_base(
    layout: &Layout,
    plan: &Plan,
    stored: &mut tensors::Reader,
) -> Result<Vec<TensorProblem>, PeftError> {
    let replaced = plan.targets.iter().filter(|target| target.replaces());
    let replaced: BTreeSet<&str> = replaced.map(|target| &*target.parameter.path).collect();
    let mut problems = vec![];
    for (parameter, site) in parameters(layout, &plan.config.targeting().key_mapping)? {
        let spec = keys::base(&site, plan.adapted().contains(&site.name));
        let own = keys::join(&site.name, &spec.key);
        // A copy is the adapter's own; only a tied output layer still reads the base then.
        let mut repeated = vec![];
        if !replaced.contains(&*parameter.path) {
            repeated.push(own);
        }
        if layout.tied_tables.contains(&site.module) && site.is_adaptable() {
            // The output layer of a tied model has no weight of its own here, and PEFT writes one.
            repeated.push(keys::join(OUTPUT_LAYER, &site.parameter));
        }
        repeated.retain(|key| stored.has(key));
        for key in repeated {
            match stored.take(&key, &spec.shape, &parameter.device) {
                Ok(tensor) => {
                    let base = spec.to_file(site.to_matrix(parameter.value()));
                    if !tensors::equal_up_to_rounding(&tensor, &base) {
                        problems.push(TensorProblem::OtherBase { key });
                    }
                }
                Err(problem) => problems.push(problem),
            }
        }
    }
    Ok(problems)
}

/// The tensors that nothing took.
fn unexpected(plan: &Plan, stored: &tensors::Reader) -> Vec<TensorProblem> {
    let leftover = stored.leftover().into_iter();
    let leftover = leftover.filter(|key| !keys::is_written_again(key, plan.config.kind().bias()));
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
            TensorProblem::Missing { key, closest } => {
                *closest = closest_key(key, unexpected.iter().map(String::as_str))
            }
            TensorProblem::Unexpected { key, closest } => {
                *closest = closest_key(key, missing.iter().map(String::as_str))
            }
            _ => {}
        }
    }
    problems
}
