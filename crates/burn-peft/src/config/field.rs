//! One key of `adapter_config.json`: how it is read and how it is written.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::target::{ALL_LINEAR, TargetModules};

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

/// The table of fields with the names of their keys; in parentheses how they are read and written, if not as serde does.
macro_rules! fields {
    ($($key:ident $(: ($read:expr, $write:expr))?),* $(,)?) => {
        &[$($crate::config::field::fields!(@one $key $(, $read, $write)?)),*]
    };
    (@one $key:ident) => {
        $crate::config::field::fields!(@one $key, $crate::config::field::typed, |value| serde_json::json!(value))
    };
    (@one $key:ident, $read:expr, $write:expr) => {
        $crate::config::field::Field {
            key: stringify!($key),
            read: |config, value| {
                config.$key = $read(value)?;
                Ok(())
            },
            write: |config| $write(&config.$key),
        }
    };
}

pub(crate) use fields;

/// What is wrong with a value of another type than that of its key.
const WRONG_TYPE: Hint = "the value has the wrong type for this key";

/// The value as serde reads it.
pub(crate) fn typed<T: DeserializeOwned>(value: &Value) -> Result<T, Hint> {
    T::deserialize(value).map_err(|_| WRONG_TYPE)
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
pub(crate) fn names(value: &Value) -> Result<Vec<String>, Hint> {
    match value {
        Value::String(name) if name.is_empty() => Ok(vec![]),
        Value::String(name) => Ok(vec![name.clone()]),
        names => typed(names),
    }
}

pub(crate) fn names_or_null(names: &[String]) -> Value {
    if names.is_empty() { Value::Null } else { json!(names) }
}

pub(crate) fn targets_to_json(targets: &Option<TargetModules>) -> Value {
    match targets {
        None => Value::Null,
        Some(TargetModules::Names(names)) => json!(names),
        Some(TargetModules::Regex(pattern)) => json!(pattern),
        Some(TargetModules::AllLinear) => json!(ALL_LINEAR),
    }
}

/// Names, a regular expression, or PEFT's word for all linear layers.
pub(crate) fn targets_from_json(value: &Value) -> Result<TargetModules, Hint> {
    match value {
        Value::String(text) if text.eq_ignore_ascii_case(ALL_LINEAR) => Ok(TargetModules::AllLinear),
        Value::String(pattern) => Ok(TargetModules::Regex(pattern.clone())),
        names => typed(names).map(TargetModules::Names),
    }
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

/// From an object, or from a list of pairs, which has an order.
pub(crate) fn patterns_from_json<T>(
    value: &Value,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<Vec<(String, T)>, Hint> {
    if let Value::Array(pairs) = value {
        let pair = |pair: &Value| Some((pair.get(0)?.as_str()?.to_string(), read(pair.get(1)?)?));
        return pairs.iter().map(pair).collect::<Option<_>>().ok_or(WRONG_TYPE);
    }
    let patterns = value.as_object().ok_or(WRONG_TYPE)?.iter();
    patterns
        .map(|(pattern, value)| Some((pattern.clone(), read(value)?)))
        .collect::<Option<_>>()
        .ok_or(WRONG_TYPE)
}
