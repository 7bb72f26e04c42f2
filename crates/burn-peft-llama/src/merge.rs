//! Models with adapters merged into their weights, from directories to a directory.

use std::collections::HashMap;
use std::fs;
use std::io::{Error, ErrorKind};
use std::path::Path;

use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::tensor::{DType, Device, FloatDType, Tensor};
use burn_peft::{AdapterDirectory, CombinationType, MergeReport, PeftModel, TensorRole};
use burn_peft_files::StagedDirectory;
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::config::{CONFIG_FILE, LlamaConfig};
use crate::error::LlamaError;
use crate::file::{self, unwritten};
use crate::model::LlamaForCausalLm;
use crate::parameters::parameters;
use crate::weights::{check_dtype, dtype_name};

/// Files beside the weights that a merged model shares with its base: the tokenizer's, and what generation needs.
const SHARED_FILES: &[&str] = &[
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
];

/// The name of the adapter that weighted ones are combined into.
const WEIGHTED: &str = "weighted";

/// What [`merge_directory`] did.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub struct MergedDirectory {
    /// What was merged, and what rounding cost.
    pub report: MergeReport,
    /// The type of the merged model.
    pub dtype: FloatDType,
    /// Whether the base has an output layer of its own although its `config.json` says tied; the merged model keeps it.
    pub has_other_head: bool,
}

/// Merges the adapters in some directories into the model in the directory `base`, and writes it to `output`.
///
/// The updates are summed, each multiplied by its weight: `W + Σ weight * scaling * A B`. Where the type changes, sums
/// are formed in f32 and rounded once to `dtype`; `None` is the [type of the base](stored_dtype). An output layer that
/// shares the embedding's table gets one of its own if [an adapter changes it](LlamaConfig::needs_untying).
///
/// The directory also gets the base's tokenizer and generation files, and its `config.json` with all entries. It
/// appears when it is complete. There may be an empty directory in its place.
///
/// ```
/// use burn::tensor::{Device, FloatDType};
/// use burn_peft_llama::merge_directory;
///
/// # use burn_peft::{LoraConfig, PeftModel};
/// # use burn_peft_llama::LlamaConfig;
/// # fn main() -> Result<(), burn_peft_llama::LlamaError> {
/// # let place = tempfile::tempdir().unwrap();
/// let [base, adapter, output] = ["base", "my-adapter", "merged"].map(|name| place.path().join(name));
/// # let mut model = LlamaConfig::new(32, 16, 1).with_heads(2, 1).init(&Device::flex());
/// # model.save_pretrained(&base)?;
/// # model.add_adapter("default", &LoraConfig::new(2).with_target_modules(["q_proj"]))?;
/// # model.save_adapter("default", &adapter)?;
/// let adapters = [(adapter, 1.0)];
/// let merged = merge_directory(base, &adapters, Some(FloatDType::BF16), output, &Device::flex())?;
/// assert_eq!(merged.dtype, FloatDType::BF16);
/// println!("{}", merged.report);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// - [`LlamaError::WriteFile`] if there is something in `output`, or it cannot be written,
/// - as [`LlamaForCausalLm::from_pretrained_as`],
/// - [`LlamaError::Adapters`] if an adapter is not usable, does not fit the model or has weights that are not finite, if
///   two adapters replace the same parameter, or if one that replaces a parameter has a weight other than 1,
/// - [`LlamaError::TooLarge`] if a merged value is too large for `dtype`.
pub fn merge_directory<P: AsRef<Path>>(
    base: impl AsRef<Path>,
    adapters: &[(P, f64)],
    dtype: Option<FloatDType>,
    output: impl AsRef<Path>,
    device: &Device,
) -> Result<MergedDirectory, LlamaError> {
    let (base, output) = (base.as_ref(), output.as_ref());
    let staged = stage(output)?;
    let is_tied = LlamaConfig::load(base)?.tie_word_embeddings;
    let from = stored_dtype(base)?;
    let dtype = dtype.unwrap_or(from);
    // Where the type changes, too, the sum is rounded to the new type, not to the old one before.
    let wide = if dtype == from { dtype } else { FloatDType::F32 };
    check_dtype(device, dtype)?;
    let Merged { mut model, mut report, is_tied: is_base_tied } = merged(base, adapters, wide, device)?;
    let has_other_head = is_tied && !is_base_tied;
    if wide != dtype {
        let rounding;
        (model, rounding) = model.to_dtype(dtype)?;
        if rounding.largest_error > report.largest_error {
            (report.largest_error, report.worst_parameter) =
                (rounding.largest_error, rounding.worst_parameter);
        }
    }
    model.save_pretrained(staged.path())?;
    for name in SHARED_FILES.iter().filter(|name| base.join(name).exists()) {
        fs::copy(base.join(name), staged.path().join(name)).map_err(unwritten(&output.join(name)))?;
    }
    write_config(base, staged.path(), dtype, model.config().tie_word_embeddings)?;
    staged.put().map_err(unwritten(output))?;
    Ok(MergedDirectory { report, dtype, has_other_head })
}

/// A model with adapters in its weights.
pub(crate) struct Merged {
    pub(crate) model: LlamaForCausalLm,
    pub(crate) report: MergeReport,
    /// Whether the base's output layer is its embedding.
    pub(crate) is_tied: bool,
}

/// Loads a model in `dtype` and merges the adapters in some directories into it, each with its weight.
pub(crate) fn merged<P: AsRef<Path>>(
    base: &Path,
    adapters: &[(P, f64)],
    dtype: FloatDType,
    device: &Device,
) -> Result<Merged, LlamaError> {
    let mut model = LlamaForCausalLm::from_pretrained_as(base, device, dtype)?;
    let is_tied = model.config().tie_word_embeddings;
    let names: Vec<String> = (1..=adapters.len()).map(|i| format!("adapter-{i}")).collect();
    for (name, (path, _)) in names.iter().zip(adapters) {
        if model.config().needs_untying(&AdapterDirectory::open(path)?) {
            model.untie_lm_head();
        }
        model.load_adapter(name, path)?;
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    if adapters.iter().any(|(_, weight)| *weight != 1.0) {
        let weights = adapters.iter().map(|(_, weight)| *weight);
        let sources: Vec<(&str, f64)> = names.into_iter().zip(weights).collect();
        model.add_weighted_adapter(WEIGHTED, &sources, CombinationType::Cat)?;
        model.set_adapter(&[WEIGHTED])?;
    } else {
        model.set_adapter(&names)?;
    }
    let report = model.merge_and_unload()?;
    Ok(Merged { model, report, is_tied })
}

/// Finds out whether [`merge_directory`] can write to `output`: whether there is nothing in it, and a directory can be
/// made there.
///
/// # Errors
/// [`LlamaError::WriteFile`].
pub fn check_output(output: impl AsRef<Path>) -> Result<(), LlamaError> {
    stage(output.as_ref()).map(drop)
}

fn stage(output: &Path) -> Result<StagedDirectory, LlamaError> {
    match fs::read_dir(output).map(|mut entries| entries.next().is_some()) {
        Ok(true) => {
            let reason = "the directory is not empty: choose one that does not exist yet";
            return Err(unwritten(output)(Error::new(ErrorKind::DirectoryNotEmpty, reason)));
        }
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(unwritten(output)(error)),
        _ => {}
    }
    StagedDirectory::beside(output).map_err(unwritten(output))
}

/// The type of all weights in a model directory; f32 if they have several, which loses nothing of any of them.
///
/// # Errors
/// As [`LlamaForCausalLm::from_pretrained_as`] about the files of weights.
pub fn stored_dtype(base: impl AsRef<Path>) -> Result<FloatDType, LlamaError> {
    let files = file::open_weights(base.as_ref())?;
    let only = |dtype| files.tensors().all(|(_, info)| info.dtype == dtype);
    Ok(if only(Dtype::BF16) {
        FloatDType::BF16
    } else if only(Dtype::F16) {
        FloatDType::F16
    } else {
        FloatDType::F32
    })
}

impl LlamaConfig {
    /// Whether a model with `adapter` merged needs an output layer of its own: the adapter changes the embedding or the
    /// output layer, which share one table.
    pub fn needs_untying(&self, adapter: &AdapterDirectory) -> bool {
        let changes_table = adapter.tensors().iter().any(|tensor| {
            tensor.role != TensorRole::BaseLayer
                && !tensor.is_read_by_tied_output()
                && ["embed_tokens", "lm_head"].iter().any(|table| tensor.module.ends_with(table))
        });
        self.tie_word_embeddings && changes_table
    }
}

/// The base's own configuration, entries of other programs included, with what merging changed.
fn write_config(base: &Path, directory: &Path, dtype: FloatDType, tied: bool) -> Result<(), LlamaError> {
    let path = base.join(CONFIG_FILE);
    let text = file::read_in_model(base, CONFIG_FILE)?;
    let mut config: Map<String, Value> = file::parse(&path, &text)?;
    // Until transformers 5 the key was `torch_dtype`: what reads the base should also read the merged model.
    let key = if config.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
    config.insert(key.to_string(), json!(dtype_name(dtype.into())));
    config.insert("tie_word_embeddings".to_string(), json!(tied));
    let path = directory.join(CONFIG_FILE);
    fs::write(&path, format!("{:#}\n", Value::Object(config))).map_err(unwritten(&path))
}

impl LlamaForCausalLm {
    /// The model with every parameter in `dtype`, and what rounding cost: the report names no parameter as merged.
    ///
    /// # Errors
    /// - [`LlamaError::UnsupportedDtype`] if the device cannot compute in `dtype`,
    /// - [`LlamaError::TooLarge`] if a value is too large for the type, or not a number.
    pub fn to_dtype(self, dtype: FloatDType) -> Result<(Self, MergeReport), LlamaError> {
        for device in self.devices() {
            check_dtype(&device, dtype)?;
        }
        let names = parameters(&self).into_iter().map(|parameter| (parameter.id, parameter.name)).collect();
        let mut converter = Converter { dtype: dtype.into(), names, worst: None, largest: 0.0 };
        let model = self.map(&mut converter);
        let mut report = MergeReport::default();
        if !converter.largest.is_finite() {
            let parameter = converter.worst.unwrap_or_default();
            return Err(LlamaError::TooLarge { parameter, dtype });
        }
        (report.largest_error, report.worst_parameter) = (converter.largest, converter.worst);
        Ok((model, report))
    }
}

/// Casts parameters and remembers the largest error of all.
struct Converter {
    dtype: DType,
    names: HashMap<ParamId, String>,
    worst: Option<String>,
    largest: f32,
}

impl ModuleMapper for Converter {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let name = self.names.get(&param.id).cloned();
        param.map(|exact| {
            let rounded = exact.clone().cast(self.dtype);
            let error = (rounded.clone().cast(exact.dtype()) - exact).abs().max().into_scalar::<f32>();
            if self.largest.is_finite() && (error > self.largest || error.is_nan()) {
                (self.largest, self.worst) = (error, name);
            }
            rounded
        })
    }
}

#[cfg(test)]
mod tests {
    use burn_peft::{LoraConfig, TargetModules};
    use burn_peft_ops::in_full_precision;

    use super::*;
    use crate::batch::Collator;
    use crate::config::LlamaConfig;
    use crate::conversation::Example;
    use crate::testing::{add_drawn_adapter, assert_close, deviation, drawn, in_f64, model, results, values};

    #[test]
    fn a_merged_directory_holds_the_adapted_model_in_the_type_that_was_asked_for() {
        let parent = tempfile::tempdir().unwrap();
        let place = |name: &str| parent.path().join(name);
        // A GPU may lack f16.
        let device = Device::flex();
        let mut adapted = model(&device, true);
        adapted.save_pretrained(place("base")).unwrap();
        fs::write(place("base").join("tokenizer.json"), "{}").unwrap();
        let config = LoraConfig::new(2).with_lora_alpha(6.0).with_target_modules(["embed_tokens", "q_proj"]);
        add_drawn_adapter(&mut adapted, "default", &config);
        adapted.save_adapter("default", place("adapter")).unwrap();
        let ids = || Tensor::from_data([[1, 5, 9, 2]], &device);
        let expected = values(adapted.forward(ids(), None));

        for (dtype, name, tolerance) in [(None, "float32", 1e-4), (Some(FloatDType::F16), "float16", 0.3)] {
            let out = place(name);
            let adapters = [(place("adapter"), 1.0)];
            let merged = merge_directory(place("base"), &adapters, dtype, &out, &device).unwrap();
            assert_eq!(merged.report.largest_error > 0.0, dtype.is_some());
            assert_eq!(stored_dtype(&out).unwrap(), dtype.unwrap_or(FloatDType::F32));
            let text = fs::read_to_string(out.join(CONFIG_FILE)).unwrap();
            assert!(text.contains(name) && text.contains("\"tie_word_embeddings\": false"), "{text}");
            assert!(out.join("tokenizer.json").exists());
            let found = LlamaForCausalLm::from_pretrained(&out, &device).unwrap();
            assert_close(&values(found.forward(ids(), None)), &expected, tolerance);
            let again = merge_directory(place("base"), &adapters, dtype, &out, &device);
            assert!(matches!(again, Err(LlamaError::WriteFile { .. })), "{again:?}");
        }
        let bare = model(&device, true).forward(ids(), None);
        assert!(expected.iter().zip(values(bare)).any(|(a, b)| (a - b).abs() > 0.5));
    }

    /// Beside a model in f64, whose loss alone is in f32. With a real vocabulary, and more rows than the kernel for few rows
    /// takes. The types differ in how the numbers of the base are stored; the factors are in f32.
    #[test]
    fn loss_and_gradients_of_a_base_in_16_bits_are_as_exact_as_those_of_the_same_numbers_in_f32() {
        let device = Device::flex().autodiff();
        let input_ids: Vec<u32> = (0..40).map(|i| i * 1_201 % 49_152).collect();
        let labels = input_ids.iter().map(|id| i64::from(*id)).collect();
        let batch = Collator::new(0).collate(&[Example { input_ids, labels }], &device).unwrap();
        let config = LlamaConfig::new(49_152, 64, 2).with_heads(4, 2).with_tie_word_embeddings(true);
        for dtype in [FloatDType::BF16, FloatDType::F16] {
            let mut stored = drawn(&config, &device).to_dtype(dtype).unwrap().0;
            let lora = LoraConfig::new(4).with_target_modules(TargetModules::AllLinear);
            add_drawn_adapter(&mut stored, "default", &lora);
            let of = |model: &LlamaForCausalLm| {
                in_full_precision(|| results(LlamaForCausalLm::loss, model, &batch))
            };
            let expected = of(&in_f64(&stored));
            assert!(expected[1].iter().filter(|gradient| gradient.abs() > 1e-3).count() > 1_000);
            let off = |model: &LlamaForCausalLm| {
                let found = of(model);
                [0, 1].map(|i| deviation(&found[i], &expected[i]))
            };
            let (found, in_f32) = (off(&stored), off(&stored.to_dtype(FloatDType::F32).unwrap().0));
            println!("{dtype:?}: loss and gradients are {found:?} off f64; in f32 {in_f32:?}");
            assert!(found[0] < 1e-6 && found[1] < 2.0 * in_f32[1] + 1e-6, "{dtype:?}: {found:?} {in_f32:?}");
        }
    }

    #[test]
    fn a_type_that_the_device_lacks_is_refused() {
        let error = model(&Device::flex(), true).to_dtype(FloatDType::Flex32).unwrap_err();
        assert!(matches!(error, LlamaError::UnsupportedDtype { dtype: FloatDType::Flex32, .. }), "{error}");
    }

    #[test]
    fn a_value_that_is_too_large_for_a_type_is_named() {
        // A GPU may lack the types.
        let mut model = model(&Device::flex(), true);
        let norm = model.model.norm.weight.clone();
        model.model.norm.weight = norm.map(|weight| weight * 1e6);
        let wide = model.clone().to_dtype(FloatDType::BF16).unwrap();
        assert_eq!(wide.1.worst_parameter.as_deref(), Some("model.norm.weight"));
        let error = model.to_dtype(FloatDType::F16).unwrap_err();
        assert!(
            matches!(&error, LlamaError::TooLarge { parameter, .. } if parameter == "model.norm.weight"),
            "{error}"
        );
    }
}
