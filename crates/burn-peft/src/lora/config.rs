use std::fmt;

use crate::error::PeftError;
use crate::target::TargetModules;

/// How a model is adapted: PEFT's `LoraConfig`, with PEFT's names and defaults.
///
/// ```
/// use burn_peft::{LoraConfig, TargetModules};
///
/// let config = LoraConfig::new(16)
///     .with_lora_alpha(32.0)
///     .with_lora_dropout(0.05)
///     .with_target_modules(TargetModules::AllLinear);
/// assert_eq!(config.scaling(), 2.0);
/// assert_eq!(config.with_use_rslora(true).scaling(), 8.0);
/// ```
///
/// # References
/// [LoRA, Hu et al., 2021](https://arxiv.org/abs/2106.09685).
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Rank of the update, at least 1. PEFT's default is 8.
    pub r: usize,
    /// Numerator of the scaling, finite. Default 8, as in PEFT.
    pub lora_alpha: f64,
    /// Probability in `[0, 1)` with which an element of the adapter's input is zeroed while training. Default 0.
    ///
    /// Only [`LoraLinear`](crate::LoraLinear) shows its input to the adapter; on a plain linear layer a value above 0 is
    /// refused. It does not act on embeddings, whose input are token ids.
    pub lora_dropout: f64,
    /// The modules to adapt. There is no default: a model is not asked for its architecture.
    pub target_modules: Option<TargetModules>,
    /// Modules that are left alone even if they are targets. Default: none.
    pub exclude_modules: Option<TargetModules>,
    /// Scale by `lora_alpha / sqrt(r)` instead of `lora_alpha / r`
    /// ([rsLoRA, Kalajdzievski, 2023](https://arxiv.org/abs/2312.03732)). Default false.
    pub use_rslora: bool,
    /// Which biases are trained. Default [`Bias::None`].
    pub bias: Bias,
    /// How the factors start. Default [`InitLoraWeights::KaimingUniform`].
    pub init_lora_weights: InitLoraWeights,
    /// The base model's directory or hub id, for those who load the adapter later. Default: unknown.
    pub base_model_name_or_path: Option<String>,
    /// PEFT's `task_type`, `CAUSAL_LM` for a language model. Has no effect on the computation. Default: unset.
    pub task_type: Option<String>,
}

/// Which biases an adapter trains.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Bias {
    /// None of them, PEFT's `"none"`.
    #[default]
    None,
}

/// How the factors `A` (`[d_in, r]`) and `B` (`[r, d_out]`) start.
///
/// For an embedding `A` (`[vocabulary, r]`) is zero and `B` is drawn from `N(0, 1)`, whichever of the first two is
/// chosen; [`Random`](Self::Random) is the same for all layers.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum InitLoraWeights {
    /// `A ~ U(-1/sqrt(d_in), 1/sqrt(d_in))`, `B = 0`: PEFT's `true`, Kaiming-uniform with `a = sqrt(5)`.
    #[default]
    KaimingUniform,
    /// `A ~ N(0, 1/r²)`, standard deviation `1/r`, `B = 0`: PEFT's `"gaussian"`.
    Gaussian,
    /// `A ~ U(±1/sqrt(d_in))`, `B ~ U(±1/sqrt(r))`: PEFT's `false`. The fresh adapter is not a no-op; for tests.
    Random,
}

impl Default for LoraConfig {
    /// PEFT's defaults: rank 8, `lora_alpha` 8, no dropout, no targets.
    fn default() -> Self {
        Self::new(8)
    }
}

impl LoraConfig {
    /// PEFT's defaults at rank `r`. Values are checked when the configuration is used.
    pub fn new(r: usize) -> Self {
        Self {
            r,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            target_modules: None,
            exclude_modules: None,
            use_rslora: false,
            bias: Bias::None,
            init_lora_weights: InitLoraWeights::KaimingUniform,
            base_model_name_or_path: None,
            task_type: None,
        }
    }

    /// Sets [`lora_alpha`](Self::lora_alpha).
    pub fn with_lora_alpha(mut self, lora_alpha: f64) -> Self {
        self.lora_alpha = lora_alpha;
        self
    }

    /// Sets [`lora_dropout`](Self::lora_dropout).
    pub fn with_lora_dropout(mut self, lora_dropout: f64) -> Self {
        self.lora_dropout = lora_dropout;
        self
    }

    /// Sets [`target_modules`](Self::target_modules).
    pub fn with_target_modules(mut self, target_modules: impl Into<TargetModules>) -> Self {
        self.target_modules = Some(target_modules.into());
        self
    }

    /// Sets [`exclude_modules`](Self::exclude_modules).
    pub fn with_exclude_modules(mut self, exclude_modules: impl Into<TargetModules>) -> Self {
        self.exclude_modules = Some(exclude_modules.into());
        self
    }

    /// Sets [`use_rslora`](Self::use_rslora).
    pub fn with_use_rslora(mut self, use_rslora: bool) -> Self {
        self.use_rslora = use_rslora;
        self
    }

    /// Sets [`init_lora_weights`](Self::init_lora_weights).
    pub fn with_init_lora_weights(mut self, init_lora_weights: InitLoraWeights) -> Self {
        self.init_lora_weights = init_lora_weights;
        self
    }

    /// Sets [`base_model_name_or_path`](Self::base_model_name_or_path).
    pub fn with_base_model_name_or_path(mut self, name: impl Into<String>) -> Self {
        self.base_model_name_or_path = Some(name.into());
        self
    }

    /// Sets [`task_type`](Self::task_type).
    pub fn with_task_type(mut self, task_type: impl Into<String>) -> Self {
        self.task_type = Some(task_type.into());
        self
    }

    /// The factor of the update: `lora_alpha / r`, or `lora_alpha / sqrt(r)` with
    /// [`use_rslora`](Self::use_rslora). PEFT's `scaling`.
    pub fn scaling(&self) -> f64 {
        let r = self.r as f64;
        self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    /// Checks every value.
    ///
    /// # Errors
    /// [`PeftError::InvalidConfig`] for a rank of 0, a `lora_alpha` that is not finite, a `lora_dropout` outside
    /// `[0, 1)`, and `target_modules` that are absent or empty.
    pub fn validate(&self) -> Result<(), PeftError> {
        let invalid = |field, expected, found: &dyn fmt::Display| {
            Err(PeftError::InvalidConfig { field, expected, found: found.to_string() })
        };
        if self.r == 0 {
            return invalid("r", "a positive integer", &self.r);
        }
        if !self.lora_alpha.is_finite() {
            return invalid("lora_alpha", "a finite number", &self.lora_alpha);
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return invalid("lora_dropout", "a probability in [0, 1)", &self.lora_dropout);
        }
        match &self.target_modules {
            None => invalid("target_modules", "names, a regular expression or `all-linear`", &"nothing"),
            Some(TargetModules::Names(names)) if names.is_empty() => {
                invalid("target_modules", "at least one name", &"an empty list")
            }
            Some(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(config: LoraConfig) -> String {
        config.validate().unwrap_err().to_string()
    }

    #[test]
    fn each_bad_value_is_named_with_its_range() {
        let good = LoraConfig::new(4).with_target_modules(["q_proj"]);
        assert!(good.validate().is_ok());
        assert_eq!(
            message(LoraConfig { r: 0, ..good.clone() }),
            "invalid `r`: expected a positive integer, found 0"
        );
        assert_eq!(
            message(good.clone().with_lora_dropout(1.0)),
            "invalid `lora_dropout`: expected a probability in [0, 1), found 1"
        );
        assert_eq!(
            message(good.clone().with_lora_alpha(f64::NAN)),
            "invalid `lora_alpha`: expected a finite number, found NaN"
        );
        assert_eq!(
            message(LoraConfig::new(4)),
            "invalid `target_modules`: expected names, a regular expression or `all-linear`, found nothing"
        );
    }
}
