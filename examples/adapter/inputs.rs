//! A base and adapters that fit it, checked before any weight is read.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use burn_peft::{AdapterDirectory, TensorRole};
use burn_peft_examples::model;

use crate::base::BaseFiles;
use crate::cli::name_of;
use crate::inspect::refusals;
use crate::numbers::count;

/// What a command works on.
pub struct Inputs {
    pub model: PathBuf,
    pub base: BaseFiles,
    /// Adapters with their weights.
    pub adapters: Vec<(AdapterDirectory, f64)>,
}

impl Inputs {
    /// Opens a base and adapters, by their directories or by their names on the Hub.
    ///
    /// # Errors
    /// The base or an adapter cannot be found or used, they do not fit together, or there are not as many weights as adapters.
    pub fn open(base: &Path, adapters: &[PathBuf], weights: &[f64]) -> Result<Self> {
        let model = model::directory(base, "")?;
        let base = BaseFiles::open(&model)?;
        let weights = match weights.len() {
            0 => vec![1.0; adapters.len()],
            n if n == adapters.len() => weights.to_vec(),
            n => {
                bail!(
                    "expected as many weights as adapters, found {n} for {}",
                    count(adapters.len(), "adapter")
                )
            }
        };
        let mut opened = vec![];
        for (path, weight) in adapters.iter().zip(weights) {
            let path = model::adapter(path)?;
            let adapter = AdapterDirectory::open(&path)?;
            let refusals = refusals(&adapter.problems());
            if !refusals.is_empty() {
                bail!("cannot use the adapter `{}`:\n{}", path.display(), refusals.trim_end());
            }
            base.check(&adapter)?;
            opened.push((adapter, weight));
        }
        check_copies(&opened)?;
        Ok(Self { model, base, adapters: opened })
    }

    /// The directories of the adapters with their weights.
    pub fn paths(&self) -> Vec<(&Path, f64)> {
        self.adapters.iter().map(|(adapter, weight)| (adapter.path(), *weight)).collect()
    }

    /// Whether a merged model needs a table for each end, if the base is tied as its configuration says.
    pub fn unties(&self) -> bool {
        self.adapters.iter().any(|(adapter, _)| self.base.config.needs_untying(adapter))
    }
}

/// Finds copies of parameters that cannot be merged as it was asked.
///
/// # Errors
/// Two adapters have a copy of one parameter, or one that has copies is weighted.
fn check_copies(adapters: &[(AdapterDirectory, f64)]) -> Result<()> {
    let weighted = adapters.iter().any(|(_, weight)| *weight != 1.0);
    let mut owners: BTreeMap<&str, &AdapterDirectory> = BTreeMap::new();
    for (adapter, _) in adapters {
        let copies = adapter.tensors().iter().filter(|tensor| tensor.role == TensorRole::Copy);
        for key in copies.map(|tensor| &*tensor.key) {
            let shown = adapter.path().display();
            if weighted {
                bail!(
                    "the adapter `{shown}` has a trained copy of a parameter, which cannot be weighted: `{key}`\n\
                     hint: leave `--weights` out"
                );
            }
            if let Some(owner) = owners.insert(key, adapter) {
                bail!(
                    "the adapters `{}` and `{shown}` both have a trained copy of one parameter: `{key}`\n\
                     hint: merge one of them",
                    owner.path().display()
                );
            }
        }
    }
    Ok(())
}

impl fmt::Display for Inputs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (model, dtype) = (self.model.display(), name_of(self.base.dtype));
        writeln!(f, "base     {model}: {}, {dtype}", count(self.base.num_params(), "parameter"))?;
        let is_weighted = self.adapters.iter().any(|(_, weight)| *weight != 1.0);
        for (adapter, weight) in &self.adapters {
            write!(f, "adapter  {}: {}", adapter.path().display(), count(adapter.modules().len(), "module"))?;
            if let Some(config) = adapter.config().as_lora() {
                write!(f, ", r {}, lora_alpha {}", config.r, config.lora_alpha)?;
            }
            if is_weighted { writeln!(f, ", weight {weight}")? } else { writeln!(f)? }
        }
        Ok(())
    }
}
