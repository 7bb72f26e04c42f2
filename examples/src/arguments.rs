//! Values of options.

use std::convert::Infallible;
use std::fmt;

use burn::tensor::FloatDType;
use burn_peft::TargetModules;
use burn_peft_llama::Schedule;
use clap::ValueEnum;

/// Course of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Decay {
    /// In a straight line to 0
    Linear,
    /// Half a cosine wave to 0
    Cosine,
    /// No decay
    #[value(alias = "constant_with_warmup")]
    Constant,
}

impl From<Decay> for Schedule {
    fn from(decay: Decay) -> Self {
        match decay {
            Decay::Linear => Self::Linear,
            Decay::Cosine => Self::Cosine,
            Decay::Constant => Self::ConstantWithWarmup,
        }
    }
}

impl fmt::Display for Decay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Linear => "linear",
            Self::Cosine => "cosine",
            Self::Constant => "constant",
        })
    }
}

/// Floating-point type of the base model's weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Precision {
    /// 32 bits
    F32,
    /// bfloat16
    Bf16,
    /// IEEE half precision
    F16,
}

impl Precision {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
}

impl From<Precision> for FloatDType {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32,
            Precision::Bf16 => Self::BF16,
            Precision::F16 => Self::F16,
        }
    }
}

fn at_least(least: usize, text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| *number >= least);
    number.ok_or_else(|| format!("expected a whole number of {least} or more"))
}

/// A whole number of 1 or more.
pub fn at_least_one(text: &str) -> Result<usize, String> {
    at_least(1, text)
}

/// A whole number of 2 or more.
pub fn at_least_two(text: &str) -> Result<usize, String> {
    at_least(2, text)
}

fn number(text: &str, expected: &str, is_good: impl Fn(f64) -> bool) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite() && is_good(*number));
    number.ok_or_else(|| format!("expected {expected}"))
}

/// A number above 0.
pub fn positive(text: &str) -> Result<f64, String> {
    number(text, "a number above 0", |number| number > 0.0)
}

/// A number of 0 or more.
pub fn not_negative(text: &str) -> Result<f64, String> {
    number(text, "a number of 0 or more", |number| number >= 0.0)
}

/// A number of at least 0 and below 1.
pub fn probability(text: &str) -> Result<f64, String> {
    number(text, "a number of at least 0 and below 1", |number| (0.0..1.0).contains(&number))
}

/// `all-linear`, or names separated by commas. `all-linear` in a list would be the name of a module that no model has.
pub fn targets(text: &str) -> Result<TargetModules, String> {
    let targets = text.parse();
    match &targets {
        Ok(TargetModules::Names(names)) if names.is_empty() => Err("expected at least one name".into()),
        Ok(TargetModules::Names(names))
            if names.iter().any(|name| name.eq_ignore_ascii_case("all-linear")) =>
        {
            Err("`all-linear` means every linear layer and stands alone".into())
        }
        _ => targets.map_err(|never: Infallible| match never {}),
    }
}

/// A number above 0, and at most 1.
pub fn share(text: &str) -> Result<f64, String> {
    number(text, "a number above 0, and at most 1", |number| number > 0.0 && number <= 1.0)
}
