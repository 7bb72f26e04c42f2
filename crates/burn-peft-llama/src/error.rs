//! What can go wrong, in one type.

use std::fmt;
use std::path::PathBuf;

use burn::tensor::{DType, FloatDType};
use burn_peft::PeftError;
use burn_peft_files::{TensorFileError, WrongFile};

use crate::dataset::SHAPES;
use crate::problem::{ConfigProblem, RecordProblem, WeightProblem};
use crate::train::CheckpointDifference;

/// An error of this crate.
///
/// Where another error is the cause, the message does not repeat it: it is the
/// [`source`](std::error::Error::source), to be printed behind the message, as `anyhow` and `Debug` do.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum LlamaError {
    /// A file of the model directory could not be read.
    #[error("cannot read `{}`\nhint: {hint}", .path.display())]
    ReadFile {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
        /// What the file is for and where it comes from.
        hint: &'static str,
    },

    /// A file could not be written.
    #[error("cannot write `{}`", .path.display())]
    WriteFile {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },

    /// A file is not what its name says, such as the pointer that Git LFS leaves.
    #[error("`{}` is {found}\nhint: {}", .path.display(), .found.hint())]
    WrongFile {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: WrongFile,
    },

    /// A JSON file of the model directory is malformed.
    #[error("cannot parse `{}`", .path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why parsing failed.
        source: serde_json::Error,
    },

    /// `config.json` or `generation_config.json` has a field of another type or asks for something unsupported or
    /// impossible.
    #[error("`{}` does not describe a supported model:{}", .path.display(), lines(.problems))]
    Config {
        /// The file.
        path: PathBuf,
        /// All of them.
        problems: Vec<ConfigProblem>,
    },

    /// The index of the weights or a file of weights is malformed.
    #[error(transparent)]
    WeightsFile(TensorFileError),

    /// The weights do not fit the model that `config.json` describes.
    #[error("the weights in `{}` do not fit `config.json`:{}", .path.display(), lines(.problems))]
    Weights {
        /// The file of weights, or the index of several.
        path: PathBuf,
        /// All of them.
        problems: Vec<WeightProblem>,
    },

    /// A model with adapters was to be saved as if it had none.
    #[error(
        "the model has an adapter at `{path}`\n\
         hint: save it with `save_adapter`, or put it into the weights with `merge_and_unload` first"
    )]
    AdaptersAttached {
        /// A parameter of the adapter.
        path: String,
    },

    /// A prompt has no tokens.
    #[error("prompt {index}: expected at least one token, found none")]
    EmptyPrompt {
        /// Number of the prompt.
        index: usize,
    },

    /// A prompt has a token that the model does not know.
    #[error(
        "prompt {index}: expected token ids below {vocab_size}, found {id}\nhint: is the tokenizer another model's?"
    )]
    TokenOutOfRange {
        /// Number of the prompt.
        index: usize,
        /// The token.
        id: u32,
        /// Number of tokens that the model knows.
        vocab_size: usize,
    },

    /// An example has a token that the model does not know.
    #[error(
        "example {index}: expected token ids below {vocab_size}, found {id}\nhint: is the tokenizer another model's?"
    )]
    ExampleTokenOutOfRange {
        /// Number of the example.
        index: usize,
        /// The token, or the padding token.
        id: u32,
        /// Number of tokens that the model knows.
        vocab_size: usize,
    },

    /// `tokenizer.json` was refused, or the tokenizer failed on a text.
    #[error("tokenizer failed to {action}")]
    Tokenizer {
        /// What was attempted, such as "load `tokenizer.json`".
        action: String,
        /// What the tokenizer said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// A special token is named but is not in the vocabulary.
    #[error(
        "`{field}` is `{token}`, which is not in the vocabulary\nhint: add it to the `tokenizers` tokenizer first"
    )]
    UnknownSpecialToken {
        /// The field of [`SpecialTokens`](crate::SpecialTokens).
        field: &'static str,
        /// The token's text.
        token: String,
    },

    /// A file gives a token an id that it cannot have: the next free one is another.
    #[error(
        "`{token}`: expected id {expected} by the tokenizer's files, found {}\n\
         hint: do `tokenizer.json` and `tokenizer_config.json` belong together? Write them anew in Python: \
         `AutoTokenizer.from_pretrained(dir).save_pretrained(dir)`",
        .found.map_or("none".into(), |id| id.to_string())
    )]
    AddedTokenId {
        /// The token's text.
        token: String,
        /// The id in `added_tokens_decoder` of `tokenizer_config.json`, or in `added_tokens.json`.
        expected: u32,
        /// The id that it has, or would be given.
        found: Option<u32>,
    },

    /// A special token is needed but the tokenizer names none.
    #[error("the tokenizer has no `{field}`\nhint: name it in `tokenizer_config.json`")]
    NoSpecialToken {
        /// The field of `tokenizer_config.json`.
        field: &'static str,
    },

    /// The model directory has no chat template.
    #[error(
        "no chat template: expected `chat_template.jinja` or `chat_template` in `tokenizer_config.json`, found {found}\n\
         hint: base models have none; use the instruction-tuned model, or add a `chat_template.jinja`"
    )]
    NoChatTemplate {
        /// What was found instead.
        found: String,
    },

    /// The chat template is malformed or failed on these messages.
    #[error("cannot parse or render the chat template")]
    ChatTemplate {
        /// What the template engine said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// The chat template itself rejected the messages, with `raise_exception`.
    #[error("the chat template rejects these messages: {message}")]
    ChatTemplateRejected {
        /// The template's words.
        message: String,
    },

    /// The chat template does not finish.
    #[error(
        "the chat template did not finish within {steps} steps\n\
         hint: it loops without end, or far longer than the conversation asks for; take another `chat_template.jinja`, or \
         set one with `with_chat_template`"
    )]
    ChatTemplateEndless {
        /// The steps that it had: instructions, and pieces of 64 bytes of text.
        steps: u64,
    },

    /// A date is not written as `year-month-day`.
    #[error("invalid date `{date}`, expected one like `2024-07-26`")]
    InvalidDate {
        /// What was given.
        date: String,
    },

    /// A conversation to learn from has no answer, or does not end with one although it shall.
    #[error("expected a conversation with an `assistant` message, found {found}")]
    NoAnswer {
        /// The role of the last message, or "no messages".
        found: String,
    },

    /// The rendered conversation does not begin with the rendered prompt.
    #[error(
        "the rendered conversation does not start with its prompt: they part at byte {at}, `{prompt}` against `{full}`\n\
         hint: the chat template must render the messages before the answer the same way with and without it"
    )]
    PromptNotPrefix {
        /// Number of equal bytes.
        at: usize,
        /// The prompt from there on.
        prompt: String,
        /// The conversation from there on.
        full: String,
    },

    /// A token reaches across the border between prompt and answer.
    #[error(
        "the prompt is tokenised differently with its answer: expected token {expected} at {at}, found {}\n\
         hint: the chat template should end the generation prompt with a special token or a line break",
        .found.map_or("none".into(), |id| id.to_string())
    )]
    TokenBoundary {
        /// Index of the token.
        at: usize,
        /// The prompt's token.
        expected: u32,
        /// The conversation's token there; `None` past its end.
        found: Option<u32>,
    },

    /// No end token follows the answer, so the model would never learn to stop.
    #[error(
        "the chat template puts no end token after the answer\nhint: expected the `eos_token` or another special token there"
    )]
    NoEndToken,

    /// The rows of a batch name their adapters, and there are more or fewer prompts.
    #[error(
        "expected a prompt for each of the {rows} rows that name adapters, found {prompts}\n\
         hint: give `for_rows` one adapter, or `None`, for each prompt"
    )]
    BatchRows {
        /// Number of rows that were given to `for_rows`.
        rows: usize,
        /// Number of prompts.
        prompts: usize,
    },

    /// An operation on adapters failed.
    #[error(transparent)]
    Adapters(#[from] PeftError),

    /// llama.cpp does not compute what an adapter or a model asks for, or its format cannot say it.
    #[error("llama.cpp cannot use `{}`:{}\nhint: {hint}", .path.display(), lines(.problems))]
    NotForLlamaCpp {
        /// The directory of the adapter or of the model.
        path: PathBuf,
        /// All of them.
        problems: Vec<String>,
        /// The way out.
        hint: &'static str,
    },

    /// A value cannot be held in the type that a model was to be converted to.
    #[error("a value of `{parameter}` is too large for {dtype:?}\nhint: bf16 and f32 hold larger ones")]
    TooLarge {
        /// The parameter.
        parameter: String,
        /// The type.
        dtype: FloatDType,
    },

    /// A number is too large for f16, in which a GGUF file was to be written.
    #[error(
        "a value of `{parameter}` is too large for f16\nhint: write the file in f32, `GgufType::F32` or `--dtype f32`"
    )]
    TooLargeForF16 {
        /// The tensor, as the file has it that it is from.
        parameter: String,
    },

    /// A weight that was to be written is infinite or not a number.
    #[error(
        "a value of `{parameter}` is infinite or not a number\n\
         hint: the file that it is from is damaged, or its training diverged: take another one, such as an earlier \
         checkpoint"
    )]
    NonFiniteWeight {
        /// The tensor, as the file has it that it is from.
        parameter: String,
    },

    /// A batch of nothing.
    #[error("expected at least one example, found none")]
    EmptyBatch,

    /// The number of labels of an example differs from that of its tokens.
    #[error("example {index}: expected one label per token, found {labels} labels for {tokens} tokens")]
    LabelCount {
        /// Number of the example.
        index: usize,
        /// Number of its tokens.
        tokens: usize,
        /// Number of its labels.
        labels: usize,
    },

    /// A label is neither a token id nor the mask.
    #[error("example {index}: expected a token id or -100 as label, found {label}")]
    InvalidLabel {
        /// Number of the example.
        index: usize,
        /// The label.
        label: i64,
    },

    /// An example has no labelled token that a position predicts.
    #[error("example {index}: no token is labelled\nhint: was its answer cut off by truncation?")]
    NoLabels {
        /// Number of the example.
        index: usize,
    },

    /// A file of examples has none.
    #[error("`{}` has no examples\nhint: {}", .path.display(), SHAPES)]
    NoExamples {
        /// The file.
        path: PathBuf,
    },

    /// Examples of a file cannot be used. A reason may have a hint behind it; the message has each hint once, at its end.
    #[error("`{}`: {} cannot be used:{}", .path.display(), examples(.problems.len()), records(.problems))]
    Records {
        /// The file.
        path: PathBuf,
        /// All of them.
        problems: Vec<RecordProblem>,
    },

    /// An example is longer than allowed.
    #[error(
        "example {index}: expected at most {max_length} tokens, found {length}\nhint: raise the limit or truncate"
    )]
    SequenceTooLong {
        /// Number of the example.
        index: usize,
        /// Number of its tokens.
        length: usize,
        /// The limit.
        max_length: usize,
    },

    /// Nothing would be trained.
    #[error("no parameter is trainable\nhint: {hint}")]
    NotTrainable {
        /// The cause and the remedy.
        hint: &'static str,
    },

    /// A parameter of type f16 would be trained.
    #[error(
        "`{parameter}` is trainable and f16, where AdamW's epsilon is 0 and small squares of gradients vanish\n\
         hint: train in f32 or bf16, or freeze the weights and train a LoRA adapter, which is f32 on any base"
    )]
    TrainableF16 {
        /// The first such parameter.
        parameter: String,
    },

    /// A loss, a gradient or a trained parameter is infinite or not a number.
    #[error(
        "{what} is {value} at step {step}{}\n\
         hint: begin anew, or from the adapter of a checkpoint before, with a lower learning rate, in f32 instead of a \
         half-precision type, or without those examples",
        of_examples(.examples)
    )]
    NotFinite {
        /// What it is, with the name of the tensor.
        what: String,
        /// The number.
        value: f64,
        /// The optimizer step, from 1.
        step: usize,
        /// The numbers of the examples in its batches, from 0.
        examples: Vec<usize>,
    },

    /// The loss does not depend on an adapter that is to be trained.
    #[error(
        "no parameter of the adapter `{adapter}` got a gradient at the first step\n\
         hint: the loss does not depend on the modules that it adapts; target others"
    )]
    NoGradient {
        /// Its name.
        adapter: String,
    },

    /// There is no checkpoint to go on from.
    #[error(
        "no checkpoint in `{}`\nhint: expected the directory of one, or one with directories `checkpoint-<step>` in it",
        .path.display()
    )]
    NoCheckpoint {
        /// The directory.
        path: PathBuf,
    },

    /// A checkpoint is of another training.
    #[error(
        "`{}` is a checkpoint of another training:{}\n\
         hint: go on as it was begun, or begin anew; the adapter in it is one that can be loaded and trained further",
        .path.display(), lines(.differences)
    )]
    CheckpointDiffers {
        /// The directory of the checkpoint.
        path: PathBuf,
        /// All of them.
        differences: Vec<CheckpointDifference>,
    },

    /// There is something where a checkpoint would be saved, or beside it, that is of another training.
    #[error(
        "`{}` is in the way of a checkpoint of step {step}\n\
         hint: it is of another training, or of a later step of this one; save to another directory, or remove it",
        .path.display()
    )]
    CheckpointInTheWay {
        /// What is in the way.
        path: PathBuf,
        /// The step that was to be saved.
        step: usize,
    },

    /// The counters of a checkpoint are such that no training can have them.
    #[error("`{}` is damaged: {what}\nhint: go on from an earlier checkpoint", .path.display())]
    CheckpointDamaged {
        /// The file.
        path: PathBuf,
        /// What it says.
        what: String,
    },

    /// The state of the optimizer could not be written or read.
    #[error("cannot convert the state of the optimizer")]
    OptimizerState {
        /// What Burn said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// The device failed, in something that it was to compute or to take, or a tensor could not be read back.
    #[error(
        "the device failed\nhint: if its memory ran out, less is needed with weights in 16 bits, smaller batches, shorter texts and, in a training, gradient checkpointing"
    )]
    DeviceRead {
        /// What the backend said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// The device cannot compute in the type that the weights were to have.
    #[error(
        "the device {device} cannot compute in {}\nhint: choose another type, such as f32",
        DType::from(*.dtype).name()
    )]
    UnsupportedDtype {
        /// The device.
        device: String,
        /// The type.
        dtype: FloatDType,
    },

    /// An option has a value that makes no sense.
    #[error("`{option}`: expected {expected}, found {found}")]
    InvalidOption {
        /// The option.
        option: &'static str,
        /// What is allowed.
        expected: &'static str,
        /// What was given.
        found: String,
    },

    /// A name is not one of a fixed set.
    #[error("unknown {what} `{name}`, expected {expected}")]
    UnknownName {
        /// What the name is for.
        what: &'static str,
        /// What was given.
        name: String,
        /// The names there are, in backticks.
        expected: String,
    },

    /// A model or an adapter is named neither by a directory nor by a valid id of the Hub.
    #[error(
        "`{model}` is neither a directory nor a name on the Hub\n\
         hint: expected a directory, `owner/name` or `owner/name@revision`"
    )]
    ModelId {
        /// What was given.
        model: String,
    },

    /// A model or an adapter could not be fetched.
    #[cfg(feature = "hub")]
    #[error("cannot fetch {}`{model}`\nhint: {hint}", .file.as_ref().map_or(String::new(), |file| format!("`{file}` of ")))]
    Hub {
        /// Its id.
        model: String,
        /// The file, if it is about one.
        file: Option<String>,
        /// What was wrong.
        source: Box<crate::hub::HubProblem>,
        /// What to type or do.
        hint: String,
    },
}

fn examples(count: usize) -> String {
    if count == 1 { "1 example".to_string() } else { format!("{count} examples") }
}

/// A message and the hint behind it, if it has one.
fn split_hint(text: &str) -> (&str, Option<&str>) {
    match text.split_once("\nhint: ") {
        Some((message, hint)) => (message, Some(hint)),
        None => (text, None),
    }
}

/// An error and its causes in one line, and behind it the line of its hint: the place where it came up is told beside it.
pub(crate) fn chain(error: &LlamaError) -> String {
    let told = error.to_string();
    let (message, hint) = split_hint(&told);
    let mut text = message.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(source) = cause {
        text += &format!(": {source}");
        cause = source.source();
    }
    let lines = text.lines().map(str::trim);
    let line = lines.collect::<Vec<_>>().join(" ");
    match hint {
        Some(hint) => format!("{line}\nhint: {hint}"),
        None => line,
    }
}

/// The examples of a step, as many as a reader will read.
fn of_examples(examples: &[usize]) -> String {
    const MOST: usize = 16;
    let numbers: Vec<String> = examples.iter().take(MOST).map(ToString::to_string).collect();
    match examples.len() {
        0 => String::new(),
        1 => format!(", in a batch of example {}", numbers[0]),
        MOST.. if examples.len() > MOST => {
            format!(", in batches of examples {} and {} more", numbers.join(", "), examples.len() - MOST)
        }
        _ => format!(", in batches of examples {}", numbers.join(", ")),
    }
}

/// One line for each problem, as many as a reader will read.
fn lines<T: fmt::Display>(problems: &[T]) -> String {
    const MOST: usize = 20;
    let mut text: String = problems.iter().take(MOST).map(|problem| format!("\n  {problem}")).collect();
    if problems.len() > MOST {
        text += &format!("\n  and {} more", problems.len() - MOST);
    }
    text
}

/// One line for each problem, and behind them each hint once: many examples are wrong for the same cause.
fn records(problems: &[RecordProblem]) -> String {
    let mut told: Vec<String> = vec![];
    let mut hints: Vec<&str> = vec![];
    for RecordProblem { place, reason } in problems {
        let (reason, hint) = split_hint(reason);
        told.push(format!("{place}: {reason}"));
        if let Some(hint) = hint
            && !hints.contains(&hint)
        {
            hints.push(hint);
        }
    }
    let hints: String = hints.iter().map(|hint| format!("\nhint: {hint}")).collect();
    lines(&told) + &hints
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use serde::de::Error as _;

    use super::*;

    #[test]
    fn numbers_that_a_file_cannot_hold_have_hints_of_their_own() {
        let parameter = "lm_head.weight".to_string();
        let text = LlamaError::TooLargeForF16 { parameter: parameter.clone() }.to_string();
        assert!(
            text.contains("`lm_head.weight` is too large for f16\nhint: ") && text.contains("`--dtype f32`")
        );
        let text = LlamaError::NonFiniteWeight { parameter }.to_string();
        assert!(text.contains("infinite or not a number\nhint: ") && !text.contains("f32"), "{text}");
    }

    #[test]
    fn a_message_leaves_its_cause_to_the_chain() {
        let (path, hint) = (PathBuf::from("a"), "ask");
        let io = || std::io::Error::other("the cause");
        let json = || serde_json::Error::custom("the cause");
        let header = safetensors::SafeTensorError::HeaderTooSmall;
        let errors = [
            LlamaError::Json { path: path.clone(), source: json() },
            LlamaError::WeightsFile(TensorFileError::Format { path: path.clone(), source: header }),
            LlamaError::ReadFile { path: path.clone(), source: io(), hint },
            LlamaError::WriteFile { path, source: io() },
            LlamaError::Tokenizer { action: "train".to_string(), source: "the cause".into() },
            LlamaError::ChatTemplate { source: "the cause".into() },
            LlamaError::DeviceRead { source: "the cause".into() },
        ];
        for error in errors {
            let (message, cause) = (error.to_string(), error.source().unwrap().to_string());
            assert!(!cause.is_empty() && !message.contains(&cause), "{message}");
            assert!(!message.ends_with([':', ' ']), "{message}");
        }
    }
}
