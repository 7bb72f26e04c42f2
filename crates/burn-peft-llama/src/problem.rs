//! What can be wrong with an entry of a file.

use std::fmt;

use crate::dataset::Place;

/// One field of a `config.json` that cannot be used.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigProblem {
    /// The field.
    pub field: &'static str,
    /// What is allowed.
    pub expected: String,
    /// What was found.
    pub found: String,
}

impl ConfigProblem {
    pub(crate) fn new(field: &'static str, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self { field, expected: expected.into(), found: found.into() }
    }
}

impl fmt::Display for ConfigProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`: expected {}, found {}", self.field, self.expected, self.found)
    }
}

/// One tensor of a checkpoint that does not fit the model.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WeightProblem {
    /// The model needs a tensor that the files do not have.
    Missing {
        /// Its name.
        name: String,
    },
    /// The files have a tensor that the model does not know.
    Unexpected {
        /// Its name.
        name: String,
        /// The most similar name that the model needs.
        nearest: Option<String>,
    },
    /// A tensor has another shape than the configuration says.
    Shape {
        /// Its name.
        name: String,
        /// The shape by the configuration.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A tensor is not of type f32, f16 or bf16.
    Type {
        /// Its name.
        name: String,
        /// Its type.
        found: String,
    },
}

impl fmt::Display for WeightProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { name } => write!(f, "`{name}` is missing"),
            Self::Unexpected { name, nearest: None } => write!(f, "`{name}` is unexpected"),
            Self::Unexpected { name, nearest: Some(nearest) } => {
                write!(f, "`{name}` is unexpected; the nearest name is `{nearest}`")
            }
            Self::Shape { name, expected, found } => {
                write!(f, "`{name}`: expected shape {expected:?}, found {found:?}")
            }
            Self::Type { name, found } => write!(f, "`{name}`: expected f32, f16 or bf16, found {found}"),
        }
    }
}

/// One example of a file that cannot be used.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordProblem {
    /// Where it is.
    pub place: Place,
    /// What is wrong with it; a line `hint: ..` may stand behind it.
    pub reason: String,
}

impl fmt::Display for RecordProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.reason)
    }
}

/// Names in backticks, as alternatives: `` `a`, `b` or `c` ``.
pub(crate) fn alternatives<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let mut names: Vec<String> = names.into_iter().map(|name| format!("`{name}`")).collect();
    let last = names.pop().unwrap_or_default();
    if names.is_empty() { last } else { format!("{} or {last}", names.join(", ")) }
}
