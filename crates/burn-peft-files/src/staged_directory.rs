//! A directory that appears when it is complete.

use std::fs::{self, File};
use std::io::{Error, Result};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::directory::{STAGED, sync_parent};

/// The ending of the file beside a staged directory that its writer keeps locked.
pub(crate) const LOCK: &str = "lock";

/// A directory on its way to its place. Unless it is [put](Self::put) there, it goes with this value.
///
/// Each one removes what others beside it left behind when they were killed.
///
/// ```
/// use burn_peft_files::StagedDirectory;
///
/// # fn main() -> std::io::Result<()> {
/// # let parent = tempfile::tempdir()?;
/// # let place = parent.path().join("merged");
/// let staged = StagedDirectory::beside(&place)?;
/// std::fs::write(staged.path().join("config.json"), "{}")?;
/// assert!(!place.exists());
/// staged.put()?;
/// assert!(place.join("config.json").exists());
/// # Ok(())
/// # }
/// ```
pub struct StagedDirectory {
    path: PathBuf,
    place: PathBuf,
    /// Locked while this value lives: that is how others know that its writer lives.
    _lock: NamedTempFile,
}

impl StagedDirectory {
    /// An empty directory that becomes `place`. The directory that `place` is in is made if there is none.
    ///
    /// # Errors
    /// No directory can be made beside `place`.
    pub fn beside(place: impl AsRef<Path>) -> Result<Self> {
        // A link to a directory, or `.`, stands for the directory itself, which can be replaced.
        let place = place.as_ref();
        let place = place.canonicalize().unwrap_or_else(|_| place.into());
        let parent = place.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(parent)?;
        let name = place.file_name().unwrap_or_default().to_string_lossy();
        remove_leftovers(parent);
        let suffix = format!("-{name}.{LOCK}");
        let lock = tempfile::Builder::new().prefix(STAGED).suffix(&suffix).tempfile_in(parent)?;
        // Where a file system has no locks, a leftover cannot be told from a live one, and stays.
        let _ = lock.as_file().try_lock();
        let path = lock.path().with_extension("");
        fs::create_dir(&path)?;
        Ok(Self { path, place, _lock: lock })
    }

    /// Where the directory is until it is put.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves the directory to its place, where there may be an empty one. What is in it must be on disk already.
    ///
    /// # Errors
    /// There is something at the place, or the directory cannot be moved; it is removed then.
    pub fn put(self) -> Result<()> {
        if self.place.is_dir() {
            // Fails unless it is empty.
            fs::remove_dir(&self.place)?;
        } else if self.place.exists() {
            return Err(Error::from(std::io::ErrorKind::AlreadyExists));
        }
        fs::rename(&self.path, &self.place)?;
        sync_parent(&self.place);
        Ok(())
    }

    /// As [`put`](Self::put), and what is at the place goes, with all that is in it.
    ///
    /// On Linux the two change places in one step, where the file system can: there is always one of them at the place.
    /// Elsewhere there is none for a moment.
    ///
    /// # Errors
    /// The directory cannot be moved; what was at the place stays there.
    pub fn replace(self) -> Result<()> {
        if !self.place.exists() {
            return self.put();
        }
        if exchange(&self.path, &self.place).is_err() {
            let old = self.path.with_extension("old");
            fs::rename(&self.place, &old)?;
            if let Err(error) = fs::rename(&self.path, &self.place) {
                fs::rename(&old, &self.place)?;
                return Err(error);
            }
            fs::rename(&old, &self.path)?;
        }
        sync_parent(&self.place);
        Ok(())
    }
}

#[cfg(target_os = "linux")]
fn exchange(one: &Path, other: &Path) -> Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    Ok(renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)?)
}

#[cfg(not(target_os = "linux"))]
fn exchange(_: &Path, _: &Path) -> Result<()> {
    Err(Error::from(std::io::ErrorKind::Unsupported))
}

impl Drop for StagedDirectory {
    fn drop(&mut self) {
        // Once it was put, there is nothing of that name.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Removes a directory with all that is in it, so that it is gone at once, whenever the process ends: nobody finds half of
/// it at its place.
///
/// # Errors
/// There is no such directory, or it cannot be moved.
pub fn remove_directory(directory: impl AsRef<Path>) -> Result<()> {
    let directory = directory.as_ref();
    let staged = StagedDirectory::beside(directory)?;
    fs::rename(directory, staged.path().join("removed"))?;
    sync_parent(directory);
    Ok(())
}

/// Removes staged directories whose writers are dead. That some cannot be removed is no reason not to write.
fn remove_leftovers(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    let is_staged =
        |name: &str| name.starts_with(STAGED) && Path::new(name).extension().is_some_and(|e| e == LOCK);
    for entry in entries.flatten() {
        let is_lock = entry.file_name().to_str().is_some_and(is_staged);
        if !is_lock {
            continue;
        }
        let lock = entry.path();
        if File::open(&lock).is_ok_and(|file| file.try_lock().is_ok()) {
            let _ = fs::remove_dir_all(lock.with_extension(""));
            let _ = fs::remove_file(lock);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_directory_appears_whole_or_not_at_all() {
        let parent = tempfile::tempdir().unwrap();
        let place = parent.path().join("deep/place");
        let staged = StagedDirectory::beside(&place).unwrap();
        fs::write(staged.path().join("file"), "1").unwrap();
        drop(staged);
        assert!(names(place.parent().unwrap()).is_empty());
        let staged = StagedDirectory::beside(&place).unwrap();
        fs::write(staged.path().join("file"), "2").unwrap();
        fs::create_dir(&place).unwrap();
        staged.put().unwrap();
        assert_eq!(names(place.parent().unwrap()), ["place"]);
        assert_eq!(names(&place), ["file"]);
        // What is there stays.
        let staged = StagedDirectory::beside(&place).unwrap();
        assert!(staged.put().is_err());
        assert_eq!(fs::read_to_string(place.join("file")).unwrap(), "2");
        assert_eq!(names(place.parent().unwrap()), ["place"]);
    }

    #[test]
    fn a_directory_takes_the_place_of_another() {
        let parent = tempfile::tempdir().unwrap();
        let place = parent.path().join("place");
        for content in ["1", "2", "3"] {
            let staged = StagedDirectory::beside(&place).unwrap();
            fs::write(staged.path().join(content), content).unwrap();
            staged.replace().unwrap();
            assert_eq!((names(&place), names(parent.path())), (vec![content.into()], vec!["place".into()]));
        }
    }

    #[test]
    fn a_directory_that_is_removed_is_gone_with_all_that_is_in_it() {
        let parent = tempfile::tempdir().unwrap();
        let place = parent.path().join("place");
        fs::create_dir_all(place.join("deep")).unwrap();
        fs::write(place.join("deep/file"), "1").unwrap();
        remove_directory(&place).unwrap();
        assert!(names(parent.path()).is_empty());
        assert!(remove_directory(&place).is_err());
        assert!(names(parent.path()).is_empty());
    }

    #[cfg(unix)]
    #[test]
    fn a_link_to_an_empty_directory_is_a_place() {
        let parent = tempfile::tempdir().unwrap();
        let (real, link) = (parent.path().join("real"), parent.path().join("link"));
        fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let staged = StagedDirectory::beside(&link).unwrap();
        fs::write(staged.path().join("file"), "1").unwrap();
        staged.put().unwrap();
        assert_eq!((names(&real), names(&link)), (vec!["file".to_string()], vec!["file".to_string()]));
        assert_eq!(names(parent.path()), ["link", "real"]);
    }

    #[test]
    fn what_a_dead_writer_left_is_removed_and_a_live_writers_directory_stays() {
        let parent = tempfile::tempdir().unwrap();
        let place = parent.path().join("place");
        let live = StagedDirectory::beside(&place).unwrap();
        let other_place = StagedDirectory::beside(parent.path().join("other")).unwrap();
        // As when the process is killed: the files stay, the lock ends.
        let dead = StagedDirectory::beside(&place).unwrap();
        fs::write(dead.path().join("large"), "1").unwrap();
        let dead_path = dead.path().with_extension("");
        let kept = parent.path().join("kept");
        fs::rename(dead.path(), &kept).unwrap();
        drop(dead);
        fs::rename(&kept, &dead_path).unwrap();
        fs::write(dead_path.with_extension(LOCK), "").unwrap();
        assert_eq!(names(parent.path()).len(), 6);
        StagedDirectory::beside(&place).unwrap().put().unwrap();
        assert!(live.path().exists() && other_place.path().exists() && !dead_path.exists());
        drop((live, other_place));
        assert_eq!(names(parent.path()), ["place"]);
    }
}
