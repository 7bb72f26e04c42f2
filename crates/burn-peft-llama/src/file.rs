//! Reading and writing the small text files of a model directory.

use std::fs;
use std::io::{Error, ErrorKind};
use std::path::Path;

use burn_peft_files::{
    DirectoryReader, DirectoryWriter, StagedFile, TensorFileError, TensorFiles, WEIGHTS_FILE, WrongFile,
};
use serde::de::DeserializeOwned;

use crate::error::LlamaError;

/// Reads a text file; `hint` says what it is for.
fn read(path: &Path, hint: &'static str) -> Result<String, LlamaError> {
    let failed = |source| LlamaError::ReadFile { path: path.into(), source, hint };
    String::from_utf8(fs::read(path).map_err(failed)?).map_err(|error| {
        match WrongFile::detect(error.as_bytes()) {
            Some(found) => LlamaError::WrongFile { path: path.into(), found },
            None => failed(Error::new(ErrorKind::InvalidData, error.utf8_error())),
        }
    })
}

/// Reads a text file without which `dir` is no model directory. If it is missing, the hint says why that may be.
pub(crate) fn read_in_model(dir: &Path, name: &str) -> Result<String, LlamaError> {
    read(&dir.join(name), hint_for(dir, name))
}

/// Reads a text file, or `None` if there is no such file.
pub(crate) fn read_optional(path: &Path, hint: &'static str) -> Result<Option<String>, LlamaError> {
    match read(path, hint) {
        Ok(text) => Ok(Some(text)),
        Err(LlamaError::ReadFile { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Parses JSON. If it is none, the error says what it is instead.
pub(crate) fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, LlamaError> {
    serde_json::from_str(text).map_err(|source| match WrongFile::detect(text.as_bytes()) {
        Some(found) => LlamaError::WrongFile { path: path.into(), found },
        None => LlamaError::Json { path: path.into(), source },
    })
}

/// What to do about a file that a model directory lacks, by what is there instead.
pub(crate) fn hint_for(dir: &Path, name: &str) -> &'static str {
    if dir.is_file() {
        return "expected the model's directory, this is a file: give the directory that it is in";
    }
    if !dir.is_dir() {
        return "there is no such directory";
    }
    let names: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    let ends_with = |end: &str| names.iter().any(|name| name.ends_with(end));
    let is = |wanted: &str| names.iter().any(|name| name == wanted);
    if name == "tokenizer.json" {
        return if is("tokenizer.model") || ends_with(".spm") {
            "there is a `tokenizer.model` only; write the `tokenizer.json` in Python: \
             `AutoTokenizer.from_pretrained(dir).save_pretrained(dir)`"
        } else if is("vocab.json") || is("merges.txt") {
            "there is a vocabulary in other files only; write the `tokenizer.json` in Python: \
             `AutoTokenizer.from_pretrained(dir).save_pretrained(dir)`"
        } else {
            "expected a model directory with a `tokenizer.json`"
        };
    }
    if ends_with(".gguf") {
        "there is a GGUF file of llama.cpp only; take the safetensors files of the same model"
    } else if is("adapter_config.json") {
        "this is the directory of an adapter: load the model that it was trained on, then the adapter"
    } else if ends_with(".pth") && !is("config.json") {
        "these are the files of the original release; take those in the Hugging Face layout"
    } else if is("pytorch_model.bin") || is("pytorch_model.bin.index.json") || ends_with(".pth") {
        "there are PyTorch's weights only; save them as safetensors in Python: \
         `AutoModelForCausalLM.from_pretrained(dir).save_pretrained(dir)`"
    } else if name == "config.json" {
        "expected a model directory in the Hugging Face layout"
    } else {
        "expected weights as `model.safetensors` or as shards with `model.safetensors.index.json`"
    }
}

/// Reads a JSON file, or the default value if there is no such file.
pub(crate) fn read_json_or_default<T: DeserializeOwned + Default>(
    path: &Path,
    hint: &'static str,
) -> Result<T, LlamaError> {
    match read_optional(path, hint)? {
        None => Ok(T::default()),
        Some(text) => parse(path, &text),
    }
}

/// Waits until no program writes to a model directory, and keeps writers out while the value lives.
pub(crate) fn lock(dir: &Path) -> Result<DirectoryReader, LlamaError> {
    let hint = "is another program saving a model there?";
    DirectoryReader::open(dir).map_err(|source| LlamaError::ReadFile { path: dir.into(), source, hint })
}

/// Waits until no program reads from or writes to a model directory, which is made if there is none.
pub(crate) fn writer(dir: &Path) -> Result<DirectoryWriter, LlamaError> {
    DirectoryWriter::open(dir).map_err(unwritten(dir))
}

/// Writes a text file that [`put`] moves to its place.
pub(crate) fn stage(writer: &DirectoryWriter, path: &Path, text: &str) -> Result<StagedFile, LlamaError> {
    writer.stage_bytes(&name(path), text).map_err(unwritten(path))
}

/// Moves a file to its place.
pub(crate) fn put(file: StagedFile, path: &Path) -> Result<(), LlamaError> {
    file.put().map_err(unwritten(path))
}

/// Removes a file, if there is one.
pub(crate) fn remove(writer: &DirectoryWriter, path: &Path) -> Result<(), LlamaError> {
    writer.remove(&name(path)).map_err(unwritten(path))
}

/// The error about a file that cannot be written.
pub(crate) fn unwritten(path: &Path) -> impl Fn(Error) -> LlamaError {
    move |source| LlamaError::WriteFile { path: path.into(), source }
}

/// Opens the weights of a model directory.
pub(crate) fn open_weights(dir: &Path) -> Result<TensorFiles, LlamaError> {
    TensorFiles::open(dir).map_err(unread_weights(hint_for(dir, WEIGHTS_FILE)))
}

/// The error about weights that cannot be read, with what to do about it.
pub(crate) fn unread_weights(hint: &'static str) -> impl Fn(TensorFileError) -> LlamaError {
    move |error| match error {
        TensorFileError::Io { path, source } => LlamaError::ReadFile { path, source, hint },
        TensorFileError::WrongFile { path, found } => LlamaError::WrongFile { path, found },
        other => LlamaError::WeightsFile(other),
    }
}

/// The last part of a path.
pub(crate) fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_is_an_error_with_path_and_hint_unless_optional() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("none.json");
        let text = read(&path, "it is made by x").unwrap_err().to_string();
        assert!(text.contains("none.json") && text.contains("hint: it is made by x"), "{text}");
        assert_eq!(read_optional(&path, "").unwrap(), None);
        assert_eq!(read_json_or_default::<Vec<u8>>(&path, "").unwrap(), Vec::<u8>::new());
        fs::write(&path, "[1,").unwrap();
        assert!(matches!(read_json_or_default::<Vec<u8>>(&path, ""), Err(LlamaError::Json { .. })));
    }

    #[test]
    fn a_file_that_is_something_else_says_what_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        for (bytes, words) in [
            (&b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"[..], "a git-LFS pointer"),
            (b"<!DOCTYPE html><html>", "a web page"),
            (b"\x1f\x8b\x08\xff", "compressed by gzip"),
            (b"", "empty"),
            (b"\xff\xfe{\0", "text with a byte-order mark"),
        ] {
            fs::write(&path, bytes).unwrap();
            let error = read_json_or_default::<Vec<u8>>(&path, "").unwrap_err().to_string();
            assert!(error.contains(&format!("a.json` is {words}")) && error.contains("\nhint: "), "{error}");
        }
    }

    #[test]
    fn what_a_directory_has_instead_decides_about_the_hint() {
        let dir = tempfile::tempdir().unwrap();
        let hint = |name: &str| hint_for(dir.path(), name);
        assert!(hint("model.safetensors").contains("model.safetensors.index.json"));
        fs::write(dir.path().join("tokenizer.model"), "").unwrap();
        assert!(hint("tokenizer.json").contains("save_pretrained"));
        fs::write(dir.path().join("consolidated.00.pth"), "").unwrap();
        assert!(hint("config.json").contains("original release"));
        fs::write(dir.path().join("config.json"), "").unwrap();
        fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
        assert!(hint("model.safetensors").contains("PyTorch"));
        fs::write(dir.path().join("model.gguf"), "").unwrap();
        assert!(hint("model.safetensors").contains("GGUF"));
        assert!(hint_for(&dir.path().join("config.json"), "config.json").contains("this is a file"));
        assert!(hint_for(&dir.path().join("none"), "config.json").contains("no such directory"));
    }
}
