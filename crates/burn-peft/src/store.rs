//! Adapter directories in the format of Hugging Face PEFT.

mod adapter_config;
mod keys;
mod tensors;

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write;
use std::path::Path;

use burn::module::Module;
use burn::tensor::Tensor;

use crate::adapter::Adapter;
use crate::error::{PeftError, TensorProblem, closest};
use crate::inject::{InjectionReport, Plan, Target};
use crate::lora::LoraConfig;
use crate::seam::{Layout, States};
use crate::target::TargetModules;

use keys::Factor;

const CONFIG_FILE: &str = "adapter_config.json";
const TENSOR_FILE: &str = "adapter_model.safetensors";
const PICKLE_FILE: &str = "adapter_model.bin";

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
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {} tensors loaded", self.injection, self.tensors)?;
        if !self.ignored_keys.is_empty() {
            write!(f, "; configuration keys without effect: {}", self.ignored_keys.join(", "))?;
        }
        Ok(())
    }
}

/// Writes adapter `name` of `states` to `directory`.
pub(crate) fn save(states: &States, name: &str, directory: &Path) -> Result<(), PeftError> {
    let mut tensors = BTreeMap::new();
    let mut config = None;
    for (weight, adapter) in states.iter().filter_map(|(weight, state)| Some((weight, state.get(name)?))) {
        let module = weight.strip_suffix(".weight").unwrap_or(weight);
        let plain = adapter.valid();
        for factor in [Factor::A, Factor::B] {
            let value = factor.of(&plain).val().transpose();
            tensors.insert(factor.key(module, adapter.info.kind), value);
        }
        config.get_or_insert_with(|| adapter.info.config.clone());
    }
    let Some(config) = config else {
        return Err(PeftError::UnknownAdapter { name: name.to_string(), available: vec![] });
    };
    let mut config = LoraConfig::clone(&config);
    if config.target_modules == Some(TargetModules::AllLinear) {
        // Spelled out as PEFT does it: not every reader of its files knows the word.
        let adapted = states.iter().filter(|(_, state)| state.get(name).is_some());
        let modules = adapted.map(|(weight, _)| weight.strip_suffix(".weight").unwrap_or(weight));
        config.target_modules = Some(modules.filter_map(|module| module.rsplit('.').next()).collect());
    }
    std::fs::create_dir_all(directory).map_err(PeftError::io(directory))?;
    // The tensors first: a directory with a configuration is complete.
    let path = directory.join(TENSOR_FILE);
    write_whole(&path, &tensors::to_bytes(&path, &tensors)?)?;
    let path = directory.join(CONFIG_FILE);
    write_whole(&path, &adapter_config::to_json(&config, &path)?)
}

/// Reads the adapter in `directory` and adds it to the states of `layout` under `name`. `base_weight` gives the base
/// model's weight at a path.
pub(crate) fn load(
    layout: &mut Layout,
    name: &str,
    directory: &Path,
    base_weight: impl Fn(&str) -> Option<Tensor<2>>,
) -> Result<LoadReport, PeftError> {
    let (config_path, path) = (directory.join(CONFIG_FILE), directory.join(TENSOR_FILE));
    let config_text = match std::fs::read(&config_path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(PeftError::NoAdapter {
                path: directory.into(),
                reason: format!("there is no `{CONFIG_FILE}`"),
                hint: "give the directory that PEFT's `save_pretrained` wrote",
            });
        }
        Err(source) => return Err(PeftError::Io { path: config_path, source }),
    };
    let (config, ignored_keys) = adapter_config::from_json(&config_text, &config_path)?;
    let plan = Plan::new(layout, name, &config)?;
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let has_pickle = directory.join(PICKLE_FILE).exists();
            return Err(PeftError::NoAdapter {
                path: directory.into(),
                reason: if has_pickle {
                    format!("`{PICKLE_FILE}` is a pickle, which can run code when it is read")
                } else {
                    format!("there is no `{TENSOR_FILE}`")
                },
                hint: if has_pickle {
                    "load it in Python and save it again with `safe_serialization=True`"
                } else {
                    "give the directory that PEFT's `save_pretrained` wrote"
                },
            });
        }
        Err(source) => return Err(PeftError::Io { path, source }),
    };
    let mut stored = tensors::Reader::new(&path, &bytes)?;

    let expected: Vec<(&Target, Factor, String)> = plan
        .targets
        .iter()
        .flat_map(|target| {
            [Factor::A, Factor::B].map(|factor| (target, factor, factor.key(&target.module, target.kind)))
        })
        .collect();
    let mut problems = Vec::new();
    let mut factors: BTreeMap<(&str, Factor), Tensor<2>> = BTreeMap::new();
    for (target, factor, key) in &expected {
        match stored.take(key, factor.stored_shape(target.dims, config.r), &target.device) {
            Ok(tensor) => {
                factors.insert((&target.weight, *factor), tensor.transpose());
            }
            Err(problem) => problems.push(problem),
        }
    }
    // PEFT adds the weight of an adapted embedding or output layer. It says nothing new, or the adapter is for another
    // base model.
    for target in &plan.targets {
        let key = keys::base_layer(&target.module);
        if !stored.has(&key) {
            continue;
        }
        let Some(base) = base_weight(&target.weight) else { continue };
        let base = if target.kind.is_linear() { base.transpose() } else { base };
        match stored.take(&key, base.dims(), &target.device) {
            Ok(tensor) if tensors::equal_up_to_rounding(&tensor, &base) => {}
            Ok(_) => problems.push(TensorProblem::OtherBase { key }),
            Err(problem) => problems.push(problem),
        }
    }
    let leftover = stored.leftover();
    for problem in &mut problems {
        if let TensorProblem::Missing { key, closest: nearest } = problem {
            *nearest = closest(key, leftover.iter().map(String::as_str), 1).pop();
        }
    }
    problems.extend(leftover.iter().map(|key| TensorProblem::Unexpected {
        key: key.clone(),
        closest: closest(key, expected.iter().map(|(_, _, key)| key.as_str()), 1).pop(),
    }));
    if !problems.is_empty() {
        return Err(PeftError::IncompatibleAdapter { path, problems });
    }

    let tensors = factors.len();
    let mut made: BTreeMap<String, Adapter> = BTreeMap::new();
    for target in &plan.targets {
        let a = factors.remove(&(&*target.weight, Factor::A));
        let b = factors.remove(&(&*target.weight, Factor::B));
        if let (Some(a), Some(b)) = (a, b) {
            let adapter = Adapter::new(plan.name.clone(), plan.config.clone(), target.kind, a, b);
            made.insert(target.weight.clone(), adapter);
        }
    }
    plan.add_to(&mut layout.states, |target| made.remove(&target.weight));
    Ok(LoadReport { injection: plan.into_report(), tensors, ignored_keys })
}

/// Writes a file so that a reader sees all of it or nothing: a sibling file, flushed to disk, renamed.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), PeftError> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(directory).map_err(PeftError::io(path))?;
    file.write_all(bytes).map_err(PeftError::io(path))?;
    file.as_file().sync_all().map_err(PeftError::io(path))?;
    make_readable(file.as_file(), path)?;
    file.persist(path).map_err(|error| PeftError::Io { path: path.into(), source: error.error })?;
    Ok(())
}

/// Temporary files are private; an adapter is meant to be handed on.
#[cfg(unix)]
fn make_readable(file: &std::fs::File, path: &Path) -> Result<(), PeftError> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(std::fs::Permissions::from_mode(0o644)).map_err(PeftError::io(path))
}

#[cfg(not(unix))]
fn make_readable(_file: &std::fs::File, _path: &Path) -> Result<(), PeftError> {
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
            ("\"bias\": \"none\"", "\"bias\": \"all\"", "bias"),
            ("\"rank_pattern\": {}", "\"rank_pattern\": {\"q\": 4}", "rank_pattern"),
            ("\"peft_type\": \"LORA\"", "\"peft_type\": \"LOHA\"", "peft_type"),
            ("\"r\": 2", "\"r\": -2", "r"),
            ("\"revision\": null", "\"brand_new\": 1", "brand_new"),
        ] {
            let directory = saved();
            edit_config(directory.path(), from, to);
            let error = load_error(directory.path());
            let PeftError::UnsupportedConfig { field: found, .. } = &error else { panic!("{error}") };
            assert_eq!(found, field);
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
