//! The bytes of a GGUF file: version 3, little-endian.

use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Error, ErrorKind, Write};
use std::path::{Path, PathBuf, is_separator};

use burn_peft_files::{DirectoryWriter, StagedFile};
use half::f16;

use super::GgufType;
use crate::error::LlamaError;
use crate::file::{self, unwritten};

const VERSION: u32 = 3;
/// Every tensor begins at a multiple of it.
const ALIGNMENT: usize = 32;

/// The value of a key.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    Texts(Vec<String>),
}

/// Keys and their values, in the order of the file.
pub(super) type Metadata = Vec<(String, Value)>;

/// A tensor on its way into a file.
pub(super) struct Tensor {
    pub(super) name: String,
    /// What the file calls it that it is from.
    pub(super) source: String,
    /// In PyTorch's order, which is the reverse of the file's.
    pub(super) shape: Vec<usize>,
    /// Its numbers in row-major order.
    pub(super) read: Box<dyn Fn() -> Result<Vec<f32>, LlamaError>>,
}

impl Tensor {
    /// Vectors are never rounded: llama.cpp adds and multiplies them in f32 only.
    fn dtype(&self, matrices: GgufType) -> GgufType {
        if self.shape.len() < 2 { GgufType::F32 } else { matrices }
    }

    fn size(&self, matrices: GgufType) -> usize {
        let size = match self.dtype(matrices) {
            GgufType::F32 => 4,
            GgufType::F16 => 2,
        };
        self.shape.iter().product::<usize>() * size
    }

    /// Its bytes in the file, one tensor at a time in memory.
    fn bytes(&self, matrices: GgufType) -> Result<Vec<u8>, LlamaError> {
        let values = (self.read)()?;
        let dtype = self.dtype(matrices);
        if values.iter().any(|value| !value.is_finite()) {
            return Err(LlamaError::NonFiniteWeight { parameter: self.source.clone() });
        }
        if dtype == GgufType::F16 && values.iter().any(|value| !f16::from_f32(*value).is_finite()) {
            return Err(LlamaError::TooLargeForF16 { parameter: self.source.clone() });
        }
        Ok(match dtype {
            GgufType::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            GgufType::F16 => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
        })
    }
}

/// Writes a file, which appears when it is complete, and returns its size in bytes. `on_tensor` gets the number of tensors
/// that are written, and of all.
pub(super) fn write(
    output: &Path,
    metadata: &[(String, Value)],
    tensors: &[Tensor],
    matrices: GgufType,
    on_tensor: &mut dyn FnMut(usize, usize),
) -> Result<u64, LlamaError> {
    let failed = unwritten(output);
    let mut staged = stage(output)?;
    let mut writer = BufWriter::with_capacity(1 << 20, &mut staged.file);
    let mut header = header(metadata, tensors, matrices);
    pad(&mut header);
    writer.write_all(&header).map_err(&failed)?;
    let mut size = header.len() as u64;
    for (i, tensor) in tensors.iter().enumerate() {
        let mut bytes = tensor.bytes(matrices)?;
        pad(&mut bytes);
        writer.write_all(&bytes).map_err(&failed)?;
        size += bytes.len() as u64;
        on_tensor(i + 1, tensors.len());
    }
    writer.flush().map_err(&failed)?;
    drop(writer);
    staged.put(output).map_err(&failed)?;
    Ok(size)
}

/// A file on its way to its place, and the right to write beside it. Unless it is [put](Self::put) there, it goes with
/// this value, and so do the directories that were made for it.
pub(super) struct Staged {
    // They go in this order.
    file: StagedFile,
    _lock: DirectoryWriter,
    made: MadeDirectories,
}

/// Directories that were made for a file, the deepest first. They go with this value where they are empty.
struct MadeDirectories(Vec<PathBuf>);

impl Drop for MadeDirectories {
    fn drop(&mut self) {
        for directory in &self.0 {
            let _ = fs::remove_dir(directory);
        }
    }
}

impl Staged {
    /// # Errors
    /// There is something of that name by now, or the file cannot be flushed or moved.
    fn put(self, output: &Path) -> Result<(), Error> {
        let Self { file, mut made, .. } = self;
        put(file, output)?;
        made.0.clear();
        Ok(())
    }
}

/// A link, unlike a move, never takes the place of a file that appeared meanwhile.
fn put(file: StagedFile, output: &Path) -> Result<(), Error> {
    OpenOptions::new().write(true).open(file.path())?.sync_all()?;
    match fs::hard_link(file.path(), output) {
        Ok(()) => {
            drop(file);
            // Not everywhere can a directory be opened, and without it a reader still sees all or nothing.
            let directory = output.parent().filter(|parent| !parent.as_os_str().is_empty());
            let _ =
                File::open(directory.unwrap_or(Path::new("."))).and_then(|directory| directory.sync_all());
            Ok(())
        }
        Err(_) if is_taken(output) => Err(exists()),
        // Not every file system has links.
        Err(_) => file.put(),
    }
}

/// A file that becomes `output`.
pub(super) fn stage(output: &Path) -> Result<Staged, LlamaError> {
    let failed = unwritten(output);
    let end = output.as_os_str().as_encoded_bytes().last();
    if output.file_name().is_none() || end.is_some_and(|end| is_separator(char::from(*end))) {
        let reason = "it is not the name of a file: give one such as `adapter.gguf`";
        return Err(failed(Error::new(ErrorKind::InvalidInput, reason)));
    }
    if is_taken(output) {
        return Err(failed(exists()));
    }
    let parent = output.parent().unwrap_or(Path::new(""));
    let absent = parent.ancestors().take_while(|path| !path.as_os_str().is_empty() && !path.exists());
    let made = MadeDirectories(absent.map(PathBuf::from).collect());
    let directory = DirectoryWriter::open(parent).map_err(&failed)?;
    let file = directory.stage(&file::name(output)).map_err(&failed)?;
    Ok(Staged { file, _lock: directory, made })
}

/// Whether there is something of that name, be it a link to nothing.
fn is_taken(output: &Path) -> bool {
    output.symlink_metadata().is_ok()
}

fn exists() -> Error {
    let reason = "there is something of that name: choose another name, or remove it";
    Error::new(ErrorKind::AlreadyExists, reason)
}

/// All that comes before the numbers.
fn header(metadata: &[(String, Value)], tensors: &[Tensor], matrices: GgufType) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend_from_slice(b"GGUF");
    out.extend_from_slice(&VERSION.to_le_bytes());
    length(&mut out, tensors.len());
    length(&mut out, metadata.len());
    for (key, value) in metadata {
        text(&mut out, key);
        value.write(&mut out);
    }
    let mut offset = 0;
    for tensor in tensors {
        text(&mut out, &tensor.name);
        out.extend_from_slice(&(tensor.shape.len() as u32).to_le_bytes());
        for &size in tensor.shape.iter().rev() {
            length(&mut out, size);
        }
        let dtype: u32 = match tensor.dtype(matrices) {
            GgufType::F32 => 0,
            GgufType::F16 => 1,
        };
        out.extend_from_slice(&dtype.to_le_bytes());
        length(&mut out, offset);
        offset += tensor.size(matrices).next_multiple_of(ALIGNMENT);
    }
    out
}

impl Value {
    /// The type and the value.
    fn write(&self, out: &mut Vec<u8>) {
        const U32: u32 = 4;
        const I32: u32 = 5;
        const F32: u32 = 6;
        const BOOL: u32 = 7;
        const TEXT: u32 = 8;
        const ARRAY: u32 = 9;
        let mut kind = |kind: u32| out.extend_from_slice(&kind.to_le_bytes());
        match self {
            Self::U32(value) => {
                kind(U32);
                out.extend_from_slice(&value.to_le_bytes());
            }
            Self::F32(value) => {
                kind(F32);
                out.extend_from_slice(&value.to_le_bytes());
            }
            Self::Bool(value) => {
                kind(BOOL);
                out.push(u8::from(*value));
            }
            Self::Text(value) => {
                kind(TEXT);
                text(out, value);
            }
            Self::I32s(values) => {
                kind(ARRAY);
                kind(I32);
                length(out, values.len());
                out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
            Self::F32s(values) => {
                kind(ARRAY);
                kind(F32);
                length(out, values.len());
                out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
            Self::Texts(values) => {
                kind(ARRAY);
                kind(TEXT);
                length(out, values.len());
                values.iter().for_each(|value| text(out, value));
            }
        }
    }
}

fn length(out: &mut Vec<u8>, length: usize) {
    out.extend_from_slice(&(length as u64).to_le_bytes());
}

fn text(out: &mut Vec<u8>, text: &str) {
    length(out, text.len());
    out.extend_from_slice(text.as_bytes());
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, shape: &[usize], values: &[f32]) -> Tensor {
        let values = values.to_vec();
        let source = format!("model.{name}");
        Tensor { name: name.into(), source, shape: shape.into(), read: Box::new(move || Ok(values.clone())) }
    }

    fn two() -> [Tensor; 2] {
        [tensor("matrix", &[2, 3], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]), tensor("vector", &[2], &[0.5, 0.1])]
    }

    #[test]
    fn every_field_is_where_the_format_has_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.gguf");
        let metadata = [
            ("a".to_string(), Value::U32(7)),
            ("b".to_string(), Value::Texts(vec!["é".into(), String::new()])),
        ];
        let mut seen = vec![];
        let size = write(&path, &metadata, &two(), GgufType::F16, &mut |done, of| seen.push((done, of)));
        let bytes = fs::read(&path).unwrap();
        assert_eq!((size.unwrap(), seen), (bytes.len() as u64, vec![(1, 2), (2, 2)]));
        let mut expected = b"GGUF\x03\0\0\0\x02\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0".to_vec();
        expected.extend(b"\x01\0\0\0\0\0\0\0a\x04\0\0\0\x07\0\0\0");
        expected.extend(b"\x01\0\0\0\0\0\0\0b\x09\0\0\0\x08\0\0\0\x02\0\0\0\0\0\0\0");
        expected.extend(b"\x02\0\0\0\0\0\0\0\xc3\xa9\0\0\0\0\0\0\0\0");
        expected.extend(b"\x06\0\0\0\0\0\0\0matrix\x02\0\0\0\x03\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0");
        expected.extend(b"\x01\0\0\0\0\0\0\0\0\0\0\0");
        expected.extend(b"\x06\0\0\0\0\0\0\0vector\x01\0\0\0\x02\0\0\0\0\0\0\0\0\0\0\0");
        // The matrix takes 12 bytes, and the next tensor begins at the next multiple of 32.
        expected.extend(b"\x20\0\0\0\0\0\0\0");
        expected.resize(expected.len().next_multiple_of(32), 0);
        let start = expected.len();
        assert_eq!(bytes[..start], expected);
        let halves = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0].map(|value: f32| f16::from_f32(value).to_le_bytes());
        assert_eq!(bytes[start..start + 12], halves.concat());
        assert_eq!(bytes[start + 32..start + 40], [0.5_f32.to_le_bytes(), 0.1_f32.to_le_bytes()].concat());
        assert_eq!(bytes.len(), start + 64);
    }

    #[test]
    fn what_fails_leaves_nothing_and_what_is_there_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/a.gguf");
        let large = tensor("large", &[1, 2], &[1.0, 1e6]);
        let mut failing = two().into_iter().chain([large]).collect::<Vec<_>>();
        let error = write(&path, &[], &failing, GgufType::F16, &mut |_, _| {}).unwrap_err();
        assert!(
            matches!(&error, LlamaError::TooLargeForF16 { parameter } if parameter == "model.large"),
            "{error}"
        );
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "the directory was made for the file");
        write(&path, &[], &failing, GgufType::F32, &mut |_, _| {}).unwrap();
        let before = fs::read(&path).unwrap();
        failing.pop();
        let error = write(&path, &[], &failing, GgufType::F32, &mut |_, _| {}).unwrap_err();
        let LlamaError::WriteFile { source, .. } = error else { panic!("{error}") };
        assert!(source.to_string().contains("choose another name"), "{source}");
        assert_eq!(fs::read(&path).unwrap(), before);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_no_number_is_told_as_such_in_any_type() {
        let directory = tempfile::tempdir().unwrap();
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for dtype in [GgufType::F32, GgufType::F16] {
                let tensors = [tensor("it", &[1, 2], &[1.0, value])];
                let path = directory.path().join("a.gguf");
                let error = write(&path, &[], &tensors, dtype, &mut |_, _| {}).unwrap_err();
                assert!(
                    matches!(&error, LlamaError::NonFiniteWeight { parameter } if parameter == "model.it"),
                    "{error}"
                );
            }
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_that_appears_meanwhile_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.gguf");
        let mut appear = |_: usize, _: usize| fs::write(&path, "mine").unwrap();
        let error = write(&path, &[], &two(), GgufType::F32, &mut appear).unwrap_err();
        let LlamaError::WriteFile { source, .. } = error else { panic!("{error}") };
        assert!(source.to_string().contains("choose another name"), "{source}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_name_of_a_directory_is_refused_and_a_check_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let slash = PathBuf::from(format!("{}/a.gguf/", directory.path().display()));
        let Err(LlamaError::WriteFile { source, .. }) = stage(&slash) else { panic!("{}", slash.display()) };
        assert!(source.to_string().contains("not the name of a file"), "{source}");
        drop(stage(&directory.path().join("deep/er/a.gguf")).unwrap());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
