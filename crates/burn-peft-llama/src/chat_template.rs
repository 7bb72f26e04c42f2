//! Chat templates: the model's own Jinja template, rendered the way transformers renders it.

use std::{error::Error, fmt, path::Path, sync::Arc};

use jiff::{Zoned, civil};
use minijinja::{Environment, ErrorKind, Value, context, value::Kwargs};
use serde::{Deserialize, Serialize};
use serde_json::ser::{Formatter, PrettyFormatter};

use crate::{LlamaError, Message, file};

/// Name of the file that transformers 5 keeps a template in.
pub(crate) const TEMPLATE_FILE: &str = "chat_template.jinja";

/// A template that turns messages into the text a model was trained on.
///
/// The environment is the one of transformers: `trim_blocks` and `lstrip_blocks`, loop controls, Python's string
/// methods, `tojson` without HTML escapes, `raise_exception(message)`, `strftime_now(format)`, and the variables
/// `messages`, `add_generation_prompt`, `bos_token`, `eos_token`, `tools` and `documents` (both none).
/// `{% generation %}` blocks are rendered as their content.
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
    environment: Arc<Environment<'static>>,
    bos_token: Option<String>,
    eos_token: Option<String>,
    date: Option<civil::Date>,
}

impl ChatTemplate {
    /// Parses a template. `bos_token` and `eos_token` are what the variables of those names hold.
    ///
    /// # Errors
    ///
    /// [`LlamaError::ChatTemplate`] if the source is not a template.
    pub fn new(
        source: impl AsRef<str>,
        bos_token: Option<&str>,
        eos_token: Option<&str>,
    ) -> Result<Self, LlamaError> {
        let template = Self {
            source: source.as_ref().into(),
            environment: Arc::new(environment(None)),
            bos_token: bos_token.map(str::to_owned),
            eos_token: eos_token.map(str::to_owned),
            date: None,
        };
        let parsed = without_generation_blocks(&template.source);
        template.environment.template_from_named_str("chat_template", &parsed).map_err(failed)?;
        Ok(template)
    }

    /// Reads the template of a model directory: `chat_template.jinja`, otherwise `chat_template` in
    /// `tokenizer_config.json`, which is a template or a list of named ones of which `default` is taken.
    /// `None` if the directory has neither.
    pub(crate) fn load(
        dir: &Path,
        in_config: Option<TemplateField>,
        bos_token: Option<&str>,
        eos_token: Option<&str>,
    ) -> Result<Option<Self>, LlamaError> {
        let hint = "it holds the model's chat template";
        let source = match (file::read_optional(&dir.join(TEMPLATE_FILE), hint)?, in_config) {
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
    ///
    /// [`LlamaError::InvalidDate`] if `date` is not one.
    pub fn with_date(mut self, date: &str) -> Result<Self, LlamaError> {
        let parsed = date.parse().map_err(|_| LlamaError::InvalidDate { date: date.to_owned() })?;
        self.date = Some(parsed);
        self.environment = Arc::new(environment(self.date));
        Ok(self)
    }

    /// Renders `messages`; with `add_generation_prompt`, up to where the assistant's answer begins.
    ///
    /// The text holds all special tokens, the first one included, so it must be tokenised without adding any.
    ///
    /// # Errors
    ///
    /// - [`LlamaError::ChatTemplateRejected`] if the template raises an exception, such as for roles that do not
    ///   alternate,
    /// - [`LlamaError::ChatTemplate`] if it fails otherwise.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, LlamaError> {
        let context = context! {
            messages,
            add_generation_prompt,
            // transformers leaves a token that does not exist undefined, which renders as nothing.
            bos_token => self.bos_token.as_ref().map_or(Value::UNDEFINED, Value::from),
            eos_token => self.eos_token.as_ref().map_or(Value::UNDEFINED, Value::from),
            tools => Value::from(()),
            documents => Value::from(()),
        };
        let source = without_generation_blocks(&self.source);
        self.environment.render_named_str("chat_template", &source, context).map_err(failed)
    }
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

fn environment(date: Option<civil::Date>) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
        let error = minijinja::Error::new(ErrorKind::InvalidOperation, "raised by the template");
        Err(error.with_source(Raised(message)))
    });
    environment.add_function("strftime_now", move |format: String| {
        match date {
            Some(date) => jiff::fmt::strtime::format(&format, date.at(0, 0, 0, 0)),
            None => jiff::fmt::strtime::format(&format, &Zoned::now()),
        }
        .map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string()))
    });
    environment
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`, which is what templates expect `tojson` to be.
fn tojson(value: &Value, options: Kwargs) -> Result<Value, minijinja::Error> {
    let invalid = |error: String| minijinja::Error::new(ErrorKind::BadSerialization, error);
    let indent: Option<usize> = options.get("indent")?;
    if options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false) {
        return Err(invalid("`ensure_ascii` is not supported".to_owned()));
    }
    options.assert_all_used()?;
    let mut json = Vec::new();
    let written = match indent {
        Some(width) => {
            let indent = " ".repeat(width.min(64));
            let formatter = PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, formatter))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, Spaced)),
    };
    written.map_err(|error| invalid(error.to_string()))?;
    let json = String::from_utf8(json).map_err(|error| invalid(error.to_string()))?;
    Ok(Value::from_safe_string(json))
}

/// JSON on one line with Python's separators, `", "` and `": "`.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

/// Rewrites `{% generation %}` blocks, an extension of transformers that marks the assistant's words, as blocks
/// that are always taken. The signs of whitespace control stay.
fn without_generation_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let end = tag.find("%}").map_or(tag.len(), |end| end + 2);
        let (tag, after) = tag.split_at(end);
        let word = tag.trim_start_matches("{%").trim_end_matches("%}");
        let word = word.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        match word {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
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
        let today = || Zoned::now().strftime("%Y-%m-%d").to_string();
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
        file::write(&dir.path().join(TEMPLATE_FILE), "file").unwrap();
        assert_eq!(load(list).unwrap().unwrap().source(), "file");
    }
}
