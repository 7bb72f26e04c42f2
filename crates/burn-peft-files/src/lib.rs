//! What `burn-peft` and `burn-peft-llama` share about files.
//!
//! - [`DirectoryWriter`] and [`read_together`]: several files that belong together, written and read while other
//!   programs do the same. A reader gets the files of one writer, or none. [`DirectoryReader`] is for files that are too
//!   large to be read at once.
//! - [`StagedDirectory`]: a directory that appears when it is complete.
//! - [`WrongFile`]: what a file is that is not what its name says, such as the pointer that Git LFS leaves.

mod directory;
mod lock;
mod staged_directory;
mod wrong_file;

pub use directory::{DirectoryReader, DirectoryWriter, StagedFile, read_together};
pub use staged_directory::StagedDirectory;
pub use wrong_file::WrongFile;
