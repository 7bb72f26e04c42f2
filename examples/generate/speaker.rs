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
    /// From there on.
    writing: Duration,
}

impl<'a, W: Write> Speaker<'a, W> {
    pub fn new(
        model: &'a LlamaForCausalLm,
        tokenizer: &'a Tokenizer,
        options: GenerateOptions,
        output: W,
    ) -> Self {
        let (reading, writing) = (Duration::ZERO, Duration::ZERO);
        Self { model, tokenizer, options, output, prompt_tokens: 0, reading, new_tokens: 0, writing }
    }

    /// Answers a prompt.
    pub fn answer(&mut self, prompt: Vec<u32>) -> Result<String> {
        let start = Instant::now();
        let (mut first, mut ids, mut written) = (None, vec![], 0);
        let mut failed: Result<()> = Ok(());
        self.prompt_tokens += prompt.len();
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
        Ok(text)
    }

    /// Tokens per second of all answers.
    pub fn speed(&self) -> String {
        let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
        // The first token of an answer comes with the prompt.
        format!(
            "prompt: {} tokens, {:.1} tokens/s; answer: {} tokens, {:.1} tokens/s",
            self.prompt_tokens,
            rate(self.prompt_tokens, self.reading),
            self.new_tokens,
            rate(self.new_tokens.saturating_sub(1), self.writing)
        )
    }
}
