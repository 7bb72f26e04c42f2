//! Which weights of a model a configuration means: every decision and every error before anything changes.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use burn::tensor::Device;

use crate::adapter::{Adapter, LayerKind};
use crate::error::{PeftError, closest};
use crate::lora::LoraConfig;
use crate::seam::{Layout, States};
use crate::target::{TargetModules, matches_name};

/// What an adapter was attached to.
///
/// Printed, it names what a user may have got wrong: targets that matched nothing.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq)]
pub struct InjectionReport {
    /// The adapter's name.
    pub adapter: String,
    /// The adapted modules, in the model's order.
    pub modules: Vec<AdaptedModule>,
    /// Names of `target_modules` that no module has.
    pub unmatched_targets: Vec<String>,
    /// Names of `exclude_modules` that kept nothing out.
    pub unused_exclusions: Vec<String>,
}

/// One adapted module.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq)]
pub struct AdaptedModule {
    /// The module's path, `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// Rows of its weight: inputs of a linear layer, vocabulary of an embedding.
    pub d_input: usize,
    /// Columns of its weight.
    pub d_output: usize,
    /// Rank of the adapter.
    pub r: usize,
    /// Whether the adapter works on activations ([`LoraLinear`](crate::LoraLinear)) or on the weight (plain layers).
    pub activation_space: bool,
}

impl InjectionReport {
    /// Trainable parameters: `Σ r (d_input + d_output)`.
    pub fn num_params(&self) -> usize {
        self.modules.iter().map(|module| module.r * (module.d_input + module.d_output)).sum()
    }
}

impl fmt::Display for InjectionReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dense = self.modules.iter().filter(|module| !module.activation_space).count();
        write!(f, "adapter `{}`: {} modules adapted", self.adapter, self.modules.len())?;
        if dense > 0 {
            write!(f, ", {dense} of them through their dense weight")?;
        }
        if !self.unmatched_targets.is_empty() {
            write!(f, "; no module is named {}", self.unmatched_targets.join(", "))?;
        }
        if !self.unused_exclusions.is_empty() {
            write!(f, "; nothing was excluded by {}", self.unused_exclusions.join(", "))?;
        }
        Ok(())
    }
}

/// A weight that will get an adapter.
pub(crate) struct Target {
    pub(crate) module: String,
    pub(crate) weight: String,
    pub(crate) kind: LayerKind,
    pub(crate) dims: [usize; 2],
    pub(crate) device: Device,
}

/// The weights that `config` means, and what to tell about them.
pub(crate) struct Plan {
    pub(crate) name: Arc<str>,
    pub(crate) config: Arc<LoraConfig>,
    pub(crate) targets: Vec<Target>,
    unmatched_targets: Vec<String>,
    unused_exclusions: Vec<String>,
}

impl Plan {
    pub(crate) fn new(layout: &Layout, name: &str, config: &LoraConfig) -> Result<Self, PeftError> {
        config.validate()?;
        validate_name(name)?;
        if layout.states.values().any(|state| state.get(name).is_some()) {
            return Err(PeftError::AdapterExists { name: name.to_string() });
        }
        // `validate` has seen to it that there are targets.
        let wanted = config.target_modules.clone().unwrap_or(TargetModules::AllLinear);
        let matcher = wanted.compile()?;
        let exclusions = config.exclude_modules.as_ref();
        let excluding = exclusions.map(TargetModules::compile).transpose()?;
        let is_excluded =
            |module: &str| excluding.as_ref().is_some_and(|excluding| excluding.matches(module, true));

        let adaptable = adaptable(layout);
        let matched: Vec<&Target> = adaptable
            .iter()
            .filter(|target| matcher.matches(&target.module, target.kind.is_linear()))
            .collect();
        let unsupported: Vec<String> = module_paths(layout)
            .into_iter()
            .filter(|module| matcher.matches(module, false) && !is_excluded(module))
            .filter(|module| !adaptable.iter().any(|target| target.module == *module))
            .map(str::to_string)
            .collect();
        if !unsupported.is_empty() {
            return Err(PeftError::UnsupportedModules { modules: unsupported });
        }
        if matched.is_empty() {
            return Err(PeftError::NoModuleMatched {
                closest: closest_modules(&wanted, &adaptable),
                targets: wanted.to_string(),
            });
        }

        let unmatched_targets = names_without(&wanted, matched.iter().map(|target| &*target.module));
        let excluded: Vec<&str> =
            adaptable.iter().map(|target| &*target.module).filter(|module| is_excluded(module)).collect();
        let unused_exclusions = exclusions.map_or(vec![], |names| names_without(names, excluded));
        let count = matched.len();
        let kept: BTreeSet<String> = matched
            .into_iter()
            .filter(|target| !is_excluded(&target.module))
            .map(|target| target.weight.clone())
            .collect();
        if kept.is_empty() {
            return Err(PeftError::AllModulesExcluded {
                targets: wanted.to_string(),
                excluded: exclusions.map(ToString::to_string).unwrap_or_default(),
                count,
            });
        }
        let targets: Vec<Target> =
            adaptable.into_iter().filter(|target| kept.contains(&target.weight)).collect();

        if config.lora_dropout > 0.0 {
            let modules: Vec<String> = targets
                .iter()
                .filter(|target| target.kind == LayerKind::Linear)
                .map(|target| target.module.clone())
                .collect();
            if !modules.is_empty() {
                return Err(PeftError::DropoutNeedsLoraLinear { modules });
            }
        }
        Ok(Self {
            name: name.into(),
            config: Arc::new(config.clone()),
            targets,
            unmatched_targets,
            unused_exclusions,
        })
    }

    /// Adds the adapter that `factors` makes for each target to `states`.
    pub(crate) fn add_to(&self, states: &mut States, mut make: impl FnMut(&Target) -> Option<Adapter>) {
        let is_first = states.values().all(|state| state.list.is_empty());
        for target in &self.targets {
            let Some(adapter) = make(target) else { continue };
            let adapter = adapter.set_active(is_first);
            states.entry(target.weight.clone()).or_default().list.push(adapter);
        }
    }

    pub(crate) fn into_report(self) -> InjectionReport {
        InjectionReport {
            adapter: self.name.to_string(),
            modules: self
                .targets
                .into_iter()
                .map(|target| AdaptedModule {
                    path: target.module,
                    d_input: target.dims[0],
                    d_output: target.dims[1],
                    r: self.config.r,
                    activation_space: target.kind == LayerKind::LoraLinear,
                })
                .collect(),
            unmatched_targets: self.unmatched_targets,
            unused_exclusions: self.unused_exclusions,
        }
    }
}

/// Names end up as components of parameter paths and of directories.
fn validate_name(name: &str) -> Result<(), PeftError> {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if name.is_empty() || !name.chars().all(is_allowed) {
        return Err(PeftError::InvalidAdapterName { name: name.to_string() });
    }
    Ok(())
}

/// Every weight that can carry an adapter, in the model's order.
fn adaptable(layout: &Layout) -> Vec<Target> {
    layout
        .parameters
        .iter()
        .filter_map(|parameter| {
            let module = parameter.path.strip_suffix(".weight")?;
            let kind = match &*parameter.container {
                "Struct:Linear" if layout.lora_linears.contains(module) => LayerKind::LoraLinear,
                "Struct:Linear" => LayerKind::Linear,
                "Struct:Embedding" => LayerKind::Embedding,
                _ => return None,
            };
            let [d_in, d_out] = parameter.shape[..] else { return None };
            Some(Target {
                module: module.to_string(),
                weight: parameter.path.clone(),
                kind,
                dims: [d_in, d_out],
                device: parameter.device.clone(),
            })
        })
        .collect()
}

/// The paths of all modules: whatever a parameter's path leads through.
fn module_paths(layout: &Layout) -> BTreeSet<&str> {
    layout
        .parameters
        .iter()
        .flat_map(|parameter| parameter.path.match_indices('.').map(|(end, _)| &parameter.path[..end]))
        .collect()
}

/// Listed names that none of the modules has.
fn names_without<'a>(names: &TargetModules, modules: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let TargetModules::Names(names) = names else { return vec![] };
    let modules: Vec<&str> = modules.into_iter().collect();
    names.iter().filter(|name| !modules.iter().any(|module| matches_name(module, name))).cloned().collect()
}

fn closest_modules(wanted: &TargetModules, adaptable: &[Target]) -> Vec<String> {
    let last = |path: &str| path.rsplit('.').next().unwrap_or(path).to_string();
    let candidates: BTreeSet<String> = adaptable.iter().map(|target| last(&target.module)).collect();
    let TargetModules::Names(names) = wanted else { return candidates.into_iter().collect() };
    let mut found: Vec<String> = names
        .iter()
        .flat_map(|name| closest(&last(name), candidates.iter().map(String::as_str), 2))
        .collect();
    let mut seen = BTreeSet::new();
    found.retain(|name| seen.insert(name.clone()));
    found
}
