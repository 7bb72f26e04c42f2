//! Files that appear whole or not at all, whenever the program or the machine stops.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use burn_peft_files::DirectoryWriter;

/// Makes a directory for output, and finds out whether files can be made in it.
pub fn make_directory(dir: &Path) -> Result<()> {
    let problem = |what: &str| {
        format!("`{}` cannot be {what}\nhint: choose another directory with `--out`", dir.display())
    };
    fs::create_dir_all(dir).with_context(|| problem("made"))?;
    tempfile::tempfile_in(dir).with_context(|| problem("written to"))?;
    Ok(())
}

/// Writes a file with these bytes.
pub fn write(path: &Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    replace(path, |temporary| Ok(fs::write(temporary, bytes)?))
}

/// Removes a file, if there is one.
pub fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("`{}` cannot be removed", path.display()))
        }
        _ => Ok(()),
    }
}

/// Lets `fill` write an empty file beside `path` with the same ending, and then puts it in the place of `path`.
pub fn replace(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let whole = || -> Result<()> {
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let writer = DirectoryWriter::open(directory.unwrap_or(Path::new(".")))?;
        let name = path.file_name().context("the path has no file name")?;
        let file = writer.stage(&name.to_string_lossy())?;
        fill(file.path())?;
        file.put()?;
        Ok(())
    };
    whole().with_context(|| format!("`{}` cannot be written", path.display()))
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn a_file_is_replaced_and_nothing_else_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report.md");
        write(&path, "one, longer").unwrap();
        write(&path, "two").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_fails_halfway_leaves_the_file_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plot.png");
        write(&path, "before").unwrap();
        let result = replace(&path, |temporary| {
            assert_eq!((temporary.parent(), temporary.extension()), (path.parent(), path.extension()));
            fs::write(temporary, "half of")?;
            assert_eq!(fs::read_to_string(&path)?, "before");
            bail!("the disk is full")
        });
        let text = format!("{:#}", result.unwrap_err());
        assert!(text.contains("plot.png` cannot be written: the disk is full"), "{text}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "before");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    #[cfg(unix)]
    fn permissions_are_those_of_any_new_file() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (ours, plain) = (dir.path().join("ours"), dir.path().join("plain"));
        write(&ours, "").unwrap();
        fs::write(&plain, "").unwrap();
        let mode = |path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(ours), mode(plain));
    }

    #[test]
    fn a_directory_that_cannot_be_written_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        make_directory(&dir.path().join("a/b")).unwrap();
        assert!(dir.path().join("a/b").is_dir());
        write(&dir.path().join("file"), "").unwrap();
        let text = make_directory(&dir.path().join("file")).unwrap_err().to_string();
        assert!(text.contains("file` cannot be made") && text.contains("`--out`"), "{text}");
    }
}
