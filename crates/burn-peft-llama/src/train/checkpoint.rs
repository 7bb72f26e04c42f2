//! Checkpoints: a training on disk.

mod fingerprint;
mod optimizer;
mod parameters;
mod state;
#[cfg(test)]
mod tests;

use std::fs;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::Tensor;
use burn_peft::{PeftConfig, PeftModel};
use burn_peft_files::{StagedDirectory, remove_directory};

use self::parameters::{Values, entries};
use self::state::{AdapterState, State};
use super::CausalLmLoss;
use super::check::device;
use super::numbers::{self, StepNumbers};
use super::trainer::Trainer;
use crate::error::LlamaError;
use crate::file::{self, unwritten};
use crate::weights::writer;

pub(super) use self::fingerprint::Fingerprint;
pub use self::state::CheckpointDifference;
pub(super) use self::state::Progress;

const STATE_FILE: &str = "trainer_state.json";
const TENSOR_FILE: &str = "trainer.safetensors";
const PREFIX: &str = "checkpoint-";

/// A checkpoint that [`Trainer::save`] wrote.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Its directory.
    pub path: PathBuf,
    /// The steps that had been made.
    pub step: usize,
    /// The loss of the [`evaluate`](Trainer::evaluate) at this step, if there was one.
    pub eval_loss: Option<f64>,
}

impl Checkpoint {
    /// The checkpoints in `directory`, in the order of their steps. None if there is no such directory.
    ///
    /// # Errors
    /// [`LlamaError::ReadFile`] and [`LlamaError::Json`] if something in it cannot be read.
    pub fn list(directory: impl AsRef<Path>) -> Result<Vec<Self>, LlamaError> {
        let directory = directory.as_ref();
        let unread = |source| LlamaError::ReadFile { path: directory.into(), source, hint: HINT };
        let entries = match fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
            Err(error) => return Err(unread(error)),
        };
        let mut found = vec![];
        for entry in entries {
            let path = entry.map_err(unread)?.path();
            if is_named(&path) {
                found.extend(Self::open(&path)?);
            }
        }
        found.sort_by_key(|checkpoint| checkpoint.step);
        Ok(found)
    }

    /// The one with the most steps.
    ///
    /// # Errors
    /// As [`list`](Self::list).
    pub fn latest(directory: impl AsRef<Path>) -> Result<Option<Self>, LlamaError> {
        Ok(Self::list(directory)?.pop())
    }

    /// The one with the least loss of an evaluation at its step.
    ///
    /// # Errors
    /// As [`list`](Self::list).
    pub fn best(directory: impl AsRef<Path>) -> Result<Option<Self>, LlamaError> {
        Ok(best(&Self::list(directory)?).cloned())
    }

    /// What `directory` is, `None` if no checkpoint.
    fn open(directory: &Path) -> Result<Option<Self>, LlamaError> {
        let Some(state) = State::read(directory)? else { return Ok(None) };
        let step = state.progress.step;
        Ok(Some(Self { path: directory.into(), step, eval_loss: state.progress.loss_at(step) }))
    }
}

const HINT: &str = "expected the directory that the checkpoints are in";

fn best(checkpoints: &[Checkpoint]) -> Option<&Checkpoint> {
    let loss = |checkpoint: &&Checkpoint| checkpoint.eval_loss.filter(|loss| !loss.is_nan());
    let measured = checkpoints.iter().filter(|checkpoint| loss(checkpoint).is_some());
    measured.min_by(|a, b| loss(a).partial_cmp(&loss(b)).unwrap_or(std::cmp::Ordering::Equal))
}

/// Writes a checkpoint and removes those that are not to be kept.
pub(super) fn save<M: CausalLmLoss>(
    trainer: &mut Trainer,
    model: &M,
    directory: &Path,
) -> Result<PathBuf, LlamaError> {
    let place = directory.join(format!("{PREFIX}{}", trainer.progress.step));
    check_place(directory, &place, trainer.progress.step)?;
    if !device(model)?.is_autodiff() || model.adapters().iter().any(|adapter| adapter.merged) {
        let hint =
            "a checkpoint is of the model that is trained: not of `valid()`, and with no adapter merged";
        return Err(LlamaError::NotTrainable { hint });
    }
    numbers::read(&trainer.unread, model)?;
    let started = match trainer.started.take() {
        Some(started) => started,
        None => trainer.start(model)?,
    };
    let started = trainer.started.insert(started);
    let optimizer = optimizer::to_state(&started.optimizer, model, trainer.progress.step)?;
    let fingerprint = match trainer.fingerprint.take() {
        Some(fingerprint) => fingerprint,
        None => Fingerprint::of(model, trainer)?,
    };
    let fingerprint = trainer.fingerprint.insert(fingerprint).clone();
    let mut tensors = entries(model, trainer.progress.step)?;
    tensors.extend(optimizer.tensors);
    let state = State::new(trainer, adapters(model), fingerprint, optimizer.parameters)?;

    let staged = StagedDirectory::beside(&place).map_err(unwritten(&place))?;
    if !state.adapters.is_empty() {
        model.save_adapters(staged.path())?;
    }
    let writer = file::writer(staged.path())?;
    let path = staged.path().join(TENSOR_FILE);
    file::put(writer::write(&writer, &path, tensors)?, &path)?;
    let path = staged.path().join(STATE_FILE);
    file::put(file::stage(&writer, &path, &state.to_json())?, &path)?;
    drop(writer);
    staged.replace().map_err(unwritten(&place))?;
    prune(directory, trainer.config.save_total_limit)?;
    Ok(place)
}

/// Refuses to save beside what belongs to another training: a later step would be taken for this training's last one.
fn check_place(directory: &Path, place: &Path, step: usize) -> Result<(), LlamaError> {
    let later = readable(directory).into_iter().find(|checkpoint| checkpoint.step > step);
    let is_other = place.exists() && !matches!(Checkpoint::open(place), Ok(Some(_)));
    let in_the_way = later.map(|later| later.path).or_else(|| is_other.then(|| place.into()));
    match in_the_way {
        Some(path) => Err(LlamaError::CheckpointInTheWay { path, step }),
        None => Ok(()),
    }
}

/// The checkpoints in `directory` that can be read, in the order of their steps. Others are none of this trainer.
fn readable(directory: &Path) -> Vec<Checkpoint> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let named = entries.filter(|path| is_named(path));
    let mut found: Vec<_> = named.filter_map(|path| Checkpoint::open(&path).ok().flatten()).collect();
    found.sort_by_key(|checkpoint| checkpoint.step);
    found
}

fn is_named(path: &Path) -> bool {
    file::name(path).strip_prefix(PREFIX).is_some_and(|step| step.parse::<usize>().is_ok())
}

/// Removes the checkpoints that are not to be kept.
fn prune(directory: &Path, limit: Option<usize>) -> Result<(), LlamaError> {
    let Some(limit) = limit else { return Ok(()) };
    let checkpoints = readable(directory);
    let best = best(&checkpoints).map(|best| best.step);
    let old = &checkpoints[..checkpoints.len().saturating_sub(limit)];
    for Checkpoint { path, .. } in old.iter().filter(|checkpoint| Some(checkpoint.step) != best) {
        remove_directory(path).map_err(unwritten(path))?;
    }
    Ok(())
}

fn adapters<M: Module>(model: &M) -> Vec<AdapterState> {
    let state = |adapter: burn_peft::AdapterStatus| AdapterState {
        name: adapter.name,
        active: adapter.active,
        scale: adapter.scale,
        config: adapter.config,
    };
    model.adapters().into_iter().map(state).collect()
}

/// Sets `model` and `trainer`, which has made no step, to the checkpoint in `directory`.
pub(super) fn resume<M: CausalLmLoss>(
    directory: &Path,
    model: &mut M,
    mut trainer: Trainer,
) -> Result<Trainer, LlamaError> {
    let none = || LlamaError::NoCheckpoint { path: directory.into() };
    let path = match Checkpoint::open(directory)? {
        Some(checkpoint) => checkpoint.path,
        None => Checkpoint::latest(directory)?.ok_or_else(none)?.path,
    };
    let state = State::read(&path)?.ok_or_else(none)?;
    state.check(&path)?;
    let values = Values::open(&path.join(TENSOR_FILE))?;

    let mut differences = state.differences(&trainer)?;
    differences.extend(state.fingerprint.differences(model, &trainer, &values)?);
    let mut missing = vec![];
    for adapter in &state.adapters {
        match model.adapters().into_iter().find(|present| present.name == adapter.name) {
            Some(present) => differences.extend(adapter.differences(&present.config)),
            None => missing.push(adapter),
        }
    }
    let is_known = |name: &str| state.adapters.iter().any(|adapter| adapter.name == name);
    for present in model.adapters().into_iter().filter(|present| !is_known(&present.name)) {
        differences.push(CheckpointDifference::new(format!("adapter `{}`", present.name), "none", "one"));
    }
    refuse(&path, differences)?;

    let mut resumed = model.clone();
    for AdapterState { name, config, .. } in missing {
        resumed.add_adapter(name, PeftConfig::clone(config))?;
    }
    for AdapterState { name, scale, .. } in &state.adapters {
        resumed.set_scale(name, *scale)?;
    }
    if !state.adapters.is_empty() {
        let active = state.adapters.iter().filter(|adapter| adapter.active);
        resumed.set_adapter(&active.map(|adapter| &*adapter.name).collect::<Vec<_>>())?;
    }
    refuse(&path, values.differences(&resumed, &state.optimizer))?;
    let resumed = values.fill(resumed);
    trainer.progress = state.progress;
    let mut started = trainer.start(&resumed)?;
    started.optimizer = optimizer::from_state(started.optimizer, &resumed, &state.optimizer, &values)?;
    let device = device(&resumed)?.inner();
    let first = trainer.progress.step + 1 - state.unread.len();
    let unread = state.unread.iter().enumerate().map(|(i, unread)| StepNumbers {
        step: first + i,
        examples: vec![],
        loss: Tensor::from_data([unread.loss], &device),
        num_targets: unread.num_targets,
        squares: None,
    });
    trainer.unread = unread.collect();
    trainer.started = Some(started);
    trainer.fingerprint = Some(state.fingerprint);
    *model = resumed;
    Ok(trainer)
}

fn refuse(path: &Path, differences: Vec<CheckpointDifference>) -> Result<(), LlamaError> {
    match differences.is_empty() {
        true => Ok(()),
        false => Err(LlamaError::CheckpointDiffers { path: path.into(), differences }),
    }
}
