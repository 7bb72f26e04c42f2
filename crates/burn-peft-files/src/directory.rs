//! Files of one directory that belong together.

use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind, Read, Result, Write};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, SystemTime};

use tempfile::NamedTempFile;

use crate::lock::DirectoryLock;
use crate::staged_directory::LOCK;

/// What the names of files begin with that are being written: `.staged-a1b2c3-NAME`, with the ending of `NAME`.
pub(crate) const STAGED: &str = ".staged-";

/// The right to write to a directory. Only one program has it at a time, while this value lives.
///
/// Others who write through this type, or read through [`read_together`], wait. Programs that do neither see each file
/// whole; which of the files they see together is up to the order in which they are [put](StagedFile::put).
///
/// ```
/// use burn_peft_files::DirectoryWriter;
///
/// # fn main() -> std::io::Result<()> {
/// # let parent = tempfile::tempdir()?;
/// # let directory = parent.path().join("new");
/// let writer = DirectoryWriter::open(&directory)?;
/// let file = writer.stage_bytes("config.json", "{}")?;
/// assert!(!directory.join("config.json").exists());
/// file.put()?;
/// assert!(directory.join("config.json").exists());
/// # Ok(())
/// # }
/// ```
pub struct DirectoryWriter {
    directory: PathBuf,
    _lock: DirectoryLock,
}

impl DirectoryWriter {
    /// Makes the directory if there is none, waits for its other readers and writers, and removes the files that
    /// writers left there which were killed.
    ///
    /// # Errors
    /// The directory cannot be made or opened; another program has kept it locked for a minute.
    pub fn open(directory: impl AsRef<Path>) -> Result<Self> {
        let directory = here_if_empty(directory.as_ref());
        fs::create_dir_all(directory)?;
        let lock = DirectoryLock::exclusive(directory)?;
        // Files are staged under the lock alone, so who holds it knows that their writers are dead.
        if lock.is_held() {
            remove_leftovers(directory);
        }
        Ok(Self { directory: directory.into(), _lock: lock })
    }

    /// A file that becomes `name` when it is [put](StagedFile::put), and is removed if it is not.
    ///
    /// # Errors
    /// No file can be made in the directory.
    pub fn stage(&self, name: &str) -> Result<StagedFile> {
        let suffix = format!("-{name}");
        let mut builder = tempfile::Builder::new();
        builder.prefix(STAGED).suffix(&suffix);
        // Temporary files are private to their owner; what this one becomes should follow the umask like any other.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let file = builder.tempfile_in(&self.directory)?;
        Ok(StagedFile { file, path: self.directory.join(name) })
    }

    /// A [staged](Self::stage) file of these bytes.
    ///
    /// # Errors
    /// No file can be made in the directory, or it cannot be written.
    pub fn stage_bytes(&self, name: &str, bytes: impl AsRef<[u8]>) -> Result<StagedFile> {
        let mut file = self.stage(name)?;
        file.write_all(bytes.as_ref())?;
        Ok(file)
    }

    /// Removes the file `name`, if there is one.
    ///
    /// # Errors
    /// There is one, and it cannot be removed.
    pub fn remove(&self, name: &str) -> Result<()> {
        match fs::remove_file(self.directory.join(name)) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// The directory; of a path such as `Path::new("file").parent()` gives, the current one.
fn here_if_empty(directory: &Path) -> &Path {
    if directory.as_os_str().is_empty() { Path::new(".") } else { directory }
}

/// A time without writers: what is opened while this value lives belongs together.
///
/// For files that are too large for [`read_together`]. A file that is open stays what it was, whatever a
/// [`DirectoryWriter`] puts in its place later, so it is enough to open them all. Programs that write in another way are
/// not noticed.
pub struct DirectoryReader {
    _lock: DirectoryLock,
}

impl DirectoryReader {
    /// Waits for the directory's writers. There need not be a directory.
    ///
    /// # Errors
    /// A writer has kept the directory locked for a minute.
    pub fn open(directory: impl AsRef<Path>) -> Result<Self> {
        Ok(Self { _lock: DirectoryLock::shared(here_if_empty(directory.as_ref()))? })
    }
}

/// A file on its way to its place in a directory.
pub struct StagedFile {
    file: NamedTempFile,
    path: PathBuf,
}

impl StagedFile {
    /// Where the file is until it is put, for writers that want a path. It has the ending of its name.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Flushes the file to disk and moves it to its place: a reader sees the old one, or all of this one.
    ///
    /// # Errors
    /// The file cannot be flushed or moved; it is removed then.
    pub fn put(self) -> Result<()> {
        self.file.as_file().sync_all()?;
        self.file.persist(&self.path).map_err(|error| error.error)?;
        sync_parent(&self.path);
        Ok(())
    }
}

/// Flushes the directory that `path` is in: only then is the move to `path` safe from a power failure. Not everywhere can
/// a directory be opened, and without it a reader still sees all or nothing.
pub(crate) fn sync_parent(path: &Path) {
    #[cfg(unix)]
    if let Some(directory) = path.parent() {
        let _ = File::open(directory).and_then(|directory| directory.sync_all());
    }
    #[cfg(not(unix))]
    let _ = path;
}

impl Write for StagedFile {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> Result<()> {
        self.file.flush()
    }
}

/// The contents of several files of a directory, as they were at one moment. Each can be absent or unreadable by itself.
///
/// Waits for a [`DirectoryWriter`] to finish. Other writers are noticed by the times of the files: they are
/// read again until they stayed as they were meanwhile.
///
/// # Errors
/// A writer has kept the directory locked for a minute, or the files change faster than they can be read.
pub fn read_together<const N: usize>(
    directory: impl AsRef<Path>,
    names: [&str; N],
) -> Result<[Result<Vec<u8>>; N]> {
    const TRIES: usize = 200;
    let directory = here_if_empty(directory.as_ref());
    for _ in 0..TRIES {
        let lock = DirectoryLock::shared(directory)?;
        let before = names.map(|name| Stamp::of(&directory.join(name)));
        let contents = names.map(|name| read(&directory.join(name)));
        let after = names.map(|name| Stamp::of(&directory.join(name)));
        drop(lock);
        if before == after {
            return Ok(contents);
        }
        sleep(Duration::from_millis(5));
    }
    let message = format!("files in `{}` are being changed without pause", directory.display());
    Err(io::Error::new(ErrorKind::TimedOut, message))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = vec![];
    File::open(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// What tells one file from another that takes its place.
#[derive(Debug, PartialEq)]
struct Stamp(Option<(u64, u64, Option<SystemTime>)>);

impl Stamp {
    fn of(path: &Path) -> Self {
        Self(
            fs::metadata(path)
                .ok()
                .map(|metadata| (inode(&metadata), metadata.len(), metadata.modified().ok())),
        )
    }
}

#[cfg(unix)]
fn inode(metadata: &Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(metadata)
}

#[cfg(not(unix))]
fn inode(_metadata: &Metadata) -> u64 {
    0
}

/// Removes staged files. That some cannot be removed is no reason not to write.
fn remove_leftovers(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let is_staged = entry.file_name().to_str().is_some_and(|name| name.starts_with(STAGED));
        // Directories are staged otherwise.
        if is_staged && entry.path().is_file() && entry.path().extension().is_none_or(|end| end != LOCK) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn write(directory: &Path, value: u8) {
        let writer = DirectoryWriter::open(directory).unwrap();
        for name in ["a", "b"] {
            let mut file = writer.stage(name).unwrap();
            file.write_all(&[value; 5000]).unwrap();
            file.put().unwrap();
        }
    }

    #[test]
    fn no_directory_means_the_current_one() {
        let writer = DirectoryWriter::open("").unwrap();
        drop(writer.stage("no-such-file-stays").unwrap());
        // This process would wait for itself.
        drop(writer);
        let [manifest] = read_together("", ["Cargo.toml"]).unwrap();
        assert!(!manifest.unwrap().is_empty());
    }

    #[test]
    fn what_is_not_put_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let writer = DirectoryWriter::open(directory.path()).unwrap();
        let mut file = writer.stage("a").unwrap();
        file.write_all(b"half").unwrap();
        assert_eq!(names(directory.path()).len(), 1);
        drop(file);
        assert!(names(directory.path()).is_empty());
        writer.remove("a").unwrap();
    }

    #[test]
    fn what_a_dead_writer_left_is_removed_and_other_files_stay() {
        let directory = tempfile::tempdir().unwrap();
        let writer = DirectoryWriter::open(directory.path()).unwrap();
        // As when the process is killed: the file stays, the lock ends.
        let (_, left) = writer.stage("a").unwrap().file.keep().unwrap();
        drop(writer);
        fs::write(directory.path().join(".hidden"), "").unwrap();
        fs::write(directory.path().join("x.staged-a"), "").unwrap();
        assert!(left.exists());
        write(directory.path(), 1);
        assert_eq!(names(directory.path()), [".hidden", "a", "b", "x.staged-a"]);
    }

    #[test]
    fn a_live_writers_file_is_no_leftover() {
        let directory = tempfile::tempdir().unwrap();
        let writer = DirectoryWriter::open(directory.path()).unwrap();
        let mut staged = writer.stage("a").unwrap();
        std::thread::scope(|scope| {
            let other = scope.spawn(|| write(directory.path(), 2));
            sleep(Duration::from_millis(100));
            assert!(!other.is_finished());
            staged.write_all(&[1; 5000]).unwrap();
            staged.put().unwrap();
            drop(writer);
        });
        assert_eq!(names(directory.path()), ["a", "b"]);
        assert_eq!(fs::read(directory.path().join("a")).unwrap(), [2; 5000]);
    }

    #[test]
    fn two_writers_and_a_reader_never_meet_in_the_middle() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), 0);
        let done = AtomicBool::new(false);
        let mut seen = [0; 3];
        std::thread::scope(|scope| {
            for value in [1, 2] {
                let (directory, done) = (directory.path(), &done);
                scope.spawn(move || {
                    while !done.load(Ordering::Relaxed) {
                        write(directory, value);
                        sleep(Duration::from_millis(1));
                    }
                });
            }
            let start = std::time::Instant::now();
            // As long as a busy disk may take.
            let end = |seen: [u32; 3]| Duration::from_secs(if seen[1] > 0 && seen[2] > 0 { 1 } else { 60 });
            while start.elapsed() < end(seen) {
                let [a, b] = read_together(directory.path(), ["a", "b"]).unwrap().map(Result::unwrap);
                assert!(a == b && a.len() == 5000);
                seen[a[0] as usize] += 1;
            }
            done.store(true, Ordering::Relaxed);
        });
        assert!(seen[1] > 0 && seen[2] > 0, "{seen:?}");
        assert_eq!(names(directory.path()), ["a", "b"]);
    }

    #[test]
    fn a_reader_keeps_writers_out_and_other_readers_not() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), 1);
        let reader = DirectoryReader::open(directory.path()).unwrap();
        let _other = DirectoryReader::open(directory.path()).unwrap();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| write(directory.path(), 2));
            sleep(Duration::from_millis(100));
            assert!(!writer.is_finished());
            let mut open = File::open(directory.path().join("a")).unwrap();
            drop((reader, _other));
            writer.join().unwrap();
            let mut bytes = Vec::new();
            open.read_to_end(&mut bytes).unwrap();
            assert_eq!(bytes, [1; 5000]);
        });
        DirectoryReader::open(directory.path().join("none")).unwrap();
    }

    #[test]
    fn a_writer_that_takes_no_lock_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        fs::write(&path, "one").unwrap();
        let before = Stamp::of(&path);
        assert_eq!(before, Stamp::of(&path));
        fs::write(&path, "other").unwrap();
        assert_ne!(before, Stamp::of(&path));
        fs::remove_file(&path).unwrap();
        assert_eq!(Stamp::of(&path), Stamp(None));
    }

    #[test]
    fn files_may_be_absent_and_so_may_the_directory() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("a"), "x").unwrap();
        let [a, b] = read_together(directory.path(), ["a", "b"]).unwrap();
        assert_eq!(a.unwrap(), b"x");
        assert_eq!(b.unwrap_err().kind(), ErrorKind::NotFound);
        let [a] = read_together(directory.path().join("none"), ["a"]).unwrap();
        assert_eq!(a.unwrap_err().kind(), ErrorKind::NotFound);
    }
}
