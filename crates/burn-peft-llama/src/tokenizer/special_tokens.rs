//! The tokens that are never split, by their text.

use serde::Deserialize;
use tokenizers::AddedToken;

/// The special tokens of a tokenizer, by their text.
#[non_exhaustive]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begins a text. Default: none.
    pub bos_token: Option<String>,
    /// Ends a text or an answer. Default: none.
    pub eos_token: Option<String>,
    /// Fills up shorter sequences of a batch. Default: none.
    pub pad_token: Option<String>,
    /// Further tokens that are never split, such as those that separate messages. Default: none.
    pub additional: Vec<String>,
}

impl SpecialTokens {
    /// A token for the beginning and one for the end.
    pub fn new(bos_token: impl Into<String>, eos_token: impl Into<String>) -> Self {
        Self { bos_token: Some(bos_token.into()), eos_token: Some(eos_token.into()), ..Self::default() }
    }

    /// Sets the padding token.
    pub fn with_pad_token(mut self, pad_token: impl Into<String>) -> Self {
        self.pad_token = Some(pad_token.into());
        self
    }

    /// Adds further special tokens.
    pub fn with_additional<T: Into<String>>(mut self, tokens: impl IntoIterator<Item = T>) -> Self {
        self.additional.extend(tokens.into_iter().map(Into::into));
        self
    }

    /// All of them, each once, in the order of the fields.
    pub(super) fn all(&self) -> Vec<&str> {
        let mut all: Vec<&str> = vec![];
        let named = [&self.bos_token, &self.eos_token, &self.pad_token].into_iter().flatten();
        for token in named.chain(&self.additional) {
            if !token.is_empty() && !all.contains(&token.as_str()) {
                all.push(token);
            }
        }
        all
    }
}

/// A special token in a configuration file: its text, or an object that holds it.
#[derive(Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum TokenField {
    Text(String),
    Object {
        content: String,
        #[serde(default)]
        single_word: bool,
        #[serde(default)]
        lstrip: bool,
        #[serde(default)]
        rstrip: bool,
        normalized: Option<bool>,
        special: Option<bool>,
    },
}

impl TokenField {
    pub(super) fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Object { content: text, .. } => text,
        }
    }

    /// The token to add; `special` counts where the file does not say.
    pub(super) fn added(&self, default: bool) -> AddedToken {
        match self {
            Self::Text(text) => AddedToken::from(text.clone(), default),
            Self::Object { content, single_word, lstrip, rstrip, normalized, special } => {
                let special = special.unwrap_or(default);
                AddedToken::from(content.clone(), special)
                    .single_word(*single_word)
                    .lstrip(*lstrip)
                    .rstrip(*rstrip)
                    .normalized(normalized.unwrap_or(!special))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_token_is_listed_once_in_the_order_of_the_fields() {
        let special = SpecialTokens::new("", "</s>").with_pad_token("<pad>");
        let special = special.with_additional(["<a>", "</s>", "<a>"]);
        assert_eq!(special.all(), ["</s>", "<pad>", "<a>"]);
    }
}
