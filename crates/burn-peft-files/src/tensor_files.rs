//! The weights of a model directory: where each tensor lies, and its numbers.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use safetensors::SafeTensorError;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Deserialize;

use crate::float::to_f32;
use crate::wrong_file::WrongFile;

/// The file of weights in a model directory, unless there are several.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// The file that lists the files of weights in a model directory, if there are several.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// Longest header that is read, in bytes; the format's own limit.
const MAX_HEADER: u64 = 100_000_000;

/// Why the weights of a model directory cannot be read.
///
/// The cause is not part of the message; it is the [`source`](std::error::Error::source).
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum TensorFileError {
    /// A file cannot be read.
    #[error("cannot read `{}`", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },

    /// A file is not what its name says, such as the pointer that Git LFS leaves.
    #[error("`{}` is {found}\nhint: {}", .path.display(), .found.hint())]
    WrongFile {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: WrongFile,
    },

    /// The index is malformed.
    #[error("cannot parse `{}`", .path.display())]
    Index {
        /// The file.
        path: PathBuf,
        /// Where and why parsing failed.
        source: serde_json::Error,
    },

    /// The index names a file outside its directory.
    #[error("`{}`: expected the name of a file beside it, found `{name}`", .path.display())]
    ShardName {
        /// The index.
        path: PathBuf,
        /// The name it holds.
        name: String,
    },

    /// A file breaks the safetensors format.
    #[error("malformed weights `{}`", .path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: SafeTensorError,
    },

    /// A file is shorter or longer than its header says.
    #[error(
        "malformed weights `{}`: expected {expected} bytes, found {found}\nhint: was the download complete?",
        .path.display()
    )]
    Length {
        /// The file.
        path: PathBuf,
        /// The length by the header, in bytes.
        expected: u64,
        /// The length, in bytes.
        found: u64,
    },
}

impl TensorFileError {
    fn io(path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { path: path.into(), source }
    }
}

/// The open files of a model's weights. What takes their places later does not change what is read.
pub struct TensorFiles {
    path: PathBuf,
    files: Vec<(PathBuf, File)>,
    tensors: BTreeMap<String, Entry>,
}

/// Where a tensor lies.
#[derive(Clone)]
struct Entry {
    file: usize,
    /// Position in the file, in bytes.
    offset: u64,
    info: TensorInfo,
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl TensorFiles {
    /// Opens `model.safetensors`, or without it the files that `model.safetensors.index.json` lists, and reads their
    /// headers.
    ///
    /// # Errors
    /// Every [`TensorFileError`]. The index may name files beside it only.
    pub fn open(directory: impl AsRef<Path>) -> Result<Self, TensorFileError> {
        let directory = directory.as_ref();
        let (single, index) = (directory.join(WEIGHTS_FILE), directory.join(INDEX_FILE));
        // Like transformers: the single file goes first.
        if single.exists() {
            return Self::open_file(single);
        }
        let bytes = match fs::read(&index) {
            Ok(bytes) => bytes,
            // Opening it says what is missing.
            Err(error) if error.kind() == ErrorKind::NotFound => return Self::open_file(single),
            Err(error) => return Err(TensorFileError::io(&index)(error)),
        };
        let json: Index =
            serde_json::from_slice(&bytes).map_err(|source| match WrongFile::detect(&bytes) {
                Some(found) => TensorFileError::WrongFile { path: index.clone(), found },
                None => TensorFileError::Index { path: index.clone(), source },
            })?;
        let mut files = Self { path: index, files: vec![], tensors: BTreeMap::new() };
        for name in json.weight_map.into_values().collect::<BTreeSet<_>>() {
            let mut components = Path::new(&name).components();
            let plain = matches!((components.next(), components.next()), (Some(Component::Normal(_)), None));
            if !plain || name.contains(['/', '\\']) {
                return Err(TensorFileError::ShardName { path: files.path, name });
            }
            files.add(directory.join(name))?;
        }
        Ok(files)
    }

    /// Opens one safetensors file and reads its header.
    ///
    /// # Errors
    /// Those about a single file.
    pub fn open_file(path: impl Into<PathBuf>) -> Result<Self, TensorFileError> {
        let path = path.into();
        let mut files = Self { path: path.clone(), files: vec![], tensors: BTreeMap::new() };
        files.add(path)?;
        Ok(files)
    }

    fn add(&mut self, path: PathBuf) -> Result<(), TensorFileError> {
        let mut file = File::open(&path).map_err(TensorFileError::io(&path))?;
        let (metadata, start) = match read_header(&path, &mut file) {
            Ok(header) => header,
            Err(error) => {
                let mut beginning = vec![];
                let read = file.rewind().and_then(|()| file.take(512).read_to_end(&mut beginning));
                read.map_err(TensorFileError::io(&path))?;
                return Err(match WrongFile::detect(&beginning) {
                    Some(found) => TensorFileError::WrongFile { path, found },
                    None => error,
                });
            }
        };
        for (name, info) in metadata.tensors() {
            let offset = start + info.data_offsets.0 as u64;
            self.tensors.insert(name, Entry { file: self.files.len(), offset, info: info.clone() });
        }
        self.files.push((path, file));
        Ok(())
    }

    /// The file to name in errors about the whole: the only one, or the index.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names, shapes and types, by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.tensors.iter().map(|(name, entry)| (&**name, &entry.info))
    }

    /// Shape and type of a tensor, `None` if there is none of that name.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|entry| &entry.info)
    }

    /// Leaves out the tensors for which `keep` is false.
    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.tensors.retain(|name, _| keep(name));
    }

    /// Gives the tensor `name`, if there is one, the name `new`.
    pub fn rename(&mut self, name: &str, new: &str) {
        if let Some(entry) = self.tensors.remove(name) {
            self.tensors.insert(new.to_string(), entry);
        }
    }

    /// The numbers of a tensor at the indices `range`, in row-major order; `None` if there is no such tensor, or none of
    /// [floats](crate::is_float).
    ///
    /// # Errors
    /// [`TensorFileError::Io`].
    pub fn read(&self, name: &str, range: Range<usize>) -> Result<Option<Vec<f32>>, TensorFileError> {
        let Some(Entry { file, offset, info }) = self.tensors.get(name) else { return Ok(None) };
        let size = info.dtype.bitsize() / 8;
        let (path, mut file) = (&self.files[*file].0, &self.files[*file].1);
        let mut bytes = vec![0; range.len() * size];
        file.seek(SeekFrom::Start(offset + (range.start * size) as u64))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(TensorFileError::io(path))?;
        Ok(to_f32(info.dtype, &bytes))
    }
}

/// Reads the header of a safetensors file; the tensors begin at the position behind it.
fn read_header(path: &Path, file: &mut File) -> Result<(Metadata, u64), TensorFileError> {
    let malformed = |source| TensorFileError::Format { path: path.into(), source };
    let length = file.metadata().map_err(TensorFileError::io(path))?.len();
    let mut prefix = [0; 8];
    if length < 8 {
        return Err(malformed(SafeTensorError::HeaderTooSmall));
    }
    file.read_exact(&mut prefix).map_err(TensorFileError::io(path))?;
    let header_length = u64::from_le_bytes(prefix);
    if header_length > MAX_HEADER {
        return Err(malformed(SafeTensorError::HeaderTooLarge));
    }
    if header_length > length - 8 {
        return Err(malformed(SafeTensorError::InvalidHeaderLength));
    }
    let mut header = vec![0; header_length as usize];
    file.read_exact(&mut header).map_err(TensorFileError::io(path))?;
    let metadata: Metadata = serde_json::from_slice(&header)
        .map_err(|source| malformed(SafeTensorError::InvalidHeaderDeserialization(source)))?;
    let start = 8 + header_length;
    let expected = start.saturating_add(metadata.data_len() as u64);
    if expected == length {
        Ok((metadata, start))
    } else {
        Err(TensorFileError::Length { path: path.into(), expected, found: length })
    }
}

#[cfg(test)]
mod tests {
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    use super::*;

    fn write(path: PathBuf, name: &str, dtype: Dtype, bytes: &[u8]) {
        let view = TensorView::new(dtype, vec![bytes.len() * 8 / dtype.bitsize()], bytes).unwrap();
        fs::write(path, safetensors::serialize([(name, view)], None).unwrap()).unwrap();
    }

    #[test]
    fn tensors_of_shards_are_read_piece_by_piece() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        write(path("1.safetensors"), "a", Dtype::F32, &[1.5f32, -2.0, 3.0].map(f32::to_le_bytes).concat());
        write(path("2.safetensors"), "b", Dtype::I32, &[0; 4]);
        let index = r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#;
        fs::write(path(INDEX_FILE), index).unwrap();
        let mut files = TensorFiles::open(directory.path()).unwrap();
        assert_eq!(files.path(), path(INDEX_FILE));
        assert_eq!(files.tensors().map(|(name, _)| name).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(files.read("a", 1..3).unwrap(), Some(vec![-2.0, 3.0]));
        assert_eq!((files.read("b", 0..1).unwrap(), files.read("c", 0..1).unwrap()), (None, None));
        assert!(matches!(files.read("a", 3..9), Err(TensorFileError::Io { .. })));
        files.rename("a", "c");
        files.retain(|name| name != "b");
        assert_eq!(files.tensors().map(|(name, _)| name).collect::<Vec<_>>(), ["c"]);
        // A single file goes before the index.
        write(path(WEIGHTS_FILE), "d", Dtype::F32, &[0; 4]);
        assert!(TensorFiles::open(directory.path()).unwrap().get("d").is_some());
    }

    #[test]
    fn an_index_may_not_lead_out_of_its_directory() {
        let directory = tempfile::tempdir().unwrap();
        let index = directory.path().join(INDEX_FILE);
        for name in ["../a", "/a", "sub/a", "sub\\\\a", "..", ""] {
            fs::write(&index, format!(r#"{{"weight_map": {{"a": "{name}"}}}}"#)).unwrap();
            let error = TensorFiles::open(directory.path()).err().unwrap();
            assert!(matches!(error, TensorFileError::ShardName { .. }), "{error}");
        }
        fs::write(&index, "{}").unwrap();
        let error = TensorFiles::open(directory.path()).err().unwrap();
        assert!(matches!(error, TensorFileError::Index { .. }), "{error}");
        fs::write(&index, "").unwrap();
        let error = TensorFiles::open(directory.path()).err().unwrap();
        assert!(matches!(error, TensorFileError::WrongFile { found: WrongFile::Empty, .. }), "{error}");
    }
}
