use std::collections::BTreeMap;
use std::fmt;

use crate::adapter::Update;
use crate::lora::LoraConfig;
use crate::seam::States;
use crate::summary::thousands;

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
    /// Modules with an update of low rank.
    pub modules: usize,
    /// Parameters that are replaced by trained copies.
    pub copied_parameters: usize,
    /// Its parameters, active or not.
    pub num_params: usize,
    /// How it was configured.
    pub config: LoraConfig,
}

impl AdapterStatus {
    /// Of every adapter, sorted by name.
    pub(crate) fn list(states: &States) -> Vec<Self> {
        let mut found: BTreeMap<&str, Self> = BTreeMap::new();
        for state in states.values() {
            for adapter in &state.list {
                let info = &adapter.info;
                let status = found.entry(&info.name).or_insert_with(|| Self {
                    name: info.name.to_string(),
                    active: info.active,
                    merged: false,
                    modules: 0,
                    copied_parameters: 0,
                    num_params: 0,
                    config: LoraConfig::clone(&info.config),
                });
                status.merged |= state.is_merged(&info.name);
                status.num_params += adapter.num_elements();
                match adapter.update {
                    Update::LowRank(_) => status.modules += 1,
                    Update::Copy(_) => status.copied_parameters += 1,
                    Update::Shift(_) => {}
                }
            }
        }
        found.into_values().collect()
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
            "{}: {state}, rank {}, alpha {}, {} modules, {} parameters",
            self.name,
            self.config.r,
            self.config.lora_alpha,
            self.modules,
            thousands(self.num_params)
        )
    }
}
