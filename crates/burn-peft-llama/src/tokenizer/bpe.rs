//! Training of a byte-level BPE tokenizer.

use tokenizers::AddedToken;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;

use super::{SpecialTokens, Tokenizer};
use crate::chat_template::ChatTemplate;
use crate::error::LlamaError;

impl Tokenizer {
    /// Trains a byte-level BPE tokenizer.
    ///
    /// The vocabulary holds the special tokens first, in the order of [`SpecialTokens`]' fields, then the 256
    /// bytes, then merges, `vocab_size` in all or fewer if `texts` has no more pairs to merge. Special tokens inside
    /// `texts` are left out of the training. If there is a `bos_token`, it begins every text that is encoded with
    /// special tokens. `chat_template` is the source of a Jinja template.
    ///
    /// # Errors
    /// - [`LlamaError::InvalidOption`] if `vocab_size` does not hold the special tokens and bytes,
    /// - [`LlamaError::ChatTemplate`] if the template is malformed,
    /// - [`LlamaError::Tokenizer`] if the trainer fails.
    pub fn train_bpe<I>(
        texts: I,
        vocab_size: usize,
        special: SpecialTokens,
        chat_template: Option<&str>,
    ) -> Result<Self, LlamaError>
    where
        I: IntoIterator<Item: AsRef<str>, IntoIter: Send>,
    {
        let failed = |source| LlamaError::Tokenizer { action: "train".to_string(), source };
        let tokens: Vec<String> = special.all().into_iter().map(str::to_string).collect();
        if vocab_size < tokens.len() + 256 {
            return Err(LlamaError::InvalidOption {
                option: "vocab_size",
                expected: "room for 256 bytes and the special tokens",
                found: vocab_size.to_string(),
            });
        }

        let mut inner = tokenizers::Tokenizer::new(BPE::default());
        inner.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        inner.with_decoder(Some(ByteLevel::default()));
        let trainer = BpeTrainerBuilder::new()
            .vocab_size(vocab_size)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(tokens.iter().map(|token| AddedToken::from(token.as_str(), true)).collect())
            .build();
        let separators = tokens.clone();
        let pieces = texts.into_iter().flat_map(move |text| split_out(text.as_ref(), &separators));
        inner.train(&mut TrainerWrapper::from(trainer), pieces).map_err(failed)?;
        if let Some((bos, id)) =
            special.bos_token.as_ref().and_then(|bos| Some((bos, inner.token_to_id(bos)?)))
        {
            let processor = TemplateProcessing::builder()
                .try_single(vec![bos.as_str(), "$A"])
                .map_err(|error| failed(error.into()))?
                .special_tokens(vec![(bos.clone(), id)])
                .build()
                .map_err(|error| failed(error.into()))?;
            inner.with_post_processor(Some(processor));
        }

        let (bos, eos) = (special.bos_token.as_deref(), special.eos_token.as_deref());
        let chat_template = chat_template.map(|source| ChatTemplate::new(source, bos, eos)).transpose()?;
        Self::from_parts(inner, special, chat_template)
    }
}

/// The parts of `text` between special tokens.
fn split_out(text: &str, special: &[String]) -> Vec<String> {
    let mut parts = vec![text.to_string()];
    for token in special {
        parts = parts.iter().flat_map(|part| part.split(token.as_str())).map(str::to_string).collect();
    }
    parts.retain(|part| !part.is_empty());
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::{TEXTS, chatml};

    #[test]
    fn training_fills_the_vocabulary_in_order_and_is_repeatable() {
        let tokenizer = chatml();
        assert_eq!(tokenizer.vocab_size(), 300);
        assert_eq!(tokenizer.token_to_id("<|im_end|>"), Some(0));
        assert_eq!(tokenizer.token_to_id("<|im_start|>"), Some(1));
        assert_eq!((tokenizer.eos_token_id(), tokenizer.pad_token_id()), (Some(0), Some(0)));
        let ids = tokenizer.encode(TEXTS[0]).unwrap();
        assert!(ids.len() < TEXTS[0].len() / 2, "{ids:?}");
        assert_eq!(ids, chatml().encode(TEXTS[0]).unwrap());
        // No merge was learnt inside the special tokens of the training text.
        assert!(tokenizer.token_to_id("im").is_none() && tokenizer.token_to_id("start").is_none());
    }

    #[test]
    fn a_vocabulary_without_room_for_bytes_and_special_tokens_is_refused() {
        let small = Tokenizer::train_bpe(TEXTS, 257, SpecialTokens::new("<s>", "</s>"), None);
        assert!(matches!(small, Err(LlamaError::InvalidOption { option: "vocab_size", .. })));
    }
}
