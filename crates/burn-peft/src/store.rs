//! Adapter directories in the format of Hugging Face PEFT.

mod adapter_config;
mod directory;
mod keys;
mod tensors;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{ErrorKind, Write};
use std::path::Path;

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use crate::adapter::{Adapter, Change, Copied, Site, Update};
use crate::error::{PeftError, TensorProblem, closest};
use crate::inject::{InjectionReport, Parameter, Plan, parameters};
use crate::key_mapping::KeyMapping;
use crate::lora::{Bias, LoraConfig, LowRank};
use crate::seam::{Layout, States};
use crate::target::TargetModules;
use crate::tensor::cast;

pub use directory::{AdapterDirectory, StoredModule, StoredTensor, TensorRole};
use keys::{Entry, Part};

const CONFIG_FILE: &str = "adapter_config.json";
const TENSOR_FILE: &str = "adapter_model.safetensors";
const PICKLE_FILE: &str = "adapter_model.bin";

/// What can be done about a directory without an adapter.
const GIVE_ADAPTER: &str = "give the directory that PEFT's `save_pretrained` wrote; an adapter that is not named `default` is in a directory of its name in there";

/// How an adapter directory is loaded.
///
/// ```
/// use burn_peft::{KeyMapping, LoadOptions};
///
/// let names = KeyMapping::new([(r"^layers\.", "model.layers.")]);
/// let options = LoadOptions::new().with_key_mapping(names).with_lenient(true);
/// assert!(options.lenient);
/// ```
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LoadOptions {
    /// How Burn paths become the names in the files. Default: they are equal.
    pub key_mapping: KeyMapping,
    /// Load what fits and put everything else into [`LoadReport::problems`]: a tensor that is missing or does not fit
    /// keeps the value of a fresh adapter, one that is not expected is left. Default false: one such tensor and nothing
    /// is loaded.
    pub lenient: bool,
}

impl LoadOptions {
    /// Strict, with names that are equal.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets [`key_mapping`](Self::key_mapping).
    pub fn with_key_mapping(mut self, key_mapping: KeyMapping) -> Self {
        self.key_mapping = key_mapping;
        self
    }

    /// Sets [`lenient`](Self::lenient).
    pub fn with_lenient(mut self, lenient: bool) -> Self {
        self.lenient = lenient;
        self
    }
}

/// What was loaded from an adapter directory.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq)]
pub struct LoadReport {
    /// What the adapter was attached to.
    pub injection: InjectionReport,
    /// How many tensors were read.
    pub tensors: usize,
    /// Keys of the configuration that this version does not know and that ask for nothing.
    pub ignored_keys: Vec<String>,
    /// With [`LoadOptions::lenient`], every tensor that did not fit; empty otherwise.
    pub problems: Vec<TensorProblem>,
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {} tensors loaded", self.injection, self.tensors)?;
        if !self.ignored_keys.is_empty() {
            write!(f, "; configuration keys without effect: {}", self.ignored_keys.join(", "))?;
        }
        for problem in &self.problems {
            write!(f, "\n  {problem}")?;
        }
        Ok(())
    }
}

/// Writes adapter `name` of `states` to `directory`.
pub(crate) fn save(states: &States, name: &str, directory: &Path) -> Result<(), PeftError> {
    let adapters: Vec<&Adapter> = states.values().filter_map(|state| state.get(name)).collect();
    let Some(first) = adapters.first() else {
        return Err(PeftError::UnknownAdapter { name: name.to_string(), available: vec![] });
    };
    let config = config_to_write(&first.info.config, &adapters)?;
    let adapted = adapted_names(adapters.iter().map(|adapter| (&*adapter.info.site, change_of(adapter))));
    let mut tensors = vec![];
    for adapter in adapters {
        let (site, plain) = (&adapter.info.site, adapter.valid());
        for entry in keys::entries(site, change_of(adapter), config.lora_bias, adapted.contains(&site.name)) {
            if let Some(value) = keys::to_file(&plain, entry.part) {
                tensors.push((entry.key, entry.shape, value));
            }
        }
    }
    std::fs::create_dir_all(directory).map_err(PeftError::io(directory))?;
    let (config_path, path) = (directory.join(CONFIG_FILE), directory.join(TENSOR_FILE));
    let config = adapter_config::to_json(&config, &config_path)?;
    let tensors = tensors::to_bytes(&path, &tensors)?;
    let (staged_config, staged) = (stage(&config_path, &config)?, stage(&path, &tensors)?);
    // Tensors beside another adapter's configuration would load and mean something else. So an old configuration that
    // differs goes first and the new one comes last: at no moment does the directory hold a mixture.
    match std::fs::read(&config_path) {
        Ok(old) if old == config => {}
        Ok(_) => std::fs::remove_file(&config_path).map_err(PeftError::io(&config_path))?,
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(source) => return Err(PeftError::Io { path: config_path, source }),
    }
    put(staged, &path)?;
    put(staged_config, &config_path)
}

/// What `adapter` does to its parameter.
fn change_of(adapter: &Adapter) -> Change {
    let info = &adapter.info;
    match &adapter.update {
        Update::LowRank(factors) => Change::LowRank { r: factors.rank(), lora_alpha: info.config.lora_alpha },
        Update::Copy(copied) => Change::Copy { shift: copied.bias.as_ref().map(|_| info.scaling) },
        Update::Shift(_) => Change::Shift { scaling: info.scaling },
    }
}

/// The modules that get an update of low rank.
fn adapted_names<'a>(changes: impl Iterator<Item = (&'a Site, Change)>) -> BTreeSet<String> {
    let adapted = changes.filter(|(_, change)| matches!(change, Change::LowRank { .. }));
    adapted.map(|(site, _)| site.name.clone()).collect()
}

/// The configuration as a file has to say it, so that whoever reads it arrives at these adapters.
fn config_to_write(config: &LoraConfig, adapters: &[&Adapter]) -> Result<LoraConfig, PeftError> {
    let mut config = config.clone();
    let modules: BTreeSet<&str> = adapters
        .iter()
        .filter(|adapter| adapter.low_rank().is_some())
        .map(|adapter| &*adapter.info.site.name)
        .collect();
    if config.target_modules == Some(TargetModules::AllLinear) {
        // Spelled out as PEFT does it: not every reader of its files knows the word.
        config.target_modules = Some(modules.iter().copied().collect());
    }
    // A file has its patterns in alphabetical order, and the first that matches counts. Where that changes a module's
    // rank or alpha, each module gets a pattern of its own.
    let mut sorted = config.clone();
    sorted.rank_pattern.sort_by(|a, b| a.0.cmp(&b.0));
    sorted.alpha_pattern.sort_by(|a, b| a.0.cmp(&b.0));
    let (ranks, sorted) = (config.ranks()?, sorted.ranks()?);
    let own: BTreeMap<&str, (usize, f64)> =
        modules.iter().map(|module| (*module, ranks.of(module))).collect();
    if own.iter().any(|(module, values)| sorted.of(module) != *values) {
        let escape = |module: &str| format!("^{}", regex::escape(module));
        config.rank_pattern = own.iter().map(|(module, (r, _))| (escape(module), *r)).collect();
        config.alpha_pattern = own.iter().map(|(module, (_, alpha))| (escape(module), *alpha)).collect();
    }
    Ok(config)
}

/// Reads the adapter in `directory` and adds it to the states of `layout` under `name`. `base_values` gives the base
/// model's values at paths, flattened.
pub(crate) fn load(
    layout: &mut Layout,
    name: &str,
    directory: &Path,
    options: &LoadOptions,
    base_values: impl Fn(&BTreeSet<String>) -> BTreeMap<String, Tensor<1>>,
) -> Result<LoadReport, PeftError> {
    let (mut config, ignored_keys) = read_config(directory)?;
    config.key_mapping = options.key_mapping.clone();
    let plan = Plan::new(layout, name, &config)?;
    let path = directory.join(TENSOR_FILE);
    let bytes = read_tensors(directory, &path)?;
    let mut stored = tensors::Reader::new(&path, &bytes)?;

    let adapted = adapted_names(plan.targets.iter().map(|target| (&*target.site, target.change)));
    let mut problems = Vec::new();
    let mut missing = Vec::new();
    let mut found: BTreeMap<(String, Part), Tensor<1>> = BTreeMap::new();
    for target in &plan.targets {
        let is_adapted = adapted.contains(&target.site.name);
        for entry in keys::entries(&target.site, target.change, config.lora_bias, is_adapted) {
            match stored.take(&entry.key, &entry.shape, &target.device) {
                Ok(tensor) => {
                    found.insert((target.path.clone(), entry.part), tensor);
                }
                Err(problem) => {
                    if matches!(problem, TensorProblem::Missing { .. }) {
                        missing.push(entry.key);
                    }
                    problems.push(problem);
                }
            }
        }
    }
    // PEFT adds weights of the base: of an adapted embedding or output layer, and with `save_embedding_layers` of any.
    // They say nothing new, or the adapter is for another base model.
    let copied = plan.copied();
    let repeated: Vec<(Parameter, Entry)> = parameters(layout, &config.key_mapping)?
        .into_iter()
        .filter(|(parameter, _)| !copied.contains(&parameter.path))
        .map(|(parameter, site)| {
            let entry = keys::base(&site, adapted.contains(&site.name));
            ((parameter, site), entry)
        })
        .filter(|(_, entry)| stored.has(&entry.key))
        .collect();
    let base = base_values(&repeated.iter().map(|((parameter, _), _)| parameter.path.clone()).collect());
    for ((parameter, site), Entry { key, shape, .. }) in repeated {
        let Some(base) = base.get(&parameter.path) else { continue };
        match stored.take(&key, &shape, &parameter.device) {
            Ok(tensor) => {
                let tensor = keys::copy_from_file(tensor, &site);
                if !tensors::equal_up_to_rounding(&tensor, base) {
                    problems.push(TensorProblem::OtherBase { key });
                }
            }
            Err(problem) => problems.push(problem),
        }
    }
    let mut leftover = stored.leftover();
    if config.bias == Bias::All {
        // PEFT writes the biases of saved modules again under the names of its wrapper, and does not read them.
        leftover.retain(|key| !key.contains(".modules_to_save.") && !key.contains(".original_module."));
    }
    for problem in &mut problems {
        if let TensorProblem::Missing { key, closest: nearest } = problem {
            *nearest = closest(key, leftover.iter().map(String::as_str), 1).pop();
        }
    }
    problems.extend(leftover.iter().map(|key| TensorProblem::Unexpected {
        key: key.clone(),
        closest: closest(key, missing.iter().map(String::as_str), 1).pop(),
    }));
    if !problems.is_empty() && !options.lenient {
        return Err(PeftError::IncompatibleAdapter { path, problems });
    }

    let tensors = found.len();
    let copies = base_values(&copied);
    plan.add_to(&mut layout.states, |target| {
        let mut take = |part| found.remove(&(target.path.clone(), part));
        let (a, b, bias, copy) = (take(Part::A), take(Part::B), take(Part::Bias), take(Part::Copy));
        let fresh = target.fresh(&plan.config, copies.get(&target.path));
        Some(match fresh? {
            Update::LowRank(fresh) => {
                let a = a.map_or(fresh.a.val(), |a| keys::factor_from_file(a, fresh.rank()));
                let [_, d_out] = target.site.factor_dims();
                let b = b.map_or(fresh.b.val(), |b| keys::factor_from_file(b, d_out));
                let bias = fresh.bias.map(|fresh| bias.unwrap_or(fresh.val()));
                Update::LowRank(LowRank::new(a, b, bias, plan.config.lora_dropout))
            }
            Update::Shift(fresh) => Update::Shift(bias.map_or(fresh, Param::from_tensor)),
            Update::Copy(fresh) => {
                let dtype = fresh.copy.val().dtype();
                let stored = |copy| Param::from_tensor(cast(keys::copy_from_file(copy, &target.site), dtype));
                Update::Copy(Copied {
                    copy: copy.map_or(fresh.copy, stored),
                    bias: fresh.bias.map(|fresh| bias.map_or(fresh, Param::from_tensor)),
                })
            }
        })
    });
    Ok(LoadReport { injection: plan.into_report(), tensors, ignored_keys, problems })
}

/// The configuration in an adapter directory, and the keys in it that were not understood and ask for nothing.
pub(crate) fn read_config(directory: &Path) -> Result<(LoraConfig, Vec<String>), PeftError> {
    let path = directory.join(CONFIG_FILE);
    adapter_config::from_json(&read_config_text(directory, &path)?, &path)
}

fn read_config_text(directory: &Path, path: &Path) -> Result<Vec<u8>, PeftError> {
    std::fs::read(path).map_err(|source| match source.kind() {
        ErrorKind::NotFound => PeftError::NoAdapter {
            path: directory.into(),
            reason: format!("there is no `{CONFIG_FILE}`"),
            hint: GIVE_ADAPTER,
        },
        _ => PeftError::Io { path: path.into(), source },
    })
}

fn read_tensors(directory: &Path, path: &Path) -> Result<Vec<u8>, PeftError> {
    std::fs::read(path).map_err(|source| match source.kind() {
        ErrorKind::NotFound if directory.join(PICKLE_FILE).exists() => PeftError::NoAdapter {
            path: directory.into(),
            reason: format!("`{PICKLE_FILE}` is a pickle, which can run code when it is read"),
            hint: "load it in Python and save it again with `safe_serialization=True`",
        },
        ErrorKind::NotFound => PeftError::NoAdapter {
            path: directory.into(),
            reason: format!("there is no `{TENSOR_FILE}`"),
            hint: GIVE_ADAPTER,
        },
        _ => PeftError::Io { path: path.into(), source },
    })
}

/// Writes `bytes` beside `path`, flushed to disk, for [`put`] to move there.
fn stage(path: &Path, bytes: &[u8]) -> Result<tempfile::NamedTempFile, PeftError> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    // Temporary files are private; an adapter is meant to be handed on and follows the umask like any other file.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(directory).map_err(PeftError::io(path))?;
    file.write_all(bytes).map_err(PeftError::io(path))?;
    file.as_file().sync_all().map_err(PeftError::io(path))?;
    Ok(file)
}

/// Moves a staged file to its place: a reader sees the old one or all of the new one.
fn put(staged: tempfile::NamedTempFile, path: &Path) -> Result<(), PeftError> {
    staged.persist(path).map_err(|error| PeftError::Io { path: path.into(), source: error.error })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use burn::module::Module;
    use burn::nn::LinearConfig;
    use burn::tensor::Device;
    use safetensors::SafeTensors;

    use super::*;
    use crate::{LoraLinear, PeftModel};

    #[derive(Module, Debug)]
    struct Model {
        q_proj: LoraLinear,
    }

    fn model() -> Model {
        let device = Device::default();
        let mut model = Model { q_proj: LinearConfig::new(5, 3).init(&device).into() };
        let config = LoraConfig::new(2).with_lora_alpha(16.0).with_target_modules(["q_proj"]);
        model.add_adapter("default", &config).unwrap();
        model
    }

    fn saved() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        model().save_adapter("default", directory.path()).unwrap();
        directory
    }

    fn edit_config(directory: &Path, from: &str, to: &str) {
        let path = directory.join(CONFIG_FILE);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{text}");
        std::fs::write(path, text.replace(from, to)).unwrap();
    }

    fn load_error(directory: &Path) -> PeftError {
        let mut model = model();
        model.unload().unwrap();
        let error = model.load_adapter("default", directory).unwrap_err();
        assert!(model.adapters().is_empty());
        error
    }

    #[test]
    fn files_have_pefts_keys_shapes_and_metadata() {
        let directory = saved();
        let bytes = std::fs::read(directory.path().join(TENSOR_FILE)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let shape = |key: &str| file.tensor(key).unwrap().shape().to_vec();
        assert_eq!(file.len(), 2);
        assert_eq!(shape("base_model.model.q_proj.lora_A.weight"), [2, 5]);
        assert_eq!(shape("base_model.model.q_proj.lora_B.weight"), [3, 2]);
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
        let names: Vec<String> = std::fs::read_dir(directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        assert_eq!(names.len(), 2, "{names:?}");
    }

    #[test]
    fn all_linear_is_written_as_the_names_it_means() {
        let directory = tempfile::tempdir().unwrap();
        let mut model = model();
        model.unload().unwrap();
        let config = LoraConfig::new(2).with_target_modules(TargetModules::AllLinear);
        model.add_adapter("default", &config).unwrap();
        model.save_adapter("default", directory.path()).unwrap();
        let json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(directory.path().join(CONFIG_FILE)).unwrap()).unwrap();
        assert_eq!(json["target_modules"], serde_json::json!(["q_proj"]));
    }

    #[test]
    fn every_tensor_that_does_not_fit_is_listed() {
        let directory = saved();
        edit_config(directory.path(), "\"r\": 2", "\"r\": 3");
        let error = load_error(directory.path());
        let PeftError::IncompatibleAdapter { problems, .. } = &error else { panic!("{error}") };
        assert_eq!(problems.len(), 2);
        assert_eq!(
            problems[0].to_string(),
            "shape mismatch at `base_model.model.q_proj.lora_A.weight`: expected [3, 5], found [2, 5]"
        );

        let directory = saved();
        let path = directory.path().join(TENSOR_FILE);
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes.windows(6).position(|window| window == b"lora_B").unwrap();
        bytes[at + 5] = b'C';
        std::fs::write(&path, bytes).unwrap();
        let error = load_error(directory.path());
        let PeftError::IncompatibleAdapter { problems, .. } = &error else { panic!("{error}") };
        assert_eq!(problems.len(), 2);
        assert_eq!(
            problems[0].to_string(),
            "missing `base_model.model.q_proj.lora_B.weight` (closest: `base_model.model.q_proj.lora_C.weight`)"
        );
    }

    #[test]
    fn what_is_not_an_adapter_is_refused_with_the_way_out() {
        let empty = tempfile::tempdir().unwrap();
        assert!(matches!(load_error(empty.path()), PeftError::NoAdapter { .. }));
        assert!(matches!(load_error(&empty.path().join("absent")), PeftError::NoAdapter { .. }));

        let directory = saved();
        let tensors = directory.path().join(TENSOR_FILE);
        std::fs::rename(&tensors, directory.path().join(PICKLE_FILE)).unwrap();
        let error = load_error(directory.path());
        assert!(error.to_string().contains("safe_serialization=True"), "{error}");

        std::fs::write(&tensors, b"\xff\xff\xff\xff\xff\xff\xff\x7f").unwrap();
        assert!(matches!(load_error(directory.path()), PeftError::Safetensors { .. }));

        std::fs::write(directory.path().join(CONFIG_FILE), "{").unwrap();
        assert!(matches!(load_error(directory.path()), PeftError::Json { .. }));
    }

    #[test]
    fn settings_that_are_not_computed_here_are_refused_by_name() {
        for (from, to, field) in [
            ("\"use_dora\": false", "\"use_dora\": true", "use_dora"),
            ("\"bias\": \"none\"", "\"bias\": \"some\"", "bias"),
            ("\"rank_pattern\": {}", "\"rank_pattern\": {\"q\": \"4\"}", "rank_pattern"),
            ("\"init_lora_weights\": true", "\"init_lora_weights\": \"pissa\"", "init_lora_weights"),
            ("\"peft_type\": \"LORA\"", "\"peft_type\": \"LOHA\"", "peft_type"),
            ("\"r\": 2", "\"r\": -2", "r"),
            ("\"revision\": null", "\"brand_new\": 1", "brand_new"),
        ] {
            let directory = saved();
            edit_config(directory.path(), from, to);
            let error = load_error(directory.path());
            let PeftError::UnsupportedConfig { problems, .. } = &error else { panic!("{error}") };
            assert_eq!(problems[0].field, field);
        }
    }

    #[test]
    fn old_and_new_configurations_load() {
        let directory = saved();
        let path = directory.path().join(CONFIG_FILE);
        std::fs::write(
            &path,
            r#"{"peft_type": "LORA", "target_modules": ["q_proj"], "r": 2, "new_flag": false}"#,
        )
        .unwrap();
        let mut model = model();
        model.unload().unwrap();
        let report = model.load_adapter("default", directory.path()).unwrap();
        assert_eq!(report.ignored_keys, ["new_flag"]);
    }
}
