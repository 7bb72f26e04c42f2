//! A repository in the cache that all Hugging Face tools share: blobs by their etag, and for each commit a folder of
//! links to them under the names of the files.
//!
//! hf-hub knows the names of folders and files.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use hf_hub::{Cache, CacheRepo, Repo};

use super::kind::Kind;
use super::problem::HubProblem;
use super::{ModelId, is_name};

/// How long to wait between two looks at a lock.
const PAUSE: Duration = Duration::from_millis(100);

/// The folders of one repository.
pub(super) struct CachedRepo {
    root: PathBuf,
    folder: String,
    repo: CacheRepo,
    revision: String,
}

/// Keeps other programs from fetching the same file while it lives. `None` where the file system has no locks.
pub(super) struct Lock {
    _file: Option<File>,
}

impl CachedRepo {
    pub(super) fn new(root: &Path, id: &ModelId) -> Self {
        let repo: Repo = id.repo();
        Self {
            root: root.to_path_buf(),
            folder: repo.folder_name(),
            revision: id.revision_or_main().to_string(),
            repo: Cache::new(root.to_path_buf()).repo(repo),
        }
    }

    /// The directory with the files of a commit.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.repo.pointer_path(commit)
    }

    /// The content of the file with this etag.
    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.repo.blob_path(etag)
    }

    /// What has arrived of it.
    pub(super) fn partial(&self, etag: &str) -> PathBuf {
        self.repo.blob_path(&format!("{etag}.incomplete"))
    }

    /// The directory of a complete copy of the revision, or the name of the first file that is missing.
    pub(super) fn find(&self, kind: Kind) -> Result<PathBuf, String> {
        // A commit has no reference.
        let commit = self.remembered().unwrap_or_else(|| self.revision.clone());
        let directory = self.snapshot(&commit);
        match kind.missing(&directory) {
            Some(missing) => Err(missing),
            None => Ok(directory),
        }
    }

    /// The commit that the revision was when it was last fetched.
    fn remembered(&self) -> Option<String> {
        let path = self.root.join(&self.folder).join("refs").join(&self.revision);
        fs::read_to_string(path).ok().map(|commit| commit.trim().to_string()).filter(|commit| is_name(commit))
    }

    /// Remembers which commit the revision is, for the time without a network.
    pub(super) fn remember(&self, commit: &str) -> Result<(), HubProblem> {
        if self.revision == commit || self.remembered().as_deref() == Some(commit) {
            return Ok(());
        }
        let path = || self.root.join(&self.folder).join("refs");
        self.repo.create_ref(commit).map_err(|source| HubProblem::Cache { path: path(), source })
    }

    /// Makes the blob the file `name` of a commit.
    pub(super) fn link(&self, etag: &str, commit: &str, name: &str) -> Result<(), HubProblem> {
        self.link_by(symlink, etag, commit, name)
    }

    /// The same, where `make_link` makes a symbolic link with this target in this place. If it cannot, the file is a
    /// copy.
    pub(super) fn link_by(
        &self,
        make_link: impl FnOnce(&Path, &Path) -> io::Result<()>,
        etag: &str,
        commit: &str,
        name: &str,
    ) -> Result<(), HubProblem> {
        let (blob, pointer) = (self.blob(etag), self.snapshot(commit).join(name));
        let link = || {
            if pointer.exists() {
                return Ok(());
            }
            self.make_folders(&pointer)?;
            // A link that leads nowhere.
            if fs::symlink_metadata(&pointer).is_ok() {
                fs::remove_file(&pointer)?;
            }
            // Relative, so that the cache can be moved.
            let target = Path::new("../../blobs").join(etag);
            match make_link(&target, &pointer) {
                // Another program was faster. A copy onto its link would empty the blob.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                // Not every file system has links.
                Err(_) => copy(&blob, &pointer),
                Ok(()) => Ok(()),
            }
        };
        link().map_err(|source| HubProblem::Cache { path: pointer.clone(), source })
    }

    fn make_folders(&self, file: &Path) -> io::Result<()> {
        file.parent().map_or(Ok(()), fs::create_dir_all)
    }

    /// Waits until no other program fetches the file with this etag; `waiting` is called from time to time. The lock
    /// is that of Python's huggingface_hub.
    pub(super) fn lock(&self, etag: &str, mut waiting: impl FnMut()) -> Result<Lock, HubProblem> {
        let path = self.root.join(".locks").join(&self.folder).join(format!("{etag}.lock"));
        let failed = |source| HubProblem::Cache { path: path.clone(), source };
        self.make_folders(&path).map_err(failed)?;
        self.make_folders(&self.blob(etag)).map_err(failed)?;
        let open = File::options().write(true).create(true).truncate(false).open(&path);
        let file = open.map_err(failed)?;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Lock { _file: Some(file) }),
                Err(TryLockError::WouldBlock) => {
                    waiting();
                    sleep(PAUSE);
                }
                // Some network file systems have no locks.
                Err(TryLockError::Error(_)) => return Ok(Lock { _file: None }),
            }
        }
    }
}

/// Copies a file under another name first, so that an interrupted copy is not taken for the file.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let mut partial = to.as_os_str().to_os_string();
    partial.push(".incomplete");
    let partial = PathBuf::from(partial);
    let write = || {
        let mut file = File::create(&partial)?;
        io::copy(&mut File::open(from)?, &mut file)?;
        file.sync_all()
    };
    let copied = write().and_then(|()| fs::rename(&partial, to));
    if copied.is_err() {
        // The first error counts.
        let _ = fs::remove_file(&partial);
    }
    copied
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(windows)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target, link)
}

#[cfg(not(any(unix, windows)))]
fn symlink(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
