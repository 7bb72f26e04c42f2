//! What is known of a saved adapter's training, beside what PEFT's files say.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use burn_peft_examples::output;

const FILE: &str = "experiment.json";

/// Written into the adapter's directory; PEFT's loaders pass over it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// The seed of the split.
    pub seed: u64,
    /// The split's fingerprint: the seed says what was held out only for the same species. Empty if it is not known.
    #[serde(default)]
    pub split: String,
}

impl Provenance {
    pub fn write(&self, adapter: &Path) -> Result<()> {
        output::write(&adapter.join(FILE), serde_json::to_string_pretty(self)? + "\n")
    }

    /// Removes what is known of the adapter that was saved there before, if any.
    pub fn forget(adapter: &Path) -> Result<()> {
        output::remove(&adapter.join(FILE))
    }

    /// `None` for an adapter that was trained elsewhere.
    pub fn read(adapter: &Path) -> Result<Option<Self>> {
        let path = adapter.join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let text =
            fs::read_to_string(&path).with_context(|| format!("`{}` cannot be read", path.display()))?;
        Ok(Some(serde_json::from_str(&text).with_context(|| format!("`{}` is damaged", path.display()))?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn provenance() -> Provenance {
        Provenance { seed: 7, split: "0123456789abcdef".into() }
    }

    #[test]
    fn what_is_known_comes_back_and_a_foreign_adapter_has_none() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Provenance::read(dir.path()).unwrap(), None);
        provenance().write(dir.path()).unwrap();
        assert_eq!(Provenance::read(dir.path()).unwrap(), Some(provenance()));
        fs::write(dir.path().join(FILE), "{").unwrap();
        assert!(Provenance::read(dir.path()).is_err());
    }

    #[test]
    fn what_is_forgotten_need_not_have_been_known() {
        let dir = tempfile::tempdir().unwrap();
        provenance().write(dir.path()).unwrap();
        Provenance::forget(dir.path()).unwrap();
        assert_eq!(Provenance::read(dir.path()).unwrap(), None);
        Provenance::forget(dir.path()).unwrap();
        Provenance::forget(&dir.path().join("none")).unwrap();
    }
}
