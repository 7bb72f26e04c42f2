//! Adapter directories in the format of Hugging Face PEFT.

mod adapter_config;
mod condense;
mod directory;
mod files;
mod keys;
mod load;
mod prefix;
mod save;
mod tensors;

use std::fmt;

use crate::error::TensorProblem;
use crate::key_mapping::KeyMapping;
use crate::plan::InjectionReport;
use crate::summary::count;

pub use directory::{AdapterDirectory, StoredModule, StoredTensor, TensorRole};
pub(crate) use load::load;
pub(crate) use save::save;

pub(crate) const CONFIG_FILE: &str = "adapter_config.json";
const TENSOR_FILE: &str = "adapter_model.safetensors";

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
        write!(f, "{}, {} loaded", self.injection, count(self.tensors, "tensor"))?;
        if !self.ignored_keys.is_empty() {
            write!(f, "; configuration keys without effect: {}", self.ignored_keys.join(", "))?;
        }
        for problem in &self.problems {
            write!(f, "\n  {problem}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::module::Module;
    use burn::nn::LinearConfig;
    use burn::tensor::Device;
    use safetensors::SafeTensors;

    use super::*;
    use crate::{LoraConfig, LoraLinear, PeftError, PeftModel, TargetModules};

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
        std::fs::rename(&tensors, directory.path().join(files::PICKLE_FILE)).unwrap();
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
            ("\"use_qalora\": false", "\"use_qalora\": true", "use_qalora"),
            ("\"bias\": \"none\"", "\"bias\": \"some\"", "bias"),
            ("\"rank_pattern\": {}", "\"rank_pattern\": {\"q\": \"4\"}", "rank_pattern"),
            ("\"init_lora_weights\": true", "\"init_lora_weights\": \"corda\"", "init_lora_weights"),
            ("\"init_lora_weights\": true", "\"init_lora_weights\": \"pissa_niter_4\"", "init_lora_weights"),
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
