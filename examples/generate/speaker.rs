//! Answers that appear while they are written.

use std::io::Write;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use burn_peft_llama::{GenerateOptions, LlamaForCausalLm, Tokenizer};

/// Writes answers, and remembers how long they took.
pub struct Speaker<'a, W> {
    model: &'a LlamaForCausalLm,
    tokenizer: &'a Tokenizer,
    options: GenerateOptions,
    output: W,
    prompt_tokens: usize,
    /// Until the first token of each answer was there.
    reading: Duration,
    new_tokens: usize,
    /// Those behind the first of each answer.
    later_tokens: usize,
    /// From the first token of each answer on.
    writing: Duration,
    /// Whether it was told that the model was made for less.
    is_told: bool,
}

impl<'a, W: Write> Speaker<'a, W> {
    pub fn new(
        model: &'a LlamaForCausalLm,
        tokenizer: &'a Tokenizer,
        options: GenerateOptions,
        output: W,
    ) -> Self {
        let (reading, writing) = (Duration::ZERO, Duration::ZERO);
        Self {
            model,
            tokenizer,
            options,
            output,
            prompt_tokens: 0,
            reading,
            new_tokens: 0,
            later_tokens: 0,
            writing,
            is_told: false,
        }
    }

    /// Answers a prompt.
    pub fn answer(&mut self, prompt: Vec<u32>) -> Result<String> {
        let length = prompt.len();
        if let Some(note) = self.note("this prompt has", length) {
            eprintln!("{note}");
        }
        let start = Instant::now();
        let (mut first, mut ids, mut written) = (None, vec![], 0);
        let mut failed: Result<()> = Ok(());
        self.prompt_tokens += length;
        let (tokenizer, output) = (self.tokenizer, &mut self.output);
        self.model.generate_with(&[prompt], &self.options, |_, id| {
            first.get_or_insert_with(|| start.elapsed());
            ids.push(id);
            failed = (|| {
                let text = tokenizer.decode(&ids, true)?;
                // A letter may need several tokens: until they are all there, it is none.
                if let Some(new) = text.get(written..).filter(|new| !new.ends_with('\u{fffd}')) {
                    write!(output, "{new}")?;
                    output.flush()?;
                    written = text.len();
                }
                Ok(())
            })();
            if failed.is_err() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        failed.context("the answer cannot be written")?;
        let text = self.tokenizer.decode(&ids, true)?;
        writeln!(self.output, "{}", text.get(written..).unwrap_or_default())
            .context("the answer cannot be written")?;
        let first = first.unwrap_or_else(|| start.elapsed());
        self.reading += first;
        self.writing += start.elapsed() - first;
        self.new_tokens += ids.len();
        self.later_tokens += ids.len().saturating_sub(1);
        // Only now it is known how long the answer is, and here the note is not in the middle of it.
        if let Some(note) = self.note("this prompt and its answer have", length + ids.len()) {
            eprintln!("{note}");
        }
        Ok(text)
    }

    /// What is to be told the first time that there are more tokens than the model was made for.
    pub fn note(&mut self, what_has: &str, tokens: usize) -> Option<String> {
        let length = self.model.config().max_position_embeddings;
        if self.is_told || tokens <= length {
            return None;
        }
        self.is_told = true;
        Some(format!("note: the model was made for up to {length} tokens, and {what_has} {tokens}"))
    }

    /// Tokens per second of all answers.
    pub fn speed(&self) -> String {
        // The first token of an answer comes with the prompt, so an answer of one token has no speed.
        format!(
            "prompt: {}; answer: {}",
            told(self.prompt_tokens, self.prompt_tokens, self.reading),
            told(self.new_tokens, self.later_tokens, self.writing)
        )
    }
}

/// A number of tokens, and how many of them came per second if any were `timed`.
fn told(tokens: usize, timed: usize, time: Duration) -> String {
    let noun = if tokens == 1 { "token" } else { "tokens" };
    if timed == 0 {
        return format!("{tokens} {noun}");
    }
    format!("{tokens} {noun}, {:.1} tokens/s", timed as f64 / time.as_secs_f64().max(1e-9))
}
