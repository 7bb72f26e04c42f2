//! From the examples of a file to tokens and labels.

use super::report::EncodingReport;
use super::{Content, Dataset, Place};
use crate::conversation::{Example, Labels};
use crate::error::{LlamaError, chain};
use crate::message::Message;
use crate::problem::RecordProblem;
use crate::tokenizer::Tokenizer;

/// The hint if too long examples are refused.
const REFUSED: &str = "choose a larger `max_length`, or `TooLong::Cut` or `TooLong::Drop`";
/// The hint if too long examples were to be cut or left out.
const NONE_LEFT: &str = "no example would be left to learn from: choose a larger `max_length`";

/// What becomes of examples that are too long.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TooLong {
    /// They lose their end, and with it their end token. Those that lose all their labels are dropped.
    Cut,
    /// They are left out.
    Drop,
    /// They are an error.
    #[default]
    Refuse,
}

/// How examples become tokens. By default, the answers are learnt, and there is no limit of length.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Which tokens of conversations and completions are learnt; documents are learnt whole.
    pub labels: Labels,
    /// The most tokens of an example.
    pub max_length: Option<usize>,
    /// What becomes of examples with more.
    pub too_long: TooLong,
}

impl EncodeOptions {
    /// The default options.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets which tokens are learnt.
    pub fn with_labels(mut self, labels: Labels) -> Self {
        self.labels = labels;
        self
    }

    /// Sets the most tokens of an example, and what becomes of longer ones.
    pub fn with_max_length(mut self, max_length: usize, too_long: TooLong) -> Self {
        self.max_length = Some(max_length);
        self.too_long = too_long;
        self
    }
}

/// Examples as tokens.
#[non_exhaustive]
#[derive(Clone, Debug)]
pub struct Encoded {
    /// The examples.
    pub examples: Vec<Example>,
    /// Where each of them is in the file.
    pub places: Vec<Place>,
    /// Counts and lengths.
    pub report: EncodingReport,
}

impl Dataset {
    /// Tokenises the examples and marks what is learnt.
    ///
    /// Prompts and completions are a question and an answer if the tokenizer has a chat template. If it has none, the
    /// completion follows the prompt as it stands, and the end token follows the completion.
    ///
    /// # Errors
    /// [`LlamaError::Records`]: all [`problems`](Self::problems) of the file, and every example that cannot be encoded, see
    /// [`Tokenizer::encode_conversation`], is too long and shall be refused, or has nothing to learn; those that were too
    /// long, if none is left. [`LlamaError::EmptyBatch`] if there was none.
    pub fn encode(&self, tokenizer: &Tokenizer, options: &EncodeOptions) -> Result<Encoded, LlamaError> {
        let EncodeOptions { max_length, too_long, .. } = *options;
        let (mut examples, mut places, mut problems) = (vec![], vec![], self.problems.clone());
        let (mut cut, mut dropped, mut empty_answers) = (0, vec![], 0);
        for record in &self.records {
            let place = record.place;
            let problem = |reason: String| RecordProblem { place, reason };
            let mut example = match encode(tokenizer, &record.content, options.labels) {
                Ok(example) => example,
                Err(error) => {
                    problems.push(problem(chain(&error)));
                    continue;
                }
            };
            let length = example.input_ids.len();
            if let Some(most) = max_length.filter(|most| length > *most) {
                let told = format!("{length} tokens, {most} are allowed");
                match too_long {
                    TooLong::Refuse => {
                        problems.push(problem(format!("{told}\nhint: {REFUSED}")));
                        continue;
                    }
                    TooLong::Drop => {
                        dropped.push(problem(format!("{told}\nhint: {NONE_LEFT}")));
                        continue;
                    }
                    TooLong::Cut => {
                        example.input_ids.truncate(most);
                        example.labels.truncate(most);
                    }
                }
                if example.num_targets() == 0 {
                    let reason = format!("{told}, and nothing in these is learnt\nhint: {NONE_LEFT}");
                    dropped.push(problem(reason));
                    continue;
                }
                cut += 1;
            }
            if example.num_targets() == 0 {
                problems.push(problem("nothing in it is learnt".to_string()));
                continue;
            }
            empty_answers += usize::from(has_empty_answer(&record.content, options.labels));
            examples.push(example);
            places.push(place);
        }
        if examples.is_empty() {
            problems.append(&mut dropped);
        }
        if !problems.is_empty() {
            problems.sort_by_key(|problem| problem.place);
            return Err(LlamaError::Records { path: self.path.clone(), problems });
        }
        if examples.is_empty() {
            return Err(LlamaError::EmptyBatch);
        }
        let report = EncodingReport::new(&examples, tokenizer, cut, dropped.len(), empty_answers);
        Ok(Encoded { examples, places, report })
    }
}

fn encode(tokenizer: &Tokenizer, content: &Content, labels: Labels) -> Result<Example, LlamaError> {
    match content {
        Content::Messages(messages) => tokenizer.encode_conversation(messages, labels),
        Content::Continuation { prompt, completion } => {
            tokenizer.encode_from(&[&prompt[..], completion].concat(), labels, prompt.len())
        }
        Content::Completion { prompt, completion } if tokenizer.chat_template().is_some() => {
            let messages = [Message::user(prompt), Message::assistant(completion)];
            tokenizer.encode_conversation(&messages, labels)
        }
        Content::Completion { prompt, completion } => tokenizer.encode_completion(prompt, completion, labels),
        Content::Text(text) => tokenizer.encode_document(text),
    }
}

/// Whether an answer that is learnt, or the text, has nothing in it.
fn has_empty_answer(content: &Content, labels: Labels) -> bool {
    let is_empty = |text: &str| text.trim().is_empty();
    match content {
        Content::Messages(messages) | Content::Continuation { completion: messages, .. } => {
            let mut answers = messages.iter().rev().filter(|message| message.role == "assistant");
            match labels {
                Labels::LastAnswer => answers.next().is_some_and(|answer| is_empty(&answer.content)),
                _ => answers.any(|answer| is_empty(&answer.content)),
            }
        }
        Content::Completion { completion, .. } => is_empty(completion),
        Content::Text(text) => is_empty(text),
    }
}
