//! `tokenizer.json`, read so that a damaged file is an error.

use std::path::Path;

use serde_json::Value;
use tokenizers::normalizers::Precompiled;

use crate::error::LlamaError;
use crate::file;

/// Reads `tokenizer.json`.
///
/// The `tokenizers` crate (0.22.2) panics in two places: when the decoder is not valid JSON, and when the table of a
/// `Precompiled` normalizer is broken. So both are checked first.
pub(super) fn read(path: &Path, text: &str) -> Result<tokenizers::Tokenizer, LlamaError> {
    let json: Value = file::parse(path, text)?;
    let refused = |source| LlamaError::Tokenizer { action: format!("load `{}`", path.display()), source };
    check_normalizer(&json["normalizer"]).map_err(|source| refused(source.into()))?;
    tokenizers::Tokenizer::from_bytes(text.as_bytes()).map_err(refused)
}

fn check_normalizer(normalizer: &Value) -> Result<(), serde_json::Error> {
    if normalizer["type"] == "Precompiled" {
        serde_json::from_str::<Precompiled>(&normalizer.to_string())?;
    }
    normalizer["normalizers"].as_array().into_iter().flatten().try_for_each(check_normalizer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::tests::chatml;

    const DECODER: &str = r#"{"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}"#;
    const NORMALIZER: &str = r#"{"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}]}"#;
    const PRE_TOKENIZER: &str = r#"{"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "\\d"}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]}"#;

    fn small() -> String {
        let text = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": NORMALIZER, "pre_tokenizer": PRE_TOKENIZER, "post_processor": {"type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {}}, "decoder": DECODER,
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}}"#;
        let text = text.replace("PRE_TOKENIZER", PRE_TOKENIZER).replace("NORMALIZER", NORMALIZER);
        text.replace("DECODER", DECODER)
    }

    #[test]
    fn no_damage_panics() {
        let text = small();
        let path = Path::new("tokenizer.json");
        let mut accepted = 0;
        for at in (0..text.len()).filter(|&at| text.is_char_boundary(at)) {
            assert!(read(path, &text[..at]).is_err());
            let rest = text[at..].chars().next().map_or("", |c| &text[at + c.len_utf8()..]);
            for damage in ["", "\n", "\u{0}", "\"", "}", "]", "0", "x", "é"] {
                accepted += usize::from(read(path, &format!("{}{damage}{rest}", &text[..at])).is_ok());
            }
        }
        assert!(accepted > 0, "none of the damage hit a space");
    }

    #[test]
    fn a_damaged_decoder_is_named_with_its_line() {
        let text = small();
        let damaged = text.replace(r#""content": " "}"#, "\"content\": \"\n\"}");
        let error = read(Path::new("a/tokenizer.json"), &damaged).unwrap_err();
        let LlamaError::Json { path, source } = error else { panic!("{error}") };
        let line = 1 + damaged[..damaged.find("\"\n\"}").unwrap() + 1].matches('\n').count();
        // The line break itself is what does not belong there, so it ends one line further down.
        assert_eq!((path.as_path(), source.line()), (Path::new("a/tokenizer.json"), line + 1));
        let broken = text.replace("AAAAAA==", "!");
        let error = read(Path::new("tokenizer.json"), &broken).unwrap_err();
        assert!(matches!(error, LlamaError::Tokenizer { .. }), "{error}");
        assert!(read(Path::new("x"), &chatml().inner.to_string(false).unwrap()).is_ok());
    }
}
