//! Reads the fields of a configuration one by one, so that every wrong one is named, with what was found.

use serde_json::{Map, Value};

use crate::problem::ConfigProblem;

/// The fields of a JSON object and what is wrong with those read so far.
pub(super) struct Fields<'a> {
    json: &'a Map<String, Value>,
    pub(super) problems: Vec<ConfigProblem>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(json: &'a Map<String, Value>) -> Self {
        Self { json, problems: vec![] }
    }

    /// A field that is there and not `null`.
    fn get(&self, field: &str) -> Option<&'a Value> {
        self.json.get(field).filter(|value| !value.is_null())
    }

    pub(super) fn problem(
        &mut self,
        field: &'static str,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) {
        self.problems.push(ConfigProblem::new(field, expected, found));
    }

    fn refuse(&mut self, field: &'static str, expected: &str, found: &Value) {
        const LONGEST: usize = 60;
        let mut found = found.to_string();
        if let Some((end, _)) = found.char_indices().nth(LONGEST) {
            found.truncate(end);
            found += "..";
        }
        self.problem(field, expected, format!("`{found}`"));
    }

    fn read<T>(
        &mut self,
        field: &'static str,
        expected: &str,
        read: fn(&'a Value) -> Option<T>,
    ) -> Option<T> {
        let value = self.get(field)?;
        let found = read(value);
        if found.is_none() {
            self.refuse(field, expected, value);
        }
        found
    }

    /// A field that may be absent but not `null`, as in transformers.
    pub(super) fn or<T>(
        &mut self,
        field: &'static str,
        default: T,
        read: fn(&mut Self, &'static str) -> Option<T>,
    ) -> T {
        if let Some(null @ Value::Null) = self.json.get(field) {
            self.refuse(field, "a value, or no such field", null);
        }
        read(self, field).unwrap_or(default)
    }

    pub(super) fn size(&mut self, field: &'static str) -> Option<usize> {
        self.read(field, "a whole number", |value| value.as_u64()?.try_into().ok())
    }

    pub(super) fn number(&mut self, field: &'static str) -> Option<f64> {
        self.read(field, "a number", Value::as_f64)
    }

    pub(super) fn flag(&mut self, field: &'static str) -> Option<bool> {
        self.read(field, "true or false", Value::as_bool)
    }

    pub(super) fn text(&mut self, field: &'static str) -> Option<&'a str> {
        self.read(field, "a text", Value::as_str)
    }

    pub(super) fn texts(&mut self, field: &'static str) -> Option<Vec<&'a str>> {
        self.read(field, "a list of texts", |value| value.as_array()?.iter().map(Value::as_str).collect())
    }

    pub(super) fn object(&mut self, field: &'static str) -> Option<&'a Map<String, Value>> {
        self.read(field, "an object", Value::as_object)
    }

    /// Whether the field is there, `null` included.
    pub(super) fn has(&self, field: &str) -> bool {
        self.json.contains_key(field)
    }

    pub(super) fn any(&self, field: &str) -> Option<&'a Value> {
        self.get(field)
    }

    /// A token, or `default` where the field is absent. `null` and the -1 of old files are no token.
    pub(super) fn token(&mut self, field: &'static str, default: Option<u32>) -> Option<u32> {
        if !self.json.contains_key(field) {
            return default;
        }
        self.read(field, "a token id or null", id).flatten()
    }

    /// One token or a list of them, by the rules of [`token`](Self::token).
    pub(super) fn tokens(&mut self, field: &'static str, default: &[u32]) -> Vec<u32> {
        if !self.json.contains_key(field) {
            return default.to_vec();
        }
        let ids = |value: &Value| match value {
            Value::Array(ids) => ids.iter().map(id).collect::<Option<Vec<_>>>(),
            one => Some(vec![id(one)?]),
        };
        let ids = self.read(field, "a token id, a list of them, or null", ids).unwrap_or_default();
        ids.into_iter().flatten().collect()
    }
}

/// A token id, or none if it is negative. `None` if it is no whole number.
fn id(value: &Value) -> Option<Option<u32>> {
    match value.as_i64()? {
        ..0 => Some(None),
        id => id.try_into().ok().map(Some),
    }
}
