//! For people who have an adapter as files: what is in it, a model with it merged, and files for llama.cpp.
//!
//! `cargo run --release --example adapter -- --help` lists the commands.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]
#![allow(unreachable_pub, reason = "a program has no public interface, its modules have")]

mod base;
mod cli;
mod export;
mod inputs;
mod inspect;
mod merge;
mod numbers;
mod programs;
mod table;
#[cfg(test)]
mod tests;

use std::process::ExitCode;

use burn_peft_examples::failure;
use clap::Parser;

/// Merging allocates and frees a buffer for every weight; the system allocator maps and unmaps them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let code = |is_good| if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    failure::exit_code(run(&cli::Cli::parse()).map(code))
}

/// Whether what was asked about is good.
fn run(cli: &cli::Cli) -> anyhow::Result<bool> {
    match &cli.command {
        cli::Command::Inspect(args) => inspect::run(args),
        cli::Command::Merge(args) => merge::run(args).map(|()| true),
        cli::Command::Export(args) => export::run(args).map(|()| true),
    }
}
