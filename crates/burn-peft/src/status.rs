//! What each adapter of a model is doing.

use std::collections::BTreeSet;
use std::fmt;

use crate::adapter::Adapter;
use crate::config::PeftConfig;
use crate::states::{Facts, States};
use crate::summary::count;

/// One adapter of a model, as [`PeftModel::adapters`](crate::PeftModel::adapters) lists them. What PEFT's
/// `get_model_status` and `get_layer_status` tell.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterStatus {
    /// The adapter's name.
    pub name: String,
    /// Whether it takes part in the forward pass and is trained.
    pub active: bool,
    /// Whether its update is folded into the weights for now, by
    /// [`merge_adapter`](crate::PeftModel::merge_adapter).
    pub merged: bool,
    /// Modules that it adapts.
    pub modules: usize,
    /// Parameters that are replaced by trained copies.
    pub copied_parameters: usize,
    /// Its parameters, active or not.
    pub num_params: usize,
    /// The factor of [`set_scale`](crate::PeftModel::set_scale), on top of what the configuration says; 1 unless it was set.
    pub scale: f64,
    /// How it was configured.
    pub config: PeftConfig,
}

impl AdapterStatus {
    /// Of every adapter, sorted by name.
    pub(crate) fn list(states: &States) -> Vec<Self> {
        let status = |(name, facts): (&str, Facts)| {
            let parts: Vec<&Adapter> = states.of(name).map(|(_, adapter)| adapter).collect();
            let adapting = parts.iter().filter(|adapter| !adapter.replaces());
            let modules: BTreeSet<&str> = adapting.map(|adapter| &*adapter.info.site.module).collect();
            Self {
                name: name.to_string(),
                active: facts.is_active,
                merged: facts.is_merged,
                modules: modules.len(),
                copied_parameters: parts.iter().filter(|adapter| adapter.replaces()).count(),
                num_params: parts.iter().map(|adapter| adapter.num_params()).sum(),
                scale: facts.scale,
                config: PeftConfig::clone(facts.config),
            }
        };
        states.facts().into_iter().map(status).collect()
    }
}

impl fmt::Display for AdapterStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match (self.active, self.merged) {
            (_, true) => "merged",
            (true, _) => "active",
            _ => "inactive",
        };
        write!(
            f,
            "{}: {state}, {}, {}, {}",
            self.name,
            self.config.kind().describe(),
            count(self.modules, "module"),
            count(self.num_params, "parameter")
        )
    }
}
