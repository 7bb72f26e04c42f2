//! Tokens per second while answers are written: `cargo bench --bench generation`. A model of SmolLM2-135M's shape with
//! random weights goes on from prompts of 103 tokens with 64 more, greedily, one prompt at a time and eight. Each line is
//! JSON. `benches/python/answers.py` measures the same in transformers.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use burn::tensor::FloatDType;
use burn_peft_benches::process::{Process, median};
use burn_peft_benches::training::{SHAPES, dtype};
use burn_peft_llama::GenerateOptions;
use clap::Parser;
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const PROMPT: usize = 103;
const ANSWER: usize = 64;

#[derive(Parser)]
struct Options {
    /// Prompts at a time
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    batch: Option<u32>,
    /// How the weights are stored
    #[arg(long, default_value = "f32", value_parser = dtype)]
    dtype: FloatDType,
    /// How many times the answers are written
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// What `cargo bench` gives every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let batches = options.batch.map_or(vec![1, 8], |batch| vec![batch]);
    for batch in batches {
        match measure(batch as usize, options.dtype, options.rounds) {
            Ok(found) => print(&found.to_string()),
            Err(error) => {
                print(&format!("error: {error:#}"));
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

#[expect(clippy::print_stdout, reason = "what a benchmark is for")]
fn print(text: &str) {
    println!("{text}");
}

fn measure(batch: usize, dtype: FloatDType, rounds: u32) -> Result<Value> {
    let shape = SHAPES.iter().find(|shape| shape.name == "smol").context("there is no shape `smol`")?;
    let mut model = shape.model(dtype);
    // No token ends an answer.
    model.config_mut().eos_token_ids.clear();
    let token = |row: usize, i: usize| ((row * 7919 + i * 104_729) % shape.vocabulary) as u32;
    let prompts: Vec<Vec<u32>> = (0..batch).map(|row| (0..PROMPT).map(|i| token(row, i)).collect()).collect();
    let options = GenerateOptions::new().with_max_new_tokens(ANSWER);
    model.generate(&prompts, &options.clone().with_max_new_tokens(2))?;
    let weights = Process::now();
    Process::forget_peak();
    let mut seconds = vec![];
    for _ in 0..rounds {
        let start = Instant::now();
        model.generate(&prompts, &options)?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    let peak = Process::now().peak_kib.saturating_sub(weights.resident_kib);
    Ok(json!({
        "case": format!("generate-{batch}"),
        "seconds": median(&seconds),
        "tokens_per_second": (batch * ANSWER) as f64 / median(&seconds),
        "peak_mib": peak as f64 / 1024.0,
    }))
}
