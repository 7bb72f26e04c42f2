//! The sweep: learning rates and ranks against accuracy and forgetting, for LoRA and for full fine-tuning.

use std::collections::BTreeSet;
use std::fmt;
use std::fmt::Write as _;
use std::time::Instant;

use anyhow::{Context, Result};
use burn_peft_examples::{command, output};
use burn_peft_llama::LlamaError;
use serde::Serialize;

use crate::arms::Arm;
use crate::checks;
use crate::cli::SweepArgs;
use crate::data::{self, Split};
use crate::evaluation::Score;
use crate::forgetting::forgotten;
use crate::report::duration;
use crate::setting::{Setting, Subject};

mod plots;

/// How far below the best accuracy a learning rate still counts as a good one.
const GOOD: f64 = 0.02;

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// All weights.
    Full,
    /// An adapter.
    Lora {
        /// Its rank.
        rank: usize,
    },
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full => f.write_str("full fine-tuning"),
            Self::Lora { rank } => write!(f, "LoRA r {rank}"),
        }
    }
}

/// One training.
#[derive(Clone, Debug, Serialize)]
struct Trial {
    method: Method,
    learning_rate: f64,
    seed: u64,
    /// Answers that name exactly the right types.
    exact: Score,
    /// The other abilities afterwards, in the order of the probes.
    abilities: Vec<Score>,
    /// Of the answers of held-out species, at the end; no number if the training diverged.
    held_out_loss: f64,
    seconds: f64,
}

/// One method at one learning rate: means over the seeds, as shares of 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Point {
    pub method: Method,
    pub learning_rate: f64,
    pub exact: f64,
    pub forgotten: f64,
}

impl Point {
    /// Other abilities that are left: all of them is 1.
    pub fn kept(&self) -> f64 {
        1.0 - self.forgotten
    }

    /// At least as good in both, and better in one.
    fn dominates(&self, other: &Self) -> bool {
        self.exact >= other.exact
            && self.forgotten <= other.forgotten
            && (self.exact > other.exact || self.forgotten < other.forgotten)
    }
}

/// The points that no other is better than in both, from the one that keeps least to the one that keeps most.
pub fn frontier<'a>(points: impl IntoIterator<Item = &'a Point>) -> Vec<Point> {
    let points: Vec<&Point> = points.into_iter().collect();
    let is_best = |one: &&&Point| !points.iter().any(|other| other.dominates(one));
    let mut best: Vec<Point> = points.iter().filter(is_best).map(|point| **point).collect();
    best.sort_by(|a, b| a.kept().total_cmp(&b.kept()));
    best
}

/// What a method is capable of.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Best {
    method: Method,
    /// The most of both: accuracy minus what is forgotten. Of several, the one with the lowest rate.
    best: Point,
    /// The learning rates around the most accurate one whose accuracy is at most [`GOOD`] below its: the lowest and the
    /// highest without a worse one in between.
    good: (f64, f64),
    /// Whether a lower and a higher rate were worse.
    is_bounded: bool,
}

impl Best {
    fn of(method: Method, points: &[Point]) -> Option<Self> {
        let mut own: Vec<Point> = points.iter().filter(|point| point.method == method).copied().collect();
        // `max_by` takes the last of equal ones.
        own.sort_by(|a, b| b.learning_rate.total_cmp(&a.learning_rate));
        let both = |point: &Point| point.exact - point.forgotten;
        let best = *own.iter().max_by(|a, b| both(a).total_cmp(&both(b)))?;
        let (middle, top) = own.iter().enumerate().max_by(|(_, a), (_, b)| a.exact.total_cmp(&b.exact))?;
        let is_good = |point: &&Point| point.exact >= top.exact - GOOD;
        let lowest = own[middle..].iter().take_while(is_good).last()?.learning_rate;
        let highest = own[..=middle].iter().rev().take_while(is_good).last()?.learning_rate;
        let is_bounded = own.first()?.learning_rate > highest && own.last()?.learning_rate < lowest;
        Some(Self { method, best, good: (lowest, highest), is_bounded })
    }

    /// The middle of the good rates, on a logarithmic scale.
    fn middle(&self) -> f64 {
        (self.good.0 * self.good.1).sqrt()
    }
}

/// All that came out.
#[derive(Clone, Debug, Serialize)]
pub struct Findings {
    command: String,
    base: String,
    probes: Vec<&'static str>,
    before: Vec<Score>,
    trials: Vec<Trial>,
    seconds: f64,
}

impl Findings {
    /// The methods, full fine-tuning first, then by rank.
    pub fn methods(&self) -> Vec<Method> {
        self.trials.iter().map(|trial| trial.method).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Means over the seeds, by method and learning rate.
    pub fn points(&self) -> Vec<Point> {
        let mut points: Vec<Point> = Vec::new();
        for trial in &self.trials {
            let is_same = |method: Method, rate: f64| method == trial.method && rate == trial.learning_rate;
            if points.iter().any(|point| is_same(point.method, point.learning_rate)) {
                continue;
            }
            let of_point = self.trials.iter().filter(|other| is_same(other.method, other.learning_rate));
            let count = of_point.clone().count() as f64;
            let mean = |value: &dyn Fn(&Trial) -> f64| of_point.clone().map(value).sum::<f64>() / count;
            points.push(Point {
                method: trial.method,
                learning_rate: trial.learning_rate,
                exact: mean(&|trial| trial.exact.share()),
                forgotten: mean(&|trial| forgotten(&self.before, &trial.abilities)),
            });
        }
        points.sort_by(|a, b| a.method.cmp(&b.method).then(a.learning_rate.total_cmp(&b.learning_rate)));
        points
    }

    fn bests(&self) -> Vec<Best> {
        let points = self.points();
        self.methods().into_iter().filter_map(|method| Best::of(method, &points)).collect()
    }
}

const TABLE: &str = "sweep.csv";
const REPORT: &str = "sweep.md";

/// What is trained: each method at each of its learning rates, once.
fn plan(args: &SweepArgs) -> Vec<(Method, f64)> {
    let full = args.full_learning_rates.iter().map(|rate| (Method::Full, *rate));
    let lora = args
        .ranks
        .iter()
        .flat_map(|rank| args.learning_rates.iter().map(|rate| (Method::Lora { rank: *rank }, *rate)));
    let mut plan: Vec<(Method, f64)> = Vec::new();
    for one in full.chain(lora) {
        if !plan.contains(&one) {
            plan.push(one);
        }
    }
    plan
}

/// Trains with each learning rate and rank of `args`, and writes the output directory: the table after each training, so
/// that what was computed is not lost, report and plots at the end.
pub fn run(args: &SweepArgs) -> Result<()> {
    let start = Instant::now();
    let device = args.base.device.open("pokemon", args.base.dtype)?;
    let species = data::load_to_split(args.base.data.as_deref())?;
    let arms = [Arm::Full, Arm::Lora];
    checks::precision(args.base.dtype, &arms)?;
    output::make_directory(&args.out)?;
    for file in [TABLE, REPORT, plots::FRONTIER, plots::RATES] {
        output::remove(&args.out.join(file))?;
    }
    let subject = Subject::load(&args.base, &device, &species, &arms)?;
    for rank in &args.ranks {
        subject.check(&subject.lora_config(*rank, &args.lora), "--ranks")?;
    }
    let plan = plan(args);
    let total = plan.len() * args.seeds;
    println!("base model: {}, {} trainings", subject.name, total);

    let mut findings = Findings {
        command: command::text("pokemon", std::env::args_os().skip(1)),
        base: subject.name.clone(),
        probes: subject.probes.iter().map(|probe| probe.name).collect(),
        before: subject.before.clone(),
        trials: Vec::new(),
        seconds: 0.0,
    };
    for seed in (0..args.seeds as u64).map(|index| args.seed.wrapping_add(index)) {
        let setting = Setting { subject: &subject, split: Split::by_family(&species, seed)?, seed };
        for (method, learning_rate) in &plan {
            let trial = trial(&setting, args, *method, *learning_rate)
                .with_context(|| format!("{method}, learning rate {learning_rate:e}"))?;
            println!(
                "{:>3}/{total}  {:<16}  lr {:<5}  seed {seed}  {:>5.1} % exact  {:>5.1} points forgotten  {}{}",
                findings.trials.len() + 1,
                method.to_string(),
                format!("{learning_rate:e}"),
                100.0 * trial.exact.share(),
                100.0 * forgotten(&findings.before, &trial.abilities),
                duration(trial.seconds),
                if trial.held_out_loss.is_finite() { "" } else { "  diverged" },
            );
            findings.trials.push(trial);
            output::write(&args.out.join(TABLE), table(&findings)?)?;
        }
    }
    findings.seconds = start.elapsed().as_secs_f64();
    plots::write(&findings, &args.out)?;
    output::write(&args.out.join(REPORT), markdown(&findings))?;
    println!("\n{}", summary(&findings));
    println!("report: {}, with plots and the table beside it", args.out.join(REPORT).display());
    Ok(())
}

fn trial(setting: &Setting<'_>, args: &SweepArgs, method: Method, learning_rate: f64) -> Result<Trial> {
    let start = Instant::now();
    let subject = setting.subject;
    let mut settings = args.training.settings(learning_rate, args.epochs);
    settings.eval_every = Some(usize::MAX);
    let title = method.to_string();
    let trained = match method {
        Method::Full => setting.full(&settings, &title),
        Method::Lora { rank } => setting.lora(&subject.lora_config(rank, &args.lora), &settings, &title),
    };
    let (exact, abilities, held_out_loss) = match trained {
        Ok(trained) => {
            let outcomes = setting.evaluate(&trained.model, &subject.prompt, &title)?;
            let loss = trained.training.held_out.last().map_or(f64::NAN, |point| point.loss);
            (Score::of(&outcomes, |one| one.exact), subject.probe(&trained.model)?, loss)
        }
        // A rate that is too high is what a sweep is there to find.
        Err(error) if matches!(error.downcast_ref(), Some(LlamaError::NotFinite { .. })) => {
            let none = |total| Score { hits: 0, total };
            let abilities = subject.before.iter().map(|score| none(score.total)).collect();
            (none(subject.asked(&setting.split)), abilities, f64::NAN)
        }
        Err(error) => return Err(error),
    };
    let (seed, seconds) = (setting.seed, start.elapsed().as_secs_f64());
    Ok(Trial { method, learning_rate, seed, exact, abilities, held_out_loss, seconds })
}

/// A row for each training.
fn table(findings: &Findings) -> Result<Vec<u8>> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    let mut head = ["method", "rank", "learning_rate", "seed", "exact"].map(String::from).to_vec();
    head.extend(findings.probes.iter().map(|probe| (*probe).to_string()));
    head.extend(["forgotten", "held_out_loss", "seconds"].map(String::from));
    writer.write_record(head)?;
    for trial in &findings.trials {
        let (method, rank) = match trial.method {
            Method::Full => ("full", String::new()),
            Method::Lora { rank } => ("lora", rank.to_string()),
        };
        let mut row = vec![method.to_string(), rank, format!("{:e}", trial.learning_rate)];
        row.extend([trial.seed.to_string(), trial.exact.share().to_string()]);
        row.extend(trial.abilities.iter().map(|score| score.share().to_string()));
        row.push(forgotten(&findings.before, &trial.abilities).to_string());
        row.extend([format!("{:.5}", trial.held_out_loss), format!("{:.1}", trial.seconds)]);
        writer.write_record(row)?;
    }
    Ok(writer.into_inner()?)
}

/// The best of each method, and how their learning rates compare.
fn summary(findings: &Findings) -> String {
    let bests = findings.bests();
    let mut text = String::new();
    for Best { method, best, good, .. } in &bests {
        let _ = writeln!(
            text,
            "- {method}: best at {:e}, {:.1} % exact and {:.1} points forgotten; accuracy within {:.0} points of the highest from {:e} to {:e}",
            best.learning_rate,
            100.0 * best.exact,
            100.0 * best.forgotten,
            100.0 * GOOD,
            good.0,
            good.1,
        );
    }
    if let [Best { method: Method::Full, .. }, lora @ ..] = &bests[..]
        && !lora.is_empty()
        && bests.iter().all(|best| best.is_bounded)
    {
        let times: Vec<String> = lora
            .iter()
            .map(|best| format!("{:.1} times ({})", best.middle() / bests[0].middle(), best.method))
            .collect();
        let _ = writeln!(
            text,
            "- By accuracy alone, the middle of these rates of LoRA is {} the middle of those of full fine-tuning.",
            times.join(", ")
        );
    }
    text
}

fn markdown(findings: &Findings) -> String {
    let mut text = format!(
        "# Learning rates and ranks\n\nBase model: {}. {} trainings in {}, with\n\n```sh\n{}\n```\n\n",
        findings.base,
        findings.trials.len(),
        duration(findings.seconds),
        findings.command
    );
    text.push_str(&summary(findings));
    text.push_str("\n## Accuracy and what is kept\n\nEach point is a learning rate; the lines join those that no other of their kind is better than in both.\n\n![Frontiers](frontier.png)\n");
    text.push_str("\n## By learning rate\n\n![By learning rate](rates.png)\n\n");
    text.push_str("| method | learning rate | exact | forgotten, points |\n|---|--:|--:|--:|\n");
    for point in findings.points() {
        let _ = writeln!(
            text,
            "| {} | {:e} | {:.1} % | {:.1} |",
            point.method,
            point.learning_rate,
            100.0 * point.exact,
            100.0 * point.forgotten
        );
    }
    let _ = writeln!(
        text,
        "\n**exact**: answers that name exactly the right types of a species that was not trained on. **forgotten**: right answers that are missing, mean over {}. Every training is in `sweep.csv`.",
        findings.probes.join(", ")
    );
    text
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    fn point(method: Method, learning_rate: f64, exact: f64, forgotten: f64) -> Point {
        Point { method, learning_rate, exact, forgotten }
    }

    const RANK_4: Method = Method::Lora { rank: 4 };

    /// Two seeds of full fine-tuning and of one rank.
    pub(super) fn findings() -> Findings {
        let score = |hits| Score { hits, total: 100 };
        let trial = |method, learning_rate, seed, exact, left| Trial {
            method,
            learning_rate,
            seed,
            exact: score(exact),
            abilities: vec![score(left), score(100)],
            held_out_loss: 0.5,
            seconds: 10.0,
        };
        let mut trials = Vec::new();
        for seed in [0, 1] {
            let more = usize::from(seed == 1);
            trials.extend([
                trial(RANK_4, 1e-4, seed, 40, 100),
                trial(RANK_4, 1e-3, seed, 97 + more, 100),
                trial(RANK_4, 1e-2, seed, 96 + more, 80),
                trial(Method::Full, 1e-5, seed, 60, 100),
                trial(Method::Full, 1e-4, seed, 97, 90),
                trial(Method::Full, 1e-3, seed, 70, 0),
            ]);
        }
        Findings {
            command: "pokemon sweep".into(),
            base: "the embedded base".into(),
            probes: vec!["one", "two"],
            before: vec![score(100), score(100)],
            trials,
            seconds: 120.0,
        }
    }

    #[test]
    fn points_are_means_over_the_seeds_in_order() {
        let points = findings().points();
        let order: Vec<(Method, f64)> =
            points.iter().map(|point| (point.method, point.learning_rate)).collect();
        assert_eq!(
            order,
            [
                (Method::Full, 1e-5),
                (Method::Full, 1e-4),
                (Method::Full, 1e-3),
                (RANK_4, 1e-4),
                (RANK_4, 1e-3),
                (RANK_4, 1e-2)
            ]
        );
        assert_eq!((points[4].exact, points[4].forgotten), (0.975, 0.0));
        assert_eq!(points[2].forgotten, 0.5);
    }

    #[test]
    fn the_frontier_is_what_nothing_is_better_than_in_both() {
        let full = |exact, forgotten| point(Method::Full, 1e-4, exact, forgotten);
        let points = [full(0.9, 0.5), full(0.8, 0.1), full(0.7, 0.1), full(0.85, 0.5), full(0.2, 0.0)];
        assert_eq!(frontier(&points), [points[0], points[1], points[4]]);
        // Two that are the same are both on it.
        assert_eq!(frontier(&[points[0], points[0]]).len(), 2);
    }

    #[test]
    fn good_rates_are_the_neighbours_of_the_best() {
        let bests = findings().bests();
        assert_eq!(bests.iter().map(|best| best.good).collect::<Vec<_>>(), [(1e-4, 1e-4), (1e-3, 1e-2)]);
        assert_eq!(bests[1].best.learning_rate, 1e-3);
        let text = summary(&findings());
        assert!(text.contains("LoRA r 4: best at 1e-3, 97.5 % exact and 0.0 points forgotten"), "{text}");
        assert!(!text.contains("times"), "LoRA's good rates end where the sweep ends: {text}");
        let mut wider = findings();
        let worst =
            Trial { learning_rate: 1e-1, exact: Score { hits: 0, total: 100 }, ..wider.trials[2].clone() };
        wider.trials.push(worst);
        let text = summary(&wider);
        assert!(text.contains("is 31.6 times (LoRA r 4)"), "{text}");

        // A rate that is good on the other side of a bad one is none of its neighbours.
        let points =
            [(1e-5, 1.0), (1e-4, 0.5), (1e-3, 1.0)].map(|(rate, exact)| point(RANK_4, rate, exact, 0.0));
        assert_eq!(Best::of(RANK_4, &points).unwrap().good, (1e-5, 1e-5));
        assert_eq!(Best::of(Method::Full, &points), None);
    }

    /// A file of a few whole families.
    fn few_species(dir: &Path) -> PathBuf {
        let path = dir.join("species.csv");
        let mut file = csv::Writer::from_path(&path).unwrap();
        data::load(None).unwrap()[..24].iter().for_each(|one| file.serialize(one).unwrap());
        file.flush().unwrap();
        path
    }

    #[test]
    fn a_sweep_leaves_a_table_plots_and_a_report() {
        let dir = tempfile::tempdir().unwrap();
        let (data, out) = (few_species(dir.path()), dir.path().join("out"));
        let arguments = ["--ranks", "2", "--learning-rates", "1e-3,1e-2", "--full-learning-rates", "1e-3"];
        let (data, out_text) = (data.to_str().unwrap(), out.to_str().unwrap());
        let where_ = ["--data", data, "--limit", "4", "--epochs", "1", "--out", out_text];
        let cli = Cli::try_parse_from([&["pokemon", "sweep"][..], &arguments, &where_].concat()).unwrap();
        crate::run(&cli).unwrap();
        let rows = csv::Reader::from_path(out.join("sweep.csv")).unwrap().into_records();
        let rows: Vec<Vec<String>> =
            rows.map(|row| row.unwrap().iter().map(String::from).collect()).collect();
        let named: Vec<(&str, &str, &str)> = rows.iter().map(|row| (&*row[0], &*row[1], &*row[2])).collect();
        assert_eq!(named, [("full", "", "1e-3"), ("lora", "2", "1e-3"), ("lora", "2", "1e-2")]);
        assert!(rows.iter().all(|row| row[9].parse::<f64>().unwrap() > 0.0), "{rows:?}");
        let report = std::fs::read_to_string(out.join("sweep.md")).unwrap();
        assert!(report.contains("3 trainings") && report.contains("| LoRA r 2 | 1e-2 |"), "{report}");
        for plot in ["frontier.png", "rates.png"] {
            assert!(std::fs::read(out.join(plot)).unwrap().starts_with(b"\x89PNG"), "{plot}");
        }
    }

    #[test]
    fn a_rate_that_diverges_is_a_result_and_doubles_are_trained_once() {
        let dir = tempfile::tempdir().unwrap();
        let (data, out) = (few_species(dir.path()), dir.path().join("out"));
        let (data, out_text) = (data.to_str().unwrap(), out.to_str().unwrap());
        let rates = ["--ranks", "2,2", "--learning-rates", "1e-3", "--full-learning-rates", "1e30,1e30"];
        let more = ["--data", data, "--limit", "4", "--epochs", "4", "--warmup", "0", "--out", out_text];
        let cli = Cli::try_parse_from([&["pokemon", "sweep"][..], &rates, &more].concat()).unwrap();
        crate::run(&cli).unwrap();
        let table = std::fs::read_to_string(out.join("sweep.csv")).unwrap();
        let rows: Vec<Vec<&str>> = table.lines().skip(1).map(|line| line.split(',').collect()).collect();
        assert_eq!(rows.iter().map(|row| row[0]).collect::<Vec<_>>(), ["full", "lora"], "{table}");
        assert_eq!((rows[0][4], rows[0][8], rows[0][9]), ("0", "1", "NaN"), "{table}");
        let report = std::fs::read_to_string(out.join("sweep.md")).unwrap();
        assert!(!report.contains("By accuracy alone"), "one rate says nothing of a range: {report}");
    }

    #[test]
    fn a_rank_above_the_width_is_refused_before_anything_is_trained() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().to_str().unwrap();
        let cli = Cli::try_parse_from(["pokemon", "sweep", "--ranks", "4,257", "--out", out]).unwrap();
        let text = crate::run(&cli).unwrap_err().to_string();
        assert!(text.contains("`--ranks 257`: expected at most 256"), "{text}");
        assert_eq!(std::fs::read_dir(out).unwrap().count(), 0);
    }
}
