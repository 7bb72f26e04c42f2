//! Sentences as tensors.

use std::path::Path;

use anyhow::{Result, anyhow};
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use tokenizers::{PaddingParams, Tokenizer, TruncationParams};

/// The tokenizer of a model directory, for sentences of at most so many tokens.
pub fn tokenizer(directory: &Path, max_length: usize) -> Result<Tokenizer> {
    let path = directory.join("tokenizer.json");
    let problem = |error| anyhow!("`{}` cannot be read: {error}", path.display());
    let mut tokenizer = Tokenizer::from_file(&path).map_err(problem)?;
    tokenizer.with_padding(Some(PaddingParams::default()));
    let truncation = TruncationParams { max_length, ..Default::default() };
    tokenizer.with_truncation(Some(truncation)).map_err(problem)?;
    Ok(tokenizer)
}

/// Token ids and where they are, `[batch, length]`.
#[derive(Clone)]
pub struct Batch {
    pub ids: Tensor<2, Int>,
    pub mask: Tensor<2, Bool>,
}

/// Sentences of any lengths as one batch, padded on the right.
pub fn batch(tokenizer: &Tokenizer, sentences: &[&str], device: &Device) -> Result<Batch> {
    let encoded = tokenizer
        .encode_batch(sentences.to_vec(), true)
        .map_err(|error| anyhow!("the tokenizer refuses a sentence: {error}"))?;
    let shape = [encoded.len(), encoded.iter().map(|sentence| sentence.len()).max().unwrap_or(0)];
    let numbers = |of: fn(&tokenizers::Encoding) -> &[u32]| {
        let numbers: Vec<i64> = encoded.iter().flat_map(of).map(|&number| i64::from(number)).collect();
        Tensor::<2, Int>::from_data(TensorData::new(numbers, shape), device)
    };
    let mask = numbers(tokenizers::Encoding::get_attention_mask).equal_elem(1);
    Ok(Batch { ids: numbers(tokenizers::Encoding::get_ids), mask })
}
