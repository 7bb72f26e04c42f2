//! The engine, set up as transformers sets up Jinja.

use jiff::{Zoned, civil};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::{MARKS, Raised, json, limits, methods, repr, source};

/// An engine whose `strftime_now` sees `date`, or the clock.
pub(super) fn environment(date: Option<civil::Date>) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    // A macro that calls itself takes several levels each time.
    environment.set_recursion_limit(100);
    environment.set_formatter(|out, _, value| match value.as_str() {
        Some(text) => out.write_str(text).map_err(Error::from),
        None => out.write_str(&repr::text(value)?).map_err(Error::from),
    });
    environment.set_unknown_method_callback(methods::call);

    environment.add_filter("tojson", json::tojson);
    environment.add_filter("string", |value: &Value| match value.as_str() {
        Some(_) => Ok(value.clone()),
        None => repr::text(value).map(Value::from),
    });
    environment.add_filter("join", join);
    environment.add_filter("trim", trim);
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    environment.add_filter("float", float);
    environment.add_filter("int", int);
    environment.add_filter("escape", escape);
    environment.add_filter("e", escape);
    environment.add_filter("pprint", |value: &Value| repr::repr(value));
    // Python looks for attributes here and never for keys, which the engine does not tell apart.
    environment.remove_filter("attr");
    environment.add_filter(source::MARKED, |state: &State, text: &str| {
        let marks = state.lookup(MARKS).unwrap_or_default();
        let mark = |at: usize| marks.get_item_by_index(at).map(|mark| mark.to_string()).unwrap_or_default();
        format!("{}{text}{}", mark(0), mark(1))
    });
    environment.add_filter(source::BOUNDED, limits::bounded);
    environment.add_filter(source::BOUNDED_ITEM, limits::bounded_item);
    environment.add_test("callable", |value: &Value| {
        // A macro is an object that is neither a list nor a dict.
        value.kind() == ValueKind::Plain || value.kind() == ValueKind::Undefined
    });
    environment.remove_global("debug");
    environment.add_test("sequence", |value: &Value| is_sized(value) || value.kind() == ValueKind::Undefined);
    environment.add_test("iterable", |value: &Value| is_sized(value) || value.kind() == ValueKind::Undefined);

    environment.add_function("range", limits::range);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        let error = Error::new(ErrorKind::InvalidOperation, "raised by the template");
        Err(error.with_source(Raised(message)))
    });
    environment.add_function("strftime_now", move |format: String| {
        match date {
            Some(date) => jiff::fmt::strtime::format(&format, date.at(0, 0, 0, 0)),
            None => jiff::fmt::strtime::format(&format, &Zoned::now()),
        }
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
    });
    Ok(environment)
}

/// What has a length and items in Python: texts, lists and dicts.
fn is_sized(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Iterable | ValueKind::Map)
}

/// `join(values, d='', attribute=none)`, each value as Python prints it.
fn join(
    state: &mut State,
    values: &Value,
    separator: Option<String>,
    options: Kwargs,
) -> Result<String, Error> {
    let named: Option<String> = options.get("d")?;
    let attribute: Option<String> = options.get("attribute")?;
    options.assert_all_used()?;
    let separator = separator.or(named).unwrap_or_default();
    let mut out = String::new();
    for (i, value) in values.try_iter()?.checked().enumerate() {
        let mut value = value?;
        for name in attribute.iter().flat_map(|path| path.split('.')) {
            value = value.get_attr(name)?;
        }
        let text = repr::text(&value)?;
        // The separator can be long and the values many.
        state.consume_fuel(1 + (separator.len() + text.len()) as u64 / 64)?;
        if i > 0 {
            out.push_str(&separator);
        }
        out.push_str(&text);
    }
    Ok(out)
}

/// `trim(text, chars=none)`: Python's `strip`.
fn trim(value: &Value, chars: Option<String>) -> Result<String, Error> {
    Ok(methods::strip(&repr::text(value)?, chars.as_deref(), true, true).to_string())
}

/// `default(value, default_value='', boolean=false)`.
fn default(value: &Value, positional: Rest<Value>, options: Kwargs) -> Result<Value, Error> {
    let mut positional = positional.0.into_iter();
    let (fallback, boolean): (Option<Value>, Option<bool>) =
        (options.get("default_value")?, options.get("boolean")?);
    options.assert_all_used()?;
    let fallback = positional.next().or(fallback);
    let boolean = positional.next().map_or(boolean.unwrap_or(false), |boolean| boolean.is_true());
    if value.is_undefined() || (boolean && !value.is_true()) {
        Ok(fallback.unwrap_or_else(|| Value::from("")))
    } else {
        Ok(value.clone())
    }
}

/// `float(value, default=0.0)`: what is no number becomes the default.
fn float(value: &Value, fallback: Option<f64>) -> f64 {
    let fallback = fallback.unwrap_or(0.0);
    match value.as_str() {
        Some(text) => text.trim().parse().unwrap_or(fallback),
        None if value.kind() == ValueKind::Bool => f64::from(u8::from(value.is_true())),
        None => f64::try_from(value.clone()).unwrap_or(fallback),
    }
}

/// `int(value, default=0, base=10)`: what is no number becomes the default.
fn int(value: &Value, fallback: Option<i64>, base: Option<u32>) -> Value {
    let fallback = Value::from(fallback.unwrap_or(0));
    let truncated = |number: f64| {
        if number.is_finite() {
            // A float holds every integer of its size exactly, and casting saturates.
            Value::from(number.trunc() as i128)
        } else {
            fallback.clone()
        }
    };
    let base = base.unwrap_or(10);
    let Some(text) = value.as_str() else {
        return match value.kind() {
            ValueKind::Bool => Value::from(i64::from(value.is_true())),
            _ if value.is_integer() => value.clone(),
            _ => f64::try_from(value.clone()).map_or(fallback.clone(), truncated),
        };
    };
    let text = methods::strip(text, None, true, true).to_ascii_lowercase();
    let digits = match base {
        2 => text.strip_prefix("0b"),
        8 => text.strip_prefix("0o"),
        16 => text.strip_prefix("0x"),
        _ => None,
    };
    let parsed = if (2..=36).contains(&base) {
        i128::from_str_radix(digits.unwrap_or(&text), base).ok()
    } else {
        None
    };
    parsed.map(Value::from).or_else(|| text.parse().ok().map(truncated)).unwrap_or(fallback.clone())
}

/// `escape(text)` for HTML, with the entities that Python's MarkupSafe writes.
fn escape(value: &Value) -> Result<String, Error> {
    let text = repr::text(value)?;
    let pairs = [("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("'", "&#39;"), ("\"", "&#34;")];
    Ok(pairs.iter().fold(text, |text, (from, to)| text.replace(from, to)))
}
