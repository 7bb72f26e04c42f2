//! Training steps with LoRA and DoRA, and a single layer forward and backward, each case in a process of its own: seconds,
//! memory, page faults.
//!
//! `cargo bench --bench training_step` prints a table. With a case, such as `-- --case mid --steps 10`, it prints one line
//! of JSON, which is what `benches/python/compare.py` and `benches/gpu/report.py` put beside torch and peft. mimalloc is the
//! allocator, with the settings of the environment. Built with a feature for GPUs, it runs on the device that `BURN_DEVICE`
//! names, or that Burn prefers.

use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use burn::tensor::{Device, FloatDType};
use burn_peft_benches::layer::{LAYERS, Layer};
use burn_peft_benches::process::{Process, median};
use burn_peft_benches::training::{Kind, SHAPES, Training, dtype};
use clap::Parser;
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Steps before the clock starts: threads, tables and the optimizer's state are made.
const WARM_UP: usize = 2;

#[derive(Parser)]
struct Options {
    /// One case: a shape, with `-dora` behind it for DoRA, or `-apply-lora` for Burn's own adapters; or a layer
    #[arg(long)]
    case: Option<String>,
    /// Steps that are measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Sequences, instead of those of the shape
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    sequences: Option<u32>,
    /// Labelled tokens of each sequence, instead of those of the shape
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    labelled: Option<u32>,
    /// Tokens of each sequence, instead of those of the shape
    #[arg(long, value_parser = clap::value_parser!(u32).range(2..))]
    tokens: Option<u32>,
    /// Rank of the adapters, instead of that of the shape
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rank: Option<u32>,
    /// Computes each block a second time instead of keeping what it computed
    #[arg(long)]
    gradient_checkpointing: bool,
    /// Measures the products with frozen weights alone instead of steps
    #[arg(long)]
    floor: bool,
    /// Measures the parts of a step as well, in steps of their own: the loss, its gradients, the update
    #[arg(long, conflicts_with = "floor")]
    parts: bool,
    /// How the frozen weights are stored
    #[arg(long, default_value = "f32", value_parser = dtype)]
    dtype: FloatDType,
    /// Prints the shapes of all cases as JSON
    #[arg(long)]
    shapes: bool,
    /// What `cargo bench` gives every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let run = match &options.case {
        _ if options.shapes => {
            let layers = LAYERS.iter().map(|layer| json!(layer));
            print(&layers.chain(SHAPES.iter().map(|shape| json!(shape))).collect::<Value>().to_string());
            Ok(())
        }
        Some(case) => measure(case, &options).map(|found| print(&found.to_string())),
        None => table(options.steps),
    };
    match run {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            print(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::print_stdout, reason = "what a benchmark is for")]
fn print(text: &str) {
    println!("{text}");
}

fn measure(case: &str, options: &Options) -> Result<Value> {
    if let Some(named) = LAYERS.iter().find(|layer| layer.name == case) {
        let mut layer = Layer::new(named.case, options.dtype);
        return Ok(match options.floor {
            true => json!({ "case": case, "floor_seconds": layer.floor() }),
            false => repeat(case, options.steps, || layer.step()),
        });
    }
    let ends = [("-dora", Kind::Dora), ("-apply-lora", Kind::ApplyLora)];
    let mut of_end = ends.iter().filter_map(|(end, kind)| Some((case.strip_suffix(end)?, *kind)));
    let (name, kind) = of_end.next().unwrap_or((case, Kind::Lora));
    let Some(shape) = SHAPES.iter().find(|shape| shape.name == name) else {
        let names = SHAPES.iter().map(|shape| shape.name).chain(LAYERS.iter().map(|layer| layer.name));
        bail!("there is no case `{name}`; there are {}", names.collect::<Vec<_>>().join(", "));
    };
    let mut shape = *shape;
    let chosen = [
        (&mut shape.batch[0], options.sequences),
        (&mut shape.labelled, options.labelled),
        (&mut shape.rank, options.rank),
    ];
    for (of_shape, chosen) in chosen {
        *of_shape = chosen.map_or(*of_shape, |chosen| chosen as usize);
    }
    shape.batch[1] = options.tokens.map_or(shape.batch[1], |tokens| tokens as usize);
    let mut training = Training::new(shape, kind, options.dtype);
    if options.floor {
        return Ok(json!({ "case": case, "floor_seconds": training.floor() }));
    }
    training.set_gradient_checkpointing(options.gradient_checkpointing);
    let mut found = repeat(case, options.steps, || training.step());
    if options.parts {
        let each: Vec<[f64; 3]> = (0..options.steps).map(|_| training.parts()).collect();
        let middle = |part: usize| median(&each.iter().map(|parts| parts[part]).collect::<Vec<_>>());
        found["parts"] = json!({ "forward": middle(0), "backward": middle(1), "update": middle(2) });
    }
    Ok(found)
}

/// Measures steps after a few others.
fn repeat(case: &str, steps: u32, mut step: impl FnMut() -> f64) -> Value {
    let weights = Process::now();
    Process::forget_peak();
    for _ in 0..WARM_UP {
        step();
    }
    let begin = Process::now();
    let (mut seconds, mut loss) = (vec![], 0.0);
    let mut of_device = None;
    for _ in 0..steps {
        let start = Instant::now();
        loss = step();
        seconds.push(start.elapsed().as_secs_f64());
        of_device = of_device.max(Device::default().memory_pool_usage().map(|usage| usage.bytes_reserved));
    }
    let end = Process::now();
    let mib = |kib: u64| kib as f64 / 1024.0;
    json!({
        "case": case,
        "seconds": median(&seconds),
        "all_seconds": seconds,
        "peak_mib": mib(end.peak_kib.saturating_sub(weights.resident_kib)),
        "weights_mib": mib(weights.resident_kib),
        // The most that a GPU's memory pools held after a step, the weights with it. Not known of the CPU.
        "device_mib": of_device.map(|bytes| mib(bytes / 1024)),
        "faults_per_step": (end.minor_faults - begin.minor_faults) / u64::from(steps),
        "loss": loss,
    })
}

fn table(steps: u32) -> Result<()> {
    let program = std::env::current_exe().context("the path of this program")?;
    print("case               s/step  tokens/s  MiB above weights  page faults/step");
    let shapes = SHAPES.iter().filter(|shape| !shape.is_for_gpus).map(|shape| shape.name);
    for case in shapes.chain(["mid-dora", "mid-apply-lora"]) {
        let output = Command::new(&program)
            .args(["--case", case, "--steps", &steps.to_string()])
            .output()
            .with_context(|| format!("starting {}", program.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let found: Value = serde_json::from_str(&text).with_context(|| format!("`{case}` gave: {text}"))?;
        let shape = SHAPES
            .iter()
            .find(|shape| shape.name == case.trim_end_matches("-dora").trim_end_matches("-apply-lora"));
        let tokens = shape.map_or(0, |shape| shape.batch[0] * shape.batch[1]);
        let number = |name: &str| found[name].as_f64().unwrap_or(f64::NAN);
        print(&format!(
            "{case:17}  {:6.3}  {:8.0}  {:17.0}  {:16.0}",
            number("seconds"),
            tokens as f64 / number("seconds"),
            number("peak_mib"),
            number("faults_per_step")
        ));
    }
    Ok(())
}
