//! The base model that is part of the program, as a directory.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use burn_peft_examples::model::directory;
use burn_peft_llama::Tokenizer;
use serde::Serialize;
use tempfile::TempDir;

use crate::vocabulary;

/// Everything that loading the model takes. `pretrain` makes these files.
const FILES: [(&str, &[u8]); 5] = [
    ("config.json", include_bytes!("base/config.json")),
    ("model.safetensors", include_bytes!("base/model.safetensors")),
    ("tokenizer.json", include_bytes!("base/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("base/tokenizer_config.json")),
    ("chat_template.jinja", include_bytes!("base/chat_template.jinja")),
];

/// What a base model has read decides on what else it is asked, and on the defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Made by `pretrain`, as the embedded one: it knows species and nothing else.
    Pretrained,
    /// Any other model.
    General,
}

impl Kind {
    /// The kind of the base with this tokenizer. The chat template tells: no other model has the one of `pretrain`, and
    /// it stays with a copy, a renamed directory, or a model that an adapter was merged into.
    pub fn of(tokenizer: &Tokenizer) -> Self {
        match tokenizer.chat_template() {
            Some(template) if template.source() == vocabulary::CHAT_TEMPLATE => Self::Pretrained,
            _ => Self::General,
        }
    }
}

/// A base model on disk: the user's directory, or the embedded files in a temporary one that goes with this value.
pub struct Base {
    path: PathBuf,
    unpacked: Option<TempDir>,
}

impl Base {
    /// The model that the user named, or the embedded base.
    pub fn new(model: Option<&str>) -> Result<Self> {
        let Some(model) = model else { return Self::unpack() };
        let path = directory(model, "; leave it out for the embedded base")?;
        Ok(Self { path, unpacked: None })
    }

    fn unpack() -> Result<Self> {
        let dir =
            tempfile::Builder::new().prefix("pokemon-base-").tempdir().context("no temporary directory")?;
        for (name, bytes) in FILES {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes)
                .with_context(|| format!("`{}` cannot be written", path.display()))?;
        }
        Ok(Self { path: dir.path().to_path_buf(), unpacked: Some(dir) })
    }

    /// Where the files are.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file that has the chat template.
    pub fn chat_template(&self) -> PathBuf {
        let file = self.path.join("chat_template.jinja");
        if file.is_file() { file } else { self.path.join("tokenizer_config.json") }
    }

    /// What the report calls it.
    pub fn name(&self) -> String {
        if self.unpacked.is_some() {
            "the embedded base".into()
        } else {
            format!("`{}`", self.path.display())
        }
    }
}

/// What an adapter's files call the base.
pub fn name_or_path(model: Option<&str>) -> &str {
    model.map_or("examples/pokemon/base", burn_peft_examples::model::name_or_path)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use burn_peft_llama::{ChatTemplate, LlamaForCausalLm};

    use super::*;

    #[test]
    fn the_embedded_files_are_a_model() {
        let base = Base::new(None).unwrap();
        let tokenizer = Tokenizer::load(base.path()).unwrap();
        let model = LlamaForCausalLm::from_pretrained(base.path(), &Device::flex()).unwrap();
        assert_eq!(model.config().vocab_size, tokenizer.vocab_size());
        assert_eq!(Kind::of(&tokenizer), Kind::Pretrained);
        let other = ChatTemplate::new("{{ messages }}", None, None).unwrap();
        assert_eq!(Kind::of(&tokenizer.with_chat_template(other)), Kind::General);
        assert!(FILES.iter().map(|(_, bytes)| bytes.len()).sum::<usize>() < 12 << 20);
    }

    #[test]
    fn a_directory_without_a_model_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let text = Base::new(dir.path().to_str()).err().unwrap().to_string();
        assert!(text.contains("config.json") && text.contains("hint:"), "{text}");
        assert!(Base::new(Some("no such directory")).is_err());
        let file = dir.path().join("config.json");
        std::fs::write(&file, "{}").unwrap();
        for (model, expected) in [(file.to_str().unwrap(), "is a file"), ("", "`--model` is empty")] {
            let text = Base::new(Some(model)).err().unwrap().to_string();
            assert!(text.contains(expected) && !text.contains("Hub"), "{text}");
        }
    }

    #[test]
    fn an_adapter_names_its_base_without_a_revision() {
        let dir = tempfile::Builder::new().prefix("a@b").tempdir().unwrap();
        let dir = dir.path().to_str().unwrap();
        assert_eq!(name_or_path(Some(dir)), dir);
        assert_eq!(name_or_path(Some("owner/name@main")), "owner/name");
        assert!(Path::new("..").join(name_or_path(None)).join("config.json").is_file());
    }
}
