use std::fmt;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::PeftError;
use crate::key_mapping::KeyMapping;
use crate::pattern::Pattern;
use crate::store;
use crate::target::{LayerFilter, Patterns, TargetModules};

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
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Rank of the update, from 1 to 65536. PEFT's default is 8.
    pub r: usize,
    /// Numerator of the scaling, finite. Default 8, as in PEFT.
    pub lora_alpha: f64,
    /// Probability in `[0, 1)` with which an element of the adapter's input is zeroed while training. Default 0.
    ///
    /// Only [`LoraLinear`](crate::LoraLinear) shows its input to the adapter; on a plain linear layer or a convolution a
    /// value above 0 is refused. It does not act on embeddings, whose input are token ids.
    pub lora_dropout: f64,
    /// The modules to adapt. There is no default: a model is not asked for its architecture.
    pub target_modules: Option<TargetModules>,
    /// Modules that are left alone even if they are targets. Default: none.
    pub exclude_modules: Option<TargetModules>,
    /// Ranks of their own for some modules: pairs of a pattern and a rank, at least 1. A pattern is a regular expression
    /// that matches the whole name of a module or its end behind a dot; the first one that matches counts. Default:
    /// none.
    pub rank_pattern: Vec<(String, usize)>,
    /// As [`rank_pattern`](Self::rank_pattern), for [`lora_alpha`](Self::lora_alpha). Default: none.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Of the modules that match a listed name by their end, only those in layers with these numbers. A module's layer
    /// is the first component of its name that is a number behind another component. Default: all.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Which component stands before a layer's number, `layers` or `h` for example, as regular expressions; the first
    /// that is found counts. Needs [`layers_to_transform`](Self::layers_to_transform). Default: any.
    pub layers_pattern: Vec<String>,
    /// Scale by `lora_alpha / sqrt(r)` instead of `lora_alpha / r`
    /// ([rsLoRA, Kalajdzievski, 2023](https://arxiv.org/abs/2312.03732)). Default false.
    pub use_rslora: bool,
    /// Which biases of the base are trained. Default [`Bias::None`].
    pub bias: Bias,
    /// Whether `B` has a bias, trained and scaled with the update. Not on embeddings, and a plain layer needs a bias of
    /// its own to carry it. Default false.
    pub lora_bias: bool,
    /// Modules that are trained and saved whole, every parameter a copy: those whose name ends with one of these. They
    /// get no update of low rank. Default: none.
    pub modules_to_save: Vec<String>,
    /// How the factors start. Default [`InitLoraWeights::KaimingUniform`].
    pub init_lora_weights: InitLoraWeights,
    /// Whether PyTorch's base model stores its weights as `[d_in, d_out]`. Kept for the file and without effect here:
    /// factors have one layout in memory and one in files. Default false.
    pub fan_in_fan_out: bool,
    /// The base model's directory or hub id, for those who load the adapter later. Default: unknown.
    pub base_model_name_or_path: Option<String>,
    /// PEFT's `task_type`, `CAUSAL_LM` for a language model. Has no effect on the computation. Default: unset.
    pub task_type: Option<String>,
    /// How Burn paths become the names in Hugging Face files, for targets, for loading and for saving. Not part of the
    /// file. Default: they are equal.
    pub key_mapping: KeyMapping,
    /// Entries of `adapter_config.json` that have no effect on the computation, to be written back as they were read.
    pub(crate) kept: Map<String, Value>,
}

/// PEFT's key for how the factors start.
pub(crate) const INIT_LORA_WEIGHTS: &str = "init_lora_weights";

/// PEFT's key for one adapter of both ends of a tied weight.
pub(crate) const ENSURE_WEIGHT_TYING: &str = "ensure_weight_tying";

/// A rank above this is a mistake, and would ask for more memory than there is.
const MAX_RANK: usize = 65_536;

/// Which biases of the base model an adapter trains, as copies: disabling the adapter gives the base's biases back.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Bias {
    /// None of them, PEFT's `"none"`.
    #[default]
    None,
    /// Every parameter named `bias`, PEFT's `"all"`.
    All,
    /// The biases of adapted modules, PEFT's `"lora_only"`.
    LoraOnly,
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
            rank_pattern: vec![],
            alpha_pattern: vec![],
            layers_to_transform: None,
            layers_pattern: vec![],
            use_rslora: false,
            bias: Bias::None,
            lora_bias: false,
            modules_to_save: vec![],
            init_lora_weights: InitLoraWeights::KaimingUniform,
            fan_in_fan_out: false,
            base_model_name_or_path: None,
            task_type: None,
            key_mapping: KeyMapping::default(),
            kept: Map::new(),
        }
    }

    /// Reads `adapter_config.json` of an adapter directory. PEFT's `LoraConfig.from_pretrained`.
    ///
    /// [`AdapterDirectory`](crate::AdapterDirectory) also tells what is wrong with a configuration that is refused here.
    ///
    /// # Errors
    /// - [`PeftError::NoAdapter`], [`PeftError::Io`], [`PeftError::Json`]: the file
    /// - [`PeftError::UnsupportedConfig`] with every entry that asks for something else than LoRA as it is computed here
    pub fn from_pretrained(directory: impl AsRef<Path>) -> Result<Self, PeftError> {
        Ok(store::read_config(directory.as_ref())?.0)
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

    /// Sets [`rank_pattern`](Self::rank_pattern).
    pub fn with_rank_pattern<S: Into<String>>(mut self, ranks: impl IntoIterator<Item = (S, usize)>) -> Self {
        self.rank_pattern = ranks.into_iter().map(|(pattern, r)| (pattern.into(), r)).collect();
        self
    }

    /// Sets [`alpha_pattern`](Self::alpha_pattern).
    pub fn with_alpha_pattern<S: Into<String>>(mut self, alphas: impl IntoIterator<Item = (S, f64)>) -> Self {
        self.alpha_pattern = alphas.into_iter().map(|(pattern, alpha)| (pattern.into(), alpha)).collect();
        self
    }

    /// Sets [`layers_to_transform`](Self::layers_to_transform).
    pub fn with_layers_to_transform(mut self, layers: impl IntoIterator<Item = usize>) -> Self {
        self.layers_to_transform = Some(layers.into_iter().collect());
        self
    }

    /// Sets [`layers_pattern`](Self::layers_pattern).
    pub fn with_layers_pattern<S: Into<String>>(mut self, patterns: impl IntoIterator<Item = S>) -> Self {
        self.layers_pattern = patterns.into_iter().map(Into::into).collect();
        self
    }

    /// Sets [`bias`](Self::bias).
    pub fn with_bias(mut self, bias: Bias) -> Self {
        self.bias = bias;
        self
    }

    /// Sets [`lora_bias`](Self::lora_bias).
    pub fn with_lora_bias(mut self, lora_bias: bool) -> Self {
        self.lora_bias = lora_bias;
        self
    }

    /// Sets [`modules_to_save`](Self::modules_to_save).
    pub fn with_modules_to_save<S: Into<String>>(mut self, modules: impl IntoIterator<Item = S>) -> Self {
        self.modules_to_save = modules.into_iter().map(Into::into).collect();
        self
    }

    /// Sets [`key_mapping`](Self::key_mapping).
    pub fn with_key_mapping(mut self, key_mapping: KeyMapping) -> Self {
        self.key_mapping = key_mapping;
        self
    }

    /// Sets [`use_rslora`](Self::use_rslora).
    pub fn with_use_rslora(mut self, use_rslora: bool) -> Self {
        self.use_rslora = use_rslora;
        self
    }

    /// Sets [`init_lora_weights`](Self::init_lora_weights), in the place of a start that was read from a file.
    pub fn with_init_lora_weights(mut self, init_lora_weights: InitLoraWeights) -> Self {
        self.kept.remove(INIT_LORA_WEIGHTS);
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
    /// [`use_rslora`](Self::use_rslora). PEFT's `scaling`; modules that a pattern names have their own.
    pub fn scaling(&self) -> f64 {
        self.scaling_of(self.r, self.lora_alpha)
    }

    pub(crate) fn scaling_of(&self, r: usize, lora_alpha: f64) -> f64 {
        let r = r as f64;
        lora_alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    /// PEFT's word for how the factors started, if the configuration is from a file and the word chooses factors in a way
    /// that is not computed here: `eva`, `loftq`, `mica`, `orthogonal`. A trained adapter does not depend on it; a new one
    /// cannot be made with it. `None` as well once [`init_lora_weights`](Self::init_lora_weights) has another value than
    /// its default.
    pub fn init_in_file(&self) -> Option<&str> {
        let word = self.kept.get(INIT_LORA_WEIGHTS).and_then(Value::as_str);
        word.filter(|_| self.init_lora_weights == InitLoraWeights::default())
    }

    /// Whether a file asks for `ensure_weight_tying`.
    pub(crate) fn ensures_weight_tying(&self) -> bool {
        self.kept.get(ENSURE_WEIGHT_TYING) == Some(&Value::Bool(true))
    }

    /// Ranks and alphas of modules, patterns considered.
    ///
    /// # Errors
    /// [`PeftError::InvalidPattern`].
    pub(crate) fn ranks(&self) -> Result<Ranks, PeftError> {
        Ok(Ranks {
            default: (self.r, self.lora_alpha),
            rank_pattern: Patterns::new(&self.rank_pattern)?,
            alpha_pattern: Patterns::new(&self.alpha_pattern)?,
        })
    }

    /// Checks every value.
    ///
    /// # Errors
    /// [`PeftError::InvalidConfig`] for a value outside its range, for `target_modules` that are absent or empty, and
    /// for settings that exclude each other: `layers_pattern` without `layers_to_transform`, either of them with
    /// `target_modules` that are no list. [`PeftError::InvalidPattern`] for regular expressions that do not compile.
    pub fn validate(&self) -> Result<(), PeftError> {
        self.problems().into_iter().next().map_or(Ok(()), Err)
    }

    /// All that [`validate`](Self::validate) finds wrong.
    pub(crate) fn problems(&self) -> Vec<PeftError> {
        let mut problems = vec![];
        let mut invalid = |field, expected, found: &dyn fmt::Display| {
            problems.push(PeftError::InvalidConfig { field, expected, found: found.to_string() });
        };
        if self.r == 0 {
            invalid("r", "a positive integer", &self.r);
        }
        if self.r > MAX_RANK {
            invalid("r", "at most 65536", &self.r);
        }
        if let Some((pattern, r)) = self.rank_pattern.iter().find(|(_, r)| *r > MAX_RANK) {
            invalid("rank_pattern", "ranks of at most 65536", &format!("{r} for `{pattern}`"));
        }
        if let Some((pattern, _)) = self.rank_pattern.iter().find(|(_, r)| *r == 0) {
            invalid("rank_pattern", "positive integers", &format!("0 for `{pattern}`"));
        }
        if !self.lora_alpha.is_finite() {
            invalid("lora_alpha", "a finite number", &self.lora_alpha);
        }
        if let Some((pattern, alpha)) = self.alpha_pattern.iter().find(|(_, alpha)| !alpha.is_finite()) {
            invalid("alpha_pattern", "finite numbers", &format!("{alpha} for `{pattern}`"));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            invalid("lora_dropout", "a probability in [0, 1)", &self.lora_dropout);
        }
        let transformed = self.layers_to_transform.as_ref().is_some_and(|layers| !layers.is_empty());
        if !self.layers_pattern.is_empty() && !transformed {
            invalid("layers_pattern", "`layers_to_transform` beside it", &"none");
        }
        match &self.target_modules {
            None => invalid("target_modules", "names, a regular expression or `all-linear`", &"nothing"),
            Some(TargetModules::Names(names)) if names.is_empty() => {
                invalid("target_modules", "at least one name", &"an empty list");
            }
            Some(TargetModules::Regex(_)) if transformed => {
                invalid("layers_to_transform", "`target_modules` that are a list", &"a regular expression");
            }
            Some(TargetModules::AllLinear) if transformed => {
                invalid("layers_to_transform", "`target_modules` that are a list", &"`all-linear`");
            }
            Some(_) => {}
        }
        let targets = [&self.target_modules, &self.exclude_modules].into_iter().flatten();
        problems.extend(targets.filter_map(|targets| targets.compile().err()));
        let layers = self.layers_to_transform.as_deref();
        problems.extend(
            self.layers_pattern
                .iter()
                .filter_map(|pattern| LayerFilter::new(layers, std::slice::from_ref(pattern)).err()),
        );
        let patterns = self.rank_pattern.iter().map(|(pattern, _)| pattern);
        let patterns = patterns.chain(self.alpha_pattern.iter().map(|(pattern, _)| pattern));
        problems.extend(patterns.filter_map(|pattern| Pattern::whole_or_end(pattern).err()));
        problems.extend(self.key_mapping.compile().err());
        problems
    }
}

/// `r` and `lora_alpha` with their patterns, compiled once for many modules.
pub(crate) struct Ranks {
    default: (usize, f64),
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_pattern_that_matches_decides() {
        let config = LoraConfig::new(4)
            .with_lora_alpha(8.0)
            .with_use_rslora(true)
            .with_rank_pattern([(r"layers\.1\.q", 16), ("q", 2)])
            .with_alpha_pattern([("k|q", 1.0)]);
        let ranks = config.ranks().unwrap();
        assert_eq!(ranks.of("model.layers.1.q").unwrap(), (16, 1.0));
        assert_eq!(ranks.of("model.layers.0.q").unwrap(), (2, 1.0));
        assert_eq!(ranks.of("model.layers.0.kq").unwrap(), (4, 8.0));
        assert_eq!(ranks.of("q").unwrap(), (2, 1.0));
        assert_eq!(config.scaling_of(16, 1.0), 0.25);
    }

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
            message(good.clone().with_rank_pattern([("v_proj", 3), ("q", 0)])),
            "invalid `rank_pattern`: expected positive integers, found 0 for `q`"
        );
        assert_eq!(
            message(good.clone().with_alpha_pattern([("q", f64::INFINITY)])),
            "invalid `alpha_pattern`: expected finite numbers, found inf for `q`"
        );
        assert_eq!(message(good.clone().with_rank_pattern([("(q", 3)])), "invalid regular expression `(q`");
        assert_eq!(
            message(good.clone().with_layers_pattern(["layers"])),
            "invalid `layers_pattern`: expected `layers_to_transform` beside it, found none"
        );
        let by_regex = good.clone().with_target_modules(TargetModules::Regex("q".into()));
        assert_eq!(
            message(by_regex.with_layers_to_transform([1])),
            "invalid `layers_to_transform`: expected `target_modules` that are a list, found a regular expression"
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
