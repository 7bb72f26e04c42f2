//! Ranks and alphas, by module.

use std::collections::BTreeSet;

use crate::error::PeftError;
use crate::target::Patterns;

/// `r` and `lora_alpha` with their patterns, compiled once for many modules.
#[derive(Default)]
pub(crate) struct Ranks {
    pub(crate) default: (usize, f64),
    pub(crate) rank_pattern: Patterns<usize>,
    pub(crate) alpha_pattern: Patterns<f64>,
}

impl Ranks {
    /// Rank and `lora_alpha` of the module `name`.
    ///
    /// # Errors
    /// [`PeftError::EndlessPattern`].
    pub(crate) fn of(&self, name: &str) -> Result<(usize, f64), PeftError> {
        let (r, lora_alpha) = self.default;
        let r = self.rank_pattern.first(name)?.unwrap_or(r);
        Ok((r, self.alpha_pattern.first(name)?.unwrap_or(lora_alpha)))
    }

    /// The same with the patterns in alphabetical order, as files have them.
    pub(crate) fn sorted(self) -> Self {
        Self { rank_pattern: self.rank_pattern.sorted(), alpha_pattern: self.alpha_pattern.sorted(), ..self }
    }

    /// The patterns of ranks and of alphas that match none of these modules.
    ///
    /// # Errors
    /// [`PeftError::EndlessPattern`].
    pub(crate) fn unmatched(&self, modules: &BTreeSet<String>) -> Result<[Vec<String>; 2], PeftError> {
        Ok([self.rank_pattern.unmatched(modules)?, self.alpha_pattern.unmatched(modules)?])
    }
}
