//! An adapter directory, read without a model.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::{Device, Tensor};
use burn_peft_files::{closest_key, is_float, to_f32};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;

use super::files::{AdapterFiles, unreadable};
use super::prefix::OtherPrefix;
use super::{CONFIG_FILE, TENSOR_FILE, adapter_config, keys, tensors};
use crate::config::{Parsed, PeftConfig};
use crate::error::{ConfigProblem, PeftError, TensorProblem};
use crate::layer::{Layer, Site, Space};
use crate::method::{BASE_LAYER, Chosen, METHODS, Parameters, Tells};
use crate::plan::Chooser;

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
/// assert_eq!(adapter.config().as_lora().map(|lora| lora.r), Some(2));
/// assert_eq!((adapter.modules()[0].d_input, adapter.modules()[0].d_output), (5, 3));
/// # std::fs::remove_dir_all(directory).unwrap();
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct AdapterDirectory {
    path: PathBuf,
    config: PeftConfig,
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
    /// What stands behind the module's name, without the name of an adapter.
    end: String,
    /// The key without the name of an adapter.
    unnamed: String,
    stored: Dtype,
    place: Range<usize>,
}

/// What a tensor of an adapter file is.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TensorRole {
    /// A tensor of the adapter's own, by what its method calls it: `A`, `B`, `magnitude`.
    Adapter(&'static str),
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
    layer: Layer,
}

impl AdapterDirectory {
    /// Reads an adapter directory. Reads as much as it can; [`problems`](Self::problems) lists the rest.
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
            adapter_config::parse(&files.config, &files.config_path)?.with_tensors();
        let bytes = files.tensors()?;
        let mut tensors = stored_tensors(&files.tensor_path, &bytes)?;
        // A pattern that does not compile tells nothing; it is a problem of its own.
        let told = Told::of(&tensors, &config).unwrap_or_default();
        for tensor in &mut tensors {
            tensor.role = told.role(tensor, &config);
        }
        Ok(Self {
            path: path.into(),
            peft_version,
            ignored_keys: ignored.into_iter().map(|(key, value)| (key, value.to_string())).collect(),
            config_problems: problems,
            modules: stored_modules(&tensors, &told, &config),
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
    pub fn config(&self) -> &PeftConfig {
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

    /// The modules of which the file has both factors of an update, sorted by name. None, if a pattern of the configuration
    /// cannot be used; [`problems`](Self::problems) names it.
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

    /// The numbers of the tensor `key`, in the order of the file.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn values(&self, key: &str) -> Result<Vec<f32>, PeftError> {
        let found = self.tensors.iter().find(|tensor| tensor.key == key);
        let values = match found {
            None => Err(TensorProblem::Missing { key: key.to_string(), closest: None }),
            Some(tensor) => {
                to_f32(tensor.stored, &self.bytes[tensor.place.clone()]).ok_or_else(|| tensor.wrong_type())
            }
        };
        values.map_err(|problem| self.inconsistent(vec![problem]))
    }

    /// Whether the tensor `key` has the numbers of `base`, but for one of the two having been rounded to a 16-bit type. So
    /// [`load_adapter`](crate::PeftModel::load_adapter) compares tensors of a base in the file with those of the model.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn repeats(&self, key: &str, base: &[f32]) -> Result<bool, PeftError> {
        Ok(tensors::values_equal_up_to_rounding(&self.values(key)?, base))
    }

    /// Everything for which [`load_adapter`](crate::PeftModel::load_adapter) refuses this adapter on any model; empty if
    /// it loads wherever its modules are.
    ///
    /// - [`PeftError::UnsupportedConfig`] with every entry that cannot be used
    /// - [`PeftError::InvalidConfig`], [`PeftError::InvalidPattern`] for every value that makes no sense;
    ///   [`PeftError::EndlessPattern`] for a pattern that takes too many steps on a module of the file
    /// - [`PeftError::KeyPrefix`] if all keys lack PEFT's prefix or have something in front of it
    /// - [`PeftError::InconsistentAdapter`] with every tensor that is missing, unexpected, or of a shape or type that
    ///   does not fit the configuration
    /// - [`PeftError::TargetAlsoSaved`], [`PeftError::LoraBiasUnsupported`] and other refusals of the methods
    /// - [`PeftError::NoAdapter`] if there are no tensors of an adapter at all
    pub fn problems(&self) -> Vec<PeftError> {
        let mut problems = vec![];
        if !self.config_problems.is_empty() {
            let path = self.path.join(CONFIG_FILE);
            problems.push(PeftError::UnsupportedConfig { path, problems: self.config_problems.clone() });
        }
        // Where a default stands in for a value, nothing can be said about tensors.
        if self.config_problems.iter().any(|problem| problem.is_unread) {
            return problems;
        }
        problems.extend(self.config.problems());
        let keys: Vec<&str> = self.tensors.iter().map(|tensor| &*tensor.unnamed).collect();
        if let Some(other) = OtherPrefix::of(&keys) {
            problems.push(other.refused(&self.path.join(TENSOR_FILE)));
            return problems;
        }
        if !self.tensors.iter().any(|tensor| keys::end_of(&tensor.end).is_some()) {
            problems.push(PeftError::NoAdapter {
                path: self.path.clone(),
                reason: format!("there are no tensors of an adapter in `{TENSOR_FILE}`"),
                hint: "give the directory of an adapter after it was trained and saved".into(),
            });
        }
        let told = match Told::of(&self.tensors, &self.config) {
            Ok(told) => told,
            Err(error) => {
                // A pattern that does not compile is among the problems of the configuration already.
                let is_told = matches!(error, PeftError::InvalidPattern { .. });
                problems.extend((!is_told).then_some(error));
                return problems;
            }
        };
        let found = self.tensor_problems(&told.expected);
        if !found.is_empty() {
            problems.push(self.inconsistent(found));
        }
        let chosen = Parameters { list: &told.parameters, are_all: false };
        problems.extend(METHODS.iter().filter_map(|method| (method.check)(&self.config, &chosen).err()));
        problems
    }

    fn inconsistent(&self, problems: Vec<TensorProblem>) -> PeftError {
        PeftError::InconsistentAdapter { path: self.path.join(TENSOR_FILE), problems }
    }

    /// Tensors that are not those that the configuration asks for.
    fn tensor_problems(&self, expected: &Expected) -> Vec<TensorProblem> {
        let (mut problems, mut unexpected) = (vec![], vec![]);
        for tensor in &self.tensors {
            if tensor.role == TensorRole::Unknown {
                unexpected.push(tensor.key.clone());
            } else if !is_float(tensor.stored) {
                problems.push(tensor.wrong_type());
            } else if let Some((shape, _)) = expected.get(&tensor.unnamed) {
                problems.extend(tensor.wrong_shape(shape));
            }
        }
        let keys: BTreeSet<&str> = self.tensors.iter().map(|tensor| &*tensor.unnamed).collect();
        for key in expected.keys().filter(|key| !keys.contains(&***key)) {
            let closest = closest_key(key, unexpected.iter().map(String::as_str));
            problems.push(TensorProblem::Missing { key: key.clone(), closest });
        }
        let unexpected = unexpected.into_iter();
        problems.extend(unexpected.map(|key| TensorProblem::Unexpected { key, closest: None }));
        problems
    }
}

/// The tensors that a configuration asks for: shapes by key, and whether each is a copy of a parameter.
type Expected = BTreeMap<String, (Vec<usize>, bool)>;

/// A size that no tensor of the file tells.
const UNKNOWN: usize = usize::MAX;

/// What a file tells of the model that its adapter is for.
#[derive(Default)]
struct Told {
    /// The weights that it has adapter tensors of, and the parameters of which it has values, by what the configuration says
    /// about them.
    parameters: Vec<Chosen>,
    /// Modules with adapter tensors.
    adapted: BTreeSet<String>,
    /// The tensors that the configuration asks for in these modules.
    expected: Expected,
}

/// The weights that a file has adapter tensors of, by their modules, as far as keys and shapes tell what they are.
fn weights(tensors: &[StoredTensor]) -> BTreeMap<&str, Site> {
    let mut weights: BTreeMap<&str, Site> = BTreeMap::new();
    for tensor in tensors {
        let Some(end) = keys::end_of(&tensor.end) else { continue };
        let site = weights.entry(&tensor.module).or_insert_with(|| Site {
            module: tensor.module.clone(),
            name: tensor.module.clone(),
            parameter: "weight".to_string(),
            layer: end.layer.unwrap_or(Layer::Linear),
            // Whether the layer is a plain one is a matter of the model.
            space: Space::Activations,
            shape: vec![UNKNOWN, UNKNOWN],
        });
        if tensor.shape.len() > 2 && matches!(end.tells, Tells::Input | Tells::Output) {
            site.layer = Layer::Conv;
            site.shape.resize(tensor.shape.len(), UNKNOWN);
        }
        // The channels of the output come first in a convolution's weight.
        let is_conv = site.layer == Layer::Conv;
        let size = |at: Option<&usize>| at.copied().unwrap_or(UNKNOWN);
        match (end.tells, tensor.shape.get(1..)) {
            (Tells::Input, Some(rest)) if is_conv && rest.len() + 1 == site.shape.len() => {
                site.shape[1..].copy_from_slice(rest);
            }
            (Tells::Input, _) if is_conv => {}
            (Tells::Input, rest) => site.shape[0] = size(rest.unwrap_or_default().first()),
            (Tells::Output, _) => site.shape[usize::from(!is_conv)] = size(tensor.shape.first()),
            (Tells::Width, _) => site.shape[1] = size(tensor.shape.last()),
            (Tells::Nothing, _) => {}
        }
    }
    weights
}

impl Told {
    /// # Errors
    /// [`PeftError::InvalidPattern`], [`PeftError::EndlessPattern`].
    fn of(tensors: &[StoredTensor], config: &PeftConfig) -> Result<Self, PeftError> {
        let weights = weights(tensors);
        let adapted: BTreeSet<String> = weights.keys().map(|module| module.to_string()).collect();
        let own =
            tensors.iter().filter(|tensor| keys::end_of(&tensor.end).is_none() && !tensor.module.is_empty());
        let own = own.map(|tensor| Site {
            module: tensor.module.clone(),
            name: tensor.module.clone(),
            parameter: tensor.end.rsplit('.').next().unwrap_or_default().to_string(),
            layer: Layer::Other,
            space: Space::Activations,
            shape: tensor.shape.clone(),
        });
        let own: Vec<Site> = own.collect();
        let chooser = Chooser::new(config)?;
        let choose = |site: Site| {
            let layer = weights.get(&*site.name).map_or(site.layer, |weight| weight.layer);
            let is_adapted = adapted.contains(&site.name)
                && chooser.selection.adapts(&site.name, layer != Layer::Embedding)?;
            chooser.choose(Arc::new(site), is_adapted, false)
        };
        let parameters = weights.values().cloned().chain(own).map(choose);
        let parameters: Vec<Chosen> = parameters.collect::<Result<_, PeftError>>()?;
        let mut expected = BTreeMap::new();
        for at in &parameters {
            // A target that is saved as well is refused by another name.
            let at = Chosen { is_saved: at.is_saved && !at.is_adapted, ..at.clone() };
            for method in at.methods(config) {
                let tensors = method.tensors(&at.site).into_iter().filter(|spec| spec.is_trained);
                let tensors = tensors
                    .map(|spec| (keys::join(&at.site.name, &spec.key), (spec.shape, method.replaces())));
                expected.extend(tensors);
            }
        }
        Ok(Self { parameters, adapted, expected })
    }

    /// What a tensor is to the adapter.
    fn role(&self, tensor: &StoredTensor, config: &PeftConfig) -> TensorRole {
        let key = &tensor.unnamed;
        let is_inside = tensor.end.starts_with(BASE_LAYER);
        match (self.expected.get(key), keys::end_of(&tensor.end)) {
            _ if keys::is_written_again(key, config.kind().bias()) => TensorRole::Repeated,
            (Some((_, true)), _) => TensorRole::Copy,
            (Some(_), Some(end)) => TensorRole::Adapter(end.tensor),
            _ if is_inside && !self.adapted.contains(&tensor.module) => TensorRole::Unknown,
            _ if keys::is_of_base(key) => TensorRole::BaseLayer,
            _ => TensorRole::Unknown,
        }
    }
}

impl StoredTensor {
    /// Whether it changes an output layer that is tied to the module as it changes the module: trained tokens do, all else
    /// only changes the module.
    pub fn is_read_by_tied_output(&self) -> bool {
        keys::end_of(&self.end).is_some_and(|end| end.is_read_by_tied_output)
    }

    fn wrong_type(&self) -> TensorProblem {
        TensorProblem::DType { key: self.key.clone(), found: self.dtype.clone() }
    }

    /// What is wrong with the shape, as far as the file tells what it should be.
    fn wrong_shape(&self, expected: &[usize]) -> Option<TensorProblem> {
        let fits = |(expected, found): (&usize, &usize)| *expected == UNKNOWN || expected == found;
        let is_right = expected.len() == self.shape.len() && expected.iter().zip(&self.shape).all(fits);
        // Where the file does not tell a size, its own stands for it.
        let told = |(axis, &size): (usize, &usize)| {
            if size == UNKNOWN { self.shape.get(axis).copied().unwrap_or(1) } else { size }
        };
        (!is_right).then(|| TensorProblem::Shape {
            key: self.key.clone(),
            expected: expected.iter().enumerate().map(told).collect(),
            found: self.shape.clone(),
        })
    }
}

impl StoredModule {
    /// Whether it is an embedding.
    pub fn is_embedding(&self) -> bool {
        self.layer == Layer::Embedding
    }
}

/// The table of contents of a tensor file.
///
/// # Errors
/// [`PeftError::NotTheFile`], [`PeftError::Safetensors`], [`PeftError::NoAdapter`] for tensors of several adapters.
fn stored_tensors(path: &Path, bytes: &[u8]) -> Result<Vec<StoredTensor>, PeftError> {
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
    let stored = infos.iter().map(|(key, info)| {
        let unnamed = unnamed.get(key).unwrap_or(key);
        let (module, end) = keys::split(unnamed).unwrap_or_default();
        StoredTensor {
            key: key.clone(),
            module: module.to_string(),
            role: TensorRole::Unknown,
            shape: info.shape.clone(),
            dtype: format!("{:?}", info.dtype),
            end: end.to_string(),
            unnamed: unnamed.clone(),
            stored: info.dtype,
            place: start + info.data_offsets.0..start + info.data_offsets.1,
        }
    });
    Ok(stored.collect())
}

/// The modules of which both factors are there.
fn stored_modules(tensors: &[StoredTensor], told: &Told, config: &PeftConfig) -> Vec<StoredModule> {
    let key = |module: &str, tells| {
        let of_module = tensors.iter().filter(|tensor| tensor.module == module && tensor.shape.len() > 1);
        let mut factors =
            of_module.filter(|tensor| keys::end_of(&tensor.end).is_some_and(|end| end.tells == tells));
        factors.next().map(|tensor| tensor.key.clone())
    };
    let modules = told.parameters.iter().filter_map(|at| {
        let site = &at.site;
        let (a, b) = (key(&site.name, Tells::Input)?, key(&site.name, Tells::Output)?);
        let [d_input, d_output] = site.is_adaptable().then(|| site.dims())?;
        let scaling = config.as_lora().map_or(1.0, |config| config.scaling_of(at.r, at.lora_alpha));
        Some(StoredModule {
            name: site.name.clone(),
            r: at.r,
            lora_alpha: at.lora_alpha,
            scaling,
            d_input,
            d_output,
            a,
            b,
            layer: site.layer,
        })
    });
    modules.collect()
}

#[cfg(test)]
mod tests {
    use safetensors::serialize;
    use safetensors::tensor::TensorView;

    use super::*;
    use crate::LoraConfig;

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
                ("embed", TensorRole::Adapter("A of an embedding")),
                ("embed", TensorRole::Adapter("B of an embedding")),
                ("layers.0.q", TensorRole::Copy),
                ("layers.0.q", TensorRole::Adapter("A")),
                ("layers.0.q", TensorRole::Adapter("B")),
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
            "use_qalora": true, "lora_bias": true}"#;
        let more: [(String, &[usize], Dtype); 5] = [
            (format!("{E}.lora_embedding_A"), &[2, 7], Dtype::F64),
            (format!("{E}.lora_embedding_B"), &[3, 2], Dtype::F32),
            (format!("{Q}.lora_C.weight"), &[3], Dtype::F32),
            ("base_model.model.v.lora_A.weight".into(), &[2, 5], Dtype::F32),
            ("layers.0.q.lora_A".into(), &[2, 5], Dtype::F32),
        ];
        let found = problems(config, &[&q(4)[..], &more].concat());
        let expected = [
            "cannot use the configuration in `D/adapter_config.json`:\n  `use_qalora` is true: merge the adapter in Python \
             and load the merged model, or train one without this setting",
            "invalid `lora_dropout`: expected a probability in [0, 1), found 1.5",
            "the tensors in `D/adapter_model.safetensors` do not fit `adapter_config.json`:\n  \
             type mismatch at `base_model.model.embed.lora_embedding_A`: expected F32, F16 or BF16, found F64\n  \
             shape mismatch at `base_model.model.layers.0.q.lora_A.weight`: expected [2, 5], found [4, 5]\n  \
             shape mismatch at `base_model.model.layers.0.q.lora_B.weight`: expected [3, 2], found [3, 4]\n  \
             missing `base_model.model.layers.0.q.lora_B.bias` (closest: `base_model.model.layers.0.q.lora_C.weight`)\n  \
             unexpected `base_model.model.layers.0.q.lora_C.weight`\n  \
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
        assert!(found.len() == 1 && found[0].contains("no tensors of an adapter"), "{found:?}");
        let found = problems(r#"{"peft_type": "LORA", "target_modules": "(q", "r": 2}"#, &q(2));
        assert_eq!(found, ["invalid regular expression `(q`"]);
    }

    #[test]
    fn tokens_without_a_tensor_are_told() {
        let config =
            r#"{"peft_type": "LORA", "target_modules": ["q"], "r": 2, "trainable_token_indices": [3]}"#;
        let found = problems(config, &q(2));
        let expected = "invalid `trainable_token_indices`: expected names of embeddings or linear layers, found \
                        `embed_tokens`, which matches none";
        assert_eq!(found, [expected]);
        let rows = [(format!("{E}_tokens.token_adapter.trainable_tokens_delta"), &[1, 4][..], Dtype::F32)];
        assert!(problems(config, &[&q(2)[..], &rows].concat()).is_empty());
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
        assert_eq!(roles, [copy, repeated, repeated, TensorRole::Adapter("A"), TensorRole::Adapter("B")]);
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

    #[test]
    fn shapes_that_make_no_sense_are_told_and_nothing_panics() {
        let config = r#"{"peft_type": "LORA", "target_modules": ["q"], "r": 2}"#;
        let key = |end: &str| format!("{Q}.{end}");
        let cases: [&[(&str, &[usize])]; 5] = [
            &[("lora_B.weight", &[4, 2, 1]), ("lora_embedding_A", &[2, 9])],
            &[("lora_B.weight", &[4, 2, 1, 1])],
            &[("lora_A.weight", &[2, 5]), ("lora_B.weight", &[3, 2, 1, 1])],
            &[("lora_A.weight", &[2, 5, 1, 1]), ("lora_B.weight", &[3, 2, 1, 1, 1])],
            &[("lora_A.weight", &[]), ("lora_B.weight", &[3, 2])],
        ];
        for case in cases {
            let tensors: Vec<_> = case.iter().map(|(end, shape)| (key(end), *shape, Dtype::F32)).collect();
            let found = problems(config, &tensors);
            assert!(!found.is_empty(), "{case:?}");
            assert!(found.iter().all(|text| !text.contains(&usize::MAX.to_string())), "{found:?}");
        }
    }
}
