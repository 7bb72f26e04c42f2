//! Trained rows of an embedding's table, or of an output layer's: PEFT's `trainable_token_indices`.

use std::collections::BTreeSet;
use std::sync::Arc;

use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor, TensorData};
use burn_peft_ops::cast;

use super::{Chosen, Description, KeyEnd, Method, Parameters, Pass, Tells, TensorSpec, Update};
use crate::config::{PeftConfig, TokenIndices};
use crate::error::PeftError;
use crate::init::Start;
use crate::layer::{Layer, Site};
use crate::ops::Input;
use crate::target::OUTPUT_LAYER;

/// Puts trained rows in the place of those of some tokens.
#[derive(Debug)]
struct Tokens {
    /// The token of each row.
    indices: Vec<usize>,
    /// Whether the tokens are the columns of the matrix: those of an output layer, `[d_in, vocabulary]`.
    are_columns: bool,
    /// Whether an output layer reads the same table, and then the same rows.
    is_tied: bool,
}

/// The rows themselves (`[tokens, width]`), not differences, despite PEFT's name.
const ROWS: &str = "tokens";
const FIELD: &str = "trainable_token_indices";

const KEY: KeyEnd = KeyEnd::new("token_adapter.trainable_tokens_delta", "", "rows of tokens", Tells::Width)
    .of(Layer::Embedding)
    .tied();

pub(super) const DESCRIPTION: Description = Description { keys: &[KEY], of, check };

fn of(config: &PeftConfig, at: &Chosen) -> Option<Arc<dyn Method>> {
    let (_, indices) = meant(config, at)?;
    Some(Arc::new(Tokens {
        indices: indices.to_vec(),
        are_columns: at.site.layer == Layer::Linear,
        is_tied: at.is_tied,
    }))
}

/// The entry of the configuration that means the weight at `at`, and its tokens.
fn meant<'c>(config: &'c PeftConfig, at: &Chosen) -> Option<(&'c str, &'c [usize])> {
    let is_table = matches!(at.site.layer, Layer::Embedding | Layer::Linear) && at.site.is_adaptable();
    let tokens = config.as_lora()?.trainable_token_indices.as_ref().filter(|_| is_table)?;
    tokens.of(&at.site.name)
}

/// # Errors
/// [`PeftError::InvalidConfig`] for modules that are not there or are adapted or saved whole as well, which PEFT refuses
/// too, and for tokens that the vocabulary does not have.
fn check(config: &PeftConfig, parameters: &Parameters) -> Result<(), PeftError> {
    let Some(tokens) = config.as_lora().and_then(|config| config.trainable_token_indices.as_ref()) else {
        return Ok(());
    };
    let invalid = |expected, found: String| Err(PeftError::invalid(FIELD, expected, found));
    let mut found = BTreeSet::new();
    for at in parameters.list {
        let Some((name, indices)) = meant(config, at) else { continue };
        found.insert(name);
        if at.is_adapted || at.is_saved {
            let field = if at.is_saved { "modules_to_save" } else { "target_modules" };
            return invalid(
                "modules that are neither in `target_modules` nor in `modules_to_save`",
                format!("`{}`, which is in `{field}`", at.site.name),
            );
        }
        let [rows, columns] = at.site.dims();
        let vocabulary = if at.site.layer == Layer::Linear { columns } else { rows };
        if let Some(index) = indices.iter().find(|index| **index >= vocabulary) {
            return invalid(
                "tokens of the vocabulary",
                format!("{index} for `{}`, which has {vocabulary}", at.site.name),
            );
        }
    }
    let names = tokens.entries().into_iter().map(|(name, _)| name);
    let mut missing = names.filter(|name| !found.contains(name) && !is_other_end(tokens, name, parameters));
    match missing.next().filter(|_| parameters.are_all || found.is_empty()) {
        Some(name) => {
            invalid("names of embeddings or linear layers", format!("`{name}`, which matches none"))
        }
        None => Ok(()),
    }
}

/// Whether an entry means the output layer that is tied to an embedding with the same tokens: it has no weight of its own,
/// and PEFT makes one of both entries too.
fn is_other_end(tokens: &TokenIndices, name: &str, parameters: &Parameters) -> bool {
    let tied = parameters.list.iter().find(|at| at.is_tied);
    let of_table = tied.and_then(|at| tokens.of(&at.site.name));
    name == OUTPUT_LAYER && of_table.is_some_and(|(_, own)| tokens.entries().contains(&(name, own)))
}

impl Tokens {
    fn index(&self, like: &Tensor<2>) -> Tensor<1, Int> {
        let indices: Vec<i64> = self.indices.iter().map(|&index| index as i64).collect();
        Tensor::from_data(TensorData::new(indices, [self.indices.len()]), &like.device())
    }

    /// The rows of these tokens in a matrix, `[tokens, width]`, in f32.
    fn rows_of(&self, matrix: &Tensor<2>) -> Tensor<2> {
        let index = self.index(matrix);
        let rows = if self.are_columns {
            matrix.clone().select(1, index).transpose()
        } else {
            matrix.clone().select(0, index)
        };
        cast(rows, DType::F32)
    }

    /// What the trained rows differ by from those of `base`.
    fn difference(&self, of: &Update, base: &Tensor<2>) -> Tensor<2> {
        of[ROWS].val() - self.rows_of(base)
    }

    /// `x Dᵀ` in the columns of the tokens, 0 elsewhere: `[n, vocabulary]`.
    fn columns(&self, x: &Tensor<2>, difference: Tensor<2>, vocabulary: usize) -> Tensor<2> {
        let values = cast(x.clone(), DType::F32).matmul(difference.transpose());
        let zeros = Tensor::zeros([x.dims()[0], vocabulary], (&x.device(), DType::F32));
        zeros.select_assign(1, self.index(x), values, IndexingUpdateOp::Add)
    }
}

impl Method for Tokens {
    fn tensors(&self, site: &Site) -> Vec<TensorSpec> {
        let width = site.dims()[usize::from(!self.are_columns)];
        vec![TensorSpec::rows(ROWS, KEY, [self.indices.len(), width])]
    }

    fn start(&self, at: &Start) -> Result<Vec<Tensor<2>>, PeftError> {
        Ok(vec![self.rows_of(&at.matrix())])
    }

    fn is_exclusive(&self) -> bool {
        true
    }

    fn allows_mixed_batches(&self) -> bool {
        !self.is_tied
    }

    fn is_read_by_tied_output(&self) -> bool {
        self.is_tied
    }

    fn apply(&self, of: &Update, value: Tensor<2>, base: &Tensor<2>) -> Tensor<2> {
        let (value, index) = (cast(value, DType::F32), self.index(base));
        let difference = self.difference(of, base);
        if self.are_columns {
            value.select_assign(1, index, difference.transpose(), IndexingUpdateOp::Add)
        } else {
            value.select_assign(0, index, difference, IndexingUpdateOp::Add)
        }
    }

    fn forward(&self, of: &Update, pass: &Pass) -> Option<Tensor<2>> {
        let difference = self.difference(of, pass.base);
        Some(match pass.input {
            Input::Activations(x) => self.columns(x, difference, pass.base.dims()[1]),
            Input::Ids(ids) => {
                let (n, tokens) = (ids.dims()[0], self.indices.len());
                let ids = ids.clone().reshape([n, 1]).expand([n, tokens]);
                let index = self.index(pass.base).reshape([1, tokens]).expand([n, tokens]);
                let is_token = ids.equal(index).float().cast(DType::F32);
                is_token.matmul(difference)
            }
        })
    }

    fn forward_tied(&self, of: &Update, x: &Tensor<2>, table: &Tensor<2>) -> Option<Tensor<2>> {
        self.is_tied.then(|| self.columns(x, self.difference(of, table), table.dims()[0]))
    }
}
