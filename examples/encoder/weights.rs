//! The weights: a directory in the Hugging Face layout, and the names in it.

use std::path::Path;

use anyhow::{Context, Result, bail};
use burn::tensor::Device;
use burn_peft::KeyMapping;
use burn_store::{BurnToPyTorchAdapter, KeyRemapper, ModuleSnapshot, PyTorchToBurnAdapter, SafetensorsStore};

use crate::encoder::{Encoder, EncoderConfig};

/// How the paths of [`Encoder`] become the names that `BertModel` has in files.
pub fn names() -> KeyMapping {
    KeyMapping::new([
        (r"^words\.", "embeddings.word_embeddings."),
        (r"^positions\.", "embeddings.position_embeddings."),
        (r"^segments\.", "embeddings.token_type_embeddings."),
        (r"^norm\.", "embeddings.LayerNorm."),
        (r"^blocks\.(\d+)\.", "encoder.layer.$1."),
        (r"\.attention\.(query|key|value)\.", ".attention.self.$1."),
        (r"\.attention\.output\.", ".attention.output.dense."),
        (r"\.attention_norm\.", ".attention.output.LayerNorm."),
        (r"\.up\.", ".intermediate.dense."),
        (r"\.down\.", ".output.dense."),
        (r"\.output_norm\.", ".output.LayerNorm."),
    ])
}

/// Reads `config.json` of a model directory.
pub fn read_config(directory: &Path) -> Result<EncoderConfig> {
    let path = directory.join("config.json");
    let text = std::fs::read(&path).with_context(|| {
        format!(
            "`{}` cannot be read\nhint: `--model` takes the directory of a BERT model in the Hugging Face layout: config.json, model.safetensors, tokenizer.json",
            path.display()
        )
    })?;
    let config: EncoderConfig = serde_json::from_slice(&text)
        .with_context(|| format!("`{}` does not describe a BERT model", path.display()))?;
    if config.model_type != "bert" || config.hidden_act != "gelu" {
        bail!(
            "expected `model_type` bert with `hidden_act` gelu, found {} with {}\nhint: this example has one architecture; write the module of yours in its place",
            config.model_type,
            config.hidden_act
        );
    }
    Ok(config)
}

/// The encoder in a model directory, and the tensors of the file that it has no use for.
pub fn load(directory: &Path, config: &EncoderConfig, device: &Device) -> Result<(Encoder, Vec<String>)> {
    let mut encoder = config.init(device);
    let unused = load_into(&mut encoder, &names(), &directory.join("model.safetensors"))?;
    Ok((encoder, unused))
}

/// Fills `model` from a file that PyTorch wrote. Returns what the file has and the model does not.
pub fn load_into(model: &mut impl ModuleSnapshot, names: &KeyMapping, file: &Path) -> Result<Vec<String>> {
    // burn-store goes from the names in the file to paths; the mapping goes the other way.
    let mut remapper = KeyRemapper::new();
    for tensor in model.collect(None, Some(Box::new(BurnToPyTorchAdapter)), false) {
        let name = names.apply(&tensor.name)?.replace('.', r"\.");
        remapper = remapper.add_pattern(format!("^{name}$"), tensor.name)?;
    }
    let mut store = SafetensorsStore::from_file(file).with_from_adapter(PyTorchToBurnAdapter).remap(remapper);
    let report =
        model.load_from(&mut store).with_context(|| format!("`{}` cannot be loaded", file.display()))?;
    Ok(report.unused)
}
