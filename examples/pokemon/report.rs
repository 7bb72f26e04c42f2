//! What a person reads: the table on the terminal, and the files of the output directory.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;

use crate::arms::Arm;
use crate::base::Kind;
use crate::evaluation::{Outcome, Score};
use crate::forgetting::forgotten;
use crate::plots;
use crate::summary::{Findings, Row, Spread};
use burn_peft_examples::output;

/// The share from which a text says that a model does something.
const MOST: f64 = 0.5;

/// The table of the arms, as cells: the first row is the head. `name` gives the title of a probe's column.
fn cells(findings: &Findings, name: impl Fn(&'static str) -> &'static str) -> Vec<Vec<String>> {
    let mut head: Vec<String> =
        ["arm", "exact", "95 % interval", "any type", "in order", "answers"].map(String::from).to_vec();
    head.extend(findings.probes.iter().map(|probe| name(probe).to_string()));
    head.push("time".into());
    let article = has_article(findings);
    if article {
        head.push("the article*".into());
    }

    let mut before = vec![String::new(); head.len()];
    before[0] = "base, before training".into();
    for (index, score) in findings.before.iter().enumerate() {
        before[6 + index] = percent(score.share());
    }
    let mut table = vec![head];
    let any_trained = findings.rows().iter().any(|row| row.trained);
    if any_trained {
        table.push(before);
    }
    for row in findings.rows() {
        let (low, high) = row.exact.interval;
        let mut line = vec![
            row.arm.title().into(),
            spread(&row.exact),
            format!("{:.1} - {:.1} %", 100.0 * low, 100.0 * high),
            percent(row.any.mean),
            percent(row.ordered.mean),
            format!("{:.0}", row.distinct),
        ];
        line.extend(row.abilities.iter().map(|score| {
            if any_trained && !row.trained { "as before".into() } else { percent(score.share()) }
        }));
        line.push(duration(row.seconds));
        if article {
            line.push(row.arm.article().unwrap_or("").into());
        }
        table.push(line);
    }
    table
}

/// Whether the original article has something to compare with.
fn has_article(findings: &Findings) -> bool {
    findings.results.iter().any(|result| result.arm.article().is_some())
}

/// Seconds or minutes, to three digits.
pub fn duration(seconds: f64) -> String {
    match seconds {
        ..9.95 => format!("{seconds:.1} s"),
        ..119.5 => format!("{seconds:.0} s"),
        _ => format!("{:.1} min", seconds / 60.0),
    }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// Mean, and the range where there is one.
fn spread(value: &Spread) -> String {
    if value.lowest == value.highest {
        return percent(value.mean);
    }
    format!("{:.1} % ({:.1} - {:.1})", 100.0 * value.mean, 100.0 * value.lowest, 100.0 * value.highest)
}

const ARTICLE: &str = "* measured by the original article on Llama-3.2-1B-Instruct with its own data and scoring, not on this base model";

/// The table for a terminal.
pub fn table(findings: &Findings) -> String {
    // A terminal is not wide: the first word has to do.
    let name = |probe: &'static str| probe.split(' ').next().unwrap_or(probe);
    let table = cells(findings, name);
    let width = |column: usize| table.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..table[0].len()).map(width).collect();
    let mut text = String::new();
    for (index, row) in table.iter().enumerate() {
        for (column, cell) in row.iter().enumerate() {
            let pad = " ".repeat(widths[column] - cell.chars().count());
            let (before, after) = if column == 0 { ("", pad.as_str()) } else { (pad.as_str(), "") };
            let _ =
                write!(text, "{before}{cell}{after}{}", if column + 1 == row.len() { "\n" } else { "  " });
        }
        if index == 0 {
            let _ = writeln!(text, "{}", "─".repeat(widths.iter().sum::<usize>() + 2 * (widths.len() - 1)));
        }
    }
    let shown: Vec<_> = findings.probes.iter().map(|probe| name(probe)).collect();
    let _ = writeln!(
        text,
        "{}: other abilities of the base, right answers ({})",
        shown.join(", "),
        findings.probes.join(", ")
    );
    if has_article(findings) {
        let _ = writeln!(text, "{ARTICLE}");
    }
    text
}

/// Writes report.md, the plots, predictions.csv and metrics.json into `dir`.
pub fn write(findings: &Findings, dir: &Path) -> Result<()> {
    plots::write(findings, dir)?;
    output::write(&dir.join("predictions.csv"), predictions(findings)?)?;
    output::write(&dir.join("metrics.json"), metrics(findings)?)?;
    // Last, because it speaks of the others.
    output::write(&dir.join("report.md"), markdown(findings))
}

fn predictions(findings: &Findings) -> Result<Vec<u8>> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(["seed", "arm", "species", "truth", "answer", "exact", "any", "ordered"])?;
    for result in &findings.results {
        for one in &result.outcomes {
            writer.write_record([
                &result.seed.to_string(),
                &result.arm.to_string(),
                &one.species,
                &one.truth,
                &one.answer,
                &one.exact.to_string(),
                &one.any.to_string(),
                &one.ordered.to_string(),
            ])?;
        }
    }
    Ok(writer.into_inner()?)
}

/// All numbers, without the single predictions.
fn metrics(findings: &Findings) -> Result<String> {
    let mut value = serde_json::to_value(findings)?;
    if let Some(results) = value.get_mut("results").and_then(|results| results.as_array_mut()) {
        for result in results.iter_mut().filter_map(|result| result.as_object_mut()) {
            result.remove("outcomes");
        }
    }
    value["arms"] = serde_json::to_value(findings.rows())?;
    Ok(format!("{value:#}\n"))
}

fn markdown(findings: &Findings) -> String {
    let rows = findings.rows();
    let mut text = String::from("# The Pokémon experiment\n\n");
    let seeds =
        findings.results.iter().map(|result| result.seed).collect::<std::collections::BTreeSet<_>>().len();
    let _ = writeln!(
        text,
        "Base model: {}. {} {} in {}, with\n\n```sh\n{}\n```\n",
        findings.base,
        held_out(findings),
        if seeds == 1 { "One seed".into() } else { format!("{seeds} seeds") },
        duration(findings.seconds),
        findings.command,
    );
    for (index, row) in cells(findings, |probe| probe).iter().enumerate() {
        let _ = writeln!(text, "| {} |", row.join(" | ").replace('*', "\\*"));
        if index == 0 {
            let _ = writeln!(text, "|---{}|", "|--:".repeat(row.len() - 1));
        }
    }
    text.push('\n');
    if has_article(findings) {
        let _ = writeln!(text, "\\{ARTICLE}.\n");
    }
    text.push_str(&reading(findings, &rows));
    text.push_str("\n## Accuracy on held-out species\n\n![Accuracy by arm](accuracy.png)\n");
    if rows.iter().any(|row| row.trained) {
        text.push_str("\n## Other abilities, before and after\n\n![Forgetting by arm](forgetting.png)\n");
    }
    if findings.results.iter().any(|result| result.training.is_some()) {
        text.push_str("\n## Training\n\n![Loss curves](loss.png)\n\n");
        for result in &findings.results {
            if let Some(training) = &result.training {
                let _ = writeln!(
                    text,
                    "- seed {}, {}: {}; {} steps in {}, {:.2} s a step; {}",
                    result.seed,
                    result.arm.title(),
                    training.settings,
                    training.steps,
                    duration(training.seconds),
                    training.seconds / training.steps.max(1) as f64,
                    training.trainable
                );
            }
        }
    }
    text.push_str("\nEvery answer is in `predictions.csv`, every number in `metrics.json`");
    text.push_str(if rows.iter().any(|row| row.arm == Arm::Lora) {
        "; `adapter/` has the adapter of the first seed in PEFT's format.\n"
    } else {
        ".\n"
    });
    if !findings.earlier_adapters.is_empty() {
        let names: Vec<String> = findings.earlier_adapters.iter().map(|name| format!("`{name}/`")).collect();
        let _ = writeln!(text, "\n{}: of an earlier run.", names.join(", "));
    }
    text
}

fn held_out(findings: &Findings) -> String {
    let (trained, asked) = findings.species;
    if findings.split_is_known {
        format!(
            "The model is asked for the types of {asked} species that it was not fine-tuned on; no member of their evolution families is among the {trained} it was fine-tuned on."
        )
    } else {
        format!(
            "The model is asked for the types of {asked} species. Which species this adapter was trained on is not known: there may be some of these among them."
        )
    }
}

/// How the columns are to be read, and what they come to.
fn reading(findings: &Findings, rows: &[Row]) -> String {
    let mut text =
        String::from("- **exact**: the types that the answer names are exactly the true ones, in any order");
    text.push_str(if findings.results.iter().any(|result| result.seed != findings.results[0].seed) {
        "; mean and range over the seeds. The interval is Wilson's, all seeds together; a species may be held out by several seeds, which makes it somewhat narrow.\n"
    } else {
        ". The interval is Wilson's.\n"
    });
    let _ = writeln!(
        text,
        "- **any type**: at least one true type is named. **in order**: exact, and the first type first. **answers**: number of distinct answers; the truth has {}.",
        findings.distinct_truths()
    );
    if findings.kind == Kind::Pretrained {
        text.push_str(&pretraining(findings, rows));
    } else {
        text.push_str("- **general knowledge**: twenty sentences such as `The capital of France is`.\n");
    }
    let is_there = |arm: Arm| rows.iter().any(|row| row.arm == arm);
    if is_there(Arm::Careless) {
        text.push_str("- The careless rate of full fine-tuning is what torch's AdamW has as its default.");
        text.push_str(if is_there(Arm::Full) {
            " Nothing else is different between both arms of full fine-tuning. `pokemon sweep` finds rates.\n"
        } else {
            "\n"
        });
    }
    let trained: Vec<&Row> = rows.iter().filter(|row| row.trained).collect();
    if trained.len() > 1 {
        let told: Vec<String> = trained
            .iter()
            .map(|row| {
                let points = 100.0 * forgotten(&findings.before, &row.abilities);
                format!("{}: {points:.1} points", row.arm.title())
            })
            .collect();
        let _ = writeln!(text, "- Forgotten, mean over these columns: {}.", told.join("; "));
    }
    text
}

/// What pretraining has to do with the results. With `--data` the base is asked about species that it may never have
/// read of: only what this run's numbers bear out is said.
fn pretraining(findings: &Findings, rows: &[Row]) -> String {
    let [generation, number, sentences] = findings.before[..] else { return String::new() };
    let mut text = format!(
        "- The other columns ask what pretraining was about, of {} species: conversations about generation and number, and sentences that end with the type. No conversation in pretraining is about types.\n",
        sentences.total
    );
    let chat = Score::pooled([generation, number]).share();
    let mut prompting = rows.iter().filter(|row| matches!(row.arm, Arm::ZeroShot | Arm::FewShot)).peekable();
    if chat >= MOST && prompting.peek().is_some() && prompting.all(|row| row.exact.mean < MOST) {
        let _ = writeln!(
            text,
            "- Prompting does not fail because the base cannot follow the chat format: before training the base answers {} of the questions about generation and number, which are conversations as well.",
            percent(chat)
        );
    }
    let habit = |arm: Arm, has_it: fn(&Outcome) -> bool| {
        let share = Score::of(findings.of(arm).flat_map(|result| &result.outcomes), has_it).share();
        (share >= MOST).then(|| percent(share))
    };
    if let Some(share) = habit(Arm::ZeroShot, |one| one.answer.parse::<u32>().is_ok()) {
        let _ = writeln!(
            text,
            "- Zero-shot, {share} of the answers are a number: conversations in pretraining were about numbers."
        );
    }
    if let Some(share) = habit(Arm::FewShot, |one| one.answer == one.species) {
        let _ = writeln!(
            text,
            "- Few-shot, {share} of the answers repeat the name: pretraining had conversations that repeat names."
        );
    }
    let share = percent(sentences.share());
    let _ = if sentences.share() >= MOST {
        writeln!(
            text,
            "- Before training the base ends {share} of the sentences with the right type. Types are in the pretraining text, one wording of it close to the answer's form: a high score shows that what is stored can be elicited, not that types can be inferred."
        )
    } else {
        writeln!(
            text,
            "- Before training the base ends only {share} of the sentences with the right type: for most of these species nothing is stored that fine-tuning could elicit."
        )
    };
    text
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::summary::tests::findings;

    #[test]
    fn the_table_has_an_aligned_line_per_arm() {
        let text = table(&findings());
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2 + 1 + 5 + 2);
        let widths: std::collections::BTreeSet<_> =
            lines[..8].iter().map(|line| line.chars().count()).collect();
        assert_eq!(widths.len(), 1, "{text}");
        assert!(lines[7].starts_with("LoRA") && lines[7].contains("77.5 % (75.0 - 80.0)"), "{text}");
        assert!(lines[7].contains("67.21 %") && lines[9].contains("Llama-3.2-1B-Instruct"), "{text}");
    }

    #[test]
    fn the_directory_has_report_plots_predictions_and_metrics() {
        let dir = tempfile::tempdir().unwrap();
        write(&findings(), dir.path()).unwrap();
        for name in
            ["report.md", "accuracy.png", "forgetting.png", "loss.png", "predictions.csv", "metrics.json"]
        {
            assert!(fs::metadata(dir.path().join(name)).unwrap().len() > 100, "{name}");
        }
        let rows = csv::Reader::from_path(dir.path().join("predictions.csv")).unwrap().into_records();
        let rows: Vec<_> = rows.map(Result::unwrap).collect();
        assert_eq!(rows.len(), 10 * 40);
        assert_eq!(&rows[0][4], "Water, \"maybe\"");
        let metrics: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(dir.path().join("metrics.json")).unwrap()).unwrap();
        assert_eq!(metrics["arms"][4]["exact"]["mean"], 0.775);
        assert!(metrics["results"][0].get("outcomes").is_none());
    }

    #[test]
    fn the_report_says_what_was_forgotten() {
        let text = markdown(&findings());
        assert!(
            text.contains("full, careless rate: 90.3 points; full fine-tuning: 3.7 points; LoRA: 4.0 points"),
            "{text}"
        );
        assert!(text.contains("not on this base model") && text.contains("pokemon --seeds 2"));
        assert!(text.contains("what pretraining was about, of 100 species"), "{text}");
    }

    #[test]
    fn what_is_said_of_the_base_is_what_it_did() {
        let mut findings = findings();
        let text = markdown(&findings);
        for said in
            ["the base answers 99.0 % of the questions", "ends 99.0 % of the sentences", "elicited, not"]
        {
            assert!(text.contains(said), "{said} in {text}");
        }
        assert!(!text.contains("of the answers"), "{text}");

        for result in &mut findings.results {
            for one in result.outcomes.iter_mut().skip(10) {
                one.answer = if result.arm == Arm::ZeroShot { "25".into() } else { one.species.clone() };
            }
        }
        let text = markdown(&findings);
        let zero_shot = "Zero-shot, 75.0 % of the answers are a number";
        let few_shot = "Few-shot, 75.0 % of the answers repeat the name";
        assert!(text.contains(zero_shot) && text.contains(few_shot), "{text}");

        // Invented species: the base knows nothing of them.
        findings.before = vec![Score { hits: 3, total: 100 }; 3];
        let text = markdown(&findings);
        assert!(text.contains("ends only 3.0 % of the sentences"), "{text}");
        for unsaid in ["Prompting does not fail", "elicited, not"] {
            assert!(!text.contains(unsaid), "{unsaid} in {text}");
        }
    }

    #[test]
    fn only_what_was_run_is_spoken_of() {
        let mut findings = findings();
        let full = markdown(&findings);
        for said in ["Prompting does not fail", "torch's AdamW", "the article"] {
            assert!(full.contains(said), "{said} in {full}");
        }
        let mut prompting = findings.clone();
        prompting.results.truncate(2);
        let text = table(&prompting);
        assert!(text.contains("98.0 %") && !text.contains("before") && !text.contains("LoRA"), "{text}");

        findings.results.retain(|result| result.arm == Arm::Lora);
        for result in &mut findings.results {
            result.arm = Arm::Adapter;
        }
        let text = markdown(&findings) + &table(&findings);
        for unsaid in ["Prompting does not fail", "torch's AdamW", "the article", "original"] {
            assert!(!text.contains(unsaid), "{unsaid} in {text}");
        }
    }

    #[test]
    fn durations_have_three_digits_at_most() {
        let texts = [0.04, 9.94, 9.96, 119.0, 120.0, 1600.0].map(duration);
        assert_eq!(texts, ["0.0 s", "9.9 s", "10 s", "119 s", "2.0 min", "26.7 min"]);
    }

    #[test]
    fn seeds_are_spoken_of_where_there_are_several() {
        let mut findings = findings();
        assert!(markdown(&findings).contains("mean and range over the seeds"));
        findings.results.truncate(5);
        let text = markdown(&findings);
        assert!(text.contains("One seed") && !text.contains("all seeds together"), "{text}");
    }
}
