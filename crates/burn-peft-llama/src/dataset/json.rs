//! The JSON values of a file: one in each line, or a list of them.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::{Place, SHAPES};

/// The values of a file, or what is wrong with each of them.
pub(super) fn values(bytes: &[u8]) -> Vec<(Place, Result<Value, String>)> {
    if bytes.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[') {
        // A list that is broken somewhere has no elements, but a line of it may be a value of its own.
        return match serde_json::from_slice::<Vec<Strict>>(bytes) {
            Ok(values) => {
                let place = |i: usize| Place::Element(i + 1);
                values.into_iter().enumerate().map(|(i, value)| (place(i), value.checked())).collect()
            }
            Err(error) => vec![(Place::Line(error.line().max(1)), Err(reason(&error)))],
        };
    }
    let lines = bytes.split(|byte| *byte == b'\n').enumerate();
    let filled = lines.filter(|(_, line)| !line.trim_ascii().is_empty());
    filled.map(|(i, line)| (Place::Line(i + 1), value(line))).collect()
}

fn value(line: &[u8]) -> Result<Value, String> {
    if let Some(at) = line.iter().position(|byte| *byte == 0) {
        return Err(format!("a NUL byte at column {}; is the file UTF-16, or no text?", at + 1));
    }
    let text = std::str::from_utf8(line).map_err(|error| {
        let at = error.valid_up_to();
        format!("not UTF-8: byte 0x{:02x} at column {}", line[at], at + 1)
    })?;
    serde_json::from_str::<Strict>(text).map_err(|error| reason(&error))?.checked()
}

/// What serde says, without the line, which would be that of the value.
fn reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let end = text.rfind(" at line ").unwrap_or(text.len());
    match error.column() {
        0 => text[..end].to_string(),
        column => format!("no JSON: {} at column {column}\nhint: {SHAPES}", &text[..end]),
    }
}

/// A value, and a key that one of its objects has twice: the first value of such a key would be lost.
struct Strict {
    value: Value,
    twice: Option<String>,
}

impl Strict {
    fn checked(self) -> Result<Value, String> {
        match self.twice {
            Some(key) => Err(format!("the key `{key}` is there twice")),
            None => Ok(self.value),
        }
    }
}

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor)
    }
}

struct StrictVisitor;

fn plain<E>(value: impl Into<Value>) -> Result<Strict, E> {
    Ok(Strict { value: value.into(), twice: None })
}

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Strict;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Strict, E> {
        plain(value)
    }

    fn visit_i64<E>(self, value: i64) -> Result<Strict, E> {
        plain(value)
    }

    fn visit_u64<E>(self, value: u64) -> Result<Strict, E> {
        plain(value)
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Strict, E> {
        plain(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Strict, E> {
        plain(value)
    }

    fn visit_unit<E>(self) -> Result<Strict, E> {
        plain(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Strict, A::Error> {
        let (mut values, mut twice) = (vec![], None);
        while let Some(item) = items.next_element::<Strict>()? {
            values.push(item.value);
            twice = twice.or(item.twice);
        }
        Ok(Strict { value: Value::Array(values), twice })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Strict, A::Error> {
        let (mut map, mut twice) = (Map::new(), None);
        while let Some((key, entry)) = entries.next_entry::<String, Strict>()? {
            twice = twice.or(entry.twice);
            if map.insert(key.clone(), entry.value).is_some() {
                twice = twice.or(Some(key));
            }
        }
        Ok(Strict { value: Value::Object(map), twice })
    }
}
