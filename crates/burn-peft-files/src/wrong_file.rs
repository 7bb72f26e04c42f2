//! Files that are not what their names say.

use std::fmt;

/// What a file is that a reader could not make sense of: found out by how it begins.
///
/// It displays as the end of a sentence: `` `model.safetensors` is `` .. "a git-LFS pointer, not the file itself".
///
/// ```
/// use burn_peft_files::WrongFile;
///
/// let found = WrongFile::detect(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n");
/// assert_eq!(found, Some(WrongFile::LfsPointer));
/// assert_eq!(WrongFile::LfsPointer.hint(), "fetch the file with `git lfs pull`, in the repository that it is from");
/// assert_eq!(WrongFile::detect(b"{}"), None);
/// ```
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WrongFile {
    /// Nothing at all.
    Empty,
    /// The few lines that Git leaves in the place of a large file where Git LFS is not installed.
    LfsPointer,
    /// A web page, such as one that asks for a login.
    Html,
    /// What a server says instead of a file.
    ServerMessage,
    /// A zip archive, which is how PyTorch saves `.bin` and `.pt` files.
    Zip,
    /// A pickle, which is how PyTorch saved files before version 1.6.
    Pickle,
    /// Compressed by gzip.
    Gzip,
    /// Compressed by xz, zstd or bzip2.
    Compressed,
    /// Keras and others save weights so.
    Hdf5,
    /// llama.cpp's format.
    Gguf,
    /// NumPy's archive or array.
    Numpy,
    /// UTF-16 text, or UTF-8 text with a byte-order mark.
    ByteOrderMark,
}

impl WrongFile {
    /// Recognises a file by its first bytes; `None` if it is none of these.
    ///
    /// Call it when a file could not be read: it does not tell whether a file is right.
    pub fn detect(bytes: &[u8]) -> Option<Self> {
        const SIGNATURES: &[(&[u8], WrongFile)] = &[
            (b"version https://git-lfs.github.com/spec/", WrongFile::LfsPointer),
            (b"PK\x03\x04", WrongFile::Zip),
            (b"GGUF", WrongFile::Gguf),
            (b"\x1f\x8b", WrongFile::Gzip),
            (b"\xfd7zXZ", WrongFile::Compressed),
            (b"\x28\xb5\x2f\xfd", WrongFile::Compressed),
            (b"BZh", WrongFile::Compressed),
            (b"\x89HDF", WrongFile::Hdf5),
            (b"\x93NUMPY", WrongFile::Numpy),
            (b"\x80\x02", WrongFile::Pickle),
            (b"\x80\x03", WrongFile::Pickle),
            (b"\x80\x04", WrongFile::Pickle),
            (b"\x80\x05", WrongFile::Pickle),
            (b"\xef\xbb\xbf", WrongFile::ByteOrderMark),
            (b"\xff\xfe", WrongFile::ByteOrderMark),
            (b"\xfe\xff", WrongFile::ByteOrderMark),
        ];
        if bytes.is_empty() {
            return Some(Self::Empty);
        }
        // The header of a safetensors file begins with its length, in which the first bytes of a pickle may stand as well.
        let is_safetensors = bytes.get(8) == Some(&b'{');
        let signature = SIGNATURES.iter().find(|(signature, _)| bytes.starts_with(signature));
        if let Some((_, found)) = signature.filter(|_| !is_safetensors) {
            return Some(*found);
        }
        let start: Vec<u8> = bytes.trim_ascii_start().iter().take(64).map(u8::to_ascii_lowercase).collect();
        if [&b"<!doctype html"[..], b"<html", b"<?xml", b"<head"].iter().any(|tag| start.starts_with(tag)) {
            return Some(Self::Html);
        }
        let said = [
            &b"entry not found"[..],
            b"repository not found",
            b"not found",
            b"invalid username or password",
            b"invalid credentials",
            b"access to model",
            b"{\"error\"",
        ];
        said.iter().any(|words| start.starts_with(words)).then_some(Self::ServerMessage)
    }

    /// What can be done about it.
    pub fn hint(self) -> &'static str {
        match self {
            Self::Empty => "copy or download the file again",
            Self::LfsPointer => "fetch the file with `git lfs pull`, in the repository that it is from",
            Self::Html | Self::ServerMessage => {
                "download the file itself: the address must contain `/resolve/`, and private models need a token"
            }
            Self::Zip | Self::Pickle => {
                "it can run code when it is read; load it in Python and save it with `safe_serialization=True`"
            }
            Self::Gzip => "unpack it with `gunzip`",
            Self::Compressed => "unpack it with `xz -d`, `zstd -d` or `bunzip2`",
            Self::Hdf5 => "load it in Python and save it as safetensors",
            Self::Gguf => "take the safetensors files of the same model",
            Self::Numpy => "save it in Python with `safetensors.numpy.save_file`",
            Self::ByteOrderMark => "save it as UTF-8 without a byte-order mark",
        }
    }
}

impl fmt::Display for WrongFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "empty",
            Self::LfsPointer => "a git-LFS pointer, not the file itself",
            Self::Html => "a web page, not the file itself",
            Self::ServerMessage => "the answer of a server that did not give out the file",
            Self::Zip => "a zip archive, as PyTorch saves checkpoints",
            Self::Pickle => "a Python pickle, as PyTorch saved checkpoints",
            Self::Gzip => "compressed by gzip",
            Self::Compressed => "compressed by xz, zstd or bzip2",
            Self::Hdf5 => "an HDF5 file",
            Self::Gguf => "a GGUF file of llama.cpp",
            Self::Numpy => "a NumPy array",
            Self::ByteOrderMark => "text with a byte-order mark",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_recognised_by_how_they_begin() {
        let cases: [(&[u8], Option<WrongFile>); 18] = [
            (b"", Some(WrongFile::Empty)),
            (
                b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
                Some(WrongFile::LfsPointer),
            ),
            (b"\n <!DOCTYPE html><html>", Some(WrongFile::Html)),
            (b"Entry not found", Some(WrongFile::ServerMessage)),
            (b"{\"error\":\"Repository not found\"}", Some(WrongFile::ServerMessage)),
            (b"\xfd7zXZ\x00", Some(WrongFile::Compressed)),
            (b"\x28\xb5\x2f\xfd\x04", Some(WrongFile::Compressed)),
            (b"\x89HDF\r\n", Some(WrongFile::Hdf5)),
            (b"PK\x03\x04\x00\x00", Some(WrongFile::Zip)),
            (b"\x80\x02}q\x00", Some(WrongFile::Pickle)),
            (b"GGUF\x03\x00\x00\x00", Some(WrongFile::Gguf)),
            (b"\x1f\x8b\x08", Some(WrongFile::Gzip)),
            (b"\x93NUMPY\x01", Some(WrongFile::Numpy)),
            (b"\xef\xbb\xbf{}", Some(WrongFile::ByteOrderMark)),
            (b"\xff\xfe{\x00", Some(WrongFile::ByteOrderMark)),
            (b"{\"r\": 8", None),
            (b"\x80\x02\x00\x00\x00\x00\x00\x00{\"a\":", None),
            (b"version 1", None),
        ];
        for (bytes, expected) in cases {
            assert_eq!(WrongFile::detect(bytes), expected, "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn every_kind_has_words_and_a_way_out() {
        let text = format!("{}: {}", WrongFile::LfsPointer, WrongFile::LfsPointer.hint());
        assert!(text.contains("not the file itself") && text.contains("git lfs pull"), "{text}");
    }
}
