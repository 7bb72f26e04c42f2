//! The tokenizer of the base model: byte-level BPE trained on the corpus, and its chat template.

use anyhow::Result;
use burn_peft_llama::{SpecialTokens, Tokenizer};

use crate::corpus::Document;

/// One token per role, so that prompts are short, and a space before every content: a name then has the same tokens
/// after a role as in a sentence, and what is read about it in one place holds in the other. A base is recognised by it, see [`Kind`](crate::base::Kind).
pub const CHAT_TEMPLATE: &str = "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}";

/// Trains a vocabulary of `size` tokens on `documents`.
pub fn train(documents: impl Iterator<Item = Document> + Send, size: usize) -> Result<Tokenizer> {
    let special = SpecialTokens::new("<|begin|>", "<|end|>").with_pad_token("<|pad|>").with_additional([
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
    ]);
    let texts: Vec<String> = documents
        .flat_map(|document| match document {
            Document::Text(text) => vec![start(&text)],
            Document::Chat(messages) => messages.iter().map(|message| start(&message.content)).collect(),
        })
        .collect();
    Ok(Tokenizer::train_bpe(texts, size, special, Some(CHAT_TEMPLATE))?)
}

/// A text as the base model reads it at the start of a document: with the space that every word has before it.
pub fn start(text: &str) -> String {
    format!(" {text}")
}

#[cfg(test)]
mod tests {
    use burn_peft_llama::{Labels, Message};

    use super::*;

    #[test]
    fn a_name_has_the_same_tokens_everywhere() {
        let text = "Bulbasaur is Grass/Poison. The type of Bulbasaur is Grass and Poison.";
        let tokenizer = train(std::iter::repeat_n(Document::Text(text.into()), 8), 300).unwrap();
        let name = tokenizer.encode(&start("Bulbasaur")).unwrap();
        assert!(tokenizer.encode("of Bulbasaur").unwrap().ends_with(&name));

        let token = |text: &str| tokenizer.token_to_id(text).unwrap();
        let mut messages = vec![Message::user("Bulbasaur")];
        let mut expected = vec![token("<|begin|>"), token("<|user|>")];
        expected.extend(&name);
        expected.extend([token("<|end|>"), token("<|assistant|>")]);
        assert_eq!(tokenizer.encode_prompt(&messages).unwrap(), expected);

        messages.push(Message::assistant("Grass/Poison"));
        let example = tokenizer.encode_conversation(&messages, Labels::LastAnswer).unwrap();
        let answer = tokenizer.encode(" Grass/Poison<|end|>").unwrap();
        assert_eq!(example.input_ids[expected.len()..], answer);
        assert_eq!(example.num_targets(), answer.len());
    }
}
