//! The shapes in which people write examples.

use serde_json::{Map, Value};

use crate::message::Message;
use crate::problem::alternatives;

/// The names in `from`, and the roles that they mean.
const SPEAKERS: [(&str, &str); 11] = [
    ("human", "user"),
    ("user", "user"),
    ("gpt", "assistant"),
    ("assistant", "assistant"),
    ("chatgpt", "assistant"),
    ("bing", "assistant"),
    ("model", "assistant"),
    ("system", "system"),
    ("tool", "tool"),
    ("function", "function"),
    ("observation", "observation"),
];

/// What an example says.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// A conversation.
    Messages(Vec<Message>),
    /// A conversation and how it goes on: only answers in the rest are learnt.
    Continuation {
        /// The beginning.
        prompt: Vec<Message>,
        /// The rest.
        completion: Vec<Message>,
    },
    /// A text and how it goes on: with a chat template a question and its answer.
    Completion {
        /// The beginning, or the question.
        prompt: String,
        /// The rest, or the answer.
        completion: String,
    },
    /// A document.
    Text(String),
}

/// The example that an object is, or why it is none.
pub(super) fn content(value: &Value) -> Result<Content, String> {
    let Value::Object(object) = value else {
        return Err(format!("expected an object, found {}", kind(value)));
    };
    if object.get("tools").is_some_and(|tools| !is_nothing(tools)) {
        return Err("`tools` are not supported".to_string());
    }
    let has = |keys: &[&str]| keys.iter().all(|key| object.contains_key(*key));
    if has(&["messages"]) {
        messages("messages", &object["messages"]).map(Content::Messages)
    } else if has(&["conversations"]) {
        messages("conversations", &object["conversations"]).map(Content::Messages)
    } else if has(&["prompt", "completion"]) {
        completion(object)
    } else if has(&["instruction", "output"]) {
        let (mut prompt, completion) = (text(object, "instruction")?, text(object, "output")?);
        if object.get("input").is_some_and(|input| !is_nothing(input)) {
            prompt += &format!("\n\n{}", text(object, "input")?);
        }
        Ok(Content::Completion { prompt, completion })
    } else if has(&["text"]) {
        text(object, "text").map(Content::Text)
    } else {
        let keys: Vec<String> = object.keys().take(8).map(|key| format!("`{key}`")).collect();
        let found = if keys.is_empty() { "none".to_string() } else { keys.join(", ") };
        Err(format!(
            "expected the keys `messages`, `conversations`, `prompt` and `completion`, `instruction` and `output`, or \
             `text`, found {found}"
        ))
    }
}

fn completion(object: &Map<String, Value>) -> Result<Content, String> {
    if object["prompt"].is_array() || object["completion"].is_array() {
        let prompt = messages("prompt", &object["prompt"])?;
        return Ok(Content::Continuation {
            prompt,
            completion: messages("completion", &object["completion"])?,
        });
    }
    Ok(Content::Completion { prompt: text(object, "prompt")?, completion: text(object, "completion")? })
}

/// A list of messages, in either way of writing them.
fn messages(key: &str, value: &Value) -> Result<Vec<Message>, String> {
    let Value::Array(items) = value else {
        return Err(format!("`{key}`: expected a list of messages, found {}", kind(value)));
    };
    if items.is_empty() {
        return Err(format!("`{key}`: expected at least one message, found none"));
    }
    let items = items.iter().enumerate();
    items
        .map(|(i, item)| message(item).map_err(|reason| format!("`{key}`, message {}: {reason}", i + 1)))
        .collect()
}

fn message(value: &Value) -> Result<Message, String> {
    let Value::Object(object) = value else {
        return Err(format!("expected an object, found {}", kind(value)));
    };
    let (role_key, content_key) =
        if object.contains_key("from") { ("from", "value") } else { ("role", "content") };
    let is_other =
        |(key, value): &(&String, &Value)| *key != role_key && *key != content_key && !is_nothing(value);
    if let Some((key, _)) = object.iter().find(is_other) {
        return Err(format!("`{key}` is not supported; leave it out if it means nothing here"));
    }
    let name = text(object, role_key)?;
    let role = if role_key == "from" { speaker(&name)?.to_string() } else { name };
    Ok(Message::new(role, parts(object, content_key)?))
}

/// The role of a speaker. A chat template may render any role, so an unknown name would be learnt as it stands.
fn speaker(name: &str) -> Result<&'static str, String> {
    match SPEAKERS.iter().find(|(known, _)| *known == name) {
        Some((_, role)) => Ok(*role),
        None => {
            let known = alternatives(SPEAKERS.iter().map(|(known, _)| *known));
            Err(format!("`from`: expected {known}, found `{name}`"))
        }
    }
}

/// A text, or the texts of a list of parts.
fn parts(object: &Map<String, Value>, key: &str) -> Result<String, String> {
    let Some(Value::Array(parts)) = object.get(key) else { return text(object, key) };
    let text_of = |part: &Value| match part {
        Value::Object(part) if part.get("type").is_none_or(|kind| kind == "text") => text(part, "text"),
        Value::Object(part) => Err(format!("a part of type {} is not supported", part["type"])),
        other => Err(format!("`{key}`: expected parts with a `text`, found {}", kind(other))),
    };
    parts.iter().map(text_of).collect()
}

fn text(object: &Map<String, Value>, key: &str) -> Result<String, String> {
    match object.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(format!("`{key}`: expected a text, found {}", kind(other))),
        None => Err(format!("`{key}` is missing")),
    }
}

fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Object(entries) => entries.is_empty(),
        _ => false,
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
