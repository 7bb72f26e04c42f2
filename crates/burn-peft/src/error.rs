//! Everything that can go wrong.

use std::fmt;
use std::path::PathBuf;

use crate::combination_type::CombinationType;
use crate::pattern::PatternError;
use crate::target::TargetModules;
use burn_peft_files::WrongFile;

/// Everything that can go wrong between a user's input (a configuration, a name, a file) and an adapted model.
///
/// Every operation that returns this error leaves the model as it was.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum PeftError {
    /// A configuration value is outside its range.
    #[error("invalid `{field}`: expected {expected}, found {found}")]
    InvalidConfig {
        /// The field of a configuration or of [`CombinationType`], or an argument.
        field: &'static str,
        /// The accepted values.
        expected: &'static str,
        /// The value that was given.
        found: String,
    },

    /// A configuration file has entries that this version cannot compute or read.
    #[error("cannot use the configuration in `{}`:{}", .path.display(), lines(.problems))]
    UnsupportedConfig {
        /// The file.
        path: PathBuf,
        /// Every entry that stands in the way.
        problems: Vec<ConfigProblem>,
    },

    /// A pattern in a configuration is not a regular expression.
    #[error("invalid regular expression `{pattern}`")]
    InvalidPattern {
        /// The pattern as it was given.
        pattern: String,
        /// Where it goes wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// A pattern would take too long on a name: its steps double with every letter.
    #[error(
        "the regular expression `{pattern}` takes too many steps on `{name}`\nhint: avoid repetitions of repetitions such as `(x+)+`, or list the names"
    )]
    EndlessPattern {
        /// The pattern as it was given.
        pattern: String,
        /// The name that it was tried on.
        name: String,
        /// The limit.
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// No module of the model is a target.
    #[error(
        "no module matched `target_modules` {targets}{}{}",
        in_layers(.layers.as_deref()),
        closest_hint(.targets, .closest)
    )]
    NoModuleMatched {
        /// The targets as they were given.
        targets: TargetModules,
        /// `layers_to_transform`, if it narrows the targets.
        layers: Option<Vec<usize>>,
        /// Names of adaptable modules that resemble them most.
        closest: Vec<String>,
    },

    /// `modules_to_save` matched no module.
    #[error("`modules_to_save` matched no module: {}{}", join(.modules), saved_hint(.closest))]
    NoModuleToSave {
        /// The entries.
        modules: Vec<String>,
        /// Names of modules that resemble them most.
        closest: Vec<String>,
    },

    /// Modules would get an update of low rank and a copy at once: `modules_to_save` copies every module whose name ends
    /// with an entry, and keeps away from `target_modules` only those that match it between dots.
    #[error(
        "modules are both targets and to be saved whole: {}\nhint: narrow `modules_to_save`, or put them into `exclude_modules`",
        join(.modules)
    )]
    TargetAlsoSaved {
        /// Names of the modules.
        modules: Vec<String>,
    },

    /// A key mapping gives two parameters one name.
    #[error("the key mapping makes `{name}` of both {}\nhint: make its rules tell them apart", join(.paths))]
    AmbiguousKeyMapping {
        /// The name in files.
        name: String,
        /// The paths in the Burn model.
        paths: Vec<String>,
    },

    /// `lora_bias` has no place in these layers.
    #[error(
        "`lora_bias` cannot be added to {}\nhint: embeddings have none, and a plain layer needs a bias of its own; use `LoraLinear`, or exclude them",
        join(.modules)
    )]
    LoraBiasUnsupported {
        /// Names of the modules.
        modules: Vec<String>,
    },

    /// Two active adapters would each replace values of one parameter: by a trained copy, or by trained rows of tokens.
    #[error(
        "adapters {} cannot be active together: each replaces values of {}\nhint: activate one of them",
        join(.names),
        join(.parameters)
    )]
    ConflictingCopies {
        /// The adapters.
        names: Vec<String>,
        /// Paths of the parameters.
        parameters: Vec<String>,
    },

    /// Only active adapters are merged.
    #[error(
        "adapter `{name}` is not active, so it cannot be merged\nhint: activate it with `set_adapter` first"
    )]
    InactiveAdapter {
        /// The adapter.
        name: String,
    },

    /// An adapter cannot be merged without the one that replaces a parameter it changes.
    #[error(
        "adapter `{name}` cannot be merged without `{copy}`, which has a trained copy of `{parameter}`\nhint: merge both"
    )]
    CoveredByCopy {
        /// The adapter that was to be merged.
        name: String,
        /// The active adapter with the copy.
        copy: String,
        /// The parameter, by its name in files.
        parameter: String,
    },

    /// A merge into an embedding's table would change the output layer that reads the table as well.
    #[error(
        "merging would change {}, which the output layer reads as well: the merged model would compute something else\nhint: give the output layer a weight of its own first (`untie_lm_head` of a LLaMA), or use `merge_adapter`, which keeps the table",
        join(.parameters)
    )]
    TiedOutput {
        /// Paths of the tables.
        parameters: Vec<String>,
    },

    /// While adapters are merged, they cannot be deleted, no adapter can be swapped, and rows of a batch cannot have
    /// adapters of their own.
    #[error(
        "this cannot be done while adapter `{name}` is merged into the weights\nhint: call `unmerge_adapter` first"
    )]
    MergedAdapter {
        /// The adapter that is merged.
        name: String,
    },

    /// An adapter's `lora_bias` has no parameter to be folded into.
    #[error(
        "adapter `{name}` has a `lora_bias`, and these layers have no bias to merge it into: {}\nhint: give them a bias of zeros, or use `merge_adapter`, which keeps the `lora_bias` beside the weights",
        join(.modules)
    )]
    NoBiasToMergeInto {
        /// The adapter.
        name: String,
        /// Paths of the layers.
        modules: Vec<String>,
    },

    /// The rows of one batch cannot have adapters of their own.
    #[error(
        "rows of a batch cannot name adapter `{name}`: {reason}\nhint: run its rows as a batch of their own"
    )]
    MixedBatch {
        /// The adapter.
        name: String,
        /// What stands in the way.
        reason: String,
    },

    /// This way of combining adapters needs adapters of one rank.
    #[error(
        "combining adapters as `{combination_type}` needs adapters of one rank, found ranks {}\nhint: `cat` and `svd` take adapters of any ranks",
        rank_list(.ranks)
    )]
    UnequalRanks {
        /// How they were to be combined.
        combination_type: CombinationType,
        /// Their ranks, in the order in which they were named.
        ranks: Vec<usize>,
    },

    /// A combination of adapters met infinities or NaNs.
    #[error(
        "combining adapters as `{combination_type}` gives non-finite numbers\nhint: look for non-finite weights, scalings and factors among the adapters"
    )]
    NonFiniteCombination {
        /// How they were to be combined.
        combination_type: CombinationType,
    },

    /// Only updates of low rank can be combined.
    #[error(
        "adapter `{name}` changes `{parameter}` by more than an update of low rank\nhint: convert it with `convert_to_lora`, or combine adapters without DoRA, trained tokens, `modules_to_save` and trained biases"
    )]
    CannotCombine {
        /// The adapter.
        name: String,
        /// The parameter, by its name in files.
        parameter: String,
    },

    /// An adapter does more than plain LoRA could.
    #[error(
        "adapter `{name}` cannot be converted: its change of `{parameter}` is more than a change of one weight\nhint: convert adapters without `modules_to_save`, `lora_bias` and trained biases, and without trained tokens on a tied embedding"
    )]
    CannotConvert {
        /// The adapter.
        name: String,
        /// The parameter, by its name in files.
        parameter: String,
    },

    /// A copy of a model whose rows name their adapters cannot be merged.
    #[error(
        "cannot merge a model in which rows of a batch name adapter `{name}`\nhint: merge the model that `for_rows` was called on"
    )]
    RowsNameAdapters {
        /// An adapter that rows name.
        name: String,
    },

    /// An output layer was asked for that owns no weight.
    #[error(
        "{field} asks for `{name}`, and the model has no module of that name\nhint: an output layer that is tied to the embedding owns no weight; untie it first, in a LLaMA with `untie_lm_head`"
    )]
    NoOutputLayer {
        /// The field of the configuration.
        field: &'static str,
        /// The entry that asks for it.
        name: String,
    },

    /// Every target is excluded again.
    #[error(
        "{excluded} removed all {count} modules that `target_modules` {targets} matched\nhint: leave one of them to adapt"
    )]
    AllModulesExcluded {
        /// The targets as they were given.
        targets: String,
        /// `exclude_modules` and `modules_to_save`, as far as they were given.
        excluded: String,
        /// How many modules had matched.
        count: usize,
    },

    /// Targets matched modules that cannot carry an adapter.
    #[error(
        "`target_modules` matched modules that cannot be adapted: {}\nhint: name linear, embedding or convolution layers, or put these into `exclude_modules`",
        join(.modules)
    )]
    UnsupportedModules {
        /// Paths of the modules.
        modules: Vec<String>,
    },

    /// The configuration needs [`LoraLinear`](crate::LoraLinear), and these layers are plain ones.
    #[error(
        "`lora_dropout` > 0 needs the layer's input, which adapters on plain layers cannot see: {}\nhint: change the type of these fields to `LoraLinear`, exclude them, or set `lora_dropout` to 0",
        join(.modules)
    )]
    DropoutNeedsLoraLinear {
        /// Paths of the plain layers.
        modules: Vec<String>,
    },

    /// Parameters carry another crate's reparameterization.
    #[error(
        "these parameters already carry another reparameterization: {}\nhint: `materialize()` the model first, which merges it into the weights",
        join(.paths)
    )]
    ForeignReparameterization {
        /// Paths of the parameters.
        paths: Vec<String>,
    },

    /// An adapter of this name exists already.
    #[error("adapter `{name}` already exists\nhint: delete it first, or choose another name")]
    AdapterExists {
        /// The name.
        name: String,
    },

    /// No adapter has this name.
    #[error("no adapter is named `{name}`: the model has {}", if .available.is_empty() { "none".to_string() } else { join(.available) })]
    UnknownAdapter {
        /// The name.
        name: String,
        /// The names that exist.
        available: Vec<String>,
    },

    /// An adapter's name cannot be a component of a parameter path.
    #[error("invalid adapter name `{name}`: expected letters, digits, `_` or `-`")]
    InvalidAdapterName {
        /// The name.
        name: String,
    },

    /// A merge would have put infinities or NaNs into the weights.
    #[error(
        "merging adapter `{name}` gives non-finite weights at {}\nhint: look for NaNs and infinities in its tensors, and for a sum out of the range of a 16-bit base",
        join(.modules)
    )]
    NonFiniteMerge {
        /// The adapter, or the adapters, joined by `+`.
        name: String,
        /// Paths of the layers.
        modules: Vec<String>,
    },

    /// A weight, or what an adapter changes it by, has infinities or NaNs, so it cannot be decomposed.
    #[error("non-finite numbers at {}\nhint: look for NaNs and infinities in the weights and in the tensors of the adapter", join(.modules))]
    NonFiniteWeight {
        /// Names of the modules.
        modules: Vec<String>,
    },

    /// The tensors of an adapter file do not fit the model.
    #[error(
        "the adapter in `{}` does not fit the model:{}\nhint: {}; in code, `LoadOptions` can rename keys and leave out what does not fit",
        .path.display(),
        lines(.problems),
        FITTING_HINT
    )]
    IncompatibleAdapter {
        /// The adapter's tensor file.
        path: PathBuf,
        /// Every tensor that does not fit.
        problems: Vec<TensorProblem>,
    },

    /// The tensors of an adapter file do not fit the configuration beside it.
    #[error("the tensors in `{}` do not fit `adapter_config.json`:{}", .path.display(), lines(.problems))]
    InconsistentAdapter {
        /// The adapter's tensor file.
        path: PathBuf,
        /// Every tensor that does not fit.
        problems: Vec<TensorProblem>,
    },

    /// A directory holds no adapter that can be read.
    #[error("no adapter in `{}`: {reason}\nhint: {hint}", .path.display())]
    NoAdapter {
        /// The directory.
        path: PathBuf,
        /// What is missing, or what is there instead.
        reason: String,
        /// What can be done.
        hint: String,
    },

    /// A file is not what its name says.
    #[error("`{}` is {found}\nhint: {}", .path.display(), .found.hint())]
    NotTheFile {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: WrongFile,
    },

    /// All keys of a tensor file begin otherwise than they should.
    #[error(
        "the keys in `{}` {}: found `{example}`\nhint: rename them in Python: from safetensors.torch import load_file, save_file; path = {:?}; save_file({{{}: value for key, value in load_file(path).items()}}, path, {{\"format\": \"pt\"}})",
        .path.display(),
        prefixes(.found_prefix, .expected_prefix),
        .path.display().to_string(),
        renamed_key(.found_prefix, .expected_prefix)
    )]
    KeyPrefix {
        /// The adapter's tensor file.
        path: PathBuf,
        /// How they begin.
        found_prefix: String,
        /// How they should begin.
        expected_prefix: String,
        /// One of them.
        example: String,
    },

    /// A file or directory cannot be read or written.
    #[error("cannot access `{}`", .path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },

    /// A JSON file is malformed.
    #[error("invalid JSON in `{}`", .path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where it goes wrong.
        source: serde_json::Error,
    },

    /// A safetensors file is malformed.
    #[error("invalid safetensors file `{}`\nhint: copy or download it again, it may be incomplete", .path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// Where it goes wrong.
        source: safetensors::SafeTensorError,
    },
}

/// One entry of `adapter_config.json` that cannot be used.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigProblem {
    /// The key.
    pub field: String,
    /// Its value, as JSON.
    pub found: String,
    /// What is wrong, or what can be done instead.
    pub hint: &'static str,
    /// Whether the value could not be read, so that a default stands in its place.
    pub(crate) is_unread: bool,
}

impl ConfigProblem {
    pub(crate) fn new(field: &str, found: &serde_json::Value, hint: &'static str) -> Self {
        Self { field: field.to_string(), found: found.to_string(), hint, is_unread: false }
    }
}

impl fmt::Display for ConfigProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` is {}: {}", self.field, self.found, self.hint)
    }
}

/// One tensor of an adapter file that does not fit the model.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TensorProblem {
    /// The configuration asks for this tensor, and the file has none.
    Missing {
        /// The key in the file.
        key: String,
        /// The unexpected key that resembles it most.
        closest: Option<String>,
    },
    /// The file has this tensor, and nothing in the model takes it.
    Unexpected {
        /// The key in the file.
        key: String,
        /// The missing key that resembles it most.
        closest: Option<String>,
    },
    /// The tensor has another shape than the layer asks for.
    Shape {
        /// The key in the file.
        key: String,
        /// The shape that the layer and the configured rank ask for, in PyTorch's layout.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// The tensor is not of a floating-point type that adapters can have.
    DType {
        /// The key in the file.
        key: String,
        /// The type in the file, as safetensors names it.
        found: String,
    },
    /// The file has the weight that is adapted, as PEFT adds it for embeddings and output layers, and the model has
    /// another one.
    OtherBase {
        /// The key in the file.
        key: String,
    },
}

impl fmt::Display for TensorProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let did_you_mean = |closest: &Option<String>| match closest {
            Some(name) => format!(" (closest: `{name}`)"),
            None => String::new(),
        };
        match self {
            Self::Missing { key, closest } => write!(f, "missing `{key}`{}", did_you_mean(closest)),
            Self::Unexpected { key, closest } => {
                write!(f, "unexpected `{key}`{}", did_you_mean(closest))
            }
            Self::Shape { key, expected, found } => {
                write!(f, "shape mismatch at `{key}`: expected {expected:?}, found {found:?}")
            }
            Self::DType { key, found } => {
                write!(f, "type mismatch at `{key}`: expected F32, F16 or BF16, found {found}")
            }
            Self::OtherBase { key } => write!(f, "`{key}` is not the weight of this model"),
        }
    }
}

impl From<PatternError> for PeftError {
    fn from(error: PatternError) -> Self {
        match error {
            PatternError::Invalid { pattern, source } => Self::InvalidPattern { pattern, source },
            PatternError::Endless { pattern, name, source } => Self::EndlessPattern { pattern, name, source },
        }
    }
}

impl PeftError {
    pub(crate) fn invalid(field: &'static str, expected: &'static str, found: impl fmt::Display) -> Self {
        Self::InvalidConfig { field, expected, found: found.to_string() }
    }

    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}

fn rank_list(ranks: &[usize]) -> String {
    ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}

/// Names in backticks, the first few of a long list.
fn join(names: &[String]) -> String {
    const SHOWN: usize = 8;
    let mut text = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    text
}

fn closest_hint(targets: &TargetModules, closest: &[String]) -> String {
    // A dotted target whose end is a module's name may be right under the names of a file.
    let is_name_in_file = match targets {
        TargetModules::Names(targets) => targets.iter().any(|target| {
            let last = target.rsplit_once('.').map(|(_, last)| last);
            closest.iter().any(|name| last == Some(name))
        }),
        _ => false,
    };
    match closest {
        names if matches!(targets, TargetModules::Regex(_)) => format!(
            "\nhint: a regular expression must match a module's whole name; here the names end with {}",
            join(names)
        ),
        [] => "\nhint: `all-linear` adapts every linear layer".to_string(),
        names if is_name_in_file => format!(
            "\nhint: the closest modules are {}; in code, a `KeyMapping` gives them the names of a file",
            join(names)
        ),
        names => format!("\nhint: the closest modules are {}", join(names)),
    }
}

fn saved_hint(closest: &[String]) -> String {
    match closest {
        [] => String::new(),
        names => format!("\nhint: the closest modules are {}", join(names)),
    }
}

const FITTING_HINT: &str =
    "load it onto the base model that it was trained on, with the configuration that was saved with it";

fn in_layers(layers: Option<&[usize]>) -> String {
    layers.map_or(String::new(), |layers| format!(" in the layers {layers:?}"))
}

/// Each on a line of its own, as many as a reader will read.
fn lines<T: fmt::Display>(problems: &[T]) -> String {
    const SHOWN: usize = 16;
    let mut text: String = problems.iter().take(SHOWN).map(|problem| format!("\n  {problem}")).collect();
    if problems.len() > SHOWN {
        text.push_str(&format!("\n  and {} more", problems.len() - SHOWN));
    }
    text
}

/// The Python expression that makes a key begin with `expected` in the place of `found`.
fn renamed_key(found: &str, expected: &str) -> String {
    let rest = if found.is_empty() { "key".to_string() } else { format!("key.removeprefix({found:?})") };
    if expected.is_empty() { rest } else { format!("{expected:?} + {rest}") }
}

/// What is wrong with keys that begin with `found` in the place of `expected`.
fn prefixes(found: &str, expected: &str) -> String {
    match (found, expected) {
        ("", expected) => format!("lack the prefix `{expected}`"),
        (found, "") => format!("have `{found}` in front, which does not belong there"),
        (found, expected) => format!("begin with `{found}`, not with `{expected}`"),
    }
}
