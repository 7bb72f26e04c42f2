//! Regular expressions that users and files give.

use fancy_regex::{Captures, Regex};

/// What is wrong with a regular expression.
#[derive(Debug)]
pub(crate) enum PatternError {
    /// It is none.
    Invalid { pattern: String, source: Box<dyn std::error::Error + Send + Sync> },
    /// It takes too many steps on `name`.
    Endless { pattern: String, name: String, source: Box<dyn std::error::Error + Send + Sync> },
}

/// A regular expression in Python's notation, look-around and back-references included.
///
/// Such an expression may take time that grows exponentially with the text, and files can come from anywhere. So the
/// number of steps is bounded, and a match that needs more is an error.
pub(crate) struct Pattern {
    /// As it was given, without what was put around it.
    given: String,
    regex: Regex,
}

impl Pattern {
    /// Compiles `expression`, which was made of `given`.
    ///
    /// # Errors
    /// [`PatternError::Invalid`].
    pub(crate) fn new(given: &str, expression: &str) -> Result<Self, PatternError> {
        let regex = Regex::new(&translated(expression)).map_err(|source| PatternError::Invalid {
            pattern: given.to_string(),
            // About what was written, without what was put around it.
            source: Box::new(Regex::new(given).err().unwrap_or(source)),
        })?;
        Ok(Self { given: given.to_string(), regex })
    }

    /// The expression that matches whole names: Python's `re.fullmatch`.
    ///
    /// # Errors
    /// [`PatternError::Invalid`].
    pub(crate) fn whole(given: &str) -> Result<Self, PatternError> {
        Self::new(given, &format!("^(?:{given})$"))
    }

    /// The expression that matches a whole name, or its end behind a dot, as PEFT's `rank_pattern` and `alpha_pattern`
    /// do.
    ///
    /// # Errors
    /// [`PatternError::Invalid`].
    pub(crate) fn whole_or_end(given: &str) -> Result<Self, PatternError> {
        Self::new(given, &format!(r"^(?:.*\.)?(?:{given})$"))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.given
    }

    /// Whether it matches somewhere in `text`.
    ///
    /// # Errors
    /// [`PatternError::Endless`].
    pub(crate) fn is_match(&self, text: &str) -> Result<bool, PatternError> {
        self.regex.is_match(text).map_err(|source| self.endless(text, source))
    }

    /// The groups of the first match in `text`.
    ///
    /// # Errors
    /// [`PatternError::Endless`].
    pub(crate) fn captures<'t>(&self, text: &'t str) -> Result<Option<Captures<'t>>, PatternError> {
        self.regex.captures(text).map_err(|source| self.endless(text, source))
    }

    /// `text` with every match replaced by `with`, which may name groups.
    ///
    /// # Errors
    /// [`PatternError::Endless`].
    pub(crate) fn replace_all(&self, text: &str, with: &str) -> Result<String, PatternError> {
        let replaced = self.regex.try_replacen(text, 0, with);
        Ok(replaced.map_err(|source| self.endless(text, source))?.into_owned())
    }

    fn endless(&self, text: &str, source: fancy_regex::Error) -> PatternError {
        let (pattern, name) = (self.given.clone(), text.to_string());
        PatternError::Endless { pattern, name, source: Box::new(source) }
    }
}

/// Python's notation in that of the `regex` crate, where they differ: sets have no operators and no sets inside, `{,n}` is
/// a repetition, and `\Z` is the very end.
fn translated(python: &str) -> String {
    let mut out = String::with_capacity(python.len());
    let mut rest = python.char_indices().peekable();
    let mut in_set = false;
    while let Some((at, c)) = rest.next() {
        match c {
            '\\' => match rest.next() {
                Some((_, 'Z')) if !in_set => out.push_str(r"\z"),
                Some((_, next)) => out.extend(['\\', next]),
                None => out.push('\\'),
            },
            '[' if !in_set => {
                in_set = true;
                out.push('[');
                if let Some((_, not)) = rest.next_if(|(_, c)| *c == '^') {
                    out.push(not);
                }
                // A bracket that comes first stands for itself.
                if rest.next_if(|(_, c)| *c == ']').is_some() {
                    out.push_str(r"\]");
                }
            }
            ']' if in_set => {
                in_set = false;
                out.push(']');
            }
            '[' | '&' | '~' if in_set => out.extend(['\\', c]),
            // Behind another one it is the end of a range or stands for itself.
            '-' if in_set && out.ends_with('-') => out.push_str(r"\-"),
            '{' if !in_set && python[at..].starts_with("{,") => out.push_str("{0"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PeftError;

    /// What Python's `re.fullmatch` says, tried there.
    #[test]
    fn expressions_match_as_in_python() {
        for (pattern, name, expected) in [
            (r"^(model)(?!.*(lm_head|emb)).*(q_proj|v_proj)", "model.layers.0.self_attn.q_proj", true),
            (r"^(model)(?!.*(lm_head|emb)).*(q_proj|v_proj)", "model.emb.q_proj", false),
            (r".*(?<!vision\.)q_proj", "text.q_proj", true),
            (r".*(?<!vision\.)q_proj", "vision.q_proj", false),
            (r"(?P<half>\w+)\.(?P=half)", "a.a", true),
            (r"(?P<half>\w+)\.(?P=half)", "a.b", false),
            (r"(\w+)\.\1", "mlp.mlp", true),
            (r"(?i)Q_PROJ", "q_proj", true),
            (r"q_proj|v_proj", "x.q_proj", false),
            (r"(?:.*\.)?q_proj$", "x.q_proj", true),
            (r".*\.(?=q_).*", "x.q_proj", true),
            (r"", "", true),
            (r"[[a]q", "[q", true),
            (r"a{,2}b", "aab", true),
            (r"a{,2}b", "aaab", false),
            (r"\Aq\Z", "q", true),
            (r"[&&~~]x", "&x", true),
            (r"[+--a-z_.0-9]+q_proj", "model.layers.0.q_proj", true),
            (r"[+--]x", ",x", true),
            (r"[]a]b", "]b", true),
            (r"[^]]x", "ax", true),
            (r"[^]]x", "]x", false),
            (r"[\[\]]x", "]x", true),
            (r"[a{,2}]b", "{b", true),
            (r"\{,2\}", "{,2}", true),
        ] {
            assert_eq!(
                Pattern::whole(pattern).unwrap().is_match(name).unwrap(),
                expected,
                "{pattern} {name}"
            );
        }
    }

    #[test]
    fn a_broken_expression_is_named_as_it_was_written() {
        let error = Pattern::whole_or_end("(q_proj").err().unwrap();
        let error = PeftError::from(error);
        assert_eq!(error.to_string(), "invalid regular expression `(q_proj`");
    }

    #[test]
    fn a_match_that_would_take_for_ever_is_an_error() {
        let pattern = Pattern::whole(r"(?=x)(x+x+)+y").unwrap();
        let error = pattern.is_match(&"x".repeat(64)).unwrap_err();
        assert!(matches!(&error, PatternError::Endless { pattern, .. } if pattern == r"(?=x)(x+x+)+y"));
        let error = PeftError::from(error);
        assert!(error.to_string().contains("hint:"), "{error}");
    }
}
