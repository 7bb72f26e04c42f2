//! Which parameters of a model a configuration means: every decision and every error before anything changes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use burn::tensor::{Device, Tensor};

use crate::adapter::{Adapter, AdapterInfo, Change, LayerKind, Site, Update};
use crate::error::{PeftError, closest};
use crate::lora::{Bias, LoraConfig, Ranks};
use crate::pattern::Pattern;
use crate::seam::{Layout, States};
use crate::target::{LayerFilter, Matcher, OUTPUT_LAYER, TargetModules, matches_name};

mod modules;
mod report;

pub(crate) use modules::{Parameter, is_part_of, lies_within, module_names, parameters};
pub use report::{AdaptedModule, InjectionReport, TargetCoverage};

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
    coverage: Vec<TargetCoverage>,
    unmatched_targets: Vec<String>,
    unused_exclusions: Vec<String>,
    unmatched_rank_patterns: Vec<String>,
    unmatched_alpha_patterns: Vec<String>,
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
        let mut plan = Self::empty(name, config);
        let adapted = plan.choose_weights(&parameters)?;
        plan.check_layers(&parameters, &adapted)?;
        plan.unmatched_modules_to_save = unmatched_modules_to_save(&parameters, &config.modules_to_save)?;
        let ranks = config.ranks()?;
        plan.unmatched_rank_patterns = ranks.rank_pattern.unmatched(&adapted)?;
        plan.unmatched_alpha_patterns = ranks.alpha_pattern.unmatched(&adapted)?;
        for (parameter, site) in &parameters {
            if let Some(change) = plan.change_of(site, &adapted, &ranks)? {
                plan.targets.push(Target {
                    path: parameter.path.clone(),
                    site: site.clone(),
                    device: parameter.device.clone(),
                    change,
                });
            }
        }
        plan.check_ties(layout)?;
        Ok(plan)
    }

    fn empty(name: &str, config: &LoraConfig) -> Self {
        Self {
            name: name.into(),
            config: Arc::new(config.clone()),
            targets: vec![],
            coverage: vec![],
            unmatched_targets: vec![],
            unused_exclusions: vec![],
            unmatched_rank_patterns: vec![],
            unmatched_alpha_patterns: vec![],
            unmatched_modules_to_save: vec![],
        }
    }

    /// The names of the modules that `config` adapts.
    ///
    /// # Errors
    /// Those of [`choose_weights`](Self::choose_weights).
    pub(crate) fn modules(
        parameters: &[Parameter],
        config: &LoraConfig,
    ) -> Result<BTreeSet<String>, PeftError> {
        Self::empty("", config).choose_weights(parameters)
    }

    /// The names of the modules that get an update of low rank.
    ///
    /// # Errors
    /// [`PeftError::NoModuleMatched`], [`PeftError::AllModulesExcluded`], [`PeftError::UnsupportedModules`],
    /// [`PeftError::InvalidPattern`], [`PeftError::EndlessPattern`].
    fn choose_weights(&mut self, parameters: &[Parameter]) -> Result<BTreeSet<String>, PeftError> {
        let config = self.config.clone();
        // `validate` has seen to it that there are targets.
        let wanted = config.target_modules.clone().unwrap_or(TargetModules::AllLinear);
        let filter = LayerFilter::new(config.layers_to_transform.as_deref(), &config.layers_pattern)?;
        let exclusions = config.exclude_modules.as_ref();
        let excluding = exclusions.map(TargetModules::compile).transpose()?;
        let rules = Rules { config: &config, matcher: wanted.compile()?, excluding, filter };

        let adaptable: BTreeMap<&str, LayerKind> = parameters
            .iter()
            .filter(|(_, site)| site.kind != LayerKind::Other && site.parameter == "weight")
            .map(|(_, site)| (&*site.name, site.kind))
            .collect();
        let all = module_names(parameters);
        let (mut matched, mut excluded, mut kept) = (vec![], vec![], BTreeSet::new());
        for (&module, kind) in &adaptable {
            let is_matched = rules.matches(module, kind.is_linear())?;
            let is_excluded = rules.excludes(module)?;
            if is_matched {
                matched.push(module);
            }
            if is_excluded {
                excluded.push(module);
            }
            if is_matched && !is_excluded {
                kept.insert(module.to_string());
            }
        }
        let mut unsupported = vec![];
        for &module in all.iter().filter(|module| !adaptable.contains_key(**module)) {
            if rules.matches(module, false)? && !rules.excludes(module)? {
                unsupported.push(module.to_string());
            }
        }
        if !unsupported.is_empty() {
            return Err(PeftError::UnsupportedModules { modules: unsupported });
        }
        if matched.is_empty() {
            let anywhere = Rules { filter: LayerFilter::new(None, &[])?, ..rules };
            let mut elsewhere = vec![];
            for (&module, kind) in &adaptable {
                if anywhere.matches(module, kind.is_linear())? {
                    elsewhere.push(module.to_string());
                }
            }
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
        if kept.is_empty() {
            let saved = config.modules_to_save.iter().map(String::as_str).collect::<TargetModules>();
            let saved = (!config.modules_to_save.is_empty()).then(|| format!("`modules_to_save` {saved}"));
            let excluded = exclusions.map(|excluded| format!("`exclude_modules` {excluded}"));
            let excluded: Vec<String> = excluded.into_iter().chain(saved).collect();
            return Err(PeftError::AllModulesExcluded {
                targets: wanted.to_string(),
                excluded: excluded.join(" and "),
                count: matched.len(),
            });
        }
        self.unmatched_targets = names_without(&wanted, matched);
        self.unused_exclusions = exclusions.map_or(vec![], |names| names_without(names, excluded));
        self.coverage = report::coverage(kept.iter().map(String::as_str), all, |module| {
            Ok(rules.matches(module, true)? && !rules.excludes(module)?)
        })?;
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
    ///
    /// # Errors
    /// [`PeftError::EndlessPattern`].
    fn change_of(
        &self,
        site: &Site,
        adapted: &BTreeSet<String>,
        ranks: &Ranks,
    ) -> Result<Option<Change>, PeftError> {
        let config = &self.config;
        let is_saved = config.modules_to_save.iter().any(|saved| is_part_of(&site.name, saved));
        let is_adapted = adapted.contains(&site.name);
        let (r, lora_alpha) = ranks.of(&site.name)?;
        let takes_lora_bias = config.lora_bias && is_adapted && site.kind != LayerKind::LoraLinear;
        let shift = takes_lora_bias.then(|| config.scaling_of(r, lora_alpha));
        Ok(match &*site.parameter {
            _ if is_saved => Some(Change::Copy { shift: None }),
            "weight" if is_adapted => Some(Change::LowRank { r, lora_alpha }),
            "bias" if config.bias == Bias::All => Some(Change::Copy { shift }),
            "bias" if config.bias == Bias::LoraOnly && is_adapted => Some(Change::Copy { shift }),
            "bias" => shift.map(|scaling| Change::Shift { scaling }),
            _ => None,
        })
    }

    /// `ensure_weight_tying` asks for one adapter of both ends of a tied weight, which does not exist here. Where nothing
    /// tied is adapted it has no effect.
    ///
    /// # Errors
    /// [`PeftError::InvalidConfig`].
    fn check_ties(&self, layout: &Layout) -> Result<(), PeftError> {
        if !self.config.ensures_weight_tying() {
            return Ok(());
        }
        let is_tied = |site: &Site| layout.tied_tables.contains(&site.module);
        match self.targets.iter().find(|target| is_tied(&target.site)) {
            None => Ok(()),
            Some(target) => Err(PeftError::InvalidConfig {
                field: "ensure_weight_tying",
                expected: "false, or no target that is tied to the output layer",
                found: format!("true, and `{}` among the targets", target.site.name),
            }),
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
            coverage: self.coverage,
            unmatched_targets: self.unmatched_targets,
            unused_exclusions: self.unused_exclusions,
            unmatched_rank_patterns: self.unmatched_rank_patterns,
            unmatched_alpha_patterns: self.unmatched_alpha_patterns,
            copied_parameters,
            unmatched_modules_to_save: self.unmatched_modules_to_save,
            num_params,
        }
    }
}

/// Which modules `target_modules` means and which are left alone, ready to match.
struct Rules<'a> {
    config: &'a LoraConfig,
    matcher: Matcher<'a>,
    excluding: Option<Matcher<'a>>,
    filter: LayerFilter<'a>,
}

impl Rules<'_> {
    /// # Errors
    /// [`PeftError::EndlessPattern`].
    fn matches(&self, module: &str, is_linear: bool) -> Result<bool, PeftError> {
        self.matcher.matches_within(module, is_linear, &self.filter)
    }

    /// # Errors
    /// [`PeftError::EndlessPattern`].
    fn excludes(&self, module: &str) -> Result<bool, PeftError> {
        let by_name = match &self.excluding {
            Some(excluding) => excluding.matches(module, true)?,
            None => false,
        };
        Ok(by_name || self.config.modules_to_save.iter().any(|saved| lies_within(module, saved)))
    }
}

/// An output layer that is tied to the embedding owns no parameter, so nothing would come of asking for it.
///
/// # Errors
/// [`PeftError::NoOutputLayer`], [`PeftError::InvalidPattern`], [`PeftError::EndlessPattern`].
fn check_output_layer(parameters: &[Parameter], config: &LoraConfig) -> Result<(), PeftError> {
    if parameters.iter().any(|(_, site)| matches_name(&site.name, OUTPUT_LAYER)) {
        return Ok(());
    }
    let targets: Vec<&String> = match &config.target_modules {
        Some(TargetModules::Names(names)) => {
            names.iter().filter(|name| matches_name(name, OUTPUT_LAYER)).collect()
        }
        // One may mention the output layer to leave it out.
        Some(TargetModules::Regex(pattern)) if Pattern::whole(pattern)?.is_match(OUTPUT_LAYER)? => {
            vec![pattern]
        }
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
