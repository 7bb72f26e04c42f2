//! Model directories in the Hugging Face layout, both directions.

pub(crate) mod checkpoint;
mod loader;
mod transpose;
pub(crate) mod writer;

use std::path::Path;

use burn::tensor::{DType, Device, FloatDType};
use burn_peft::backend_name;
use burn_peft_files::WEIGHTS_FILE;

use self::checkpoint::Checkpoint;
use self::loader::Loader;
use self::writer::Entry;
use crate::config::{CONFIG_FILE, LlamaConfig};
use crate::error::LlamaError;
use crate::file;
use crate::model::LlamaForCausalLm;
use crate::parameters::parameters;

/// An error unless the device can compute in the type.
pub(crate) fn check_dtype(device: &Device, dtype: FloatDType) -> Result<(), LlamaError> {
    match device.supports_dtype(dtype) {
        true => Ok(()),
        false => Err(LlamaError::UnsupportedDtype { device: backend_name(device), dtype }),
    }
}

impl LlamaForCausalLm {
    /// Loads a model directory in the Hugging Face layout in f32; see
    /// [`from_pretrained_as`](Self::from_pretrained_as).
    ///
    /// # Errors
    /// As [`from_pretrained_as`](Self::from_pretrained_as).
    pub fn from_pretrained(dir: impl AsRef<Path>, device: &Device) -> Result<Self, LlamaError> {
        Self::from_pretrained_as(dir, device, FloatDType::F32)
    }

    /// Loads a model directory in the Hugging Face layout: `config.json` and either `model.safetensors` or the shards
    /// that `model.safetensors.index.json` lists, in f32, f16 or bf16.
    ///
    /// Weights are read one tensor at a time, converted to `dtype` and handed to the device before the next. Loading is
    /// strict: the files must hold the model's tensors, no fewer and no more, save for `rotary_emb.inv_freq` of old files,
    /// which is ignored.
    ///
    /// Where `config.json` ties the output layer to the embedding, an `lm_head.weight` in the files decides as in
    /// transformers: with the values of the embedding it is ignored, without an embedding it is the embedding, and with
    /// other values it stays the output layer. In this last case the model is not tied:
    /// [`config()`](Self::config)`.tie_word_embeddings` is false, which differs from what [`LlamaConfig::load`] reads,
    /// and [`save_pretrained`](Self::save_pretrained) writes both.
    ///
    /// Waits while another process saves to the directory with this crate: all files are of one model.
    ///
    /// # Errors
    /// - [`LlamaError::UnsupportedDtype`] if the device cannot compute in `dtype`,
    /// - as [`LlamaConfig::load`],
    /// - [`LlamaError::ReadFile`] if a file cannot be read,
    /// - [`LlamaError::WrongFile`] if a file is something else, such as a git-LFS pointer,
    /// - [`LlamaError::WeightsFile`] if the index or a file of weights is malformed, or the index leads out of the
    ///   directory,
    /// - [`LlamaError::Weights`] with all missing, unexpected and misshapen tensors,
    /// - [`LlamaError::DeviceRead`] if the device fails and says so; that its memory ran out is noticed when something is
    ///   read.
    pub fn from_pretrained_as(
        dir: impl AsRef<Path>,
        device: &Device,
        dtype: FloatDType,
    ) -> Result<Self, LlamaError> {
        check_dtype(device, dtype)?;
        let (config, checkpoint) = open_checkpoint(dir.as_ref(), device)?;
        Self::build(&config, &mut Loader { checkpoint, device, dtype: dtype.into() })
    }

    /// Writes `config.json` and `model.safetensors` as transformers 5 reads them, in the type of the parameters. The
    /// directory is made if it does not exist.
    ///
    /// Each file appears complete or not at all, and what was there before stays until all of the new one is on disk.
    /// Readers and writers of this crate wait for each other. Other programs, and any program after a crash, never find
    /// weights beside the `config.json` of another model: if it differs, it is removed first and written last.
    ///
    /// # Errors
    /// - [`LlamaError::AdaptersAttached`] if the model has adapters: they belong in files of their own,
    /// - [`LlamaError::WriteFile`] if a file cannot be written,
    /// - [`LlamaError::WeightsFile`] if the weights have a type that the format does not know,
    /// - [`LlamaError::DeviceRead`] if the device fails.
    pub fn save_pretrained(&self, dir: impl AsRef<Path>) -> Result<(), LlamaError> {
        let dir = dir.as_ref();
        let parameters = parameters(self);
        if let Some(adapter) = parameters.iter().find(|parameter| parameter.adapter) {
            return Err(LlamaError::AdaptersAttached { path: adapter.name.clone() });
        }
        let dtype = dtype_name(self.model.embed_tokens.weight.base().dtype());
        let config = format!("{:#}\n", self.config().to_json(dtype));
        let (weights_path, config_path) = (dir.join(WEIGHTS_FILE), dir.join(CONFIG_FILE));
        let directory = file::writer(dir)?;
        let entries = parameters.into_iter().map(Entry::from).collect();
        let weights = writer::write(&directory, &weights_path, entries)?;
        let staged = file::stage(&directory, &config_path, &config)?;
        if file::read_optional(&config_path, "").ok().flatten().is_some_and(|old| old != config) {
            file::remove(&directory, &config_path)?;
        }
        file::put(weights, &weights_path)?;
        file::put(staged, &config_path)
    }
}

/// Opens the files of a model directory and checks them; see
/// [`from_pretrained_as`](LlamaForCausalLm::from_pretrained_as). Nothing is put on the device.
pub(crate) fn open_checkpoint(dir: &Path, device: &Device) -> Result<(LlamaConfig, Checkpoint), LlamaError> {
    let lock = file::lock(dir)?;
    let mut config = LlamaConfig::load(dir)?;
    let mut checkpoint = Checkpoint::open(dir)?;
    // Files that are open stay what they are.
    drop(lock);
    if config.tie_word_embeddings {
        config.tie_word_embeddings = checkpoint.resolve_tied_head()?;
    }
    // Parameters are made when they are first used, so this model costs nothing.
    checkpoint.check(&parameters(&config.init(device)))?;
    Ok((config, checkpoint))
}

/// A type as `config.json` names it.
pub(crate) fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        DType::F64 => "float64",
        _ => "float32",
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use burn::tensor::{Int, Tensor};
    use burn_peft_files::TensorFileError;
    use safetensors::Dtype;
    use serde_json::json;

    use super::checkpoint::tests::{read, write};
    use super::*;

    pub(super) fn config() -> LlamaConfig {
        let config = LlamaConfig::new(11, 8, 2).with_heads(4, 2).with_intermediate_size(12);
        LlamaConfig { attention_bias: true, initializer_range: 0.3, ..config }
    }

    pub(super) fn saved(config: &LlamaConfig) -> (tempfile::TempDir, LlamaForCausalLm) {
        let dir = tempfile::tempdir().unwrap();
        let model = config.init(&Device::default());
        model.save_pretrained(dir.path()).unwrap();
        (dir, model)
    }

    pub(super) fn logits(model: &LlamaForCausalLm) -> Vec<f32> {
        let ids = Tensor::<2, Int>::from_data([[1, 5, 10, 2]], &model.model.norm.weight.base().device());
        model.forward(ids, None).cast(DType::F32).into_data().iter::<f32>().collect()
    }

    #[test]
    fn a_saved_model_loads_equal_tied_and_untied() {
        for tied in [false, true] {
            let (dir, model) = saved(&config().with_tie_word_embeddings(tied));
            let loaded = LlamaForCausalLm::from_pretrained(dir.path(), &Device::default()).unwrap();
            assert_eq!(loaded.config(), model.config());
            assert_eq!(logits(&loaded), logits(&model));
            let names: Vec<_> =
                read(&dir.path().join(WEIGHTS_FILE)).into_iter().map(|tensor| tensor.0).collect();
            assert_eq!(names.contains(&"lm_head.weight".to_string()), !tied);
            assert!(names.contains(&"model.layers.1.self_attn.q_proj.bias".to_string()), "{names:?}");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "no temporary file is left");
        }
    }

    #[test]
    fn half_precision_files_and_models_work() {
        // A GPU may lack one of the types.
        let device = Device::flex();
        let (dir, _) = saved(&config());
        let model = LlamaForCausalLm::from_pretrained(dir.path(), &device).unwrap();
        let tensors = read(&dir.path().join(WEIGHTS_FILE));
        let exact = logits(&model);
        let close = |model: &LlamaForCausalLm, tolerance: f32| {
            let logits = logits(model);
            let largest = exact.iter().zip(&logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(largest < tolerance && largest > 0.0, "{largest}");
        };
        for (dtype, float, tolerance) in
            [(Dtype::F16, FloatDType::F16, 0.02), (Dtype::BF16, FloatDType::BF16, 0.1)]
        {
            write(&dir.path().join(WEIGHTS_FILE), &tensors, dtype);
            close(&LlamaForCausalLm::from_pretrained(dir.path(), &device).unwrap(), tolerance);
            let half = LlamaForCausalLm::from_pretrained_as(dir.path(), &device, float).unwrap();
            assert_eq!(half.model.norm.weight.base().dtype(), DType::from(float));
            close(&half, 2.0 * tolerance);
            let again = tempfile::tempdir().unwrap();
            half.save_pretrained(again.path()).unwrap();
            let loaded = LlamaForCausalLm::from_pretrained_as(again.path(), &device, float).unwrap();
            assert_eq!(logits(&loaded), logits(&half));
            let text = fs::read_to_string(again.path().join(CONFIG_FILE)).unwrap();
            let name = if dtype == Dtype::F16 { "\"float16\"" } else { "\"bfloat16\"" };
            assert!(text.contains(name), "{text}");
        }
    }

    #[test]
    fn a_type_that_the_device_lacks_is_refused_by_name() {
        let (dir, _) = saved(&config());
        let device = Device::flex().autodiff();
        let error =
            LlamaForCausalLm::from_pretrained_as(dir.path(), &device, FloatDType::Flex32).unwrap_err();
        assert!(
            error.to_string().contains("the device Flex(Cpu) cannot compute in flex32\nhint: "),
            "{error}"
        );
    }

    #[test]
    fn a_save_that_fails_leaves_no_mixture_and_leftovers_go() {
        let (dir, model) = saved(&config());
        let names = || {
            let mut names: Vec<_> =
                fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
            names.sort();
            names
        };
        let before = names();
        fs::write(dir.path().join(".staged-x1-model.safetensors"), "half").unwrap();
        model.save_pretrained(dir.path()).unwrap();
        assert_eq!(names(), before);
        // A directory in the place of the weights cannot be replaced.
        fs::remove_file(dir.path().join(WEIGHTS_FILE)).unwrap();
        fs::create_dir_all(dir.path().join(WEIGHTS_FILE).join("x")).unwrap();
        let other = config().with_tie_word_embeddings(true).init(&Device::default());
        assert!(matches!(other.save_pretrained(dir.path()), Err(LlamaError::WriteFile { .. })));
        assert!(!names().iter().any(|name| name.to_string_lossy().starts_with(".staged-")));
        assert!(!names().contains(&CONFIG_FILE.into()), "no configuration stands beside other weights");
    }

    #[test]
    fn readers_and_writers_of_two_models_never_mix_them() {
        let small = config();
        let wide = LlamaConfig { mlp_bias: true, ..config() };
        let (dir, one) = saved(&small);
        let two = wide.init(&Device::default());
        let done = std::sync::atomic::AtomicBool::new(false);
        let mut seen = [0; 2];
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    two.save_pretrained(dir.path()).unwrap();
                    one.save_pretrained(dir.path()).unwrap();
                }
            });
            let start = std::time::Instant::now();
            let is_enough = |seen: [u32; 2]| seen[0] + seen[1] >= 100 && seen[0] > 0 && seen[1] > 0;
            // As long as a busy disk may take.
            while !is_enough(seen) && start.elapsed() < std::time::Duration::from_secs(60) {
                let loaded = LlamaForCausalLm::from_pretrained(dir.path(), &Device::default());
                match loaded {
                    Ok(model) => seen[usize::from(model.config().mlp_bias)] += 1,
                    Err(error) => {
                        done.store(true, std::sync::atomic::Ordering::Relaxed);
                        panic!("{error}");
                    }
                }
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
    }

    #[test]
    fn adapters_are_not_lost_in_silence() {
        use burn_peft::{LoraConfig, PeftModel};
        let mut model = config().init(&Device::default());
        model.add_adapter("default", LoraConfig::new(2).with_target_modules(["q_proj"])).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let error = model.save_pretrained(dir.path()).unwrap_err();
        assert!(
            matches!(&error, LlamaError::AdaptersAttached { path } if path.contains("q_proj")),
            "{error}"
        );
        model.merge_and_unload().unwrap();
        model.save_pretrained(dir.path()).unwrap();
    }

    #[test]
    fn shards_load_and_may_not_leave_the_directory() {
        let (dir, model) = saved(&config());
        let single = dir.path().join(WEIGHTS_FILE);
        let tensors = read(&single);
        fs::remove_file(&single).unwrap();
        let (first, second) = tensors.split_at(9);
        write(&dir.path().join("a.safetensors"), first, Dtype::F32);
        write(&dir.path().join("b.safetensors"), second, Dtype::F32);
        let mut map = json!({});
        for (tensors, file) in [(first, "a.safetensors"), (second, "b.safetensors")] {
            for (name, _, _) in tensors {
                map[name] = json!(file);
            }
        }
        let index = |map: &serde_json::Value| {
            let text = json!({ "metadata": { "total_size": 1 }, "weight_map": map }).to_string();
            fs::write(dir.path().join("model.safetensors.index.json"), text).unwrap();
        };
        index(&map);
        let loaded = LlamaForCausalLm::from_pretrained(dir.path(), &Device::default()).unwrap();
        assert_eq!(logits(&loaded), logits(&model));

        for name in ["../a.safetensors", "/a.safetensors", "sub/a.safetensors", "..", ""] {
            map["model.norm.weight"] = json!(name);
            index(&map);
            let error = LlamaForCausalLm::from_pretrained(dir.path(), &Device::default()).unwrap_err();
            assert!(
                matches!(&error, LlamaError::WeightsFile(TensorFileError::ShardName { name: found, .. }) if found == name),
                "{error}"
            );
        }
        map["model.norm.weight"] = json!("c.safetensors");
        index(&map);
        let error = LlamaForCausalLm::from_pretrained(dir.path(), &Device::default()).unwrap_err();
        assert!(error.to_string().contains("c.safetensors"), "{error}");
    }
}
