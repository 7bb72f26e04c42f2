//! What an adapter is compared with: the base that it is for.

use std::io::ErrorKind;
use std::ops::Range;
use std::path::Path;

use burn_peft::{AdapterDirectory, StoredTensor, TensorRole};
use burn_peft_files::{TensorFiles, is_float};

use crate::config::LlamaConfig;
use crate::error::LlamaError;
use crate::file;

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
const CHANGED: &str = "the file changed while it was read";

/// The directory of a base.
pub(super) struct Base {
    /// Its configuration. Where weights were opened, it is tied if they are.
    pub(super) config: LlamaConfig,
    /// Its weights, if there are any and something depends on them.
    weights: Option<TensorFiles>,
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
            weights = match file::open_weights(dir) {
                Ok(weights) => Some(weights),
                Err(LlamaError::ReadFile { source, .. }) if source.kind() == ErrorKind::NotFound => None,
                Err(error) => return Err(error),
            };
        }
        // Files that are open stay what they are.
        drop(lock);
        if let Some(weights) = &weights
            && config.tie_word_embeddings
        {
            config.tie_word_embeddings = is_tied(weights)?;
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
            let name = self.name_of(tensor, weights);
            match shape(weights, &name) {
                None => problems.push(format!("`{key}`: the model has no `{name}`")),
                Some(shape) if *shape != tensor.shape[..] => {
                    let found = &tensor.shape;
                    problems
                        .push(format!("`{key}`: expected the shape {shape:?} of the model, found {found:?}"));
                }
                Some(_) => {
                    if !is_equal(&adapter.values(key)?, weights, &name)? {
                        problems.push(format!("`{key}` is not the weight of this model"));
                    }
                }
            }
        }
        Ok(problems)
    }

    /// The name of an adapter's tensor among the weights. Of two tables that are one, the files may have either.
    fn name_of(&self, tensor: &StoredTensor, weights: &TensorFiles) -> String {
        let parameter = tensor.key.rsplit('.').next().unwrap_or_default();
        let name = format!("{}.{parameter}", tensor.module);
        let is_absent = weights.get(&name).is_none();
        match &*name {
            EMBEDDING if is_absent && self.config.tie_word_embeddings => HEAD.to_string(),
            HEAD if is_absent && self.config.tie_word_embeddings => EMBEDDING.to_string(),
            _ => name,
        }
    }
}

/// Whether a model whose configuration says tied is tied, as
/// [`from_pretrained_as`](crate::LlamaForCausalLm::from_pretrained_as) decides it.
fn is_tied(weights: &TensorFiles) -> Result<bool, LlamaError> {
    if weights.get(HEAD).is_none() || weights.get(EMBEDDING).is_none() {
        return Ok(true);
    }
    let (head, embedding) = (shape(weights, HEAD), shape(weights, EMBEDDING));
    if head.is_none() || head != embedding {
        return Ok(false);
    }
    for range in pieces(head.unwrap_or_default().iter().product()) {
        if read(weights, HEAD, range.clone())? != read(weights, EMBEDDING, range)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether numbers are those of a tensor, but for one of the two having been rounded to a 16-bit type.
fn is_equal(values: &[f32], weights: &TensorFiles, name: &str) -> Result<bool, LlamaError> {
    // Half of the last of bfloat16's 8 significant bits is 2^-8 of the number at worst, and f16's smallest step is 2^-24.
    const RELATIVE: f64 = 1.0 / 256.0;
    const ABSOLUTE: f64 = 1.0 / (1 << 24) as f64;
    let is_near = |(one, other): (&f32, &f32)| {
        let (one, other) = (f64::from(*one), f64::from(*other));
        (one - other).abs() <= other.abs() * RELATIVE + ABSOLUTE
    };
    for range in pieces(values.len()) {
        let of_base = read(weights, name, range.clone())?;
        if !values[range].iter().zip(&of_base).all(is_near) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The shape of a tensor of floats.
fn shape<'a>(weights: &'a TensorFiles, name: &str) -> Option<&'a [usize]> {
    weights.get(name).filter(|info| is_float(info.dtype)).map(|info| &info.shape[..])
}

/// Tables can be gigabytes.
fn pieces(count: usize) -> impl Iterator<Item = Range<usize>> {
    const PIECE: usize = 1 << 18;
    (0..count).step_by(PIECE).map(move |start| start..(start + PIECE).min(count))
}

fn read(weights: &TensorFiles, name: &str, range: Range<usize>) -> Result<Vec<f32>, LlamaError> {
    let numbers = weights.read(name, range).map_err(file::unread_weights(CHANGED))?;
    Ok(numbers.unwrap_or_default())
}
