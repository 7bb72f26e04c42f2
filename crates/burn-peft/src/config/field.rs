//! One key of `adapter_config.json`: how it is read and how it is written.

use serde_json::{Map, Value, json};

/// What is wrong with an entry, or what can be done instead.
pub(crate) type Hint = &'static str;

/// A key of the file and the field of `C` that it is.
pub(crate) struct Field<C: 'static> {
    pub(crate) key: &'static str,
    /// Takes a value that is not null; null leaves the default.
    pub(crate) read: fn(&mut C, &Value) -> Result<(), Hint>,
    pub(crate) write: fn(&C) -> Value,
}

impl<C> Field<C> {
    /// Puts an entry into `config`; `None` if none of the fields has this key.
    pub(crate) fn read_into(
        fields: &[Self],
        config: &mut C,
        key: &str,
        value: &Value,
    ) -> Option<Result<(), Hint>> {
        let field = fields.iter().find(|field| field.key == key)?;
        Some(if value.is_null() { Ok(()) } else { (field.read)(config, value) })
    }

    /// All entries.
    pub(crate) fn write_all(fields: &[Self], config: &C) -> Map<String, Value> {
        fields.iter().map(|field| (field.key.to_string(), (field.write)(config))).collect()
    }
}

/// The value, if it had the type of its key.
pub(crate) fn wrong_type<T>(value: Option<T>) -> Result<T, Hint> {
    value.ok_or("the value has the wrong type for this key")
}

/// Whole numbers are written as PEFT's users write them, `16` and not `16.0`.
pub(crate) fn number(value: f64) -> Value {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    if value.fract() == 0.0 && value.abs() < EXACT { json!(value as i64) } else { json!(value) }
}

pub(crate) fn index(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|number| usize::try_from(number).ok())
}

/// A list of names, or a single one.
pub(crate) fn names(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::String(name) if name.is_empty() => Some(vec![]),
        Value::String(name) => Some(vec![name.clone()]),
        Value::Array(names) => names.iter().map(|name| Some(name.as_str()?.to_string())).collect(),
        _ => None,
    }
}

pub(crate) fn names_or_null(names: &[String]) -> Value {
    if names.is_empty() { Value::Null } else { json!(names) }
}

pub(crate) fn patterns_to_json<T>(patterns: &[(String, T)], value: impl Fn(&T) -> Value) -> Value {
    // A repeated pattern never counts after its first mention.
    let mut map = Map::new();
    for (pattern, own) in patterns {
        map.entry(pattern.clone()).or_insert_with(|| value(own));
    }
    map.sort_keys();
    Value::Object(map)
}

pub(crate) fn patterns_from_json<T>(
    value: &Value,
    read: impl Fn(&Value) -> Option<T>,
) -> Option<Vec<(String, T)>> {
    let patterns = value.as_object()?;
    patterns.iter().map(|(pattern, value)| Some((pattern.clone(), read(value)?))).collect()
}
