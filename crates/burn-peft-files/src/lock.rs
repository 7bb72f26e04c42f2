//! A lock on a directory, held by the operating system: it ends with the process, however that ends.

use std::fs::{File, TryLockError};
use std::io::{Error, ErrorKind, Result};
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long to wait for others: far longer than any of them takes, unless it was stopped.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long to wait between two tries: short enough to get in between two calls of a program that writes in a loop.
const PAUSE: Duration = Duration::from_micros(100);

/// A lock that is held while this value lives. It is advisory: programs that do not ask for it are not kept out.
pub(crate) struct DirectoryLock {
    /// Dropped, the file is closed, which ends the lock. `None` where the file system has no locks.
    file: Option<File>,
}

impl DirectoryLock {
    /// Waits until no program writes to `directory`.
    pub(crate) fn shared(directory: &Path) -> Result<Self> {
        // A program may be allowed to read a directory and not to create a file in it.
        let Ok(file) = File::open(lock_path(directory)) else { return Ok(Self { file: None }) };
        Self::wait(directory, file, File::try_lock_shared)
    }

    /// Waits until no program reads from or writes to `directory`.
    pub(crate) fn exclusive(directory: &Path) -> Result<Self> {
        #[cfg(unix)]
        let file = File::open(lock_path(directory))?;
        #[cfg(not(unix))]
        let file = File::create(lock_path(directory))?;
        Self::wait(directory, file, File::try_lock)
    }

    pub(crate) fn is_held(&self) -> bool {
        self.file.is_some()
    }

    fn wait(
        directory: &Path,
        file: File,
        lock: impl Fn(&File) -> std::result::Result<(), TryLockError>,
    ) -> Result<Self> {
        let start = Instant::now();
        loop {
            match lock(&file) {
                Ok(()) => return Ok(Self { file: Some(file) }),
                Err(TryLockError::WouldBlock) if start.elapsed() < PATIENCE => sleep(PAUSE),
                Err(TryLockError::WouldBlock) => {
                    let seconds = PATIENCE.as_secs();
                    let message = format!(
                        "another program has kept `{}` locked for {seconds} s: stop it, or wait until it is done",
                        directory.display()
                    );
                    return Err(Error::new(ErrorKind::TimedOut, message));
                }
                // Some network file systems have no locks.
                Err(TryLockError::Error(_)) => return Ok(Self { file: None }),
            }
        }
    }
}

/// What is locked: the directory itself, so that no further file is needed. Only Unix can open one.
#[cfg(unix)]
fn lock_path(directory: &Path) -> &Path {
    directory
}

#[cfg(not(unix))]
fn lock_path(directory: &Path) -> std::path::PathBuf {
    directory.join(".burn-peft.lock")
}
