//! Entries of a configuration file without effect on the computation.

use serde_json::{Map, Value};

use super::field::{Field, Hint, fields};

/// Entries of `adapter_config.json` without an effect on the computation.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Default)]
pub struct FileFields {
    /// The base model's directory or hub id, for later readers of the adapter. Default: unknown.
    pub base_model_name_or_path: Option<String>,
    /// PEFT's `task_type`, `CAUSAL_LM` for a language model. Default: unset.
    pub task_type: Option<String>,
    /// Entries to be written back as they were read.
    kept: Map<String, Value>,
}

const FIELDS: &[Field<FileFields>] = fields! { base_model_name_or_path, task_type };

/// Keys of every kind of adapter whose values are kept.
const KEPT: &[&str] = &["auto_mapping", "revision"];

impl FileFields {
    pub(super) fn read(&mut self, key: &str, value: &Value) -> Option<Result<(), Hint>> {
        if KEPT.contains(&key) {
            self.keep(key, value);
            return Some(Ok(()));
        }
        Field::read_into(FIELDS, self, key, value)
    }

    /// Keeps an entry, to be written as it was read.
    pub(crate) fn keep(&mut self, key: &str, value: &Value) {
        if !value.is_null() {
            self.kept.insert(key.to_string(), value.clone());
        }
    }

    pub(super) fn write(&self) -> Map<String, Value> {
        let mut map = Field::write_all(FIELDS, self);
        map.extend(KEPT.iter().map(|key| (key.to_string(), Value::Null)));
        map.extend(self.kept.clone());
        map
    }
}
