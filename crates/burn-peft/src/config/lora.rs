//! The configuration of LoRA.

use std::fmt;

use serde_json::{Map, Value, json};

use super::field::{Field, Hint, fields, index, number, patterns_from_json, patterns_to_json, typed};
use super::{Configuration, FileFields, Ranks, Targeting, TokenIndices};
use crate::error::{ConfigProblem, PeftError};
use crate::init::InitLoraWeights;
use crate::key_mapping::KeyMapping;
use crate::pattern::Pattern;
use crate::target::{Patterns, TargetModules};

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
/// With serde it is the object in `adapter_config.json`, and so can be a field of your own configuration.
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
    /// It needs [`LoraLinear`](crate::LoraLinear), which gives its input to the adapter. On a plain linear layer or a
    /// convolution, a value above 0 is refused. It does not act on embeddings, whose inputs are token ids.
    pub lora_dropout: f64,
    /// Other ranks for some modules: pairs of a pattern and a rank of at least 1. A pattern is a regular expression that
    /// matches the whole name of a module or its end behind a dot. The first pattern that matches counts. Default: none.
    pub rank_pattern: Vec<(String, usize)>,
    /// As [`rank_pattern`](Self::rank_pattern), for [`lora_alpha`](Self::lora_alpha). Default: none.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Scale by `lora_alpha / sqrt(r)` instead of `lora_alpha / r`
    /// ([rsLoRA, Kalajdzievski, 2023](https://arxiv.org/abs/2312.03732)). Default false.
    pub use_rslora: bool,
    /// DoRA: train the norms of the weight's columns apart from their directions,
    /// `W' = m / ‖W + scaling A B‖ (W + scaling A B)`. `m`, `[d_out]`, is trained and starts as the norms of `W`; the norm in
    /// the denominator is a constant in the backward pass
    /// ([DoRA, Liu et al., 2024](https://arxiv.org/abs/2402.09353)). Not with [`lora_bias`](Self::lora_bias). Default false.
    ///
    /// Several active adapters with DoRA add up: each is measured against the base. In PEFT a later one also scales what
    /// earlier ones added.
    pub use_dora: bool,
    /// Which biases of the base are trained. Default [`Bias::None`].
    pub bias: Bias,
    /// Whether `B` has a bias, which is trained and scaled with the update. Embeddings cannot have one, and a plain layer
    /// needs a bias of its own, to which it is added. Default false.
    pub lora_bias: bool,
    /// How the factors start. Default [`InitLoraWeights::KaimingUniform`].
    pub init_lora_weights: InitLoraWeights,
    /// Tokens whose rows in an embedding or an output layer are trained. An output layer that is tied to the embedding
    /// reads the same rows. The module can be neither a target nor saved whole. Default: none.
    pub trainable_token_indices: Option<TokenIndices>,
    /// Whether an adapter of an embedding must also change an output layer that is tied to it. Trained tokens always do.
    /// With anything else on a tied embedding it is refused. Default false.
    pub ensure_weight_tying: bool,
    /// Whether PyTorch's base model stores its weights as `[d_in, d_out]`. It is kept for the file and changes nothing here:
    /// factors have one layout in memory and one in files. Default false.
    pub fan_in_fan_out: bool,
    /// Which modules are meant.
    pub targeting: Targeting,
    /// What a file carries along.
    pub file: FileFields,
}

/// A rank above this is a mistake, and would ask for more memory than there is.
const MAX_RANK: usize = 65_536;

/// Which biases of the base model an adapter trains. It trains copies: without the adapter, the model has the base's biases.
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

impl Bias {
    /// PEFT's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::All => "all",
            Self::LoraOnly => "lora_only",
        }
    }

    fn from_json(value: &Value) -> Result<Self, Hint> {
        let kinds = [Self::None, Self::All, Self::LoraOnly];
        let found = kinds.into_iter().find(|bias| value.as_str() == Some(bias.as_str()));
        found.ok_or("expected \"none\", \"all\" or \"lora_only\"")
    }
}

/// Methods that set one field and return the configuration. Without `=>`, the field has the argument's name.
macro_rules! setters {
    ($($(#[$doc:meta])* pub fn $name:ident($value:ident: $type:ty) $(=> $($field:ident).+ = $set:expr)?;)*) => {
        $(
            $(#[$doc])*
            pub fn $name(mut self, $value: $type) -> Self {
                setters!(@set self, $value $(, $($field).+ = $set)?);
                self
            }
        )*
    };
    (@set $self:ident, $value:ident) => { $self.$value = $value };
    (@set $self:ident, $value:ident, $($field:ident).+ = $set:expr) => { $self.$($field).+ = $set };
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
            rank_pattern: vec![],
            alpha_pattern: vec![],
            use_rslora: false,
            use_dora: false,
            bias: Bias::None,
            lora_bias: false,
            init_lora_weights: InitLoraWeights::KaimingUniform,
            trainable_token_indices: None,
            ensure_weight_tying: false,
            fan_in_fan_out: false,
            targeting: Targeting::default(),
            file: FileFields::default(),
        }
    }

    setters! {
        /// Sets [`lora_alpha`](Self::lora_alpha).
        pub fn with_lora_alpha(lora_alpha: f64);
        /// Sets [`lora_dropout`](Self::lora_dropout).
        pub fn with_lora_dropout(lora_dropout: f64);
        /// Sets [`target_modules`](Targeting::target_modules).
        pub fn with_target_modules(target_modules: impl Into<TargetModules>)
            => targeting.target_modules = Some(target_modules.into());
        /// Sets [`exclude_modules`](Targeting::exclude_modules).
        pub fn with_exclude_modules(exclude_modules: impl Into<TargetModules>)
            => targeting.exclude_modules = Some(exclude_modules.into());
        /// Sets [`rank_pattern`](Self::rank_pattern).
        pub fn with_rank_pattern(ranks: impl IntoIterator<Item = (impl Into<String>, usize)>)
            => rank_pattern = ranks.into_iter().map(|(pattern, r)| (pattern.into(), r)).collect();
        /// Sets [`alpha_pattern`](Self::alpha_pattern).
        pub fn with_alpha_pattern(alphas: impl IntoIterator<Item = (impl Into<String>, f64)>)
            => alpha_pattern = alphas.into_iter().map(|(pattern, alpha)| (pattern.into(), alpha)).collect();
        /// Sets [`layers_to_transform`](Targeting::layers_to_transform).
        pub fn with_layers_to_transform(layers: impl IntoIterator<Item = usize>)
            => targeting.layers_to_transform = Some(layers.into_iter().collect());
        /// Sets [`layers_pattern`](Targeting::layers_pattern).
        pub fn with_layers_pattern(patterns: impl IntoIterator<Item = impl Into<String>>)
            => targeting.layers_pattern = patterns.into_iter().map(Into::into).collect();
        /// Sets [`bias`](field@Self::bias).
        pub fn with_bias(bias: Bias);
        /// Sets [`lora_bias`](Self::lora_bias).
        pub fn with_lora_bias(lora_bias: bool);
        /// Sets [`modules_to_save`](Targeting::modules_to_save).
        pub fn with_modules_to_save(modules: impl IntoIterator<Item = impl Into<String>>)
            => targeting.modules_to_save = modules.into_iter().map(Into::into).collect();
        /// Sets [`key_mapping`](Targeting::key_mapping).
        pub fn with_key_mapping(key_mapping: KeyMapping) => targeting.key_mapping = key_mapping;
        /// Sets [`use_rslora`](Self::use_rslora).
        pub fn with_use_rslora(use_rslora: bool);
        /// Sets [`use_dora`](Self::use_dora).
        pub fn with_use_dora(use_dora: bool);
        /// Sets [`trainable_token_indices`](Self::trainable_token_indices).
        pub fn with_trainable_token_indices(indices: impl Into<TokenIndices>)
            => trainable_token_indices = Some(indices.into());
        /// Sets [`ensure_weight_tying`](Self::ensure_weight_tying).
        pub fn with_ensure_weight_tying(ensure_weight_tying: bool);
        /// Sets [`init_lora_weights`](Self::init_lora_weights).
        pub fn with_init_lora_weights(init_lora_weights: InitLoraWeights);
        /// Sets [`base_model_name_or_path`](FileFields::base_model_name_or_path).
        pub fn with_base_model_name_or_path(name: impl Into<String>)
            => file.base_model_name_or_path = Some(name.into());
        /// Sets [`task_type`](FileFields::task_type).
        pub fn with_task_type(task_type: impl Into<String>) => file.task_type = Some(task_type.into());
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
}

/// Keys that PEFT writes and that this version supports at their neutral value only: `null`, `false`, or empty.
const NEUTRAL_ONLY: &[&str] = &[
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
];

/// Keys that have no effect on what a trained adapter computes; their values are written back as they were read. Those
/// that end with `_config` belong to a start of the factors, which is refused by its own name where it matters.
const KEPT: &[&str] = &[
    "corda_config",
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "qalora_group_size",
];

/// What PEFT writes for a key of [`NEUTRAL_ONLY`] or [`KEPT`] that nobody set.
fn default_of(key: &str) -> Value {
    match key {
        "loftq_config" => json!({}),
        "megatron_core" => json!("megatron.core"),
        "qalora_group_size" => json!(16),
        "use_qalora" => json!(false),
        _ => Value::Null,
    }
}

const FIELDS: &[Field<LoraConfig>] = fields! {
    r,
    lora_alpha: (typed, |alpha: &f64| number(*alpha)),
    lora_dropout,
    rank_pattern: (|value| patterns_from_json(value, index), |ranks: &Vec<(String, usize)>| patterns_to_json(ranks, |r| json!(r))),
    alpha_pattern: (
        |value| patterns_from_json(value, Value::as_f64),
        |alphas: &Vec<(String, f64)>| patterns_to_json(alphas, |alpha| number(*alpha))
    ),
    use_rslora,
    use_dora,
    bias: (Bias::from_json, |bias: &Bias| json!(bias.as_str())),
    lora_bias,
    init_lora_weights: (InitLoraWeights::from_json, |init: &InitLoraWeights| init.to_json()),
    trainable_token_indices: (
        |value| TokenIndices::from_json(value).map(Some),
        |tokens: &Option<TokenIndices>| tokens.as_ref().map_or(Value::Null, TokenIndices::to_json)
    ),
    ensure_weight_tying,
    fan_in_fan_out,
};

impl Configuration for LoraConfig {
    fn problems(&self) -> Vec<PeftError> {
        let mut problems = vec![];
        let mut invalid = |field, expected, found: &dyn fmt::Display| {
            problems.push(PeftError::invalid(field, expected, found));
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
        if self.lora_bias && self.use_dora {
            invalid("lora_bias", "false beside `use_dora`, as in PEFT", &true);
        }
        let has_plain_start =
            matches!(self.init_lora_weights, InitLoraWeights::KaimingUniform | InitLoraWeights::Random);
        if self.lora_bias && !has_plain_start {
            invalid("lora_bias", "false beside this `init_lora_weights`, as in PEFT", &true);
        }
        for (_, list) in self.trainable_token_indices.iter().flat_map(TokenIndices::entries) {
            if list.is_empty() {
                invalid("trainable_token_indices", "at least one token", &"an empty list");
            }
            if let Some((_, index)) = list.iter().enumerate().find(|(i, index)| list[..*i].contains(index)) {
                invalid("trainable_token_indices", "each token once", &format!("{index} twice"));
            }
        }
        let patterns = self.rank_pattern.iter().map(|(pattern, _)| pattern);
        let patterns = patterns.chain(self.alpha_pattern.iter().map(|(pattern, _)| pattern));
        problems.extend(patterns.filter_map(|pattern| Some(Pattern::whole_or_end(pattern).err()?.into())));
        problems
    }

    fn check_new(&self) -> Result<(), PeftError> {
        match self.init_lora_weights {
            InitLoraWeights::Elsewhere(word) => Err(PeftError::invalid(
                "init_lora_weights",
                "a start that can be computed here; `eva`, `loftq` and `mica` only load trained adapters",
                word,
            )),
            _ => Ok(()),
        }
    }

    fn neutral_only(&self) -> &'static [&'static str] {
        NEUTRAL_ONLY
    }

    fn read(&mut self, key: &str, value: &Value) -> Option<Result<(), Hint>> {
        if KEPT.contains(&key) {
            if *value != default_of(key) {
                self.file.keep(key, value);
            }
            return Some(Ok(()));
        }
        Field::read_into(FIELDS, self, key, value)
    }

    fn write(&self) -> Map<String, Value> {
        let mut map = Field::write_all(FIELDS, self);
        map.extend(NEUTRAL_ONLY.iter().chain(KEPT).map(|key| (key.to_string(), default_of(key))));
        map
    }

    /// The first pattern that matches counts; files have them in alphabetical order.
    fn in_order(&self) -> Map<String, Value> {
        let patterns =
            [("rank_pattern", json!(self.rank_pattern)), ("alpha_pattern", json!(self.alpha_pattern))];
        let is_sorted = |patterns: &Value| {
            patterns.as_array().is_some_and(|patterns| patterns.is_sorted_by_key(|pair| pair[0].to_string()))
        };
        let kept = patterns.into_iter().filter(|(_, patterns)| !is_sorted(patterns));
        kept.map(|(key, patterns)| (key.to_string(), patterns)).collect()
    }

    fn ranks(&self) -> Result<Ranks, PeftError> {
        Ok(Ranks {
            default: (self.r, self.lora_alpha),
            rank_pattern: Patterns::new(&self.rank_pattern)?,
            alpha_pattern: Patterns::new(&self.alpha_pattern)?,
        })
    }

    fn set_ranks(&mut self, ranks: Vec<(String, usize)>, alphas: Vec<(String, f64)>) {
        self.rank_pattern = ranks;
        self.alpha_pattern = alphas;
    }

    fn make_plain(&mut self, scale: f64) {
        let mut factor = scale;
        if self.init_lora_weights.is_part_of_base() {
            // Twice the rank at the same scaling.
            self.init_lora_weights = InitLoraWeights::default();
            self.r *= 2;
            self.rank_pattern.iter_mut().for_each(|(_, r)| *r *= 2);
            factor *= if self.use_rslora { 2f64.sqrt() } else { 2.0 };
        }
        self.lora_alpha *= factor;
        self.alpha_pattern.iter_mut().for_each(|(_, alpha)| *alpha *= factor);
    }

    fn bias(&self) -> Bias {
        self.bias
    }

    fn ensures_weight_tying(&self) -> bool {
        self.ensure_weight_tying
    }

    fn unreadable(&self) -> Option<ConfigProblem> {
        let hint = self.init_lora_weights.unreadable()?;
        Some(ConfigProblem::new("init_lora_weights", &self.init_lora_weights.to_json(), hint))
    }

    fn describe(&self) -> String {
        format!("rank {}, alpha {}", self.r, self.lora_alpha)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PeftConfig;

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
            "invalid `layers_to_transform`: expected a list in `target_modules`, found a regular expression"
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

    #[test]
    fn serde_writes_and_reads_the_object_of_the_file() {
        let config = LoraConfig::new(4)
            .with_lora_alpha(6.5)
            .with_use_dora(true)
            .with_init_lora_weights(InitLoraWeights::PissaNiter(8))
            .with_trainable_token_indices([("embed", vec![3, 1])])
            .with_rank_pattern([("q", 2), (r"a\.q", 3)])
            .with_bias(Bias::LoraOnly)
            .with_target_modules(["q", "v"])
            .with_task_type("CAUSAL_LM")
            .with_key_mapping(KeyMapping::new([("^a", "b")]));
        let json = serde_json::to_value(&config).unwrap();
        assert_eq!(
            (&json["peft_type"], &json["r"], &json["lora_alpha"]),
            (&json!("LORA"), &json!(4), &json!(6.5))
        );
        assert_eq!(json["init_lora_weights"], "pissa_niter_8");
        assert_eq!(json["trainable_token_indices"], json!({"embed": [3, 1]}));
        assert_eq!(json["key_mapping"], json!([["^a", "b"]]));
        assert_eq!(serde_json::from_value::<LoraConfig>(json.clone()).unwrap(), config);
        assert_eq!(serde_json::from_value::<PeftConfig>(json).unwrap(), PeftConfig::from(&config));

        // What PEFT needs as a minimum, and all that is wrong with something else.
        let few = json!({"peft_type": "LORA", "target_modules": "all-linear"});
        let few: LoraConfig = serde_json::from_value(few).unwrap();
        assert_eq!(few, LoraConfig::default().with_target_modules(TargetModules::AllLinear));
        let wrong = json!({"r": "8", "bias": "some", "use_qalora": true});
        let error = serde_json::from_value::<LoraConfig>(wrong).unwrap_err().to_string();
        assert_eq!(
            error,
            "`r` is \"8\": the value has the wrong type for this key; `bias` is \"some\": expected \"none\", \"all\" or \
             \"lora_only\"; `use_qalora` is true: merge the adapter in Python and load the merged model, or train one \
             without this setting"
        );
    }

    #[test]
    fn what_excludes_each_other_is_refused() {
        let good = || LoraConfig::new(4).with_target_modules(["q_proj"]);
        assert!(good().with_use_dora(true).with_init_lora_weights(InitLoraWeights::Pissa).validate().is_ok());
        assert_eq!(
            message(good().with_lora_bias(true).with_init_lora_weights(InitLoraWeights::Gaussian)),
            "invalid `lora_bias`: expected false beside this `init_lora_weights`, as in PEFT, found true"
        );
    }
}
