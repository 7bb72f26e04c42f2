//! Which modules a configuration means, by PEFT's rules.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fmt;
use std::str::FromStr;

use crate::pattern::{Pattern, PatternError};

/// Which modules of a model are meant, by the rules of PEFT's `target_modules` and `exclude_modules`.
///
/// A module's name is its path in the Burn model, `model.layers.0.self_attn.q_proj` for example.
///
/// ```
/// use burn_peft::TargetModules;
///
/// let listed = TargetModules::from(["q_proj", "mlp.up_proj"]);
/// assert_eq!(listed.to_string(), "[\"mlp.up_proj\", \"q_proj\"]");
/// assert_eq!("all-linear".parse(), Ok(TargetModules::AllLinear));
/// assert_eq!("q_proj,v_proj".parse(), Ok(TargetModules::from(["q_proj", "v_proj"])));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetModules {
    /// Modules whose name is one of these, or ends with `.` and one of these: `q_proj` means every
    /// `….q_proj`, `proj` does not mean `q_proj`.
    Names(BTreeSet<String>),
    /// Modules whose whole name this regular expression matches (Python's `re.fullmatch`, look-around and
    /// back-references included; octal escapes, `(?a)` and comments under `(?x)` are refused).
    Regex(String),
    /// Every linear layer but the output layer, `lm_head`; no embedding. PEFT's `"all-linear"`.
    AllLinear,
}

/// PEFT's word for [`TargetModules::AllLinear`].
pub(crate) const ALL_LINEAR: &str = "all-linear";

/// The module that turns hidden states into logits, by the name that Hugging Face models give it.
pub(crate) const OUTPUT_LAYER: &str = "lm_head";

impl<S: Into<String>, const N: usize> From<[S; N]> for TargetModules {
    fn from(names: [S; N]) -> Self {
        names.into_iter().collect()
    }
}

impl<S: Into<String>> FromIterator<S> for TargetModules {
    fn from_iter<I: IntoIterator<Item = S>>(names: I) -> Self {
        Self::Names(names.into_iter().map(Into::into).collect())
    }
}

/// Reads the notation of a command line: `all-linear`, or names separated by commas.
impl FromStr for TargetModules {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        if text.eq_ignore_ascii_case(ALL_LINEAR) {
            return Ok(Self::AllLinear);
        }
        Ok(text.split(',').map(str::trim).filter(|name| !name.is_empty()).collect())
    }
}

impl fmt::Display for TargetModules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Names(names) => f.debug_list().entries(names).finish(),
            Self::Regex(pattern) => write!(f, "`{pattern}`"),
            Self::AllLinear => write!(f, "`{ALL_LINEAR}`"),
        }
    }
}

impl TargetModules {
    /// Prepares the rules for matching.
    ///
    /// # Errors
    /// [`PatternError::Invalid`] for a regular expression that does not compile.
    pub(crate) fn compile(&self) -> Result<Matcher<'_>, PatternError> {
        Ok(match self {
            Self::Names(names) => Matcher::Names(names),
            Self::Regex(pattern) => Matcher::Regex(Pattern::whole(pattern)?),
            Self::AllLinear => Matcher::AllLinear,
        })
    }
}

/// Patterns with a value each, ready to match.
pub(crate) struct Patterns<T>(Vec<(Pattern, T)>);

impl<T> Default for Patterns<T> {
    fn default() -> Self {
        Self(vec![])
    }
}

impl<T: Copy> Patterns<T> {
    /// # Errors
    /// [`PatternError::Invalid`].
    pub(crate) fn new(patterns: &[(String, T)]) -> Result<Self, PatternError> {
        let compiled = patterns.iter().map(|(pattern, value)| Ok((Pattern::whole_or_end(pattern)?, *value)));
        Ok(Self(compiled.collect::<Result<_, _>>()?))
    }

    /// The same in alphabetical order.
    pub(crate) fn sorted(mut self) -> Self {
        self.0.sort_by(|(a, _), (b, _)| a.as_str().cmp(b.as_str()));
        self
    }

    /// The value of the first pattern that matches `name`.
    ///
    /// # Errors
    /// [`PatternError::Endless`].
    pub(crate) fn first(&self, name: &str) -> Result<Option<T>, PatternError> {
        for (pattern, value) in &self.0 {
            if pattern.is_match(name)? {
                return Ok(Some(*value));
            }
        }
        Ok(None)
    }

    /// The patterns that match none of the names.
    ///
    /// # Errors
    /// [`PatternError::Endless`].
    pub(crate) fn unmatched(&self, names: &BTreeSet<String>) -> Result<Vec<String>, PatternError> {
        let mut unmatched = vec![];
        for (pattern, _) in &self.0 {
            let mut found = false;
            for name in names {
                found |= pattern.is_match(name)?;
            }
            if !found {
                unmatched.push(pattern.as_str().to_string());
            }
        }
        Ok(unmatched)
    }
}

/// `layers_to_transform` and `layers_pattern`, ready to match.
pub(crate) struct LayerFilter<'a> {
    layers: &'a [usize],
    /// Each with one group, the layer's number.
    patterns: Vec<Pattern>,
}

impl<'a> LayerFilter<'a> {
    /// # Errors
    /// [`PatternError::Invalid`].
    pub(crate) fn new(layers: Option<&'a [usize]>, patterns: &[String]) -> Result<Self, PatternError> {
        let patterns = if patterns.is_empty() {
            vec![Pattern::new("", r"^.*?\.[^.]*\.(\d+)\.")?]
        } else {
            let with_number =
                |pattern: &String| Pattern::new(pattern, &format!(r"^(?:|.*?\.)(?:{pattern})\.(\d+)\."));
            patterns.iter().map(with_number).collect::<Result<_, _>>()?
        };
        Ok(Self { layers: layers.unwrap_or_default(), patterns })
    }

    /// Whether a module that matched by the end of its name lies in one of the layers.
    ///
    /// # Errors
    /// [`PatternError::Endless`].
    pub(crate) fn allows(&self, module: &str) -> Result<bool, PatternError> {
        if self.layers.is_empty() {
            return Ok(true);
        }
        for pattern in &self.patterns {
            let Some(groups) = pattern.captures(module)? else { continue };
            let number = groups.get(groups.len() - 1).and_then(|group| group.as_str().parse().ok());
            return Ok(number.is_some_and(|number: usize| self.layers.contains(&number)));
        }
        Ok(false)
    }
}

/// [`TargetModules`] ready to match.
pub(crate) enum Matcher<'a> {
    Names(&'a BTreeSet<String>),
    Regex(Pattern),
    AllLinear,
}

impl Matcher<'_> {
    /// Whether a module is meant, in one of the layers that `filter` allows.
    ///
    /// As in PEFT, the filter does not concern modules whose whole name is listed.
    ///
    /// # Errors
    /// [`PatternError::Endless`].
    pub(crate) fn matches_within(
        &self,
        module: &str,
        is_linear: bool,
        filter: &LayerFilter,
    ) -> Result<bool, PatternError> {
        match self {
            Self::Names(names) if names.contains(module) => Ok(true),
            _ => Ok(self.matches(module, is_linear)? && filter.allows(module)?),
        }
    }

    /// # Errors
    /// [`PatternError::Endless`].
    pub(crate) fn matches(&self, module: &str, is_linear: bool) -> Result<bool, PatternError> {
        match self {
            Self::Names(names) => Ok(names.iter().any(|name| matches_name(module, name))),
            Self::Regex(pattern) => pattern.is_match(module),
            Self::AllLinear => Ok(is_linear && !matches_name(module, OUTPUT_LAYER)),
        }
    }
}

/// Whether `name` is the module's whole name or a dotted suffix of it.
pub(crate) fn matches_name(module: &str, name: &str) -> bool {
    module
        .strip_suffix(name)
        .is_some_and(|parent| parent.is_empty() || (parent.ends_with('.') && !name.is_empty()))
}

/// A module and the modules that it lies in, by name.
pub(crate) fn ancestors_and_self(module: &str) -> impl Iterator<Item = &str> {
    module.match_indices('.').map(|(end, _)| &module[..end]).chain([module])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(targets: TargetModules, module: &str) -> bool {
        targets.compile().unwrap().matches(module, true).unwrap()
    }

    #[test]
    fn a_listed_name_matches_exactly_or_as_a_dotted_suffix() {
        let q = || TargetModules::from(["q_proj"]);
        assert!(matches(q(), "q_proj"));
        assert!(matches(q(), "model.layers.0.self_attn.q_proj"));
        assert!(!matches(q(), "model.layers.0.self_attn.kq_proj"));
        assert!(!matches(q(), "model.layers.0.q_proj.inner"));
        assert!(!matches(TargetModules::from(["proj"]), "q_proj"));
        assert!(matches(TargetModules::from(["self_attn.q_proj"]), "layers.1.self_attn.q_proj"));
        assert!(!matches(TargetModules::from([""]), "q_proj"));
    }

    #[test]
    fn a_regular_expression_matches_the_whole_name() {
        let re = |pattern: &str| TargetModules::Regex(pattern.into());
        assert!(matches(re(r".*\.layers\.[01]\..*_proj"), "model.layers.1.self_attn.v_proj"));
        assert!(!matches(re("q_proj"), "layers.0.q_proj"));
        assert!(!matches(re("q"), "q_proj"));
        assert!(matches(re("a|layers.0.b"), "layers.0.b"));
    }

    #[test]
    fn all_linear_leaves_out_the_output_layer_and_what_is_not_linear() {
        assert!(matches(TargetModules::AllLinear, "layers.0.q_proj"));
        assert!(!matches(TargetModules::AllLinear, "lm_head"));
        assert!(!TargetModules::AllLinear.compile().unwrap().matches("embed_tokens", false).unwrap());
    }

    #[test]
    fn layers_are_filtered_by_their_first_number() {
        let allows = |module: &str, layers: &[usize], patterns: &[&str]| {
            let patterns: Vec<String> = patterns.iter().map(ToString::to_string).collect();
            LayerFilter::new(Some(layers), &patterns).unwrap().allows(module).unwrap()
        };
        assert!(allows("model.layers.1.q_proj", &[0, 1], &[]));
        assert!(!allows("model.layers.10.q_proj", &[0, 1], &[]));
        assert!(allows("model.layers.001.q_proj", &[1], &["layers"]));
        assert!(!allows("model.layers.1.q_proj", &[1], &["h"]));
        assert!(allows("layers.1.q_proj", &[1], &["layers"]));
        assert!(!allows("layers.1.q_proj", &[1], &[]), "without a pattern something stands before `layers`");
        assert!(allows("model.layers.1.experts.2.w", &[1], &[]));
        assert!(!allows("model.layers.1.experts.2.w", &[2], &[]));
        assert!(allows("anything", &[], &[]));
        let q = TargetModules::from(["a.layers.3.q"]);
        let filter = LayerFilter::new(Some(&[1]), &[]).unwrap();
        assert!(q.compile().unwrap().matches_within("a.layers.3.q", true, &filter).unwrap());
        assert!(!q.compile().unwrap().matches_within("b.a.layers.3.q", true, &filter).unwrap());
    }

    #[test]
    fn a_broken_pattern_is_named() {
        let error = TargetModules::Regex("(q_proj".into()).compile().err().unwrap();
        assert!(matches!(error, PatternError::Invalid { pattern, .. } if pattern == "(q_proj"));
    }
}
