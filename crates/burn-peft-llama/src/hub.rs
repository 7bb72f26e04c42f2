//! Models and adapters from the Hugging Face Hub.

mod cache;
mod client;
mod download;
mod kind;
mod problem;
#[cfg(test)]
mod server;
mod settings;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use hf_hub::{Repo, RepoType};

use self::cache::CachedRepo;
use self::client::Client;
use self::kind::Kind;
pub use self::problem::HubProblem;
use self::settings::Settings;
use crate::error::LlamaError;

/// The Hub, if `HF_ENDPOINT` names no other.
const HUB: &str = "https://huggingface.co";
const MAIN: &str = "main";

/// The name of a model or an adapter on the Hub: `owner/name`, or `owner/name@revision` for a branch, tag or commit.
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

impl ModelId {
    fn revision_or_main(&self) -> &str {
        self.revision.as_deref().unwrap_or(MAIN)
    }

    /// Whether it names a commit, which never changes, by all digits of its hash.
    fn is_commit(&self) -> bool {
        self.revision_or_main().len() == 40 && self.revision_or_main().bytes().all(|c| c.is_ascii_hexdigit())
    }

    fn repo(&self) -> Repo {
        Repo::with_revision(self.name.clone(), RepoType::Model, self.revision_or_main().to_string())
    }
}

/// Whether a text may become the name of a file or folder of the cache: nothing that leads out of it.
fn is_name(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !text.is_empty() && !text.starts_with('.') && !text.contains("..") && text.chars().all(allowed)
}

impl FromStr for ModelId {
    type Err = LlamaError;

    fn from_str(text: &str) -> Result<Self, LlamaError> {
        let (name, revision) = match text.split_once('@') {
            Some((name, revision)) => (name, Some(revision)),
            None => (text, None),
        };
        let valid_name = name.split_once('/').is_some_and(|(owner, name)| is_name(owner) && is_name(name));
        let valid_revision = revision.is_none_or(|revision| revision.split('/').all(is_name));
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

/// How far a fetch from the Hub is.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FetchProgress<'a> {
    /// The file that is being fetched.
    pub file: &'a str,
    /// Bytes that are there, of all files that were not there before the call.
    pub done: u64,
    /// Bytes of these files.
    pub total: u64,
}

/// The directory of a model that is given by a directory or by its [`ModelId`] on the Hub.
///
/// An existing directory is returned as it is. Otherwise the configuration, tokenizer, chat template and safetensors
/// weights are fetched into the cache that all Hugging Face tools share, all from one commit. What is there already is
/// not fetched again, and a transfer that broke off is gone on from, with lengths and the checksums of large files
/// verified. `progress` is told how far it is; it is not called if nothing has to be fetched.
///
/// If the Hub cannot be reached, a complete copy in the cache will do. For a commit with all of its 40 digits, such a
/// copy needs no request.
///
/// These environment variables mean what they mean to Python's huggingface_hub:
///
/// | | |
/// |---|---|
/// | `HF_TOKEN`, else the file `HF_TOKEN_PATH`, else `token` in `HF_HOME` | the token, which is sent to the Hub and to no other server |
/// | `HF_ENDPOINT` | address of the Hub, `https://huggingface.co` by default |
/// | `HF_HUB_CACHE`, else `hub` in `HF_HOME`; `HF_HOME` is `~/.cache/huggingface` by default | the cache |
/// | `HF_HUB_OFFLINE` = `1`, `on`, `yes` or `true` | no request is made: only the cache is looked at |
///
/// ```no_run
/// use burn_peft_llama::{FetchProgress, resolve};
///
/// # fn main() -> Result<(), burn_peft_llama::LlamaError> {
/// let show = |at: FetchProgress| eprint!("\r{}: {} of {} bytes ", at.file, at.done, at.total);
/// let directory = resolve("HuggingFaceTB/SmolLM2-135M-Instruct", show)?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// - [`LlamaError::ModelId`] if `model` is neither a directory nor an id,
/// - [`LlamaError::Hub`] if it cannot be fetched, or is no model with safetensors weights; its hint says what to type.
pub fn resolve(model: &str, progress: impl FnMut(FetchProgress)) -> Result<PathBuf, LlamaError> {
    resolve_as(Kind::Model, model, progress)
}

/// The directory of an adapter in PEFT's format that is given by a directory or by its [`ModelId`] on the Hub.
///
/// It is [`resolve`] for adapters: `adapter_config.json` and `adapter_model.safetensors` are fetched.
///
/// # Errors
/// - [`LlamaError::ModelId`] if `adapter` is neither a directory nor an id,
/// - [`LlamaError::Hub`] if it cannot be fetched, or is no adapter in PEFT's format; its hint says what to type.
pub fn resolve_adapter(adapter: &str, progress: impl FnMut(FetchProgress)) -> Result<PathBuf, LlamaError> {
    resolve_as(Kind::Adapter, adapter, progress)
}

fn resolve_as(
    kind: Kind,
    name: &str,
    mut progress: impl FnMut(FetchProgress),
) -> Result<PathBuf, LlamaError> {
    if Path::new(name).is_dir() {
        return Ok(PathBuf::from(name));
    }
    let id: ModelId = name.parse()?;
    let settings = Settings::from_env().map_err(|problem| hub_error(&id, None, None, problem))?;
    fetch(kind, &id, &settings, &mut progress)
}

fn hub_error(
    id: &ModelId,
    settings: Option<&Settings>,
    file: Option<&str>,
    source: HubProblem,
) -> LlamaError {
    let hint = source.hint(id, settings);
    LlamaError::Hub { model: id.to_string(), file: file.map(str::to_string), hint, source: source.into() }
}

fn fetch(
    kind: Kind,
    id: &ModelId,
    settings: &Settings,
    progress: &mut dyn FnMut(FetchProgress),
) -> Result<PathBuf, LlamaError> {
    let failed = |file: Option<&str>, problem| hub_error(id, Some(settings), file, problem);
    let cached = CachedRepo::new(&settings.cache, id);
    let copy = cached.find(kind);
    if let Some(variable) = settings.offline {
        let cache = settings.cache.clone();
        return copy.map_err(|missing| failed(None, HubProblem::Offline { variable, cache, missing }));
    }
    if let (true, Ok(directory)) = (id.is_commit(), &copy) {
        return Ok(directory.clone());
    }

    let client = Client::new(settings);
    let info = match client.info(&id.repo()) {
        Ok(info) => info,
        Err(problem) => {
            let passing = copy.ok().filter(|_| problem.is_passing());
            return passing.ok_or_else(|| failed(None, problem));
        }
    };
    let commit = &info.sha;
    let directory = cached.snapshot(commit);
    let found: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
    kind.check(&found).map_err(|problem| failed(None, problem))?;

    // By its commit, so that a change on the Hub in between cannot mix two versions.
    let repo = ModelId { name: id.name.clone(), revision: Some(commit.clone()) }.repo();
    let mut files = vec![];
    for file in kind.wanted(&found).into_iter().filter(|file| !directory.join(file).exists()) {
        let metadata = client.metadata(&repo, file).map_err(|problem| failed(Some(file), problem))?;
        files.push((file, metadata));
    }
    let total = files.iter().fold(0_u64, |total, (_, metadata)| total.saturating_add(metadata.size));
    let mut before = 0_u64;
    for (file, metadata) in &files {
        let failed = |problem| failed(Some(file), problem);
        let mut report =
            |done: u64| progress(FetchProgress { file, done: before.saturating_add(done), total });
        let (etag, partial) = (&metadata.etag, cached.partial(&metadata.etag));
        let length_of = |path: &Path| fs::metadata(path).map_or(0, |found| found.len());
        // Another program that fetches it writes there.
        let _lock = cached.lock(etag, || report(length_of(&partial))).map_err(failed)?;
        let blob = cached.blob(etag);
        if !blob.is_file() || length_of(&blob) != metadata.size {
            let of = (&repo, *file, metadata);
            download::download(&client, settings, of, (&partial, &blob), &mut report).map_err(failed)?;
        }
        cached.link(etag, commit, file).map_err(failed)?;
        before = before.saturating_add(metadata.size);
    }
    if let Some(missing) = kind.missing_weights(&directory) {
        let (what, hint) = if found.contains(&missing) {
            (
                format!("its index of weights names `{missing}`, which is not called `model-*.safetensors`"),
                "fetch all of its files with `hf download owner/name`, then type the same command again",
            )
        } else {
            (
                format!("its index of weights names `{missing}`, which it does not have"),
                "the repository is damaged: try another revision, `owner/name@revision`",
            )
        };
        return Err(failed(None, HubProblem::Unusable { what, hint }));
    }
    cached.remember(commit).map_err(|problem| failed(None, problem))?;
    Ok(directory)
}
