//! Model directories from the Hugging Face Hub.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::{env, fmt};

use burn_peft_files::{INDEX_FILE, WEIGHTS_FILE};
use hf_hub::api::sync::{ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};

use crate::config::CONFIG_FILE;
use crate::error::LlamaError;

/// Files that are fetched where the model has them, beside its weights.
const FILES: [&str; 6] = [
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];

/// The name of a model on the Hub: `owner/name`, or `owner/name@revision` for a branch, tag or commit.
///
/// ```
/// use burn_peft_llama::ModelId;
///
/// # fn main() -> Result<(), burn_peft_llama::LlamaError> {
/// let id: ModelId = "HuggingFaceTB/SmolLM2-135M-Instruct@main".parse()?;
/// assert_eq!((id.name.as_str(), id.revision.as_deref()), ("HuggingFaceTB/SmolLM2-135M-Instruct", Some("main")));
/// # Ok(())
/// # }
/// ```
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelId {
    /// Owner and name, with the slash between them.
    pub name: String,
    /// Branch, tag or commit. Default: the branch `main`.
    pub revision: Option<String>,
}

impl FromStr for ModelId {
    type Err = LlamaError;

    fn from_str(text: &str) -> Result<Self, LlamaError> {
        let (name, revision) = match text.split_once('@') {
            Some((name, revision)) => (name, Some(revision)),
            None => (text, None),
        };
        // These become folder names of the cache, so nothing that leads out of it may pass.
        let part = |part: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            !part.is_empty() && !part.starts_with('.') && !part.contains("..") && part.chars().all(allowed)
        };
        let valid_name = name.split_once('/').is_some_and(|(owner, name)| part(owner) && part(name));
        let valid_revision = revision.is_none_or(|revision| revision.split('/').all(part));
        if !(valid_name && valid_revision) {
            return Err(LlamaError::ModelId { model: text.to_string() });
        }
        Ok(Self { name: name.to_string(), revision: revision.map(str::to_string) })
    }
}

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        self.revision.iter().try_for_each(|revision| write!(f, "@{revision}"))
    }
}

/// The directory of a model that is given by a directory or by its [`ModelId`] on the Hub.
///
/// An existing directory is returned as it is. Otherwise the configuration, tokenizer, chat template and
/// safetensors weights are fetched into the cache that all Hugging Face tools share, all from one commit; what is
/// there already is not fetched again. If the Hub cannot be reached, a cached copy will do.
/// The environment variables `HF_TOKEN`, `HF_HOME` and `HF_ENDPOINT` mean what they mean to those tools.
///
/// # Errors
/// - [`LlamaError::ModelId`] if `model` is neither a directory nor an id,
/// - [`LlamaError::Hub`] if it cannot be fetched, or has no safetensors weights.
pub fn resolve(model: &str) -> Result<PathBuf, LlamaError> {
    if Path::new(model).is_dir() {
        return Ok(PathBuf::from(model));
    }
    let id: ModelId = model.parse()?;
    // The client panics without a home directory.
    if env::var_os("HF_HOME").is_none() && env::home_dir().is_none_or(|home| home.as_os_str().is_empty()) {
        let source = "there is no home directory for the cache".into();
        let hint = "name a folder for it in the environment variable `HF_HOME`";
        return Err(LlamaError::Hub { model: id.to_string(), file: CONFIG_FILE.to_string(), source, hint });
    }
    let cache = Cache::from_env();
    let mut api = ApiBuilder::from_env();
    if let Some(token) = env::var("HF_TOKEN").ok().filter(|token| !token.trim().is_empty()) {
        api = api.with_token(Some(token.trim().to_string()));
    }
    fetch(&id, api, &cache)
}

fn fetch(id: &ModelId, api: ApiBuilder, cache: &Cache) -> Result<PathBuf, LlamaError> {
    let failed = |file: &str, source: ApiError| {
        let hint = hint(&source.to_string());
        LlamaError::Hub { model: id.to_string(), file: file.to_string(), source: source.into(), hint }
    };
    let revision = id.revision.as_deref().unwrap_or("main");
    let repo = |revision: &str| Repo::with_revision(id.name.clone(), RepoType::Model, revision.to_string());
    let api = api.with_progress(false).build().map_err(|error| failed(CONFIG_FILE, error))?;
    let info = match api.repo(repo(revision)).info() {
        Ok(info) => info,
        Err(error) => return cached(cache, repo(revision)).ok_or_else(|| failed(CONFIG_FILE, error)),
    };

    let found: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
    let wanted = wanted(&found);
    if !wanted.iter().any(|file| file.ends_with(".safetensors")) {
        let source = format!("the model has {} files, none of them safetensors weights", found.len()).into();
        let hint = "convert the weights with transformers' `save_pretrained`";
        return Err(LlamaError::Hub { model: id.to_string(), file: WEIGHTS_FILE.to_string(), source, hint });
    }
    // By its commit, so that a change on the Hub in between cannot mix two versions.
    let pinned = api.repo(repo(&info.sha));
    let mut dir = None;
    for file in wanted {
        let path = pinned.get(file).map_err(|error| failed(file, error))?;
        dir = path.parent().map(Path::to_path_buf);
    }
    // Remembers what the branch pointed to, for the time without a network.
    let remembered = cache.repo(repo(revision)).create_ref(&info.sha);
    remembered.map_err(|error| failed(CONFIG_FILE, error.into()))?;
    dir.ok_or_else(|| LlamaError::ModelId { model: id.to_string() })
}

/// The files of a model that are of use here. Only those of its top folder: others hold other formats.
fn wanted(found: &[String]) -> Vec<&str> {
    let sharded = found.iter().any(|file| file == INDEX_FILE);
    let is_wanted = |file: &&str| {
        let shard =
            file.starts_with("model-") && file.ends_with(".safetensors") && !file.contains(['/', '\\']);
        FILES.contains(file) || if sharded { *file == INDEX_FILE || shard } else { *file == WEIGHTS_FILE }
    };
    found.iter().map(String::as_str).filter(is_wanted).collect()
}

/// The directory of a copy that an earlier run left in the cache.
fn cached(cache: &Cache, repo: Repo) -> Option<PathBuf> {
    let repo = cache.repo(repo);
    repo.get("tokenizer.json")?;
    repo.get(WEIGHTS_FILE).or_else(|| repo.get(INDEX_FILE))?;
    repo.get(CONFIG_FILE)?.parent().map(Path::to_path_buf)
}

/// What to try, by the words of the client's error.
fn hint(error: &str) -> &'static str {
    if ["401", "403", "404"].iter().any(|status| error.contains(status)) {
        "is the id right? A gated or private model needs the token of an account that may read it, in the \
         environment variable `HF_TOKEN`"
    } else {
        "is there a network? Without one, give the directory of a model instead of its id"
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// An endpoint that nothing listens at.
    fn offline(cache: &Cache) -> ApiBuilder {
        ApiBuilder::from_cache(cache.clone()).with_endpoint("http://127.0.0.1:1".to_string())
    }

    #[test]
    fn ids_are_an_owner_and_a_name_with_an_optional_revision() {
        let id: ModelId = "meta-llama/Llama-3.2-1B-Instruct".parse().unwrap();
        assert_eq!((id.name.as_str(), &id.revision), ("meta-llama/Llama-3.2-1B-Instruct", &None));
        let id: ModelId = "a_b/c.d@refs/pr/1".parse().unwrap();
        assert_eq!((id.name.as_str(), id.revision.as_deref()), ("a_b/c.d", Some("refs/pr/1")));
        assert_eq!(id.to_string(), "a_b/c.d@refs/pr/1");
        for bad in [
            "", "gpt2", "a/b/c", "/a", "a/", "../b", "a/..", "./models", "a b/c", "a/b@", "a/b@../x",
            "a/b@x//y",
        ] {
            assert!(
                matches!(bad.parse::<ModelId>(), Err(LlamaError::ModelId { model }) if model == bad),
                "{bad}"
            );
        }
    }

    #[test]
    fn a_directory_is_returned_and_a_mistyped_one_is_explained() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(resolve(dir.path().to_str().unwrap()).unwrap(), dir.path());
        let missing = dir.path().join("missing");
        let error = resolve(missing.to_str().unwrap()).unwrap_err().to_string();
        assert!(error.contains("missing") && error.contains("expected a directory"), "{error}");
    }

    #[test]
    fn only_the_configuration_tokenizer_and_safetensors_of_the_top_folder_are_wanted() {
        let files = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        let single =
            files(&["README.md", CONFIG_FILE, "model.safetensors", "original/model.safetensors", "a.pth"]);
        assert_eq!(wanted(&single), [CONFIG_FILE, "model.safetensors"]);
        let sharded = files(&[
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "model-x/../../y.safetensors",
            "tokenizer.json",
        ]);
        assert_eq!(wanted(&sharded).len(), 4);
        assert!(!wanted(&sharded).contains(&"model-x/../../y.safetensors"));
    }

    #[test]
    fn without_a_network_the_error_names_the_model_and_the_way_out() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path().to_path_buf());
        let id: ModelId = "owner/name".parse().unwrap();
        let error = fetch(&id, offline(&cache), &cache).unwrap_err();
        assert!(matches!(&error, LlamaError::Hub { model, .. } if model == "owner/name"), "{error}");
        assert!(error.to_string().contains("hint: is there a network?"), "{error}");
        assert!(hint("http status: 401").contains("HF_TOKEN"));
    }

    #[test]
    fn without_a_network_a_complete_cached_copy_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path().to_path_buf());
        let id: ModelId = "owner/name".parse().unwrap();
        let root = dir.path().join("models--owner--name");
        let snapshot = root.join("snapshots/abc");
        fs::create_dir_all(&snapshot).unwrap();
        cache.repo(Repo::model(id.name.clone())).create_ref("abc").unwrap();
        for file in [CONFIG_FILE, "tokenizer.json"] {
            fs::write(snapshot.join(file), "").unwrap();
        }
        assert!(fetch(&id, offline(&cache), &cache).is_err(), "the weights are missing");
        fs::write(snapshot.join(WEIGHTS_FILE), "").unwrap();
        assert_eq!(fetch(&id, offline(&cache), &cache).unwrap(), snapshot);
    }
}
