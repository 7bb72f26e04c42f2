//! Conversations and documents to examples: token ids and which of them are learnt.

use std::ops::Range;

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
///
/// An answer is learnt with the end token after it, so that the model learns to stop, but not with the line break that some
/// templates put behind the end token. If the chat template has `{% generation %}` blocks, answers are what stands in them.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Labels {
    /// All messages of the assistant. transformers' `assistant_masks`, TRL's `assistant_only_loss`.
    #[default]
    Answers,
    /// The last message, which must be the assistant's.
    LastAnswer,
    /// All tokens.
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

    /// Renders and tokenises a conversation and marks what is learnt.
    ///
    /// What stands before an answer is masked by its length: it is rendered and tokenised on its own, exactly as
    /// [`encode_prompt`](Self::encode_prompt) will do when the model is asked, and must be the beginning of the whole. No
    /// token is ever compared with the padding token.
    ///
    /// Some templates open a thought for the model (`<think>`) when it is asked, and leave thoughts out of the
    /// conversation. The last answer then begins with the thought in its message, or closes an empty one, and this is learnt
    /// too, because it is what the model has to write when it is asked.
    ///
    /// # Errors
    /// - [`LlamaError::NoAnswer`] if no message is the assistant's, with [`Labels::LastAnswer`] if the last one is not,
    /// - [`LlamaError::PromptNotPrefix`] and [`LlamaError::TokenBoundary`] if what stands before an answer is not the
    ///   beginning of the whole as text or as tokens,
    /// - [`LlamaError::NoEndToken`] if no special token follows an answer,
    /// - those of [`encode_prompt`](Self::encode_prompt).
    pub fn encode_conversation(&self, messages: &[Message], labels: Labels) -> Result<Example, LlamaError> {
        self.encode_from(messages, labels, 0)
    }

    /// As [`encode_conversation`](Self::encode_conversation); of the answers, those from message `first` on are learnt.
    pub(crate) fn encode_from(
        &self,
        messages: &[Message],
        labels: Labels,
        first: usize,
    ) -> Result<Example, LlamaError> {
        let is_answer = |i: &usize| *i >= first && messages[*i].role == "assistant";
        let answers: Vec<usize> = match labels {
            Labels::LastAnswer => messages.len().checked_sub(1).into_iter().filter(is_answer).collect(),
            _ => (0..messages.len()).filter(is_answer).collect(),
        };
        if answers.is_empty() {
            let found = match messages.last() {
                Some(last) => format!("`{}`", last.role),
                None => "no messages".to_string(),
            };
            return Err(LlamaError::NoAnswer { found });
        }
        let template = self.template()?;
        let (mut full, mut passages) = template.render_marked(messages, false)?;
        if labels == Labels::Everything {
            let ids = self.encode(&full)?;
            let end = ids.len();
            return Ok(Example::labelled(ids, 0, end));
        }
        if !passages.is_empty() {
            if answers[0] > 0 {
                let before = template.render_marked(&messages[..answers[0]], false)?.1.len();
                passages.drain(..before.min(passages.len()));
            }
            return self.encode_passages(&full, &passages);
        }

        let mut found = vec![];
        for &i in &answers {
            let prompt = template.render(&messages[..i], true)?;
            let is_last = i + 1 == messages.len();
            let until = if is_last { None } else { Some(template.render(&messages[..=i], false)?) };
            found.push((locate(&mut full, prompt, &messages[i].content, is_last)?, until));
        }
        let encoding = self.encoding(&full, false)?;
        let ids = encoding.get_ids().to_vec();
        let mut labels = vec![IGNORE_INDEX; ids.len()];
        for (Answer { prompt, end }, until) in found {
            // An answer without an end token must not run into the next message.
            let until = until.filter(|until| full.starts_with(until)).map_or(full.len(), |until| until.len());
            let prompt_ids = self.encode(&prompt)?;
            for (at, &expected) in prompt_ids.iter().enumerate() {
                let found = ids.get(at).copied();
                if found != Some(expected) {
                    return Err(LlamaError::TokenBoundary { at, expected, found });
                }
            }
            // The end token is looked for behind the answer's text, because an answer may itself spell one.
            let behind =
                |i: &usize| (end..until).contains(&encoding.get_offsets()[*i].0) && self.is_special(ids[*i]);
            let last = (prompt_ids.len()..ids.len()).find(behind).ok_or(LlamaError::NoEndToken)?;
            for i in prompt_ids.len()..=last {
                labels[i] = i64::from(ids[i]);
            }
        }
        Ok(Example { input_ids: ids, labels })
    }

    /// Labels the tokens that have a part in one of the passages, as transformers does.
    fn encode_passages(&self, full: &str, passages: &[Range<usize>]) -> Result<Example, LlamaError> {
        let encoding = self.encoding(full, false)?;
        let ids = encoding.get_ids();
        let is_learnt = |&(start, end): &(usize, usize)| {
            passages.iter().any(|passage| start < passage.end && passage.start < end)
        };
        let offsets = encoding.get_offsets().iter();
        let label = |(offsets, &id): (_, &u32)| if is_learnt(offsets) { i64::from(id) } else { IGNORE_INDEX };
        Ok(Example { input_ids: ids.to_vec(), labels: offsets.zip(ids).map(label).collect() })
    }

    /// Tokenises a text and how it goes on, for models without a chat template: the prompt as the model expects a text, the
    /// completion behind it, and the end token. The completion and the end token are learnt, with [`Labels::Everything`]
    /// the prompt too.
    ///
    /// The tokens of the prompt are those that the model will be asked with. Where a token of the whole text reaches from the
    /// prompt into the completion, the two are tokenised apart.
    ///
    /// # Errors
    /// As [`encode_document`](Self::encode_document).
    pub fn encode_completion(
        &self,
        prompt: &str,
        completion: &str,
        labels: Labels,
    ) -> Result<Example, LlamaError> {
        let eos = self.eos_token_id().ok_or(LlamaError::NoSpecialToken { field: "eos_token" })?;
        let mut ids = self.encode_with_special_tokens(prompt)?;
        // Some tokenizers put the end token behind each text. One that the prompt spells stays.
        let is_spelled = self.encode(prompt)?.last() == Some(&eos);
        ids.pop_if(|last| *last == eos && !is_spelled);
        let start = if labels == Labels::Everything { 0 } else { ids.len() };
        let mut whole = self.encode_with_special_tokens(&format!("{prompt}{completion}"))?;
        whole.pop_if(|last| *last == eos);
        match whole.strip_prefix(&ids[..]) {
            Some(behind) => ids.extend_from_slice(behind),
            None => ids.extend(self.encode_inside(completion)?),
        }
        if ids.last() != Some(&eos) {
            ids.push(eos);
        }
        let end = ids.len();
        Ok(Example::labelled(ids, start, end))
    }

    /// Tokenises a text that stands inside another: SentencePiece would put a space before one that begins.
    fn encode_inside(&self, text: &str) -> Result<Vec<u32>, LlamaError> {
        let before = self.encode("\n")?;
        let ids = self.encode(&format!("\n{text}"))?;
        match ids.strip_prefix(&before[..]) {
            Some(inside) => Ok(inside.to_vec()),
            None => self.encode(text),
        }
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

/// An answer in a rendered conversation.
struct Answer {
    /// What stands before it.
    prompt: String,
    /// Where its text ends, in bytes.
    end: usize,
}

/// The tag that some templates open when the model is asked.
const THOUGHT: &str = "<think>";
const THOUGHT_END: &str = "</think>";

/// Finds the answer `content`, before which the model is given `prompt`, in the conversation `full`.
///
/// If the prompt opens a thought that the conversation does not have, and the answer is the last, `full` becomes the prompt
/// with what the model has to write.
///
/// # Errors
/// [`LlamaError::PromptNotPrefix`].
fn locate(full: &mut String, mut prompt: String, content: &str, is_last: bool) -> Result<Answer, LlamaError> {
    let opened = prompt.trim_end().strip_suffix(THOUGHT).map(str::len);
    if let Some(before) = opened.filter(|_| !full.starts_with(&prompt)) {
        if !full.starts_with(&prompt[..before]) {
            return Err(not_prefix(&prompt, full));
        }
        if !is_last {
            prompt.truncate(before);
        } else {
            let rest = full[before..].to_string();
            let thought = content.split_once(THOUGHT_END).map(|(thought, _)| thought.trim_start());
            let thought = thought.map(|thought| thought.strip_prefix(THOUGHT).unwrap_or(thought));
            let rest = match (rest.trim_start().strip_prefix(THOUGHT), thought) {
                (Some(rest), _) => rest.trim_start().to_string(),
                (None, _) if rest.contains(THOUGHT_END) => rest.trim_start().to_string(),
                (None, Some(thought)) => {
                    format!("{}{THOUGHT_END}\n\n{}", thought.trim_start(), rest.trim_start())
                }
                // A line break behind the one of the prompt would be one token with it.
                (None, None) => format!("{THOUGHT_END}\n\n{}", rest.trim_start()),
            };
            *full = prompt.clone() + &rest;
            let thought = rest.find(THOUGHT_END).map_or(0, |at| at + THOUGHT_END.len());
            let answer = content.rsplit(THOUGHT_END).next().unwrap_or(content);
            let end = prompt.len() + thought + answer_length(&rest[thought..], answer);
            return Ok(Answer { prompt, end });
        }
    }
    let Some(completion) = full.strip_prefix(&prompt) else {
        return Err(not_prefix(&prompt, full));
    };
    let end = prompt.len() + answer_length(completion, content);
    Ok(Answer { prompt, end })
}

/// Where the answer `content` ends in `completion`, in bytes, with what the template put before it, such as white space or
/// a header that it does not give the model. 0 if the template changed the answer beyond trimming.
fn answer_length(completion: &str, content: &str) -> usize {
    if completion.starts_with(content) {
        return content.len();
    }
    let content = content.trim();
    completion.find(content).map_or(0, |start| start + content.len())
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
        let example = tokenizer.encode_conversation(&chat("water"), Labels::LastAnswer).unwrap();
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
        let example = tokenizer.encode_conversation(&chat("  water \n"), Labels::LastAnswer).unwrap();
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
        let example = tokenizer.encode_conversation(&messages, Labels::LastAnswer).unwrap();
        assert_eq!(learnt(&tokenizer, &example), "fire<|im_end|>");
        let everything = tokenizer.encode_conversation(&messages, Labels::Everything).unwrap();
        assert_eq!(everything.input_ids, example.input_ids);
        assert_eq!(everything.num_targets(), everything.input_ids.len() - 1);
    }

    fn turns() -> Vec<Message> {
        let mut messages = chat("water").to_vec();
        messages.extend([Message::user("Charmander"), Message::assistant("fire")]);
        messages
    }

    #[test]
    fn all_answers_of_a_conversation_are_learnt_with_their_ends() {
        for tokenizer in [chatml(), llama3()] {
            let end = tokenizer.special_tokens().eos_token.clone().unwrap();
            let example = tokenizer.encode_conversation(&turns(), Labels::Answers).unwrap();
            assert_eq!(learnt(&tokenizer, &example), format!("water{end}fire{end}"));
            let last = tokenizer.encode_conversation(&turns(), Labels::LastAnswer).unwrap();
            assert_eq!(last.input_ids, example.input_ids);
            // A question without an answer at the end teaches nothing and does no harm.
            let open = tokenizer.encode_conversation(&turns()[..4], Labels::Answers).unwrap();
            assert_eq!(learnt(&tokenizer, &open), format!("water{end}"));
        }
    }

    #[test]
    fn a_header_that_the_model_is_not_given_is_learnt_with_the_answer() {
        let tokenizer = with_template(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        );
        let example = tokenizer.encode_conversation(&turns(), Labels::Answers).unwrap();
        let expected = "<|im_start|>assistant\nwater<|im_end|><|im_start|>assistant\nfire<|im_end|>";
        assert_eq!(learnt(&tokenizer, &example), expected);
    }

    #[test]
    fn an_answer_without_an_end_does_not_run_into_the_next_question() {
        let tokenizer = with_template(
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}\
             assistant: {% else %}{{ eos_token }}{% endif %}",
        );
        let error = tokenizer.encode_conversation(&turns(), Labels::Answers);
        assert!(matches!(error, Err(LlamaError::TokenBoundary { .. } | LlamaError::NoEndToken)), "{error:?}");
        let open = with_template(
            "{% for m in messages %}<|im_start|>{{ m.role }}<|im_start|>{{ m.content }}{% endfor %}\
             {% if add_generation_prompt %}<|im_start|>assistant<|im_start|>{% endif %}",
        );
        let error = open.encode_conversation(&turns(), Labels::Answers);
        assert!(matches!(error, Err(LlamaError::NoEndToken)), "{error:?}");
    }

    #[test]
    fn generation_blocks_say_what_an_answer_is() {
        let tokenizer = with_template(
            "{%- for m in messages %}\n\
             {{- '<|im_start|>' + m.role + '\n' }}\n\
             {%- if m.role == 'assistant' %}\n\
             {%- generation %}\n\
             {{- m.content + '<|im_end|>' }}\n\
             {%- endgeneration %}\n\
             {{- '\n' }}\n\
             {%- else %}{{- m.content + '<|im_end|>\n' }}{%- endif %}\n\
             {%- endfor %}",
        );
        // This template has no generation prompt, without which only the blocks can tell.
        let example = tokenizer.encode_conversation(&turns(), Labels::Answers).unwrap();
        assert_eq!(learnt(&tokenizer, &example), "water<|im_end|>fire<|im_end|>");
        let last = tokenizer.encode_conversation(&turns(), Labels::LastAnswer).unwrap();
        assert_eq!(learnt(&tokenizer, &last), "fire<|im_end|>");
        assert_eq!(last.input_ids, example.input_ids);
        let plain = chatml().encode_conversation(&turns(), Labels::Everything).unwrap();
        let text = |ids: &[u32]| tokenizer.decode(ids, false).unwrap();
        assert!(text(&plain.input_ids).ends_with(&text(&example.input_ids)));
    }

    #[test]
    fn a_thought_that_the_template_opens_is_closed_in_what_is_learnt() {
        // In the manner of DeepSeek-R1: thoughts are left out of the conversation, and opened for the model.
        let tokenizer = with_template(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1].strip() }}<|im_end|>\n\
             {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        );
        let encode = |answer: &str| {
            let example = tokenizer.encode_conversation(&chat(answer), Labels::LastAnswer).unwrap();
            let prompt = tokenizer.encode_prompt(&chat(answer)[..2]).unwrap();
            assert_eq!(example.input_ids[..prompt.len()], prompt, "the model is asked as it was trained");
            learnt(&tokenizer, &example)
        };
        assert_eq!(encode("water"), "</think>\n\nwater<|im_end|>");
        assert_eq!(encode("<think>\nIt swims.\n</think>\n\nwater"), "It swims.\n</think>\n\nwater<|im_end|>");
        assert_eq!(encode("It swims.</think>water"), "It swims.</think>\n\nwater<|im_end|>");
        let all = tokenizer.encode_conversation(&turns(), Labels::Answers).unwrap();
        assert_eq!(learnt(&tokenizer, &all), "water<|im_end|></think>\n\nfire<|im_end|>");

        // One that keeps thoughts, and one that has an empty thought in every conversation.
        let keeps = with_template(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
             {% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        );
        for (answer, expected) in [
            ("<think>\nSwims.</think>water", "Swims.</think>water<|im_end|>"),
            ("Swims.</think>water", "Swims.</think>water<|im_end|>"),
            ("water", "</think>\n\nwater<|im_end|>"),
        ] {
            let example = keeps.encode_conversation(&chat(answer), Labels::LastAnswer).unwrap();
            assert_eq!(learnt(&keeps, &example), expected);
        }
    }

    #[test]
    fn a_completion_follows_its_prompt_as_it_stands() {
        for (tokenizer, begin, end) in
            [(chatml(), "", "<|im_end|>"), (llama3(), "<|begin_of_text|>", "<|eot_id|>")]
        {
            let example = tokenizer.encode_completion("Squirtle is", " water", Labels::Answers).unwrap();
            assert_eq!(learnt(&tokenizer, &example), format!(" water{end}"));
            assert_eq!(
                tokenizer.decode(&example.input_ids, false).unwrap(),
                format!("{begin}Squirtle is water{end}")
            );
            let whole = tokenizer.encode_completion("Squirtle is", " water", Labels::Everything).unwrap();
            assert!(whole.input_ids == example.input_ids && whole.labels[0] != IGNORE_INDEX);
            let spelled = tokenizer.encode_completion(&format!("Squirtle{end}"), "water", Labels::Answers);
            assert_eq!(learnt(&tokenizer, &spelled.unwrap()), format!("water{end}"));
        }
    }

    /// A tokenizer in the manner of SentencePiece: spaces are `▁`, and each text begins with one.
    fn sentence_piece() -> Tokenizer {
        let pieces = ["<s>", "</s>", "<0x0A>", "▁", "Q", ":", "a", "b", "▁a"];
        let vocab: serde_json::Map<_, _> =
            pieces.iter().zip(0..).map(|(piece, id)| ((*piece).into(), id.into())).collect();
        let text = serde_json::json!({
            "version": "1.0", "added_tokens": [],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ]},
            "pre_tokenizer": null, "post_processor": null, "decoder": null,
            "model": {"type": "BPE", "byte_fallback": true, "vocab": vocab, "merges": [["▁", "a"]]},
        });
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: String| std::fs::write(dir.path().join(name), text).unwrap();
        write("tokenizer.json", text.to_string());
        write("tokenizer_config.json", r#"{"eos_token": "</s>"}"#.into());
        Tokenizer::load(dir.path()).unwrap()
    }

    #[test]
    fn no_space_comes_between_a_prompt_and_its_completion() {
        let tokenizer = sentence_piece();
        let pieces = |prompt: &str, completion: &str| {
            let example = tokenizer.encode_completion(prompt, completion, Labels::Answers).unwrap();
            let start = tokenizer.encode(prompt).unwrap().len();
            assert_eq!(example.labels.iter().position(|label| *label != IGNORE_INDEX), Some(start));
            let piece = |id: &u32| tokenizer.id_to_token(*id).unwrap();
            example.input_ids.iter().map(piece).collect::<Vec<_>>()
        };
        assert_eq!(pieces("Q:", "b"), ["▁", "Q", ":", "b", "</s>"]);
        assert_eq!(pieces("Q:", " a"), ["▁", "Q", ":", "▁a", "</s>"]);
        // The space of the prompt would be one token with the completion.
        assert_eq!(pieces("Q: ", "ab"), ["▁", "Q", ":", "▁", "a", "b", "</s>"]);
        assert_eq!(tokenizer.encode("b").unwrap().len(), 2, "a text of its own begins with a space");
    }

    #[test]
    fn an_answer_that_spells_the_end_token_is_learnt_to_its_end() {
        let tokenizer = chatml();
        let example = tokenizer.encode_conversation(&chat("a<|im_end|>b é"), Labels::LastAnswer).unwrap();
        assert_eq!(learnt(&tokenizer, &example), "a<|im_end|>b é<|im_end|>");
    }

    #[test]
    fn an_empty_answer_is_its_end_token() {
        let tokenizer = chatml();
        let example = tokenizer.encode_conversation(&chat(""), Labels::LastAnswer).unwrap();
        assert_eq!(learnt(&tokenizer, &example), "<|im_end|>");
    }

    #[test]
    fn a_template_that_puts_a_space_around_the_answer_still_finds_the_end() {
        let tokenizer = with_template(
            "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% elif m.role == 'assistant' %} \
             {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}",
        );
        let example = tokenizer.encode_conversation(&chat("water"), Labels::LastAnswer).unwrap();
        assert_eq!(learnt(&tokenizer, &example), " water <|im_end|>");
    }

    #[test]
    fn conversations_without_an_answer_are_refused() {
        let tokenizer = chatml();
        let error = tokenizer.encode_conversation(&chat("x")[..2], Labels::LastAnswer).unwrap_err();
        assert!(matches!(&error, LlamaError::NoAnswer { found } if found == "`user`"), "{error}");
        assert!(matches!(
            tokenizer.encode_conversation(&[], Labels::LastAnswer),
            Err(LlamaError::NoAnswer { .. })
        ));
    }

    #[test]
    fn templates_that_cannot_be_masked_are_refused() {
        let encode =
            |source: &str| with_template(source).encode_conversation(&chat("water"), Labels::LastAnswer);
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
