//! Files of llama.cpp: adapters and models in the GGUF format.
//!
//! A GGUF file is a header, a table of keys and values, a table of tensors, and their numbers. `writer` writes the
//! bytes; the other files say what is in them. The keys, the names of tensors and what llama.cpp makes of them are those
//! of llama.cpp at commit 0c1e57098, which the Python package `gguf` 0.19 has as well.

mod adapter;
mod base;
mod model;
mod names;
mod pre_tokenizer;
mod rotation;
mod vocabulary;
mod writer;

use std::path::Path;

pub use adapter::{GgufAdapter, gguf_obstacles};
pub use model::GgufModel;

use crate::error::LlamaError;

/// Floating-point type of the matrices in a GGUF file. Vectors, such as norms and biases, are f32 in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GgufType {
    /// 32 bits.
    #[default]
    F32,
    /// IEEE half precision.
    F16,
}

impl GgufType {
    /// `general.file_type`.
    fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
        }
    }
}

/// Finds out whether a GGUF file can be written to `output`: whether there is nothing of that name, and a file can be
/// made there.
///
/// # Errors
/// [`LlamaError::WriteFile`].
pub fn check_gguf_output(output: impl AsRef<Path>) -> Result<(), LlamaError> {
    writer::stage(output.as_ref()).map(drop)
}
