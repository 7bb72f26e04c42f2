use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;

use crate::error::{ConfigProblem, PeftError, TensorProblem, closest_key};
use crate::inject::{is_part_of, lies_within};
use crate::lora::{Bias, LoraConfig};
use crate::target::{LayerFilter, TargetModules};

use super::adapter_config::{self, Parsed};
use super::files::{AdapterFiles, unreadable};
use super::prefix::OtherPrefix;
use super::{CONFIG_FILE, TENSOR_FILE, keys, tensors};

/// An adapter directory in PEFT's format, read without a model: what it says, what it holds, and what is wrong with it.
///
/// ```
/// # use burn::nn::LinearConfig;
/// # use burn::tensor::Device;
/// use burn_peft::{AdapterDirectory, LoraConfig, PeftModel};
///
/// # fn main() -> Result<(), burn_peft::PeftError> {
/// # let directory = std::env::temp_dir().join(format!("adapter-directory-{}", std::process::id()));
/// # #[derive(burn::module::Module, Debug)]
/// # struct Model {
/// #     q_proj: burn_peft::LoraLinear,
/// # }
/// # let mut model = Model { q_proj: LinearConfig::new(5, 3).init(&Device::default()).into() };
/// # model.add_adapter("default", &LoraConfig::new(2).with_target_modules(["q_proj"]))?;
/// model.save_adapter("default", &directory)?;
///
/// let adapter = AdapterDirectory::open(&directory)?;
/// assert!(adapter.problems().is_empty());
/// assert_eq!(adapter.config().r, 2);
/// assert_eq!((adapter.modules()[0].d_input, adapter.modules()[0].d_output), (5, 3));
/// # std::fs::remove_dir_all(directory).unwrap();
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct AdapterDirectory {
    path: PathBuf,
    config: LoraConfig,
    peft_version: Option<String>,
    ignored_keys: Vec<(String, String)>,
    config_problems: Vec<ConfigProblem>,
    tensors: Vec<StoredTensor>,
    modules: Vec<StoredModule>,
    bytes: Vec<u8>,
}

/// One tensor of an adapter file.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTensor {
    /// Its key in the file.
    pub key: String,
    /// The name of the module it belongs to; empty if the key is none of PEFT's.
    pub module: String,
    /// What it is to the adapter.
    pub role: TensorRole,
    /// Its shape in the file, PyTorch's layout.
    pub shape: Vec<usize>,
    /// Its type, as safetensors names it.
    pub dtype: String,
    /// The key without the name of an adapter.
    unnamed: String,
    stored: Dtype,
    place: Range<usize>,
}

/// What a tensor of an adapter file is.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TensorRole {
    /// The factor `A`, `[r, d_in]` or, of a convolution, `[r, channels_in, kernel..]`.
    A,
    /// The factor `B`, `[d_out, r]` or, of a convolution, `[channels_out, r, 1..]`.
    B,
    /// The factor `A` of an embedding, `[r, vocabulary]`.
    EmbeddingA,
    /// The factor `B` of an embedding, `[width, r]`.
    EmbeddingB,
    /// The bias of `B`, PEFT's `lora_bias`.
    LoraBias,
    /// A parameter of the base, which PEFT adds for embeddings and output layers. It says nothing new: a model with
    /// another one refuses the adapter.
    BaseLayer,
    /// A trained copy of a parameter: of `modules_to_save`, or a bias.
    Copy,
    /// A bias that PEFT wrote a second time. Nobody reads it.
    Repeated,
    /// None that the configuration asks for.
    Unknown,
}

/// A module for which an adapter file has both factors.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq)]
pub struct StoredModule {
    /// Its name, `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Its rank by the configuration, patterns considered.
    pub r: usize,
    /// Its `lora_alpha` by the configuration, patterns considered.
    pub lora_alpha: f64,
    /// The factor of its update, `lora_alpha / r` or, with rsLoRA, `lora_alpha / sqrt(r)`.
    pub scaling: f64,
    /// Inputs of a linear layer, vocabulary of an embedding, `channels_in * kernel` of a convolution.
    pub d_input: usize,
    /// Outputs of a linear layer, width of an embedding, `channels_out` of a convolution.
    pub d_output: usize,
    /// The key of `A`, to be [`read`](AdapterDirectory::read).
    pub a: String,
    /// The key of `B`.
    pub b: String,
}

impl AdapterDirectory {
    /// Reads an adapter directory. Whatever can be read is: [`problems`](Self::problems) tells what else is wrong.
    ///
    /// # Errors
    /// - [`PeftError::NoAdapter`]: a file is missing, the tensors are a pickle or those of several adapters, or the files
    ///   are another program's
    /// - [`PeftError::Io`], [`PeftError::Json`], [`PeftError::Safetensors`], [`PeftError::NotTheFile`]: a file cannot be
    ///   read
    pub fn open(directory: impl AsRef<Path>) -> Result<Self, PeftError> {
        let path = directory.as_ref();
        let mut files = AdapterFiles::read(path)?;
        let Parsed { config, ignored, problems, peft_version } =
            adapter_config::parse(&files.config, &files.config_path)?;
        let bytes = files.tensors()?;
        let tensors = stored_tensors(&files.tensor_path, &bytes, &config)?;
        Ok(Self {
            path: path.into(),
            peft_version,
            ignored_keys: ignored.into_iter().map(|(key, value)| (key, value.to_string())).collect(),
            config_problems: problems,
            modules: stored_modules(&tensors, &config),
            tensors,
            config,
            bytes,
        })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The configuration, with defaults in the place of entries that cannot be used.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// The version of PEFT that wrote the configuration, if it says.
    pub fn peft_version(&self) -> Option<&str> {
        self.peft_version.as_deref()
    }

    /// Entries of the configuration that this version does not know and that ask for nothing: keys and their values as
    /// JSON.
    pub fn ignored_keys(&self) -> &[(String, String)] {
        &self.ignored_keys
    }

    /// All tensors of the file, sorted by key.
    pub fn tensors(&self) -> &[StoredTensor] {
        &self.tensors
    }

    /// The modules with an update of low rank, sorted by name.
    pub fn modules(&self) -> &[StoredModule] {
        &self.modules
    }

    /// The size of the tensor file in bytes.
    pub fn file_size(&self) -> usize {
        self.bytes.len()
    }

    /// Elements of the tensors that say something new, those of [`TensorRole::BaseLayer`] and [`TensorRole::Repeated`]
    /// left out.
    pub fn num_params(&self) -> usize {
        let repeated = [TensorRole::BaseLayer, TensorRole::Repeated];
        let own = self.tensors.iter().filter(|tensor| !repeated.contains(&tensor.role));
        own.map(|tensor| tensor.shape.iter().product::<usize>()).sum()
    }

    /// The tensor `key` in f32, flattened in the order of the file.
    ///
    /// # Errors
    /// [`PeftError::InconsistentAdapter`] if there is no such tensor, or it is not of a floating-point type that
    /// adapters can have.
    pub fn read(&self, key: &str, device: &Device) -> Result<Tensor<1>, PeftError> {
        let found = self.tensors.iter().find(|tensor| tensor.key == key);
        let value = match found {
            None => Err(TensorProblem::Missing { key: key.to_string(), closest: None }),
            Some(tensor) => tensors::decode(tensor.stored, &self.bytes[tensor.place.clone()], device)
                .ok_or_else(|| tensor.wrong_type()),
        };
        value.map_err(|problem| self.inconsistent(vec![problem]))
    }

    /// Everything for which [`load_adapter`](crate::PeftModel::load_adapter) refuses this adapter on any model; empty if
    /// it loads wherever its modules are.
    ///
    /// - [`PeftError::UnsupportedConfig`] with every entry that cannot be used
    /// - [`PeftError::InvalidConfig`], [`PeftError::InvalidPattern`] for every value that makes no sense
    /// - [`PeftError::KeyPrefix`] if all keys lack PEFT's prefix or have something in front of it
    /// - [`PeftError::InconsistentAdapter`] with every tensor that is missing, unexpected, or of a shape or type that
    ///   does not fit the configuration
    /// - [`PeftError::TargetAlsoSaved`], [`PeftError::LoraBiasUnsupported`]
    /// - [`PeftError::NoAdapter`] if there are no factors at all
    pub fn problems(&self) -> Vec<PeftError> {
        // Without these nothing can be said about tensors.
        const TENSORS_DEPEND_ON: &[&str] = &[
            "bias",
            "exclude_modules",
            "layers_pattern",
            "layers_to_transform",
            "lora_bias",
            "modules_to_save",
            "peft_type",
            "r",
            "rank_pattern",
            "target_modules",
        ];
        let mut problems = vec![];
        if !self.config_problems.is_empty() {
            let path = self.path.join(CONFIG_FILE);
            problems.push(PeftError::UnsupportedConfig { path, problems: self.config_problems.clone() });
        }
        let unreadable = |problem: &ConfigProblem| TENSORS_DEPEND_ON.contains(&&*problem.field);
        if self.config_problems.iter().any(unreadable) {
            return problems;
        }
        problems.extend(self.config.problems());
        let keys: Vec<&str> = self.tensors.iter().map(|tensor| &*tensor.unnamed).collect();
        if let Some(other) = OtherPrefix::of(&keys) {
            problems.push(other.refused(&self.path.join(TENSOR_FILE)));
            return problems;
        }
        if self.modules.is_empty() {
            problems.push(PeftError::NoAdapter {
                path: self.path.clone(),
                reason: format!("there are no pairs of factors in `{TENSOR_FILE}`"),
                hint: "give the directory of an adapter after it was trained and saved".into(),
            });
        }
        match self.tensor_problems() {
            Ok(found) if found.is_empty() => {}
            Ok(found) => problems.push(self.inconsistent(found)),
            // A pattern that does not compile is among the problems of the configuration already.
            Err(PeftError::InvalidPattern { .. }) => {}
            Err(error) => problems.push(error),
        }
        let named = |is_meant: &dyn Fn(&StoredModule) -> bool| -> Vec<String> {
            let modules = self.modules.iter().filter(|module| is_meant(module));
            modules.map(|module| module.name.clone()).collect()
        };
        let both = named(&|module| {
            let saved = &self.config.modules_to_save;
            saved.iter().any(|saved| is_part_of(&module.name, saved))
                && !saved.iter().any(|saved| lies_within(&module.name, saved))
        });
        if !both.is_empty() {
            problems.push(PeftError::TargetAlsoSaved { modules: both });
        }
        let embeddings = named(&|module| self.config.lora_bias && module.is_embedding());
        if !embeddings.is_empty() {
            problems.push(PeftError::LoraBiasUnsupported { modules: embeddings });
        }
        problems
    }

    fn inconsistent(&self, problems: Vec<TensorProblem>) -> PeftError {
        PeftError::InconsistentAdapter { path: self.path.join(TENSOR_FILE), problems }
    }

    /// Tensors that do not fit the configuration.
    ///
    /// # Errors
    /// [`PeftError::InvalidPattern`].
    fn tensor_problems(&self) -> Result<Vec<TensorProblem>, PeftError> {
        let config = &self.config;
        let matcher = config.target_modules.as_ref().map(TargetModules::compile).transpose()?;
        let excluding = config.exclude_modules.as_ref().map(TargetModules::compile).transpose()?;
        let filter = LayerFilter::new(config.layers_to_transform.as_deref(), &config.layers_pattern)?;
        let is_target = |tensor: &StoredTensor| -> Result<bool, PeftError> {
            let module = &*tensor.module;
            let is_linear = matches!(tensor.role, TensorRole::A | TensorRole::B);
            let is_matched = match &matcher {
                Some(matcher) => matcher.matches_within(module, is_linear, &filter)?,
                None => true,
            };
            let is_excluded = match &excluding {
                Some(excluding) => excluding.matches(module, true)?,
                None => false,
            };
            let is_saved = config.modules_to_save.iter().any(|saved| lies_within(module, saved));
            Ok(is_matched && !is_excluded && !is_saved)
        };
        let configured = config.ranks()?;
        let ranks: BTreeMap<&str, usize> =
            self.modules.iter().map(|module| (&*module.name, module.r)).collect();
        let mut problems = vec![];
        let mut unexpected = vec![];
        for tensor in &self.tensors {
            let is_factor = tensor.role.is_factor();
            if tensor.role == TensorRole::Unknown || (is_factor && !is_target(tensor)?) {
                unexpected.push(tensor.key.clone());
            } else if !tensors::is_float(tensor.stored) {
                problems.push(tensor.wrong_type());
            } else if is_factor {
                let r = match ranks.get(&*tensor.module) {
                    Some(r) => *r,
                    None => configured.of(&tensor.module)?.0,
                };
                problems.extend(tensor.wrong_rank(r));
            } else if tensor.role == TensorRole::LoraBias {
                problems.extend(self.wrong_lora_bias(tensor));
            }
        }
        for key in self.missing() {
            let closest = closest_key(&key, &unexpected);
            problems.push(TensorProblem::Missing { key, closest });
        }
        let unexpected = unexpected.into_iter();
        problems.extend(unexpected.map(|key| TensorProblem::Unexpected { key, closest: None }));
        Ok(problems)
    }

    /// What is wrong with the shape of a `lora_bias`, which is as long as `B` is high.
    fn wrong_lora_bias(&self, bias: &StoredTensor) -> Option<TensorProblem> {
        let b = keys::join(&bias.module, "lora_B.weight");
        let b = self.tensors.iter().find(|tensor| tensor.unnamed == b)?;
        let expected = vec![*b.shape.first()?];
        (expected != bias.shape).then(|| TensorProblem::Shape {
            key: bias.key.clone(),
            expected,
            found: bias.shape.clone(),
        })
    }

    /// Keys of the tensors that others in the file ask for.
    fn missing(&self) -> Vec<String> {
        let keys: BTreeSet<&str> = self.tensors.iter().map(|tensor| &*tensor.unnamed).collect();
        let mut missing = vec![];
        for tensor in &self.tensors {
            let partners: &[&str] = match tensor.role {
                TensorRole::A if self.config.lora_bias => &["lora_B.weight", "lora_B.bias"],
                TensorRole::A => &["lora_B.weight"],
                TensorRole::B | TensorRole::LoraBias => &["lora_A.weight"],
                TensorRole::EmbeddingA => &["lora_embedding_B"],
                TensorRole::EmbeddingB => &["lora_embedding_A"],
                _ => &[],
            };
            let partners = partners.iter().map(|end| keys::join(&tensor.module, end));
            missing.extend(partners.filter(|key| !keys.contains(&**key)));
        }
        missing.sort();
        missing.dedup();
        missing
    }
}

impl TensorRole {
    fn is_factor(self) -> bool {
        matches!(self, Self::A | Self::B | Self::EmbeddingA | Self::EmbeddingB)
    }

    /// The role of the tensor that `end` names in `module`.
    fn of(module: &str, end: &str, config: &LoraConfig, adapted: &BTreeSet<&str>) -> Self {
        let is_adapted = adapted.contains(module);
        match end {
            "lora_A.weight" => Self::A,
            "lora_B.weight" => Self::B,
            "lora_embedding_A" => Self::EmbeddingA,
            "lora_embedding_B" => Self::EmbeddingB,
            "lora_B.bias" if config.lora_bias => Self::LoraBias,
            _ if keys::is_written_again(&keys::join(module, end), config.bias) => Self::Repeated,
            "base_layer.weight" if is_adapted => Self::BaseLayer,
            "base_layer.bias" if is_adapted && config.bias != Bias::None => Self::Copy,
            "base_layer.bias" if is_adapted => Self::BaseLayer,
            "bias" if config.bias == Bias::All && !is_adapted => Self::Copy,
            _ if config.modules_to_save.iter().any(|saved| is_part_of(module, saved)) => Self::Copy,
            _ if keys::is_of_base(&keys::join(module, end)) => Self::BaseLayer,
            _ => Self::Unknown,
        }
    }
}

impl StoredTensor {
    fn wrong_type(&self) -> TensorProblem {
        TensorProblem::DType { key: self.key.clone(), found: self.dtype.clone() }
    }

    /// What is wrong with the shape of a factor that should have rank `r`.
    fn wrong_rank(&self, r: usize) -> Option<TensorProblem> {
        let mut expected = self.shape.clone();
        let is_a = matches!(self.role, TensorRole::A | TensorRole::EmbeddingA);
        // `[r, d_in, ..]` and `[d_out, r, 1, ..]`
        expected.resize(expected.len().max(2), 1);
        expected[usize::from(!is_a)] = r;
        if !is_a {
            expected[2..].fill(1);
        }
        (expected != self.shape).then(|| TensorProblem::Shape {
            key: self.key.clone(),
            expected,
            found: self.shape.clone(),
        })
    }
}

impl StoredModule {
    /// Whether it is an embedding.
    pub fn is_embedding(&self) -> bool {
        self.a.contains(".lora_embedding_A")
    }
}

/// The table of contents of a tensor file.
///
/// # Errors
/// [`PeftError::NotTheFile`], [`PeftError::Safetensors`], [`PeftError::NoAdapter`] for tensors of several adapters.
fn stored_tensors(path: &Path, bytes: &[u8], config: &LoraConfig) -> Result<Vec<StoredTensor>, PeftError> {
    // Deserializing checks the lengths as well.
    let (header, metadata) = SafeTensors::deserialize(bytes)
        .and_then(|_| SafeTensors::read_metadata(bytes))
        .map_err(|source| unreadable(path, bytes, PeftError::Safetensors { path: path.into(), source }))?;
    let start = header + size_of::<u64>();
    let infos: BTreeMap<String, _> = metadata.tensors().into_iter().collect();
    let unnamed: BTreeMap<String, String> = tensors::without_names(path, infos.keys().map(String::as_str))?
        .into_iter()
        .map(|(unnamed, key)| (key, unnamed))
        .collect();
    let parts = unnamed.values().filter_map(|key| keys::split(key));
    let adapted: BTreeSet<&str> =
        parts.filter(|(_, end)| end.starts_with("lora_")).map(|(module, _)| module).collect();
    let stored = infos.iter().map(|(key, info)| {
        let unnamed = unnamed.get(key).unwrap_or(key);
        let (module, role) = match keys::split(unnamed) {
            Some((module, end)) => (module, TensorRole::of(module, end, config, &adapted)),
            None => ("", TensorRole::Unknown),
        };
        StoredTensor {
            key: key.clone(),
            unnamed: unnamed.clone(),
            module: module.to_string(),
            role,
            shape: info.shape.clone(),
            dtype: format!("{:?}", info.dtype),
            stored: info.dtype,
            place: start + info.data_offsets.0..start + info.data_offsets.1,
        }
    });
    Ok(stored.collect())
}

/// The pairs of factors. A pattern that does not compile counts as none; it is a problem of its own.
fn stored_modules(tensors: &[StoredTensor], config: &LoraConfig) -> Vec<StoredModule> {
    let find = |module: &str, role| {
        tensors.iter().find(|tensor| tensor.module == module && tensor.role == role && tensor.shape.len() > 1)
    };
    let ranks = config.ranks().ok();
    let pairs = tensors.iter().filter_map(|a| {
        let role = match a.role {
            TensorRole::A => TensorRole::B,
            TensorRole::EmbeddingA => TensorRole::EmbeddingB,
            _ => return None,
        };
        let (_, d_input) = a.shape.split_first()?;
        let b = find(&a.module, role)?;
        let default = (config.r, config.lora_alpha);
        let (r, lora_alpha) = ranks.as_ref().and_then(|ranks| ranks.of(&a.module).ok()).unwrap_or(default);
        Some(StoredModule {
            name: a.module.clone(),
            r,
            lora_alpha,
            scaling: config.scaling_of(r, lora_alpha),
            d_input: d_input.iter().product(),
            d_output: *b.shape.first()?,
            a: a.key.clone(),
            b: b.key.clone(),
        })
    });
    let mut modules: Vec<StoredModule> = pairs.collect();
    modules.sort_by(|one, other| one.name.cmp(&other.name));
    modules
}

#[cfg(test)]
mod tests {
    use safetensors::serialize;
    use safetensors::tensor::TensorView;

    use super::*;

    const Q: &str = "base_model.model.layers.0.q";
    const E: &str = "base_model.model.embed";

    /// An adapter directory with zeros for tensors.
    fn directory(config: &str, tensors: &[(String, &[usize], Dtype)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(CONFIG_FILE), config).unwrap();
        let bytes = vec![0; 1 << 10];
        let views = tensors.iter().map(|(key, shape, dtype)| {
            let length = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            (key, TensorView::new(*dtype, shape.to_vec(), &bytes[..length]).unwrap())
        });
        std::fs::write(directory.path().join(TENSOR_FILE), serialize(views, None).unwrap()).unwrap();
        directory
    }

    fn problems(config: &str, tensors: &[(String, &[usize], Dtype)]) -> Vec<String> {
        let directory = directory(config, tensors);
        let adapter = AdapterDirectory::open(directory.path()).unwrap();
        let strip =
            |error: PeftError| error.to_string().replace(&directory.path().display().to_string(), "D");
        adapter.problems().into_iter().map(strip).collect()
    }

    fn q(r: usize) -> [(String, &'static [usize], Dtype); 2] {
        let shapes: [&[usize]; 2] = if r == 2 { [&[2, 5], &[3, 2]] } else { [&[4, 5], &[3, 4]] };
        [
            (format!("{Q}.lora_A.weight"), shapes[0], Dtype::F32),
            (format!("{Q}.lora_B.weight"), shapes[1], Dtype::BF16),
        ]
    }

    #[test]
    fn modules_and_tensors_are_listed_with_what_they_are() {
        let config = r#"{"peft_type": "LORA", "target_modules": ["q", "embed"], "r": 2, "lora_alpha": 6,
            "rank_pattern": {"q": 4}, "use_rslora": true, "modules_to_save": ["norm"], "bias": "all",
            "peft_version": "0.9.0", "brand_new": []}"#;
        let more: [(String, &[usize], Dtype); 6] = [
            (format!("{E}.lora_embedding_A"), &[2, 7], Dtype::F32),
            (format!("{E}.lora_embedding_B"), &[3, 2], Dtype::F32),
            (format!("{E}.base_layer.weight"), &[7, 3], Dtype::F32),
            (format!("{Q}.base_layer.bias"), &[3], Dtype::F32),
            ("base_model.model.other.bias".into(), &[4], Dtype::F32),
            ("base_model.model.norm.weight".into(), &[6], Dtype::F16),
        ];
        let directory = directory(config, &[&q(4)[..], &more].concat());
        let adapter = AdapterDirectory::open(directory.path()).unwrap();
        assert!(adapter.problems().is_empty(), "{:?}", adapter.problems());
        assert_eq!(adapter.peft_version(), Some("0.9.0"));
        assert_eq!(adapter.ignored_keys(), [("brand_new".to_string(), "[]".to_string())]);
        let told: Vec<_> =
            adapter.modules().iter().map(|m| (&*m.name, m.r, m.scaling, m.d_input, m.d_output)).collect();
        assert_eq!(told, [("embed", 2, 6.0 / 2f64.sqrt(), 7, 3), ("layers.0.q", 4, 3.0, 5, 3)]);
        let roles: Vec<_> = adapter.tensors().iter().map(|tensor| (&*tensor.module, tensor.role)).collect();
        assert_eq!(
            roles,
            [
                ("embed", TensorRole::BaseLayer),
                ("embed", TensorRole::EmbeddingA),
                ("embed", TensorRole::EmbeddingB),
                ("layers.0.q", TensorRole::Copy),
                ("layers.0.q", TensorRole::A),
                ("layers.0.q", TensorRole::B),
                ("norm", TensorRole::Copy),
                ("other", TensorRole::Copy),
            ]
        );
        assert_eq!(adapter.num_params(), 14 + 6 + 20 + 12 + 3 + 4 + 6);
        let b = adapter.read(&adapter.modules()[1].b, &Device::default()).unwrap();
        assert_eq!(b.into_data().iter::<f32>().collect::<Vec<_>>(), [0.0; 12]);
    }

    #[test]
    fn everything_wrong_is_told_at_once() {
        let config = r#"{"peft_type": "LORA", "target_modules": ["q", "embed"], "r": 2, "lora_dropout": 1.5,
            "use_dora": true, "lora_bias": true}"#;
        let more: [(String, &[usize], Dtype); 5] = [
            (format!("{E}.lora_embedding_A"), &[2, 7], Dtype::F64),
            (format!("{E}.lora_embedding_B"), &[3, 2], Dtype::F32),
            (format!("{Q}.lora_magnitude_vector.weight"), &[3], Dtype::F32),
            ("base_model.model.v.lora_A.weight".into(), &[2, 5], Dtype::F32),
            ("layers.0.q.lora_A".into(), &[2, 5], Dtype::F32),
        ];
        let found = problems(config, &[&q(4)[..], &more].concat());
        let expected = [
            "cannot use the configuration in `D/adapter_config.json`:\n  `use_dora` is true: merge the adapter in Python \
             and load the merged model, or train one without this setting",
            "invalid `lora_dropout`: expected a probability in [0, 1), found 1.5",
            "the tensors in `D/adapter_model.safetensors` do not fit `adapter_config.json`:\n  \
             type mismatch at `base_model.model.embed.lora_embedding_A`: expected F32, F16 or BF16, found F64\n  \
             shape mismatch at `base_model.model.layers.0.q.lora_A.weight`: expected [2, 5], found [4, 5]\n  \
             shape mismatch at `base_model.model.layers.0.q.lora_B.weight`: expected [3, 2], found [3, 4]\n  \
             missing `base_model.model.layers.0.q.lora_B.bias` (closest: `base_model.model.layers.0.q.lora_magnitude_vector.weight`)\n  \
             missing `base_model.model.v.lora_B.bias` (closest: `base_model.model.v.lora_A.weight`)\n  \
             missing `base_model.model.v.lora_B.weight` (closest: `base_model.model.v.lora_A.weight`)\n  \
             unexpected `base_model.model.layers.0.q.lora_magnitude_vector.weight`\n  \
             unexpected `base_model.model.v.lora_A.weight`\n  unexpected `layers.0.q.lora_A`",
            "`lora_bias` cannot be added to `embed`\nhint: embeddings have none, and a plain layer needs a bias of its \
             own; use `LoraLinear`, or exclude them",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_lora_bias_is_as_long_as_b_is_high() {
        let config = r#"{"peft_type": "LORA", "target_modules": ["q"], "r": 2, "lora_bias": true}"#;
        let bias = |length| [(format!("{Q}.lora_B.bias"), [length], Dtype::F32)];
        for (length, count) in [(3, 0), (7, 1)] {
            let bias = bias(length);
            let bias = [(bias[0].0.clone(), &bias[0].1[..], bias[0].2)];
            let found = problems(config, &[&q(2)[..], &bias].concat());
            assert_eq!(found.len(), count, "{found:?}");
        }
    }

    #[test]
    fn a_configuration_of_another_kind_says_nothing_about_tensors() {
        let found = problems(r#"{"peft_type": "LOHA", "target_modules": ["q"]}"#, &q(4));
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains("`peft_type` is \"LOHA\""), "{found:?}");
    }

    #[test]
    fn an_adapter_without_factors_or_with_a_broken_pattern_is_none() {
        let found = problems(r#"{"peft_type": "LORA", "target_modules": ["q"]}"#, &[]);
        assert!(found.len() == 1 && found[0].contains("no pairs of factors"), "{found:?}");
        let found = problems(r#"{"peft_type": "LORA", "target_modules": "(q", "r": 2}"#, &q(2));
        assert_eq!(found, ["invalid regular expression `(q`"]);
    }

    #[test]
    fn a_module_to_save_by_the_end_of_its_name_is_not_a_target_as_well() {
        let config = r#"{"peft_type": "LORA", "target_modules": ["q"], "r": 2, "modules_to_save": [".0.q"]}"#;
        let found = problems(config, &q(2));
        assert!(found.len() == 1 && found[0].starts_with("modules are both targets"), "{found:?}");
    }

    #[test]
    fn biases_that_peft_writes_again_are_told_apart() {
        let bias = |module: &str| [(format!("base_model.model.{module}.bias"), &[3_usize][..], Dtype::F32)];
        let again = [bias("head.modules_to_save"), bias("head.original_module"), bias("head")].concat();
        let config = |bias: &str| {
            format!(
                r#"{{"peft_type": "LORA", "target_modules": ["q"], "r": 2, "modules_to_save": ["head"], "bias": "{bias}"}}"#
            )
        };
        let all = directory(&config("all"), &[&q(2)[..], &again].concat());
        let adapter = AdapterDirectory::open(all.path()).unwrap();
        assert!(adapter.problems().is_empty(), "{:?}", adapter.problems());
        let roles: Vec<TensorRole> = adapter.tensors().iter().map(|tensor| tensor.role).collect();
        let (repeated, copy) = (TensorRole::Repeated, TensorRole::Copy);
        assert_eq!(roles, [copy, repeated, repeated, TensorRole::A, TensorRole::B]);
        assert_eq!(adapter.num_params(), 10 + 6 + 3);
        // Otherwise nothing asks for them, on any model.
        let found = problems(&config("none"), &[&q(2)[..], &bias("other.modules_to_save")].concat());
        assert!(found.len() == 1 && found[0].contains("unexpected"), "{found:?}");
    }

    #[test]
    fn a_truncated_file_is_malformed() {
        let directory = directory(r#"{"peft_type": "LORA", "target_modules": ["q"], "r": 2}"#, &q(2));
        let path = directory.path().join(TENSOR_FILE);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let error = AdapterDirectory::open(directory.path()).unwrap_err();
        assert!(matches!(error, PeftError::Safetensors { .. }), "{error}");
        let config = LoraConfig::from_pretrained(directory.path()).unwrap();
        assert_eq!(config, LoraConfig::new(2).with_target_modules(["q"]));
    }
}
