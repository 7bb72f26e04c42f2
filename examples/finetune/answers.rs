//! Answers of the model before and after.

use anyhow::Result;
use burn_peft_llama::{GenerateOptions, LlamaForCausalLm, Message, Tokenizer};

/// The most tokens of an answer.
const LENGTH: usize = 64;

/// The answers to some questions, each on its own.
pub fn answer(
    model: &LlamaForCausalLm,
    tokenizer: &Tokenizer,
    questions: &[Vec<Message>],
) -> Result<Vec<String>> {
    let options = GenerateOptions::new().with_max_new_tokens(LENGTH);
    let answer = |question: &Vec<Message>| {
        let prompt = match tokenizer.chat_template() {
            Some(_) => tokenizer.encode_prompt(question)?,
            None => tokenizer.encode_with_special_tokens(&question[0].content)?,
        };
        let ids = model.generate(&[prompt], &options)?.concat();
        let end = if ids.len() == LENGTH { " .." } else { "" };
        Ok(tokenizer.decode(&ids, true)?.trim().to_string() + end)
    };
    questions.iter().map(answer).collect()
}

/// Prints questions with their answers before and after.
pub fn show(questions: &[Vec<Message>], before: &[String], after: &[String]) {
    for ((question, before), after) in questions.iter().zip(before).zip(after) {
        let last = question.last().map_or("", |message| &message.content);
        println!("\n  {}", shortened(last));
        println!("    before: {}", shortened(before));
        println!("    after:  {}", shortened(after));
    }
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
