//! The files of a tokenizer in a model directory.

use std::path::Path;

use serde_json::json;

use super::added_tokens::{ADDED_TOKENS_FILE, Beside, CONFIG_FILE, SPECIAL_TOKENS_FILE};
use super::{Tokenizer, json};
use crate::chat_template::TEMPLATE_FILE;
use crate::error::LlamaError;
use crate::file;

const TOKENIZER_FILE: &str = "tokenizer.json";

impl Tokenizer {
    /// Reads `tokenizer.json` of a model directory and, where they exist, `tokenizer_config.json`,
    /// `special_tokens_map.json`, `added_tokens.json` and the chat template.
    ///
    /// Special tokens that only the other files name are added as transformers 5 adds them: those of
    /// `added_tokens_decoder` or `added_tokens.json`, then `bos_token` and its like, then `extra_special_tokens` or
    /// `additional_special_tokens`. Their ids follow the vocabulary's, and may be beyond the model's.
    ///
    /// Truncation and padding that were saved inside `tokenizer.json` are switched off. What `tokenizer.json` says about
    /// spaces is followed: of SentencePiece tokenizers with `legacy: false` in `tokenizer_config.json`, transformers 5
    /// changes that, and puts no `▁` behind a special token such as `</s>` where `tokenizer.json` puts one.
    ///
    /// # Errors
    /// - [`LlamaError::ReadFile`] if `tokenizer.json` is missing or a file cannot be read,
    /// - [`LlamaError::WrongFile`] if a file is something else, such as a git-LFS pointer,
    /// - [`LlamaError::Json`] if a file is no JSON or has a field of another type,
    ///   [`LlamaError::Tokenizer`] if `tokenizer.json` is refused otherwise,
    /// - [`LlamaError::AddedTokenId`] if a file gives a token an id that it cannot have,
    /// - [`LlamaError::ChatTemplate`] if the chat template is malformed.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self, LlamaError> {
        let dir = dir.as_ref();
        let _lock = file::lock(dir)?;
        let text = file::read_in_model(dir, TOKENIZER_FILE)?;
        let mut inner = json::read(&dir.join(TOKENIZER_FILE), &text)?;
        let mut beside = Beside::read(dir)?;
        beside.add_to(&mut inner)?;
        Self::from_parts(inner, beside.special, beside.chat_template)
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and, if there is a chat template, `chat_template.jinja` into a
    /// directory, as transformers 5 reads them. The directory is made if there is none.
    ///
    /// All special tokens are in `tokenizer.json` then. Files of an earlier tokenizer that would add to it are removed:
    /// `special_tokens_map.json`, `added_tokens.json`, and a chat template if there is none now.
    ///
    /// Each file appears complete or not at all, and readers and writers of this crate wait for each other.
    ///
    /// # Errors
    /// [`LlamaError::WriteFile`] if a file cannot be written.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<(), LlamaError> {
        let dir = dir.as_ref();
        let tokenizer = self.inner.to_string(true).map_err(|source| LlamaError::Tokenizer {
            action: "write `tokenizer.json`".to_string(),
            source,
        })?;
        let mut config = json!({ "clean_up_tokenization_spaces": false });
        let named = [
            ("bos_token", &self.special.bos_token),
            ("eos_token", &self.special.eos_token),
            ("pad_token", &self.special.pad_token),
        ];
        for (field, token) in named {
            if let Some(token) = token {
                config[field] = json!(token);
            }
        }
        config["tokenizer_class"] = json!("PreTrainedTokenizerFast");

        let writer = file::writer(dir)?;
        let mut texts = vec![(TOKENIZER_FILE, tokenizer), (CONFIG_FILE, format!("{config:#}\n"))];
        let mut stale = vec![SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE];
        match &self.chat_template {
            Some(template) => texts.push((TEMPLATE_FILE, template.source().to_string())),
            None => stale.push(TEMPLATE_FILE),
        }
        let mut staged = vec![];
        for (name, text) in texts {
            let path = dir.join(name);
            staged.push((file::stage(&writer, &path, &text)?, path));
        }
        stale.into_iter().try_for_each(|name| file::remove(&writer, &dir.join(name)))?;
        staged.into_iter().try_for_each(|(file, path)| file::put(file, &path))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::tokenizer::tests::{TEXTS, chatml, llama3};

    #[test]
    fn a_saved_directory_loads_equal() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = llama3();
        tokenizer.save(dir.path()).unwrap();
        let loaded = Tokenizer::load(dir.path()).unwrap().with_date("2024-07-26").unwrap();
        assert_eq!(
            loaded.encode_with_special_tokens(TEXTS[1]).unwrap(),
            tokenizer.encode_with_special_tokens(TEXTS[1]).unwrap()
        );
        assert_eq!(loaded.special.eos_token.as_deref(), Some("<|eot_id|>"));
        assert_eq!(
            (loaded.bos_id, loaded.eos_id, loaded.pad_id),
            (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        );
        assert_eq!(loaded.chat_template(), tokenizer.chat_template());
    }

    #[test]
    fn tokens_are_read_as_text_or_object_and_the_map_fills_in() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        llama3().save(dir.path()).unwrap();
        write(
            CONFIG_FILE,
            r#"{"bos_token": {"content": "<|begin_of_text|>", "lstrip": false}, "pad_token": null}"#,
        );
        write(SPECIAL_TOKENS_FILE, r#"{"eos_token": {"content": "<|eot_id|>"}, "bos_token": "<|pad|>"}"#);
        let loaded = Tokenizer::load(dir.path()).unwrap();
        // As in transformers, the map goes before the configuration.
        assert_eq!(loaded.special.bos_token.as_deref(), Some("<|pad|>"));
        assert_eq!(loaded.special.eos_token.as_deref(), Some("<|eot_id|>"));
        assert_eq!((loaded.pad_id, loaded.pad_token_id()), (None, loaded.eos_id));
    }

    #[test]
    fn files_of_an_earlier_tokenizer_do_not_stay() {
        let dir = tempfile::tempdir().unwrap();
        llama3().save(dir.path()).unwrap();
        fs::write(dir.path().join(SPECIAL_TOKENS_FILE), r#"{"bos_token": "<other>"}"#).unwrap();
        fs::write(dir.path().join(ADDED_TOKENS_FILE), r#"{"<other>": 300}"#).unwrap();
        let special = crate::tokenizer::SpecialTokens::new("<s>", "</s>");
        let plain = Tokenizer::train_bpe(TEXTS, 300, special, None).unwrap();
        plain.save(dir.path().join("deeper")).unwrap();
        plain.save(dir.path()).unwrap();
        let loaded = Tokenizer::load(dir.path()).unwrap();
        assert_eq!(
            (loaded.special_tokens(), loaded.vocab_size()),
            (plain.special_tokens(), plain.vocab_size())
        );
        assert!(loaded.chat_template().is_none());
    }

    #[test]
    fn saved_truncation_and_padding_are_switched_off() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = chatml();
        let mut inner = (*tokenizer.inner).clone();
        inner
            .with_truncation(Some(tokenizers::TruncationParams { max_length: 2, ..Default::default() }))
            .unwrap();
        let strategy = tokenizers::PaddingStrategy::Fixed(64);
        inner.with_padding(Some(tokenizers::PaddingParams { strategy, ..Default::default() }));
        assert_eq!(inner.encode(TEXTS[0], false).unwrap().len(), 64);
        fs::write(dir.path().join(TOKENIZER_FILE), inner.to_string(false).unwrap()).unwrap();
        let loaded = Tokenizer::load(dir.path()).unwrap();
        assert_eq!(loaded.encode(TEXTS[0]).unwrap(), tokenizer.encode(TEXTS[0]).unwrap());
    }

    #[test]
    fn bad_directories_give_errors_that_name_the_file_or_token() {
        let dir = tempfile::tempdir().unwrap();
        let error = Tokenizer::load(dir.path()).unwrap_err();
        assert!(matches!(error, LlamaError::ReadFile { .. }) && error.to_string().contains("tokenizer.json"));
        fs::write(dir.path().join(TOKENIZER_FILE), "{}").unwrap();
        assert!(matches!(Tokenizer::load(dir.path()), Err(LlamaError::Tokenizer { .. })));
        chatml().save(dir.path()).unwrap();
        fs::write(dir.path().join(CONFIG_FILE), r#"{"eos_token": "<nope>"}"#).unwrap();
        assert_eq!(
            Tokenizer::load(dir.path()).unwrap().eos_token_id(),
            Some(300),
            "added, as transformers does"
        );
        fs::write(dir.path().join(CONFIG_FILE), "[").unwrap();
        assert!(matches!(Tokenizer::load(dir.path()), Err(LlamaError::Json { .. })));
        chatml().save(dir.path()).unwrap();
        for name in [TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE] {
            let path = dir.path().join(name);
            let before = fs::read(&path).unwrap();
            fs::write(&path, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n").unwrap();
            let error = Tokenizer::load(dir.path()).unwrap_err();
            assert!(matches!(&error, LlamaError::WrongFile { path: it, .. } if *it == path), "{error}");
            fs::write(&path, before).unwrap();
        }
        Tokenizer::load(dir.path()).unwrap();
    }
}
