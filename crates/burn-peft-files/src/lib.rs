//! What `burn-peft` and `burn-peft-llama` share about files.
//!
//! - [`DirectoryWriter`] and [`read_together`]: several files that belong together, written and read while other
//!   programs do the same. A reader gets the files of one writer, or none. [`DirectoryReader`] is for files that are too
//!   large to be read at once.
//! - [`StagedDirectory`]: a directory that appears when it is complete. [`remove_directory`]: one that goes at once.
//! - [`TensorFiles`]: the weights of a model directory, in one safetensors file or in the shards that an index lists.
//!   [`is_float`] and [`to_f32`] read numbers of 32 and 16 bits.
//! - [`closest`] and [`closest_key`]: suggestions for names that do not exist.
//! - [`WrongFile`]: what a file is that is not what its name says, such as the pointer that Git LFS leaves.

mod closest;
mod directory;
mod float;
mod lock;
mod staged_directory;
mod tensor_files;
mod wrong_file;

pub use closest::{closest, closest_key};
pub use directory::{DirectoryReader, DirectoryWriter, StagedFile, read_together};
pub use float::{is_float, to_f32};
pub use staged_directory::{StagedDirectory, remove_directory};
pub use tensor_files::{INDEX_FILE, TensorFileError, TensorFiles, WEIGHTS_FILE};
pub use wrong_file::WrongFile;
