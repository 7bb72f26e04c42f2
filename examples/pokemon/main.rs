//! The Pokémon experiment: what prompting, full fine-tuning and LoRA get out of the same base model.
//!
//! `cargo run --release --example pokemon` runs all of it on the embedded base model; `-- --help` lists the options.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]
#![allow(unreachable_pub, reason = "a program has no public interface, its modules have")]

mod arms;
mod base;
mod checks;
mod cli;
mod corpus;
mod data;
mod evaluation;
mod experiment;
mod forgetting;
mod plots;
mod pretrain;
mod prompt;
mod provenance;
mod report;
mod setting;
mod summary;
mod sweep;
mod vocabulary;
mod wordings;

use std::process::ExitCode;

use burn_peft_examples::{allocator, failure};
use clap::Parser;

/// Composed tensor operations allocate and free large buffers all the time; the system allocator maps and unmaps them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    allocator::keep_freed_memory();
    failure::exit_code(run(&cli::Cli::parse()).map(|_| ExitCode::SUCCESS))
}

fn run(cli: &cli::Cli) -> anyhow::Result<()> {
    match &cli.command {
        Some(cli::Command::Pretrain(args)) => pretrain::run(args),
        Some(cli::Command::Sweep(args)) => sweep::run(args),
        None => experiment::run(&cli.experiment),
    }
}
