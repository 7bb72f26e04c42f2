//! Which parameters of a model a configuration means: every decision and every error before anything changes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use burn::tensor::{Device, Tensor};

use crate::adapter::{Adapter, AdapterInfo, Change, LayerKind, Site, Update};
use crate::error::{PeftError, closest};
use crate::key_mapping::KeyMapping;
use crate::lora::{Bias, LoraConfig, Ranks};
use crate::seam::{BaseParameter, Layout, States};
use crate::target::{LayerFilter, OUTPUT_LAYER, TargetModules, matches_name};

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
    /// Paths of the parameters that are trained as copies: `modules_to_save` and biases.
    pub copied_parameters: Vec<String>,
    /// Names of `modules_to_save` that no module's name ends with.
    pub unmatched_modules_to_save: Vec<String>,
    num_params: usize,
}

/// One adapted module.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq)]
pub struct AdaptedModule {
    /// The module's path, `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// Rows of `A`: inputs of a linear layer, vocabulary of an embedding, `channels_in * kernel` of a convolution.
    pub d_input: usize,
    /// Columns of `B`: outputs of a linear layer, width of an embedding, `channels_out` of a convolution.
    pub d_output: usize,
    /// Rank of the adapter.
    pub r: usize,
    /// Whether the adapter works on activations ([`LoraLinear`](crate::LoraLinear),
    /// [`LoraEmbedding`](crate::LoraEmbedding)) or on the weight (plain layers).
    pub activation_space: bool,
}

impl InjectionReport {
    /// Trainable parameters: `Σ r (d_input + d_output)`, and the elements of copies and of `lora_bias`.
    pub fn num_params(&self) -> usize {
        self.num_params
    }
}

impl fmt::Display for InjectionReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dense = self.modules.iter().filter(|module| !module.activation_space).count();
        write!(f, "adapter `{}`: {} modules adapted", self.adapter, self.modules.len())?;
        if dense > 0 {
            write!(f, ", {dense} of them through their dense weight")?;
        }
        if !self.copied_parameters.is_empty() {
            write!(f, ", {} parameters copied", self.copied_parameters.len())?;
        }
        if !self.unmatched_targets.is_empty() {
            write!(f, "; no module is named {}", self.unmatched_targets.join(", "))?;
        }
        if !self.unused_exclusions.is_empty() {
            write!(f, "; nothing was excluded by {}", self.unused_exclusions.join(", "))?;
        }
        if !self.unmatched_modules_to_save.is_empty() {
            write!(f, "; nothing to save is named {}", self.unmatched_modules_to_save.join(", "))?;
        }
        Ok(())
    }
}

/// A parameter that will get an adapter.
pub(crate) struct Target {
    /// Its path in the Burn model.
    pub(crate) path: String,
    pub(crate) site: Arc<Site>,
    pub(crate) device: Device,
    pub(crate) change: Change,
}

impl Target {
    /// A fresh update for it; a copy needs the value that it starts from, flattened and without a graph.
    pub(crate) fn fresh(&self, config: &LoraConfig, base: Option<&Tensor<1>>) -> Option<Update> {
        Update::init(config, self.change, &self.site, &self.device, base)
    }
}

/// The parameters that `config` means, and what to tell about them.
pub(crate) struct Plan {
    pub(crate) name: Arc<str>,
    pub(crate) config: Arc<LoraConfig>,
    pub(crate) targets: Vec<Target>,
    unmatched_targets: Vec<String>,
    unused_exclusions: Vec<String>,
    unmatched_modules_to_save: Vec<String>,
}

impl Plan {
    pub(crate) fn new(layout: &Layout, name: &str, config: &LoraConfig) -> Result<Self, PeftError> {
        config.validate()?;
        validate_name(name)?;
        if layout.states.values().any(|state| state.get(name).is_some()) {
            return Err(PeftError::AdapterExists { name: name.to_string() });
        }
        let parameters = parameters(layout, &config.key_mapping)?;
        check_output_layer(&parameters, config)?;
        let mut plan = Self {
            name: name.into(),
            config: Arc::new(config.clone()),
            targets: vec![],
            unmatched_targets: vec![],
            unused_exclusions: vec![],
            unmatched_modules_to_save: vec![],
        };
        let adapted = plan.choose_weights(&parameters)?;
        plan.check_layers(&parameters, &adapted)?;
        plan.unmatched_modules_to_save = unmatched_modules_to_save(&parameters, &config.modules_to_save)?;
        let ranks = config.ranks()?;
        for (parameter, site) in &parameters {
            if let Some(change) = plan.change_of(site, &adapted, &ranks) {
                plan.targets.push(Target {
                    path: parameter.path.clone(),
                    site: site.clone(),
                    device: parameter.device.clone(),
                    change,
                });
            }
        }
        Ok(plan)
    }

    /// The names of the modules that get an update of low rank.
    fn choose_weights(&mut self, parameters: &[Parameter]) -> Result<BTreeSet<String>, PeftError> {
        let config = self.config.clone();
        // `validate` has seen to it that there are targets.
        let wanted = config.target_modules.clone().unwrap_or(TargetModules::AllLinear);
        let matcher = wanted.compile()?;
        let filter = LayerFilter::new(config.layers_to_transform.as_deref(), &config.layers_pattern)?;
        let exclusions = config.exclude_modules.as_ref();
        let excluding = exclusions.map(TargetModules::compile).transpose()?;
        let is_excluded = |module: &str| {
            excluding.as_ref().is_some_and(|excluding| excluding.matches(module, true))
                || config.modules_to_save.iter().any(|saved| lies_within(module, saved))
        };

        let adaptable: BTreeMap<&str, LayerKind> = parameters
            .iter()
            .filter(|(_, site)| site.kind != LayerKind::Other && site.parameter == "weight")
            .map(|(_, site)| (&*site.name, site.kind))
            .collect();
        let matched: Vec<&str> = adaptable
            .iter()
            .filter(|(module, kind)| matcher.matches_within(module, kind.is_linear(), &filter))
            .map(|(module, _)| *module)
            .collect();
        let unsupported: Vec<String> = module_names(parameters)
            .into_iter()
            .filter(|module| matcher.matches_within(module, false, &filter) && !is_excluded(module))
            .filter(|module| !adaptable.contains_key(module))
            .map(str::to_string)
            .collect();
        if !unsupported.is_empty() {
            return Err(PeftError::UnsupportedModules { modules: unsupported });
        }
        if matched.is_empty() {
            let anywhere = LayerFilter::new(None, &[])?;
            let elsewhere = adaptable
                .iter()
                .filter(|(module, kind)| matcher.matches_within(module, kind.is_linear(), &anywhere))
                .map(|(module, _)| module.to_string());
            let elsewhere: Vec<String> = elsewhere.collect();
            return Err(PeftError::NoModuleMatched {
                closest: if elsewhere.is_empty() {
                    closest_modules(&wanted, adaptable.keys().copied())
                } else {
                    elsewhere
                },
                targets: wanted.to_string(),
                layers: config.layers_to_transform.clone(),
            });
        }
        self.unmatched_targets = names_without(&wanted, matched.iter().copied());
        let excluded: Vec<&str> = adaptable.keys().copied().filter(|module| is_excluded(module)).collect();
        self.unused_exclusions = exclusions.map_or(vec![], |names| names_without(names, excluded));
        let count = matched.len();
        let kept: BTreeSet<String> =
            matched.into_iter().filter(|module| !is_excluded(module)).map(str::to_string).collect();
        if kept.is_empty() {
            let saved = config.modules_to_save.iter().map(String::as_str).collect::<TargetModules>();
            let saved = (!config.modules_to_save.is_empty()).then(|| format!("`modules_to_save` {saved}"));
            let excluded = exclusions.map(|excluded| format!("`exclude_modules` {excluded}"));
            let excluded: Vec<String> = excluded.into_iter().chain(saved).collect();
            return Err(PeftError::AllModulesExcluded {
                targets: wanted.to_string(),
                excluded: excluded.join(" and "),
                count,
            });
        }
        Ok(kept)
    }

    /// Finds layers that cannot do what the configuration asks of them.
    fn check_layers(&self, parameters: &[Parameter], adapted: &BTreeSet<String>) -> Result<(), PeftError> {
        let both = adapted
            .iter()
            .filter(|module| self.config.modules_to_save.iter().any(|saved| is_part_of(module, saved)));
        let both: Vec<String> = both.cloned().collect();
        if !both.is_empty() {
            return Err(PeftError::TargetAlsoSaved { modules: both });
        }
        let modules = |is_meant: &dyn Fn(&Site) -> bool| -> Vec<String> {
            let weights = parameters.iter().map(|(_, site)| site).filter(|site| site.parameter == "weight");
            let meant = weights.filter(|site| adapted.contains(&site.name) && is_meant(site));
            meant.map(|site| site.name.clone()).collect()
        };
        if self.config.lora_dropout > 0.0 {
            let plain = modules(&|site| matches!(site.kind, LayerKind::Linear | LayerKind::Conv));
            if !plain.is_empty() {
                return Err(PeftError::DropoutNeedsLoraLinear { modules: plain });
            }
        }
        if self.config.lora_bias {
            let has_bias = |module: &str| {
                parameters.iter().any(|(_, site)| site.name == module && site.parameter == "bias")
            };
            let unable = modules(&|site| {
                site.kind.is_embedding() || (site.kind != LayerKind::LoraLinear && !has_bias(&site.name))
            });
            if !unable.is_empty() {
                return Err(PeftError::LoraBiasUnsupported { modules: unable });
            }
        }
        Ok(())
    }

    /// What the adapter does to the parameter at `site`.
    fn change_of(&self, site: &Site, adapted: &BTreeSet<String>, ranks: &Ranks) -> Option<Change> {
        let config = &self.config;
        let is_saved = config.modules_to_save.iter().any(|saved| is_part_of(&site.name, saved));
        let is_adapted = adapted.contains(&site.name);
        let (r, lora_alpha) = ranks.of(&site.name);
        let takes_lora_bias = config.lora_bias && is_adapted && site.kind != LayerKind::LoraLinear;
        let shift = takes_lora_bias.then(|| config.scaling_of(r, lora_alpha));
        match &*site.parameter {
            _ if is_saved => Some(Change::Copy { shift: None }),
            "weight" if is_adapted => Some(Change::LowRank { r, lora_alpha }),
            "bias" if config.bias == Bias::All => Some(Change::Copy { shift }),
            "bias" if config.bias == Bias::LoraOnly && is_adapted => Some(Change::Copy { shift }),
            "bias" => shift.map(|scaling| Change::Shift { scaling }),
            _ => None,
        }
    }

    /// Adds the adapter that `make` gives for each target to `states`.
    pub(crate) fn add_to(&self, states: &mut States, mut make: impl FnMut(&Target) -> Option<Update>) {
        let is_first = states.values().all(|state| state.list.is_empty());
        for target in &self.targets {
            let Some(update) = make(target) else { continue };
            let info = AdapterInfo {
                name: self.name.clone(),
                config: self.config.clone(),
                site: target.site.clone(),
                active: false,
                scaling: match target.change {
                    Change::LowRank { r, lora_alpha } => self.config.scaling_of(r, lora_alpha),
                    Change::Shift { scaling } => scaling,
                    Change::Copy { shift } => shift.unwrap_or(1.0),
                },
            };
            let adapter = Adapter::new(update, info).set_active(is_first);
            states.entry(target.path.clone()).or_default().insert(adapter);
        }
    }

    /// Paths of the parameters of which the adapter trains copies.
    pub(crate) fn copied(&self) -> BTreeSet<String> {
        let copied = self.targets.iter().filter(|target| matches!(target.change, Change::Copy { .. }));
        copied.map(|target| target.path.clone()).collect()
    }

    pub(crate) fn into_report(self) -> InjectionReport {
        let copied_parameters = self.copied().into_iter().collect();
        let mut modules = vec![];
        let mut num_params = 0;
        for Target { site, change, .. } in &self.targets {
            let [d_input, d_output] = site.factor_dims();
            match *change {
                Change::LowRank { r, .. } => {
                    num_params += r * (d_input + d_output);
                    if self.config.lora_bias && site.kind.in_activation_space() {
                        num_params += d_output;
                    }
                    modules.push(AdaptedModule {
                        path: site.module.clone(),
                        d_input,
                        d_output,
                        r,
                        activation_space: site.kind.in_activation_space(),
                    });
                }
                Change::Copy { shift } => {
                    let tensors = if shift.is_some() { 2 } else { 1 };
                    num_params += tensors * site.shape.iter().product::<usize>();
                }
                Change::Shift { .. } => num_params += site.shape.iter().product::<usize>(),
            }
        }
        InjectionReport {
            adapter: self.name.to_string(),
            modules,
            unmatched_targets: self.unmatched_targets,
            unused_exclusions: self.unused_exclusions,
            copied_parameters,
            unmatched_modules_to_save: self.unmatched_modules_to_save,
            num_params,
        }
    }
}

/// An output layer that is tied to the embedding owns no parameter, so nothing would come of asking for it.
///
/// # Errors
/// [`PeftError::NoOutputLayer`].
fn check_output_layer(parameters: &[Parameter], config: &LoraConfig) -> Result<(), PeftError> {
    if parameters.iter().any(|(_, site)| matches_name(&site.name, OUTPUT_LAYER)) {
        return Ok(());
    }
    let targets: Vec<&String> = match &config.target_modules {
        Some(TargetModules::Names(names)) => {
            names.iter().filter(|name| matches_name(name, OUTPUT_LAYER)).collect()
        }
        Some(TargetModules::Regex(pattern)) if pattern.contains(OUTPUT_LAYER) => vec![pattern],
        _ => vec![],
    };
    let saved = config.modules_to_save.iter().filter(|entry| matches_name(entry, OUTPUT_LAYER));
    let asked = targets.into_iter().map(|name| ("`target_modules`", name));
    match asked.chain(saved.map(|name| ("`modules_to_save`", name))).next() {
        Some((field, name)) => Err(PeftError::NoOutputLayer { field, name: name.clone() }),
        None => Ok(()),
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

pub(crate) type Parameter<'a> = (&'a BaseParameter, Arc<Site>);

/// Every parameter that belongs to a module, in the model's order, by the names that files give them.
///
/// # Errors
/// [`PeftError::InvalidPattern`], [`PeftError::AmbiguousKeyMapping`].
pub(crate) fn parameters<'a>(
    layout: &'a Layout,
    mapping: &KeyMapping,
) -> Result<Vec<Parameter<'a>>, PeftError> {
    let mapping = mapping.compile()?;
    let mut seen: BTreeMap<String, &str> = BTreeMap::new();
    let mut parameters = vec![];
    for base in &layout.parameters {
        let Some((module, _)) = base.path.rsplit_once('.') else { continue };
        let mapped = mapping.apply(&base.path);
        let (name, parameter) = mapped.rsplit_once('.').unwrap_or((module, &mapped));
        let site = Site {
            module: module.to_string(),
            name: name.to_string(),
            parameter: name_in_files(parameter, &base.container).to_string(),
            kind: kind_of(base, layout.activation_space.contains(module)),
            shape: base.shape[..].to_vec(),
        };
        let full = format!("{}.{}", site.name, site.parameter);
        if let Some(other) = seen.insert(full.clone(), &base.path) {
            return Err(PeftError::AmbiguousKeyMapping {
                name: full,
                paths: vec![other.to_string(), base.path.clone()],
            });
        }
        parameters.push((base, Arc::new(site)));
    }
    Ok(parameters)
}

/// Norms call their parameters `gamma` and `beta` in Burn, `weight` and `bias` in PyTorch.
fn name_in_files<'a>(parameter: &'a str, container: &str) -> &'a str {
    match parameter {
        "gamma" if container.ends_with("Norm") => "weight",
        "beta" if container.ends_with("Norm") => "bias",
        other => other,
    }
}

fn kind_of(parameter: &BaseParameter, shows_its_input: bool) -> LayerKind {
    match (&*parameter.container, shows_its_input) {
        ("Struct:Linear", true) => LayerKind::LoraLinear,
        ("Struct:Linear", false) => LayerKind::Linear,
        ("Struct:Embedding", true) => LayerKind::LoraEmbedding,
        ("Struct:Embedding", false) => LayerKind::Embedding,
        ("Struct:Conv1d" | "Struct:Conv2d" | "Struct:Conv3d", _) => LayerKind::Conv,
        _ => LayerKind::Other,
    }
}

/// The names of all modules: whatever a parameter's name leads through.
fn module_names<'a>(parameters: &'a [Parameter]) -> BTreeSet<&'a str> {
    parameters.iter().flat_map(|(_, site)| ancestors_and_self(&site.name)).collect()
}

/// Whether `module` is one that `modules_to_save` names or lies within one, by the rule with which PEFT keeps updates
/// of low rank out of them.
pub(crate) fn lies_within(module: &str, saved: &str) -> bool {
    ancestors_and_self(module).any(|module| matches_name(module, saved))
}

/// Whether a parameter of `module` is copied because of the entry `saved`: PEFT copies every module whose name ends
/// with it, not only behind a dot, with all it contains.
pub(crate) fn is_part_of(module: &str, saved: &str) -> bool {
    !saved.is_empty() && ancestors_and_self(module).any(|module| module.ends_with(saved))
}

fn ancestors_and_self(module: &str) -> impl Iterator<Item = &str> {
    module.match_indices('.').map(|(end, _)| &module[..end]).chain([module])
}

/// # Errors
/// [`PeftError::NoModuleToSave`] if there are entries and none of them names a module.
fn unmatched_modules_to_save(parameters: &[Parameter], entries: &[String]) -> Result<Vec<String>, PeftError> {
    let modules = module_names(parameters);
    let is_unmatched =
        |entry: &&String| !modules.iter().any(|module| !entry.is_empty() && module.ends_with(&***entry));
    let unmatched: Vec<String> = entries.iter().filter(is_unmatched).cloned().collect();
    if !entries.is_empty() && unmatched.len() == entries.len() {
        let near = unmatched
            .iter()
            .flat_map(|name| closest(name, modules.iter().filter_map(|module| module.rsplit('.').next()), 2));
        let near: BTreeSet<String> = near.collect();
        return Err(PeftError::NoModuleToSave { modules: unmatched, closest: near.into_iter().collect() });
    }
    Ok(unmatched)
}

/// Listed names that none of the modules has.
fn names_without<'a>(names: &TargetModules, modules: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let TargetModules::Names(names) = names else { return vec![] };
    let modules: Vec<&str> = modules.into_iter().collect();
    names.iter().filter(|name| !modules.iter().any(|module| matches_name(module, name))).cloned().collect()
}

fn closest_modules<'a>(wanted: &TargetModules, adaptable: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let last = |path: &str| path.rsplit('.').next().unwrap_or(path).to_string();
    let candidates: BTreeSet<String> = adaptable.into_iter().map(last).collect();
    let TargetModules::Names(names) = wanted else { return candidates.into_iter().collect() };
    let mut found: Vec<String> = names
        .iter()
        .flat_map(|name| closest(&last(name), candidates.iter().map(String::as_str), 2))
        .collect();
    let mut seen = BTreeSet::new();
    found.retain(|name| seen.insert(name.clone()));
    found
}
