//! Files of examples, as people have them.

mod encode;
mod json;
mod record;
mod report;

use std::fs;
use std::path::{Path, PathBuf};

use burn_peft_files::WrongFile;

use crate::error::LlamaError;
use crate::problem::RecordProblem;

pub use encode::{EncodeOptions, Encoded, TooLong};
pub use record::Content;
pub use report::EncodingReport;

/// What a file of examples looks like, for hints.
pub(crate) const SHAPES: &str = "expected one JSON object in each line, such as `{\"prompt\": \"..\", \"completion\": \
     \"..\"}`, or a file that is one JSON list of such objects";

/// The examples of a file.
///
/// The file has one JSON object in each line, or is a JSON list of objects. An object has one of these shapes; the first
/// that it has all keys of counts:
///
/// | keys | |
/// |---|---|
/// | `messages` | a list of `{"role", "content"}`; a content may be a list of `{"type": "text", "text"}` |
/// | `conversations` | the same, or a list of `{"from", "value"}` with `human`, `gpt`, `system` or a like name |
/// | `prompt`, `completion` | texts, or lists of messages |
/// | `instruction`, `output` | texts; `input`, if there is one, stands behind the instruction |
/// | `text` | a document |
///
/// Other keys of the object are ignored, but for `tools`. Calls of tools are not supported.
///
/// All of the file is held in memory, as text and as values, and 12 bytes for each of its tokens once they are
/// [encoded](Self::encode).
///
/// ```
/// use burn_peft_llama::{Content, Dataset};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("train.jsonl");
/// std::fs::write(&path, r#"{"prompt": "Squirtle", "completion": "water"}"#)?;
/// let dataset = Dataset::load(&path)?;
/// let expected = Content::Completion { prompt: "Squirtle".into(), completion: "water".into() };
/// assert_eq!(dataset.records[0].content, expected);
/// # Ok(())
/// # }
/// ```
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub struct Dataset {
    /// The file.
    pub path: PathBuf,
    /// Its examples, in order.
    pub records: Vec<Record>,
    /// Its lines or elements that are no examples, with the reasons. [`encode`](Self::encode) refuses the file if there are
    /// any, and tells them together with the examples that cannot be encoded.
    pub problems: Vec<RecordProblem>,
}

/// An example of a file.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Where it is.
    pub place: Place,
    /// What it says.
    pub content: Content,
}

/// Where an example is in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// The line, from 1.
    Line(usize),
    /// The element of the list, from 1.
    Element(usize),
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Line(number) => write!(f, "line {number}"),
            Self::Element(number) => write!(f, "element {number}"),
        }
    }
}

/// The files of a directory, as mlx-lm names them.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub struct Splits {
    /// To learn from: `train.jsonl` or `train.json`.
    pub train: Dataset,
    /// To measure on during the training: `valid.jsonl` or `valid.json`.
    pub valid: Option<Dataset>,
    /// To measure on at the end: `test.jsonl` or `test.json`.
    pub test: Option<Dataset>,
}

impl Splits {
    /// The files in the directory `path`; or the file `path`, all of which is to learn from.
    ///
    /// # Errors
    /// [`LlamaError::ReadFile`] if the directory has no `train` file, and those of [`Dataset::load`].
    pub fn load(path: impl AsRef<Path>) -> Result<Self, LlamaError> {
        let path = path.as_ref();
        if !path.is_dir() {
            return Ok(Self { train: Dataset::load(path)?, valid: None, test: None });
        }
        let find = |split: &str| {
            let files = [path.join(format!("{split}.jsonl")), path.join(format!("{split}.json"))];
            files.into_iter().find(|file| file.exists())
        };
        let train = find("train").unwrap_or_else(|| path.join("train.jsonl"));
        let load = |split| find(split).map(Dataset::load).transpose();
        Ok(Self { train: Dataset::load(train)?, valid: load("valid")?, test: load("test")? })
    }
}

impl Dataset {
    /// Reads a file.
    ///
    /// A byte-order mark, empty lines, line ends of Windows and a missing last one do no harm. Lines that are no examples
    /// are no error yet: they are in [`problems`](Self::problems), so that [`encode`](Self::encode) tells all that is wrong
    /// at once.
    ///
    /// # Errors
    /// - [`LlamaError::ReadFile`] if the file cannot be read, [`LlamaError::WrongFile`] if it is something else, such as
    ///   the pointer that Git LFS leaves,
    /// - [`LlamaError::NoExamples`] if there is nothing in it.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, LlamaError> {
        let path = path.as_ref();
        let hint = "expected a file of examples: JSON lines, or a directory with a `train.jsonl`";
        let bytes =
            fs::read(path).map_err(|source| LlamaError::ReadFile { path: path.into(), source, hint })?;
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
        // An odd file is told from odd lines by its beginning.
        let found = WrongFile::detect(bytes).filter(|found| *found != WrongFile::Empty);
        if let Some(found) = found {
            return Err(LlamaError::WrongFile { path: path.into(), found });
        }
        let mut records = vec![];
        let mut problems = vec![];
        for (place, content) in json::values(bytes) {
            match content.and_then(|value| record::content(&value)) {
                Ok(content) => records.push(Record { place, content }),
                Err(reason) => problems.push(RecordProblem { place, reason }),
            }
        }
        if records.is_empty() && problems.is_empty() {
            return Err(LlamaError::NoExamples { path: path.into() });
        }
        Ok(Self { path: path.into(), records, problems })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conversation::{Example, IGNORE_INDEX, Labels};
    use crate::message::Message;
    use crate::tokenizer::tests::{chatml, llama3};
    use crate::tokenizer::{SpecialTokens, Tokenizer};

    fn load(bytes: impl AsRef<[u8]>) -> Result<Vec<Record>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train.jsonl");
        fs::write(&path, bytes).unwrap();
        let loaded = Dataset::load(&path).and_then(|dataset| match dataset.problems {
            problems if problems.is_empty() => Ok(dataset.records),
            problems => Err(LlamaError::Records { path: dataset.path, problems }),
        });
        loaded.map_err(|error| error.to_string().replace(&path.display().to_string(), "FILE"))
    }

    fn contents(bytes: impl AsRef<[u8]>) -> Vec<Content> {
        load(bytes).unwrap().into_iter().map(|record| record.content).collect()
    }

    fn completion(prompt: &str, completion: &str) -> Content {
        Content::Completion { prompt: prompt.into(), completion: completion.into() }
    }

    #[test]
    fn every_shape_is_read() {
        let chat = Content::Messages(vec![Message::system("s"), Message::user("u"), Message::assistant("a")]);
        let cases = [
            (
                r#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},
                   {"role": "assistant", "content": "a", "tool_calls": null}], "source": 3}"#,
                chat.clone(),
            ),
            (
                r#"{"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "u"},
                   {"from": "gpt", "value": "a"}]}"#,
                chat,
            ),
            (
                r#"{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": [
                   {"type": "text", "text": "u"}]}], "completion": [{"role": "assistant", "content": "a"}]}"#,
                Content::Continuation {
                    prompt: vec![Message::system("s"), Message::user("u")],
                    completion: vec![Message::assistant("a")],
                },
            ),
            (r#"{"prompt": "p\u00e9", "completion": "c", "tools": []}"#, completion("pé", "c")),
            (r#"{"instruction": "i", "input": "", "output": "o"}"#, completion("i", "o")),
            (r#"{"instruction": "i", "input": "x", "output": "o", "text": "t"}"#, completion("i\n\nx", "o")),
            (r#"{"text": "t"}"#, Content::Text("t".into())),
        ];
        let lines: Vec<String> = cases.iter().map(|(line, _)| line.replace('\n', " ")).collect();
        let expected: Vec<Content> = cases.into_iter().map(|(_, content)| content).collect();
        assert_eq!(contents(lines.join("\n")), expected);
        assert_eq!(contents(format!("\u{feff}\r\n  {}\r\n\r\n", lines.join("\r\n"))), expected);
        let list = load(format!("[{}]\n", lines.join(",\n\n"))).unwrap();
        assert_eq!(list[6].place, Place::Element(7));
        assert_eq!(list.into_iter().map(|record| record.content).collect::<Vec<_>>(), expected);
        let lines = load("\n{\"text\": \"a\"}\n\n{\"text\": \"b\"}").unwrap();
        assert_eq!((lines[0].place, lines[1].place), (Place::Line(2), Place::Line(4)));
    }

    #[test]
    fn wrong_lines_are_all_named_with_the_reason() {
        let deep = format!("{{\"text\": {}1{}}}", "[".repeat(200), "]".repeat(200));
        let cases: Vec<(&[u8], &str)> = vec![
            (b"{\"text\": \"a\xff\"}", "not UTF-8: byte 0xff at column 12"),
            (b"{\"text\": \"a\0b\"}", "a NUL byte at column 12; is the file UTF-16, or no text?"),
            (b"{\"text\": \"a\", \"text\": \"b\"}", "the key `text` is there twice"),
            (b"{\"text\": 3}", "`text`: expected a text, found a number"),
            (b"{\"text\": null}", "`text`: expected a text, found null"),
            (b"[]", "expected an object, found a list"),
            (b"\"text\"", "expected an object, found a text"),
            (b"{}", "`instruction` and `output`, or `text`, found none"),
            (b"{\"question\": 1, \"answer\": 2}", "or `text`, found `question`, `answer`"),
            (b"{\"text\": \"a\"", "no JSON: EOF while parsing an object at column 12"),
            (deep.as_bytes(), "no JSON: recursion limit exceeded at column 136"),
            (b"{\"messages\": []}", "`messages`: expected at least one message, found none"),
            (b"{\"messages\": {}}", "`messages`: expected a list of messages, found an object"),
            (b"{\"messages\": [{\"role\": \"user\"}]}", "`messages`, message 1: `content` is missing"),
            (
                b"{\"messages\": [{\"role\": \"user\", \"content\": \"\"}, {\"role\": \"a\", \"content\": null}]}",
                "`messages`, message 2: `content`: expected a text, found null",
            ),
            (
                b"{\"messages\": [{\"role\": \"a\", \"content\": \"\", \"tool_calls\": [1]}]}",
                "message 1: `tool_calls` is not supported",
            ),
            (
                b"{\"messages\": [{\"role\": \"a\", \"content\": [{\"type\": \"image\"}]}]}",
                "message 1: a part of type \"image\" is not supported",
            ),
            (
                b"{\"conversations\": [{\"from\": \"weird\", \"value\": \"a\"}]}",
                "message 1: `from`: expected `human`, `user`, `gpt`, `assistant`, `chatgpt`, `bing`, `model`, `system`, \
                 `tool`, `function` or `observation`, found `weird`",
            ),
            (b"{\"messages\": [{\"x\": {\"y\": 1, \"y\": 2}}]}", "the key `y` is there twice"),
            (b"{\"text\": \"a\", \"tools\": [1]}", "`tools` are not supported"),
            (b"{\"prompt\": \"a\", \"completion\": [\"b\"]}", "`prompt`: expected a list of messages, found a text"),
        ];
        for (line, reason) in &cases {
            // Not the first line, where a list would be the whole file.
            let found = load([b"{\"text\": \"fine\"}\n", *line].concat()).unwrap_err();
            let expected = "`FILE`: 1 example cannot be used:\n  line 2: ";
            assert!(found.starts_with(expected) && found.contains(reason), "{reason}\n{found}");
        }
        let all: Vec<u8> = cases
            .iter()
            .cycle()
            .take(45)
            .flat_map(|(line, _)| [b"{\"text\": \"\"}\n", *line, b"\n"].concat())
            .collect();
        let found = load(all).unwrap_err();
        assert!(found.contains("45 examples cannot be used") && found.contains("line 40:"), "{found}");
        assert!(!found.contains("line 42:") && found.contains("\n  and 25 more\nhint: "), "{found}");
        assert_eq!(found.matches("hint: ").count(), 1, "{found}");

        let list =
            load("[{\"text\": \"a\"}, {\"text\": 1},\n {\"text\": \"a\", \"text\": \"a\"}]").unwrap_err();
        assert!(list.contains("element 2: `text`") && list.contains("element 3: the key"), "{list}");
        let broken = load("[{\"text\": \"a\"},\n {\"text\": }]").unwrap_err();
        assert!(broken.contains("line 2: no JSON: expected value at column 11"), "{broken}");
        for nothing in ["", "\n \r\n", "[]"] {
            let error = load(nothing).unwrap_err();
            assert!(error.starts_with("`FILE` has no examples\nhint: expected one JSON object"), "{error}");
        }
        let wide: Vec<u8> = "{\"text\": \"a\"}".encode_utf16().flat_map(u16::to_le_bytes).collect();
        assert!(load([&b"\xff\xfe"[..], &wide].concat()).unwrap_err().contains("byte-order mark"));
        assert!(load("version https://git-lfs.github.com/spec/v1\n").unwrap_err().contains("git-LFS"));
    }

    #[test]
    fn a_directory_has_splits() {
        let dir = tempfile::tempdir().unwrap();
        let missing = Splits::load(dir.path()).unwrap_err().to_string();
        assert!(missing.contains("train.jsonl") && missing.contains("hint:"), "{missing}");
        fs::write(dir.path().join("train.json"), "[{\"text\": \"a\"}]").unwrap();
        fs::write(dir.path().join("valid.jsonl"), "{\"text\": \"b\"}").unwrap();
        let splits = Splits::load(dir.path()).unwrap();
        assert!(splits.train.records.len() == 1 && splits.valid.is_some() && splits.test.is_none());
        let file = Splits::load(dir.path().join("valid.jsonl")).unwrap();
        assert!(file.train.records.len() == 1 && file.valid.is_none());
        fs::write(dir.path().join("test.jsonl"), "").unwrap();
        assert!(Splits::load(dir.path()).unwrap_err().to_string().contains("test.jsonl` has no examples"));
        // Wrong lines of one file do not hide those of another.
        for file in ["valid.jsonl", "test.jsonl"] {
            fs::write(dir.path().join(file), "{\"text\": 1}").unwrap();
        }
        let splits = Splits::load(dir.path()).unwrap();
        let wrong = |dataset: Option<Dataset>| dataset.unwrap().problems.len();
        assert_eq!((splits.train.problems.len(), wrong(splits.valid), wrong(splits.test)), (0, 1, 1));
    }

    #[test]
    fn speakers_are_roles() {
        let names = ["system", "user", "chatgpt", "observation", "model", "human", "bing"];
        let turns = names.map(|name| format!("{{\"from\": \"{name}\", \"value\": \"\"}}"));
        let found = contents(format!("{{\"conversations\": [{}]}}", turns.join(", ")));
        let roles = ["system", "user", "assistant", "observation", "assistant", "user", "assistant"];
        assert_eq!(found, [Content::Messages(roles.map(|role| Message::new(role, "")).to_vec())]);
    }

    #[test]
    fn what_is_no_json_has_one_hint_about_the_shapes() {
        let hint = format!("\nhint: {SHAPES}");
        for (file, lines) in [("{\n  \"text\": \"a\"\n}\n", 3), ("question,answer\nSquirtle,water\n", 2)] {
            let error = load(file).unwrap_err();
            assert_eq!(error.matches(": no JSON: ").count(), lines, "{error}");
            assert!(error.matches("hint:").count() == 1 && error.ends_with(&hint), "{error}");
        }
        let wrong = load("{\"text\": 1}").unwrap_err();
        assert!(!wrong.contains("hint:"), "{wrong}");
    }

    fn dataset(lines: &str) -> Dataset {
        Dataset { path: "FILE".into(), records: load(lines).unwrap(), problems: vec![] }
    }

    fn learnt(tokenizer: &Tokenizer, example: &Example) -> String {
        let labels = example.labels.iter().filter(|label| **label != IGNORE_INDEX);
        tokenizer.decode(&labels.map(|label| *label as u32).collect::<Vec<_>>(), false).unwrap()
    }

    const LINES: &str = r#"{"prompt": "Squirtle", "completion": "water"}
{"messages": [{"role": "user", "content": "Oddish"}, {"role": "assistant", "content": "grass and poison"}]}
{"text": "fire"}"#;

    #[test]
    fn examples_become_tokens_with_their_answers_labelled() {
        let encoded = dataset(LINES).encode(&chatml(), &EncodeOptions::new()).unwrap();
        let texts: Vec<String> = encoded.examples.iter().map(|example| learnt(&chatml(), example)).collect();
        assert_eq!(texts, ["water<|im_end|>", "grass and poison<|im_end|>", "fire<|im_end|>"]);
        let report = &encoded.report;
        assert_eq!((report.examples, report.cut, report.dropped, report.without_end), (3, 0, 0, 0));
        assert_eq!(
            report.tokens,
            encoded.examples.iter().map(|example| example.input_ids.len()).sum::<usize>()
        );
        assert!(report.lengths.is_sorted() && report.labelled < report.tokens / 2);
        assert!(report.to_string().ends_with("ends with an end token"), "{report}");

        let line = r#"{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"}], "completion": [{"role": "assistant", "content": "fire"}]}"#;
        let continued = dataset(&line.replace('\n', " ")).encode(&chatml(), &EncodeOptions::new()).unwrap();
        assert_eq!(learnt(&chatml(), &continued.examples[0]), "fire<|im_end|>");

        let everything = EncodeOptions::new().with_labels(Labels::Everything);
        let everything = dataset(LINES).encode(&chatml(), &everything).unwrap();
        assert!(learnt(&chatml(), &everything.examples[0]).contains("Squirtle"));
        // The line break behind the end token is learnt as well then, and is no passage without an end.
        assert!(learnt(&chatml(), &everything.examples[0]).ends_with("<|im_end|>\n"));
        assert_eq!(everything.report.without_end, 0);

        // Without a chat template, the completion follows the prompt.
        let plain = Tokenizer::train_bpe(["a b"], 270, SpecialTokens::new("<s>", "</s>"), None).unwrap();
        let line = LINES.lines().next().unwrap();
        let encoded = dataset(line).encode(&plain, &EncodeOptions::new()).unwrap();
        assert_eq!(plain.decode(&encoded.examples[0].input_ids, true).unwrap(), "Squirtlewater");
        assert_eq!(learnt(&plain, &encoded.examples[0]), "water</s>");
    }

    #[test]
    fn too_long_examples_are_cut_dropped_or_refused_and_counted() {
        let dataset = dataset(LINES);
        let whole = dataset.encode(&chatml(), &EncodeOptions::new()).unwrap();
        let lengths: Vec<usize> = whole.examples.iter().map(|example| example.input_ids.len()).collect();
        let encode =
            |max, too_long| dataset.encode(&chatml(), &EncodeOptions::new().with_max_length(max, too_long));
        let most = lengths[1] - 3;
        assert!(lengths[0] <= most);
        let cut = encode(most, TooLong::Cut).unwrap();
        assert_eq!((cut.report.cut, cut.report.dropped, cut.report.without_end), (1, 0, 1));
        assert_eq!(cut.examples[1].input_ids, whole.examples[1].input_ids[..most]);
        let text = cut.report.to_string();
        assert!(text.contains("1 too long and cut") && text.contains("warning: 1 with"), "{text}");
        let dropped = encode(most, TooLong::Drop).unwrap();
        assert_eq!((dropped.examples.len(), dropped.report.dropped), (2, 1));
        assert_eq!(dropped.places, [Place::Line(1), Place::Line(3)]);
        let refused = encode(most, TooLong::Refuse).unwrap_err().to_string();
        let expected = format!("line 2: {} tokens, {most} are allowed", lengths[1]);
        assert!(
            refused.contains(&expected) && refused.contains("\nhint: choose a larger `max_length`, or "),
            "{refused}"
        );
        // What has no labels any more is dropped as well.
        assert_eq!(encode(lengths[2], TooLong::Cut).unwrap().report.dropped, 2);
        // If none is left, each is told, and why cutting did not help.
        for (too_long, reason) in [
            (TooLong::Cut, "tokens, 1 are allowed, and nothing in these is learnt\n"),
            (TooLong::Drop, "tokens, 1 are allowed\n"),
        ] {
            let error = encode(1, too_long).unwrap_err().to_string();
            assert!(error.contains("3 examples") && error.matches(reason).count() == 3, "{error}");
            let hint = "\nhint: no example would be left to learn from: choose a larger `max_length`";
            assert!(error.matches("hint:").count() == 1 && error.ends_with(hint), "{error}");
        }
    }

    #[test]
    fn empty_answers_are_counted() {
        let lines = r#"{"prompt": "Squirtle", "completion": ""}
{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""},
  {"role": "user", "content": "b"}, {"role": "assistant", "content": "fire"}]}
{"text": "  "}
{"prompt": "Squirtle", "completion": "water"}
{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""},
  {"role": "user", "content": "b"}], "completion": [{"role": "assistant", "content": "fire"}]}"#;
        let dataset = dataset(&lines.replace("\n  ", " "));
        let report = |labels| {
            let options = EncodeOptions::new().with_labels(labels);
            dataset.encode(&chatml(), &options).unwrap().report
        };
        let answers = report(Labels::Answers);
        assert_eq!((answers.examples, answers.empty_answers), (5, 3));
        let text = answers.to_string();
        assert!(text.contains("\nnote: 3 with an empty answer or text: "), "{text}");
        // The answers before the last one are not learnt then.
        assert_eq!(report(Labels::LastAnswer).empty_answers, 2);
    }

    #[test]
    fn lines_that_are_no_examples_are_told_with_those_that_cannot_be_encoded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train.jsonl");
        let unanswered = r#"{"messages": [{"role": "user", "content": "x"}]}"#;
        fs::write(&path, format!("{unanswered}\n{{\"prompt\": 1}}\n{{\"text\": \"fine\"}}\n{unanswered}\n"))
            .unwrap();
        let loaded = Dataset::load(&path).unwrap();
        assert_eq!((loaded.records.len(), loaded.problems.len()), (3, 1));
        let error = loaded.encode(&chatml(), &EncodeOptions::new()).unwrap_err().to_string();
        let lines: Vec<&str> = error.lines().filter_map(|line| line.trim().split(':').next()).collect();
        assert!(error.contains("3 examples cannot be used:"), "{error}");
        assert_eq!(lines[1..], ["line 1", "line 2", "line 4"], "{error}");
    }

    #[test]
    fn a_hint_is_given_once_for_all_lines() {
        let plain = Tokenizer::train_bpe(["a b"], 270, SpecialTokens::new("<s>", "</s>"), None).unwrap();
        let line =
            r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
        let lines = format!("{line}\n{line}");
        let error = dataset(&lines).encode(&plain, &EncodeOptions::new()).unwrap_err().to_string();
        assert!(error.contains("found neither\n  line 2: no chat template: "), "{error}");
        assert!(error.matches("hint: ").count() == 1 && error.contains("\nhint: base models"), "{error}");
    }

    #[test]
    fn what_cannot_be_encoded_is_named_with_its_line() {
        let lines = r#"{"text": "fine"}
{"messages": [{"role": "user", "content": "Oddish"}]}
{"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]}"#;
        let error = dataset(lines).encode(&llama3(), &EncodeOptions::new()).unwrap_err().to_string();
        for line in [
            "`FILE`: 2 examples cannot be used:",
            "line 2: expected a conversation with an `assistant` message, found `user`",
            "line 3: the chat template rejects these messages: unknown role tool",
        ] {
            assert!(error.contains(line), "{error}");
        }
        let huge = format!("{{\"text\": \"fine\"}}\n{{\"text\": \"{}\"}}", "water ".repeat(300_000));
        let options = EncodeOptions::new().with_max_length(1024, TooLong::Refuse);
        let error = dataset(&huge).encode(&chatml(), &options).unwrap_err().to_string();
        assert!(error.contains("line 2: ") && error.contains("tokens, 1024 are allowed"), "{error}");
    }
}
