//! Answers and their scores.

use std::collections::{BTreeSet, HashSet};

use anyhow::Result;
use burn_peft_llama::{GenerateOptions, LlamaForCausalLm, Tokenizer};
use serde::Serialize;

use crate::data::{Species, Type};
use crate::prompt::Prompt;
use burn_peft_examples::progress::Progress;

/// Longest answer in tokens: two types take at most six in the vocabularies of LLaMA models.
pub const MAX_ANSWER_TOKENS: usize = 12;

/// One answered species.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    pub species: String,
    /// The right answer, `Type` or `Type/Type`.
    pub truth: String,
    /// What the model wrote.
    pub answer: String,
    /// The types that the answer names are exactly the true ones, in whatever order.
    pub exact: bool,
    /// The answer names at least one of the true types.
    pub any: bool,
    /// The types are exactly the true ones, the first type first.
    pub ordered: bool,
}

impl Outcome {
    fn new(species: &Species, answer: String) -> Self {
        let truth = species.types();
        let named = types_named(&answer);
        let set = |types: &[Type]| types.iter().copied().collect::<BTreeSet<_>>();
        Self {
            species: species.name.clone(),
            truth: species.answer(),
            exact: set(&named) == set(&truth),
            any: named.iter().any(|kind| truth.contains(kind)),
            ordered: named == truth,
            answer,
        }
    }
}

/// The types that a text names, each once, in order. Whatever else the text says is forgiven, so an answer is not
/// wrong for its form.
fn types_named(text: &str) -> Vec<Type> {
    let mut types = Vec::new();
    for word in text.split(|letter: char| !letter.is_alphabetic()) {
        if let Ok(kind) = word.parse::<Type>()
            && !types.contains(&kind)
        {
            types.push(kind);
        }
    }
    types
}

/// Asks for the types of each species and scores the answers.
pub fn evaluate(
    model: &LlamaForCausalLm,
    tokenizer: &Tokenizer,
    prompt: &Prompt,
    species: &[Species],
    batch_size: usize,
    title: &str,
) -> Result<Vec<Outcome>> {
    let prompts = species
        .iter()
        .map(|one| Ok(tokenizer.encode_prompt(&prompt.question(one))?))
        .collect::<Result<Vec<_>>>()?;
    let answers = answer(model, tokenizer, &prompts, MAX_ANSWER_TOKENS, batch_size, title)?;
    Ok(species.iter().zip(answers).map(|(one, answer)| Outcome::new(one, answer)).collect())
}

/// Greedy continuations of `prompts`, in batches of prompts of similar length, in the order of `prompts`.
pub fn answer(
    model: &LlamaForCausalLm,
    tokenizer: &Tokenizer,
    prompts: &[Vec<u32>],
    max_new_tokens: usize,
    batch_size: usize,
    title: &str,
) -> Result<Vec<String>> {
    // A directory may name its end token for the tokenizer only.
    let options = GenerateOptions::new()
        .with_max_new_tokens(max_new_tokens)
        .with_stop_token_ids(tokenizer.eos_token_id().into_iter().collect());
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    order.sort_by_key(|index| prompts[*index].len());
    let mut answers = vec![String::new(); prompts.len()];
    let progress = Progress::new(title, prompts.len());
    let mut done = 0;
    for batch in order.chunks(batch_size) {
        let of_batch: Vec<_> = batch.iter().map(|index| prompts[*index].clone()).collect();
        for (index, ids) in batch.iter().zip(model.generate(&of_batch, &options)?) {
            answers[*index] = tokenizer.decode(&ids, true)?.trim().to_string();
        }
        done += batch.len();
        progress.report(done, "answered");
    }
    progress.finish();
    Ok(answers)
}

/// A number of successes among a number of trials.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Score {
    pub hits: usize,
    pub total: usize,
}

impl Score {
    /// How many of `outcomes` fulfil `test`.
    pub fn of<'a>(outcomes: impl IntoIterator<Item = &'a Outcome>, test: impl Fn(&Outcome) -> bool) -> Self {
        outcomes.into_iter().fold(Self::default(), |score, one| Self {
            hits: score.hits + usize::from(test(one)),
            total: score.total + 1,
        })
    }

    /// Successes of all trials together.
    pub fn pooled(scores: impl IntoIterator<Item = Self>) -> Self {
        scores.into_iter().fold(Self::default(), |sum, one| Self {
            hits: sum.hits + one.hits,
            total: sum.total + one.total,
        })
    }

    /// `hits / total`; 0 without trials.
    pub fn share(self) -> f64 {
        if self.total == 0 { 0.0 } else { self.hits as f64 / self.total as f64 }
    }

    /// Wilson's 95 % interval of the share: with `p = hits / n`, `z = 1.96`,
    /// `(p + z² / 2n ± z √(p (1 - p) / n + z² / 4n²)) / (1 + z² / n)`.
    pub fn interval(self) -> (f64, f64) {
        if self.total == 0 {
            return (0.0, 1.0);
        }
        let (z, n, p) = (1.959_964, self.total as f64, self.share());
        let middle = p + z * z / (2.0 * n);
        let half = z * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt();
        let scale = 1.0 + z * z / n;
        (((middle - half) / scale).max(0.0), ((middle + half) / scale).min(1.0))
    }
}

/// Number of different answers: few for many species are the sign of a model that has collapsed.
pub fn distinct<'a>(outcomes: impl IntoIterator<Item = &'a Outcome>) -> usize {
    outcomes.into_iter().map(|one| one.answer.as_str()).collect::<HashSet<_>>().len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data;

    fn outcome(answer: &str) -> Outcome {
        Outcome::new(&data::load(None).unwrap()[0], answer.into())
    }

    #[test]
    fn exact_ignores_order_and_form() {
        for answer in
            ["Grass/Poison", "poison/grass", "Grass and Poison.", "Bulbasaur is a Grass/Poison type"]
        {
            assert!(outcome(answer).exact, "{answer}");
        }
        assert!(outcome("Grass/Poison").ordered);
        assert!(!outcome("Poison/Grass").ordered);
    }

    #[test]
    fn too_few_and_too_many_types_are_not_exact() {
        for (answer, any) in
            [("Grass", true), ("Grass/Poison/Fire", true), ("Fire", false), ("", false), ("1", false)]
        {
            let outcome = outcome(answer);
            assert_eq!((outcome.exact, outcome.ordered, outcome.any), (false, false, any), "{answer}");
        }
    }

    #[test]
    fn interval_is_wilsons() {
        // Values of statsmodels' proportion_confint(123, 183, method="wilson").
        let (low, high) = Score { hits: 123, total: 183 }.interval();
        assert!((low - 0.601_151).abs() < 1e-4 && (high - 0.735_929).abs() < 1e-4, "{low} {high}");
        let (low, high) = Score { hits: 0, total: 20 }.interval();
        assert!(low == 0.0 && (high - 0.161_125).abs() < 1e-4, "{high}");
    }

    #[test]
    fn scores_are_counted_and_pooled() {
        let outcomes = [outcome("Grass/Poison"), outcome("Grass"), outcome("Grass")];
        let exact = Score::of(&outcomes, |one| one.exact);
        assert_eq!(exact, Score { hits: 1, total: 3 });
        assert_eq!(Score::pooled([exact, exact]), Score { hits: 2, total: 6 });
        assert_eq!(distinct(&outcomes), 2);
    }
}
