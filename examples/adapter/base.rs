//! What the files of a base model say before any weight is read.
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result, bail};
use burn::tensor::FloatDType;
use burn_peft::{AdapterDirectory, StoredModule, TensorRole, WrongFile};
use burn_peft_llama::LlamaConfig;
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;

/// The table of contents of a model directory.
pub struct BaseFiles {
    pub config: LlamaConfig,
    /// Shapes, in PyTorch's layout, by name.
    pub tensors: BTreeMap<String, Vec<usize>>,
    /// The type of all tensors, or f32 if they have several, which loses nothing of any of them.
    pub dtype: FloatDType,
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl BaseFiles {
    /// Reads the configuration and the headers of the weights.
    ///
    /// # Errors
    /// A file is missing or malformed, or the model is no LLaMA.
    pub fn open(directory: &Path) -> Result<Self> {
        let config = LlamaConfig::load(directory)?;
        let single = directory.join("model.safetensors");
        let index = directory.join("model.safetensors.index.json");
        let files: BTreeSet<_> = if single.exists() || !index.exists() {
            [single].into()
        } else {
            let context = || format!("cannot read `{}`", index.display());
            let text = std::fs::read_to_string(&index).with_context(context)?;
            let index: Index = serde_json::from_str(&text).with_context(context)?;
            index.weight_map.into_values().map(|name| directory.join(name)).collect()
        };
        let (mut tensors, mut dtypes) = (BTreeMap::new(), vec![]);
        for path in files {
            let context = || format!("cannot read the weights `{}`", path.display());
            for (name, shape, dtype) in header(&path).with_context(context)? {
                tensors.insert(name, shape);
                if !dtypes.contains(&dtype) {
                    dtypes.push(dtype);
                }
            }
        }
        let dtype = match dtypes[..] {
            [Dtype::BF16] => FloatDType::BF16,
            [Dtype::F16] => FloatDType::F16,
            _ => FloatDType::F32,
        };
        Ok(Self { config, tensors, dtype })
    }

    pub fn num_params(&self) -> usize {
        self.tensors.values().map(|shape| shape.iter().product::<usize>()).sum()
    }

    /// Whether `adapter` changes the embedding or the output layer of a model that has one table for both: only with
    /// a table for each can a merged model compute what the adapted one does.
    pub fn needs_untying(&self, adapter: &AdapterDirectory) -> bool {
        let changes_table = adapter.tensors().iter().any(|tensor| {
            // Trained tokens change both ends alike.
            !matches!(tensor.role, TensorRole::BaseLayer | TensorRole::Adapter("rows of tokens"))
                && ["embed_tokens", "lm_head"].iter().any(|table| tensor.module.ends_with(table))
        });
        self.config.tie_word_embeddings && changes_table
    }

    /// Refuses an adapter that was made for another model.
    ///
    /// # Errors
    /// Names every module that does not fit.
    pub fn check(&self, adapter: &AdapterDirectory) -> Result<()> {
        let mut problems: Vec<String> =
            adapter.modules().iter().filter_map(|module| self.misfit(module)).collect();
        for tensor in adapter.tensors() {
            let parameter = tensor.key.rsplit('.').next().unwrap_or_default();
            let name = format!("{}.{parameter}", tensor.module);
            match tensor.role {
                TensorRole::Copy | TensorRole::BaseLayer => match self.shape(&name) {
                    None => problems.push(format!("the model has no `{name}`")),
                    Some(shape) if *shape != tensor.shape => {
                        problems.push(format!(
                            "`{name}` is {shape:?} in the model, {:?} in the adapter",
                            tensor.shape
                        ));
                    }
                    Some(_) => {}
                },
                TensorRole::Adapter(_) if parameter == "bias" && self.shape(&name).is_none() => {
                    problems.push(format!(
                        "`{}` has no bias to merge the adapter's `lora_bias` into",
                        tensor.module
                    ));
                }
                _ => {}
            }
        }
        if problems.is_empty() {
            return Ok(());
        }
        let told: String = problems.iter().take(8).map(|problem| format!("\n  {problem}")).collect();
        let more =
            if problems.len() > 8 { format!("\n  and {} more", problems.len() - 8) } else { String::new() };
        let hint = match &adapter.config().file().base_model_name_or_path {
            Some(name) => format!("\nhint: it was trained on `{name}`"),
            None => String::new(),
        };
        bail!("the adapter `{}` does not fit the model:{told}{more}{hint}", adapter.path().display())
    }

    /// The shape of a weight; that of the embedding for a tied output layer.
    pub fn shape(&self, name: &str) -> Option<&Vec<usize>> {
        let tied = self.config.tie_word_embeddings && name == "lm_head.weight";
        self.tensors.get(if tied { "model.embed_tokens.weight" } else { name })
    }

    fn misfit(&self, module: &StoredModule) -> Option<String> {
        let StoredModule { name, d_input, d_output, .. } = module;
        let Some(shape) = self.shape(&format!("{name}.weight")) else {
            return Some(format!("the model has no `{name}`"));
        };
        let expected = if module.is_embedding() { [*d_input, *d_output] } else { [*d_output, *d_input] };
        (shape[..] != expected)
            .then(|| format!("`{name}` is {shape:?} in the model, and the adapter is for {expected:?}"))
    }
}

/// Name, shape and type of each tensor of a file. Only the header is read.
fn header(path: &Path) -> Result<Vec<(String, Vec<usize>, Dtype)>> {
    let mut start = vec![];
    File::open(path)?.take(256).read_to_end(&mut start)?;
    let length = start.first_chunk().map(|prefix| u64::from_le_bytes(*prefix));
    let Some(length) = length.filter(|length| *length <= path.metadata().map_or(0, |file| file.len())) else {
        match WrongFile::detect(&start) {
            Some(found) => bail!("the file is {found}\nhint: {}", found.hint()),
            None => bail!("expected a safetensors file, found something else"),
        }
    };
    let mut bytes = vec![];
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(8))?;
    file.take(length).read_to_end(&mut bytes)?;
    let metadata: Metadata = serde_json::from_slice(&bytes)?;
    let tensors = metadata.tensors().into_iter();
    Ok(tensors.map(|(name, info)| (name, info.shape.clone(), info.dtype)).collect())
}
