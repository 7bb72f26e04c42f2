//! What is targeted: the modules that are adapted and those that are trained whole.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::field::{Field, Hint, fields, names, names_or_null, targets_from_json, targets_to_json, typed};
use crate::error::PeftError;
use crate::key_mapping::KeyMapping;
use crate::target::{LayerFilter, Matcher, TargetModules, ancestors_and_self, matches_name};

/// Which modules of a model an adapter concerns.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Targeting {
    /// The modules to adapt. There is no default, as there are no lists of targets per architecture here.
    pub target_modules: Option<TargetModules>,
    /// Modules that are not adapted even if they are targets. Default: none.
    pub exclude_modules: Option<TargetModules>,
    /// The numbers of the layers whose modules are adapted, for modules that match a listed name by their end. The number
    /// of a module's layer is the first component of its name that is a number and follows another component. Default:
    /// all layers.
    pub layers_to_transform: Option<Vec<usize>>,
    /// The component in front of a layer's number, `layers` or `h` for example, as regular expressions. The first one that
    /// matches counts. Needs [`layers_to_transform`](Self::layers_to_transform). Default: any component.
    pub layers_pattern: Vec<String>,
    /// Modules that are trained and saved whole: those whose name ends with one of these. The adapter trains a copy of each
    /// of their parameters and changes them in no other way. Default: none.
    pub modules_to_save: Vec<String>,
    /// How Burn paths become the names in Hugging Face files, for targets, loading and saving. It is not part of the file.
    /// Default: paths and names are equal.
    pub key_mapping: KeyMapping,
}

const FIELDS: &[Field<Targeting>] = fields! {
    target_modules: (|value| targets_from_json(value).map(Some), targets_to_json),
    exclude_modules: (exclusions_from_json, targets_to_json),
    layers_to_transform: (layers_from_json, |layers: &Option<Vec<usize>>| json!(layers)),
    layers_pattern: (names, |patterns: &Vec<String>| names_or_null(patterns)),
    modules_to_save: (names, |modules: &Vec<String>| names_or_null(modules)),
};

impl Targeting {
    /// These targets and nothing else.
    pub fn new(target_modules: impl Into<TargetModules>) -> Self {
        Self { target_modules: Some(target_modules.into()), ..Self::default() }
    }

    pub(super) fn read(&mut self, key: &str, value: &Value) -> Option<Result<(), Hint>> {
        Field::read_into(FIELDS, self, key, value)
    }

    pub(super) fn write(&self) -> Map<String, Value> {
        Field::write_all(FIELDS, self)
    }

    /// Everything that is wrong with its values.
    pub(super) fn problems(&self) -> Vec<PeftError> {
        let mut problems = vec![];
        let mut invalid = |field, expected, found: &str| {
            problems.push(PeftError::invalid(field, expected, found));
        };
        let transformed = self.layers_to_transform.as_ref().is_some_and(|layers| !layers.is_empty());
        if !self.layers_pattern.is_empty() && !transformed {
            invalid("layers_pattern", "`layers_to_transform` beside it", "none");
        }
        match &self.target_modules {
            None => invalid("target_modules", "names, a regular expression or `all-linear`", "nothing"),
            Some(TargetModules::Names(names)) if names.is_empty() => {
                invalid("target_modules", "at least one name", "an empty list");
            }
            Some(TargetModules::Regex(_)) if transformed => {
                invalid("layers_to_transform", "a list in `target_modules`", "a regular expression");
            }
            Some(TargetModules::AllLinear) if transformed => {
                invalid("layers_to_transform", "a list in `target_modules`", "`all-linear`");
            }
            Some(_) => {}
        }
        let targets = [&self.target_modules, &self.exclude_modules].into_iter().flatten();
        problems.extend(targets.filter_map(|targets| Some(targets.compile().err()?.into())));
        let layers = self.layers_to_transform.as_deref();
        let patterns = self.layers_pattern.iter();
        problems.extend(patterns.filter_map(|pattern| {
            Some(LayerFilter::new(layers, std::slice::from_ref(pattern)).err()?.into())
        }));
        problems.extend(self.key_mapping.compile().err());
        problems
    }
}

/// [`Targeting`] ready to decide about modules.
pub(crate) struct Selection<'a> {
    targeting: &'a Targeting,
    wanted: Option<Matcher<'a>>,
    excluding: Option<Matcher<'a>>,
    filter: LayerFilter<'a>,
}

impl<'a> Selection<'a> {
    /// # Errors
    /// [`PeftError::InvalidPattern`].
    pub(crate) fn new(targeting: &'a Targeting) -> Result<Self, PeftError> {
        Ok(Self {
            targeting,
            wanted: targeting.target_modules.as_ref().map(TargetModules::compile).transpose()?,
            excluding: targeting.exclude_modules.as_ref().map(TargetModules::compile).transpose()?,
            filter: LayerFilter::new(targeting.layers_to_transform.as_deref(), &targeting.layers_pattern)?,
        })
    }

    /// The same in all layers.
    ///
    /// # Errors
    /// [`PeftError::InvalidPattern`].
    pub(crate) fn in_all_layers(self) -> Result<Self, PeftError> {
        Ok(Self { filter: LayerFilter::new(None, &[])?, ..self })
    }

    /// Whether `target_modules` means a module; every module, where nothing is said.
    ///
    /// # Errors
    /// [`PeftError::EndlessPattern`].
    pub(crate) fn matches(&self, module: &str, is_linear: bool) -> Result<bool, PeftError> {
        match &self.wanted {
            Some(wanted) => Ok(wanted.matches_within(module, is_linear, &self.filter)?),
            None => Ok(true),
        }
    }

    /// Whether a module is left alone all the same.
    ///
    /// # Errors
    /// [`PeftError::EndlessPattern`].
    pub(crate) fn excludes(&self, module: &str) -> Result<bool, PeftError> {
        let by_name = match &self.excluding {
            Some(excluding) => excluding.matches(module, true)?,
            None => false,
        };
        Ok(by_name || self.targeting.modules_to_save.iter().any(|saved| lies_within(module, saved)))
    }

    /// Whether a module is adapted.
    ///
    /// # Errors
    /// [`PeftError::EndlessPattern`].
    pub(crate) fn adapts(&self, module: &str, is_linear: bool) -> Result<bool, PeftError> {
        Ok(self.matches(module, is_linear)? && !self.excludes(module)?)
    }

    /// Whether a module is trained whole.
    pub(crate) fn saves(&self, module: &str) -> bool {
        self.targeting.modules_to_save.iter().any(|saved| is_part_of(module, saved))
    }
}

/// Whether `module` is one that `modules_to_save` names or lies within one, by the rule with which PEFT keeps updates
/// out of them.
fn lies_within(module: &str, saved: &str) -> bool {
    ancestors_and_self(module).any(|module| matches_name(module, saved))
}

/// Whether a parameter of `module` is copied because of the entry `saved`: PEFT copies every module whose name ends
/// with it, not only behind a dot, with all it contains.
fn is_part_of(module: &str, saved: &str) -> bool {
    !saved.is_empty() && ancestors_and_self(module).any(|module| module.ends_with(saved))
}

/// No exclusion is none.
fn exclusions_from_json(value: &Value) -> Result<Option<TargetModules>, Hint> {
    let none = TargetModules::Names(BTreeSet::new());
    targets_from_json(value).map(|targets| Some(targets).filter(|targets| *targets != none))
}

/// A list of layers, or a single one.
fn layers_from_json(value: &Value) -> Result<Option<Vec<usize>>, Hint> {
    typed(value).or_else(|_| typed(value).map(|layer| vec![layer])).map(Some)
}
