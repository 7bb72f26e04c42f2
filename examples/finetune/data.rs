//! The examples, and what is shown of them before they are learnt.

use std::collections::HashSet;
use std::io::IsTerminal;
use std::path::Path;

use anyhow::{Context, Result, bail};
use burn_peft_llama::{
    Content, Dataset, EncodeOptions, Encoded, Example, IGNORE_INDEX, Message, Place, Splits, Tokenizer,
    TooLong,
};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::cli::Args;

/// The fewest examples of which some are held out without being asked for.
const ENOUGH: usize = 40;

/// Examples as tokens, in their parts.
pub struct Data {
    pub train: Part,
    /// Held out: what the loss is measured on during the training.
    pub valid: Option<Part>,
    /// What it is measured on before and after.
    pub test: Option<Part>,
}

/// Some of the examples.
pub struct Part {
    /// What it is called.
    pub name: String,
    pub encoded: Encoded,
    dataset: Dataset,
}

impl Part {
    fn new(name: &str, mut dataset: Dataset, tokenizer: &Tokenizer, options: &EncodeOptions) -> Result<Self> {
        let encoded = dataset.encode(tokenizer, options).with_context(|| {
            let file = dataset.path.display();
            match options.too_long {
                TooLong::Refuse => format!("`{file}` cannot be learnt\nhint: if examples are too long, `--too-long cut` or `drop` go on without"),
                _ => format!("`{file}` cannot be learnt"),
            }
        });
        let encoded = encoded?;
        // Nobody is asked about examples that were left out.
        let mut places = encoded.places.iter();
        let mut next = places.next();
        dataset.records.retain(|record| {
            let remains = next == Some(&record.place);
            if remains {
                next = places.next();
            }
            remains
        });
        Ok(Self { name: name.into(), encoded, dataset })
    }

    /// The examples.
    pub fn examples(&self) -> &[Example] {
        &self.encoded.examples
    }

    /// Where an example is.
    pub fn place(&self, example: usize) -> Place {
        self.encoded.places[example]
    }

    /// The questions, as messages to answer, each with its answer.
    pub fn questions(&self) -> impl Iterator<Item = (Vec<Message>, &str)> {
        self.dataset.records.iter().filter_map(|record| question(&record.content))
    }
}

/// The question and the last answer of an example, if it has them.
fn question(content: &Content) -> Option<(Vec<Message>, &str)> {
    let (question, answer) = match content {
        Content::Messages(messages) => {
            let last = messages.iter().rposition(|message| message.role == "assistant")?;
            (messages[..last].to_vec(), &messages[last].content)
        }
        Content::Continuation { prompt, completion } => (prompt.clone(), &completion.first()?.content),
        Content::Completion { prompt, completion } => (vec![Message::user(prompt)], completion),
        _ => return None,
    };
    (!question.is_empty()).then_some((question, answer))
}

impl Data {
    /// Reads and encodes the files.
    pub fn load(args: &Args, tokenizer: &Tokenizer, max_length: usize) -> Result<Self> {
        let mut splits = Splits::load(&args.data)?;
        if splits.valid.is_none() {
            splits.valid = hold_out(&mut splits.train, args)?;
        }
        let options = EncodeOptions::new()
            .with_labels(args.loss.into())
            .with_max_length(max_length, args.too_long.into());
        let part = |name, dataset| Part::new(name, dataset, tokenizer, &options);
        Ok(Self {
            train: part("training", splits.train)?,
            valid: splits.valid.map(|valid| part("held out", valid)).transpose()?,
            test: splits.test.map(|test| part("test", test)).transpose()?,
        })
    }

    /// Prints counts, lengths, and the first examples as tokens.
    pub fn show(&self, tokenizer: &Tokenizer, count: usize) -> Result<()> {
        for part in [Some(&self.train), self.valid.as_ref(), self.test.as_ref()].into_iter().flatten() {
            let report = part.encoded.report.to_string().replace('\n', "\n            ");
            println!("{:<11} {report}", format!("{}:", part.name));
        }
        for i in 0..count.min(self.train.examples().len()) {
            println!("\n{}, what is learnt {}:", self.train.place(i), marking());
            println!("{}", tokens(tokenizer, &self.train.examples()[i])?);
        }
        Ok(())
    }
}

/// Takes some examples out of `train`.
fn hold_out(train: &mut Dataset, args: &Args) -> Result<Option<Dataset>> {
    let count = train.records.len();
    let share = args.valid_split.unwrap_or(if count >= ENOUGH { 0.05 } else { 0.0 });
    let held_out = (share * count as f64).ceil() as usize;
    if held_out == 0 {
        return Ok(None);
    }
    if held_out == count {
        bail!("all {count} examples would be held out\nhint: a smaller `--valid-split`, or 0 for none");
    }
    let mut order: Vec<usize> = (0..count).collect();
    order.shuffle(&mut StdRng::seed_from_u64(args.seed));
    let chosen: HashSet<usize> = order.into_iter().take(held_out).collect();
    let mut valid = train.clone();
    let records = std::mem::take(&mut train.records).into_iter().enumerate();
    let (held_out, rest): (Vec<_>, Vec<_>) = records.partition(|(i, _)| chosen.contains(i));
    valid.records = held_out.into_iter().map(|(_, record)| record).collect();
    train.records = rest.into_iter().map(|(_, record)| record).collect();
    Ok(Some(valid))
}

fn marking() -> &'static str {
    if std::io::stdout().is_terminal() { "in green" } else { "in [[brackets]]" }
}

/// The most tokens of an example that are shown.
const SHOWN: usize = 400;

/// The text of an example, with its tokens apart and those that are learnt marked.
pub fn tokens(tokenizer: &Tokenizer, example: &Example) -> Result<String> {
    let terminal = std::io::stdout().is_terminal();
    let is_learnt = |i: usize| i > 0 && example.labels[i] != IGNORE_INDEX;
    let mut text = String::new();
    let mut i = 0;
    let end = example.input_ids.len().min(SHOWN);
    while i < end {
        let start = i;
        while i < end && is_learnt(i) == is_learnt(start) {
            i += 1;
        }
        // Decoded together: a token may be a part of a letter.
        let run = tokenizer.decode(&example.input_ids[start..i], false)?;
        text += &match (is_learnt(start), terminal) {
            (false, false) => run,
            (true, false) => format!("[[{run}]]"),
            (false, true) => format!("\u{1b}[2m{run}\u{1b}[0m"),
            (true, true) => format!("\u{1b}[32m{run}\u{1b}[0m"),
        };
    }
    let ids: Vec<String> = example.input_ids[..end].iter().map(ToString::to_string).collect();
    text += &format!("\n{} tokens: {}", example.input_ids.len(), ids.join(" "));
    if end < example.input_ids.len() {
        text += " ..";
    }
    Ok(text)
}

/// Whether a directory or file exists, told before anything else is done.
pub fn check(path: &Path) -> Result<()> {
    if !path.exists() {
        bail!(
            "there is no `{}`\nhint: `--data` takes a file of examples, or a directory with a `train.jsonl`",
            path.display()
        );
    }
    Ok(())
}
