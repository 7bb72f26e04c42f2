//! The examples, and what is shown of them before they are learnt.

use std::collections::{BTreeMap, HashSet};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anyhow::{Error, Result, bail};
use burn_peft_llama::{
    Content, Dataset, EncodeOptions, Encoded, Example, IGNORE_INDEX, LlamaError, Message, Place,
    RecordProblem, Splits, Tokenizer,
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
    fn new(
        name: &str,
        mut dataset: Dataset,
        tokenizer: &Tokenizer,
        options: &EncodeOptions,
    ) -> Result<Self, LlamaError> {
        let encoded = dataset.encode(tokenizer, options)?;
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
    /// Reads and encodes the files. All wrong examples of all files are one error.
    pub fn load(args: &Args, tokenizer: &Tokenizer, max_length: usize) -> Result<Self> {
        let mut splits = Splits::load(&args.data)?;
        // A file with wrong lines is refused below; how many would be held out of the others does not matter.
        if splits.valid.is_none() && splits.train.problems.is_empty() {
            splits.valid = hold_out(&mut splits.train, args)?;
        }
        let options = EncodeOptions::new()
            .with_labels(args.loss.into())
            .with_max_length(max_length, args.too_long.into());
        let mut wrong: WrongExamples = BTreeMap::new();
        let mut part = |name, dataset| match Part::new(name, dataset, tokenizer, &options) {
            Ok(part) => Ok(Some(part)),
            Err(LlamaError::Records { path, mut problems }) => {
                wrong.entry(path).or_default().append(&mut problems);
                Ok(None)
            }
            Err(error) => Err(error),
        };
        let train = part("training", splits.train)?;
        let valid = splits.valid.map_or(Ok(None), |valid| part("held out", valid))?;
        let test = splits.test.map_or(Ok(None), |test| part("test", test))?;
        match train {
            Some(train) if wrong.is_empty() => Ok(Self { train, valid, test }),
            _ => Err(refusal(wrong)),
        }
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

/// The wrong examples of each file.
type WrongExamples = BTreeMap<PathBuf, Vec<RecordProblem>>;

/// What hints of the library name, and what it is called here.
const WORDS: [(&str, &str); 2] =
    [("`max_length`", "`--max-length`"), ("`TooLong::Cut` or `TooLong::Drop`", "`--too-long cut` or `drop`")];

/// The error about wrong examples. Each hint is in it once: several files may have the same fault.
fn refusal(wrong: WrongExamples) -> Error {
    let (mut told, mut hints) = (Vec::new(), Vec::new());
    for (path, mut problems) in wrong {
        // Examples to learn from and held-out ones may be of the same file.
        problems.sort_by_key(|problem| problem.place);
        let text = LlamaError::Records { path, problems }.to_string();
        for line in text.lines().map(String::from) {
            if !line.starts_with("hint:") {
                told.push(line);
            } else if !hints.contains(&line) {
                hints.push(line);
            }
        }
    }
    let in_words_of_here =
        |hint: String| WORDS.iter().fold(hint, |hint, (library, here)| hint.replace(library, here));
    told.extend(hints.into_iter().map(in_words_of_here));
    Error::msg(told.join("\n"))
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

#[cfg(test)]
mod tests {
    use std::fs;

    use burn_peft_examples::failure;
    use clap::Parser;

    use super::*;

    const BASE: &str = "pokemon/base";
    const UNANSWERED: &str = r#"{"messages": [{"role": "user", "content": "x"}]}"#;

    /// What is told about a directory with these files.
    fn refused(files: &[(&str, &str)], max_length: usize, more: &[&str]) -> String {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let data = dir.path().to_str().unwrap();
        let own = ["finetune", "--model", BASE, "--data", data];
        let args = Args::try_parse_from(own.iter().chain(more)).unwrap();
        let tokenizer = Tokenizer::load(BASE).unwrap();
        failure::text(&Data::load(&args, &tokenizer, max_length).err().unwrap())
    }

    #[test]
    fn wrong_lines_of_all_files_are_one_error() {
        let train = format!("{{\"prompt\": 1}}\n{UNANSWERED}\n{{\"text\": \"fine\"}}\n");
        let valid = format!("question,answer\n{UNANSWERED}\n");
        let test = r#"{"conversations": [{"from": "weird", "value": "x"}]}"#.to_string() + "\n{\n";
        let files = [("train.jsonl", &train[..]), ("valid.jsonl", &valid[..]), ("test.jsonl", &test[..])];
        // The good lines are not split, so the error is about the wrong ones alone.
        let told = refused(&files, 100, &["--valid-split", "0.9"]);
        for (file, reasons) in [
            ("train", ["line 1: expected the keys ", "line 2: expected a conversation "]),
            ("valid", ["line 1: no JSON: ", "line 2: expected a conversation "]),
            ("test", ["line 1: `conversations`, message 1: `from`: ", "line 2: no JSON: "]),
        ] {
            let (_, rest) = told.split_once(&format!("{file}.jsonl`: 2 examples cannot be used:\n")).unwrap();
            let lines: Vec<&str> = rest.lines().take(2).map(str::trim).collect();
            assert!(lines[0].starts_with(reasons[0]) && lines[1].starts_with(reasons[1]), "{file}\n{told}");
        }
        assert_eq!(told.matches("hint: ").count(), 1, "{told}");
        let alone = refused(&files[..1], 100, &["--valid-split", "0.9"]);
        assert!(alone.contains("line 2: ") && !alone.contains("held out"), "{alone}");
    }

    #[test]
    fn wrong_lines_that_are_held_out_are_told_with_the_others_of_their_file() {
        let train = format!("{UNANSWERED}\n").repeat(6);
        let told = refused(&[("train.jsonl", &train[..])], 100, &["--valid-split", "0.5"]);
        assert!(told.contains("6 examples cannot be used:"), "{told}");
        let at: Vec<_> = (1..=6).map(|line| told.find(&format!("line {line}: ")).unwrap()).collect();
        assert!(at.is_sorted(), "{told}");
    }

    #[test]
    fn too_short_a_limit_is_told_with_the_argument() {
        let line = r#"{"prompt": "What is the type of Squirtle?", "completion": "Water."}"#;
        let files = [("train.jsonl", line)];
        let cut = refused(&files, 4, &["--too-long", "cut"]);
        assert!(cut.contains("tokens, 4 are allowed, and nothing in these is learnt\n"), "{cut}");
        assert!(cut.ends_with("choose a larger `--max-length`\n"), "{cut}");
        let dropped = refused(&files, 4, &["--too-long", "drop"]);
        assert!(dropped.ends_with("choose a larger `--max-length`\n"), "{dropped}");
        let refused = refused(&files, 4, &["--too-long", "refuse"]);
        assert!(
            refused.contains("`--max-length`") && refused.contains("`--too-long cut` or `drop`"),
            "{refused}"
        );
    }
}
