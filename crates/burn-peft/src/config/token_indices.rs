//! Which tokens are trained.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::field::{Hint, typed};
use crate::target::matches_name;

/// The module that a list of tokens without a name means.
const INPUT_EMBEDDING: &str = "embed_tokens";

/// The tokens whose rows are trained. PEFT's `trainable_token_indices`.
///
/// ```
/// use burn_peft::TokenIndices;
///
/// let of_input = TokenIndices::from([5, 9]);
/// let by_name = TokenIndices::from([("embed_tokens", vec![5, 9]), ("lm_head", vec![7])]);
/// assert_ne!(of_input, by_name);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenIndices {
    /// Of the embedding named `embed_tokens`.
    Embedding(Vec<usize>),
    /// By module: every embedding or output layer whose name ends with the key.
    Modules(BTreeMap<String, Vec<usize>>),
}

impl<const N: usize> From<[usize; N]> for TokenIndices {
    fn from(indices: [usize; N]) -> Self {
        Self::Embedding(indices.to_vec())
    }
}

impl From<Vec<usize>> for TokenIndices {
    fn from(indices: Vec<usize>) -> Self {
        Self::Embedding(indices)
    }
}

impl<S: Into<String>, const N: usize> From<[(S, Vec<usize>); N]> for TokenIndices {
    fn from(modules: [(S, Vec<usize>); N]) -> Self {
        Self::Modules(modules.into_iter().map(|(name, indices)| (name.into(), indices)).collect())
    }
}

impl TokenIndices {
    /// The names of modules, and their tokens.
    pub(crate) fn entries(&self) -> Vec<(&str, &[usize])> {
        match self {
            Self::Embedding(indices) => vec![(INPUT_EMBEDDING, indices)],
            Self::Modules(modules) => modules.iter().map(|(name, indices)| (&**name, &**indices)).collect(),
        }
    }

    /// The entry that means the module `name`.
    pub(crate) fn of(&self, name: &str) -> Option<(&str, &[usize])> {
        let is_meant = |entry: &str| match self {
            Self::Embedding(_) => matches_name(name, entry),
            Self::Modules(_) => name.ends_with(entry),
        };
        self.entries().into_iter().find(|(entry, _)| is_meant(entry))
    }

    pub(crate) fn from_json(value: &Value) -> Result<Self, Hint> {
        if value.is_object() { typed(value).map(Self::Modules) } else { typed(value).map(Self::Embedding) }
    }

    pub(crate) fn to_json(&self) -> Value {
        match self {
            Self::Embedding(indices) => json!(indices),
            Self::Modules(modules) => json!(modules),
        }
    }
}
