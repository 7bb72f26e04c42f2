//! What can be wrong with a field of `config.json`.

/// One field of a `config.json` that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigProblem {
    /// The field.
    pub field: &'static str,
    /// What is allowed.
    pub expected: String,
    /// What was found.
    pub found: String,
}

impl std::fmt::Display for ConfigProblem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}`: expected {}, found {}", self.field, self.expected, self.found)
    }
}
