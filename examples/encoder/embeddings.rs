//! Embeddings of sentences, and a file of them that `tests/check_in_python.py` compares with transformers and peft.

use std::path::Path;

use anyhow::{Context, Result};
use burn::module::Module;
use burn::tensor::{Device, Tensor};
use burn_peft_examples::output;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize};
use tokenizers::Tokenizer;

use crate::data::Sentences;
use crate::encoder::Encoder;
use crate::text;

/// Sentences in a batch when nothing is trained.
const BATCH_SIZE: usize = 32;

/// Embeddings, `[sentences, hidden_size]`.
pub fn of(encoder: &Encoder, tokenizer: &Tokenizer, sentences: &Sentences) -> Result<Tensor<2>> {
    let device = encoder.devices().first().cloned().context("the encoder is empty")?;
    let mut embeddings = vec![];
    for texts in sentences.texts.chunks(BATCH_SIZE) {
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let batch = text::batch(tokenizer, &texts, &device)?;
        embeddings.push(encoder.embed(batch.ids, batch.mask));
    }
    Ok(Tensor::cat(embeddings, 0))
}

/// Writes the token ids of the sentences and their embeddings without and with the adapter.
pub fn write(
    path: &Path,
    tokenizer: &Tokenizer,
    sentences: &Sentences,
    [base, adapted]: [Tensor<2>; 2],
) -> Result<()> {
    let texts: Vec<&str> = sentences.texts.iter().map(String::as_str).collect();
    let batch = text::batch(tokenizer, &texts, &Device::flex())?;
    let tensors = [
        ("input_ids", Dtype::I64, batch.ids.into_data().convert::<i64>()),
        ("attention_mask", Dtype::I64, batch.mask.int().into_data().convert::<i64>()),
        ("base.embeddings", Dtype::F32, base.into_data()),
        ("embeddings", Dtype::F32, adapted.into_data()),
    ];
    let views = tensors.iter().map(|(name, dtype, data)| {
        let view = TensorView::new(*dtype, data.shape().to_vec(), data.as_bytes());
        view.map(|view| (*name, view))
    });
    let views = views.collect::<Result<Vec<_>, _>>()?;
    output::write(path, serialize(views, None)?)
}
