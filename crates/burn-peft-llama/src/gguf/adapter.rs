//! LoRA adapters for llama.cpp.

use std::path::Path;
use std::rc::Rc;

use burn_peft::{AdapterDirectory, StoredModule, TensorRole};

use super::base::Base;
use super::writer::{self, Metadata, Tensor, Value};
use super::{GgufType, names, rotation};
use crate::config::LlamaConfig;
use crate::error::LlamaError;

/// What to do about an adapter that has no place in such a file.
const HINT: &str = "merge it, and export the merged model: `GgufModel::merged`, or `adapter export --merged`";

/// What to do about one with a tensor of another base, which cannot be merged here either.
const OTHER_BASE_HINT: &str = "give the whole directory of the base that the adapter was trained on; if the adapter changed \
    that tensor, merge in Python, `PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(dir)`, and \
    export `dir`: `GgufModel::open`, or `adapter export --merged`";

/// An adapter that llama.cpp can use beside its base, ready to be written as a GGUF file.
///
/// llama.cpp adds `alpha / r * B A x`, with one `alpha` for the whole file and the rank `r` of each module. Where the
/// modules of an adapter agree about `scaling * r`, that is `alpha`. With rsLoRA it is `lora_alpha * sqrt(r)`. Where ranks
/// or alphas of modules differ such that one number does not serve them all, `alpha` is that of the most modules, and
/// `B` of the others is multiplied by what is missing. What is computed is the same.
///
/// For the architecture `llama`, rows of `B` of queries and keys are in the order of llama.cpp's rotary embedding.
///
/// ```
/// use burn_peft::AdapterDirectory;
/// use burn_peft_llama::{GgufAdapter, GgufType};
///
/// # use burn::tensor::Device;
/// # use burn_peft::{LoraConfig, PeftModel};
/// # use burn_peft_llama::LlamaConfig;
/// # fn main() -> Result<(), burn_peft_llama::LlamaError> {
/// # let place = tempfile::tempdir().unwrap();
/// let [base, adapter, output] = ["base", "my-adapter", "adapter.gguf"].map(|name| place.path().join(name));
/// # let mut model = LlamaConfig::new(32, 16, 1).with_heads(2, 1).init(&Device::flex());
/// # model.save_pretrained(&base)?;
/// # model.add_adapter("default", &LoraConfig::new(2).with_target_modules(["q_proj"]))?;
/// # model.save_adapter("default", &adapter)?;
/// let adapter = GgufAdapter::new(base, AdapterDirectory::open(adapter)?)?;
/// adapter.write(output, GgufType::F32, |done, of| println!("{done} of {of} tensors"))?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct GgufAdapter {
    config: LlamaConfig,
    adapter: Rc<AdapterDirectory>,
    alpha: f32,
}

/// Everything for which llama.cpp cannot use an adapter beside its base, whatever the base is: magnitudes of DoRA,
/// trained copies, biases and tokens, `lora_bias`, modules that LLaMA does not have. Empty if there is nothing.
///
/// [`AdapterDirectory::problems`] has what is wrong with the files themselves.
pub fn gguf_obstacles(adapter: &AdapterDirectory) -> Vec<String> {
    let mut obstacles = vec![];
    let is_factor =
        |key: &String| adapter.modules().iter().any(|module| [&module.a, &module.b].contains(&key));
    for tensor in adapter.tensors().iter().filter(|tensor| !is_factor(&tensor.key)) {
        let (module, key) = (&tensor.module, &tensor.key);
        match tensor.role {
            TensorRole::Adapter("magnitude") => {
                obstacles
                    .push(format!("`{module}` has a magnitude of DoRA, which llama.cpp does not compute"));
            }
            TensorRole::Copy if key.ends_with(".bias") => {
                obstacles.push(format!("the bias of `{module}` was trained, and such a file has no biases"));
            }
            TensorRole::Copy => {
                obstacles.push(format!(
                    "`{module}` was trained as a whole, and such a file has updates of low rank only"
                ));
            }
            TensorRole::Adapter(what) => {
                obstacles
                    .push(format!("`{module}` has {what}, and such a file has updates of low rank only"));
            }
            TensorRole::Unknown => obstacles.push(format!("`{key}` is no tensor of a LoRA adapter")),
            // Those of the base are compared with it, and what is written twice says nothing new.
            _ => {}
        }
    }
    for StoredModule { name, .. } in adapter.modules() {
        if names::module(name).is_none_or(|found| found.ends_with("_norm")) {
            obstacles.push(format!("`{name}` is no linear layer or embedding of a LLaMA"));
        }
    }
    obstacles
}

impl GgufAdapter {
    /// Checks whether llama.cpp can use an adapter on the base in the directory `model`.
    ///
    /// Of the base, `config.json` is read. Weights are read where something depends on them: tensors of a base in the
    /// adapter's file ([`TensorRole::BaseLayer`]) must be those of this one, and weights can have an output layer that
    /// `config.json` denies. A file for llama.cpp would lose an embedding that was changed.
    ///
    /// # Errors
    /// - as [`LlamaConfig::load`],
    /// - [`LlamaError::ReadFile`], [`LlamaError::WrongFile`] and [`LlamaError::WeightsFile`] if the base's weights are
    ///   needed and cannot be read,
    /// - [`LlamaError::Adapters`] if the adapter cannot be used at all,
    /// - [`LlamaError::NotForLlamaCpp`] with all [`gguf_obstacles`], modules that the base does not have or that have
    ///   other sizes there, updates of a table that the output layer shares (llama.cpp stops the process at them), and
    ///   tensors of a base that is another one or has no weights to compare them with.
    pub fn new(model: impl AsRef<Path>, adapter: AdapterDirectory) -> Result<Self, LlamaError> {
        let base = Base::open(model.as_ref(), &adapter)?;
        let config = &base.config;
        if let Some(problem) = adapter.problems().into_iter().next() {
            return Err(problem.into());
        }
        let mut problems = gguf_obstacles(&adapter);
        for module in adapter.modules() {
            let StoredModule { name, d_input, d_output, .. } = module;
            let found = [*d_input, *d_output];
            match names::dims(config, name) {
                None if names::module(name).is_some() => {
                    problems.push(format!("the model has no `{name}`"));
                }
                Some(expected) if expected != found => problems.push(format!(
                    "`{name}`: expected {} inputs and {} outputs as in the model, found {} and {}",
                    expected[0], expected[1], found[0], found[1]
                )),
                _ => {}
            }
            if config.tie_word_embeddings && ["model.embed_tokens", "lm_head"].contains(&&**name) {
                problems.push(format!(
                    "`{name}` is one table with the other end of the model, and llama.cpp has no update of one end alone"
                ));
            }
        }
        if adapter.modules().is_empty() && problems.is_empty() {
            problems.push("it has no update of low rank".to_string());
        }
        let of_base = base.problems(&adapter)?;
        let hint = if of_base.is_empty() { HINT } else { OTHER_BASE_HINT };
        problems.extend(of_base);
        if !problems.is_empty() {
            return Err(LlamaError::NotForLlamaCpp { path: adapter.path().into(), problems, hint });
        }
        let alpha = common_alpha(adapter.modules());
        Ok(Self { config: base.config, adapter: Rc::new(adapter), alpha })
    }

    /// `adapter.lora.alpha` of the file.
    pub fn alpha(&self) -> f32 {
        self.alpha
    }

    /// The modules of which `B` is multiplied, as their scale differs from `alpha / r`.
    pub fn num_rescaled(&self) -> usize {
        self.adapter.modules().iter().filter(|module| self.factor(module) != 1.0).count()
    }

    /// The number of tensors in the file.
    pub fn num_tensors(&self) -> usize {
        2 * self.adapter.modules().len()
    }

    /// Writes the file, which appears when it is complete, and returns its size in bytes. `on_tensor` gets the number of
    /// tensors that are written, and of all.
    ///
    /// # Errors
    /// - [`LlamaError::WriteFile`] if there is something of that name, or the file cannot be written,
    /// - [`LlamaError::TooLargeForF16`] if a number is too large for the type, [`LlamaError::NonFiniteWeight`] if it is
    ///   infinite or none.
    pub fn write(
        &self,
        output: impl AsRef<Path>,
        dtype: GgufType,
        mut on_tensor: impl FnMut(usize, usize),
    ) -> Result<u64, LlamaError> {
        let tensors: Vec<Tensor> =
            self.adapter.modules().iter().flat_map(|module| self.factors(module)).collect();
        writer::write(output.as_ref(), &self.metadata(dtype), &tensors, dtype, &mut on_tensor)
    }

    fn metadata(&self, dtype: GgufType) -> Metadata {
        let text = |text: &str| Value::Text(text.to_string());
        let name = self.adapter.path().file_name().map(|name| name.to_string_lossy().into_owned());
        let mut metadata = vec![
            ("general.architecture", text(self.config.family.llama_cpp.architecture)),
            ("general.type", text("adapter")),
        ];
        metadata.extend(name.map(|name| ("general.name", Value::Text(name))));
        metadata.extend([
            ("general.file_type", Value::U32(dtype.file_type())),
            ("adapter.type", text("lora")),
            ("adapter.lora.alpha", Value::F32(self.alpha)),
        ]);
        metadata.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
    }

    /// What `B` of a module is multiplied by.
    fn factor(&self, module: &StoredModule) -> f64 {
        f64::from(alpha_of(module)) / f64::from(self.alpha)
    }

    fn factors(&self, module: &StoredModule) -> [Tensor; 2] {
        let StoredModule { r, d_input, d_output, .. } = *module;
        let name = format!("{}.weight", names::module(&module.name).unwrap_or_default());
        let is_embedding = module.is_embedding();
        let read = |key: &String| {
            let (adapter, key) = (Rc::clone(&self.adapter), key.clone());
            move || -> Result<Vec<f32>, LlamaError> { Ok(adapter.values(&key)?) }
        };
        let a = read(&module.a);
        let a = Tensor {
            name: format!("{name}.lora_a"),
            source: module.a.clone(),
            shape: if is_embedding { vec![d_input, r] } else { vec![r, d_input] },
            // llama.cpp looks up rows of an embedding's, so they come first.
            read: Box::new(move || Ok(if is_embedding { transposed(&a()?, r) } else { a()? })),
        };
        let (b, factor) = (read(&module.b), self.factor(module));
        let heads = rotation::heads(&self.config, &module.name);
        let b = Tensor {
            name: format!("{name}.lora_b"),
            source: module.b.clone(),
            shape: vec![d_output, r],
            read: Box::new(move || {
                let mut values = b()?;
                if let Some(heads) = heads {
                    values = rotation::interleaved(&values, d_output, heads);
                }
                if factor != 1.0 {
                    values.iter_mut().for_each(|value| *value = (f64::from(*value) * factor) as f32);
                }
                Ok(values)
            }),
        };
        [a, b]
    }
}

/// The `alpha` with which llama.cpp's `alpha / r` is the scale of the module.
fn alpha_of(module: &StoredModule) -> f32 {
    (module.scaling * module.r as f64) as f32
}

/// The `alpha` of the most modules, the first of several. Not zero: that is no scale to llama.cpp.
fn common_alpha(modules: &[StoredModule]) -> f32 {
    let alphas: Vec<f32> = modules.iter().map(alpha_of).filter(|alpha| *alpha != 0.0).collect();
    let count = |alpha: f32| alphas.iter().filter(|other| **other == alpha).count();
    let mut common = 1.0;
    let mut most = 0;
    for &alpha in &alphas {
        if count(alpha) > most {
            (common, most) = (alpha, count(alpha));
        }
    }
    common
}

/// Rows as columns.
fn transposed(values: &[f32], rows: usize) -> Vec<f32> {
    let columns = values.len() / rows.max(1);
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use burn::tensor::Device;
    use burn_peft::{Bias, InitLoraWeights, LoraConfig, PeftModel};
    use burn_peft_files::{TensorFiles, WEIGHTS_FILE};
    use safetensors::tensor::TensorView;
    use safetensors::{Dtype, SafeTensors};

    use super::*;

    /// A model of two layers with 4 and 2 heads, and an adapter on it, as directories.
    fn directories(tied: bool, config: &LoraConfig) -> (tempfile::TempDir, PathBuf, AdapterDirectory) {
        let place = tempfile::tempdir().unwrap();
        let (base, path) = (place.path().join("base"), place.path().join("it"));
        let sizes = LlamaConfig { attention_bias: true, ..LlamaConfig::new(11, 32, 2) };
        let sizes = sizes.with_heads(4, 2).with_tie_word_embeddings(tied);
        let mut model = sizes.init(&Device::default());
        model.save_pretrained(&base).unwrap();
        model.add_adapter("default", config.clone().with_init_lora_weights(InitLoraWeights::Random)).unwrap();
        model.save_adapter("default", &path).unwrap();
        let adapter = AdapterDirectory::open(path).unwrap();
        (place, base, adapter)
    }

    fn refused(tied: bool, config: &LoraConfig) -> String {
        let (_place, base, adapter) = directories(tied, config);
        let error = GgufAdapter::new(base, adapter).unwrap_err();
        assert!(matches!(error, LlamaError::NotForLlamaCpp { .. }), "{error}");
        error.to_string()
    }

    #[test]
    fn one_alpha_serves_all_and_the_rest_is_in_b() {
        let config = LoraConfig::new(2)
            .with_lora_alpha(6.0)
            .with_target_modules(["q_proj", "v_proj", "up_proj"])
            .with_rank_pattern([("up_proj", 4)])
            .with_alpha_pattern([("v_proj", 3.0)]);
        let (_place, base, directory) = directories(false, &config);
        let adapter = GgufAdapter::new(base, directory).unwrap();
        // alpha / r has the rank of the module in it, so another rank alone needs nothing.
        assert_eq!((adapter.alpha(), adapter.num_rescaled(), adapter.num_tensors()), (6.0, 2, 12));
        for module in adapter.adapter.modules() {
            let [a, b] = adapter.factors(module);
            assert_eq!((a.read)().unwrap(), adapter.adapter.values(&module.a).unwrap());
            let stored = adapter.adapter.values(&module.b).unwrap();
            let found = (b.read)().unwrap();
            let scale = f64::from(adapter.alpha()) / module.r as f64;
            let rows = |values: Vec<f32>| -> Vec<Vec<f32>> {
                values.chunks(module.r).map(|row| row.to_vec()).collect()
            };
            let (stored, found) = (rows(stored), rows(found));
            for (row, values) in found.iter().enumerate() {
                // Of the rows of a query head of 8, those of 4 apart become neighbours.
                let from = if module.name.ends_with("q_proj") {
                    row / 8 * 8 + row % 2 * 4 + row % 8 / 2
                } else {
                    row
                };
                for (value, from) in values.iter().zip(&stored[from]) {
                    assert_eq!(
                        (f64::from(*value) * scale) as f32,
                        (f64::from(*from) * module.scaling) as f32
                    );
                }
            }
        }
    }

    #[test]
    fn rslora_is_a_matter_of_alpha() {
        let config =
            LoraConfig::new(4).with_lora_alpha(3.0).with_use_rslora(true).with_target_modules(["k_proj"]);
        let (_place, base, directory) = directories(true, &config);
        let adapter = GgufAdapter::new(base, directory).unwrap();
        assert_eq!((adapter.alpha(), adapter.num_rescaled()), (6.0, 0));
    }

    #[test]
    fn a_scale_of_zero_stays_one() {
        let config = LoraConfig::new(2).with_lora_alpha(0.0).with_target_modules(["k_proj"]);
        let (_place, base, directory) = directories(true, &config);
        let adapter = GgufAdapter::new(base, directory).unwrap();
        assert_eq!((adapter.alpha(), adapter.num_rescaled()), (1.0, 2));
        let [_, b] = adapter.factors(&adapter.adapter.modules()[0]);
        assert!((b.read)().unwrap().iter().all(|value| *value == 0.0));
    }

    #[test]
    fn what_such_a_file_cannot_say_is_named() {
        let q = || LoraConfig::new(2).with_target_modules(["q_proj"]);
        for (config, part) in [
            (q().with_use_dora(true), "`model.layers.0.self_attn.q_proj` has a magnitude of DoRA"),
            (q().with_modules_to_save(["lm_head"]), "`lm_head` was trained as a whole"),
            (q().with_bias(Bias::LoraOnly), "the bias of `model.layers.1.self_attn.q_proj` was trained"),
            (q().with_lora_bias(true), "`model.layers.0.self_attn.q_proj` has "),
            (q().with_trainable_token_indices(vec![3]), "`model.embed_tokens` has "),
        ] {
            let text = refused(false, &config);
            assert!(text.contains(part) && text.contains("hint: merge it"), "{part} is not in\n{text}");
        }
        let table = LoraConfig::new(2).with_target_modules(["embed_tokens"]);
        assert!(refused(true, &table).contains("`model.embed_tokens` is one table with"));
        let (_place, base, adapter) = directories(false, &table);
        let adapter = GgufAdapter::new(base, adapter).unwrap();
        let [a, b] = adapter.factors(&adapter.adapter.modules()[0]);
        assert_eq!(
            (a.name.as_str(), b.name.as_str()),
            ("token_embd.weight.lora_a", "token_embd.weight.lora_b")
        );
        assert_eq!((a.shape, b.shape), (vec![11, 2], vec![32, 2]));
        let stored = adapter.adapter.values(&adapter.adapter.modules()[0].a).unwrap();
        assert_eq!((a.read)().unwrap()[2..4], [stored[1], stored[12]]);
    }

    const TABLE: &str = "base_model.model.model.embed_tokens.weight";

    /// The adapter with the embedding of its base in its file, as `save_embedding_layers` writes it, changed.
    fn with_table(base: &Path, adapter: &Path, change: impl Fn(&mut Vec<f32>)) -> AdapterDirectory {
        let mut values =
            TensorFiles::open(base).unwrap().read("model.embed_tokens.weight", 0..11 * 32).unwrap().unwrap();
        change(&mut values);
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let path = adapter.join("adapter_model.safetensors");
        let stored = fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&stored).unwrap();
        let mut tensors = file.tensors();
        tensors.retain(|(key, _)| key != TABLE);
        let rows = values.len() / 32;
        tensors.push((TABLE.to_string(), TensorView::new(Dtype::F32, vec![rows, 32], &bytes).unwrap()));
        fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
        AdapterDirectory::open(adapter).unwrap()
    }

    #[test]
    fn an_embedding_that_was_changed_is_not_lost_in_silence() {
        let config = LoraConfig::new(2).with_target_modules(["q_proj"]);
        for tied in [false, true] {
            let (_place, base, adapter) = directories(tied, &config);
            let path = adapter.path().to_path_buf();
            let new = |change: fn(&mut Vec<f32>)| GgufAdapter::new(&base, with_table(&base, &path, change));
            assert_eq!(new(|_| {}).unwrap().num_tensors(), 4);
            // To the nearest bfloat16.
            new(|values| values[7] = f32::from_bits((values[7].to_bits() + 0x8000) & 0xffff_0000)).unwrap();
            let changes: [fn(&mut Vec<f32>); 2] =
                [|values| values[351] += 1.0, |values| values[0] = f32::NAN];
            for change in changes {
                let text = new(change).unwrap_err().to_string();
                assert!(text.contains(&format!("`{TABLE}` is not the weight of this model")), "{text}");
                assert!(
                    text.contains("hint: give the whole directory") && text.contains("in Python"),
                    "{text}"
                );
            }
            let text = new(|values| values.extend([0.0; 32])).unwrap_err().to_string();
            assert!(text.contains("expected the shape [11, 32] of the model, found [12, 32]"), "{text}");
            let repeated = with_table(&base, &path, |_| {});
            fs::remove_file(base.join(WEIGHTS_FILE)).unwrap();
            let text = GgufAdapter::new(&base, repeated).unwrap_err().to_string();
            assert!(text.contains(&format!("`{TABLE}` has to be compared")), "{text}");
            GgufAdapter::new(&base, adapter).unwrap();
        }
    }

    #[test]
    fn an_output_layer_that_the_configuration_denies_is_found() {
        let config = LoraConfig::new(2).with_target_modules(["embed_tokens"]);
        let (_place, base, adapter) = directories(false, &config);
        let path = base.join("config.json");
        let text = fs::read_to_string(&path).unwrap();
        let (untied, tied) = ("\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true");
        assert!(text.contains(untied), "{text}");
        fs::write(path, text.replace(untied, tied)).unwrap();
        let found = GgufAdapter::new(&base, adapter).unwrap();
        assert!(!found.config.tie_word_embeddings);
    }

    #[test]
    fn an_adapter_of_another_model_is_refused_with_every_module() {
        let config = LoraConfig::new(2).with_target_modules(["k_proj"]);
        let (_place, _, adapter) = directories(false, &config);
        let other = tempfile::tempdir().unwrap();
        let model = LlamaConfig::new(11, 32, 1).with_heads(4, 4).init(&Device::default());
        model.save_pretrained(other.path()).unwrap();
        let text = GgufAdapter::new(other.path(), adapter).unwrap_err().to_string();
        let expected = "`model.layers.0.self_attn.k_proj`: expected 32 inputs and 32 outputs as in the model, found 32 and 16";
        assert!(
            text.contains(expected) && text.contains("the model has no `model.layers.1.self_attn.k_proj`"),
            "{text}"
        );
    }
}
