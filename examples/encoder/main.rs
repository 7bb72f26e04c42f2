//! LoRA on a Burn module of one's own, a BERT encoder: `cargo run --release --example encoder -- --help`.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]
#![allow(unreachable_pub, reason = "a program has no public interface, its modules have")]

mod cli;
mod data;
mod embeddings;
mod encoder;
#[cfg(test)]
mod tests;
mod text;
mod training;
mod weights;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use burn::module::Module;
use burn_peft::{DEFAULT_ADAPTER, LoraConfig, PeftModel};
use burn_peft_examples::arguments::Precision;
use burn_peft_examples::{allocator, failure, output};
use clap::Parser;

use crate::cli::Args;
use crate::data::Data;
use crate::training::Separation;

/// Composed tensor operations allocate and free large buffers all the time; the system allocator maps and unmaps them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    allocator::keep_freed_memory();
    failure::exit_code(run(&Args::parse()).map(|_| ExitCode::SUCCESS))
}

/// The adapter of this example: the linear layers of all blocks, by the names that `BertModel` has.
fn adapter(rank: usize) -> LoraConfig {
    LoraConfig::new(rank)
        .with_lora_alpha(2.0 * rank as f64)
        .with_target_modules(["query", "key", "value", "intermediate.dense", "output.dense"])
        .with_task_type("FEATURE_EXTRACTION")
        .with_key_mapping(weights::names())
}

/// Trains and saves an adapter; returns how well the held-out sentences are told apart before and after.
fn run(args: &Args) -> Result<[Separation; 2]> {
    let start = Instant::now();
    let data = Data::load(args.data.as_deref())?;
    let config = weights::read_config(&args.model)?;
    let tokenizer = text::tokenizer(&args.model, config.max_position_embeddings)?;
    output::make_directory(&args.out)?;

    let device = args.device.open("encoder", Precision::F32)?.autodiff();
    device.seed(args.seed);
    let (mut encoder, unused) = weights::load(&args.model, &config, &device)?;
    println!("base      {} layers, width {}", config.num_hidden_layers, config.hidden_size);
    println!("          in the file and of no use here: {}", unused.join(", "));
    println!("labels    {}", data.labels.join(", "));
    println!("sentences {} to learn from, {} held out", data.learnt.texts.len(), data.held_out.texts.len());

    let name = args.model.display().to_string();
    let report =
        encoder.add_adapter(DEFAULT_ADAPTER, adapter(args.rank).with_base_model_name_or_path(name))?;
    println!("{report}\n{}", encoder.trainable_parameters());

    let base = embeddings::of(&encoder.valid(), &tokenizer, &data.held_out)?;
    let before = Separation::of(base.clone(), &data.held_out.labels);
    println!("before    {before}");
    let encoder = training::train(encoder, &tokenizer, &data.learnt, args)?.valid();
    let adapted = embeddings::of(&encoder, &tokenizer, &data.held_out)?;
    let after = Separation::of(adapted.clone(), &data.held_out.labels);
    println!("after     {after}");

    encoder.save_adapter(DEFAULT_ADAPTER, args.out.join("adapter"))?;
    let file = args.out.join("embeddings.safetensors");
    embeddings::write(&file, &tokenizer, &data.held_out, [base, adapted])?;
    println!("wrote     {} in {:.0} s", args.out.display(), start.elapsed().as_secs_f64());
    Ok([before, after])
}
