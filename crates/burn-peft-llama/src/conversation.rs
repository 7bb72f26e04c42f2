//! Conversations and documents to examples: token ids and which of them are learnt.

use crate::chat_template::ChatTemplate;
use crate::error::LlamaError;
use crate::message::Message;
use crate::tokenizer::Tokenizer;

/// The label of a token that is not learnt.
pub const IGNORE_INDEX: i64 = -100;

/// A token sequence to learn from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Example {
    /// The tokens.
    pub input_ids: Vec<u32>,
    /// For each token the token itself if it is learnt, [`IGNORE_INDEX`] if not. Not shifted: `labels[i]` is about
    /// `input_ids[i]`.
    pub labels: Vec<i64>,
}

impl Example {
    /// An example that teaches the tokens `start..end`.
    fn labelled(input_ids: Vec<u32>, start: usize, end: usize) -> Self {
        let label =
            |(i, &id): (usize, &u32)| if (start..end).contains(&i) { i64::from(id) } else { IGNORE_INDEX };
        let labels = input_ids.iter().enumerate().map(label).collect();
        Self { input_ids, labels }
    }

    /// Number of tokens that are learnt. A label of the first token does not count, as nothing predicts it.
    pub fn num_targets(&self) -> usize {
        self.labels.iter().skip(1).filter(|&&label| label != IGNORE_INDEX).count()
    }
}

/// Which tokens of a conversation are learnt.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Labels {
    /// The last message and the end token after it.
    #[default]
    Answer,
    /// All of them.
    Everything,
}

impl Tokenizer {
    /// Renders `messages` and tokenises them up to where the assistant's answer begins.
    ///
    /// # Errors
    /// - [`LlamaError::NoChatTemplate`] if the model has none,
    /// - otherwise as [`ChatTemplate::render`] and [`encode`](Self::encode).
    pub fn encode_prompt(&self, messages: &[Message]) -> Result<Vec<u32>, LlamaError> {
        // The template wrote the special tokens, so none is added here.
        self.encode(&self.template()?.render(messages, true)?)
    }

    /// Renders and tokenises a conversation that ends with the assistant's answer, and marks what is learnt.
    ///
    /// With [`Labels::Answer`] that is the answer and the end token after it, so that the model learns to stop, but
    /// not the line break that some templates put behind the end token. The prompt is masked by its length: it is
    /// rendered and tokenised on its own, exactly as [`encode_prompt`](Self::encode_prompt) will do when the model
    /// is asked, and must be the beginning of the whole. No token is ever compared with the padding token.
    ///
    /// # Errors
    /// - [`LlamaError::NoAnswer`] if the last message is not the assistant's,
    /// - [`LlamaError::PromptNotPrefix`] and [`LlamaError::TokenBoundary`] if the prompt is not the beginning of the
    ///   whole as text or as tokens,
    /// - [`LlamaError::NoEndToken`] if no special token follows the answer,
    /// - those of [`encode_prompt`](Self::encode_prompt).
    pub fn encode_conversation(&self, messages: &[Message], labels: Labels) -> Result<Example, LlamaError> {
        let (answer, before) = match messages.split_last() {
            Some((last, before)) if last.role == "assistant" => (last, before),
            Some((last, _)) => return Err(LlamaError::NoAnswer { found: format!("`{}`", last.role) }),
            None => return Err(LlamaError::NoAnswer { found: "no messages".to_string() }),
        };
        let template = self.template()?;
        let full = template.render(messages, false)?;
        if labels == Labels::Everything {
            let ids = self.encode(&full)?;
            let end = ids.len();
            return Ok(Example::labelled(ids, 0, end));
        }

        let prompt = template.render(before, true)?;
        let Some(completion) = full.strip_prefix(&prompt) else {
            return Err(not_prefix(&prompt, &full));
        };
        let prompt_ids = self.encode(&prompt)?;
        let encoding = self.encoding(&full, false)?;
        let ids = encoding.get_ids().to_vec();
        for (at, &expected) in prompt_ids.iter().enumerate() {
            let found = ids.get(at).copied();
            if found != Some(expected) {
                return Err(LlamaError::TokenBoundary { at, expected, found });
            }
        }

        // The end token is looked for behind the answer's text, because an answer may itself spell one.
        let answer_end = prompt.len() + answer_length(completion, &answer.content);
        let behind = |i: &usize| encoding.get_offsets()[*i].0 >= answer_end && self.is_special(ids[*i]);
        let end = (prompt_ids.len()..ids.len()).find(behind).ok_or(LlamaError::NoEndToken)?;
        Ok(Example::labelled(ids, prompt_ids.len(), end + 1))
    }

    /// Tokenises a text as the model expects one (with a token for the beginning if its tokenizer adds one), ends
    /// it with the end token, and marks everything as learnt.
    ///
    /// # Errors
    /// - [`LlamaError::NoSpecialToken`] if the model has no end token,
    /// - otherwise as [`encode`](Self::encode).
    pub fn encode_document(&self, text: &str) -> Result<Example, LlamaError> {
        let eos = self.eos_token_id().ok_or(LlamaError::NoSpecialToken { field: "eos_token" })?;
        let mut ids = self.encode_with_special_tokens(text)?;
        if ids.last() != Some(&eos) {
            ids.push(eos);
        }
        let end = ids.len();
        Ok(Example::labelled(ids, 0, end))
    }

    fn template(&self) -> Result<&ChatTemplate, LlamaError> {
        self.chat_template().ok_or_else(|| LlamaError::NoChatTemplate { found: "neither".to_string() })
    }
}

/// Length in bytes of the answer at the beginning of `completion`, white space that the template put before it
/// included. 0 if the template changed the answer beyond trimming.
fn answer_length(completion: &str, content: &str) -> usize {
    if completion.starts_with(content) {
        return content.len();
    }
    let content = content.trim();
    let start = completion.len() - completion.trim_start().len();
    if completion[start..].starts_with(content) { start + content.len() } else { 0 }
}

/// The error that shows where two texts part.
fn not_prefix(prompt: &str, full: &str) -> LlamaError {
    let parted = prompt.char_indices().zip(full.chars()).find(|((_, a), b)| a != b);
    let at = parted.map_or(prompt.len().min(full.len()), |((at, _), _)| at);
    let excerpt = |text: &str| text[at..].chars().take(40).collect::<String>().escape_debug().to_string();
    LlamaError::PromptNotPrefix { at, prompt: excerpt(prompt), full: excerpt(full) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::{chatml, llama3};

    fn chat(answer: &str) -> [Message; 3] {
        [Message::system("Name the type."), Message::user("Squirtle"), Message::assistant(answer)]
    }

    fn learnt(tokenizer: &Tokenizer, example: &Example) -> String {
        let ids: Vec<u32> = example.labels.iter().filter_map(|&label| u32::try_from(label).ok()).collect();
        tokenizer.decode(&ids, false).unwrap()
    }

    fn with_template(source: &str) -> Tokenizer {
        let eos = Some("<|im_end|>");
        chatml().with_chat_template(ChatTemplate::new(source, None, eos).unwrap())
    }

    #[test]
    fn chatml_learns_the_answer_and_its_end_although_the_end_is_the_padding() {
        let tokenizer = chatml();
        assert_eq!(tokenizer.pad_token_id(), tokenizer.eos_token_id());
        let example = tokenizer.encode_conversation(&chat("water"), Labels::Answer).unwrap();
        assert_eq!(learnt(&tokenizer, &example), "water<|im_end|>");
        let prompt = tokenizer.encode_prompt(&chat("water")[..2]).unwrap();
        assert_eq!(example.input_ids[..prompt.len()], prompt);
        assert!(example.labels[..prompt.len()].iter().all(|&label| label == IGNORE_INDEX));
        assert_eq!(example.labels.last(), Some(&IGNORE_INDEX), "the line break behind the end is masked");
        assert_eq!(example.input_ids.len(), example.labels.len());
        assert_eq!(example.num_targets(), tokenizer.encode("water").unwrap().len() + 1);
        // The end tokens of the messages before are in the input but not learnt.
        let ends = |ids: &[u32]| ids.iter().filter(|&&id| id == 0).count();
        assert_eq!(ends(&example.input_ids), 3);
        assert_eq!(example.labels.iter().filter(|&&label| label == 0).count(), 1);
    }

    #[test]
    fn llama3_has_one_beginning_and_learns_the_trimmed_answer() {
        let tokenizer = llama3();
        let example = tokenizer.encode_conversation(&chat("  water \n"), Labels::Answer).unwrap();
        assert_eq!(learnt(&tokenizer, &example), "water<|eot_id|>");
        let bos = tokenizer.bos_token_id().unwrap();
        assert_eq!(example.input_ids.iter().filter(|&&id| id == bos).count(), 1);
        assert_eq!(example.input_ids[0], bos);
        assert_ne!(example.labels.last(), Some(&IGNORE_INDEX));
    }

    #[test]
    fn only_the_last_answer_of_several_is_learnt() {
        let tokenizer = chatml();
        let mut messages = chat("water").to_vec();
        messages.extend([Message::user("Charmander"), Message::assistant("fire")]);
        let example = tokenizer.encode_conversation(&messages, Labels::Answer).unwrap();
        assert_eq!(learnt(&tokenizer, &example), "fire<|im_end|>");
        let everything = tokenizer.encode_conversation(&messages, Labels::Everything).unwrap();
        assert_eq!(everything.input_ids, example.input_ids);
        assert_eq!(everything.num_targets(), everything.input_ids.len() - 1);
    }

    #[test]
    fn an_answer_that_spells_the_end_token_is_learnt_to_its_end() {
        let tokenizer = chatml();
        let example = tokenizer.encode_conversation(&chat("a<|im_end|>b é"), Labels::Answer).unwrap();
        assert_eq!(learnt(&tokenizer, &example), "a<|im_end|>b é<|im_end|>");
    }

    #[test]
    fn an_empty_answer_is_its_end_token() {
        let tokenizer = chatml();
        let example = tokenizer.encode_conversation(&chat(""), Labels::Answer).unwrap();
        assert_eq!(learnt(&tokenizer, &example), "<|im_end|>");
    }

    #[test]
    fn a_template_that_puts_a_space_around_the_answer_still_finds_the_end() {
        let tokenizer = with_template(
            "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% elif m.role == 'assistant' %} \
             {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}",
        );
        let example = tokenizer.encode_conversation(&chat("water"), Labels::Answer).unwrap();
        assert_eq!(learnt(&tokenizer, &example), " water <|im_end|>");
    }

    #[test]
    fn conversations_without_an_answer_are_refused() {
        let tokenizer = chatml();
        let error = tokenizer.encode_conversation(&chat("x")[..2], Labels::Answer).unwrap_err();
        assert!(matches!(&error, LlamaError::NoAnswer { found } if found == "`user`"), "{error}");
        assert!(matches!(
            tokenizer.encode_conversation(&[], Labels::Answer),
            Err(LlamaError::NoAnswer { .. })
        ));
    }

    #[test]
    fn templates_that_cannot_be_masked_are_refused() {
        let encode = |source: &str| with_template(source).encode_conversation(&chat("water"), Labels::Answer);
        let counts =
            "{{ messages | length }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}";
        match encode(counts) {
            Err(LlamaError::PromptNotPrefix { at, prompt, full }) => {
                assert_eq!((at, &prompt[..1], &full[..1]), (0, "2", "3"));
            }
            other => panic!("{other:?}"),
        }
        // ` ty|pe` is one token of the whole, but not of the prompt.
        let merges =
            "{{ messages[1].content }} ty{% if not add_generation_prompt %}pe{{ eos_token }}{% endif %}";
        assert!(matches!(encode(merges), Err(LlamaError::TokenBoundary { .. })));
        let endless = "{% for m in messages %}\n{{ m.content }}\n{% endfor %}";
        assert!(matches!(encode(endless), Err(LlamaError::NoEndToken)));
    }

    #[test]
    fn a_tokenizer_without_template_says_so() {
        let special = crate::tokenizer::SpecialTokens::new("<s>", "</s>");
        let tokenizer = Tokenizer::train_bpe(["a b"], 260, special, None).unwrap();
        let error = tokenizer.encode_prompt(&[Message::user("a")]).unwrap_err();
        assert!(matches!(error, LlamaError::NoChatTemplate { .. }) && error.to_string().contains("hint:"));
    }

    #[test]
    fn documents_begin_and_end_as_the_tokenizer_says_and_are_learnt_whole() {
        for (tokenizer, text) in [(llama3(), "<|begin_of_text|>fire<|eot_id|>"), (chatml(), "fire<|im_end|>")]
        {
            let example = tokenizer.encode_document("fire").unwrap();
            assert_eq!(tokenizer.decode(&example.input_ids, false).unwrap(), text);
            assert_eq!(learnt(&tokenizer, &example), text);
            let twice = tokenizer.encode_document(&format!(
                "fire{}",
                tokenizer.special_tokens().eos_token.as_deref().unwrap()
            ));
            assert_eq!(twice.unwrap(), example);
        }
    }
}
