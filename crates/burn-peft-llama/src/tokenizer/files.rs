//! The files of a tokenizer in a model directory.

use std::path::Path;

use serde::Deserialize;
use serde_json::json;

use super::{SpecialTokens, Tokenizer, special_tokens::TokenField};
use crate::{
    ChatTemplate, LlamaError,
    chat_template::{TEMPLATE_FILE, TemplateField},
    file,
};

const TOKENIZER_FILE: &str = "tokenizer.json";
const CONFIG_FILE: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_FILE: &str = "special_tokens_map.json";

/// The part of `tokenizer_config.json` and `special_tokens_map.json` that is read.
#[derive(Default, Deserialize)]
struct ConfigFile {
    bos_token: Option<TokenField>,
    eos_token: Option<TokenField>,
    pad_token: Option<TokenField>,
    chat_template: Option<TemplateField>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a model directory and, where they exist, `tokenizer_config.json`,
    /// `special_tokens_map.json` (for special tokens the former does not name) and the chat template.
    ///
    /// Truncation and padding that were saved inside `tokenizer.json` are switched off.
    ///
    /// # Errors
    ///
    /// - [`LlamaError::ReadText`] if `tokenizer.json` is missing or a file cannot be read,
    /// - [`LlamaError::Tokenizer`] if `tokenizer.json` is refused, [`LlamaError::TokenizerJson`] for the others,
    /// - [`LlamaError::UnknownSpecialToken`] if a special token is not in the vocabulary,
    /// - [`LlamaError::ChatTemplate`] if the chat template is malformed.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self, LlamaError> {
        let dir = dir.as_ref();
        let path = dir.join(TOKENIZER_FILE);
        let hint = "expected a model directory with a `tokenizer.json`; for models that only have a \
                    `tokenizer.model`, save the fast tokenizer with transformers first";
        let text = file::read(&path, hint)?;
        let inner = tokenizers::Tokenizer::from_bytes(text.as_bytes()).map_err(|source| {
            LlamaError::Tokenizer { action: format!("load `{}`", path.display()), source }
        })?;

        let config: ConfigFile =
            file::read_json_or_default(&dir.join(CONFIG_FILE), "it names the special tokens")?;
        let map: ConfigFile =
            file::read_json_or_default(&dir.join(SPECIAL_TOKENS_FILE), "it names the special tokens")?;
        let text = |a: Option<TokenField>, b: Option<TokenField>| a.or(b).map(TokenField::into_text);
        let special = SpecialTokens {
            bos_token: text(config.bos_token, map.bos_token),
            eos_token: text(config.eos_token, map.eos_token),
            pad_token: text(config.pad_token, map.pad_token),
            additional: Vec::new(),
        };
        let (bos, eos) = (special.bos_token.as_deref(), special.eos_token.as_deref());
        let chat_template = ChatTemplate::load(dir, config.chat_template, bos, eos)?;
        Self::from_parts(inner, special, chat_template)
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and, if there is a chat template, `chat_template.jinja`
    /// into an existing directory, as transformers 5 reads them.
    ///
    /// # Errors
    ///
    /// [`LlamaError::WriteText`] if a file cannot be written.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<(), LlamaError> {
        let dir = dir.as_ref();
        let tokenizer = self.inner.to_string(true).map_err(|source| LlamaError::Tokenizer {
            action: "write `tokenizer.json`".to_owned(),
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

        file::write(&dir.join(TOKENIZER_FILE), &tokenizer)?;
        file::write(&dir.join(CONFIG_FILE), &format!("{config:#}\n"))?;
        if let Some(template) = &self.chat_template {
            file::write(&dir.join(TEMPLATE_FILE), template.source())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
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
        let write = |name: &str, text: &str| file::write(&dir.path().join(name), text).unwrap();
        llama3().save(dir.path()).unwrap();
        write(
            CONFIG_FILE,
            r#"{"bos_token": {"content": "<|begin_of_text|>", "lstrip": false}, "pad_token": null}"#,
        );
        write(SPECIAL_TOKENS_FILE, r#"{"eos_token": {"content": "<|eot_id|>"}, "bos_token": "<|pad|>"}"#);
        let loaded = Tokenizer::load(dir.path()).unwrap();
        assert_eq!(loaded.special.bos_token.as_deref(), Some("<|begin_of_text|>"));
        assert_eq!(loaded.special.eos_token.as_deref(), Some("<|eot_id|>"));
        assert_eq!((loaded.pad_id, loaded.pad_token_id()), (None, loaded.eos_id));
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
        file::write(&dir.path().join(TOKENIZER_FILE), &inner.to_string(false).unwrap()).unwrap();
        let loaded = Tokenizer::load(dir.path()).unwrap();
        assert_eq!(loaded.encode(TEXTS[0]).unwrap(), tokenizer.encode(TEXTS[0]).unwrap());
    }

    #[test]
    fn bad_directories_give_errors_that_name_the_file_or_token() {
        let dir = tempfile::tempdir().unwrap();
        let error = Tokenizer::load(dir.path()).unwrap_err();
        assert!(matches!(error, LlamaError::ReadText { .. }) && error.to_string().contains("tokenizer.json"));
        file::write(&dir.path().join(TOKENIZER_FILE), "{}").unwrap();
        assert!(matches!(Tokenizer::load(dir.path()), Err(LlamaError::Tokenizer { .. })));
        chatml().save(dir.path()).unwrap();
        file::write(&dir.path().join(CONFIG_FILE), r#"{"eos_token": "<nope>"}"#).unwrap();
        assert!(matches!(
            Tokenizer::load(dir.path()),
            Err(LlamaError::UnknownSpecialToken { field: "eos_token", token }) if token == "<nope>"
        ));
        file::write(&dir.path().join(CONFIG_FILE), "[").unwrap();
        assert!(matches!(Tokenizer::load(dir.path()), Err(LlamaError::TokenizerJson { .. })));
    }
}
