//! What will be learnt, in numbers.

use std::fmt;

use crate::conversation::{Example, IGNORE_INDEX};
use crate::tokenizer::Tokenizer;

/// What the examples of a file are as tokens.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub struct EncodingReport {
    /// Examples that remain.
    pub examples: usize,
    /// Their tokens.
    pub tokens: usize,
    /// Their tokens that are learnt.
    pub labelled: usize,
    /// Lengths in tokens: the shortest, the median, the 90th and the 99th percentile, the longest.
    pub lengths: [usize; 5],
    /// Examples that lost their end because they were too long.
    pub cut: usize,
    /// Examples that were left out because they were too long, or had nothing to learn once they were cut.
    pub dropped: usize,
    /// Examples in which a passage that is learnt does not end with a special token: the model does not learn to stop
    /// there. Those that were cut are among them.
    pub without_end: usize,
    /// Examples in which an answer that is learnt, or the text, is empty or white space: the model learns to end there
    /// and say nothing.
    pub empty_answers: usize,
}

impl EncodingReport {
    pub(super) fn new(
        examples: &[Example],
        tokenizer: &Tokenizer,
        cut: usize,
        dropped: usize,
        empty_answers: usize,
    ) -> Self {
        let mut lengths: Vec<usize> = examples.iter().map(|example| example.input_ids.len()).collect();
        lengths.sort_unstable();
        // The smallest length that so many percent do not exceed.
        let at = |percent: usize| lengths[(lengths.len() * percent).div_ceil(100).max(1) - 1];
        Self {
            examples: examples.len(),
            tokens: lengths.iter().sum(),
            labelled: examples.iter().map(Example::num_targets).sum(),
            lengths: [at(0), at(50), at(90), at(99), at(100)],
            cut,
            dropped,
            without_end: examples.iter().filter(|example| !ends(example, tokenizer)).count(),
            empty_answers,
        }
    }
}

/// Whether each passage that is learnt ends with a special token, white space behind it aside: some templates put a line
/// break behind the end token.
fn ends(example: &Example, tokenizer: &Tokenizer) -> bool {
    let Example { input_ids, labels } = example;
    let is_blank = |id: u32| tokenizer.decode(&[id], false).is_ok_and(|text| text.trim().is_empty());
    let ends_well = |passage: &[i64], start: usize| {
        let tokens = &input_ids[start..start + passage.len()];
        tokens.iter().rev().find(|id| !is_blank(**id)).is_some_and(|id| tokenizer.is_special(*id))
    };
    let mut start = 0;
    labels.chunk_by(|a, b| (*a == IGNORE_INDEX) == (*b == IGNORE_INDEX)).all(|passage| {
        let learnt = passage[0] != IGNORE_INDEX;
        start += passage.len();
        !learnt || ends_well(passage, start - passage.len())
    })
}

impl fmt::Display for EncodingReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [shortest, median, p90, p99, longest] = self.lengths;
        let share = 100.0 * self.labelled as f64 / self.tokens as f64;
        let plural = if self.examples == 1 { "" } else { "s" };
        let Self { examples, tokens, labelled, .. } = self;
        writeln!(f, "{examples} example{plural}, {tokens} tokens, {labelled} of them learnt ({share:.1} %)")?;
        write!(
            f,
            "tokens of an example: {shortest} to {longest}, median {median}, 90 % up to {p90}, 99 % up to {p99}"
        )?;
        if self.cut > 0 {
            write!(f, "\n{} too long and cut", self.cut)?;
        }
        if self.dropped > 0 {
            write!(f, "\n{} too long and left out", self.dropped)?;
        }
        if self.empty_answers > 0 {
            write!(
                f,
                "\nnote: {} with an empty answer or text: the model learns to say nothing there",
                self.empty_answers
            )?;
        }
        match self.without_end {
            0 => write!(f, "\neach passage that is learnt ends with an end token"),
            count => write!(
                f,
                "\nwarning: {count} with a passage that is learnt and has no end token: the model does not learn to stop \
                 there"
            ),
        }
    }
}
