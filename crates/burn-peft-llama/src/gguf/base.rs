//! What an adapter is compared with: the base that it is for.

use std::io::ErrorKind;
use std::path::Path;

use burn_peft::{AdapterDirectory, StoredTensor, TensorRole};

use crate::config::LlamaConfig;
use crate::error::LlamaError;
use crate::file;
use crate::weights::checkpoint::Checkpoint;

/// The directory of a base.
pub(super) struct Base {
    /// Its configuration. Where weights were opened, it is tied if they are.
    pub(super) config: LlamaConfig,
    /// Its weights, if there are any and something depends on them.
    weights: Option<Checkpoint>,
}

impl Base {
    /// # Errors
    /// As [`LlamaConfig::load`]; the files of weights are needed, and they are malformed or cannot be read.
    pub(super) fn open(dir: &Path, adapter: &AdapterDirectory) -> Result<Self, LlamaError> {
        let lock = file::lock(dir)?;
        let mut config = LlamaConfig::load(dir)?;
        let repeats = adapter.tensors().iter().any(|tensor| tensor.role == TensorRole::BaseLayer);
        let changes_table =
            adapter.modules().iter().any(|module| ["model.embed_tokens", "lm_head"].contains(&&*module.name));
        let mut weights = None;
        if repeats || (config.tie_word_embeddings && changes_table) {
            weights = match Checkpoint::open(dir) {
                Ok(weights) => Some(weights),
                Err(LlamaError::ReadFile { source, .. }) if source.kind() == ErrorKind::NotFound => None,
                Err(error) => return Err(error),
            };
        }
        // Files that are open stay what they are.
        drop(lock);
        if let Some(weights) = &mut weights
            && config.tie_word_embeddings
        {
            config.tie_word_embeddings = weights.resolve_tied_head()?;
        }
        Ok(Self { config, weights })
    }

    /// The tensors of a base in an adapter's file that are not those of this one, or that cannot be compared.
    ///
    /// # Errors
    /// A tensor cannot be read.
    pub(super) fn problems(&self, adapter: &AdapterDirectory) -> Result<Vec<String>, LlamaError> {
        let mut problems = vec![];
        for tensor in adapter.tensors().iter().filter(|tensor| tensor.role == TensorRole::BaseLayer) {
            let key = &tensor.key;
            let Some(weights) = &self.weights else {
                problems.push(format!(
                    "`{key}` has to be compared with the weight of the model, whose directory has no weights"
                ));
                continue;
            };
            let name = self.name_of(tensor);
            match weights.shape(&name) {
                None => problems.push(format!("`{key}`: the model has no `{name}`")),
                Some(shape) if *shape != tensor.shape[..] => {
                    let found = &tensor.shape;
                    problems
                        .push(format!("`{key}`: expected the shape {shape:?} of the model, found {found:?}"));
                }
                Some(_) => {
                    if !adapter.repeats(key, &weights.read(&name)?)? {
                        problems.push(format!("`{key}` is not the weight of this model"));
                    }
                }
            }
        }
        Ok(problems)
    }

    /// The name of an adapter's tensor among the weights. The output layer of a tied model has none of its own.
    fn name_of(&self, tensor: &StoredTensor) -> String {
        let module = match tensor.module.as_str() {
            "lm_head" if self.config.tie_word_embeddings => "model.embed_tokens",
            module => module,
        };
        let parameter = tensor.key.rsplit('.').next().unwrap_or_default();
        format!("{module}.{parameter}")
    }
}
