//! Base models and adapters by the names that users give them: a directory, or `owner/name` on the Hugging Face Hub.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use burn_peft::PeftError;
use burn_peft_llama::LlamaForCausalLm;

/// What a name is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Model,
    Adapter,
}

impl Kind {
    /// What its option takes.
    fn hint(self) -> &'static str {
        match self {
            Self::Model => {
                "`--model` takes the directory of a LLaMA model in the Hugging Face layout (config.json, \
                 model.safetensors, tokenizer.json), or owner/name on the Hub"
            }
            Self::Adapter => {
                "an adapter is a directory in PEFT's format (adapter_config.json, adapter_model.safetensors), or \
                 owner/name on the Hub, for `--adapter` as elsewhere"
            }
        }
    }
}

/// The directory of the model that the option `--model` names: a directory in the Hugging Face layout, or
/// `owner/name` on the Hub, which is fetched first. `otherwise` ends the hints.
///
/// # Errors
/// There is no such directory, or it holds no model; the Hub does not give it out.
pub fn directory(model: impl AsRef<OsStr>, otherwise: &str) -> Result<PathBuf> {
    let model = model.as_ref();
    if model.is_empty() {
        bail!("`--model` is empty\nhint: give the directory of a model{otherwise}");
    }
    if Path::new(model).is_file() {
        bail!(
            "`{}` is a file\nhint: `--model` takes the directory that config.json, model.safetensors and tokenizer.json are in",
            model.display()
        );
    }
    let path = find(Kind::Model, model)?;
    if !path.join("config.json").is_file() {
        bail!(
            "`{}` has no `config.json`\nhint: `--model` takes the directory of a LLaMA model in the Hugging Face layout: config.json, model.safetensors, tokenizer.json{otherwise}",
            path.display()
        );
    }
    Ok(path)
}

/// The directory that was given for an adapter: one on disk, whatever it holds, or `owner/name` on the Hub,
/// which is fetched first.
///
/// # Errors
/// There is no such directory; the Hub does not give it out.
pub fn adapter(adapter: impl AsRef<OsStr>) -> Result<PathBuf> {
    find(Kind::Adapter, adapter.as_ref())
}

/// The directory of the adapter that an option `--adapter` names, as [`adapter`] finds it.
///
/// # Errors
/// There is no adapter there.
pub fn directory_of_adapter(name: impl AsRef<OsStr>) -> Result<PathBuf> {
    let path = adapter(name)?;
    if !path.join("adapter_config.json").is_file() {
        let inside = path.join("adapter");
        if inside.join("adapter_config.json").is_file() {
            bail!(
                "`{}` has no `adapter_config.json`\nhint: the adapter is in `{}`",
                path.display(),
                inside.display()
            );
        }
        bail!("`{}` has no `adapter_config.json`\nhint: {}", path.display(), Kind::Adapter.hint());
    }
    Ok(path)
}

/// What an adapter's files call the base: as the user named it, but for a revision on the Hub, which PEFT keeps apart.
pub fn name_or_path(model: &str) -> &str {
    if Path::new(model).is_dir() { model } else { model.split('@').next().unwrap_or(model) }
}

/// An existing directory, or one that is fetched.
fn find(kind: Kind, name: &OsStr) -> Result<PathBuf> {
    let path = PathBuf::from(name);
    if path.is_dir() {
        return Ok(path);
    }
    let name = name.to_string_lossy();
    if !may_be_on_the_hub(&name) {
        bail!("there is no directory `{name}`\nhint: {}", kind.hint());
    }
    fetch(kind, &name)
}

/// Whether it has the form of `owner/name`, which a path may have as well.
fn may_be_on_the_hub(name: &str) -> bool {
    let (name, _) = name.split_once('@').unwrap_or((name, ""));
    let is_part = |part: &str| !part.is_empty() && !part.starts_with(['.', '~']);
    name.split_once('/').is_some_and(|(owner, rest)| is_part(owner) && is_part(rest) && !rest.contains('/'))
}

/// Fetches it, with a progress bar.
fn fetch(kind: Kind, name: &str) -> Result<PathBuf> {
    let progress = crate::progress::Transfer::new(name);
    let report = |at: burn_peft_llama::FetchProgress| progress.report(at.file, at.done, at.total);
    let found = match kind {
        Kind::Model => burn_peft_llama::resolve(name, report),
        Kind::Adapter => burn_peft_llama::resolve_adapter(name, report),
    };
    progress.finish();
    found.with_context(|| format!("there is no directory `{name}`, so the Hugging Face Hub was asked"))
}

/// Puts an adapter onto `model`. If it is for an output layer that shares the embedding's table, the output layer gets a
/// weight of its own first, which changes no answer.
///
/// # Errors
/// Those of `adapt`.
pub fn adapting<T>(
    model: &mut LlamaForCausalLm,
    adapt: impl Fn(&mut LlamaForCausalLm) -> Result<T, PeftError>,
) -> Result<T, PeftError> {
    match adapt(model) {
        Err(PeftError::NoOutputLayer { .. }) => {
            model.untie_lm_head();
            adapt(model)
        }
        adapted => adapted,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owner_and_name_may_be_on_the_hub_and_paths_may_not() {
        for name in ["owner/name", "owner/name@main", "a/b@refs/pr/1", "out/adapter"] {
            assert!(may_be_on_the_hub(name), "{name}");
        }
        for path in ["name", "/a/b", "./a", "../a", "~/a", "a/b/c", "a/", "/a", "", "@a/b"] {
            assert!(!may_be_on_the_hub(path), "{path}");
        }
    }

    #[test]
    fn an_existing_directory_wins_and_a_missing_one_is_told() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(adapter(dir.path()).unwrap(), dir.path());
        let text = directory_of_adapter(dir.path()).unwrap_err().to_string();
        assert!(text.contains("has no `adapter_config.json`") && text.contains("hint: "), "{text}");
        let text = adapter(dir.path().join("none")).unwrap_err().to_string();
        assert!(text.contains("there is no directory") && text.contains("`--adapter`"), "{text}");
    }
}
