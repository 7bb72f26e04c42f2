//! Bounds on what a template may do: nothing in a downloaded file may hang, panic or exhaust the memory.

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, State, Value};

use super::repr::too_deep;

/// Longest range, as in transformers.
const MAX_RANGE: i64 = 100_000;

/// Work that a template may do for any conversation. One unit is one instruction or 64 bytes of text.
const BASE_FUEL: u64 = 2_000_000;

/// The work that a template may do for `messages` messages of `bytes` bytes in all: some hundred times of what the
/// longest published templates need for each message, and a hundred copies of each text.
pub(super) fn fuel(messages: usize, bytes: usize) -> u64 {
    BASE_FUEL + 10_000 * messages as u64 + 2 * bytes as u64
}

/// A value that is assigned to a variable: refused if it is nested deeper than any message is.
pub(super) fn bounded(state: &State, value: &Value) -> Result<Value, Error> {
    check(state, value, 0, false)?;
    Ok(value.clone())
}

/// A value that is assigned to an attribute of a namespace, which may not be a namespace itself: it could hold itself.
pub(super) fn bounded_item(state: &State, value: &Value) -> Result<Value, Error> {
    check(state, value, 0, true)?;
    Ok(value.clone())
}

fn check(state: &State, value: &Value, depth: usize, refuse_namespace: bool) -> Result<(), Error> {
    if !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) {
        return Ok(());
    }
    too_deep(depth)?;
    let Some(object) = value.as_object() else { return Ok(()) };
    if refuse_namespace && object.type_name().ends_with("::Namespace") {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            "a namespace inside a namespace is not supported",
        ));
    }
    if value.kind() != ValueKind::Map {
        for item in value.try_iter()? {
            state.consume_fuel(1)?;
            check(state, &item, depth + 1, refuse_namespace)?;
        }
        return Ok(());
    }
    for (key, item) in object.try_iter_pairs().into_iter().flatten() {
        state.consume_fuel(1)?;
        check(state, &key, depth + 1, refuse_namespace)?;
        check(state, &item, depth + 1, refuse_namespace)?;
    }
    Ok(())
}

/// `range(stop)` or `range(start, stop, step=1)`. minijinja's own (3.1) overflows near the largest integers.
pub(super) fn range(first: i64, second: Option<i64>, step: Option<i64>) -> Result<Value, Error> {
    let (start, stop) = second.map_or((0, first), |stop| (first, stop));
    let step = i128::from(step.unwrap_or(1));
    if step == 0 {
        return Err(Error::new(ErrorKind::InvalidOperation, "`range` expected a step other than 0"));
    }
    let distance = (i128::from(stop) - i128::from(start)) * step.signum();
    let length = if distance > 0 { (distance - 1) / step.abs() + 1 } else { 0 };
    if length > i128::from(MAX_RANGE) {
        let message = format!("`range` expected at most {MAX_RANGE} numbers, found {length}");
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    // Below the limit of the length, every number lies between `start` and `stop`.
    let number = move |i: i128| Value::from((i128::from(start) + i * step) as i64);
    Ok(Value::make_iterable(move || (0..length as usize).map(move |i| number(i as i128))))
}
