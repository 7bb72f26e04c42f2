//! What is computed, as functions of tensors alone. A faster body for one of them is one file here.

pub(crate) mod column_norm;
mod input;
pub(crate) mod low_rank;
pub(crate) mod singular;

pub(crate) use input::Input;
