//! Fine-tunes a LLaMA on a file of examples, with LoRA: `cargo run --release --example finetune -- --help`.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]
#![allow(unreachable_pub, reason = "a program has no public interface, its modules have")]

mod cli;
mod data;
mod exam;
mod interrupt;
mod memory;
mod metrics;
mod run;
#[cfg(test)]
mod tests;

use std::process::ExitCode;

use burn_peft_examples::{allocator, failure};
use cap::Cap;
use clap::Parser;
use mimalloc::MiMalloc;

use crate::interrupt::Interrupt;
use crate::run::End;

/// Composed tensor operations allocate and free large buffers all the time; the system allocator maps and unmaps them.
/// What is allocated is counted, to compare it with the estimate.
#[global_allocator]
static ALLOCATOR: Cap<MiMalloc> = Cap::new(MiMalloc, usize::MAX);

fn main() -> ExitCode {
    allocator::keep_freed_memory();
    let args = cli::Args::parse();
    let run = Interrupt::listen().and_then(|interrupt| run::run(&args, &interrupt));
    failure::exit_code(run.map(|end| match end {
        End::Done => ExitCode::SUCCESS,
        End::Interrupted => ExitCode::from(interrupt::EXIT_CODE),
    }))
}
