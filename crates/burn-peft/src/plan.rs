//! Which parameters of a model a configuration means and what becomes of each: every decision and every error before
//! anything changes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use burn::module::Param;
use burn::tensor::Tensor;
use burn_peft_files::closest;
use burn_peft_ops::on_kind_of;

use crate::adapter::{Adapter, AdapterInfo};
use crate::config::{LoraConfig, PeftConfig, Ranks, Selection};
use crate::error::PeftError;
use crate::init::Start;
use crate::layer::{Layer, Site, Space};
use crate::method::{Chosen, METHODS, Method, Parameters, Update};
use crate::pattern::Pattern;
use crate::seam::{BaseParameter, Layout};
use crate::states::States;
use crate::target::{OUTPUT_LAYER, TargetModules, matches_name};

pub(crate) mod modules;
mod report;

pub(crate) use modules::{Parameter, module_names, parameters};
pub use report::{AdaptedModule, InjectionReport, TargetCoverage};

/// A parameter that will get an adapter.
pub(crate) struct Target {
    pub(crate) parameter: BaseParameter,
    pub(crate) site: Arc<Site>,
    /// Whether its module is a target of the configuration.
    pub(crate) is_adapted: bool,
    /// At least one.
    pub(crate) methods: Vec<Arc<dyn Method>>,
}

impl Target {
    /// New updates for it.
    ///
    /// # Errors
    /// Those of [`Method::start`].
    pub(crate) fn fresh(&self) -> Result<Vec<Update>, PeftError> {
        let at = Start {
            site: &self.site,
            device: self.parameter.device.clone().without_autodiff(),
            value: &|| self.parameter.value(),
        };
        self.methods.iter().map(|method| Ok(self.update(method, method.start(&at)?))).collect()
    }

    /// New updates with these values (without a graph) for the named tensors.
    ///
    /// # Errors
    /// Those of [`Method::start`].
    pub(crate) fn fresh_with(&self, values: &[(&str, Tensor<2>)]) -> Result<Vec<Update>, PeftError> {
        let replaced = |update: Update| {
            update.map_parts(|spec, fresh| match values.iter().find(|(name, _)| *name == spec.name) {
                Some((_, value)) => Param::from_tensor(on_kind_of(value.clone(), &self.parameter.device)),
                None => fresh,
            })
        };
        Ok(self.fresh()?.into_iter().map(replaced).collect())
    }

    /// The update with these tensors, which have no graph.
    fn update(&self, method: &Arc<dyn Method>, tensors: Vec<Tensor<2>>) -> Update {
        let device = &self.parameter.device;
        let tensors = tensors.into_iter().map(|tensor| on_kind_of(tensor, device)).collect();
        Update::new(method.clone(), &self.site, tensors)
    }

    pub(crate) fn replaces(&self) -> bool {
        self.methods.iter().any(|method| method.replaces())
    }
}

/// The parameters that `config` means, and what to tell about them.
pub(crate) struct Plan {
    pub(crate) name: Arc<str>,
    pub(crate) config: Arc<PeftConfig>,
    pub(crate) targets: Vec<Target>,
    choice: Choice,
    unmatched_modules_to_save: Vec<String>,
    unmatched_patterns: [Vec<String>; 2],
}

impl Plan {
    pub(crate) fn new(layout: &Layout, name: &str, config: &PeftConfig) -> Result<Self, PeftError> {
        config.validate()?;
        validate_name(name)?;
        if layout.states.values().any(|state| state.get(name).is_some()) {
            return Err(PeftError::AdapterExists { name: name.to_string() });
        }
        let parameters = parameters(layout, &config.targeting().key_mapping)?;
        check_output_layer(&parameters, config)?;
        let choice = Choice::of(&parameters, config)?;
        let unmatched_modules_to_save =
            unmatched_modules_to_save(&parameters, &config.targeting().modules_to_save)?;
        let chooser = Chooser::new(config)?;
        let choose = |(_, site): &Parameter| {
            let is_tied = site.is_adaptable() && layout.tied_tables.contains(&site.module);
            chooser.choose(site.clone(), choice.adapted.contains(&site.name), is_tied)
        };
        let chosen = parameters.iter().map(choose).collect::<Result<Vec<_>, _>>()?;
        let all = Parameters { list: &chosen, are_all: true };
        METHODS.iter().try_for_each(|method| (method.check)(config, &all))?;
        let mut targets = vec![];
        for ((parameter, site), at) in parameters.iter().zip(&chosen) {
            let methods = at.methods(config);
            check_tie(config, at, &methods)?;
            if !methods.is_empty() {
                targets.push(Target {
                    parameter: (*parameter).clone(),
                    site: site.clone(),
                    is_adapted: at.is_adapted,
                    methods,
                });
            }
        }
        Ok(Self {
            name: name.into(),
            config: Arc::new(config.clone()),
            targets,
            unmatched_modules_to_save,
            unmatched_patterns: chooser.ranks.unmatched(&choice.adapted)?,
            choice,
        })
    }

    /// The plan for exactly the weights at `paths`, whose names `config` lists.
    ///
    /// Names are matched by their end as well. Where that would mean other modules too, an expression names them exactly.
    pub(crate) fn exactly(
        layout: &Layout,
        name: &str,
        config: &LoraConfig,
        paths: &BTreeSet<String>,
    ) -> Result<Self, PeftError> {
        // By the mapping of the new adapter: where the paths come from, another one may hold.
        let mapping = config.targeting.key_mapping.compile()?;
        let mut names = BTreeSet::new();
        for path in paths {
            let name = mapping.apply(path)?;
            names.extend(name.rsplit_once('.').map(|(module, _)| module.to_string()));
        }
        let listed = config.clone().with_target_modules(TargetModules::Names(names.clone()));
        let plan = Self::new(layout, name, &listed.into())?;
        let mut weights = plan.targets.iter().filter(|target| target.site.is_adaptable());
        if weights.all(|target| paths.contains(&target.parameter.path)) {
            return Ok(plan);
        }
        let escaped: Vec<String> = names.iter().map(|name| fancy_regex::escape(name).into_owned()).collect();
        let exact = config.clone().with_target_modules(TargetModules::Regex(escaped.join("|")));
        Self::new(layout, name, &exact.into())
    }

    /// Adds the adapter with these updates, those of each target, to `states`.
    pub(crate) fn add_to(&self, states: &mut States, updates: Vec<Vec<Update>>) {
        let is_first = states.values().all(|state| state.list.is_empty());
        for (target, updates) in self.targets.iter().zip(updates) {
            let info = AdapterInfo {
                name: self.name.clone(),
                config: self.config.clone(),
                site: target.site.clone(),
                is_target: target.is_adapted && target.site.is_adaptable(),
                active: is_first,
                scale: 1.0,
            };
            let adapter = Adapter { updates, info }.set_active(is_first);
            states.entry(target.parameter.path.clone()).or_default().insert(adapter);
        }
    }

    /// The names of the modules that are adapted.
    pub(crate) fn adapted(&self) -> &BTreeSet<String> {
        &self.choice.adapted
    }

    pub(crate) fn into_report(self) -> InjectionReport {
        let mut modules = vec![];
        let mut num_params = 0;
        for Target { site, methods, .. } in &self.targets {
            let tensors = methods.iter().flat_map(|method| method.tensors(site));
            num_params += tensors.filter(|spec| spec.is_trained).map(|spec| spec.elements()).sum::<usize>();
            let adapting = methods.iter().find(|method| !method.replaces()).filter(|_| site.is_adaptable());
            if let Some(method) = adapting {
                let [d_input, d_output] = site.dims();
                modules.push(AdaptedModule {
                    path: site.module.clone(),
                    d_input,
                    d_output,
                    r: method.rank(),
                    activation_space: site.space == Space::Activations,
                });
            }
        }
        let copied = self.targets.iter().filter(|target| target.replaces());
        let copied: BTreeSet<String> = copied.map(|target| target.parameter.path.clone()).collect();
        let [unmatched_rank_patterns, unmatched_alpha_patterns] = self.unmatched_patterns;
        InjectionReport {
            adapter: self.name.to_string(),
            modules,
            coverage: self.choice.coverage,
            unmatched_targets: self.choice.unmatched_targets,
            unused_exclusions: self.choice.unused_exclusions,
            unmatched_rank_patterns,
            unmatched_alpha_patterns,
            copied_parameters: copied.into_iter().collect(),
            unmatched_modules_to_save: self.unmatched_modules_to_save,
            num_params,
        }
    }
}

/// A configuration, ready to be asked about parameters.
pub(crate) struct Chooser<'a> {
    pub(crate) selection: Selection<'a>,
    ranks: Ranks,
}

impl<'a> Chooser<'a> {
    /// # Errors
    /// [`PeftError::InvalidPattern`].
    pub(crate) fn new(config: &'a PeftConfig) -> Result<Self, PeftError> {
        Ok(Self { selection: Selection::new(config.targeting())?, ranks: config.kind().ranks()? })
    }

    /// # Errors
    /// [`PeftError::EndlessPattern`].
    pub(crate) fn choose(
        &self,
        site: Arc<Site>,
        is_adapted: bool,
        is_tied: bool,
    ) -> Result<Chosen, PeftError> {
        let (r, lora_alpha) = self.ranks.of(&site.name)?;
        let is_saved = self.selection.saves(&site.name);
        Ok(Chosen { site, is_adapted, is_saved, is_tied, r, lora_alpha })
    }
}

/// The modules that a configuration adapts, and what to tell about the choice.
#[derive(Default)]
pub(crate) struct Choice {
    /// Names of the modules.
    pub(crate) adapted: BTreeSet<String>,
    coverage: Vec<TargetCoverage>,
    unmatched_targets: Vec<String>,
    unused_exclusions: Vec<String>,
}

impl Choice {
    /// # Errors
    /// [`PeftError::NoModuleMatched`], [`PeftError::AllModulesExcluded`], [`PeftError::UnsupportedModules`],
    /// [`PeftError::InvalidPattern`], [`PeftError::EndlessPattern`].
    pub(crate) fn of(parameters: &[Parameter], config: &PeftConfig) -> Result<Self, PeftError> {
        let targeting = config.targeting();
        let selection = Selection::new(targeting)?;
        let adaptable: BTreeMap<&str, bool> = parameters
            .iter()
            .filter(|(_, site)| site.is_adaptable())
            .map(|(_, site)| (&*site.name, site.layer == Layer::Linear))
            .collect();
        let all = module_names(parameters);
        let matched = filter(&adaptable, |module, is_linear| selection.matches(module, is_linear))?;
        let excluded = filter(&adaptable, |module, _| selection.excludes(module))?;
        let is_adapted = |module: &&str| excluded.binary_search(module).is_err();
        let adapted: Vec<&str> = matched.iter().copied().filter(is_adapted).collect();
        let others = all.iter().filter(|module| !adaptable.contains_key(**module));
        let others = others.map(|module| (*module, false)).collect();
        let unsupported = filter(&others, |module, _| selection.adapts(module, false))?;
        if !unsupported.is_empty() {
            let modules = unsupported.into_iter().map(str::to_string).collect();
            return Err(PeftError::UnsupportedModules { modules });
        }
        // `validate` guarantees that there are targets.
        let wanted = targeting.target_modules.as_ref().unwrap_or(&TargetModules::AllLinear);
        let exclusions = targeting.exclude_modules.as_ref();
        if matched.is_empty() {
            let anywhere = selection.in_all_layers()?;
            let elsewhere = filter(&adaptable, |module, is_linear| anywhere.matches(module, is_linear))?;
            let closest = match elsewhere.is_empty() {
                true => closest_modules(wanted, adaptable.keys().copied()),
                false => elsewhere.into_iter().map(str::to_string).collect(),
            };
            let (targets, layers) = (wanted.clone(), targeting.layers_to_transform.clone());
            return Err(PeftError::NoModuleMatched { targets, layers, closest });
        }
        if adapted.is_empty() {
            let saved = targeting.modules_to_save.iter().map(String::as_str).collect::<TargetModules>();
            let saved = (!targeting.modules_to_save.is_empty()).then(|| format!("`modules_to_save` {saved}"));
            let excluded = exclusions.map(|excluded| format!("`exclude_modules` {excluded}"));
            let excluded: Vec<String> = excluded.into_iter().chain(saved).collect();
            return Err(PeftError::AllModulesExcluded {
                targets: wanted.to_string(),
                excluded: excluded.join(" and "),
                count: matched.len(),
            });
        }
        Ok(Self {
            unmatched_targets: names_without(wanted, matched),
            unused_exclusions: exclusions.map_or(vec![], |names| names_without(names, excluded)),
            coverage: report::coverage(adapted.iter().copied(), all, |module| {
                selection.adapts(module, true)
            })?,
            adapted: adapted.into_iter().map(str::to_string).collect(),
        })
    }
}

/// The modules that `is_meant`; with each stands whether it is a linear layer.
fn filter<'m>(
    modules: &BTreeMap<&'m str, bool>,
    is_meant: impl Fn(&str, bool) -> Result<bool, PeftError>,
) -> Result<Vec<&'m str>, PeftError> {
    let mut found = vec![];
    for (&module, &is_linear) in modules {
        if is_meant(module, is_linear)? {
            found.push(module);
        }
    }
    Ok(found)
}

/// `ensure_weight_tying` asks that what changes one end of a tied weight changes the other. Where nothing tied is changed
/// it has no effect.
///
/// # Errors
/// [`PeftError::InvalidConfig`] for methods that the output layer does not read.
fn check_tie(config: &PeftConfig, at: &Chosen, methods: &[Arc<dyn Method>]) -> Result<(), PeftError> {
    let is_apart = at.is_tied && methods.iter().any(|method| !method.is_read_by_tied_output());
    if !is_apart || !config.kind().ensures_weight_tying() {
        return Ok(());
    }
    let expected = "false, or no target that is tied to the output layer";
    let found = format!("true, and `{}` among the targets", at.site.name);
    Err(PeftError::invalid("ensure_weight_tying", expected, found))
}

/// An output layer that is tied to the embedding owns no parameter, so there is nothing to adapt.
///
/// # Errors
/// [`PeftError::NoOutputLayer`], [`PeftError::InvalidPattern`], [`PeftError::EndlessPattern`].
fn check_output_layer(parameters: &[Parameter], config: &PeftConfig) -> Result<(), PeftError> {
    let config = config.targeting();
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
