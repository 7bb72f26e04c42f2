//! Counts, as a person reads them.

use std::fmt;

/// How many parameters a model has and how many of them are trained.
///
/// Prints as PEFT's `print_trainable_parameters` does:
///
/// ```
/// use burn_peft::ParameterSummary;
///
/// let summary = ParameterSummary { trainable: 851_968, all: 1_236_666_368 };
/// assert_eq!(
///     summary.to_string(),
///     "trainable params: 851,968 || all params: 1,236,666,368 || trainable%: 0.0689"
/// );
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParameterSummary {
    /// Parameters of the active adapters, and base parameters that still require gradients.
    pub trainable: usize,
    /// All parameters, those of every adapter included.
    pub all: usize,
}

impl ParameterSummary {
    /// Share of trainable parameters in percent, 0 for a model without parameters.
    pub fn percent(&self) -> f64 {
        if self.all == 0 { 0.0 } else { 100.0 * self.trainable as f64 / self.all as f64 }
    }
}

impl fmt::Display for ParameterSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "trainable params: {} || all params: {} || trainable%: {:.4}",
            thousands(self.trainable),
            thousands(self.all),
            self.percent()
        )
    }
}

/// `1236666368` as `1,236,666,368`.
pub(crate) fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.char_indices() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1 module`, `2 modules`.
pub(crate) fn count(number: usize, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{} {noun}{plural}", thousands(number))
}
