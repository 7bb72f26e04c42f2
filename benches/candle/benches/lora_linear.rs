//! The cases of this project's `lora_linear`, in candle. mimalloc is the allocator.
//!
//! `cargo bench --manifest-path benches/candle/Cargo.toml`, beside `cargo bench --bench lora_linear`.

#![allow(clippy::unwrap_used, reason = "a benchmark that cannot go on ends")]

use burn_peft_bench_candle::{LoraLinear, input};
use candle_core::Var;
use divan::Bencher;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Rows, width, rank.
const CASES: [[usize; 3]; 5] =
    [[64, 512, 8], [1024, 512, 8], [64, 2048, 16], [256, 2048, 16], [1024, 2048, 16]];

fn main() {
    divan::main();
}

/// The input requires a gradient, as it does everywhere but in a model's first layer.
#[divan::bench(args = CASES, sample_count = 20)]
fn forward_backward(bencher: Bencher, [n, width, r]: [usize; 3]) {
    let layer = LoraLinear::new(width, r).unwrap();
    let x = Var::from_tensor(&input(n, width).unwrap()).unwrap();
    bencher.bench_local(|| layer.forward(&x).unwrap().sum_all().unwrap().backward().unwrap());
}
