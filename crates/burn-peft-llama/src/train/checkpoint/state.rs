//! `trainer_state.json`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use burn_peft::PeftConfig;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::STATE_FILE;
use super::fingerprint::Fingerprint;
use super::optimizer::ParameterState;
use crate::batch::{Collator, PaddingSide};
use crate::error::LlamaError;
use crate::file;
use crate::packing::Packing;
use crate::train::TrainingConfig;
use crate::train::mean_loss::scalar;
use crate::train::trainer::Trainer;

/// Options that change nothing in what is learnt.
const FREE: [&str; 2] = ["log_every", "save_total_limit"];

/// Something in which a checkpoint and the training that is to go on from it differ.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointDifference {
    /// What differs.
    pub what: String,
    /// How it is in the checkpoint.
    pub checkpoint: String,
    /// How it is now.
    pub now: String,
}

impl CheckpointDifference {
    pub(super) fn new(
        what: impl Into<String>,
        checkpoint: impl Into<String>,
        now: impl Into<String>,
    ) -> Self {
        Self { what: what.into(), checkpoint: checkpoint.into(), now: now.into() }
    }

    /// One for each key of which two objects have different values.
    fn between(of: &str, checkpoint: &Map<String, Value>, now: &Map<String, Value>) -> Vec<Self> {
        let keys = checkpoint.keys().chain(now.keys().filter(|key| !checkpoint.contains_key(*key)));
        let value = |map: &Map<String, Value>, key| map.get(key).map_or("none".into(), Value::to_string);
        keys.filter(|key| checkpoint.get(*key) != now.get(*key))
            .map(|key| Self::new(format!("{of}`{key}`"), value(checkpoint, key), value(now, key)))
            .collect()
    }
}

impl fmt::Display for CheckpointDifference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} in the checkpoint, {} now", self.what, self.checkpoint, self.now)
    }
}

/// How far a training is.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(in crate::train) struct Progress {
    pub(in crate::train) step: usize,
    pub(in crate::train) num_tokens: usize,
    /// Time spent in steps.
    pub(in crate::train) seconds: f64,
    pub(in crate::train) last: Option<Evaluated>,
    pub(in crate::train) best: Option<Evaluated>,
    pub(in crate::train) evaluations_since_best: usize,
}

/// An evaluation.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(in crate::train) struct Evaluated {
    pub(in crate::train) step: usize,
    pub(in crate::train) loss: f64,
}

impl Progress {
    pub(in crate::train) fn evaluated(&mut self, loss: f64) {
        let now = Evaluated { step: self.step, loss };
        self.last = Some(now);
        if self.best.is_none_or(|best| loss < best.loss) {
            (self.best, self.evaluations_since_best) = (Some(now), 0);
        } else {
            self.evaluations_since_best += 1;
        }
    }

    /// The loss of the evaluation at this step, if there was one.
    pub(super) fn loss_at(&self, step: usize) -> Option<f64> {
        self.last.filter(|last| last.step == step).map(|last| last.loss)
    }
}

/// The loss of a step that has yet to be reported.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct UnreadLoss {
    pub(super) loss: f32,
    pub(super) num_targets: usize,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct AdapterState {
    pub(super) name: String,
    pub(super) active: bool,
    pub(super) scale: f64,
    pub(super) config: PeftConfig,
}

impl AdapterState {
    /// What of the adapter's configuration is not as it was, but for the name of the base: the base itself is compared,
    /// and it may have moved.
    pub(super) fn differences(&self, now: &PeftConfig) -> Vec<CheckpointDifference> {
        let (mut checkpoint, mut now) = (object(&self.config), object(now));
        for names in [&mut checkpoint, &mut now] {
            names.remove("base_model_name_or_path");
            names.remove("revision");
        }
        CheckpointDifference::between(&format!("adapter `{}`, ", self.name), &checkpoint, &now)
    }
}

/// All of a training but its tensors.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct State {
    /// Of this crate.
    version: String,
    #[serde(flatten)]
    pub(super) progress: Progress,
    pub(super) unread: Vec<UnreadLoss>,
    config: Map<String, Value>,
    collator: Map<String, Value>,
    pub(super) adapters: Vec<AdapterState>,
    #[serde(flatten)]
    pub(super) fingerprint: Fingerprint,
    pub(super) optimizer: BTreeMap<String, ParameterState>,
}

impl State {
    pub(super) fn new(
        trainer: &Trainer,
        adapters: Vec<AdapterState>,
        fingerprint: Fingerprint,
        optimizer: BTreeMap<String, ParameterState>,
    ) -> Result<Self, LlamaError> {
        let unread = trainer.unread.iter().map(|step| {
            Ok(UnreadLoss { loss: scalar(step.loss.clone())? as f32, num_targets: step.num_targets })
        });
        Ok(Self {
            version: version(),
            progress: trainer.progress.clone(),
            unread: unread.collect::<Result<_, LlamaError>>()?,
            config: of_config(&trainer.config),
            collator: of_collator(&trainer.collator),
            adapters,
            fingerprint,
            optimizer,
        })
    }

    /// The state in the directory of a checkpoint, `None` if it has none.
    pub(super) fn read(directory: &Path) -> Result<Option<Self>, LlamaError> {
        let path = directory.join(STATE_FILE);
        let text = file::read_optional(&path, "it belongs to a checkpoint of the trainer")?;
        text.map(|text| file::parse(&path, &text)).transpose()
    }

    /// # Errors
    /// [`LlamaError::CheckpointDamaged`] for counters that no training can have.
    pub(super) fn check(&self, directory: &Path) -> Result<(), LlamaError> {
        let Progress { step, seconds, .. } = self.progress;
        let damaged = |what: String| LlamaError::CheckpointDamaged { path: directory.join(STATE_FILE), what };
        if self.unread.len() > step {
            return Err(damaged(format!("{} losses of {step} steps", self.unread.len())));
        }
        if !(seconds.is_finite() && (0.0..1e12).contains(&seconds)) {
            return Err(damaged(format!("{seconds} seconds")));
        }
        Ok(())
    }

    pub(super) fn to_json(&self) -> String {
        format!("{:#}\n", json!(self))
    }

    /// What of the options and the crate is not as it is now.
    pub(super) fn differences(&self, trainer: &Trainer) -> Result<Vec<CheckpointDifference>, LlamaError> {
        let mut found = vec![];
        if self.version != version() {
            found.push(CheckpointDifference::new("burn-peft-llama", &self.version, version()));
        }
        found.extend(CheckpointDifference::between("", &self.config, &of_config(&trainer.config)));
        found.extend(CheckpointDifference::between(
            "collator, ",
            &self.collator,
            &of_collator(&trainer.collator),
        ));
        Ok(found)
    }
}

fn version() -> String {
    env!("CARGO_PKG_VERSION").to_string()
}

fn of_config(config: &TrainingConfig) -> Map<String, Value> {
    let mut object = object(config);
    FREE.iter().for_each(|option| drop(object.remove(*option)));
    object
}

fn of_collator(collator: &Collator) -> Map<String, Value> {
    let Collator { pad_token_id, side, max_length, truncate, packing } = collator;
    let packing = match packing {
        Packing::Padded => "padded",
        Packing::Packed => "packed",
        Packing::SharedPrefix => "shared_prefix",
    };
    let side = match side {
        PaddingSide::Right => "right",
        PaddingSide::Left => "left",
    };
    object(&json!({
        "pad_token_id": pad_token_id,
        "side": side,
        "max_length": max_length,
        "truncate": truncate,
        "packing": packing,
    }))
}

/// A value as a file has it.
fn object(value: &impl Serialize) -> Map<String, Value> {
    match json!(value) {
        Value::Object(map) => map,
        other => Map::from_iter([("value".to_string(), other)]),
    }
}
