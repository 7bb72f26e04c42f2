//! Between a conversation and its tokens, and between files and a model: against what jinja2 and transformers gave.

use std::fs;
use std::path::PathBuf;

use burn_peft_llama::{ChatTemplate, Message};
use serde::Deserialize;
use std::collections::BTreeMap;

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

    fn template(&self, source: &str) -> Result<ChatTemplate, burn_peft_llama::LlamaError> {
        ChatTemplate::new(source, Some(&self.tokens["bos_token"]), Some(&self.tokens["eos_token"]))
    }
}

#[test]
fn published_chat_templates_render_as_in_transformers() {
    let templates = Templates::read();
    assert!(templates.cases.len() >= 200);
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
