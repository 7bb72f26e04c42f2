//! A tokenizer as llama.cpp has it.

use std::collections::{HashMap, HashSet};

use serde_json::Value as Json;

use super::pre_tokenizer::{self, steps};
use super::writer::{Metadata, Value};
use crate::config::LlamaConfig;
use crate::error::LlamaError;
use crate::tokenizer::Tokenizer;

/// `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TokenType {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

/// What a tokenizer becomes.
#[derive(Debug, Default)]
pub(super) struct Vocabulary {
    pub(super) metadata: Metadata,
    /// What llama.cpp does otherwise, and may.
    pub(super) notes: Vec<String>,
    /// What it cannot do.
    pub(super) problems: Vec<String>,
}

/// The two kinds of BPE.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// On bytes with an alphabet of their own, in words that a regular expression finds: GPT-2 and its successors.
    Bytes,
    /// On characters, as SentencePiece does it: `▁` stands for a space, and unknown characters become bytes.
    Characters,
}

impl Vocabulary {
    /// # Errors
    /// The tokenizer fails. What llama.cpp cannot express is in `problems`.
    pub(super) fn of(tokenizer: &Tokenizer, config: &LlamaConfig) -> Result<Self, LlamaError> {
        let failed = |source| LlamaError::Tokenizer { action: "be written as JSON".to_string(), source };
        let text = tokenizer.inner().to_string(false).map_err(failed)?;
        let json: Json = serde_json::from_str(&text).map_err(|source| failed(source.into()))?;
        let mut vocabulary = Self::default();
        let model = &json["model"];
        if model["type"] != "BPE" {
            vocabulary.problems.push(format!("`model`: expected `BPE`, found {}", model["type"]));
            return Ok(vocabulary);
        }
        for (field, neutral) in [("continuing_subword_prefix", ""), ("end_of_word_suffix", "")] {
            if model[field].as_str().is_some_and(|value| value != neutral) {
                vocabulary.problems.push(format!("`{field}`: expected none, found {}", model[field]));
            }
        }
        let kind = if model["byte_fallback"] == true { Kind::Characters } else { Kind::Bytes };
        match kind {
            Kind::Bytes => vocabulary.bytes(&json),
            Kind::Characters => vocabulary.characters(&json),
        }
        vocabulary.tokens(tokenizer, config, model, kind);
        vocabulary.special(tokenizer, config)?;
        if let Some(template) = tokenizer.chat_template() {
            vocabulary.push("chat_template", Value::Text(template.source().to_string()));
        }
        Ok(vocabulary)
    }

    fn push(&mut self, key: &str, value: Value) {
        let key =
            if key == "chat_template" { format!("tokenizer.{key}") } else { format!("tokenizer.ggml.{key}") };
        self.metadata.push((key, value));
    }

    fn bytes(&mut self, json: &Json) {
        self.push("model", Value::Text("gpt2".into()));
        match pre_tokenizer::name(&json["pre_tokenizer"], json["model"]["ignore_merges"] == true) {
            Ok(name) => self.push("pre", Value::Text(name.into())),
            Err(problem) => self.problems.push(problem),
        }
        match steps(&json["normalizer"])[..] {
            [] => {}
            [only] if only["type"] == "NFC" => {
                self.notes.push(
                    "llama.cpp does not bring text into the form NFC first, as this tokenizer does".into(),
                );
            }
            _ => self
                .problems
                .push(format!("`normalizer`: expected none or NFC, found {}", json["normalizer"])),
        }
    }

    fn characters(&mut self, json: &Json) {
        self.push("model", Value::Text("llama".into()));
        self.push("pre", Value::Text("default".into()));
        let (before, cuts) = (steps(&json["normalizer"]), steps(&json["pre_tokenizer"]));
        let marks = |step: &Json| {
            step["type"] == "Replace" && step["pattern"]["String"] == " " && step["content"] == "▁"
        };
        let prefix = match (&before[..], &cuts[..]) {
            ([first, second], [])
                if first["type"] == "Prepend" && first["prepend"] == "▁" && marks(second) =>
            {
                Some(true)
            }
            ([only], []) if marks(only) => Some(false),
            ([], [only])
                if only["type"] == "Metaspace" && only["replacement"] == "▁" && only["split"] == false =>
            {
                if only["prepend_scheme"] == "first" {
                    self.notes.push(
                        "behind a special token, llama.cpp puts the space that this tokenizer puts at the beginning only".into(),
                    );
                }
                Some(only["prepend_scheme"] != "never")
            }
            _ => None,
        };
        match prefix {
            Some(prefix) => self.push("add_space_prefix", Value::Bool(prefix)),
            None => self.problems.push(format!(
                "`normalizer` and `pre_tokenizer`: expected those of a SentencePiece model (`▁` for a space, and nothing \
                 else), found {} and {}",
                json["normalizer"], json["pre_tokenizer"]
            )),
        }
    }

    /// The tokens, what they are, and how they are merged.
    fn tokens(&mut self, tokenizer: &Tokenizer, config: &LlamaConfig, model: &Json, kind: Kind) {
        let inner = tokenizer.inner();
        let added = inner.get_added_tokens_decoder();
        let unknown = model["unk_token"].as_str();
        let size = config.vocab_size as u32;
        if let Some((id, token)) = added.iter().find(|(id, _)| **id >= size) {
            self.problems.push(format!(
                "`{}`: expected an id below `vocab_size` of config.json ({size}), found {id}",
                token.content
            ));
        } else if inner.get_vocab_size(true) > config.vocab_size {
            let found = inner.get_vocab_size(true);
            self.problems
                .push(format!("expected at most `vocab_size` of config.json ({size}) tokens, found {found}"));
        }
        let pairs: Vec<[&str; 2]> =
            model["merges"].as_array().into_iter().flatten().filter_map(pair).collect();
        let mut scores: HashMap<String, f32> = HashMap::new();
        for (rank, pair) in pairs.iter().enumerate() {
            scores.entry(pair.concat()).or_insert(-(rank as f32));
        }

        let (mut tokens, mut types) = (vec![], vec![]);
        let mut seen = HashSet::new();
        for id in 0..size {
            let (token, token_type) = match (inner.id_to_token(id), added.get(&id)) {
                (None, _) => (format!("[PAD{id}]"), TokenType::Unused),
                (Some(token), _) if kind == Kind::Characters && unknown == Some(token.as_str()) => {
                    (token, TokenType::Unknown)
                }
                (Some(token), Some(added)) if added.special || looks_special(&token) => {
                    (token, TokenType::Control)
                }
                // It is matched in the text as it is, before spaces are marked.
                (Some(token), Some(_)) => (token.replace('▁', " "), TokenType::UserDefined),
                (Some(token), None) if kind == Kind::Characters && is_byte(&token) => {
                    (token, TokenType::Byte)
                }
                (Some(token), None) => (token, TokenType::Normal),
            };
            let is_merged = || token.chars().nth(1).is_none() || scores.contains_key(&token);
            if kind == Kind::Characters && token_type == TokenType::Normal && !is_merged() {
                self.problems.push(format!(
                    "`{token}`: llama.cpp would merge it, and no merge of this tokenizer does"
                ));
            }
            if !seen.insert(token.clone()) {
                self.problems.push(format!("`{token}`: expected one id, found several"));
            }
            tokens.push(token);
            types.push(token_type as i32);
        }
        if kind == Kind::Characters {
            let normal = tokens.iter().zip(&types).filter(|(_, of)| **of == TokenType::Normal as i32);
            let normal: Vec<&str> = normal.map(|(token, _)| token.as_str()).collect();
            self.problems.extend(unmerged(&normal, &pairs));
        }
        if kind == Kind::Characters {
            let score = |token: &String| scores.get(token).copied().unwrap_or_default();
            self.push("scores", Value::F32s(tokens.iter().map(score).collect()));
        } else {
            let merges: Vec<String> = pairs.iter().map(|pair| pair.join(" ")).collect();
            if let Some(pair) = pairs.iter().find(|pair| pair.iter().any(|part| part.contains(' '))) {
                self.problems.push(format!("merge of `{}` and `{}`: expected no spaces", pair[0], pair[1]));
            }
            self.push("merges", Value::Texts(merges));
        }
        self.push("tokens", Value::Texts(tokens));
        self.push("token_type", Value::I32s(types));
        if kind == Kind::Characters
            && let Some(id) = unknown.and_then(|token| tokenizer.token_to_id(token))
        {
            self.push("unknown_token_id", Value::U32(id));
        }
    }

    /// The tokens that begin, end and fill up a text.
    fn special(&mut self, tokenizer: &Tokenizer, config: &LlamaConfig) -> Result<(), LlamaError> {
        let eos = tokenizer.eos_token_id().or(config.eos_token_ids.first().copied());
        let Some(eos) = eos else {
            // llama.cpp would take its default, which is another model's.
            self.problems
                .push("expected an end token (`eos_token` in tokenizer_config.json), found none".into());
            return Ok(());
        };
        let bos = tokenizer.bos_token_id().or(config.bos_token_id);
        self.push("bos_token_id", Value::U32(bos.unwrap_or(eos)));
        self.push("eos_token_id", Value::U32(eos));
        // More than these, llama.cpp finds by their text.
        let others = config.eos_token_ids.iter().filter(|id| **id != eos);
        for (key, id) in ["eot_token_id", "eom_token_id"].into_iter().zip(others) {
            self.push(key, Value::U32(*id));
        }
        let own =
            tokenizer.special_tokens().pad_token.as_deref().and_then(|token| tokenizer.token_to_id(token));
        if let Some(pad) = own.or(config.pad_token_id) {
            self.push("padding_token_id", Value::U32(pad));
        }
        let plain = tokenizer.encode("a")?;
        let full = tokenizer.encode_with_special_tokens("a")?;
        let at = (0..full.len()).find(|at| !plain.is_empty() && full[*at..].starts_with(&plain));
        let around = at.map(|at| (&full[..at], &full[at + plain.len()..]));
        let (add_bos, add_eos) = match around {
            Some(([], [])) => (false, false),
            Some(([first], [])) if Some(*first) == bos => (true, false),
            Some(([], [last])) if *last == eos => (false, true),
            Some(([first], [last])) if Some(*first) == bos && *last == eos => (true, true),
            _ => {
                self.problems.push(format!(
                    "`post_processor`: expected nothing but `bos_token` and `eos_token` around a text, found the tokens \
                     {full:?} for {plain:?}"
                ));
                return Ok(());
            }
        };
        self.push("add_bos_token", Value::Bool(add_bos));
        self.push("add_eos_token", Value::Bool(add_eos));
        Ok(())
    }
}

/// A problem for each token that llama.cpp makes of two neighbours, and merges do not.
///
/// llama.cpp knows no merges here: it joins any two neighbours that are a token together. A neighbour is a character, or
/// another token.
fn unmerged(tokens: &[&str], merges: &[[&str; 2]]) -> Vec<String> {
    let known: HashSet<&str> = tokens.iter().copied().collect();
    let results: HashSet<String> = merges.iter().map(|pair| pair.concat()).collect();
    let merges: HashSet<[&str; 2]> = merges.iter().copied().collect();
    let is_piece = |part: &str| part.chars().nth(1).is_none() || known.contains(part);
    // A token that is not the result of any merge has a problem already.
    let merged = tokens.iter().filter(|token| results.contains(**token));
    let missing = merged.filter_map(|token| {
        let mut splits = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        let (first, second) = splits.find(|(first, second)| {
            is_piece(first) && is_piece(second) && !merges.contains(&[*first, *second])
        })?;
        Some(format!(
            "`{token}`: llama.cpp would merge it of `{first}` and `{second}`, and this tokenizer does not"
        ))
    });
    missing.collect()
}

/// A merge, in the spelling of `tokenizers` or in the older one.
fn pair(merge: &Json) -> Option<[&str; 2]> {
    match merge {
        Json::Array(parts) => match &parts[..] {
            [first, second] => Some([first.as_str()?, second.as_str()?]),
            _ => None,
        },
        other => other.as_str()?.split_once(' ').map(|(first, second)| [first, second]),
    }
}

/// Added tokens that look like this are control tokens in llama.cpp's own files, whether they say so or not: they are not
/// shown in answers.
fn looks_special(token: &str) -> bool {
    token.starts_with("<|") && token.ends_with("|>")
}

/// Whether a token of SentencePiece stands for a byte: `<0x0A>`.
fn is_byte(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && digits.chars().all(|digit| digit.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use serde_json::json;

    use super::*;
    use crate::tokenizer::SpecialTokens;
    use crate::tokenizer::tests::{chatml, llama3};

    fn get<'a>(vocabulary: &'a Vocabulary, key: &str) -> Option<&'a Value> {
        let key = format!("tokenizer.ggml.{key}");
        vocabulary.metadata.iter().find(|(name, _)| *name == key).map(|(_, value)| value)
    }

    fn texts<'a>(vocabulary: &'a Vocabulary, key: &str) -> &'a [String] {
        match get(vocabulary, key) {
            Some(Value::Texts(texts)) => texts,
            other => panic!("{other:?}"),
        }
    }

    fn types(vocabulary: &Vocabulary) -> &[i32] {
        match get(vocabulary, "token_type") {
            Some(Value::I32s(types)) => types,
            other => panic!("{other:?}"),
        }
    }

    fn config(vocab_size: usize) -> LlamaConfig {
        LlamaConfig { bos_token_id: None, eos_token_ids: vec![], ..LlamaConfig::new(vocab_size, 32, 1) }
    }

    /// A tokenizer in the manner of Llama 2.
    fn sentence_piece(change: impl Fn(&mut Json)) -> Tokenizer {
        let mut vocab = serde_json::Map::new();
        let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
        let rest = ["▁", "a", "b", "c", "bc", "▁a", "abc", "▁abc"].map(str::to_string);
        let specials = ["<unk>", "<s>", "</s>"].map(str::to_string);
        for (id, token) in specials.into_iter().chain(bytes).chain(rest).enumerate() {
            vocab.insert(token, json!(id));
        }
        let special = |id: usize, content: &str| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        };
        let mut json = json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "pre_tokenizer": null,
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
            "decoder": null,
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
                "merges": [["b", "c"], ["▁", "a"], ["a", "bc"], ["▁", "abc"], ["▁a", "bc"]]}
        });
        change(&mut json);
        let inner = tokenizers::Tokenizer::from_str(&json.to_string()).unwrap();
        Tokenizer::from_parts(inner, SpecialTokens::new("<s>", "</s>"), None).unwrap()
    }

    #[test]
    fn tokens_of_a_tokenizer_on_bytes_have_their_types_and_merges() {
        let tokenizer = llama3();
        let size = tokenizer.vocab_size();
        let vocabulary = Vocabulary::of(&tokenizer, &config(size + 2)).unwrap();
        assert!(vocabulary.problems.is_empty(), "{:?}", vocabulary.problems);
        assert_eq!(get(&vocabulary, "model"), Some(&Value::Text("gpt2".into())));
        let tokens = texts(&vocabulary, "tokens");
        assert_eq!(
            (tokens.len(), &*tokens[0], &*tokens[size]),
            (size + 2, "<|begin_of_text|>", &*format!("[PAD{size}]"))
        );
        assert_eq!((types(&vocabulary)[0], types(&vocabulary)[100], types(&vocabulary)[size]), (3, 1, 5));
        let merges = texts(&vocabulary, "merges");
        for merge in merges {
            let (first, second) = merge.split_once(' ').unwrap();
            assert!(tokens.contains(&format!("{first}{second}")), "{merge}");
        }
        assert!(merges.len() > 10);
        let id = |token: &str| tokenizer.token_to_id(token).map(Value::U32);
        assert_eq!(get(&vocabulary, "eos_token_id"), id("<|eot_id|>").as_ref());
        assert_eq!(get(&vocabulary, "padding_token_id"), id("<|pad|>").as_ref());
        assert_eq!(get(&vocabulary, "add_bos_token"), Some(&Value::Bool(true)));
        let (key, value) = vocabulary.metadata.last().unwrap();
        let source = tokenizer.chat_template().unwrap().source().to_string();
        assert_eq!((key.as_str(), value), ("tokenizer.chat_template", &Value::Text(source)));
        let chatml = Vocabulary::of(&chatml(), &config(300)).unwrap();
        assert_eq!(get(&chatml, "add_bos_token"), Some(&Value::Bool(false)));
        assert_eq!(get(&chatml, "bos_token_id"), get(&chatml, "eos_token_id"), "there is none");
    }

    #[test]
    fn scores_of_sentence_piece_follow_the_merges() {
        let vocabulary = Vocabulary::of(&sentence_piece(|_| {}), &config(267)).unwrap();
        assert!(vocabulary.problems.is_empty(), "{:?}", vocabulary.problems);
        assert_eq!(get(&vocabulary, "model"), Some(&Value::Text("llama".into())));
        let Some(Value::F32s(scores)) = get(&vocabulary, "scores") else { panic!("{vocabulary:?}") };
        assert_eq!(scores[259..], [0.0, 0.0, 0.0, 0.0, 0.0, -1.0, -2.0, -3.0]);
        assert_eq!((&types(&vocabulary)[..4], types(&vocabulary)[262]), (&[2, 3, 3, 6][..], 1));
        assert_eq!(get(&vocabulary, "add_space_prefix"), Some(&Value::Bool(true)));
        assert_eq!(get(&vocabulary, "add_bos_token"), Some(&Value::Bool(true)));
        assert_eq!(get(&vocabulary, "unknown_token_id"), Some(&Value::U32(0)));
        let metaspace = sentence_piece(|json| {
            json["normalizer"] = Json::Null;
            json["pre_tokenizer"] =
                json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
        });
        let vocabulary = Vocabulary::of(&metaspace, &config(267)).unwrap();
        assert_eq!((vocabulary.problems.len(), vocabulary.notes.len()), (0, 1), "{vocabulary:?}");
    }

    #[test]
    fn what_llama_cpp_does_not_have_is_named() {
        let problem = |tokenizer: &Tokenizer, config: &LlamaConfig| -> String {
            Vocabulary::of(tokenizer, config).unwrap().problems.join("\n")
        };
        let lower = sentence_piece(|json| json["normalizer"] = json!({"type": "Lowercase"}));
        assert!(problem(&lower, &config(267)).contains("`normalizer` and `pre_tokenizer`: expected"));
        let apart = sentence_piece(|json| {
            let merges = json["model"]["merges"].as_array_mut().unwrap();
            merges.retain(|merge| merge != &json!(["b", "c"]) && merge[1] != "bc");
        });
        assert!(problem(&apart, &config(267)).contains("`bc`: llama.cpp would merge it"));
        // Of `abc`, this tokenizer merges `b` and `c` first, and then nothing.
        let stuck = sentence_piece(|json| {
            let vocab = json["model"]["vocab"].as_object_mut().unwrap();
            for token in ["▁a", "▁abc"] {
                vocab.remove(token);
            }
            vocab.insert("ab".into(), json!(264));
            vocab.insert("abc".into(), json!(265));
            json["model"]["merges"] = json!([["b", "c"], ["a", "b"], ["ab", "c"]]);
        });
        assert_eq!(
            problem(&stuck, &config(266)),
            "`abc`: llama.cpp would merge it of `a` and `bc`, and this tokenizer does not"
        );
        let small = problem(&sentence_piece(|_| {}), &config(260));
        assert!(
            small.contains("expected at most `vocab_size` of config.json (260) tokens, found 267"),
            "{small}"
        );
        let unigram = sentence_piece(|json| {
            json["model"] = json!({"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0], ["a", -1.0]], "byte_fallback": false});
        });
        assert!(problem(&unigram, &config(267)).contains("`model`: expected `BPE`, found \"Unigram\""));
        let bytes = chatml();
        let mut inner = bytes.inner().clone();
        let normalizer = tokenizers::normalizers::Strip::new(true, true);
        inner.with_normalizer(Some(normalizer));
        let special = bytes.special_tokens().clone();
        let stripped = Tokenizer::from_parts(inner, special, None).unwrap();
        assert!(problem(&stripped, &config(300)).contains("`normalizer`: expected none or NFC"));
    }
}
