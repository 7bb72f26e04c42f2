//! All adapters of a model: facts about them, and edits of them.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use crate::adapter::{Adapter, Adapters};
use crate::config::PeftConfig;
use crate::error::PeftError;
use crate::layer::Space;

/// The states of a model by the path of their parameter, `….q_proj.weight`.
#[derive(Debug, Default)]
pub(crate) struct States(BTreeMap<String, Adapters>);

/// What is true of an adapter as a whole.
pub(crate) struct Facts<'a> {
    pub(crate) config: &'a Arc<PeftConfig>,
    pub(crate) is_active: bool,
    pub(crate) is_merged: bool,
    /// The factor of [`set_scale`](crate::PeftModel::set_scale).
    pub(crate) scale: f64,
}

impl Deref for States {
    type Target = BTreeMap<String, Adapters>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for States {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl States {
    /// The adapters by name.
    pub(crate) fn facts(&self) -> BTreeMap<&str, Facts<'_>> {
        let mut found: BTreeMap<&str, Facts> = BTreeMap::new();
        for state in self.values() {
            for Adapter { info, .. } in &state.list {
                let facts = found.entry(&info.name).or_insert_with(|| Facts {
                    config: &info.config,
                    is_active: info.active,
                    is_merged: false,
                    scale: info.scale,
                });
                debug_assert_eq!(facts.is_active, info.active, "`{}` is active in part", info.name);
                facts.is_merged |= state.is_merged(&info.name);
            }
        }
        found
    }

    /// The parts of the adapter `name`, with the paths of their parameters.
    pub(crate) fn of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a String, &'a Adapter)> {
        self.iter().filter_map(move |(path, state)| Some((path, state.get(name)?)))
    }

    /// # Errors
    /// [`PeftError::UnknownAdapter`].
    pub(crate) fn require(&self, name: &str) -> Result<(), PeftError> {
        let facts = self.facts();
        if facts.contains_key(name) {
            return Ok(());
        }
        let available = facts.into_keys().map(str::to_string).collect();
        Err(PeftError::UnknownAdapter { name: name.to_string(), available })
    }

    /// # Errors
    /// [`PeftError::MergedAdapter`] for the first merged adapter of those that `counts`.
    pub(crate) fn refuse_merged(&self, counts: impl Fn(&str) -> bool) -> Result<(), PeftError> {
        match self.facts().into_iter().find(|(name, facts)| facts.is_merged && counts(name)) {
            Some((name, _)) => Err(PeftError::MergedAdapter { name: name.to_string() }),
            None => Ok(()),
        }
    }

    /// # Errors
    /// [`PeftError::RowsNameAdapters`] if the adapters at work are not the same for all rows of a batch.
    pub(crate) fn refuse_rows(&self) -> Result<(), PeftError> {
        match self.values().flat_map(|state| &state.rows).next() {
            Some((name, _)) => Err(PeftError::RowsNameAdapters { name: name.to_string() }),
            None => Ok(()),
        }
    }

    /// Makes exactly these adapters active; what was merged or bound to rows of a batch is neither any more.
    ///
    /// # Errors
    /// [`PeftError::ConflictingCopies`] if two of them cannot both act on one parameter. Nothing has changed then.
    pub(crate) fn activate(&mut self, names: &[&str]) -> Result<(), PeftError> {
        self.check_exclusive(names)?;
        for state in self.values_mut() {
            state.merged = None;
            state.rows.clear();
            for adapter in &mut state.list {
                let active = names.contains(&&*adapter.info.name);
                *adapter = adapter.clone().set_active(active);
            }
        }
        Ok(())
    }

    /// Removes the adapter `name`.
    pub(crate) fn remove_adapter(&mut self, name: &str) {
        for state in self.values_mut() {
            state.list.retain(|adapter| &*adapter.info.name != name);
            state.rows.retain(|(adapter, _)| &**adapter != name);
        }
    }

    fn check_exclusive(&self, names: &[&str]) -> Result<(), PeftError> {
        let mut owners = BTreeSet::new();
        let mut parameters = vec![];
        for (path, state) in self.iter() {
            let exclusive = state.list.iter().filter(|adapter| {
                names.contains(&&*adapter.info.name)
                    && adapter.updates.iter().any(|update| update.method.is_exclusive())
            });
            let exclusive: Vec<&str> = exclusive.map(|adapter| &*adapter.info.name).collect();
            if exclusive.len() > 1 {
                owners.extend(exclusive.into_iter().map(str::to_string));
                parameters.push(path.clone());
            }
        }
        if parameters.is_empty() {
            return Ok(());
        }
        Err(PeftError::ConflictingCopies { names: owners.into_iter().collect(), parameters })
    }

    /// # Errors
    /// [`PeftError::MergedAdapter`]; [`PeftError::MixedBatch`] if only some rows of a batch cannot be computed with these
    /// adapters.
    pub(crate) fn check_mixed_batch(&self, names: &BTreeSet<&str>) -> Result<(), PeftError> {
        self.refuse_merged(|_| true)?;
        for name in names {
            for (_, adapter) in self.of(name) {
                let refuse = |reason| Err(PeftError::MixedBatch { name: name.to_string(), reason });
                let module = &adapter.info.site.module;
                if adapter.replaces() {
                    return refuse(format!("it replaces a parameter of `{module}` for all rows"));
                }
                if adapter.info.site.space == Space::Weight {
                    return refuse(format!("`{module}` is a plain layer, whose weight all rows share"));
                }
                if !adapter.updates.iter().all(|update| update.method.allows_mixed_batches()) {
                    return refuse(format!("its change of `{module}` applies to all rows, as in PEFT"));
                }
            }
        }
        Ok(())
    }
}
