//! Values as Python prints them: what `{{ value }}` writes, and how they look inside lists and dicts.

use std::fmt::Write as _;

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

/// Deepest nesting of lists and dicts that is printed. Every level takes a frame of the stack.
pub(super) const MAX_DEPTH: usize = 200;

/// Python's `str(value)`; an undefined value is the empty text, as in Jinja.
pub(super) fn text(value: &Value) -> Result<String, Error> {
    match (value.kind(), value.as_str()) {
        (ValueKind::Undefined, _) => Ok(String::new()),
        (_, Some(text)) => Ok(text.to_string()),
        _ => repr(value),
    }
}

/// Python's `repr(value)`.
pub(super) fn repr(value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    write(&mut out, value, 0)?;
    Ok(out)
}

fn write(out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
    too_deep(depth)?;
    let between = |out: &mut String, i: usize| out.push_str(if i > 0 { ", " } else { "" });
    match value.kind() {
        ValueKind::String => quote(out, value.as_str().unwrap_or_default()),
        ValueKind::Number if !value.is_integer() => match f64::try_from(value.clone()) {
            Ok(number) => out.push_str(&float(number)),
            Err(_) => _ = write!(out, "{value}"),
        },
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::Seq | ValueKind::Iterable => {
            let (open, close) = if value.is_tuple() { ('(', ')') } else { ('[', ']') };
            out.push(open);
            let mut count = 0;
            for item in value.try_iter()?.checked() {
                between(out, count);
                write(out, &item?, depth + 1)?;
                count += 1;
            }
            if value.is_tuple() && count == 1 {
                out.push(',');
            }
            out.push(close);
        }
        ValueKind::Map if value.as_object().is_some_and(|object| object.try_iter_pairs().is_some()) => {
            out.push('{');
            for (i, key) in value.try_iter()?.checked().enumerate() {
                let key = key?;
                between(out, i);
                write(out, &key, depth + 1)?;
                out.push_str(": ");
                write(out, &value.get_item(&key)?, depth + 1)?;
            }
            out.push('}');
        }
        _ => _ = write!(out, "{value}"),
    }
    Ok(())
}

/// An error where lists and dicts are nested deeper than any message is.
pub(super) fn too_deep(depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("expected at most {MAX_DEPTH} levels of lists and dicts, found more"),
        ))
    } else {
        Ok(())
    }
}

/// Python's `repr(float)`: the shortest digits that read back, with an exponent below 1e-4 and from 1e16 on.
pub(super) fn float(number: f64) -> String {
    if number.is_nan() {
        return "nan".to_string();
    }
    if number.is_infinite() {
        return if number > 0.0 { "inf" } else { "-inf" }.to_string();
    }
    if number == 0.0 || (1e-4..1e16).contains(&number.abs()) {
        return format!("{number:?}");
    }
    let text = format!("{number:e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
    format!("{digits}e{sign}{exponent:0>2}")
}

/// Python's `repr(str)`: single quotes, unless the text has some and no double ones.
fn quote(out: &mut String, text: &str) {
    let mark = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(mark);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == mark => out.extend(['\\', c]),
            c if is_printable(c) => out.push(c),
            c => {
                let code = u32::from(c);
                _ = match code {
                    0..=0xff => write!(out, "\\x{code:02x}"),
                    0x100..=0xffff => write!(out, "\\u{code:04x}"),
                    _ => write!(out, "\\U{code:08x}"),
                };
            }
        }
    }
    out.push(mark);
}

/// Python's `str.isprintable` of one character. Rust escapes the same ones, and marks where nothing stands before them.
fn is_printable(c: char) -> bool {
    match c {
        ' '..='~' => true,
        '\u{0}'..='\u{a0}' | '\u{ad}' => false,
        c if c.is_whitespace() => false,
        c => format!("a{c}").escape_debug().nth(1) != Some('\\'),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_print_as_in_python() {
        let cases = [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (1e-4, "0.0001"),
            (1.25e-5, "1.25e-05"),
            (f64::INFINITY, "inf"),
            (f64::NAN, "nan"),
        ];
        for (number, expected) in cases {
            assert_eq!(float(number), expected);
        }
    }

    #[test]
    fn texts_are_quoted_as_in_python() {
        let cases = [
            ("a'b", r#""a'b""#),
            ("a\"b", r#"'a"b'"#),
            ("a'\"b", r#"'a\'"b'"#),
            ("\0\n\u{7f}\u{a0}\u{ad}é\u{200b}\u{301}🦀\u{e0001}", r"'\x00\n\x7f\xa0\xadé\u200b́🦀\U000e0001'"),
        ];
        for (text, expected) in cases {
            assert_eq!(repr(&Value::from(text)).unwrap(), expected);
        }
    }

    #[test]
    fn nesting_is_bounded() {
        let mut value = Value::from(1);
        for _ in 0..=MAX_DEPTH {
            value = Value::from(vec![value]);
        }
        assert!(repr(&value).is_err());
    }
}
