//! Model directories in the Hugging Face layout, both directions.

mod checkpoint;
mod index;
mod loader;
mod parameter;
mod problem;
mod transpose;
mod writer;

use std::{fs, path::Path};

use burn::tensor::{DType, Device, FloatDType};

use self::{checkpoint::Checkpoint, index::WEIGHTS_FILE, loader::Loader, parameter::parameters};
use crate::{LlamaConfig, LlamaError, LlamaForCausalLm, config::CONFIG_FILE, file};

pub use problem::WeightProblem;

impl LlamaForCausalLm {
    /// Loads a model directory in the Hugging Face layout in f32; see
    /// [`from_pretrained_as`](Self::from_pretrained_as).
    ///
    /// # Errors
    ///
    /// As [`from_pretrained_as`](Self::from_pretrained_as).
    pub fn from_pretrained(dir: impl AsRef<Path>, device: &Device) -> Result<Self, LlamaError> {
        Self::from_pretrained_as(dir, device, FloatDType::F32)
    }

    /// Loads a model directory in the Hugging Face layout: `config.json` and either `model.safetensors` or the shards
    /// that `model.safetensors.index.json` lists, in f32, f16 or bf16.
    ///
    /// Weights are read one tensor at a time and converted to `dtype`. Loading is strict: the files must hold the
    /// model's tensors, no fewer and no more, save for `rotary_emb.inv_freq` of old files and an `lm_head.weight`
    /// beside tied embeddings, which are ignored.
    ///
    /// # Errors
    ///
    /// - as [`LlamaConfig::load`],
    /// - [`LlamaError::ReadText`] if a file cannot be read,
    /// - [`LlamaError::ConfigJson`] if the index is malformed,
    /// - [`LlamaError::ShardName`] if the index leads out of the directory,
    /// - [`LlamaError::WeightsFile`] and [`LlamaError::WeightsLength`] if a file of weights is malformed,
    /// - [`LlamaError::Weights`] with all missing, unexpected and misshapen tensors.
    pub fn from_pretrained_as(
        dir: impl AsRef<Path>,
        device: &Device,
        dtype: FloatDType,
    ) -> Result<Self, LlamaError> {
        let dir = dir.as_ref();
        let config = LlamaConfig::load(dir)?;
        let mut checkpoint = Checkpoint::open(dir)?;
        // Parameters are made when they are first used, so this model costs nothing.
        checkpoint.check(&parameters(&config.init(device)), config.tie_word_embeddings)?;
        Self::build(&config, &mut Loader { checkpoint, device, dtype: dtype.into() })
    }

    /// Writes `config.json` and `model.safetensors` as transformers 5 reads them, in the type of the parameters. The
    /// directory is made if it does not exist. Each file appears complete or not at all.
    ///
    /// # Errors
    ///
    /// - [`LlamaError::AdaptersAttached`] if the model has adapters: they belong in files of their own,
    /// - [`LlamaError::WriteText`] if a file cannot be written,
    /// - [`LlamaError::WeightsFile`] if the weights have a type that the format does not know,
    /// - [`LlamaError::DeviceRead`] if the device fails.
    pub fn save_pretrained(&self, dir: impl AsRef<Path>) -> Result<(), LlamaError> {
        let dir = dir.as_ref();
        let mut parameters = parameters(self);
        if let Some(adapter) = parameters.iter().find(|parameter| parameter.adapter) {
            return Err(LlamaError::AdaptersAttached { path: adapter.name.clone() });
        }
        fs::create_dir_all(dir).map_err(|source| LlamaError::WriteText { path: dir.to_owned(), source })?;
        // Wider types first keeps every tensor aligned.
        parameters.sort_by_key(|parameter| std::cmp::Reverse(parameter.dtype.size()));
        let dtype = match self.model.embed_tokens.weight.base().dtype() {
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
            DType::F64 => "float64",
            _ => "float32",
        };
        writer::write(&dir.join(WEIGHTS_FILE), &parameters)?;
        let config = self.config().to_json(dtype);
        file::write(&dir.join(CONFIG_FILE), &format!("{config:#}\n"))
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Int, Tensor};
    use safetensors::Dtype;

    use super::{
        checkpoint::tests::{read, write},
        *,
    };

    pub(super) fn config() -> LlamaConfig {
        let config = LlamaConfig::new(11, 8, 2).with_heads(4, 2).with_intermediate_size(12);
        LlamaConfig { attention_bias: true, initializer_range: 0.3, ..config }
    }

    pub(super) fn saved(config: &LlamaConfig) -> (tempfile::TempDir, LlamaForCausalLm) {
        let dir = tempfile::tempdir().unwrap();
        let model = config.init(&Device::flex());
        model.save_pretrained(dir.path()).unwrap();
        (dir, model)
    }

    pub(super) fn logits(model: &LlamaForCausalLm) -> Vec<f32> {
        let ids = Tensor::<2, Int>::from_data([[1, 5, 10, 2]], &Device::flex());
        model.forward(ids, None).cast(DType::F32).into_data().iter::<f32>().collect()
    }

    #[test]
    fn a_saved_model_loads_equal_tied_and_untied() {
        for tied in [false, true] {
            let (dir, model) = saved(&config().with_tie_word_embeddings(tied));
            let loaded = LlamaForCausalLm::from_pretrained(dir.path(), &Device::flex()).unwrap();
            assert_eq!(loaded.config(), model.config());
            assert_eq!(logits(&loaded), logits(&model));
            let names: Vec<_> =
                read(&dir.path().join(WEIGHTS_FILE)).into_iter().map(|tensor| tensor.0).collect();
            assert_eq!(names.contains(&"lm_head.weight".to_owned()), !tied);
            assert!(names.contains(&"model.layers.1.self_attn.q_proj.bias".to_owned()), "{names:?}");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "no temporary file is left");
        }
    }

    #[test]
    fn half_precision_files_and_models_work() {
        let (dir, model) = saved(&config());
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
            close(&LlamaForCausalLm::from_pretrained(dir.path(), &Device::flex()).unwrap(), tolerance);
            let half = LlamaForCausalLm::from_pretrained_as(dir.path(), &Device::flex(), float).unwrap();
            assert_eq!(half.model.norm.weight.base().dtype(), DType::from(float));
            close(&half, 2.0 * tolerance);
            let again = tempfile::tempdir().unwrap();
            half.save_pretrained(again.path()).unwrap();
            let loaded = LlamaForCausalLm::from_pretrained_as(again.path(), &Device::flex(), float).unwrap();
            assert_eq!(logits(&loaded), logits(&half));
            let text = fs::read_to_string(again.path().join(CONFIG_FILE)).unwrap();
            let name = if dtype == Dtype::F16 { "\"float16\"" } else { "\"bfloat16\"" };
            assert!(text.contains(name), "{text}");
        }
    }

    #[test]
    fn adapters_are_not_lost_in_silence() {
        use burn_peft::{LoraConfig, PeftModel};
        let mut model = config().init(&Device::flex());
        model.add_adapter("default", &LoraConfig::new(2).with_target_modules(["q_proj"])).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let error = model.save_pretrained(dir.path()).unwrap_err();
        assert!(
            matches!(&error, LlamaError::AdaptersAttached { path } if path.contains("q_proj")),
            "{error}"
        );
        model.merge_and_unload().unwrap();
        model.save_pretrained(dir.path()).unwrap();
    }
}
