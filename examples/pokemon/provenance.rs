//! What is known of a saved adapter's training, beside what PEFT's files say.
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

const FILE: &str = "experiment.json";

/// Written into the adapter's directory; PEFT's loaders pass over it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// The seed of the split: it decides which species were held out.
    pub seed: u64,
}

impl Provenance {
    pub fn write(self, adapter: &Path) -> Result<()> {
        let path = adapter.join(FILE);
        fs::write(&path, serde_json::to_string_pretty(&self)?)
            .with_context(|| format!("`{}` cannot be written", path.display()))
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

    #[test]
    fn the_seed_comes_back_and_a_foreign_adapter_has_none() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Provenance::read(dir.path()).unwrap(), None);
        Provenance { seed: 7 }.write(dir.path()).unwrap();
        assert_eq!(Provenance::read(dir.path()).unwrap(), Some(Provenance { seed: 7 }));
        fs::write(dir.path().join(FILE), "{").unwrap();
        assert!(Provenance::read(dir.path()).is_err());
    }
}
