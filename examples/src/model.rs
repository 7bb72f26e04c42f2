//! Base models by the names that users give them.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// The directory of the model that the option `--model` of `example` names: a directory in the Hugging Face layout, or
/// `owner/name` on the Hub, which is fetched first. `otherwise` ends the hints.
///
/// # Errors
/// There is no such directory, or it holds no model; the Hub does not give it out.
pub fn directory(model: &str, example: &str, otherwise: &str) -> Result<PathBuf> {
    if model.is_empty() {
        bail!("`--model` is empty\nhint: give the directory of a model{otherwise}");
    }
    if Path::new(model).is_file() {
        bail!(
            "`{model}` is a file\nhint: `--model` takes the directory that config.json, model.safetensors and tokenizer.json are in"
        );
    }
    let path = find(model, example)?;
    if !path.join("config.json").is_file() {
        bail!(
            "`{}` has no `config.json`\nhint: `--model` takes the directory of a LLaMA model in the Hugging Face layout: config.json, model.safetensors, tokenizer.json{otherwise}",
            path.display()
        );
    }
    Ok(path)
}

/// The directory of the adapter that an option `--adapter` names.
///
/// # Errors
/// There is no adapter there.
pub fn directory_of_adapter(adapter: &str) -> Result<PathBuf> {
    let path = PathBuf::from(adapter);
    if !path.join("adapter_config.json").is_file() {
        bail!(
            "`{adapter}` has no `adapter_config.json`\nhint: `--adapter` takes a directory in PEFT's format"
        );
    }
    Ok(path)
}

/// What an adapter's files call the base: as the user named it, but for a revision on the Hub, which PEFT keeps apart.
pub fn name_or_path(model: &str) -> &str {
    if Path::new(model).is_dir() { model } else { model.split('@').next().unwrap_or(model) }
}

#[cfg(feature = "hub")]
fn find(model: &str, _: &str) -> Result<PathBuf> {
    Ok(burn_peft_llama::resolve(model)?)
}

#[cfg(not(feature = "hub"))]
fn find(model: &str, example: &str) -> Result<PathBuf> {
    let path = PathBuf::from(model);
    if !path.is_dir() {
        bail!(
            "there is no directory `{model}`\nhint: for a model of the Hugging Face Hub, build with its client: cargo run --release --features hub --example {example} -- --model {model}"
        );
    }
    Ok(path)
}
