//! Configurations of adapters: what is targeted, what the method is, and what a file carries along.

pub(crate) mod field;
mod file;
mod lora;
mod ranks;
mod targeting;
mod token_indices;

use std::any::Any;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, Error as _};
use serde::ser::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use crate::error::{ConfigProblem, PeftError};
use crate::key_mapping::KeyMapping;
use crate::store::CONFIG_FILE;
use field::Hint;

pub use file::FileFields;
pub use lora::{Bias, LoraConfig};
pub(crate) use ranks::Ranks;
pub(crate) use targeting::Selection;
pub use targeting::Targeting;
pub use token_indices::TokenIndices;

/// What a kind of configuration can do beside having the fields `targeting` and `file`: one `impl` in its own file, and a
/// line in `configurations!`.
pub(crate) trait Configuration: Any {
    /// Everything that is wrong with its values, those of [`Targeting`] left out.
    fn problems(&self) -> Vec<PeftError>;

    /// What keeps a new adapter from being made with it.
    fn check_new(&self) -> Result<(), PeftError> {
        Ok(())
    }

    /// Keys that PEFT writes and that are supported at their neutral value only: `null`, `false`, or empty.
    fn neutral_only(&self) -> &'static [&'static str] {
        &[]
    }

    /// Puts an entry of `adapter_config.json` that is not null into it; `None` if it has no such key.
    fn read(&mut self, key: &str, value: &Value) -> Option<Result<(), Hint>>;

    /// Its own entries, as PEFT writes them.
    fn write(&self) -> Map<String, Value>;

    /// Those of its entries whose order counts here and not in files.
    fn in_order(&self) -> Map<String, Value> {
        Map::new()
    }

    /// Keys of [`Targeting`] that its files do not have.
    fn not_targeted_by(&self) -> &'static [&'static str] {
        &[]
    }

    /// Ranks and alphas of modules, patterns considered.
    fn ranks(&self) -> Result<Ranks, PeftError> {
        Ok(Ranks::default())
    }

    /// Gives modules ranks and alphas of their own.
    fn set_ranks(&mut self, _ranks: Vec<(String, usize)>, _alphas: Vec<(String, f64)>) {}

    /// Makes it the configuration of what [`Method::plain`](crate::method::Method::plain) gives, whose scaling is `scale`
    /// times what it was.
    fn make_plain(&mut self, scale: f64);

    /// Which biases of the base are trained.
    fn bias(&self) -> Bias {
        Bias::None
    }

    /// PEFT's `ensure_weight_tying`: what changes an embedding changes an output layer that is tied to it.
    fn ensures_weight_tying(&self) -> bool {
        false
    }

    /// What keeps an adapter that is read from a file from being the one that was saved.
    fn unreadable(&self) -> Option<ConfigProblem> {
        None
    }

    /// What a person wants to know of it: `rank 8, alpha 16`.
    fn describe(&self) -> String;
}

/// What can be done about an adapter of another kind than these.
macro_rules! other_kind {
    ($first:literal $(, $more:literal)*) => {
        concat!(
            "only adapters of type ", $first $(, " or ", $more)*,
            " can be loaded; merge this one in PEFT and load the merged model"
        )
    };
}

/// Declares the configurations there are, with PEFT's word for each.
macro_rules! configurations {
    ($($(#[$doc:meta])* $kind:ident($config:ty) = $word:literal,)*) => {
        /// The configuration of an adapter of any kind. PEFT's `PeftConfig`.
        #[non_exhaustive]
        #[derive(Debug, Clone, PartialEq)]
        pub enum PeftConfig {
            $($(#[$doc])* $kind($config),)*
        }

        $(
            impl From<$config> for PeftConfig {
                fn from(config: $config) -> Self {
                    Self::$kind(config)
                }
            }

            impl From<&$config> for PeftConfig {
                fn from(config: &$config) -> Self {
                    Self::$kind(config.clone())
                }
            }

            impl $config {
                /// Reads `adapter_config.json` of an adapter directory. PEFT's `from_pretrained`.
                ///
                /// # Errors
                /// As [`PeftConfig::from_pretrained`]; also [`PeftError::UnsupportedConfig`] for an adapter of another
                /// kind.
                pub fn from_pretrained(directory: impl AsRef<Path>) -> Result<Self, PeftError> {
                    let config = PeftConfig::from_pretrained(&directory)?;
                    config.as_kind().cloned().ok_or_else(|| {
                        let hint = concat!("give an adapter of type ", $word);
                        let problem = ConfigProblem::new(PEFT_TYPE, &json!(config.peft_type()), hint);
                        let path = directory.as_ref().join(CONFIG_FILE);
                        PeftError::UnsupportedConfig { path, problems: vec![problem] }
                    })
                }

                /// Writes `adapter_config.json` into a directory, which is created if need be. PEFT's `save_pretrained`.
                ///
                /// # Errors
                /// [`PeftError::Io`].
                pub fn save_pretrained(&self, directory: impl AsRef<Path>) -> Result<(), PeftError> {
                    PeftConfig::from(self).save_pretrained(directory)
                }

                /// Checks every value.
                ///
                /// # Errors
                /// As [`PeftConfig::validate`].
                pub fn validate(&self) -> Result<(), PeftError> {
                    PeftConfig::from(self).validate()
                }
            }

            /// As [`PeftConfig`].
            impl Serialize for $config {
                fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                    PeftConfig::from(self).serialize(serializer)
                }
            }

            /// As [`PeftConfig`]; without a `peft_type` it is this kind.
            impl<'de> Deserialize<'de> for $config {
                fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                    let mut map = Map::deserialize(deserializer)?;
                    map.entry(PEFT_TYPE).or_insert(json!($word));
                    let config = PeftConfig::from_map(map).map_err(D::Error::custom)?.as_kind().cloned();
                    config.ok_or_else(|| D::Error::custom(concat!("`peft_type` is not \"", $word, "\"")))
                }
            }
        )*

        const OTHER_KIND: &str = other_kind!($($word),*);

        impl PeftConfig {
            /// PEFT's `peft_type`.
            pub fn peft_type(&self) -> &'static str {
                match self {
                    $(Self::$kind(_) => $word,)*
                }
            }

            /// The defaults of the kind with this `peft_type`.
            fn default_of(peft_type: &str) -> Option<Self> {
                match peft_type {
                    $($word => Some(Self::$kind(<$config>::default())),)*
                    _ => None,
                }
            }

            /// What is targeted.
            pub fn targeting(&self) -> &Targeting {
                match self {
                    $(Self::$kind(config) => &config.targeting,)*
                }
            }

            pub(crate) fn targeting_mut(&mut self) -> &mut Targeting {
                match self {
                    $(Self::$kind(config) => &mut config.targeting,)*
                }
            }

            /// What a file carries along.
            pub fn file(&self) -> &FileFields {
                match self {
                    $(Self::$kind(config) => &config.file,)*
                }
            }

            fn file_mut(&mut self) -> &mut FileFields {
                match self {
                    $(Self::$kind(config) => &mut config.file,)*
                }
            }

            /// What the kind can do.
            pub(crate) fn kind(&self) -> &dyn Configuration {
                match self {
                    $(Self::$kind(config) => config,)*
                }
            }

            pub(crate) fn kind_mut(&mut self) -> &mut dyn Configuration {
                match self {
                    $(Self::$kind(config) => config,)*
                }
            }
        }
    };
}

configurations! {
    /// LoRA and what PEFT makes of it: rsLoRA, DoRA, trained tokens.
    Lora(LoraConfig) = "LORA",
}

impl PeftConfig {
    /// The configuration of LoRA, if it is one.
    pub fn as_lora(&self) -> Option<&LoraConfig> {
        self.as_kind()
    }

    /// The configuration of this kind, if it is one.
    pub(crate) fn as_kind<C: Configuration>(&self) -> Option<&C> {
        let kind: &dyn Any = self.kind();
        kind.downcast_ref()
    }

    /// Checks every value.
    ///
    /// # Errors
    /// The first of the problems: [`PeftError::InvalidConfig`] for a value outside its range and for settings that exclude
    /// each other, [`PeftError::InvalidPattern`] for regular expressions that do not compile.
    pub fn validate(&self) -> Result<(), PeftError> {
        self.problems().into_iter().next().map_or(Ok(()), Err)
    }

    /// All that [`validate`](Self::validate) finds wrong.
    pub(crate) fn problems(&self) -> Vec<PeftError> {
        let mut problems = self.kind().problems();
        problems.extend(self.targeting().problems());
        problems
    }
}

/// The version of PEFT whose format is written.
const PEFT_VERSION: &str = "0.21.2";

const PEFT_TYPE: &str = "peft_type";

/// Keys that PEFT always rewrites.
const REWRITTEN: &[&str] = &["inference_mode", "peft_version", "runtime_config"];

/// What can be done about a key that PEFT does not have either.
const UNKNOWN_HINT: &str =
    "PEFT 0.21 has no such key; if the adapter works without it, delete the entry from the file";

/// What can be done about a setting that is not supported.
const UNSUPPORTED_HINT: &str =
    "merge the adapter in Python and load the merged model, or train one without this setting";

/// What a configuration file says.
pub(crate) struct Parsed {
    /// The entries that were understood; defaults for all others.
    pub(crate) config: PeftConfig,
    /// Entries that were not understood and ask for nothing.
    pub(crate) ignored: Vec<(String, Value)>,
    /// Entries that cannot be used.
    pub(crate) problems: Vec<ConfigProblem>,
    /// The version of PEFT that wrote it.
    pub(crate) peft_version: Option<String>,
}

impl Parsed {
    /// The same for an adapter whose tensors are to be read as well.
    pub(crate) fn with_tensors(mut self) -> Self {
        self.problems.extend(self.config.kind().unreadable());
        self
    }
}

impl PeftConfig {
    /// The entries of `adapter_config.json`: every key that PEFT writes, sorted.
    pub(crate) fn to_map(&self) -> Map<String, Value> {
        let kind = self.kind();
        let mut map = kind.write();
        map.extend(
            self.targeting().write().into_iter().filter(|(key, _)| !kind.not_targeted_by().contains(&&**key)),
        );
        map.extend(self.file().write());
        let own = [
            (PEFT_TYPE, json!(self.peft_type())),
            ("peft_version", json!(PEFT_VERSION)),
            ("inference_mode", json!(true)),
        ];
        map.extend(own.map(|(key, value)| (key.to_string(), value)));
        map.sort_keys();
        map
    }

    /// Reads the entries as far as they can be understood.
    pub(crate) fn parse(map: &Map<String, Value>) -> Parsed {
        let peft_version = map.get("peft_version").and_then(Value::as_str).map(str::to_string);
        let config = match map.get(PEFT_TYPE) {
            None => Some(Self::from(LoraConfig::default())),
            Some(kind) => kind.as_str().and_then(Self::default_of),
        };
        let Some(mut config) = config else {
            // The other entries of another kind of adapter mean nothing here.
            let found = map.get(PEFT_TYPE).map(Value::to_string).unwrap_or_default();
            let problem =
                ConfigProblem { field: PEFT_TYPE.to_string(), found, hint: OTHER_KIND, is_unread: true };
            let config = LoraConfig::default().into();
            return Parsed { config, ignored: vec![], problems: vec![problem], peft_version };
        };
        let (mut ignored, mut problems) = (vec![], vec![]);
        for (key, value) in map.iter().filter(|(key, _)| !REWRITTEN.contains(&&***key) && *key != PEFT_TYPE) {
            let is_known = config.kind().neutral_only().contains(&&**key);
            match config.read(key, value) {
                None if is_neutral(value) => {
                    ignored.extend((!is_known).then(|| (key.clone(), value.clone())));
                }
                None => {
                    let hint = if is_known { UNSUPPORTED_HINT } else { UNKNOWN_HINT };
                    problems.push(ConfigProblem::new(key, value, hint));
                }
                Some(Ok(())) => {}
                Some(Err(hint)) => {
                    problems.push(ConfigProblem { is_unread: true, ..ConfigProblem::new(key, value, hint) });
                }
            }
        }
        Parsed { config, ignored, problems, peft_version }
    }

    /// Puts one entry into the configuration; `None` if it has no such key.
    fn read(&mut self, key: &str, value: &Value) -> Option<Result<(), Hint>> {
        if self.kind().not_targeted_by().contains(&key) {
            return None;
        }
        let read = self.targeting_mut().read(key, value).or_else(|| self.file_mut().read(key, value));
        read.or_else(|| self.kind_mut().read(key, value))
    }
}

/// A key for how Burn paths become names: not part of PEFT's file, and only written if it says something.
const KEY_MAPPING: &str = "key_mapping";

/// The object in `adapter_config.json`, and the key mapping, if there is one.
impl Serialize for PeftConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = self.to_map();
        map.extend(self.kind().in_order());
        let rules = &self.targeting().key_mapping.rules;
        map.extend((!rules.is_empty()).then(|| (KEY_MAPPING.to_string(), json!(rules))));
        map.serialize(serializer)
    }
}

/// # Errors
/// Every entry that cannot be used, by name.
impl<'de> Deserialize<'de> for PeftConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::from_map(Map::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

impl PeftConfig {
    /// What [`Serialize`] wrote.
    fn from_map(mut map: Map<String, Value>) -> Result<Self, String> {
        let rules: Vec<(String, String)> = match map.remove(KEY_MAPPING) {
            Some(rules) => serde_json::from_value(rules).map_err(|error| error.to_string())?,
            None => vec![],
        };
        let Parsed { mut config, problems, .. } = Self::parse(&map);
        if !problems.is_empty() {
            return Err(problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "));
        }
        config.targeting_mut().key_mapping = KeyMapping::new(rules);
        Ok(config)
    }
}

/// Whether a value asks for nothing.
fn is_neutral(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
        _ => false,
    }
}
