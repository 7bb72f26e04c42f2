//! Chat templates: the model's own Jinja template, rendered the way transformers renders it.

mod environment;
mod json;
mod limits;
mod methods;
mod repr;
mod source;

use std::error::Error;
use std::fmt;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use burn_peft_files::WrongFile;
use jiff::civil;
use minijinja::{Environment, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};

use self::environment::environment;
use crate::error::LlamaError;
use crate::file;
use crate::message::Message;

/// Name of the file that transformers 5 keeps a template in.
pub(crate) const TEMPLATE_FILE: &str = "chat_template.jinja";

/// The variable that tells `generation` blocks what to put around their text.
const MARKS: &str = "__marks";

/// What error messages call the template.
const NAME: &str = "chat_template";

/// A template that turns messages into the text a model was trained on.
///
/// The environment is the one of transformers: `trim_blocks` and `lstrip_blocks`, loop controls, Python's string
/// methods, `tojson` without HTML escapes, `raise_exception(message)`, `strftime_now(format)`, and the variables
/// `messages`, `add_generation_prompt`, `bos_token`, `eos_token`, `tools` and `documents` (both none).
/// `{% generation %}` blocks are rendered as their content; where they are, [`Labels`](crate::Labels) go by them. Values print as in Python, dicts keep their order, and
/// `\r\n` and `\r` in the source are `\n`, as Jinja reads them; in messages they stay.
///
/// Templates come from downloaded files. What they may do is bounded: work that grows with the conversation and no
/// faster, ranges of 100,000 numbers, values nested 200 deep.
///
/// # What differs from Jinja
///
/// Refused with an error: the filters `attr`, `center`, `filesizeformat`, `forceescape`, `random`, `striptags`,
/// `truncate`, `urlencode`, `urlize`, `wordcount`, `wordwrap` and `xmlattr`; `text % values`; the functions `cycler`,
/// `joiner` and `lipsum`; a plus before a value; `varargs` and `kwargs` of macros; blocks, includes, imports; `break`
/// in a block inside its loop; slices of what has no items.
///
/// Not an error as in Jinja: comparing values of different types, which gives an order; `in` a text with what is no
/// text; a loop over none, which is empty; slices of an undefined value.
///
/// Other text: generators, ranges and views such as `d.items()` print as lists; a list inside `~` has floats without
/// exponent; `\U0001f600`, `\N{..}`, `\a` and `\/` in literals; `{% autoescape %}` does nothing.
///
/// ```
/// use burn_peft_llama::{ChatTemplate, Message};
///
/// # fn main() -> Result<(), burn_peft_llama::LlamaError> {
/// let template = ChatTemplate::new(
///     "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{{ eos_token }}{% endfor %}\
///      {% if add_generation_prompt %}<|assistant|>{% endif %}",
///     None,
///     Some("</s>"),
/// )?;
/// assert_eq!(template.render(&[Message::user(" Hi ")], true)?, "<|user|>Hi</s><|assistant|>");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: Arc<str>,
    /// The source as the engine takes it.
    prepared: Arc<str>,
    environment: Arc<Environment<'static>>,
    bos_token: Option<String>,
    eos_token: Option<String>,
    date: Option<civil::Date>,
}

impl ChatTemplate {
    /// Parses a template. `bos_token` and `eos_token` are what the variables of those names hold.
    ///
    /// # Errors
    /// [`LlamaError::ChatTemplate`] if the source is not a template.
    pub fn new(
        source: impl AsRef<str>,
        bos_token: Option<&str>,
        eos_token: Option<&str>,
    ) -> Result<Self, LlamaError> {
        let template = Self {
            source: source.as_ref().into(),
            prepared: source::prepare(source.as_ref()).map_err(failed)?.into(),
            environment: Arc::new(environment(None).map_err(failed)?),
            bos_token: bos_token.map(str::to_string),
            eos_token: eos_token.map(str::to_string),
            date: None,
        };
        template.environment.template_from_named_str(NAME, &template.prepared).map_err(failed)?;
        Ok(template)
    }

    /// Reads the template of a model directory: `chat_template.jinja`, otherwise `chat_template` in
    /// `tokenizer_config.json`, which is a template, or a list of named ones with a `default`.
    /// `None` if the directory has neither.
    pub(crate) fn load(
        dir: &Path,
        in_config: Option<TemplateField>,
        bos_token: Option<&str>,
        eos_token: Option<&str>,
    ) -> Result<Option<Self>, LlamaError> {
        let hint = "it holds the model's chat template";
        let path = dir.join(TEMPLATE_FILE);
        let file = file::read_optional(&path, hint)?;
        // Any text is a template, so nothing else would notice.
        if let Some(found) = file.as_ref().and_then(|text| WrongFile::detect(text.as_bytes()))
            && matches!(found, WrongFile::LfsPointer | WrongFile::Html | WrongFile::ServerMessage)
        {
            return Err(LlamaError::WrongFile { path, found });
        }
        let source = match (file, in_config) {
            (Some(source), _) | (None, Some(TemplateField::One(source))) => source,
            (None, None) => return Ok(None),
            (None, Some(TemplateField::Many(templates))) => {
                let names: Vec<_> = templates.iter().map(|t| format!("`{}`", t.name)).collect();
                let found = format!("templates named {}", names.join(", "));
                let default = templates.into_iter().find(|t| t.name == "default");
                default.ok_or(LlamaError::NoChatTemplate { found })?.template
            }
        };
        Self::new(source, bos_token, eos_token).map(Some)
    }

    /// The template as it stands in the model's files.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Fixes the date that `strftime_now` sees, written as `2024-07-26`, at midnight.
    ///
    /// Llama 3 templates put the current date into the system text, so that the same messages give another
    /// prompt tomorrow. Default: the clock of this machine, in local time.
    ///
    /// # Errors
    /// [`LlamaError::InvalidDate`] if `date` is not one.
    pub fn with_date(mut self, date: &str) -> Result<Self, LlamaError> {
        let parsed = date.parse().map_err(|_| LlamaError::InvalidDate { date: date.to_string() })?;
        self.date = Some(parsed);
        self.environment = Arc::new(environment(self.date).map_err(failed)?);
        Ok(self)
    }

    /// Renders `messages`; with `add_generation_prompt`, up to where the assistant's answer begins.
    ///
    /// The text holds all special tokens, the first one included, so it must be tokenised without adding any.
    ///
    /// # Errors
    /// - [`LlamaError::ChatTemplateRejected`] if the template raises an exception, such as for roles that do not
    ///   alternate,
    /// - [`LlamaError::ChatTemplateEndless`] if it does not finish after far more work than any published template
    ///   needs,
    /// - [`LlamaError::ChatTemplate`] if it fails otherwise.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, LlamaError> {
        self.render_marked(messages, add_generation_prompt).map(|(text, _)| text)
    }

    /// Renders `messages`, and tells which bytes of the text came from `{% generation %}` blocks.
    ///
    /// # Errors
    /// As [`render`](Self::render).
    pub(crate) fn render_marked(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<(String, Vec<Range<usize>>), LlamaError> {
        let marks = marks(messages);
        let bytes = messages.iter().map(|message| message.role.len() + message.content.len()).sum();
        let fuel = limits::fuel(messages.len(), bytes);
        let context = context! {
            messages => Value::from_iter(messages.iter().map(|Message { role, content }| {
                Value::from_pairs([("role", role.as_str()), ("content", content.as_str())])
            })),
            add_generation_prompt,
            // transformers leaves a token that does not exist undefined, which renders as nothing.
            bos_token => self.bos_token.as_ref().map_or(Value::UNDEFINED, Value::from),
            eos_token => self.eos_token.as_ref().map_or(Value::UNDEFINED, Value::from),
            tools => Value::from(()),
            documents => Value::from(()),
            __marks => marks.map(String::from).to_vec(),
        };
        let mut environment = (*self.environment).clone();
        environment.set_fuel(Some(fuel));
        // The last line of defence. Known to get here with minijinja 3.1: a slice whose step is the smallest 64-bit
        // integer, where overflow is checked.
        let render = || environment.render_named_str(NAME, &self.prepared, context);
        let rendered = catch_unwind(AssertUnwindSafe(render))
            .map_err(|_| LlamaError::ChatTemplate { source: "the template engine panicked".into() })?;
        let rendered = rendered.map_err(|error| match error.kind() {
            ErrorKind::OutOfFuel => LlamaError::ChatTemplateEndless { steps: fuel },
            _ => failed(error),
        })?;
        Ok(without_marks(&rendered, marks))
    }
}

/// Two characters that are no text by Unicode's rules (noncharacters), and that no message has.
fn marks(messages: &[Message]) -> [char; 2] {
    let texts = || messages.iter().flat_map(|message| [&message.role, &message.content]);
    let mut free = ('\u{fdd0}'..='\u{fdef}').filter(|mark| !texts().any(|text| text.contains(*mark)));
    [free.next().unwrap_or('\u{fdd0}'), free.next().unwrap_or('\u{fdd1}')]
}

/// A text without the marks around passages, and where the passages are.
fn without_marks(marked: &str, [open, close]: [char; 2]) -> (String, Vec<Range<usize>>) {
    let (mut text, mut passages, mut start) = (String::with_capacity(marked.len()), vec![], 0);
    for piece in marked.split_inclusive([open, close]) {
        if let Some(piece) = piece.strip_suffix(open) {
            text += piece;
            start = text.len();
        } else if let Some(piece) = piece.strip_suffix(close) {
            text += piece;
            passages.push(start..text.len());
        } else {
            text += piece;
        }
    }
    (text, passages)
}

impl PartialEq for ChatTemplate {
    fn eq(&self, other: &Self) -> bool {
        (&self.source, &self.bos_token, &self.eos_token, self.date)
            == (&other.source, &other.bos_token, &other.eos_token, other.date)
    }
}

/// `chat_template` in `tokenizer_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum TemplateField {
    One(String),
    Many(Vec<NamedTemplate>),
}

/// One of several templates.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct NamedTemplate {
    name: String,
    template: String,
}

/// What `raise_exception` raises.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Raised {}

/// Tells what the template raised on purpose from what went wrong in it.
fn failed(error: minijinja::Error) -> LlamaError {
    let mut cause: Option<&(dyn Error + 'static)> = error.source();
    while let Some(source) = cause {
        if let Some(Raised(message)) = source.downcast_ref() {
            return LlamaError::ChatTemplateRejected { message: message.clone() };
        }
        cause = source.source();
    }
    LlamaError::ChatTemplate { source: error.into() }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A ChatML template with a default system text.
    pub(crate) const CHATML: &str = "\
{%- for m in messages %}
    {%- if loop.first and m['role'] != 'system' %}
        {{- '<|im_start|>system\nBe brief.<|im_end|>\n' }}
    {%- endif %}
    {{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
";

    /// A template in the manner of Llama 3: dated system text, headers, trimmed content, no line break at the end.
    pub(crate) const LLAMA3: &str = "\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now(\"%d %b %Y\") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'].strip() %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = \"\" %}
{%- endif %}
{{- \"<|start_header_id|>system<|end_header_id|>\\n\\nToday: \" + date_string + \"\\n\\n\" + system + \"<|eot_id|>\" }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant'] %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
";

    fn render(source: &str, messages: &[Message]) -> String {
        ChatTemplate::new(source, Some("<s>"), Some("</s>")).unwrap().render(messages, false).unwrap()
    }

    #[test]
    fn chatml_renders_with_its_default_system_text_and_generation_prompt() {
        let template = ChatTemplate::new(CHATML, None, None).unwrap();
        assert_eq!(
            template.render(&[Message::user("Hi\n")], true).unwrap(),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi\n<|im_end|>\n<|im_start|>assistant\n"
        );
        let own = [Message::system("S"), Message::user("U"), Message::assistant("A")];
        assert_eq!(
            template.render(&own, false).unwrap(),
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        );
    }

    #[test]
    fn llama3_renders_one_bos_the_fixed_date_and_trimmed_content() {
        let template = ChatTemplate::new(LLAMA3, Some("<|begin_of_text|>"), Some("<|eot_id|>")).unwrap();
        let template = template.with_date("2024-07-26").unwrap();
        assert_eq!(
            template.render(&[Message::system(" S "), Message::user(" U ")], true).unwrap(),
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\n\nS<|eot_id|>\
             <|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>\
             <|start_header_id|>assistant<|end_header_id|>\n\n"
        );
    }

    #[test]
    fn the_default_date_is_today() {
        let today = || jiff::Zoned::now().strftime("%Y-%m-%d").to_string();
        let before = today();
        let rendered = render("{{ strftime_now('%Y-%m-%d') }}", &[]);
        assert!(rendered == before || rendered == today(), "{rendered}");
    }

    #[test]
    fn raise_exception_is_told_apart_from_a_broken_template() {
        let template = ChatTemplate::new(LLAMA3, None, None).unwrap();
        match template.render(&[Message::new("tool", "x")], false) {
            Err(LlamaError::ChatTemplateRejected { message }) => assert_eq!(message, "unknown role tool"),
            other => panic!("{other:?}"),
        }
        let broken = ChatTemplate::new("{{ messages[0].content.nothing.here }}", None, None).unwrap();
        assert!(matches!(broken.render(&[], false), Err(LlamaError::ChatTemplate { .. })));
        assert!(matches!(ChatTemplate::new("{% if %}", None, None), Err(LlamaError::ChatTemplate { .. })));
        assert!(matches!(
            ChatTemplate::new("", None, None).unwrap().with_date("26 Jul 2024"),
            Err(LlamaError::InvalidDate { .. })
        ));
    }

    #[test]
    fn blocks_are_trimmed_as_by_transformers() {
        let source =
            "{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n";
        assert_eq!(render(source, &[Message::user("a"), Message::user("b")]), "a\nb\n");
    }

    #[test]
    fn python_strings_loop_controls_and_undefined_tokens_work() {
        assert_eq!(render("{{ 'A b'.lower().split(' ')[1].upper() }}{{ bos_token }}", &[]), "B<s>");
        assert_eq!(
            render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", &[]),
            "01"
        );
        let bare = ChatTemplate::new("[{{ bos_token }}]{{ tools is none }}", None, None).unwrap();
        assert_eq!(bare.render(&[], false).unwrap(), "[]True");
    }

    #[test]
    fn tojson_writes_what_python_writes() {
        let source = "{{ {'a': [1, '<é>'], 'b': none} | tojson }}";
        assert_eq!(render(source, &[]), r#"{"a": [1, "<é>"], "b": null}"#);
        assert_eq!(render("{{ {'a': [1]} | tojson(indent=2) }}", &[]), "{\n  \"a\": [\n    1\n  ]\n}");
    }

    #[test]
    fn generation_blocks_render_their_content_and_keep_whitespace_control() {
        let plain = "a {%- if true %} b {%- endif -%} c";
        let marked = "a {%- generation %} b {%- endgeneration -%} c";
        assert_eq!(render(marked, &[]), render(plain, &[]));
        assert_eq!(render("{% set generation = 'x' %}{{ generation }}", &[]), "x");
    }

    #[test]
    fn line_breaks_of_the_source_are_read_as_by_jinja_and_those_of_messages_stay() {
        assert_eq!(
            render("{{ messages[0].content }}\r\nend\r", &[Message::user("a\r\nb\rc")]),
            "a\r\nb\rc\nend"
        );
        assert_eq!(render("{% if true %}\r\na{{ 'b\rc' }}{% endif %}\r\n", &[]), "ab\nc");
    }

    #[test]
    fn literals_print_and_test_as_in_python() {
        assert_eq!(
            render("{{ {'b': 1, 'a': 2} | tojson }}{{ ['x'] }}{{ 'x' is sequence }}", &[]),
            r#"{"b": 1, "a": 2}['x']True"#
        );
        assert_eq!(
            render("{{ {'b': (1,), 'a': [none, true, 1.0, 1e20, \"it's\"]} }}", &[]),
            r#"{'b': (1,), 'a': [None, True, 1.0, 1e+20, "it's"]}"#
        );
        assert_eq!(render("{{ messages }}", &[Message::user("x")]), "[{'role': 'user', 'content': 'x'}]");
    }

    #[test]
    fn nothing_that_a_template_does_panics() {
        let empty = [Message::user("")];
        for (source, expected) in [
            ("{{ messages[0].content[::-1] }}", ""),
            ("{{ messages[0].content[5:2:-1] }}{{ ''[-9:] }}{{ ([])[::-1] }}", "[]"),
            ("{{ 'abcdef'[5:2:-1] }}{{ 'abcdef'[:0:-1] }}{{ [1, 2, 3][:-9:-2] }}", "fedfedcb[3, 1]"),
            (
                "{{ range(9223372036854775807, -9223372036854775807, -9223372036854775807) | list | length }}",
                "2",
            ),
        ] {
            assert_eq!(render(source, &empty), expected, "{source}");
        }
        for source in [
            "{{ 'abc'[::0] }}",
            "{{ 'x' * 10 ** 9 }}",
            "{{ [1] * 10 ** 9 }}",
            "{{ 'x'.zfill(10 ** 12) }}",
            "{{ '{:1000000000}'.format('a') }}",
            "{{ 'a\nb' | indent(10 ** 9) }}",
            "{{ [1] | tojson(indent=10 ** 9) }}",
            "{{ range(10 ** 6) }}",
            "{{ 10 ** 100 }}",
            "{{ 1 // 0 }}",
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
            "{% set ns = namespace(x=1) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
            "{% set ns = namespace(x=1) %}{% for i in range(9999) %}{% set ns.x = {'a': ns.x} %}{% endfor %}",
            "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
            "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns ~ 'a' }}",
        ] {
            let template = ChatTemplate::new(source, None, None).unwrap();
            assert!(template.render(&empty, false).is_err(), "{source}");
        }
        let breaks = "{% for i in [1] %}{% with %}{% break %}{% endwith %}{% endfor %}";
        assert!(matches!(ChatTemplate::new(breaks, None, None), Err(LlamaError::ChatTemplate { .. })));
    }

    #[test]
    fn an_endless_template_is_an_error_and_a_long_conversation_is_none() {
        let loops = "{% for i in range(10 ** 5) %}{% for j in range(10 ** 5) %}x{% endfor %}{% endfor %}";
        let error = ChatTemplate::new(loops, None, None).unwrap().render(&[], false).unwrap_err();
        assert!(matches!(error, LlamaError::ChatTemplateEndless { .. }), "{error}");
        assert!(error.to_string().contains("did not finish within 2000000 steps\nhint: "), "{error}");

        let turn = |i: usize| match i % 2 {
            0 => Message::user("a question of some length ".repeat(40)),
            _ => Message::assistant("<think>\nHm\n</think>\n\nan answer ".repeat(40)),
        };
        let messages: Vec<Message> = (0..2000).map(turn).collect();
        let long =
            include_str!("../../../tests/fixtures/chat-templates/templates/last-question-and-thoughts.jinja");
        let rendered = ChatTemplate::new(long, None, Some("</s>")).unwrap().render(&messages, true).unwrap();
        assert_eq!(
            (rendered.matches("<user>").count(), rendered.matches("<assistant>").count()),
            (1000, 1001)
        );
    }

    #[test]
    fn the_jinja_file_wins_and_a_list_needs_a_default() {
        let dir = tempfile::tempdir().unwrap();
        let field = |json: &str| serde_json::from_str::<Option<TemplateField>>(json).unwrap();
        let load = |json: &str| ChatTemplate::load(dir.path(), field(json), None, None);
        assert!(load("null").unwrap().is_none());
        assert_eq!(load(r#""one""#).unwrap().unwrap().source(), "one");
        let list = r#"[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]"#;
        assert_eq!(load(list).unwrap().unwrap().source(), "d");
        let error = load(r#"[{"name": "rag", "template": "t"}]"#).unwrap_err().to_string();
        assert!(error.contains("`rag`"), "{error}");
        std::fs::write(dir.path().join(TEMPLATE_FILE), "file").unwrap();
        assert_eq!(load(list).unwrap().unwrap().source(), "file");
    }
}
