//! Files whose keys all begin otherwise than they should.

use std::collections::BTreeSet;
use std::path::Path;

use super::keys::{PREFIX, is_of_adapter};
use crate::error::PeftError;

/// How the keys of a file begin, and how they should.
#[derive(Debug, PartialEq)]
pub(super) struct OtherPrefix {
    pub(super) found: String,
    pub(super) expected: String,
    /// A key of the file.
    pub(super) example: String,
}

impl OtherPrefix {
    /// Compares the keys that nobody asked for with those that are missing. `None` if no single change of their beginnings
    /// makes every one of the former a missing one. Weights of the base, which may stand beside the factors, are asked for
    /// by nobody: they need only begin like the others.
    pub(super) fn between(unexpected: &[String], missing: &[String]) -> Option<Self> {
        let wanted: BTreeSet<&str> = missing.iter().map(String::as_str).collect();
        let is_own = |key: &&String| key.split('.').any(is_of_adapter);
        let first = unexpected.iter().find(is_own).or(unexpected.first())?;
        // Another layer or another tensor of the adapter is another matter.
        let is_outside = |(found, expected): &(&str, &str)| {
            let inside = |part: &str| is_of_adapter(part) || part.parse::<usize>().is_ok();
            !found.split('.').chain(expected.split('.')).any(inside)
        };
        let rules = missing.iter().filter_map(|key| beginnings(first, key)).filter(is_outside);
        let rules: BTreeSet<(&str, &str)> = rules.collect();
        let makes_all = |(found, expected): &(&str, &str)| {
            unexpected.iter().all(|key| {
                key.strip_prefix(found)
                    .is_some_and(|rest| !is_own(&key) || wanted.contains(&*format!("{expected}{rest}")))
            })
        };
        let (found, expected) = rules.into_iter().find(makes_all)?;
        Some(Self { found: found.into(), expected: expected.into(), example: first.clone() })
    }

    /// Judges keys without a model: all of them lack PEFT's prefix, or have something in front of it.
    pub(super) fn of(keys: &[&str]) -> Option<Self> {
        let first = *keys.first()?;
        let prefix = |found: &str, expected: &str| Self {
            found: found.into(),
            expected: expected.into(),
            example: first.into(),
        };
        // The last one: it may be there twice.
        if let Some(at) = first.rfind(PREFIX) {
            let front = &first[..at];
            let have_it =
                keys.iter().all(|key| key.strip_prefix(front).is_some_and(|rest| rest.starts_with(PREFIX)));
            return (at > 0 && have_it).then(|| prefix(front, ""));
        }
        let lack_it = keys.iter().all(|key| !key.contains(PREFIX));
        (lack_it && keys.iter().any(|key| key.split('.').any(is_of_adapter))).then(|| prefix("", PREFIX))
    }

    /// The error about the file at `path`.
    pub(super) fn refused(self, path: &Path) -> PeftError {
        PeftError::KeyPrefix {
            path: path.into(),
            found_prefix: self.found,
            expected_prefix: self.expected,
            example: self.example,
        }
    }
}

/// What stands before the components that two keys end with alike; `None` if they end differently.
fn beginnings<'a>(one: &'a str, other: &'a str) -> Option<(&'a str, &'a str)> {
    let ends = |key: &'a str| key.rmatch_indices('.').map(move |(dot, _)| dot + 1).chain([0]);
    let alike = ends(one).zip(ends(other)).take_while(|(a, b)| one[*a..] == other[*b..]);
    alike.last().map(|(a, b)| (&one[..a], &other[..b]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(prefix: &str) -> Vec<String> {
        let key = |i, module| format!("{prefix}model.layers.{i}.self_attn.{module}.lora_A.weight");
        (0..12).flat_map(|i| [key(i, "q_proj"), key(i, "v_proj")]).collect()
    }

    #[test]
    fn the_change_that_makes_every_key_right_is_found() {
        let expected = keys("base_model.model.");
        for (found, prefixes) in [
            ("", ("", "base_model.model.")),
            ("base_model.model.base_model.model.", ("base_model.model.", "")),
            ("base_model.model.language_model.", ("base_model.model.language_model.", "base_model.model.")),
            ("_orig_mod.base_model.model.", ("_orig_mod.", "")),
        ] {
            let other = OtherPrefix::between(&keys(found), &expected).unwrap();
            let example = &keys(found)[0];
            let renamed = format!("{}{}", other.expected, example.strip_prefix(&*other.found).unwrap());
            assert_eq!(renamed, expected[0], "{other:?}");
            assert_eq!((&*other.found, &*other.expected), prefixes);
        }
    }

    #[test]
    fn a_file_without_a_model_tells_as_much() {
        let of = |prefix: &str| {
            let keys = keys(prefix);
            let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
            OtherPrefix::of(&keys).map(|other| (other.found, other.expected))
        };
        assert_eq!(of(PREFIX), None);
        assert_eq!(of(""), Some((String::new(), PREFIX.into())));
        assert_eq!(of("_orig_mod.base_model.model."), Some(("_orig_mod.".into(), String::new())));
        assert_eq!(of("base_model.model.base_model.model."), Some((PREFIX.into(), String::new())));
        assert_eq!(OtherPrefix::of(&["a.weight"]), None);
    }

    #[test]
    fn one_key_that_is_wrong_otherwise_is_no_matter_of_beginnings() {
        let expected = keys("base_model.model.");
        let mut found = keys("");
        found.push("model.layers.0.self_attn.k_proj.lora_A.weight".into());
        assert_eq!(OtherPrefix::between(&found, &expected), None);
        let renamed = |name: &str| vec![format!("base_model.model.q_proj.{name}.weight")];
        assert_eq!(OtherPrefix::between(&renamed("lora_C"), &renamed("lora_B")), None);
        assert_eq!(OtherPrefix::between(&[], &expected), None);
        assert_eq!(OtherPrefix::between(&keys(""), &[]), None);
    }
}
