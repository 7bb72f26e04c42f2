//! What PEFT calls the tensors of an adapter.

use crate::config::Bias;
use crate::layer::Site;
use crate::method::{BASE_LAYER, KeyEnd, METHODS, TensorSpec};

/// PEFT wraps the model twice, in `PeftModel` and in `LoraModel`, and saves the path through both.
pub(super) const PREFIX: &str = "base_model.model.";

/// How the keys of adapter tensors end, whatever the method.
fn ends() -> impl Iterator<Item = &'static KeyEnd> {
    METHODS.iter().flat_map(|method| method.keys)
}

/// The key of a module's tensor; the inverse of [`split`].
pub(super) fn join(module: &str, end: &str) -> String {
    format!("{PREFIX}{module}.{end}")
}

/// The parameter at `site` of the base as a file has it, which PEFT adds for embeddings and output layers.
///
/// `is_adapted` tells whether the module has adapter tensors as well: PEFT has moved its own parameters into `base_layer`
/// then.
pub(super) fn base(site: &Site, is_adapted: bool) -> TensorSpec {
    TensorSpec::parameter("base", if is_adapted { BASE_LAYER } else { "" }, site)
}

/// A key taken apart: the module's name, and what stands behind it. `None` if it is no key of PEFT's.
pub(super) fn split(key: &str) -> Option<(&str, &str)> {
    let path = key.strip_prefix(PREFIX)?;
    let cut = |end: &str| {
        let module = path.strip_suffix(end)?.strip_suffix('.')?;
        Some((module, &path[module.len() + 1..]))
    };
    let of_adapter = ends().find_map(|end| cut(&end.text()));
    let of_base = || {
        let (front, parameter) = path.rsplit_once('.')?;
        let module = format!("{front}.").strip_suffix(BASE_LAYER)?.len().checked_sub(1)?;
        (!parameter.is_empty()).then(|| (&path[..module], &path[module + 1..]))
    };
    of_adapter.or_else(of_base).or_else(|| path.rsplit_once('.'))
}

/// What a key's end says of the tensor, if it is one of an adapter's.
pub(super) fn end_of(end: &str) -> Option<&'static KeyEnd> {
    ends().find(|known| known.text() == end)
}

/// A key without the name of an adapter in it, and that name: `x.lora_A.default.weight` is `x.lora_A.weight` of
/// `default`.
///
/// PEFT uses such keys in memory, where a model has several adapters, and some programs save them.
pub(super) fn without_name(key: &str) -> (String, Option<&str>) {
    if let Some((front, rest)) = key.rsplit_once(&format!(".{}.", WRAPPERS[0])) {
        // The wrapper of a module that is saved whole goes with the name.
        if let Some((name, parameter)) = rest.split_once('.').filter(|(_, rest)| !rest.contains('.')) {
            return (format!("{front}.{parameter}"), Some(name));
        }
    }
    for end in ends() {
        let Some((front, rest)) = key.rsplit_once(&format!(".{}.", end.front)) else { continue };
        // In memory a vector is a module with a weight of its own.
        let is_name = |name: &&str| !name.is_empty() && !name.contains('.') && format!(".{name}") != end.back;
        let mut names =
            [end.back, ".weight"].into_iter().filter_map(|back| rest.strip_suffix(back)).filter(is_name);
        if let Some(name) = names.next() {
            return (format!("{front}.{}", end.text()), Some(name));
        }
    }
    (key.to_string(), None)
}

/// What PEFT calls the two modules into which it puts one that is saved whole.
const WRAPPERS: [&str; 2] = ["modules_to_save", "original_module"];

/// Whether a key is one of those under which PEFT, with `bias` "all", writes the biases of saved modules again. It does
/// not read them.
pub(super) fn is_written_again(key: &str, bias: Bias) -> bool {
    bias == Bias::All && key.ends_with(".bias") && key.split('.').any(|part| WRAPPERS.contains(&part))
}

/// Whether a key is that of a parameter of the base, `x.weight` or `x.bias`.
pub(super) fn is_of_base(key: &str) -> bool {
    key.starts_with(PREFIX)
        && key.rsplit('.').next().is_some_and(|end| ["weight", "bias"].contains(&end))
        && !key.split('.').any(|part| is_of_adapter(part) || WRAPPERS.contains(&part))
}

/// Whether a component of a key is that of an adapter's tensor: one that a method has, or another of LoRA's.
pub(super) fn is_of_adapter(part: &str) -> bool {
    ends().any(|end| end.front.split('.').next() == Some(part)) || part.starts_with("lora_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_taken_apart() {
        for (key, expected) in [
            ("base_model.model.a.q.lora_A.weight", Some(("a.q", "lora_A.weight"))),
            ("base_model.model.embed.lora_embedding_B", Some(("embed", "lora_embedding_B"))),
            ("base_model.model.q.lora_magnitude_vector", Some(("q", "lora_magnitude_vector"))),
            (
                "base_model.model.embed.token_adapter.trainable_tokens_delta",
                Some(("embed", "token_adapter.trainable_tokens_delta")),
            ),
            ("base_model.model.a.q.base_layer.bias", Some(("a.q", "base_layer.bias"))),
            ("base_model.model.norm.weight", Some(("norm", "weight"))),
            ("q.lora_A.weight", None),
        ] {
            assert_eq!(split(key), expected, "{key}");
        }
    }

    #[test]
    fn names_of_adapters_are_taken_out() {
        for (key, without, name) in [
            ("x.lora_A.default.weight", "x.lora_A.weight", Some("default")),
            ("x.lora_B.one.bias", "x.lora_B.bias", Some("one")),
            ("x.lora_embedding_A.default", "x.lora_embedding_A", Some("default")),
            ("x.lora_magnitude_vector.default.weight", "x.lora_magnitude_vector", Some("default")),
            (
                "x.token_adapter.trainable_tokens_delta.default",
                "x.token_adapter.trainable_tokens_delta",
                Some("default"),
            ),
            ("x.modules_to_save.default.weight", "x.weight", Some("default")),
            ("x.lora_A.weight", "x.lora_A.weight", None),
            ("x.lora_magnitude_vector", "x.lora_magnitude_vector", None),
            ("x.original_module.bias", "x.original_module.bias", None),
        ] {
            assert_eq!(without_name(key), (without.to_string(), name), "{key}");
        }
    }
}
