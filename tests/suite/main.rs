//! The integration tests: one binary, one module for each question.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "tests")]

mod adapter_files;
mod cases;
mod cases_text;
mod checkpointing;
mod common;
mod device;
mod directories;
mod export;
mod gguf;
mod guide;
mod key_mapping;
mod lifecycle;
mod llama_parity;
mod lora_formula;
mod lora_parity;
mod methods;
mod misuse;
mod operations;
mod packing;
mod real_model;
mod real_sizes;
mod state;
mod targeting;
mod toy;
mod training_parity;
mod weighted;
