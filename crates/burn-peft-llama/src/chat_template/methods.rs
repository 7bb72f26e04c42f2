//! The methods of Python's texts, lists and dicts that templates call.

use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

/// Calls a method of a value. What is not here or differs in `pycompat` (3.1), is here.
pub(super) fn call(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let found = match value.as_str() {
        Some(text) => text_method(state, text, method, args)?,
        None => collection_method(value, method, args)?,
    };
    match found {
        Some(found) => Ok(found),
        None => pycompat::unknown_method_callback(state, value, method, args),
    }
}

fn text_method(state: &State, text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let all = |holds: fn(char) -> bool| -> Result<Value, Error> {
        let () = from_args(args)?;
        Ok(Value::from(!text.is_empty() && text.chars().all(holds)))
    };
    Ok(Some(match method {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            Value::from(strip(text, chars, method != "rstrip", method != "lstrip"))
        }
        "split" | "rsplit" => Value::from_iter(split(text, method == "rsplit", args)?),
        "splitlines" => {
            let (positional, named): (Option<bool>, Kwargs) = from_args(args)?;
            let named: Option<bool> = named.get("keepends")?;
            Value::from_iter(lines(text, positional.or(named).unwrap_or(false)))
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let (last, found) = match method {
                "partition" => (false, text.split_once(separator)),
                _ => (true, text.rsplit_once(separator)),
            };
            match found {
                _ if separator.is_empty() => {
                    return Err(invalid("expected a separator, found an empty text"));
                }
                Some((before, after)) => Value::from((before, separator, after)),
                None if last => Value::from(("", "", text)),
                None => Value::from((text, "", "")),
            }
        }
        "startswith" | "endswith" if args.len() > 1 => {
            let (affix, start, end): (&Value, Option<i64>, Option<i64>) = from_args(args)?;
            let part = part(text, start, end).map_or("", |part| part.1);
            let holds = |affix: &Value| match method {
                "startswith" => affix.as_str().is_some_and(|affix| part.starts_with(affix)),
                _ => affix.as_str().is_some_and(|affix| part.ends_with(affix)),
            };
            if affix.is_tuple() {
                Value::from(affix.try_iter()?.any(|affix| holds(&affix)))
            } else {
                Value::from(holds(affix))
            }
        }
        "find" | "rfind" | "index" | "rindex" => {
            let (what, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
            let found = part(text, start, end).and_then(|(offset, part)| {
                let at = if method.starts_with('r') { part.rfind(what) } else { part.find(what) }?;
                Some(offset + part[..at].chars().count() as i64)
            });
            match found {
                Some(at) => Value::from(at),
                None if method.ends_with("find") => Value::from(-1),
                None => return Err(invalid("substring not found")),
            }
        }
        "title" => {
            let () = from_args(args)?;
            let mut inside = false;
            let mut out = String::with_capacity(text.len());
            for c in text.chars() {
                if inside {
                    out.extend(c.to_lowercase())
                } else {
                    out.extend(c.to_uppercase())
                }
                inside = c.is_lowercase() || c.is_uppercase();
            }
            Value::from(out)
        }
        "swapcase" => {
            let () = from_args(args)?;
            let swap = |c: char| {
                if c.is_uppercase() {
                    c.to_lowercase().collect::<Vec<_>>()
                } else {
                    c.to_uppercase().collect()
                }
            };
            Value::from(text.chars().flat_map(swap).collect::<String>())
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        // Widths and precisions cost time and memory before they are counted as work.
        "format" if has_wide_field(text) => {
            return Err(invalid("`format` expected widths of at most four digits"));
        }
        "ljust" | "rjust" | "center" | "zfill" => Value::from(pad(state, text, method, args)?),
        "join" => {
            let (values,): (&Value,) = from_args(args)?;
            let mut out = String::new();
            for (i, value) in values.try_iter()?.checked().enumerate() {
                let value = value?;
                let Some(item) = value.as_str() else {
                    return Err(invalid(&format!("`join` expected texts, found a {}", value.kind())));
                };
                state.consume_fuel(1 + (text.len() + item.len()) as u64 / 64)?;
                if i > 0 {
                    out.push_str(text);
                }
                out.push_str(item);
            }
            Value::from(out)
        }
        "isdigit" | "isdecimal" | "isnumeric" => all(char::is_numeric)?,
        "isalnum" => all(char::is_alphanumeric)?,
        "isalpha" => all(char::is_alphabetic)?,
        "isspace" => all(is_space)?,
        // The case of what has none does not matter, but something must have one.
        "islower" | "isupper" => {
            let () = from_args(args)?;
            let (lower, upper) = (text.contains(char::is_lowercase), text.contains(char::is_uppercase));
            Value::from(if method == "islower" { lower && !upper } else { upper && !lower })
        }
        _ => return Ok(None),
    }))
}

fn collection_method(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let is_list = matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable);
    Ok(match method {
        "copy" if is_list || value.kind() == ValueKind::Map => {
            let () = from_args(args)?;
            Some(value.clone())
        }
        "index" if is_list => {
            let (what,): (&Value,) = from_args(args)?;
            let at = value.try_iter()?.position(|item| item == *what);
            Some(Value::from(at.ok_or_else(|| invalid("value is not in list"))?))
        }
        "count" if is_list => {
            let (what,): (&Value,) = from_args(args)?;
            Some(Value::from(value.try_iter()?.filter(|item| item == what).count()))
        }
        _ => None,
    })
}

fn invalid(message: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.to_string())
}

/// What Python counts as whitespace: Unicode's, and four separators of ASCII.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Python's `strip` on one side or both; `chars` is a set, whitespace by default.
pub(super) fn strip<'a>(text: &'a str, chars: Option<&str>, start: bool, end: bool) -> &'a str {
    let goes = |c: char| chars.map_or(is_space(c), |chars| chars.contains(c));
    let text = if start { text.trim_start_matches(goes) } else { text };
    if end { text.trim_end_matches(goes) } else { text }
}

/// `split(sep=none, maxsplit=-1)`, from the left or the right. Without a separator, runs of whitespace separate.
fn split(text: &str, from_right: bool, args: &[Value]) -> Result<Vec<String>, Error> {
    let (separator, most, named): (Option<&str>, Option<i64>, Kwargs) = from_args(args)?;
    let (named_separator, named_most): (Option<String>, Option<i64>) =
        (named.get("sep")?, named.get("maxsplit")?);
    named.assert_all_used()?;
    let separator = separator.map(str::to_string).or(named_separator);
    let mut left = most.or(named_most).and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
    if separator.as_deref() == Some("") {
        return Err(invalid("expected a separator, found an empty text"));
    }
    let mut parts = vec![];
    let mut rest = text;
    loop {
        if separator.is_none() {
            rest = strip(rest, None, !from_right, from_right);
            if rest.is_empty() {
                break;
            }
        }
        let cut = match (&separator, from_right) {
            _ if left == 0 => None,
            (Some(separator), false) => rest.split_once(separator.as_str()),
            (Some(separator), true) => rest.rsplit_once(separator.as_str()).map(|(a, b)| (b, a)),
            (None, false) => rest.split_once(is_space),
            (None, true) => rest.rsplit_once(is_space).map(|(a, b)| (b, a)),
        };
        left = left.saturating_sub(1);
        match cut {
            Some((part, after)) => {
                parts.push(part.to_string());
                rest = after;
            }
            None => {
                // Python strips the last part on the side that nothing was split off from.
                let last = match separator {
                    None => strip(rest, None, !from_right, from_right),
                    Some(_) => rest,
                };
                parts.push(last.to_string());
                break;
            }
        }
    }
    if from_right {
        parts.reverse();
    }
    Ok(parts)
}

/// `splitlines`, at everything that Python takes for the end of a line.
fn lines(text: &str, keep_ends: bool) -> Vec<String> {
    let mut lines = vec![];
    let mut rest = text;
    while !rest.is_empty() {
        let is_end = |c: char| {
            matches!(
                c,
                '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
            )
        };
        let at = rest.find(is_end).unwrap_or(rest.len());
        let end = match &rest[at..] {
            "" => 0,
            found if found.starts_with("\r\n") => 2,
            found => found.chars().next().map_or(0, char::len_utf8),
        };
        lines.push(rest[..if keep_ends { at + end } else { at }].to_string());
        rest = &rest[at + end..];
    }
    lines
}

/// `text[start:end]` with the number of characters before it; `None` if it starts behind the end.
fn part(text: &str, start: Option<i64>, end: Option<i64>) -> Option<(i64, &str)> {
    let length = text.chars().count() as i64;
    let clamp = |at: i64| if at < 0 { (length + at).max(0) } else { at.min(length) };
    let (from, to) = (start.unwrap_or(0), end.map_or(length, clamp));
    if from > length {
        return None;
    }
    let from = clamp(from);
    let byte = |at: i64| text.char_indices().nth(at as usize).map_or(text.len(), |(byte, _)| byte);
    Some((from, &text[byte(from)..byte(to.max(from))]))
}

/// Whether a text has a number of more than four digits behind a brace.
fn has_wide_field(format: &str) -> bool {
    format.split('{').skip(1).any(|field| {
        let field = field.split('}').next().unwrap_or_default();
        field.split(|c: char| !c.is_ascii_digit()).any(|digits| digits.len() > 4)
    })
}

/// Fills a text up to a width.
fn pad(state: &State, text: &str, method: &str, args: &[Value]) -> Result<String, Error> {
    let (width, fill): (i64, Option<&str>) = from_args(args)?;
    let fill = fill.unwrap_or(if method == "zfill" { "0" } else { " " });
    if fill.chars().count() != 1 {
        return Err(invalid("expected one character to fill with"));
    }
    let length = text.chars().count();
    let missing = usize::try_from(width).unwrap_or(0).saturating_sub(length);
    state.consume_fuel(missing as u64 / 16)?;
    let before = match method {
        "ljust" => 0,
        // Where they cannot be equal, Python makes the left side the longer one if the width is odd.
        "center" => missing / 2 + (missing & (missing + length) & 1),
        _ => missing,
    };
    let (sign, digits) = match text.strip_prefix(['+', '-']) {
        Some(digits) if method == "zfill" => text.split_at(text.len() - digits.len()),
        _ => ("", text),
    };
    Ok(format!("{sign}{}{digits}{}", fill.repeat(before), fill.repeat(missing - before)))
}
