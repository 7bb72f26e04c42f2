//! The whole experiment: checks, base model, arms, report.
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use burn::tensor::{DType, Device};
use burn_peft::{DEFAULT_ADAPTER, PeftModel};
use burn_peft_llama::{LlamaForCausalLm, Tokenizer};

use crate::arms::{Arm, ArmResult, Setting, lora_config};
use crate::base::Base;
use crate::cli::{ExperimentArgs, Precision};
use crate::data::{self, Split};
use crate::evaluation::{Score, distinct};
use crate::forgetting::Probe;
use crate::output;
use crate::prompt::{Prompt, default_system};
use crate::provenance::Provenance;
use crate::report;
use crate::summary::Findings;

/// Runs the arms of `args` with all its seeds, prints the table and writes the output directory.
pub fn run(args: &ExperimentArgs) -> Result<()> {
    let start = Instant::now();
    // Whatever can be wrong is found before anything takes time.
    let device = args.device.open()?;
    let species = data::load(args.data.as_deref())?;
    let lora = lora_config(args)?;
    let mut first_seed = args.seed;
    let mut split_is_known = true;
    let arms = if let Some(dir) = &args.adapter {
        check_adapter(dir)?;
        if args.seeds > 1 {
            bail!("an adapter was trained on one split\nhint: leave `--seeds` out beside `--adapter`");
        }
        match Provenance::read(dir)? {
            Some(provenance) => first_seed = provenance.seed,
            None => split_is_known = false,
        }
        vec![Arm::Adapter]
    } else {
        args.arms.clone()
    };
    output::make_directory(&args.out)?;
    let base = Base::new(args.model.as_deref())?;
    let tokenizer = Tokenizer::load(base.path())?;
    let system = args.system.clone().unwrap_or_else(|| default_system(base.is_embedded()));
    let prompt = Prompt::new(system);
    tokenizer
        .encode_prompt(&prompt.question(&species[0]))
        .context("the model cannot be asked in conversations")?;

    let training_device = device.autodiff();
    let model = load(&base, args.dtype, &training_device)?;
    // On copies, which share the weights: the arms begin with the base as it is.
    if let Some(dir) = &args.adapter {
        model.clone().load_adapter(DEFAULT_ADAPTER, dir).context("`--adapter`")?;
    } else if arms.contains(&Arm::Lora) {
        model.clone().add_adapter(DEFAULT_ADAPTER, &lora).context("`--targets`")?;
    }
    println!("base model: {}, {} on {:?}", base.name(), args.dtype.name(), args.device);
    let probes = if base.is_embedded() {
        Probe::of_the_embedded_base(&species, 0)
    } else {
        Probe::of_general_knowledge()
    };

    let mut findings = Findings {
        command: command(),
        base: base.name(),
        embedded: base.is_embedded(),
        species: (0, 0),
        split_is_known,
        probes: probes.iter().map(|probe| probe.name).collect(),
        before: Vec::new(),
        results: Vec::new(),
        seconds: 0.0,
    };
    for seed in (0..args.seeds as u64).map(|index| first_seed.wrapping_add(index)) {
        let split = Split::by_family(&species, seed);
        let tested = args.limit.unwrap_or(usize::MAX).min(split.test.len());
        println!(
            "seed {seed}: {} species to train on, {tested} of {} held out are asked for",
            split.train.len(),
            split.test.len()
        );
        if findings.results.is_empty() {
            findings.species = (split.train.len(), tested);
        }
        let setting = Setting {
            args,
            base: &model,
            tokenizer: &tokenizer,
            device: &training_device,
            prompt: prompt.clone(),
            probes: &probes,
            split,
            seed,
        };
        if findings.before.is_empty() {
            findings.before = setting.probe(&model)?;
        }
        for arm in &arms {
            let result = setting.run(*arm, &adapter_dir(args, seed)).with_context(|| arm.title())?;
            println!("{}", line(&result));
            findings.results.push(result);
        }
    }
    findings.seconds = start.elapsed().as_secs_f64();
    report::write(&findings, &args.out)?;
    println!("\n{}", report::table(&findings));
    println!("report, plots, predictions and adapter: {}", args.out.join("report.md").display());
    Ok(())
}

/// One line per finished arm.
fn line(result: &ArmResult) -> String {
    let exact = Score::of(&result.outcomes, |one| one.exact);
    format!(
        "{:>24}: {:.1} % exact, {} distinct answers, in {:.0} s",
        result.arm.title(),
        100.0 * exact.share(),
        distinct(&result.outcomes),
        result.seconds
    )
}

/// The first seed's adapter is `adapter`.
fn adapter_dir(args: &ExperimentArgs, seed: u64) -> PathBuf {
    args.out.join(if seed == args.seed { "adapter".into() } else { format!("adapter-seed-{seed}") })
}

fn check_adapter(dir: &Path) -> Result<()> {
    if !dir.join("adapter_config.json").is_file() {
        bail!(
            "`{}` has no `adapter_config.json`\nhint: `--adapter` takes a directory in PEFT's format, such as `out/pokemon/adapter`",
            dir.display()
        );
    }
    Ok(())
}

fn load(base: &Base, precision: Precision, device: &Device) -> Result<LlamaForCausalLm> {
    let dtype = match precision {
        Precision::F32 => DType::F32,
        Precision::Bf16 => DType::BF16,
        Precision::F16 => DType::F16,
    };
    Ok(LlamaForCausalLm::from_pretrained_as(base.path(), device, dtype.into())?)
}

/// What the user ran, as it can be run again.
fn command() -> String {
    let mut words = vec!["cargo run --release --example pokemon".to_string()];
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if !arguments.is_empty() {
        words.push("--".into());
    }
    words.extend(
        arguments.into_iter().map(|word| if word.contains(' ') { format!("'{word}'") } else { word }),
    );
    words.join(" ")
}
