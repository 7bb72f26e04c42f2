//! Why the Hub did not give out what was asked for, and what to type then.

use std::error::Error;
use std::path::PathBuf;

use super::settings::{Settings, without_user};
use super::{HUB, ModelId};

/// Why something could not be fetched from the Hugging Face Hub.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum HubProblem {
    /// No place for the cache is known.
    #[error("there is no home directory for the cache")]
    NoCacheFolder,

    /// Requests are forbidden, and the cache does not have everything.
    #[error("`{variable}` is set, and the cache `{}` has no `{missing}` of it", .cache.display())]
    Offline {
        /// The environment variable.
        variable: &'static str,
        /// The folder of the cache.
        cache: PathBuf,
        /// The first file that is missing.
        missing: String,
    },

    /// The server did not answer.
    #[error("`{host}` cannot be reached")]
    Unreachable {
        /// The server.
        host: String,
        /// What the client said.
        source: Box<dyn Error + Send + Sync>,
    },

    /// The licence must be accepted first, or the account has no access (statuses 401 and 403).
    #[error("it is gated: only accounts that were given access may read it (status {status})")]
    Gated {
        /// The status of the answer.
        status: u16,
    },

    /// The server does not know the token (status 401).
    #[error("the server does not accept the token (status 401)")]
    InvalidToken,

    /// There is no such repository, or it is private (statuses 401 and 404).
    #[error("there is no such repository, or it is private (status {status})")]
    NoRepository {
        /// The status of the answer.
        status: u16,
    },

    /// The repository has no such branch, tag or commit (status 404).
    #[error("it has no such revision (status 404)")]
    NoRevision,

    /// The repository has no such file (status 404).
    #[error("it has no such file (status {status})")]
    NoFile {
        /// The status of the answer.
        status: u16,
    },

    /// The repository has no files of a kind that can be used.
    #[error("{what}")]
    Unusable {
        /// What it has.
        what: String,
        /// What to do.
        hint: &'static str,
    },

    /// The server answers with another status.
    #[error("`{host}` answers with status {status}{}", .message.as_ref().map_or(String::new(), |told| format!(": {told}")))]
    Status {
        /// The server.
        host: String,
        /// The status.
        status: u16,
        /// What it says.
        message: Option<String>,
    },

    /// The answer is not that of a Hub.
    #[error("the answer of `{host}` {what}")]
    Answer {
        /// The server.
        host: String,
        /// What is wrong with it.
        what: String,
    },

    /// The transfer broke off; what arrived is kept.
    #[error("the transfer broke off after {done} of {size} bytes")]
    BrokenOff {
        /// Bytes that are there.
        done: u64,
        /// Bytes of the file.
        size: u64,
        /// What the client said.
        source: Box<dyn Error + Send + Sync>,
    },

    /// The file has another length than the server said; it was removed.
    #[error("expected {expected} bytes, found {found}; nothing of it was kept")]
    Length {
        /// Bytes that the server said.
        expected: u64,
        /// Bytes that it would send or sent.
        found: u64,
    },

    /// The file has another content than the server said; it was removed.
    #[error("expected the checksum (SHA-256) {expected}, found {found}; the file was removed")]
    Checksum {
        /// The checksum that the server said.
        expected: String,
        /// The checksum of what arrived.
        found: String,
    },

    /// The cache cannot be read or written.
    #[error("cannot write `{}` in the cache", .path.display())]
    Cache {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
}

impl HubProblem {
    /// Whether it may be over when the same is tried again.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::BrokenOff { .. } => true,
            Self::Status { status, .. } => *status == 429 || *status >= 500,
            _ => false,
        }
    }

    /// What to type or do.
    pub(super) fn hint(&self, id: &ModelId, settings: Option<&Settings>) -> String {
        let endpoint = settings.map_or(String::new(), |settings| without_user(&settings.endpoint));
        let token = settings.and_then(|settings| settings.token.as_ref());
        let page = format!("{endpoint}/{}", id.name);
        let log_in = format!(
            "`export HF_TOKEN=hf_...` with a token from {endpoint}/settings/tokens, or `hf auth login`"
        );
        let download = match &id.revision {
            Some(revision) => format!("`hf download {} --revision {revision}`", id.name),
            None => format!("`hf download {}`", id.name),
        };
        match self {
            Self::NoCacheFolder => "name a folder for it: `export HF_HOME=/a/folder`".to_string(),
            Self::Offline { variable, .. } => {
                format!("`unset {variable}` and type the same command again, or fetch it first: {download}")
            }
            Self::Unreachable { .. } => format!(
                "is there a network, and is {endpoint} the Hub that you mean (`HF_ENDPOINT`)? Without a network, give a \
                 directory, or fetch it where there is one, with {download}, and copy the cache"
            ),
            Self::Gated { .. } => match token {
                Some(token) => format!(
                    "ask for access, or accept the licence, at {page} with the account of the token from {}; the token \
                     must be allowed to read gated repositories",
                    token.origin
                ),
                None => format!("accept the licence at {page}, then {log_in}"),
            },
            Self::InvalidToken => {
                let origin = token.map_or("the environment", |token| &token.origin);
                format!("the token comes from {origin}; replace it: {log_in}")
            }
            Self::NoRepository { .. } => match token {
                Some(token) => format!(
                    "is the name spelled as at {page}? If it is private, the account of the token from {} must have \
                     access",
                    token.origin
                ),
                None => format!("is the name spelled as at {page}? If it is private: {log_in}"),
            },
            Self::NoRevision => {
                format!(
                    "behind the `@` stands a branch, a tag or a commit of {page}; leave it out for `main`"
                )
            }
            Self::NoFile { .. } => format!("the files are listed at {page}/tree/{}", id.revision_or_main()),
            Self::Unusable { hint, .. } => hint.to_string(),
            Self::Status { .. } => "type the same command again later; what was fetched is kept".to_string(),
            Self::Answer { .. } if endpoint == HUB => "type the same command again later".to_string(),
            Self::Answer { .. } => {
                format!("is {endpoint} the address of a Hub? `unset HF_ENDPOINT` takes {HUB}")
            }
            Self::BrokenOff { .. } => "type the same command again: it goes on from there".to_string(),
            Self::Length { .. } | Self::Checksum { .. } => {
                "type the same command again: it fetches the file anew".to_string()
            }
            Self::Cache { .. } => {
                "is the disk full, or the folder not yours? Choose another one: `export HF_HUB_CACHE=/a/folder`"
                    .to_string()
            }
        }
    }
}
