//! The tokens that other files of a tokenizer add to `tokenizer.json`, as transformers 5 adds them.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::AddedToken;

use super::special_tokens::TokenField;
use crate::chat_template::{ChatTemplate, TemplateField};
use crate::error::LlamaError;
use crate::file;
use crate::tokenizer::SpecialTokens;

pub(super) const CONFIG_FILE: &str = "tokenizer_config.json";
pub(super) const SPECIAL_TOKENS_FILE: &str = "special_tokens_map.json";
pub(super) const ADDED_TOKENS_FILE: &str = "added_tokens.json";

/// The part of `tokenizer_config.json` and `special_tokens_map.json` that is read.
#[derive(Default, Deserialize)]
struct ConfigFile {
    bos_token: Option<TokenField>,
    eos_token: Option<TokenField>,
    unk_token: Option<TokenField>,
    sep_token: Option<TokenField>,
    pad_token: Option<TokenField>,
    cls_token: Option<TokenField>,
    mask_token: Option<TokenField>,
    added_tokens_decoder: Option<BTreeMap<u32, TokenField>>,
    additional_special_tokens: Option<Tokens>,
    extra_special_tokens: Option<Tokens>,
    chat_template: Option<TemplateField>,
    /// Tokens of other names, such as `image_token`, and everything else.
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

/// Tokens with names or without.
#[derive(Deserialize)]
#[serde(untagged)]
enum Tokens {
    List(Vec<TokenField>),
    Named(BTreeMap<String, TokenField>),
}

impl Tokens {
    fn into_list(self) -> Vec<TokenField> {
        match self {
            Self::List(tokens) => tokens,
            Self::Named(tokens) => tokens.into_values().collect(),
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::List(tokens) => tokens.is_empty(),
            Self::Named(tokens) => tokens.is_empty(),
        }
    }
}

/// What the files beside `tokenizer.json` say.
pub(super) struct Beside {
    pub(super) special: SpecialTokens,
    pub(super) chat_template: Option<ChatTemplate>,
    /// In the order in which they get their ids.
    tokens: Vec<AddedToken>,
    /// The ids that a file gives them.
    ids: BTreeMap<u32, String>,
}

impl Beside {
    /// Reads the files. With `added_tokens_decoder`, transformers reads neither `special_tokens_map.json` nor
    /// `added_tokens.json`; without it, the former goes before `tokenizer_config.json`.
    pub(super) fn read(dir: &Path) -> Result<Self, LlamaError> {
        let hint = "it names the special tokens";
        let mut config: ConfigFile = file::read_json_or_default(&dir.join(CONFIG_FILE), hint)?;
        let map: ConfigFile = file::read_json_or_default(&dir.join(SPECIAL_TOKENS_FILE), hint)?;
        let mut added: BTreeMap<String, u32> = BTreeMap::new();
        if config.added_tokens_decoder.is_none() {
            config = map.over(config);
            added = file::read_json_or_default(&dir.join(ADDED_TOKENS_FILE), hint)?;
        } else {
            // A name that only the older file has is better than none.
            config = config.over(ConfigFile {
                additional_special_tokens: None,
                extra_special_tokens: None,
                ..map
            });
        }

        let text = |token: &Option<TokenField>| {
            token.as_ref().map(TokenField::text).filter(|text| !text.is_empty()).map(str::to_string)
        };
        let special = SpecialTokens {
            bos_token: text(&config.bos_token),
            eos_token: text(&config.eos_token),
            pad_token: text(&config.pad_token),
            additional: vec![],
        };
        let (bos, eos) = (special.bos_token.as_deref(), special.eos_token.as_deref());
        let chat_template = ChatTemplate::load(dir, config.chat_template, bos, eos)?;

        let extra = config.extra_special_tokens.filter(|tokens| !tokens.is_empty());
        let extra = extra.or(config.additional_special_tokens).map(Tokens::into_list).unwrap_or_default();
        let other = config.others.into_iter().filter(|(name, _)| name.ends_with("_token"));
        let other =
            other.filter_map(|(_, value)| value.as_str().map(|text| TokenField::Text(text.to_string())));
        let named = [
            config.bos_token,
            config.eos_token,
            config.unk_token,
            config.sep_token,
            config.pad_token,
            config.cls_token,
            config.mask_token,
        ];
        let special_fields: Vec<TokenField> = named.into_iter().flatten().chain(other).chain(extra).collect();
        let is_special = |text: &str| special_fields.iter().any(|token| token.text() == text);

        let mut tokens = vec![];
        let mut ids = BTreeMap::new();
        for (id, token) in config.added_tokens_decoder.unwrap_or_default() {
            ids.insert(id, token.text().to_string());
            tokens.push(token.added(false));
        }
        let mut added: Vec<(String, u32)> = added.into_iter().collect();
        added.sort_by_key(|(_, id)| *id);
        for (text, id) in added {
            let special = is_special(&text);
            tokens.push(AddedToken::from(text.clone(), special));
            ids.insert(id, text);
        }
        // In `tokenizers`, what is there already stays as it is.
        tokens.extend(special_fields.iter().map(|token| token.added(true)));
        tokens.retain(|token| !token.content.is_empty());
        Ok(Self { special, chat_template, tokens, ids })
    }

    /// Adds the tokens that a tokenizer does not have, and lists its special ones.
    ///
    /// # Errors
    /// [`LlamaError::AddedTokenId`] if a token gets another id than its file says.
    pub(super) fn add_to(&mut self, inner: &mut tokenizers::Tokenizer) -> Result<(), LlamaError> {
        inner.add_tokens(&self.tokens);
        for (&expected, token) in &self.ids {
            let found = inner.token_to_id(token);
            if found != Some(expected) {
                return Err(LlamaError::AddedTokenId { token: token.clone(), expected, found });
            }
        }
        let named = [&self.special.bos_token, &self.special.eos_token, &self.special.pad_token];
        let mut special: Vec<(u32, String)> = inner
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| {
                token.special && !named.iter().any(|name| name.as_ref() == Some(&token.content))
            })
            .map(|(id, token)| (id, token.content))
            .collect();
        special.sort();
        self.special.additional = special.into_iter().map(|(_, token)| token).collect();
        Ok(())
    }
}

impl ConfigFile {
    /// The fields of `self`, and those of `other` that it does not have.
    fn over(self, other: Self) -> Self {
        Self {
            bos_token: self.bos_token.or(other.bos_token),
            eos_token: self.eos_token.or(other.eos_token),
            unk_token: self.unk_token.or(other.unk_token),
            sep_token: self.sep_token.or(other.sep_token),
            pad_token: self.pad_token.or(other.pad_token),
            cls_token: self.cls_token.or(other.cls_token),
            mask_token: self.mask_token.or(other.mask_token),
            added_tokens_decoder: self.added_tokens_decoder.or(other.added_tokens_decoder),
            additional_special_tokens: self.additional_special_tokens.or(other.additional_special_tokens),
            extra_special_tokens: self.extra_special_tokens.or(other.extra_special_tokens),
            chat_template: self.chat_template.or(other.chat_template),
            others: other.others.into_iter().chain(self.others).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use crate::error::LlamaError;
    use crate::tokenizer::Tokenizer;
    use crate::tokenizer::tests::chatml;

    /// A directory with the tokenizer of the tests, 300 tokens, and other files.
    fn load(files: &[(&str, &str)]) -> Result<Tokenizer, LlamaError> {
        let dir = tempfile::tempdir().unwrap();
        chatml().save(dir.path()).unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let loaded = Tokenizer::load(dir.path())?;
        // What is loaded is saved whole, whatever files it came from.
        let again = tempfile::tempdir().unwrap();
        loaded.save(again.path()).unwrap();
        let saved = Tokenizer::load(again.path()).unwrap();
        let text = "a  <tool_call> <x>b<|im_end|>";
        assert_eq!(saved.encode(text).unwrap(), loaded.encode(text).unwrap());
        assert_eq!(saved.special_tokens(), loaded.special_tokens());
        Ok(loaded)
    }

    fn config(fields: &str) -> Vec<(&'static str, String)> {
        vec![("tokenizer_config.json", format!("{{{fields}}}"))]
    }

    fn loaded(files: &[(&'static str, String)]) -> Tokenizer {
        let files: Vec<_> = files.iter().map(|(name, text)| (*name, text.as_str())).collect();
        load(&files).unwrap()
    }

    #[test]
    fn special_tokens_of_every_file_are_one_token_each() {
        // Ids and order as transformers 5.23 gives them. It refuses the object, which files of older releases have.
        for files in [
            config(r#""added_tokens_decoder": {"300": {"content": "<tool_call>", "special": true}}"#),
            config(r#""additional_special_tokens": ["<tool_call>", "<x>"]"#),
            config(r#""additional_special_tokens": [{"content": "<tool_call>", "lstrip": false}]"#),
            config(r#""extra_special_tokens": ["<tool_call>"], "additional_special_tokens": ["<y>"]"#),
            config(r#""extra_special_tokens": {"tool_token": "<tool_call>"}"#),
            config(r#""tool_token": "<tool_call>""#),
            config(r#""unk_token": "<tool_call>""#),
            vec![(
                "special_tokens_map.json",
                r#"{"additional_special_tokens": ["<tool_call>"]}"#.to_string(),
            )],
            [
                config(r#""additional_special_tokens": ["<tool_call>"]"#),
                vec![("added_tokens.json", r#"{"<tool_call>": 300}"#.to_string())],
            ]
            .concat(),
        ] {
            let tokenizer = loaded(&files);
            let ids = tokenizer.encode("a<tool_call>b").unwrap();
            assert_eq!((ids.len(), ids[1]), (3, 300), "{files:?}");
            assert!(tokenizer.is_special(300), "{files:?}");
            assert!(tokenizer.special_tokens().additional.contains(&"<tool_call>".to_string()), "{files:?}");
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), "ab");
            assert_eq!(tokenizer.token_to_id("<y>"), None);
        }
    }

    #[test]
    fn the_flags_of_an_added_token_count() {
        let token = r#"{"content": "<tool_call>", "lstrip": true, "rstrip": false, "special": false}"#;
        let tokenizer = loaded(&config(&format!(r#""added_tokens_decoder": {{"300": {token}}}"#)));
        assert_eq!(tokenizer.encode("a  <tool_call>").unwrap()[1..], [300]);
        assert!(!tokenizer.is_special(300));
    }

    #[test]
    fn with_a_decoder_the_older_files_add_nothing() {
        let mut files = config(r#""added_tokens_decoder": {}, "eos_token": "<|im_end|>""#);
        files.push((
            "special_tokens_map.json",
            r#"{"additional_special_tokens": ["<tool_call>"]}"#.to_string(),
        ));
        files.push(("added_tokens.json", r#"{"<x>": 300}"#.to_string()));
        let tokenizer = loaded(&files);
        assert_eq!((tokenizer.token_to_id("<tool_call>"), tokenizer.token_to_id("<x>")), (None, None));
    }

    #[test]
    fn named_tokens_that_are_not_in_the_vocabulary_are_added_in_the_order_of_transformers() {
        let fields = r#""pad_token": "<p>", "eos_token": "<e>", "bos_token": "<b>", "additional_special_tokens": ["<x>"]"#;
        let tokenizer = loaded(&config(fields));
        let ids = [tokenizer.bos_token_id(), tokenizer.eos_token_id(), tokenizer.pad_token_id()];
        assert_eq!((ids, tokenizer.token_to_id("<x>")), ([Some(300), Some(301), Some(302)], Some(303)));
        assert_eq!(tokenizer.vocab_size(), 304);
    }

    #[test]
    fn what_is_in_the_vocabulary_keeps_its_id_and_becomes_special() {
        // The first merge: two letters that are one token.
        let id = 258;
        let token = chatml().id_to_token(id).unwrap();
        let tokenizer = loaded(&config(&format!(r#""additional_special_tokens": ["{token}"]"#)));
        assert_eq!((token.chars().count(), tokenizer.token_to_id(&token)), (2, Some(id)));
        assert!(tokenizer.is_special(id) && !chatml().is_special(id));
    }

    #[test]
    fn an_id_that_the_token_cannot_have_is_refused_by_name() {
        for (name, text, wrong) in [
            ("tokenizer_config.json", r#"{"added_tokens_decoder": {"305": {"content": "<x>"}}}"#, 305),
            ("tokenizer_config.json", r#"{"added_tokens_decoder": {"50": {"content": "<x>"}}}"#, 50),
            ("added_tokens.json", r#"{"<x>": 301}"#, 301),
        ] {
            let error = load(&[(name, text)]).unwrap_err();
            let LlamaError::AddedTokenId { token, expected, found } = &error else { panic!("{error}") };
            assert_eq!((token.as_str(), *expected, *found), ("<x>", wrong, Some(300)));
            assert!(error.to_string().contains("hint: "), "{error}");
        }
    }
}
