//! What the model answers before and after, and how it does on the test examples.

use anyhow::Result;
use burn_peft_examples::progress::Progress;
use burn_peft_llama::{Collator, Example, GenerateOptions, LlamaForCausalLm, Message, Tokenizer, evaluate};
use serde::{Deserialize, Serialize};

use crate::data::{Data, Part};
use crate::interrupt::Interrupt;

/// Questions whose answers are shown.
const SHOWN: usize = 3;
/// The most tokens of an answer that is shown.
const LENGTH: usize = 64;
/// The most tokens of an answer that is right or wrong as a whole.
const SHORT: usize = 16;
/// The most test questions that are asked.
const MOST: usize = 200;
/// Test questions that are answered at once, at least: answering needs much less memory than training.
const AT_ONCE: usize = 16;

/// What is asked before and after.
pub struct Exam<'a> {
    tokenizer: &'a Tokenizer,
    collator: &'a Collator,
    batch_size: usize,
    shown: Vec<Vec<Message>>,
    test: Option<&'a [Example]>,
    /// Test questions as tokens, with the answers, if all of these are short.
    quiz: Vec<(Vec<u32>, &'a str)>,
    /// The most tokens of these answers.
    longest: usize,
}

/// What came out.
#[derive(Debug, Serialize, Deserialize)]
pub struct Marks {
    answers: Vec<String>,
    test_loss: Option<f64>,
    right: usize,
}

impl<'a> Exam<'a> {
    pub fn new(
        data: &'a Data,
        tokenizer: &'a Tokenizer,
        collator: &'a Collator,
        batch_size: usize,
    ) -> Result<Self> {
        let shown = data.valid.as_ref().unwrap_or(&data.train).questions();
        let shown = shown.take(SHOWN).map(|(question, _)| question).collect();
        let test = data.test.as_ref().map(Part::examples);
        let (mut quiz, mut longest) = (Vec::new(), 0);
        for (question, answer) in data.test.iter().flat_map(Part::questions).take(MOST) {
            longest = longest.max(tokenizer.encode(answer)?.len());
            if longest > SHORT {
                quiz.clear();
                break;
            }
            quiz.push((prompt(tokenizer, &question)?, answer.trim()));
        }
        Ok(Self { tokenizer, collator, batch_size, shown, test, quiz, longest })
    }

    /// Puts the questions to `model`; nothing comes out if the user wishes an end.
    pub fn take(&self, model: &LlamaForCausalLm, interrupt: &Interrupt) -> Result<Option<Marks>> {
        let options = GenerateOptions::new().with_max_new_tokens(LENGTH);
        let answer = |question: &[Message]| -> Result<String> {
            let ids = model.generate(&[prompt(self.tokenizer, question)?], &options)?.concat();
            let end = if ids.len() == LENGTH { " .." } else { "" };
            Ok(self.tokenizer.decode(&ids, true)?.trim().to_string() + end)
        };
        let mut answers = Vec::new();
        for question in &self.shown {
            if interrupt.is_wished() {
                return Ok(None);
            }
            answers.push(answer(question)?);
        }
        let loss = |test| evaluate(model, test, self.collator, self.batch_size);
        let test_loss = self.test.map(loss).transpose()?.map(|evaluation| evaluation.loss);
        Ok(self.right(model, interrupt)?.map(|right| Marks { answers, test_loss, right }))
    }

    /// How many answers to the test questions are exactly the expected ones, white space around them aside.
    fn right(&self, model: &LlamaForCausalLm, interrupt: &Interrupt) -> Result<Option<usize>> {
        // An answer with more tokens is wrong in any case.
        let options = GenerateOptions::new().with_max_new_tokens(self.longest + 2);
        let progress = Progress::new("test questions", self.quiz.len());
        let (mut asked, mut right) = (0, 0);
        for batch in self.quiz.chunks(self.batch_size.max(AT_ONCE)) {
            if interrupt.is_wished() {
                progress.finish();
                return Ok(None);
            }
            let prompts: Vec<Vec<u32>> = batch.iter().map(|(prompt, _)| prompt.clone()).collect();
            for (ids, (_, expected)) in model.generate(&prompts, &options)?.iter().zip(batch) {
                right += usize::from(self.tokenizer.decode(ids, true)?.trim() == *expected);
            }
            asked += batch.len();
            progress.report(asked, &format!("{right} right"));
        }
        progress.finish();
        Ok(Some(right))
    }

    /// Whether `marks` are of as many questions: those of an earlier run may be of others.
    pub fn fits(&self, marks: &Marks) -> bool {
        let test = (self.test.is_some(), marks.test_loss.is_some());
        marks.answers.len() == self.shown.len() && test.0 == test.1 && marks.right <= self.quiz.len()
    }

    /// Prints the questions with their answers before and after, and the test's figures.
    pub fn show(&self, before: &Marks, after: &Marks) {
        if !self.shown.is_empty() {
            println!("\nanswers to the first questions:");
        }
        for (i, question) in self.shown.iter().enumerate() {
            let last = question.last().map_or("", |message| &message.content);
            println!("\n  {}", shortened(last));
            println!("    before: {}", shortened(&before.answers[i]));
            println!("    after:  {}", shortened(&after.answers[i]));
        }
        println!();
        if let (Some(before), Some(after)) = (before.test_loss, after.test_loss) {
            println!("test loss: {before:.4} before, {after:.4} after");
        }
        if !self.quiz.is_empty() {
            println!(
                "test answers exactly as expected: {} of {count} before, {} of {count} after",
                before.right,
                after.right,
                count = self.quiz.len()
            );
        }
    }
}

fn prompt(tokenizer: &Tokenizer, question: &[Message]) -> Result<Vec<u32>> {
    Ok(match tokenizer.chat_template() {
        Some(_) => tokenizer.encode_prompt(question)?,
        None => tokenizer.encode_with_special_tokens(&question[0].content)?,
    })
}

/// A text in one line, and not too long a one.
fn shortened(text: &str) -> String {
    const MOST: usize = 300;
    let line = text.replace('\n', " ");
    match line.char_indices().nth(MOST) {
        Some((end, _)) => format!("{} ..", &line[..end]),
        None => line,
    }
}
