//! From the paths of a Burn model to the names in files.

use crate::error::PeftError;
use crate::pattern::Pattern;

/// How the parameter paths of a Burn model become the names in Hugging Face files.
///
/// A model whose fields are named as in the files needs none. For any other, state the rules once, in
/// [`LoraConfig::with_key_mapping`](crate::LoraConfig::with_key_mapping) and
/// [`LoadOptions::with_key_mapping`](crate::LoadOptions::with_key_mapping): targets, loading and saving then speak of
/// the names in the files.
///
/// A rule is a regular expression and its replacement, which may name groups as `$1` or `${name}`. Rules apply in
/// order to the whole path, `layers.0.mha.query.weight` for example, each to what the ones before it made, at every
/// place where it matches.
///
/// ```
/// use burn_peft::KeyMapping;
///
/// let names = KeyMapping::new([
///     (r"^layers\.(\d+)\.mha\.", "encoder.layer.$1.attention.self."),
///     (r"\.pwff\.linear_inner\.", ".intermediate.dense."),
/// ]);
/// assert_eq!(
///     names.apply("layers.3.mha.query.weight")?,
///     "encoder.layer.3.attention.self.query.weight"
/// );
/// # Ok::<(), burn_peft::PeftError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KeyMapping {
    pub(crate) rules: Vec<(String, String)>,
}

impl KeyMapping {
    /// Rules as pairs of a regular expression and its replacement.
    pub fn new<P: Into<String>, R: Into<String>>(rules: impl IntoIterator<Item = (P, R)>) -> Self {
        let rules = rules.into_iter().map(|(pattern, with)| (pattern.into(), with.into()));
        Self { rules: rules.collect() }
    }

    /// The name in files of the parameter at `path`.
    ///
    /// # Errors
    /// [`PeftError::InvalidPattern`], [`PeftError::EndlessPattern`].
    pub fn apply(&self, path: &str) -> Result<String, PeftError> {
        self.compile()?.apply(path)
    }

    /// # Errors
    /// [`PeftError::InvalidPattern`].
    pub(crate) fn compile(&self) -> Result<CompiledMapping, PeftError> {
        let compile = |(pattern, with): &(String, String)| {
            Ok::<_, PeftError>((Pattern::new(pattern, pattern)?, with.clone()))
        };
        Ok(CompiledMapping(self.rules.iter().map(compile).collect::<Result<_, _>>()?))
    }
}

/// A [`KeyMapping`] ready to be applied many times.
pub(crate) struct CompiledMapping(Vec<(Pattern, String)>);

impl CompiledMapping {
    /// # Errors
    /// [`PeftError::EndlessPattern`].
    pub(crate) fn apply(&self, path: &str) -> Result<String, PeftError> {
        let mut rules = self.0.iter();
        Ok(rules.try_fold(path.to_string(), |name, (pattern, with)| pattern.replace_all(&name, with))?)
    }
}
