//! Models for llama.cpp.

use std::path::Path;
use std::rc::Rc;

use burn::tensor::{Device, FloatDType};
use burn_peft::MergeReport;
use burn_peft_files::to_f32;
use safetensors::Dtype;

use super::vocabulary::Vocabulary;
use super::writer::{self, Metadata, Tensor, Value};
use super::{GgufType, names, rotation};
use crate::config::LlamaConfig;
use crate::error::LlamaError;
use crate::merge;
use crate::model::LlamaForCausalLm;
use crate::parameters::parameters;
use crate::rope::RopeScaling;
use crate::tokenizer::Tokenizer;
use crate::weights::open_checkpoint;
use crate::weights::writer::Entry;

/// A model with its tokenizer, ready to be written as a GGUF file for llama.cpp.
///
/// Everything has been checked that can be checked before the weights are read. Weights are then read and written one at
/// a time.
///
/// ```
/// use burn::tensor::Device;
/// use burn_peft_llama::{GgufModel, GgufType};
///
/// # fn main() -> Result<(), burn_peft_llama::LlamaError> {
/// # let place = tempfile::tempdir().unwrap();
/// # let (model_dir, output) = ("../../examples/pokemon/base", place.path().join("model.gguf"));
/// let model = GgufModel::open(model_dir, &Device::flex())?;
/// model.write(output, GgufType::F16, |done, of| println!("{done} of {of} tensors"))?;
/// # Ok(())
/// # }
/// ```
pub struct GgufModel {
    config: LlamaConfig,
    name: String,
    vocabulary: Vocabulary,
    tensors: Vec<Tensor>,
}

impl GgufModel {
    /// The model in a directory. `device` is where a model would be; nothing is put there.
    ///
    /// # Errors
    /// - as [`LlamaForCausalLm::from_pretrained_as`] and [`Tokenizer::load`],
    /// - [`LlamaError::NotForLlamaCpp`] with everything that llama.cpp does not compute or its format cannot say: a
    ///   tokenizer that it has no name for, more tokens than the model has, no end token, positions that it does not
    ///   scale in this family.
    pub fn open(dir: impl AsRef<Path>, device: &Device) -> Result<Self, LlamaError> {
        let dir = dir.as_ref();
        let (config, checkpoint) = open_checkpoint(dir, device)?;
        let described = Self::describe(dir, config)?;
        let checkpoint = Rc::new(checkpoint);
        let tensors = parameters(&described.config.init(device)).into_iter().map(|parameter| {
            let (checkpoint, name) = (Rc::clone(&checkpoint), parameter.name.clone());
            described.tensor(parameter.name, parameter.shape, move || checkpoint.read(&name))
        });
        let tensors = tensors.collect();
        Ok(described.with(tensors))
    }

    /// The model in the directory `base` with the adapters in some directories merged, each with its weight, as
    /// [`merge_directory`](crate::merge_directory) merges them, in f32. The merged model is on the device.
    ///
    /// # Errors
    /// As [`open`](Self::open) and [`merge_directory`](crate::merge_directory).
    pub fn merged<P: AsRef<Path>>(
        base: impl AsRef<Path>,
        adapters: &[(P, f64)],
        device: &Device,
    ) -> Result<(Self, MergeReport), LlamaError> {
        let base = base.as_ref();
        Self::describe(base, LlamaConfig::load(base)?)?;
        let merged = merge::merged(base, adapters, FloatDType::F32, device)?;
        Ok((Self::of(&merged.model, base)?, merged.report))
    }

    /// A model in f32 with the tokenizer in a directory.
    fn of(model: &LlamaForCausalLm, dir: &Path) -> Result<Self, LlamaError> {
        let described = Self::describe(dir, model.config().clone())?;
        let tensors = parameters(model).into_iter().map(|parameter| {
            let Entry { name, shape, read, .. } = Entry::from(parameter);
            described.tensor(name, shape, move || Ok(to_f32(Dtype::F32, &read()?).unwrap_or_default()))
        });
        let tensors = tensors.collect();
        Ok(described.with(tensors))
    }

    /// All but the weights.
    fn describe(dir: &Path, config: LlamaConfig) -> Result<Self, LlamaError> {
        let vocabulary = Vocabulary::of(&Tokenizer::load(dir)?, &config)?;
        let mut problems = vocabulary.problems.clone();
        let family = config.family.llama_cpp;
        if config.rope.scaling != RopeScaling::Default && !family.scales_rope {
            let model_type = config.model_type();
            problems.push(format!(
                "`rope_type`: expected `default`, as llama.cpp scales no positions of `{model_type}`"
            ));
        }
        if !family.has_head_dim && config.head_dim * config.num_attention_heads != config.hidden_size {
            problems.push(format!(
                "`head_dim`: expected `hidden_size / num_attention_heads`, found {}",
                config.head_dim
            ));
        }
        if !problems.is_empty() {
            let hint = "transformers and this library compute it; what is named here would have to change for llama.cpp";
            return Err(LlamaError::NotForLlamaCpp { path: dir.into(), problems, hint });
        }
        let place = dir.canonicalize().unwrap_or_else(|_| dir.into());
        let name = place.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Self { config, name, vocabulary, tensors: vec![] })
    }

    fn tensor(
        &self,
        name: String,
        shape: Vec<usize>,
        read: impl Fn() -> Result<Vec<f32>, LlamaError> + 'static,
    ) -> Tensor {
        let module = name.rsplit_once('.').map_or(&*name, |(module, _)| module);
        let heads = rotation::heads(&self.config, module);
        let rows = shape.first().copied().unwrap_or_default();
        Tensor {
            name: names::parameter(&name).unwrap_or_else(|| name.clone()),
            source: name,
            shape,
            read: match heads {
                Some(heads) => Box::new(move || Ok(rotation::interleaved(&read()?, rows, heads))),
                None => Box::new(read),
            },
        }
    }

    fn with(self, tensors: Vec<Tensor>) -> Self {
        let factors = self.config.rope.factors(self.config.head_dim);
        let factors = factors.map(|factors| Tensor {
            name: "rope_freqs.weight".to_string(),
            source: "rope_freqs.weight".to_string(),
            shape: vec![factors.len()],
            read: Box::new(move || Ok(factors.clone())),
        });
        Self { tensors: factors.into_iter().chain(tensors).collect(), ..self }
    }

    /// What llama.cpp does otherwise than this library, if it matters little.
    pub fn notes(&self) -> &[String] {
        &self.vocabulary.notes
    }

    /// Whether the output layer is the embedding, as the weights decide it; see
    /// [`LlamaForCausalLm::from_pretrained_as`].
    pub fn is_tied(&self) -> bool {
        self.config.tie_word_embeddings
    }

    /// The number of tensors in the file.
    pub fn num_tensors(&self) -> usize {
        self.tensors.len()
    }

    /// Writes the file, which appears when it is complete, and returns its size in bytes. `on_tensor` gets the number of
    /// tensors that are written, and of all.
    ///
    /// # Errors
    /// - [`LlamaError::WriteFile`] if there is something of that name, or the file cannot be written,
    /// - [`LlamaError::TooLargeForF16`] if a number is too large for the type, [`LlamaError::NonFiniteWeight`] if it is
    ///   infinite or none,
    /// - [`LlamaError::ReadFile`] if a file of weights cannot be read, [`LlamaError::DeviceRead`] if the device fails.
    pub fn write(
        &self,
        output: impl AsRef<Path>,
        dtype: GgufType,
        mut on_tensor: impl FnMut(usize, usize),
    ) -> Result<u64, LlamaError> {
        writer::write(output.as_ref(), &self.metadata(dtype), &self.tensors, dtype, &mut on_tensor)
    }

    fn metadata(&self, dtype: GgufType) -> Metadata {
        let config = &self.config;
        let architecture = config.family.llama_cpp.architecture;
        let text = |text: &str| Value::Text(text.to_string());
        let size = |size: usize| Value::U32(u32::try_from(size).unwrap_or(u32::MAX));
        let general = [
            ("architecture", text(architecture)),
            ("type", text("model")),
            ("name", text(&self.name)),
            ("file_type", Value::U32(dtype.file_type())),
        ];
        let of_model = [
            ("block_count", size(config.num_hidden_layers)),
            ("context_length", size(config.max_position_embeddings)),
            ("embedding_length", size(config.hidden_size)),
            ("feed_forward_length", size(config.intermediate_size)),
            ("attention.head_count", size(config.num_attention_heads)),
            ("attention.head_count_kv", size(config.num_key_value_heads)),
            ("attention.key_length", size(config.head_dim)),
            ("attention.value_length", size(config.head_dim)),
            ("attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps as f32)),
            ("rope.dimension_count", size(config.head_dim)),
            ("rope.freq_base", Value::F32(config.rope.rope_theta as f32)),
            ("vocab_size", size(config.vocab_size)),
        ];
        let general = general.into_iter().map(|(key, value)| (format!("general.{key}"), value));
        let of_model = of_model.into_iter().map(|(key, value)| (format!("{architecture}.{key}"), value));
        general.chain(of_model).chain(self.vocabulary.metadata.iter().cloned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::rope::RopeConfig;
    use crate::tokenizer::tests::chatml;

    const LLAMA3: RopeScaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 64,
    };

    fn directory(config: &LlamaConfig) -> tempfile::TempDir {
        let place = tempfile::tempdir().unwrap();
        config.init(&Device::default()).save_pretrained(place.path()).unwrap();
        chatml().save(place.path()).unwrap();
        place
    }

    #[test]
    fn a_tied_model_has_one_table_and_a_scaled_one_its_factors() {
        let sizes = LlamaConfig { attention_bias: true, ..LlamaConfig::new(300, 32, 1) }.with_heads(4, 2);
        let scaled = sizes.clone().with_rope(RopeConfig::new(500.0).with_scaling(LLAMA3));
        for (config, scaled) in [(sizes.with_tie_word_embeddings(true), false), (scaled, true)] {
            let place = directory(&config);
            let model = GgufModel::open(place.path(), &Device::default()).unwrap();
            let names: Vec<&str> = model.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
            assert_eq!(names.contains(&"output.weight"), !config.tie_word_embeddings, "{names:?}");
            assert_eq!(model.is_tied(), config.tie_word_embeddings);
            assert_eq!(names.contains(&"rope_freqs.weight"), scaled);
            assert_eq!((model.num_tensors(), names.contains(&"blk.0.attn_k.bias")), (names.len(), true));
            if let Some(factors) = config.rope.factors(8) {
                let head = &(model.tensors[0].read)().unwrap();
                assert_eq!(head, &factors);
                // The fastest keeps its frequency, the slowest is divided by the factor.
                assert_eq!((factors[0], factors[3]), (1.0, 8.0));
            }
        }
    }

    #[test]
    fn a_merged_model_is_that_of_the_merged_directory() {
        use burn_peft::{InitLoraWeights, LoraConfig, PeftModel};

        let base = directory(&LlamaConfig::new(300, 32, 1).with_heads(4, 2));
        let place = tempfile::tempdir().unwrap();
        let [adapter, merged] = ["adapter", "merged"].map(|name| place.path().join(name));
        let mut model = LlamaForCausalLm::from_pretrained(base.path(), &Device::default()).unwrap();
        let config = LoraConfig::new(2)
            .with_init_lora_weights(InitLoraWeights::Random)
            .with_target_modules(["q_proj", "down_proj"]);
        model.add_adapter("default", &config).unwrap();
        model.save_adapter("default", &adapter).unwrap();
        let adapters = [(&adapter, 1.0)];
        crate::merge_directory(base.path(), &adapters, None, &merged, &Device::default()).unwrap();
        fs::rename(&merged, place.path().join("base")).unwrap();
        let files = ["one.gguf", "two.gguf"].map(|name| place.path().join(name));
        let (mut one, report) = GgufModel::merged(base.path(), &adapters, &Device::default()).unwrap();
        assert_eq!(report.parameters.len(), 2);
        one.name = "base".to_string();
        one.write(&files[0], GgufType::F16, |_, _| {}).unwrap();
        let two = GgufModel::open(place.path().join("base"), &Device::default()).unwrap();
        two.write(&files[1], GgufType::F16, |_, _| {}).unwrap();
        let [one, two] = files.map(|file| fs::read(file).unwrap());
        assert!(one == two);
        let plain = GgufModel::open(base.path(), &Device::default()).unwrap();
        let plain = plain.write(place.path().join("plain.gguf"), GgufType::F16, |_, _| {}).unwrap();
        assert!(plain.abs_diff(one.len() as u64) <= 32, "only the name is longer");
    }

    #[test]
    fn what_llama_cpp_does_not_compute_is_named() {
        let qwen = LlamaConfig::new(300, 32, 1).with_heads(4, 2).with_model_type("qwen2").unwrap();
        let scaled = qwen.clone().with_rope(RopeConfig::new(500.0).with_scaling(LLAMA3));
        let wide = LlamaConfig { head_dim: 10, ..qwen.clone() };
        let refused = |config: &LlamaConfig| {
            GgufModel::open(directory(config).path(), &Device::default()).err().map(|error| error.to_string())
        };
        assert!(refused(&scaled).unwrap().contains("`rope_type`: expected `default`"));
        assert!(
            refused(&wide)
                .unwrap()
                .contains("`head_dim`: expected `hidden_size / num_attention_heads`, found 10")
        );
        assert_eq!(refused(&qwen), None);
        let text = refused(&LlamaConfig::new(299, 32, 1)).unwrap();
        assert!(text.contains("tokens, found 300") || text.contains("found 299"), "{text}");
        let wide = LlamaConfig { head_dim: 10, ..LlamaConfig::new(300, 32, 1).with_heads(4, 2) };
        assert_eq!(refused(&wide), None, "llama has a field for it");
    }
}
