//! The state of an optimizer by the names of the parameters. Burn keeps it by their ids, which every process draws anew.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::optim::ModuleOptimizer;
use burn::optim::record::OptimizerRecord;
use burn::tensor::{Bytes, TensorData};
use burn_pack::{Reader, Scalar, Writer};
use serde::{Deserialize, Serialize};

use super::parameters::{Values, refuse_other_numbers};
use crate::error::LlamaError;
use crate::parameters::parameters;
use crate::weights::writer::Entry;

/// What an optimizer knows about one parameter.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct ParameterState {
    /// Counts, such as that of the steps.
    scalars: BTreeMap<String, Scalar>,
    /// What its tensors are called behind the name of the parameter.
    pub(super) tensors: Vec<String>,
}

impl ParameterState {
    /// The rank of the parameter as Burn noted it.
    pub(super) fn rank(&self) -> Option<usize> {
        self.scalars.get("__rank").and_then(|rank| usize::try_from(*rank).ok())
    }
}

#[derive(Default)]
pub(super) struct OptimizerState {
    pub(super) parameters: BTreeMap<String, ParameterState>,
    pub(super) tensors: Vec<Entry>,
}

/// The name of a tensor in the file.
pub(super) fn key(parameter: &str, tensor: &str) -> String {
    format!("optimizer.{parameter}.{tensor}")
}

/// The state of `optimizer`. What it knows of parameters that `model` does not have any more is left out.
///
/// # Errors
/// [`LlamaError::NotFinite`] if one of its numbers is infinite or not a number.
pub(super) fn to_state<M: Module>(
    optimizer: &ModuleOptimizer,
    model: &M,
    step: usize,
) -> Result<OptimizerState, LlamaError> {
    let names: BTreeMap<u64, String> =
        parameters(model).into_iter().map(|parameter| (parameter.id.val(), parameter.name)).collect();
    let find = |key: &str| {
        let (id, rest) = key.split_once('.')?;
        Some((names.get(&id.parse().ok()?)?.clone(), rest.to_string()))
    };
    let reader = Reader::from_bytes(optimizer.into_bytes().map_err(failed)?).map_err(failed)?;
    let mut state = OptimizerState::default();
    for (key, value) in reader.scalars() {
        if let Some((name, scalar)) = find(key) {
            state.parameters.entry(name).or_default().scalars.insert(scalar, *value);
        }
    }
    for tensor in reader.into_tensors().map_err(failed)? {
        let (key, dtype, shape, _, bytes) = tensor.into_parts().map_err(failed)?;
        if let Some((name, tensor)) = find(&key) {
            let data = TensorData::from_bytes(bytes, shape.clone(), dtype);
            refuse_other_numbers(&data, || format!("the optimizer's `{tensor}` of `{name}`"), step)?;
            let read = Box::new(move || Ok(data.as_bytes().to_vec()));
            let key = self::key(&name, &tensor);
            state.tensors.push(Entry { name: key, shape: shape.to_vec(), dtype, read });
            state.parameters.entry(name).or_default().tensors.push(tensor);
        }
    }
    // Burn has them in the order of a hash table.
    state.tensors.sort_by(|one, other| one.name.cmp(&other.name));
    state.parameters.values_mut().for_each(|parameter| parameter.tensors.sort());
    Ok(state)
}

/// `optimizer`, which has made no step, with the state of a checkpoint.
pub(super) fn from_state<M: Module>(
    optimizer: ModuleOptimizer,
    model: &M,
    state: &BTreeMap<String, ParameterState>,
    values: &Values,
) -> Result<ModuleOptimizer, LlamaError> {
    let (mut tensors, mut scalars, mut names) = (vec![], vec![], vec![]);
    for parameter in parameters(model) {
        let Some(of) = state.get(&parameter.name) else { continue };
        let id = parameter.id.val();
        for tensor in &of.tensors {
            let data = values.get(&key(&parameter.name, tensor));
            let Some((dtype, shape, bytes)) = data else { continue };
            let (name, bytes) = (format!("{id}.{tensor}"), Bytes::from_bytes_vec(bytes.to_vec()));
            tensors.push(burn_pack::Tensor::new(name, dtype, shape.to_vec(), Some(id), bytes));
        }
        scalars.extend(of.scalars.iter().map(|(scalar, value)| (format!("{id}.{scalar}"), *value)));
        names.push((id.to_string(), parameter.name));
    }
    let expected = tensors.len();
    let mut writer = Writer::new(tensors);
    for (key, value) in scalars {
        writer = writer.with_scalar(&key, value);
    }
    for (id, name) in names {
        writer = writer.with_metadata(&id, &name);
    }
    let record = OptimizerRecord::from_bytes(writer.into_bytes().map_err(failed)?).map_err(failed)?;
    let optimizer = optimizer.load_record(record);
    // Burn leaves out what it does not know, without a word.
    let found = optimizer.to_record().len();
    if found != expected {
        return Err(failed(format!("{found} of {expected} tensors of the optimizer were taken up")));
    }
    Ok(optimizer)
}

fn failed(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> LlamaError {
    LlamaError::OptimizerState { source: source.into() }
}
