//! `tojson` as transformers defines it: Python's `json.dumps`.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, Value};

use super::repr;

/// Widest indentation, in characters: more is a mistake that costs memory.
const MAX_INDENT: usize = 64;

/// `tojson(value, ensure_ascii=false, indent=none, separators=none, sort_keys=false)`.
pub(super) fn tojson(value: &Value, positional: Rest<Value>, options: Kwargs) -> Result<Value, Error> {
    let mut positional = positional.0.into_iter();
    let mut option = |name: &str| -> Result<Value, Error> {
        let named: Option<Value> = options.get(name)?;
        Ok(positional.next().or(named).filter(|value| !value.is_undefined()).unwrap_or(Value::from(())))
    };
    let ensure_ascii = option("ensure_ascii")?.is_true();
    let indent = indent(&option("indent")?)?;
    let separators = option("separators")?;
    let sort_keys = option("sort_keys")?.is_true();
    if positional.next().is_some() {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    options.assert_all_used()?;
    let (item, key) = if separators.is_none() {
        (if indent.is_some() { "," } else { ", " }.to_string(), ": ".to_string())
    } else {
        match separators.try_iter()?.map(|text| text.as_str().map(str::to_string)).collect::<Vec<_>>() {
            pair if pair.len() == 2 => (
                pair[0].clone().ok_or_else(|| invalid("expected texts as `separators`"))?,
                pair[1].clone().ok_or_else(|| invalid("expected texts as `separators`"))?,
            ),
            _ => return Err(invalid("expected two texts as `separators`")),
        }
    };
    let mut writer = Writer { out: String::new(), ensure_ascii, indent, item, key, sort_keys };
    writer.value(value, 0)?;
    Ok(Value::from_safe_string(writer.out))
}

fn indent(value: &Value) -> Result<Option<String>, Error> {
    if value.is_none() {
        return Ok(None);
    }
    let indent = match value.as_str() {
        Some(text) => text.to_string(),
        // Python takes a negative number as 0.
        None => " ".repeat(i64::try_from(value.clone())?.clamp(0, MAX_INDENT as i64 + 1) as usize),
    };
    if indent.len() > MAX_INDENT {
        Err(invalid(&format!("expected an `indent` of at most {MAX_INDENT}")))
    } else {
        Ok(Some(indent))
    }
}

fn invalid(message: &str) -> Error {
    Error::new(ErrorKind::BadSerialization, message.to_string())
}

struct Writer {
    out: String,
    ensure_ascii: bool,
    indent: Option<String>,
    /// Between two items, without the line break of an indented text.
    item: String,
    /// Between a key and its value.
    key: String,
    sort_keys: bool,
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        repr::too_deep(depth)?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&number(value)),
            ValueKind::String => self.text(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.checked().collect::<Result<_, _>>()?;
                self.all('[', ']', depth, items.len(), |writer, i| writer.value(&items[i], depth + 1))?;
            }
            ValueKind::Map => {
                let keys: Vec<Value> = value.try_iter()?.checked().collect::<Result<_, _>>()?;
                let mut pairs = Vec::with_capacity(keys.len());
                for key in keys {
                    let item = value.get_item(&key)?;
                    pairs.push((key_text(&key)?, item));
                }
                if self.sort_keys {
                    pairs.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.all('{', '}', depth, pairs.len(), |writer, i| {
                    writer.text(&pairs[i].0);
                    let between = writer.key.clone();
                    writer.out.push_str(&between);
                    writer.value(&pairs[i].1, depth + 1)
                })?;
            }
            kind => return Err(invalid(&format!("a value of type {kind} has no JSON"))),
        }
        Ok(())
    }

    fn all(
        &mut self,
        open: char,
        close: char,
        depth: usize,
        count: usize,
        mut write: impl FnMut(&mut Self, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for i in 0..count {
            if i > 0 {
                let between = self.item.clone();
                self.out.push_str(&between);
            }
            self.line_break(depth + 1);
            write(self, i)?;
        }
        if count > 0 {
            self.line_break(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn line_break(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            (0..depth).for_each(|_| self.out.push_str(indent));
        }
    }

    fn text(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && c > '~') => {
                    let mut units = [0; 2];
                    for unit in c.encode_utf16(&mut units) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// A number as JSON; Python writes what JSON has no number for by its name.
fn number(value: &Value) -> String {
    match f64::try_from(value.clone()) {
        Ok(number) if !value.is_integer() => match repr::float(number).as_str() {
            "nan" => "NaN".to_string(),
            "inf" => "Infinity".to_string(),
            "-inf" => "-Infinity".to_string(),
            text => text.to_string(),
        },
        _ => value.to_string(),
    }
}

fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_string()),
        ValueKind::Number => Ok(number(key)),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_string()),
        ValueKind::None => Ok("null".to_string()),
        kind => Err(invalid(&format!("a value of type {kind} is no key of a JSON object"))),
    }
}
