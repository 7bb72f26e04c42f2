//! The pre-tokenizers that llama.cpp has a name for.

use serde_json::Value as Json;

/// The regular expression of Llama 3.
const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// That of Qwen2, which takes digits one by one.
const QWEN_2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The steps of a normalizer or a pre-tokenizer of `tokenizer.json`, sequences resolved.
pub(super) fn steps(json: &Json) -> Vec<&Json> {
    match ["normalizers", "pretokenizers"].into_iter().find_map(|list| json[list].as_array()) {
        Some(list) => list.iter().flat_map(steps).collect(),
        None if json.is_null() => vec![],
        None => vec![json],
    }
}

/// `tokenizer.ggml.pre` of a tokenizer on bytes.
///
/// # Errors
/// What there is instead of a known pre-tokenizer.
pub(super) fn name(pre_tokenizer: &Json, ignore_merges: bool) -> Result<&'static str, String> {
    let steps = steps(pre_tokenizer);
    let bytes = |step: &Json, use_regex: bool| {
        step["type"] == "ByteLevel" && step["add_prefix_space"] == false && step["use_regex"] == use_regex
    };
    let splits = |step: &Json, regex: &str| {
        let Json::Object(_) = step else { return false };
        step["type"] == "Split"
            && step["pattern"]["Regex"] == regex
            && step["behavior"] == "Isolated"
            && step["invert"] == false
    };
    let name = match steps[..] {
        [only] if bytes(only, true) && !ignore_merges => Some("gpt-2"),
        [digits, rest]
            if digits["type"] == "Digits"
                && digits["individual_digits"] == true
                && bytes(rest, true)
                && !ignore_merges =>
        {
            Some("smollm")
        }
        [split, rest] if splits(split, LLAMA_3) && bytes(rest, false) => {
            Some(if ignore_merges { "llama-bpe" } else { "smaug-bpe" })
        }
        [split, rest] if splits(split, QWEN_2) && bytes(rest, false) && !ignore_merges => Some("qwen2"),
        _ => None,
    };
    name.ok_or_else(|| {
        let merges = if ignore_merges { ", with `ignore_merges`" } else { "" };
        format!(
            "`pre_tokenizer`: expected that of GPT-2, SmolLM, Llama 3 or Qwen2, found {}{merges}",
            if steps.is_empty() { "none".to_string() } else { pre_tokenizer.to_string() }
        )
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_is_found_by_what_it_does() {
        let bytes = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
        let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        let both = |first: Json, second: Json| json!({"type": "Sequence", "pretokenizers": [first, second]});
        let digits = json!({"type": "Digits", "individual_digits": true});
        for (json, ignore_merges, expected) in [
            (bytes(true), false, "gpt-2"),
            (both(digits.clone(), bytes(true)), false, "smollm"),
            (both(split(LLAMA_3), bytes(false)), true, "llama-bpe"),
            (both(split(LLAMA_3), bytes(false)), false, "smaug-bpe"),
            (both(split(QWEN_2), bytes(false)), false, "qwen2"),
        ] {
            assert_eq!(name(&json, ignore_merges), Ok(expected));
        }
        for (json, ignore_merges) in [
            (bytes(true), true),
            (bytes(false), false),
            (both(split(QWEN_2), bytes(false)), true),
            (both(split(r"\p{N}{1,3}"), bytes(false)), false),
            (both(digits, bytes(false)), false),
            (Json::Null, false),
        ] {
            let text = name(&json, ignore_merges).unwrap_err();
            assert!(text.starts_with("`pre_tokenizer`: expected that of GPT-2"), "{text}");
        }
    }
}
