//! Which files of a repository are of use, and which must be there.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn_peft_files::{INDEX_FILE, WEIGHTS_FILE};
use serde::Deserialize;

use super::problem::HubProblem;
use crate::config::CONFIG_FILE;

const TOKENIZER_FILE: &str = "tokenizer.json";
const ADAPTER_CONFIG_FILE: &str = "adapter_config.json";
const ADAPTER_FILE: &str = "adapter_model.safetensors";

/// Files of a model that are fetched where it has them, beside its weights. Those that a complete copy must have come
/// last: where they are, the others are as well.
const FILES: [&str; 6] = [
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    CONFIG_FILE,
    TOKENIZER_FILE,
];

/// What a repository is fetched as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Model,
    Adapter,
}

impl Kind {
    /// The files that are of use, in the order in which they must be fetched: [`missing`](Self::missing) looks for the
    /// last ones. Only those of the top folder: others hold other formats.
    pub(super) fn wanted(self, found: &[String]) -> Vec<&str> {
        let has = |name: &str| found.iter().any(|file| file == name);
        // The loader takes the single file first, whatever an index names.
        let (is_single, is_sharded) = (has(WEIGHTS_FILE), has(INDEX_FILE));
        let is_weights = |file: &&str| match self {
            Self::Adapter => *file == ADAPTER_FILE,
            Self::Model if is_single => *file == WEIGHTS_FILE,
            Self::Model => is_sharded && (*file == INDEX_FILE || is_shard(file)),
        };
        let small: &[&str] = match self {
            Self::Model => &FILES,
            Self::Adapter => &[ADAPTER_CONFIG_FILE],
        };
        let small = small.iter().copied().filter(|name| has(name));
        small.chain(found.iter().map(String::as_str).filter(is_weights)).collect()
    }

    /// What a repository with these files lacks.
    pub(super) fn check(self, found: &[String]) -> Result<(), HubProblem> {
        let has = |name: &str| found.iter().any(|file| file == name);
        let count = found.len();
        let unusable = |what: String, hint| Err(HubProblem::Unusable { what, hint });
        match self {
            Self::Model if has(ADAPTER_CONFIG_FILE) && !has(CONFIG_FILE) => unusable(
                format!("it is an adapter: it has `{ADAPTER_CONFIG_FILE}` and no `{CONFIG_FILE}`"),
                "give it as the adapter, and as the model the `base_model_name_or_path` of its adapter_config.json",
            ),
            Self::Adapter if has(CONFIG_FILE) && !has(ADAPTER_CONFIG_FILE) => unusable(
                format!("it is a model: it has `{CONFIG_FILE}` and no `{ADAPTER_CONFIG_FILE}`"),
                "give it as the model, without an adapter",
            ),
            Self::Model if !has(CONFIG_FILE) => unusable(
                format!("of its {count} files, none is `{CONFIG_FILE}`"),
                "it must be a model in the Hugging Face layout: config.json, model.safetensors, tokenizer.json",
            ),
            Self::Adapter if !has(ADAPTER_CONFIG_FILE) => unusable(
                format!("of its {count} files, none is `{ADAPTER_CONFIG_FILE}`"),
                "it must be an adapter in PEFT's format: adapter_config.json, adapter_model.safetensors",
            ),
            Self::Model if !has(WEIGHTS_FILE) && !has(INDEX_FILE) => unusable(
                format!("of its {count} files, none has safetensors weights"),
                "convert the weights in Python: transformers' `save_pretrained` writes safetensors",
            ),
            Self::Adapter if !has(ADAPTER_FILE) => unusable(
                format!("of its {count} files, none is `{ADAPTER_FILE}`"),
                "convert the adapter in Python: PEFT's `save_pretrained` writes safetensors",
            ),
            _ => Ok(()),
        }
    }

    /// The first file that a complete copy has and this directory has not.
    pub(super) fn missing(self, directory: &Path) -> Option<String> {
        let lacks = |name: &str| !directory.join(name).exists();
        let required: &[&str] = match self {
            Self::Model => &[CONFIG_FILE, TOKENIZER_FILE],
            Self::Adapter => &[ADAPTER_CONFIG_FILE],
        };
        let missing = required.iter().find(|name| lacks(name)).map(|name| name.to_string());
        missing.or_else(|| self.missing_weights(directory))
    }

    /// The first file with weights that the directory lacks.
    pub(super) fn missing_weights(self, directory: &Path) -> Option<String> {
        let lacks = |name: &str| !directory.join(name).exists();
        if self == Self::Adapter {
            return lacks(ADAPTER_FILE).then(|| ADAPTER_FILE.to_string());
        }
        // As the loader does, which does not look at the index then.
        if !lacks(WEIGHTS_FILE) {
            return None;
        }
        match shards(&directory.join(INDEX_FILE)) {
            Some(shards) => shards.into_iter().find(|name| lacks(name)),
            None => Some(WEIGHTS_FILE.to_string()),
        }
    }
}

fn is_shard(file: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    file.starts_with("model-") && file.ends_with(".safetensors") && file.chars().all(is_plain)
}

/// The files that an index names; none if there is no index.
fn shards(index: &Path) -> Option<Vec<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_slice(&fs::read(index).ok()?).ok()?;
    Some(index.weight_map.into_values().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| name.to_string()).collect()
    }

    #[test]
    fn only_the_configuration_tokenizer_and_safetensors_of_the_top_folder_are_wanted() {
        let single =
            files(&["README.md", CONFIG_FILE, "model.safetensors", "original/model.safetensors", "a.pth"]);
        assert_eq!(Kind::Model.wanted(&single), [CONFIG_FILE, "model.safetensors"]);
        let sharded = files(&[
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "model-x/../../y.safetensors",
            "model-x?.safetensors",
            TOKENIZER_FILE,
        ]);
        let wanted = Kind::Model.wanted(&sharded);
        assert_eq!(wanted.len(), 4);
        assert!(wanted.iter().all(|file| !file.contains(['/', '?'])));
        let adapter = files(&[ADAPTER_CONFIG_FILE, ADAPTER_FILE, "adapter_model.bin", TOKENIZER_FILE]);
        assert_eq!(Kind::Adapter.wanted(&adapter), [ADAPTER_CONFIG_FILE, ADAPTER_FILE]);
        let both = files(&[CONFIG_FILE, "model-00001-of-00001.safetensors", INDEX_FILE, WEIGHTS_FILE]);
        assert_eq!(Kind::Model.wanted(&both), [CONFIG_FILE, WEIGHTS_FILE]);
    }

    #[test]
    fn what_a_complete_copy_must_have_is_fetched_last() {
        let found = files(&[
            ADAPTER_FILE,
            ADAPTER_CONFIG_FILE,
            WEIGHTS_FILE,
            TOKENIZER_FILE,
            CONFIG_FILE,
            "chat_template.jinja",
        ]);
        let order = ["chat_template.jinja", CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE];
        assert_eq!(Kind::Model.wanted(&found), order);
        assert_eq!(Kind::Adapter.wanted(&found), [ADAPTER_CONFIG_FILE, ADAPTER_FILE]);
    }

    #[test]
    fn a_repository_of_another_kind_or_format_is_refused() {
        let check = |kind: Kind, names: &[&str]| match kind.check(&files(names)) {
            Ok(()) => String::new(),
            Err(HubProblem::Unusable { what, hint }) => format!("{what} {hint}"),
            Err(other) => panic!("{other}"),
        };
        let is_told = |kind, names: &[&str], expected: &str| {
            let text = check(kind, names);
            assert!(text.contains(expected) && !expected.is_empty(), "{text}");
        };
        is_told(Kind::Model, &[ADAPTER_CONFIG_FILE, ADAPTER_FILE], "give it as the adapter");
        is_told(Kind::Adapter, &[CONFIG_FILE, WEIGHTS_FILE], "give it as the model");
        is_told(Kind::Model, &[CONFIG_FILE, "pytorch_model.bin"], "transformers' `save_pretrained`");
        is_told(Kind::Adapter, &[ADAPTER_CONFIG_FILE, "adapter_model.bin"], "PEFT's `save_pretrained`");
        is_told(Kind::Model, &["a.gguf"], "none is `config.json`");
        is_told(Kind::Adapter, &["a.gguf"], "none is `adapter_config.json`");
        assert_eq!(check(Kind::Model, &[CONFIG_FILE, INDEX_FILE]), "");
        assert_eq!(check(Kind::Adapter, &[ADAPTER_CONFIG_FILE, ADAPTER_FILE]), "");
    }

    #[test]
    fn a_copy_is_complete_with_every_shard_of_its_index() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        let missing = |kind: Kind| kind.missing(dir.path()).unwrap_or_default();
        assert_eq!(missing(Kind::Model), CONFIG_FILE);
        write(CONFIG_FILE, "{}");
        write(TOKENIZER_FILE, "{}");
        assert_eq!(missing(Kind::Model), WEIGHTS_FILE);
        write(INDEX_FILE, r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#);
        write("model-1.safetensors", "");
        assert_eq!(missing(Kind::Model), "model-2.safetensors");
        write("model-2.safetensors", "");
        assert_eq!(missing(Kind::Model), "");
        fs::remove_file(dir.path().join("model-1.safetensors")).unwrap();
        assert_eq!(missing(Kind::Model), "model-1.safetensors");
        // The single file is taken without a look at the index.
        write(WEIGHTS_FILE, "");
        assert_eq!(missing(Kind::Model), "");
        write(ADAPTER_CONFIG_FILE, "{}");
        assert_eq!(missing(Kind::Adapter), ADAPTER_FILE);
        write(ADAPTER_FILE, "");
        assert_eq!(missing(Kind::Adapter), "");
    }
}
