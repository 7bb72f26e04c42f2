//! What the examples share; the programs are beside this crate, in `adapter/`, `finetune/` and `pokemon/`.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "programs talk to their users")]

pub mod allocator;
pub mod arguments;
pub mod canvas;
pub mod command;
pub mod device;
pub mod failure;
pub mod model;
pub mod output;
pub mod progress;
