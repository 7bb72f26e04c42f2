//! Between a conversation and its tokens, and between files and a model: against what jinja2 and transformers gave.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor};
use burn_peft_llama::{ChatTemplate, LlamaConfig, LlamaError, LlamaForCausalLm, Message, Tokenizer};
use serde::Deserialize;
use tempfile::TempDir;

fn fixture(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path)
}

#[derive(Deserialize)]
struct Templates {
    fixture_version: usize,
    tokens: BTreeMap<String, String>,
    conversations: BTreeMap<String, Vec<Message>>,
    cases: Vec<Case>,
    snippets: Vec<Snippet>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    conversation: String,
    add_generation_prompt: bool,
    text: Option<String>,
}

#[derive(Deserialize)]
struct Snippet {
    source: String,
    text: Option<String>,
}

impl Templates {
    fn read() -> Self {
        let text = fs::read(fixture("chat-templates/expected.json")).unwrap();
        let templates: Self = serde_json::from_slice(&text).unwrap();
        assert_eq!(templates.fixture_version, 2);
        templates
    }

    fn template(&self, source: &str) -> Result<ChatTemplate, LlamaError> {
        ChatTemplate::new(source, Some(&self.tokens["bos_token"]), Some(&self.tokens["eos_token"]))
    }
}

#[test]
fn whole_chat_templates_render_as_in_transformers() {
    let templates = Templates::read();
    assert_eq!(templates.cases.len(), 7 * 6 * 2);
    for case in &templates.cases {
        let source = fs::read_to_string(fixture("chat-templates/templates").join(&case.template)).unwrap();
        let messages = &templates.conversations[&case.conversation];
        let found = templates.template(&source).unwrap().render(messages, case.add_generation_prompt).ok();
        assert_eq!(found, case.text, "{} {}", case.template, case.conversation);
    }
}

/// What is known to differ, by how the snippet begins: see the documentation of [`ChatTemplate`].
const REFUSED: &[&str] = &[
    "{% set a = 1 %}{{ +a }}",
    "{% for k, v in {'b': 1, 'a': 2, 'C': 3} | dictsort(true) %}",
    "{{ 5[1:] }}",
    "{{ {'a': 1}[1:] }}",
    "{{ 'a b c' | wordcount }}",
    "{{ 'hello world foo' | truncate(8) }}",
    "{{ 'abc' | center(9) }}",
    "{{ 'a b' | urlencode }}",
    "{{ 'a\nb' | indent('>>') }}",
    "{{ '%s' % 'x' }}",
    "{{ '%05d|%x|%r' % (42, 255, 'q') }}",
    "{{ '<p>x</p>' | striptags }}",
    "{{ {'a': 1} | attr('a') }}",
    "{{ '<a>' | forceescape }}",
    "{{ 1000 | filesizeformat }}",
    "{{ 'a b c d' | wordwrap(3) }}",
    "{{ {'a': 1} | xmlattr }}",
    "{% macro m(a) %}{{ varargs }}{{ kwargs }}",
    "{% set e, f = 'xy' %}",
    "{% block x %}b{% endblock %}",
    "{% set j = joiner(', ') %}",
    "{{ 'x' * 1000000000 }}",
];
const ACCEPTED: &[&str] = &[
    "{{ range(3) | tojson }}",
    "{{ undefined_name[1:] }}",
    "{% for i in none %}x{% endfor %}",
    "{{ 'a' < 1 }}",
    "{{ none < 1 }}",
    "{% set a = 'a' %}{{ a > 1 }}",
    "{% set a = [1] %}{{ a < 'x' }}",
    "{{ 1 in 'abc' }}",
    "{{ none in 'abc' }}",
    "{{ undefined_name in 'a' }}",
];
const OTHER_TEXT: &[&str] = &[
    "{{ none[1:] }}",
    "{% for i in range(10, 0, -3) %}",
    "{{ {'a': 1}.items() }}",
    "{{ {'a': 1}.keys() }}{{ {'a': 1}.values() }}",
    "{{ {'items': 1}.items() | list }}",
    "{% autoescape true %}",
    r"{{ '\U0001F600' }}",
    r"{{ '\N{BULLET}' }}",
    r"{{ '\a' | length }}",
    r"{{ '\/' }}",
];

#[test]
fn pieces_of_templates_render_as_in_jinja_but_for_the_known_differences() {
    let templates = Templates::read();
    let messages = &templates.conversations["plain"];
    let mut differences = Vec::new();
    for Snippet { source, text } in &templates.snippets {
        let found = templates.template(source).and_then(|template| template.render(messages, false)).ok();
        let known = match (text, &found) {
            (Some(text), Some(found)) if text == found => continue,
            (None, None) => continue,
            (Some(_), None) => REFUSED,
            (None, Some(_)) => ACCEPTED,
            (Some(_), Some(_)) => OTHER_TEXT,
        };
        if !known.iter().any(|known| source.starts_with(known)) {
            differences.push(format!("{source}\n  expected {text:?}\n  found    {found:?}"));
        }
    }
    assert!(templates.snippets.len() >= 240);
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[derive(Deserialize)]
struct Logits {
    input_ids: Vec<i32>,
    logits: Vec<f32>,
}

/// A model directory: the weights of the case, with another `config.json`.
fn tied_with_other_head(config: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let weights = fixture("cases/base-untied").join("model.safetensors");
    fs::copy(weights, dir.path().join("model.safetensors")).unwrap();
    fs::write(dir.path().join("config.json"), config).unwrap();
    dir
}

#[test]
fn a_head_that_differs_from_tied_embeddings_is_kept_as_in_transformers() {
    let case = fixture("cases/c17-tied-with-other-head");
    let text = fs::read_to_string(case.join("config.json")).unwrap();
    let expected: Logits = serde_json::from_slice(&fs::read(case.join("expected.json")).unwrap()).unwrap();
    // As transformers 4 wrote the configuration, and as transformers 5 does.
    let rope = r#""rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}"#;
    let newer = text.replace(r#""rope_theta": 10000.0"#, rope).replace("torch_dtype", "dtype");
    assert_ne!(newer, text);
    for config in [text, newer] {
        let dir = tied_with_other_head(&config);
        assert!(LlamaConfig::load(dir.path()).unwrap().tie_word_embeddings);
        let device = Device::default();
        let model = LlamaForCausalLm::from_pretrained(dir.path(), &device).unwrap();
        assert!(!model.config().tie_word_embeddings);
        let ids = Tensor::<1, Int>::from_data(expected.input_ids.as_slice(), &device).unsqueeze::<2>();
        let found: Vec<f32> = model.forward(ids, None).into_data().iter::<f32>().collect();
        assert_eq!(found.len(), expected.logits.len());
        for (found, expected) in found.iter().zip(&expected.logits) {
            assert!((found - expected).abs() < 1e-4, "{found} {expected}");
        }
    }
}

/// The message with its causes, temporary directories by a name that stays.
fn note(messages: &mut String, title: &str, error: &LlamaError, dir: &Path) {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        write!(text, "\ncaused by: {error}").unwrap();
        cause = error.source();
    }
    writeln!(messages, "# {title}\n{}\n", text.replace(&dir.display().to_string(), "<directory>")).unwrap();
}

#[test]
fn files_of_a_model_that_are_not_what_their_names_say() {
    let mut messages = String::new();
    let config = r#"{"model_type": "llama"}"#;
    let lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n";
    let index = "model.safetensors.index.json";
    let cases: &[(&str, &[(&str, &str)])] = &[
        ("an empty directory", &[]),
        ("a pointer instead of the configuration", &[("config.json", lfs)]),
        ("a web page instead of the configuration", &[("config.json", "<!DOCTYPE html>")]),
        (
            "a pointer instead of the generation configuration",
            &[("config.json", config), ("generation_config.json", lfs)],
        ),
        (
            "fields of other types",
            &[("config.json", r#"{"model_type": "llama", "vocab_size": "96", "pad_token_id": 2.5}"#)],
        ),
        ("a pointer instead of the weights", &[("config.json", config), ("model.safetensors", lfs)]),
        (
            "PyTorch's format by the name of the other",
            &[("config.json", config), ("model.safetensors", "PK\u{3}\u{4}........")],
        ),
        ("an answer instead of the index", &[("config.json", config), (index, "Entry not found")]),
        (
            "a pointer instead of a shard",
            &[
                ("config.json", config),
                (index, r#"{"weight_map": {"a": "a.safetensors"}}"#),
                ("a.safetensors", lfs),
            ],
        ),
        ("PyTorch's weights only", &[("config.json", config), ("pytorch_model.bin", "x")]),
        ("llama.cpp's weights only", &[("model.gguf", "GGUF")]),
        ("the files of the original release", &[("consolidated.00.pth", "x"), ("params.json", "{}")]),
        ("an adapter's directory", &[("adapter_config.json", "{}")]),
    ];
    for (title, files) in cases {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in *files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let error = LlamaForCausalLm::from_pretrained(dir.path(), &Device::default()).unwrap_err();
        note(&mut messages, title, &error, dir.path());
    }
    let dir = tempfile::tempdir().unwrap();
    for (title, path) in [("no such directory", "none"), ("a file instead of its directory", "config.json")] {
        fs::write(dir.path().join("config.json"), config).unwrap();
        let error = LlamaForCausalLm::from_pretrained(dir.path().join(path), &Device::default()).unwrap_err();
        note(&mut messages, title, &error, dir.path());
    }
    for (title, files) in [
        ("no tokenizer", &[][..]),
        ("SentencePiece's tokenizer only", &[("tokenizer.model", "x")]),
        ("a pointer instead of the tokenizer", &[("tokenizer.json", lfs)]),
        (
            "a tokenizer that is cut off",
            &[("tokenizer.json", "{\"version\": \"1.0\",\n \"decoder\": {\"type\": ")],
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        note(&mut messages, title, &Tokenizer::load(dir.path()).unwrap_err(), dir.path());
    }
    insta::assert_snapshot!(messages);
}
