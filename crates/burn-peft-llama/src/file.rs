//! Reading and writing the small text files of a model directory.

use std::{fs, io::Write, path::Path};

use serde::de::DeserializeOwned;
use tempfile::NamedTempFile;

use crate::LlamaError;

/// Reads a text file; `hint` says what it is for.
pub(crate) fn read(path: &Path, hint: &'static str) -> Result<String, LlamaError> {
    fs::read_to_string(path).map_err(|source| LlamaError::ReadText { path: path.to_owned(), source, hint })
}

/// Reads a text file, or `None` if there is no such file.
pub(crate) fn read_optional(path: &Path, hint: &'static str) -> Result<Option<String>, LlamaError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(LlamaError::ReadText { path: path.to_owned(), source, hint }),
    }
}

/// Reads a JSON file, or the default value if there is no such file.
pub(crate) fn read_json_or_default<T: DeserializeOwned + Default>(
    path: &Path,
    hint: &'static str,
) -> Result<T, LlamaError> {
    match read_optional(path, hint)? {
        None => Ok(T::default()),
        Some(text) => serde_json::from_str(&text)
            .map_err(|source| LlamaError::TokenizerJson { path: path.to_owned(), source }),
    }
}

/// Writes a text file by way of a temporary one beside it, so that no reader ever sees half of it.
pub(crate) fn write(path: &Path, text: &str) -> Result<(), LlamaError> {
    let mut file = temporary(path)?;
    file.write_all(text.as_bytes())
        .map_err(|source| LlamaError::WriteText { path: path.to_owned(), source })?;
    persist(file, path)
}

/// Opens a temporary file that [`persist`] turns into `path`.
pub(crate) fn temporary(path: &Path) -> Result<NamedTempFile, LlamaError> {
    let mut builder = tempfile::Builder::new();
    // A temporary file is private to its owner; the file it becomes should follow the umask like any other.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    builder.tempfile_in(directory).map_err(|source| LlamaError::WriteText { path: path.to_owned(), source })
}

/// Puts a complete temporary file in the place of `path`.
pub(crate) fn persist(file: NamedTempFile, path: &Path) -> Result<(), LlamaError> {
    let failed = |source| LlamaError::WriteText { path: path.to_owned(), source };
    file.as_file().sync_all().map_err(failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_file_reads_back_and_replaces_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        write(&path, "one").unwrap();
        write(&path, "two é").unwrap();
        assert_eq!(read(&path, "").unwrap(), "two é");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn a_missing_file_is_an_error_with_path_and_hint_unless_optional() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("none.json");
        let text = read(&path, "it is made by x").unwrap_err().to_string();
        assert!(text.contains("none.json") && text.contains("hint: it is made by x"), "{text}");
        assert_eq!(read_optional(&path, "").unwrap(), None);
        assert_eq!(read_json_or_default::<Vec<u8>>(&path, "").unwrap(), Vec::<u8>::new());
        write(&path, "[1,").unwrap();
        assert!(matches!(read_json_or_default::<Vec<u8>>(&path, ""), Err(LlamaError::TokenizerJson { .. })));
        assert!(matches!(write(&path.join("x"), ""), Err(LlamaError::WriteText { .. })));
    }
}
