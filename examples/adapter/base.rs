//! What the files of a base model say before any weight is read.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, bail};
use burn::tensor::FloatDType;
use burn_peft::{AdapterDirectory, StoredModule, TensorRole};
use burn_peft_files::TensorFiles;
use burn_peft_llama::{LlamaConfig, stored_dtype};

/// The table of contents of a model directory.
pub struct BaseFiles {
    pub config: LlamaConfig,
    /// Shapes, in PyTorch's layout, by name.
    pub tensors: BTreeMap<String, Vec<usize>>,
    /// The type of all tensors, or f32 if they have several, which loses nothing of any of them.
    pub dtype: FloatDType,
}

impl BaseFiles {
    /// Reads the configuration and the headers of the weights.
    ///
    /// # Errors
    /// A file is missing or malformed, or the model is no LLaMA.
    pub fn open(directory: &Path) -> Result<Self> {
        let config = LlamaConfig::load(directory)?;
        let dtype = stored_dtype(directory)?;
        let files = TensorFiles::open(directory)?;
        let shapes = files.tensors().map(|(name, info)| (name.to_string(), info.shape.clone()));
        Ok(Self { config, tensors: shapes.collect(), dtype })
    }

    pub fn num_params(&self) -> usize {
        self.tensors.values().map(|shape| shape.iter().product::<usize>()).sum()
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
