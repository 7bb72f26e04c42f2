use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fmt;
use std::str::FromStr;

use regex::Regex;

use crate::error::PeftError;

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
    /// Modules whose whole name this regular expression matches (Python's `re.fullmatch`).
    Regex(String),
    /// Every linear layer but the output layer, `lm_head`; no embedding. PEFT's `"all-linear"`.
    AllLinear,
}

/// PEFT's word for [`TargetModules::AllLinear`].
pub(crate) const ALL_LINEAR: &str = "all-linear";

/// The module that turns hidden states into logits, by the name that Hugging Face models give it.
const OUTPUT_LAYER: &str = "lm_head";

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
    /// [`PeftError::InvalidPattern`] for a regular expression that does not compile.
    pub(crate) fn compile(&self) -> Result<Matcher<'_>, PeftError> {
        Ok(match self {
            Self::Names(names) => Matcher::Names(names),
            Self::Regex(pattern) => {
                Matcher::Regex(Regex::new(&format!("^(?:{pattern})$")).map_err(|source| {
                    PeftError::InvalidPattern { pattern: pattern.clone(), source: Box::new(source) }
                })?)
            }
            Self::AllLinear => Matcher::AllLinear,
        })
    }
}

/// [`TargetModules`] ready to match.
pub(crate) enum Matcher<'a> {
    Names(&'a BTreeSet<String>),
    Regex(Regex),
    AllLinear,
}

impl Matcher<'_> {
    pub(crate) fn matches(&self, module: &str, is_linear: bool) -> bool {
        match self {
            Self::Names(names) => names.iter().any(|name| matches_name(module, name)),
            Self::Regex(regex) => regex.is_match(module),
            Self::AllLinear => is_linear && !matches_name(module, OUTPUT_LAYER),
        }
    }
}

/// Whether `name` is the module's whole name or a dotted suffix of it.
pub(crate) fn matches_name(module: &str, name: &str) -> bool {
    module
        .strip_suffix(name)
        .is_some_and(|parent| parent.is_empty() || (parent.ends_with('.') && !name.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(targets: TargetModules, module: &str) -> bool {
        targets.compile().unwrap().matches(module, true)
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
        assert!(!TargetModules::AllLinear.compile().unwrap().matches("embed_tokens", false));
    }

    #[test]
    fn a_broken_pattern_is_named() {
        let error = TargetModules::Regex("(q_proj".into()).compile().err().unwrap();
        assert_eq!(error.to_string(), "invalid regular expression `(q_proj`");
    }
}
