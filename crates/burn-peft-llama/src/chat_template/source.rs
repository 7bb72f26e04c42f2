//! The source of a template as the engine takes it: Jinja's line breaks, transformers' `generation` blocks, and what
//! would overflow the stack or panic.

use std::borrow::Cow;

use minijinja::{Error, ErrorKind};

/// The filters that assigned values go through, see [`bounded`](super::limits).
pub(super) const BOUNDED: &str = "__bounded";
pub(super) const BOUNDED_ITEM: &str = "__bounded_item";

/// The filter that the text of `generation` blocks goes through.
pub(super) const MARKED: &str = "__marked";

/// Prepares the source of a template.
///
/// - Jinja reads `\r\n` and `\r` as `\n`, inside literals too.
/// - `{% generation %}` is an extension of transformers that marks the assistant's words. It becomes a `with` block,
///   which has a scope of its own as well, with a filter in it that marks its text. The signs of whitespace control stay.
/// - `{% set x = value %}` puts the value through a filter that refuses deep nesting: only so can a template nest
///   values without end, and minijinja 3.1 overflows the stack when it drops, compares or joins them.
///
/// # Errors
/// `break` and `continue` in a block that is not their loop: there, minijinja 3.1 panics while it renders.
pub(super) fn prepare(source: &str) -> Result<String, Error> {
    let source = if source.contains('\r') {
        Cow::Owned(source.replace("\r\n", "\n").replace('\r', "\n"))
    } else {
        Cow::Borrowed(source)
    };
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_ref();
    let mut raw = false;
    let mut blocks: Vec<&str> = vec![];
    while let Some(start) = rest.find('{') {
        let (before, from) = rest.split_at(start);
        out.push_str(before);
        let word = from.strip_prefix("{%").map_or("", first_word);
        let length = match from.as_bytes().get(1) {
            Some(b'%') if raw && word != "endraw" => 2,
            Some(b'#') if !raw => from.find("#}").map_or(from.len(), |end| end + 2),
            Some(b'{') if !raw => tag_length(from, "}}"),
            Some(b'%') => tag_length(from, "%}"),
            _ => 1,
        };
        let (tag, after) = from.split_at(length);
        let assignment = if word == "set" && !raw { assignment(tag) } else { None };
        match word {
            "endraw" => raw = false,
            _ if raw => {}
            "raw" => raw = true,
            "set" if assignment.is_none() => blocks.push(word),
            "for" | "with" | "call" | "filter" | "macro" | "generation" | "autoescape" => blocks.push(word),
            "break" | "continue" => match blocks.last() {
                Some(&"for") | None => {}
                Some(block) => {
                    let message = format!("`{word}` inside `{block}` is not supported");
                    return Err(Error::new(ErrorKind::SyntaxError, message));
                }
            },
            end if end.strip_prefix("end").is_some_and(|block| blocks.last() == Some(&block)) => {
                blocks.pop();
            }
            _ => {}
        }
        match (word, assignment) {
            (_, Some((before, value, end))) => {
                let filter = if before.contains('.') { BOUNDED_ITEM } else { BOUNDED };
                out.extend([before, " (", value, ") | ", filter, " ", end]);
            }
            ("generation", _) if !raw && is_bare(tag, word) => {
                // Nothing stands between the two tags that replace one, so each has its half of the whitespace control.
                let (before, after) = tag.split_at(tag.find(word).unwrap_or_default());
                out.extend([before, "with %}{% filter ", MARKED, &after[word.len()..]]);
            }
            ("endgeneration", _) if !raw && is_bare(tag, word) => {
                let (before, after) = tag.split_at(tag.find(word).unwrap_or_default());
                out.extend([before, "endfilter %}{% endwith", &after[word.len()..]]);
            }
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    Ok(out)
}

/// The first word of a tag, behind its sign of whitespace control.
fn first_word(tag: &str) -> &str {
    let tag = tag.strip_prefix(['-', '+']).unwrap_or(tag).trim_start();
    let end = tag.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(tag.len());
    &tag[..end]
}

/// Whether a tag has nothing but `word` in it.
fn is_bare(tag: &str, word: &str) -> bool {
    let inner = tag.strip_prefix("{%").and_then(|tag| tag.strip_suffix("%}")).unwrap_or(tag);
    inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+') == word
}

/// A `set` tag with a value, cut before the value and behind it.
fn assignment(tag: &str) -> Option<(&str, &str, &str)> {
    let (target, value) = tag.split_at(tag.find('=')? + 1);
    let plain = |c: char| c.is_alphanumeric() || c.is_whitespace() || "_.,()-+%{=".contains(c);
    let value = value.strip_suffix("%}")?;
    let value = value.strip_suffix(['-', '+']).unwrap_or(value);
    let is_value = target.chars().all(plain) && !value.starts_with('=') && !value.trim().is_empty();
    is_value.then(|| (target, value.trim(), &tag[target.len() + value.len()..]))
}

/// Length of the tag that `source` begins with. Neither quotes nor braces inside it end it.
fn tag_length(source: &str, end: &str) -> usize {
    let mut quote = None;
    let mut depth = 0;
    let mut chars = source.char_indices().skip(2);
    while let Some((at, c)) = chars.next() {
        match quote {
            Some(_) if c == '\\' => {
                chars.next();
            }
            Some(open) if c == open => quote = None,
            Some(_) => {}
            None if depth == 0 && source[at..].starts_with(end) => return at + end.len(),
            None => match c {
                '\'' | '"' => quote = Some(c),
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            },
        }
    }
    source.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepared(source: &str) -> String {
        prepare(source).unwrap()
    }

    #[test]
    fn line_breaks_are_those_of_jinja() {
        assert_eq!(prepared("a\r\nb\rc\n\r\nd{{ 'e\r\nf' }}"), "a\nb\nc\n\nd{{ 'e\nf' }}");
    }

    #[test]
    fn only_generation_tags_and_assignments_are_rewritten() {
        assert_eq!(
            prepared("{%- generation +%}x{% endgeneration%}"),
            "{%- with %}{% filter __marked +%}x{% endfilter %}{% endwith%}"
        );
        assert_eq!(prepared("{%- set x='=%}' -%}"), "{%- set x= ('=%}') | __bounded -%}");
        assert_eq!(prepared("{% set n.x = [1] %}"), "{% set n.x = ([1]) | __bounded_item %}");
        assert_eq!(prepared("{% set a, b = 1, 2 %}"), "{% set a, b = (1, 2) | __bounded %}");
        for same in [
            "{# {% generation %} #}",
            "{{ '{% generation %}' }}",
            "{{ {'a': {'b': '}}'}} }}",
            "{{ generation }}{% set x %}a = b{% endset %}{% set x | replace('=', 'a') %}{% endset %}",
            "{% raw %}{% generation %}{% set x = 1 %}{% break %}{% endraw %}",
            "{% generation x %}",
            "{% if '%}' == '{% generation %}' %}",
            "{% generation",
            "{{ 'a",
            "{",
            "a { b { c",
        ] {
            assert_eq!(prepared(same), same);
        }
    }

    #[test]
    fn a_break_must_stand_in_its_loop() {
        for fine in [
            "{% for i in x %}{% if i %}{% break %}{% endif %}{% endfor %}",
            "{% for i in x %}{% with %}{% endwith %}{% set y %}{% endset %}{% set z = 1 %}{% continue %}{% endfor %}",
        ] {
            assert!(prepare(fine).is_ok(), "{fine}");
        }
        for block in ["with", "generation", "filter upper", "set x"] {
            let error = prepare(&format!("{{% for i in x %}}{{% {block} %}}{{% break %}}")).unwrap_err();
            let word = block.split(' ').next().unwrap();
            assert!(error.to_string().contains(&format!("`break` inside `{word}`")), "{error}");
        }
    }
}
