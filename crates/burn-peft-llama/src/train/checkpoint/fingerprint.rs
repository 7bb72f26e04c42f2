//! What tells one base model, or one set of examples, from another.

use std::collections::BTreeMap;

use burn::module::Module;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::parameters::{Values, is_saved};
use super::state::CheckpointDifference;
use crate::conversation::Example;
use crate::error::LlamaError;
use crate::parameters::{Parameter, parameters};
use crate::train::trainer::Trainer;

/// Elements of a parameter that are looked at: enough for any other training of the base to show.
const SAMPLE: usize = 64;

/// What a training depends on that is not in its checkpoints.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::train) struct Fingerprint {
    examples: Examples,
    /// Of each frozen parameter of the base, by its name: type, shape, and a digest of some of its elements.
    base: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Examples {
    count: usize,
    tokens: usize,
    /// Of all tokens and labels.
    sha256: String,
}

impl Fingerprint {
    pub(super) fn of<M: Module>(model: &M, trainer: &Trainer) -> Result<Self, LlamaError> {
        let frozen = parameters(model).into_iter().filter(|parameter| !is_saved(parameter));
        let base = frozen.map(|parameter| Ok((parameter.name.clone(), of_parameter(&parameter)?)));
        Ok(Self { examples: Examples::of(&trainer.examples), base: base.collect::<Result<_, LlamaError>>()? })
    }

    /// What of `model`, whose adapters may not be there yet, and of the examples is not as it was.
    pub(super) fn differences<M: Module>(
        &self,
        model: &M,
        trainer: &Trainer,
        values: &Values,
    ) -> Result<Vec<CheckpointDifference>, LlamaError> {
        let mut found = vec![];
        let now = Examples::of(&trainer.examples);
        if now != self.examples {
            let text =
                |e: &Examples| format!("{} with {} tokens, SHA-256 {:.12}", e.count, e.tokens, e.sha256);
            found.push(CheckpointDifference::new("examples", text(&self.examples), text(&now)));
        }
        let mut present = vec![];
        for parameter in parameters(model).into_iter().filter(|parameter| !parameter.adapter) {
            let name = &parameter.name;
            if let Some(checkpoint) = self.base.get(name) {
                let now = of_parameter(&parameter)?;
                if now != *checkpoint {
                    found.push(CheckpointDifference::new(format!("`{name}`"), checkpoint, now));
                }
            } else if !values.has(name) {
                found.push(CheckpointDifference::new(format!("`{name}`"), "none", "one"));
            }
            present.push(parameter.name);
        }
        let missing = self.base.iter().filter(|(name, _)| !present.contains(name));
        found.extend(missing.map(|(name, of)| CheckpointDifference::new(format!("`{name}`"), of, "none")));
        Ok(found)
    }
}

impl Examples {
    fn of(examples: &[Example]) -> Self {
        let mut digest = Sha256::new();
        for Example { input_ids, labels } in examples {
            digest.update((input_ids.len() as u64).to_le_bytes());
            input_ids.iter().for_each(|id| digest.update(id.to_le_bytes()));
            labels.iter().for_each(|label| digest.update(label.to_le_bytes()));
        }
        let tokens = examples.iter().map(|example| example.input_ids.len()).sum();
        Self { count: examples.len(), tokens, sha256: hex(&digest.finalize()) }
    }
}

fn of_parameter(parameter: &Parameter) -> Result<String, LlamaError> {
    let sample = (parameter.sample)(SAMPLE)?;
    let digest = hex(&Sha256::digest(sample.as_bytes()));
    Ok(format!("{:?}{:?} {:.12}", sample.dtype(), parameter.shape, digest))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
