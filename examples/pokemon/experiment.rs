//! The whole experiment: checks, base model, arms, report.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use burn_peft::{DEFAULT_ADAPTER, PeftModel};
use burn_peft_llama::LlamaForCausalLm;

use crate::arms::{self, Arm, ArmResult};
use crate::checks;
use crate::cli::ExperimentArgs;
use crate::data::{self, Split};
use crate::evaluation::{Score, distinct};
use crate::provenance::Provenance;
use crate::report;
use crate::setting::{Setting, Subject};
use crate::summary::Findings;
use burn_peft_examples::command;
use burn_peft_examples::model::adapting;
use burn_peft_examples::model::directory_of_adapter;
use burn_peft_examples::output;

/// Runs the arms of `args` with all its seeds, prints the table and writes the output directory.
pub fn run(args: &ExperimentArgs) -> Result<()> {
    let start = Instant::now();
    // Whatever can be wrong is found before anything takes time.
    let device = args.base.device.open("pokemon", args.base.dtype)?;
    let species = data::load_to_split(args.base.data.as_deref())?;
    let mut first_seed = args.seed.unwrap_or(0);
    let mut split_is_known = true;
    let arms = args.arms();
    let mut args = args.clone();
    if let Some(adapter) = &mut args.adapter {
        *adapter = directory_of_adapter(&adapter)?;
    }
    let args = &args;
    if let Some(dir) = &args.adapter {
        let provenance = Provenance::read(dir)?;
        if let Some(Provenance { seed, .. }) = provenance {
            if args.seed.is_some_and(|given| given != seed) {
                bail!(
                    "`--seed {first_seed}` does not fit `--adapter`: `{}` was trained with seed {seed}\nhint: leave `--seed` out",
                    dir.display()
                );
            }
            first_seed = seed;
        }
        let split = Split::by_family(&species, first_seed)?.fingerprint();
        split_is_known = provenance.is_some_and(|provenance| provenance.split == split);
    }
    checks::precision(args.base.dtype, &arms)?;
    output::make_directory(&args.out)?;
    let subject = Subject::load(&args.base, &device, &species, &arms)?;
    // On copies, which share the weights: the arms begin with the base as it is.
    if let Some(dir) = &args.adapter {
        let load = |model: &mut LlamaForCausalLm| model.load_adapter(DEFAULT_ADAPTER, dir);
        adapting(&mut subject.model.clone(), load).context("`--adapter`")?;
    } else if arms.contains(&Arm::Lora) {
        subject.check(&subject.lora_config(args.rank, &args.lora), "--rank")?;
    }
    if !split_is_known {
        println!(
            "note: which species the adapter was trained on is not known; it may be asked for some of them"
        );
    }
    println!("base model: {}, {}", subject.name, args.base.dtype.name());

    let mut findings = Findings {
        command: command::text("pokemon", std::env::args_os().skip(1)),
        base: subject.name.clone(),
        kind: subject.kind,
        species: (0, 0),
        split_is_known,
        probes: subject.probes.iter().map(|probe| probe.name).collect(),
        before: subject.before.clone(),
        results: Vec::new(),
        earlier_adapters: Vec::new(),
        seconds: 0.0,
    };
    for seed in (0..args.seeds as u64).map(|index| first_seed.wrapping_add(index)) {
        let split = Split::by_family(&species, seed)?;
        let tested = subject.asked(&split);
        let (train, test) = (split.train.len(), split.test.len());
        if split_is_known {
            println!("seed {seed}: {train} species to train on, {tested} of {test} held out are asked for");
        } else {
            println!("seed {seed}: {tested} of {test} species are asked for");
        }
        if findings.results.is_empty() {
            findings.species = (train, tested);
        }
        let setting = Setting { subject: &subject, split, seed };
        for arm in &arms {
            let adapter = args.out.join(adapter_name(seed, first_seed));
            let result = arms::run(*arm, &setting, args, &adapter).with_context(|| arm.title())?;
            println!("{}", line(&result));
            findings.results.push(result);
        }
    }
    findings.earlier_adapters = earlier_adapters(&args.out, &findings.results, first_seed)?;
    findings.seconds = start.elapsed().as_secs_f64();
    report::write(&findings, &args.out)?;
    println!("\n{}", report::table(&findings));
    println!("report: {}, with plots and predictions beside it", args.out.join("report.md").display());
    Ok(())
}

/// One line per finished arm.
fn line(result: &ArmResult) -> String {
    let exact = Score::of(&result.outcomes, |one| one.exact);
    format!(
        "{:>24}: {:.1} % exact, {} distinct answers, in {}",
        result.arm.title(),
        100.0 * exact.share(),
        distinct(&result.outcomes),
        report::duration(result.seconds)
    )
}

/// The first seed's adapter is `adapter`.
fn adapter_name(seed: u64, first_seed: u64) -> String {
    if seed == first_seed { "adapter".into() } else { format!("{OTHER_SEED}{seed}") }
}

const OTHER_SEED: &str = "adapter-seed-";

/// Names of the adapters in `out` that are not of this run. They may have taken long, so none is removed.
fn earlier_adapters(out: &Path, results: &[ArmResult], first_seed: u64) -> Result<Vec<String>> {
    let trained = results.iter().filter(|result| result.arm == Arm::Lora);
    let own: Vec<String> = trained.map(|result| adapter_name(result.seed, first_seed)).collect();
    let mut names = Vec::new();
    for entry in fs::read_dir(out).with_context(|| format!("`{}` cannot be read", out.display()))? {
        let name = entry?.file_name().display().to_string();
        let of_a_run = name == "adapter"
            || name.strip_prefix(OTHER_SEED).is_some_and(|seed| seed.parse::<u64>().is_ok());
        if of_a_run && !own.contains(&name) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::Parser;

    use super::*;
    use crate::base::Base;
    use crate::cli::Cli;
    use crate::data::Species;
    use burn_peft_examples::failure;

    /// What `pokemon` does with these words after it.
    fn pokemon(arguments: &[&str]) -> Result<()> {
        crate::run(&Cli::try_parse_from([&["pokemon"], arguments].concat()).unwrap())
    }

    /// The rows of predictions.csv: seed, arm, species, truth, answer, and what is right about it.
    fn predictions(dir: &Path) -> Vec<Vec<String>> {
        let rows = csv::Reader::from_path(dir.join("predictions.csv")).unwrap().into_records();
        rows.map(|row| row.unwrap().iter().map(String::from).collect()).collect()
    }

    /// The rows of one arm without its name.
    fn of_arm(rows: &[Vec<String>], arm: Arm) -> Vec<Vec<String>> {
        let of_arm = rows.iter().filter(|row| row[1] == arm.to_string());
        of_arm.map(|row| [&row[..1], &row[2..]].concat()).collect()
    }

    #[test]
    fn all_arms_run_and_the_saved_adapter_gives_the_same_answers() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
        let (data, out, again) = (path("species.csv"), path("out"), path("again"));
        // Nine whole families of one to three species.
        let species: Vec<Species> = data::load(None).unwrap()[..24].to_vec();
        let mut file = csv::Writer::from_path(&data).unwrap();
        species.iter().for_each(|one| file.serialize(one).unwrap());
        file.flush().unwrap();

        // A rate at which two steps change the answers.
        let training = ["--epochs", "1", "--full-epochs", "1", "--learning-rate", "1e-2", "--warmup", "0"];
        let arguments = ["--data", &data, "--limit", "4", "--shots", "2", "--seed", "3"];
        pokemon(&[&arguments[..], &training, &["--out", &out]].concat()).unwrap();

        let out = Path::new(&out);
        let report = fs::read_to_string(out.join("report.md")).unwrap();
        let rows = predictions(out);
        assert_eq!(rows.len(), 4 * Arm::ALL.len());
        let mut asked = BTreeSet::new();
        for arm in Arm::ALL {
            assert!(report.contains(&format!("| {} |", arm.title())), "{arm} in {report}");
            let rows = of_arm(&rows, arm);
            asked.insert(rows.iter().map(|row| row[1].clone()).collect::<Vec<_>>());
            for row in rows {
                let one = species.iter().find(|one| one.name == row[1]).unwrap();
                assert_eq!((&*row[0], &row[2]), ("3", &one.answer()));
            }
        }
        assert_eq!(asked.len(), 1, "all arms are asked for the same species: {asked:?}");
        for plot in ["accuracy.png", "forgetting.png", "loss.png"] {
            let bytes = fs::read(out.join(plot)).unwrap();
            assert!(bytes.starts_with(b"\x89PNG") && bytes.len() > 10_000, "{plot}");
        }
        let files = ["accuracy.png", "adapter", "forgetting.png", "loss.png", "metrics.json"];
        let names = fs::read_dir(out).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        assert_eq!(
            names.collect::<BTreeSet<_>>(),
            files.into_iter().chain(["predictions.csv", "report.md"]).map(String::from).collect()
        );

        assert!(!report.contains("earlier run"), "{report}");

        // The seed of the split is not given: the adapter's directory knows it.
        let adapter = out.join("adapter");
        let saved =
            ["--data", &data, "--limit", "4", "--adapter", adapter.to_str().unwrap(), "--out", &again];
        pokemon(&saved).unwrap();
        let lora = of_arm(&rows, Arm::Lora);
        assert_eq!(of_arm(&predictions(Path::new(&again)), Arm::Adapter), lora);
        assert_ne!(lora, of_arm(&rows, Arm::ZeroShot), "training changed nothing");
        let known = |dir: &str| {
            let report = fs::read_to_string(Path::new(dir).join("report.md")).unwrap();
            report.contains("that it was not fine-tuned on")
        };
        assert!(known(&again));

        // The output layer of this base is tied to the embedding, and an adapter of it trains and loads all the same.
        let head = path("head");
        let arguments =
            ["--data", &data, "--limit", "2", "--seed", "3", "--arms", "lora", "--targets", "lm_head"];
        pokemon(&[&arguments[..], &training[..2], &["--out", &head]].concat()).unwrap();
        let adapter = Path::new(&head).join("adapter");
        let config = fs::read_to_string(adapter.join("adapter_config.json")).unwrap();
        assert!(config.contains("\"lm_head\""), "{config}");
        let arguments = ["--data", &data, "--limit", "2", "--adapter", adapter.to_str().unwrap()];
        let read = path("read");
        pokemon(&[&arguments[..], &["--out", &read]].concat()).unwrap();
        let trained = of_arm(&predictions(Path::new(&head)), Arm::Lora);
        assert_eq!(of_arm(&predictions(Path::new(&read)), Arm::Adapter), trained);

        let error = pokemon(&[&saved[..], &["--seed", "5"]].concat()).unwrap_err().to_string();
        assert!(error.contains("`--seed 5`") && error.contains("with seed 3"), "{error}");
        pokemon(&[&saved[..], &["--seed", "3"]].concat()).unwrap();

        // With other species the same seed holds out others: the adapter was trained on some of them.
        let mut file = csv::Writer::from_path(&data).unwrap();
        species[..21].iter().for_each(|one| file.serialize(one).unwrap());
        file.flush().unwrap();
        pokemon(&saved).unwrap();
        assert!(!known(&again));
    }

    #[test]
    fn a_base_that_pretrain_made_is_used_as_the_embedded_one() {
        let dir = tempfile::tempdir().unwrap();
        let run = |name: &str, model: &[&str]| {
            let out = dir.path().join(name);
            for adapter in ["adapter", "adapter-seed-7", "adapter-of-mine"] {
                fs::create_dir_all(out.join(adapter)).unwrap();
            }
            let arguments = ["--arms", "zero-shot", "--limit", "2", "--out", out.to_str().unwrap()];
            pokemon(&[&arguments, model].concat()).unwrap();
            let metrics = fs::read_to_string(out.join("metrics.json")).unwrap();
            let metrics: serde_json::Value = serde_json::from_str(&metrics).unwrap();
            let report = fs::read_to_string(out.join("report.md")).unwrap();
            assert!(report.contains("`adapter/`, `adapter-seed-7/`: of an earlier run"), "{report}");
            let told = ["kind", "probes", "before"].map(|key| metrics[key].clone());
            (told, predictions(&out))
        };
        let copy = Base::new(None).unwrap();
        let (told, predicted) = run("copy", &["--model", copy.path().to_str().unwrap()]);
        assert_eq!(told[1].as_array().unwrap().len(), 3);
        assert_eq!((told, predicted), run("embedded", &[]));
    }

    #[test]
    fn what_cannot_work_is_refused_before_anything_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
        let (data, out) = (path("species.csv"), path("out"));
        let broken = path("broken.csv");
        for (file, second) in [(&data, "B"), (&broken, "A")] {
            let rows = format!("1,A,Fire,,1,A\n2,{second},Fire,,1,A\n");
            fs::write(file, format!("number,name,primary,secondary,generation,family\n{rows}")).unwrap();
        }
        for (arguments, expected) in [
            (&["--dtype", "f16"][..], &["f16", "hint: choose `--dtype f32`", "`--arms zero-shot"][..]),
            (&["--dtype", "f16", "--arms", "lora,full"], &["f16", "`--arms"]),
            (
                &["--data", &data],
                &["species.csv`: expected", "found 1, the largest is `A` with 2 of all 2", "hint:"],
            ),
            (&["--data", &broken], &["error: `", "broken.csv`: line 3: `A` is there twice", "hint:"]),
            (&["--adapter", &out], &["adapter_config.json", "`--adapter`"]),
        ] {
            let error = pokemon(&[arguments, &["--out", &out]].concat()).unwrap_err();
            let text = failure::text(&error);
            for expected in expected {
                assert!(text.contains(expected), "{expected} in {text}");
            }
            assert!(!Path::new(&out).exists(), "{arguments:?}");
        }
        let text = pokemon(&["--rank", "257", "--out", &out]).unwrap_err().to_string();
        assert!(text.contains("`--rank 257`: expected at most 256"), "{text}");
    }
}
