//! The logits of a prompt as a file.

use std::path::Path;

use anyhow::{Context, Result};
use burn::tensor::{FloatDType, Int, Tensor, TensorData};
use burn_peft_examples::output;
use burn_peft_llama::LlamaForCausalLm;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize};

/// Writes `logits`, `[tokens, vocabulary]` in f32, and `input_ids`, `[tokens]`.
pub fn write(model: &LlamaForCausalLm, ids: &[u32], path: &Path) -> Result<()> {
    let n = ids.len();
    let device = burn::module::Module::devices(model).first().cloned().context("the model is empty")?;
    let ids: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
    let input = Tensor::<2, Int>::from_data(TensorData::new(ids.clone(), [1, n]), &device);
    let logits = model.forward(input, None).cast(FloatDType::F32).try_into_data()?;
    let vocabulary = logits.shape()[2];
    let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let tensors = [
        ("logits", TensorView::new(Dtype::F32, vec![n, vocabulary], logits.as_bytes())?),
        ("input_ids", TensorView::new(Dtype::I64, vec![n], &ids)?),
    ];
    output::write(path, serialize(tensors, None)?)
}
