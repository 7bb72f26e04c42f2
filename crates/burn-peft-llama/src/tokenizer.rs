//! The tokenizer of a model directory: text to token ids and back.

mod added_tokens;
mod bpe;
mod files;
mod json;
mod special_tokens;

use std::collections::HashSet;
use std::sync::Arc;

use tokenizers::AddedToken;

use crate::chat_template::ChatTemplate;
use crate::error::LlamaError;

pub use special_tokens::SpecialTokens;

/// A tokenizer with its special tokens and chat template.
///
/// Cloning is cheap. Conversations are encoded by [`encode_prompt`](Self::encode_prompt) and
/// [`encode_conversation`](Self::encode_conversation).
///
/// ```
/// use burn_peft_llama::{SpecialTokens, Tokenizer};
///
/// # fn main() -> Result<(), burn_peft_llama::LlamaError> {
/// let texts = ["low lower lowest", "new newer newest"];
/// let tokenizer = Tokenizer::train_bpe(texts, 270, SpecialTokens::new("<s>", "</s>"), None)?;
/// let ids = tokenizer.encode("lowest")?;
/// assert_eq!(tokenizer.decode(&ids, true)?, "lowest");
/// assert!(ids.len() < "lowest".len());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    special: SpecialTokens,
    bos_id: Option<u32>,
    eos_id: Option<u32>,
    pad_id: Option<u32>,
    special_ids: Arc<HashSet<u32>>,
    chat_template: Option<ChatTemplate>,
}

impl Tokenizer {
    /// Puts a tokenizer together from a `tokenizers` one, its special tokens and a chat template. All special tokens
    /// must be in the vocabulary; they become special, if they are not yet.
    ///
    /// # Errors
    /// [`LlamaError::UnknownSpecialToken`] if a special token is not in the vocabulary.
    pub fn from_parts(
        mut inner: tokenizers::Tokenizer,
        special: SpecialTokens,
        chat_template: Option<ChatTemplate>,
    ) -> Result<Self, LlamaError> {
        // Saved truncation would silently cut training examples and move their labels.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|source| LlamaError::Tokenizer {
            action: "switch truncation off".to_string(),
            source,
        })?;

        let id = |field: &'static str, token: &Option<String>| match token {
            None => Ok(None),
            Some(token) => match inner.token_to_id(token) {
                Some(id) => Ok(Some(id)),
                None => Err(LlamaError::UnknownSpecialToken { field, token: token.clone() }),
            },
        };
        let bos_id = id("bos_token", &special.bos_token)?;
        let eos_id = id("eos_token", &special.eos_token)?;
        let pad_id = id("pad_token", &special.pad_token)?;
        for token in &special.additional {
            id("additional", &Some(token.clone()))?;
        }
        let tokens: Vec<_> = special.all().into_iter().map(|token| AddedToken::from(token, true)).collect();
        inner.add_special_tokens(&tokens);
        let added = inner.get_added_tokens_decoder();
        let special_ids = added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id);
        let special_ids = special_ids.chain(eos_id).collect();
        Ok(Self {
            inner: Arc::new(inner),
            special,
            bos_id,
            eos_id,
            pad_id,
            special_ids: Arc::new(special_ids),
            chat_template,
        })
    }

    /// Replaces the chat template.
    pub fn with_chat_template(mut self, chat_template: ChatTemplate) -> Self {
        self.chat_template = Some(chat_template);
        self
    }

    /// Fixes the date that the chat template sees, see [`ChatTemplate::with_date`]. Without a template, nothing
    /// changes.
    ///
    /// # Errors
    /// [`LlamaError::InvalidDate`] if `date` is not one.
    pub fn with_date(mut self, date: &str) -> Result<Self, LlamaError> {
        self.chat_template = self.chat_template.map(|template| template.with_date(date)).transpose()?;
        Ok(self)
    }

    /// Token ids of `text`. Special tokens written out in `text` are recognised; none is added.
    ///
    /// # Errors
    /// [`LlamaError::Tokenizer`] if the tokenizer cannot express the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, LlamaError> {
        Ok(self.encoding(text, false)?.get_ids().to_vec())
    }

    /// Token ids of `text` with the special tokens around it that the model expects of a text, such as one for its
    /// beginning. Not for rendered chats: they hold theirs already.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_with_special_tokens(&self, text: &str) -> Result<Vec<u32>, LlamaError> {
        Ok(self.encoding(text, true)?.get_ids().to_vec())
    }

    /// Text of token ids, without the special ones if `skip_special_tokens`.
    ///
    /// # Errors
    /// [`LlamaError::Tokenizer`] if the tokenizer's decoder fails. Unknown ids are left out, as transformers does.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, LlamaError> {
        self.inner
            .decode(ids, skip_special_tokens)
            .map_err(|source| LlamaError::Tokenizer { action: format!("decode {} ids", ids.len()), source })
    }

    /// The chat template, if the model has one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// The special tokens by their text. For a loaded tokenizer, `additional` has all that are no `bos_token`,
    /// `eos_token` or `pad_token`, in the order of their ids.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special
    }

    /// Id of the token that begins a text.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.bos_id
    }

    /// Id of the token that ends a text or an answer.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.eos_id
    }

    /// Id to pad with: the padding token, or the end token where the model has none.
    pub fn pad_token_id(&self) -> Option<u32> {
        self.pad_id.or(self.eos_id)
    }

    /// Id of the token with exactly this text.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Text of a token as the vocabulary has it.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Number of tokens, added ones included. A model's `vocab_size` may be larger.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The tokenizer without what this crate adds.
    pub(crate) fn inner(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }

    /// Whether a token is marked as special, or is the end token.
    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.special_ids.contains(&id)
    }

    pub(crate) fn encoding(&self, text: &str, add_special: bool) -> Result<tokenizers::Encoding, LlamaError> {
        self.inner.encode(text, add_special).map_err(|source| LlamaError::Tokenizer {
            action: format!("encode {} bytes", text.len()),
            source,
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::chat_template::tests::{CHATML, LLAMA3};

    pub(super) const TEXTS: [&str; 4] = [
        "Bulbasaur is of type grass and poison.",
        "Charmander is of type fire.",
        "Squirtle is of type water.",
        "<|im_start|>user\nSquirtle<|im_end|>\n",
    ];

    /// A ChatML tokenizer whose end token is its padding token.
    pub(crate) fn chatml() -> Tokenizer {
        let special = SpecialTokens { bos_token: None, ..SpecialTokens::new("", "<|im_end|>") };
        let special = special.with_pad_token("<|im_end|>").with_additional(["<|im_start|>"]);
        Tokenizer::train_bpe(TEXTS, 300, special, Some(CHATML)).unwrap()
    }

    /// A tokenizer in the manner of Llama 3: a beginning of its own, headers, padding apart.
    pub(crate) fn llama3() -> Tokenizer {
        let special = SpecialTokens::new("<|begin_of_text|>", "<|eot_id|>")
            .with_pad_token("<|pad|>")
            .with_additional(["<|start_header_id|>", "<|end_header_id|>"]);
        let tokenizer = Tokenizer::train_bpe(TEXTS, 300, special, Some(LLAMA3)).unwrap();
        tokenizer.with_date("2024-07-26").unwrap()
    }

    #[test]
    fn any_text_round_trips_and_special_tokens_stay_whole() {
        let tokenizer = chatml();
        let text = "é 日本 🦀\t\u{0}";
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        let ids = tokenizer.encode("<|im_start|>a<|im_end|>").unwrap();
        assert_eq!((ids[0], ids.len(), ids[2]), (1, 3, 0));
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), "<|im_start|>a<|im_end|>");
    }

    #[test]
    fn the_beginning_is_added_only_when_asked_for() {
        let tokenizer = llama3();
        let plain = tokenizer.encode("fire").unwrap();
        assert_ne!(plain[0], 0);
        let with = tokenizer.encode_with_special_tokens("fire").unwrap();
        assert_eq!((with[0], &with[1..]), (0, plain.as_slice()));
        assert_eq!(tokenizer.bos_token_id(), Some(0));
        assert_eq!(tokenizer.pad_token_id(), tokenizer.token_to_id("<|pad|>"));
        assert_eq!(chatml().encode_with_special_tokens("fire").unwrap(), chatml().encode("fire").unwrap());
    }
}
