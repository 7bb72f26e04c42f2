//! Labelled sentences: what is learnt, and what it is measured on.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Messages to a company about thirty things, four of each: who writes them praises, complains, asks or wants something.
const MESSAGES: &str = include_str!("messages.tsv");

/// The share of the sentences that is learnt from; the others, which follow, are held out.
const LEARNT: f64 = 0.6;

/// Sentences with their labels, as numbers.
#[derive(Debug, Clone, Default)]
pub struct Sentences {
    pub texts: Vec<String>,
    pub labels: Vec<usize>,
}

impl Sentences {
    /// Those at these places.
    pub fn at(&self, places: &[usize]) -> (Vec<&str>, Vec<usize>) {
        places.iter().map(|&place| (&*self.texts[place], self.labels[place])).unzip()
    }
}

/// A file of labelled sentences.
#[derive(Debug)]
pub struct Data {
    /// The names of the labels.
    pub labels: Vec<String>,
    pub learnt: Sentences,
    pub held_out: Sentences,
}

impl Data {
    /// Reads a file with a label, a tab and a sentence in each line, or else the sentences of this example.
    pub fn load(file: Option<&Path>) -> Result<Self> {
        let Some(file) = file else { return Self::parse(MESSAGES) };
        let text =
            std::fs::read_to_string(file).with_context(|| format!("`{}` cannot be read", file.display()))?;
        Self::parse(&text).with_context(|| format!("`{}` cannot be used", file.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let mut rows = vec![];
        for (number, line) in text.lines().enumerate() {
            match line.split_once('\t').map(|(label, text)| (label.trim(), text.trim())) {
                Some((label, text)) if !label.is_empty() && !text.is_empty() => rows.push((label, text)),
                _ if line.trim().is_empty() => {}
                _ => bail!("expected a label, a tab and a sentence in line {}, found `{line}`", number + 1),
            }
        }
        let labels: BTreeSet<&str> = rows.iter().map(|(label, _)| *label).collect();
        let labels: Vec<String> = labels.into_iter().map(str::to_string).collect();
        let (learnt, held_out) = rows.split_at((rows.len() as f64 * LEARNT) as usize);
        for label in &labels {
            for (part, name) in [(learnt, "first three fifths"), (held_out, "rest, which is held out")] {
                let count = part.iter().filter(|row| row.0 == *label).count();
                if count < 2 {
                    bail!(
                        "expected 2 or more sentences of the label `{label}` in the {name}, found {count}\nhint: mix the lines: `shuf FILE`"
                    );
                }
            }
        }
        if labels.len() < 2 {
            bail!("expected at least 2 labels, found {}", labels.len());
        }
        let part = |rows: &[(&str, &str)]| Sentences {
            texts: rows.iter().map(|row| row.1.to_string()).collect(),
            labels: rows.iter().filter_map(|row| labels.iter().position(|label| label == row.0)).collect(),
        };
        let (learnt, held_out) = (part(learnt), part(held_out));
        Ok(Self { labels, learnt, held_out })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_out_is_about_other_things() {
        let data = Data::load(None).unwrap();
        assert_eq!(data.labels, ["complaint", "praise", "question", "request"]);
        assert_eq!((data.learnt.texts.len(), data.held_out.texts.len()), (72, 48));
        assert!(data.learnt.texts.iter().any(|text| text.contains("bike")));
        assert!(!data.held_out.texts.iter().any(|text| text.contains("bike")));
        assert_eq!(data.held_out.labels[..4], [1, 0, 2, 3]);
    }

    #[test]
    fn a_file_that_cannot_be_used_is_told_with_the_way_out() {
        let error = |text: &str| Data::parse(text).unwrap_err().to_string();
        let sorted = ["a", "b"].map(|label| format!("{label}\tone\r\n").repeat(5)).concat();
        let found = error(&sorted);
        assert!(
            found.contains("`a` in the rest, which is held out, found 0\nhint: mix the lines"),
            "{found}"
        );
        assert_eq!(
            error("a\tone\n\nb two"),
            "expected a label, a tab and a sentence in line 3, found `b two`"
        );
        assert_eq!(error(""), "expected at least 2 labels, found 0");
        assert_eq!(error(&"a\tone\n".repeat(8)), "expected at least 2 labels, found 1");
    }
}
