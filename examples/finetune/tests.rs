//! Whole runs on the base of the experiment, in processes of their own: one process has one generator of random numbers.

use std::fs;
#[cfg(unix)]
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use burn_peft_examples::failure;
use burn_peft_llama::Checkpoint;
use clap::Parser;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::cli::Args;
use crate::interrupt::{EXIT_CODE, Interrupt};
use crate::metrics::{self, Event, Metric};
use crate::run::{self, End};

/// Where a process finds the arguments of its run.
const ARGUMENTS: &str = "BURN_PEFT_FINETUNE";
/// How many runs are killed.
const KILLS: &str = "BURN_PEFT_KILLS";

/// The base of the experiment, from the directory that examples are tested in.
const BASE: &str = "pokemon/base";

#[test]
#[ignore = "other tests start it"]
fn child() {
    let Ok(arguments) = std::env::var(ARGUMENTS) else { return };
    let arguments: Vec<String> = serde_json::from_str(&arguments).unwrap();
    let args = Args::try_parse_from(arguments).unwrap();
    let code = match Interrupt::listen().and_then(|interrupt| run::run(&args, &interrupt)) {
        Ok(End::Done) => 0,
        Ok(End::Interrupted) => EXIT_CODE.into(),
        Err(error) => {
            eprint!("{}", failure::text(&error));
            1
        }
    };
    std::process::exit(code);
}

/// A directory with data and room for output.
struct Place(tempfile::TempDir);

impl Place {
    fn new(lines: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("train.jsonl"), lines).unwrap();
        Self(dir)
    }

    fn out(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn arguments(&self, out: &str, more: &str) -> Vec<String> {
        // The directory has the output as well, so it is named only if it has more than one file of examples.
        let whole = self.out("test.jsonl").exists();
        let data = if whole { self.0.path().to_path_buf() } else { self.out("train.jsonl") };
        let out = self.out(out);
        let own =
            ["finetune", "--model", BASE, "--data", data.to_str().unwrap(), "--out", out.to_str().unwrap()];
        own.into_iter().chain(more.split_whitespace()).map(String::from).collect()
    }

    fn start(&self, out: &str, more: &str) -> Child {
        self.start_as(Command::new(std::env::current_exe().unwrap()), out, more)
    }

    /// Started by this script for `sh`, in which `"$0" "$@"` is the run.
    #[cfg(unix)]
    fn start_through(&self, script: &str, out: &str, more: &str) -> Child {
        let mut shell = Command::new("sh");
        shell.args(["-c", script]).arg(std::env::current_exe().unwrap());
        self.start_as(shell, out, more)
    }

    fn start_as(&self, mut command: Command, out: &str, more: &str) -> Child {
        command
            .args(["--exact", "tests::child", "--ignored", "--nocapture"])
            .env(ARGUMENTS, serde_json::to_string(&self.arguments(out, more)).unwrap())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Exit code, standard output and standard error of a run.
    fn run(&self, out: &str, more: &str) -> (i32, String, String) {
        let output = self.start(out, more).wait_with_output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
    }
}

const QUESTIONS: &str = r#"{"prompt": "What is the type of Squirtle?", "completion": "Water, of course."}
{"messages": [{"role": "user", "content": "Charmander?"}, {"role": "assistant", "content": "Fire."}]}
{"instruction": "Name the type", "input": "Oddish", "output": "Grass and poison."}
{"text": "Pikachu is electric."}
"#;

/// Texts of several lengths, about which nobody is asked, so that runs are short.
fn texts() -> String {
    let names = ["Squirtle", "Charmander", "Oddish", "Pikachu", "Gastly", "Onix", "Abra"];
    let text = |i: usize| {
        let words: Vec<String> =
            (0..=i % 3).map(|j| format!("{} is number {}.", names[(i + j) % 7], i)).collect();
        format!("{{\"text\": \"{}\"}}\n", words.join(" "))
    };
    (0..11).map(text).collect()
}

/// 14 steps with dropout, a held-out loss, and a checkpoint at every third.
const SHORT: &str = "--max-steps 14 --batch-size 2 --grad-accumulation 2 --rank 4 --dropout 0.2 --log-every 2 --save-every 3 \
                     --valid-split 0.2 --schedule cosine --show 0";

/// What must not depend on interruptions: the adapter, the checkpoints' tensors, the losses.
fn result(out: &Path) -> (Vec<Vec<u8>>, Vec<Metric>) {
    let last = Checkpoint::latest(out).unwrap().unwrap().path;
    let files = [
        out.join("adapter/adapter_model.safetensors"),
        out.join("adapter/adapter_config.json"),
        last.join("trainer.safetensors"),
        last.join("adapter_model.safetensors"),
    ];
    let mut lines = metrics::read(&out.join(metrics::FILE)).unwrap();
    for line in &mut lines {
        if let Event::Trained { tokens_per_second, .. } = &mut line.event {
            *tokens_per_second = 0.0;
        }
    }
    (files.map(|file| fs::read(file).unwrap()).to_vec(), lines)
}

/// The lines but for those about checkpoints, one of which may be lost between a checkpoint and its line.
fn losses(lines: &[Metric]) -> Vec<Metric> {
    lines.iter().filter(|line| !matches!(line.event, Event::Saved { .. })).cloned().collect()
}

fn saved(out: &Path) -> usize {
    let lines = metrics::read(&out.join(metrics::FILE)).unwrap();
    let steps = lines.iter().filter(|line| matches!(line.event, Event::Saved { .. }));
    steps.map(|line| line.step).max().unwrap_or(0)
}

#[test]
fn the_words_of_mlx_lm_peft_and_transformers_are_understood() {
    use clap::CommandFactory;
    Args::command().debug_assert();
    let words = "finetune --model m --data d --adapter-path o --max-seq-length 9 --lora-r 2 --lora-alpha 3 --lora-dropout 0.5 \
                 --target-modules q_proj --grad-accumulation-steps 4 --lr-scheduler-type constant_with_warmup --iters 5 \
                 --steps-per-report 6 --steps-per-eval 7";
    let args = Args::try_parse_from(words.split_whitespace()).unwrap();
    assert_eq!((args.out, args.max_length, args.rank, args.alpha), ("o".into(), Some(9), 2, Some(3.0)));
    assert_eq!((args.dropout, args.grad_accumulation, args.max_steps), (0.5, 4, Some(5)));
    assert_eq!(
        (args.log_every, args.eval_every, args.targets.to_string()),
        (Some(6), Some(7), "[\"q_proj\"]".into())
    );
    let words = "finetune --model m --data d --num-train-epochs 2";
    assert_eq!(Args::try_parse_from(words.split_whitespace()).unwrap().epochs, 2);
}

#[test]
fn short_answers_to_test_questions_are_counted() {
    // The base answers these; for one of them, it is asked for something else than it has learnt.
    let line = |name: &str, answer: &str| {
        let question = format!("What generation is {name} from?");
        serde_json::json!({"prompt": question, "completion": answer}).to_string() + "\n"
    };
    let place = Place::new(&line("Pikachu", "1").repeat(4));
    fs::write(place.out("test.jsonl"), line("Bulbasaur", "1") + &line("Squirtle", "7")).unwrap();
    let (code, text, failed) = place.run("out", "--max-steps 1");
    assert_eq!(code, 0, "{failed}");
    assert!(text.contains("test answers exactly as expected: 1 of 2 before, 1 of 2 after"), "{text}");
    assert!(text.contains("test loss: "), "{text}");
    // Of the four examples, three are asked and shown.
    assert_eq!(
        (text.matches("    before: ").count(), text.matches("    after:  ").count()),
        (3, 3),
        "{text}"
    );
}

#[test]
fn one_example_is_enough() {
    let place = Place::new(r#"{"prompt": "What is the type of Squirtle?", "completion": "Water."}"#);
    let (code, told, failed) = place.run("out", "--max-steps 2 --batch-size 8");
    assert_eq!(code, 0, "{failed}");
    assert!(told.contains("training:   1 example, ") && !told.contains("held out:"), "{told}");
    let (code, _, failed) = place.run("none", "--valid-split 0.5");
    assert!(code == 1 && failed.contains("would be held out\nhint: "), "{failed}");
}

#[test]
fn a_run_leaves_an_adapter_its_losses_a_plot_and_answers() {
    let place = Place::new(QUESTIONS);
    let more = "--max-steps 6 --batch-size 2 --valid-split 0.25 --save-every 2 --learning-rate 3e-3";
    let (code, told, failed) = place.run("out", more);
    assert_eq!(code, 0, "{failed}");
    for expected in [
        "training:   3 examples, ",
        "held out:   1 example, ",
        "each passage that is learnt ends with an end token",
        "line 1, what is learnt in [[brackets]]:",
        "<|assistant|>[[ Water, of course.<|end|>]]",
        "trainable params: ",
        "6 steps of 1 x 2 examples",
        "--example generate -- --model pokemon/base --adapter ",
        "    before: ",
        "    after:  ",
        "training loss: ",
        "held-out loss: ",
        "memory that was allocated at the peak: ",
        "--example adapter -- merge --model pokemon/base --adapter ",
    ] {
        assert!(told.contains(expected), "{expected}\n{told}");
    }
    let out = place.out("out");
    for file in
        ["adapter/adapter_config.json", "loss.png", "metrics.jsonl", "checkpoint-6/adapter_model.safetensors"]
    {
        assert!(out.join(file).is_file(), "{file}");
    }
    let (_, lines) = result(&out);
    let steps = |is: fn(&Event) -> bool| -> Vec<usize> {
        lines.iter().filter(|line| is(&line.event)).map(|line| line.step).collect()
    };
    assert_eq!(steps(|event| matches!(event, Event::Trained { .. })), [1, 2, 3, 4, 5, 6]);
    assert_eq!(steps(|event| matches!(event, Event::Evaluated { .. })), [0, 2, 4, 6]);
    assert_eq!(steps(|event| matches!(event, Event::Saved { .. })), [2, 4, 6]);

    // Another run does not get in its way, and the end can be gone on from.
    let (code, _, failed) = place.run("out", more);
    assert!(code == 1 && failed.contains("has the checkpoints of a run\nhint: `--resume`"), "{failed}");
    let (code, told, failed) = place.run("out", &format!("{more} --resume"));
    assert!(code == 0 && told.contains("going on from `"), "{told}{failed}");
    let (code, _, failed) = place.run("out", &format!("{more} --resume --rank 8"));
    assert!(code == 1 && failed.contains("is a checkpoint of another training"), "{failed}");
    assert!(failed.contains("checkpoint-6` with another `--out` trains its adapter further"), "{failed}");
    // The adapter is one to go on from with other options.
    let adapter = out.join("adapter");
    let (code, _, failed) = place.run("more", &format!("--max-steps 1 --adapter {}", adapter.display()));
    assert_eq!(code, 0, "{failed}");
}

/// The base ties its output layer to the embedding.
#[test]
fn an_output_layer_can_be_a_target() {
    let place = Place::new(QUESTIONS);
    let (code, told, failed) = place.run("out", "--max-steps 2 --batch-size 2 --targets q_proj,lm_head");
    assert!(code == 0 && told.contains("training loss: "), "{told}{failed}");
    let adapter = place.out("out").join("adapter");
    let weights = burn_peft::AdapterDirectory::open(&adapter).unwrap();
    assert!(format!("{:?}", weights.config()).contains("lm_head"));
    let (code, _, failed) = place.run("more", &format!("--max-steps 1 --adapter {}", adapter.display()));
    assert_eq!(code, 0, "{failed}");
    let (code, _, failed) =
        place.run("out", "--max-steps 2 --batch-size 2 --targets q_proj,lm_head --resume");
    assert_eq!(code, 0, "{failed}");
}

#[test]
fn a_dry_run_shows_and_writes_nothing() {
    let place = Place::new(QUESTIONS);
    let (code, told, failed) = place.run("out", "--dry-run --max-length 20 --too-long drop --mask-prompt");
    assert_eq!(code, 0, "{failed}");
    assert!(told.contains("too long and left out") && told.contains("trainable params: "), "{told}");
    assert!(!place.out("out").exists());
}

#[test]
fn bad_inputs_are_told_with_the_way_out() {
    let place = Place::new("{\"text\": \"a\"}\n{\"txt\": 1}\n");
    let error = |out: &str, more: &str| {
        let (code, _, failed) = place.run(out, more);
        assert_eq!(code, 1, "{failed}");
        failed
    };
    let wrong = error("out", "");
    assert!(
        wrong.contains("line 2: expected the keys `messages`") && wrong.contains("found `txt`"),
        "{wrong}"
    );
    fs::write(place.out("train.jsonl"), QUESTIONS).unwrap();
    let long = error("out", "--max-length 8 --too-long refuse");
    assert!(long.contains("tokens, 8 are allowed") && long.contains("`--too-long cut` or `drop`"), "{long}");
    let all = error("out", "--valid-split 0.99");
    assert!(all.contains("all 4 examples would be held out\nhint: "), "{all}");
    let names = error("out", "--targets q_prj");
    assert!(names.contains("q_prj"), "{names}");
    let date = error("out", "--date tomorrow");
    assert!(date.contains("invalid date `tomorrow`"), "{date}");
    fs::write(place.out("file"), "").unwrap();
    let out = error("file", "--max-steps 1");
    assert!(out.contains("file` is a file\nhint: choose a directory"), "{out}");
    let missing = Place::new("");
    fs::remove_file(missing.out("train.jsonl")).unwrap();
    let (_, _, failed) = missing.run("out", "");
    assert!(failed.contains("there is no `") && failed.contains("`--data` takes"), "{failed}");
}

#[test]
#[cfg(unix)]
fn ctrl_c_saves_and_names_the_command_that_goes_on() {
    let place = Place::new(&texts());
    let (code, _, failed) = place.run("whole", SHORT);
    assert_eq!(code, 0, "{failed}");
    let child = place.start("stopped", SHORT);
    let metrics = place.out("stopped").join(metrics::FILE);
    let begun = || metrics::read(&metrics).is_ok_and(|lines| lines.iter().any(|line| line.step >= 4));
    wait(begun);
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(130), "{told}");
    assert!(told.contains("stopped after step ") && told.contains("--example finetune -- "), "{told}");
    assert!(told.contains(" --resume\n"), "{told}");
    let (code, _, failed) = place.run("stopped", &format!("{SHORT} --resume"));
    assert_eq!(code, 0, "{failed}");
    let (whole, stopped) = (result(&place.out("whole")), result(&place.out("stopped")));
    assert!(whole.0 == stopped.0, "the adapters differ");
    assert_eq!(losses(&whole.1), losses(&stopped.1));
}

#[cfg(unix)]
fn interrupt(child: &Child) {
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
}

#[test]
#[cfg(unix)]
fn a_second_ctrl_c_ends_at_once() {
    // One step over so many examples that it takes minutes.
    let place = Place::new(&texts().repeat(1000));
    let mut child = place.start("out", "--batch-size 1 --grad-accumulation 11000 --valid-split 0 --show 0");
    wait(|| place.out("out").join(metrics::FILE).exists());
    interrupt(&child);
    let mut told = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(told.any(|line| line.unwrap().contains("once more to end at once")));
    let start = Instant::now();
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    assert!(!String::from_utf8(output.stdout).unwrap().contains("stopped after"));
    assert!(Checkpoint::latest(place.out("out")).unwrap().is_none());
}

#[test]
#[cfg(unix)]
fn a_disk_without_room_leaves_the_last_checkpoint() {
    let place = Place::new(&texts());
    let (code, _, failed) = place.run("whole", SHORT);
    assert_eq!(code, 0, "{failed}");
    let child = place.start("full", SHORT);
    wait(|| !Checkpoint::list(place.out("full")).unwrap().is_empty());
    interrupt(&child);
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(130));
    let before = Checkpoint::latest(place.out("full")).unwrap().unwrap();

    // No file may have more than some kilobytes: writing fails in the middle of a checkpoint.
    let resuming = format!("{SHORT} --resume");
    let limited = place.start_through("trap '' XFSZ; ulimit -f 100; exec \"$0\" \"$@\"", "full", &resuming);
    let output = limited.wait_with_output().unwrap();
    let failed = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{failed}");
    assert!(failed.contains("File too large"), "{failed}");
    let hint = format!("hint: the checkpoint of step {} is there; this goes on from it: ", before.step);
    assert!(failed.contains(&hint), "{failed}");
    assert_eq!(Checkpoint::latest(place.out("full")).unwrap().unwrap().path, before.path);

    let (code, _, failed) = place.run("full", &resuming);
    assert_eq!(code, 0, "{failed}");
    let (whole, full) = (result(&place.out("whole")), result(&place.out("full")));
    assert!(whole.0 == full.0, "the adapters differ");
    assert_eq!(losses(&whole.1), losses(&full.1));
}

fn wait(is_done: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_done() {
        assert!(start.elapsed() < Duration::from_secs(120), "it takes too long");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// `BURN_PEFT_KILLS` sets how many runs are killed.
#[test]
#[cfg(unix)]
fn runs_that_are_killed_at_any_moment_end_as_if_they_were_not() {
    let kills: usize = std::env::var(KILLS).ok().map_or(10, |kills| kills.parse().unwrap());
    let place = Place::new(&texts());
    let start = Instant::now();
    let (code, _, failed) = place.run("whole", SHORT);
    let duration = start.elapsed();
    assert_eq!(code, 0, "{failed}");
    let expected = result(&place.out("whole"));
    let mut rng = StdRng::seed_from_u64(kills as u64);
    let (mut at, mut lost, mut unborn) = (vec![], 0, 0);
    for kill in 0..kills {
        let name = format!("killed-{kill}");
        let out = place.out(&name);
        let mut child = place.start(&name, SHORT);
        std::thread::sleep(duration.mul_f64(rng.random_range(0.02..1.0)));
        child.kill().unwrap();
        child.wait().unwrap();

        // Every checkpoint that can be seen is whole, and none that was said to be there is lost.
        let before = Checkpoint::list(&out).unwrap();
        let reached = metrics::read(&out.join(metrics::FILE)).unwrap().last().map_or(0, |line| line.step);
        let last = before.last().map_or(0, |checkpoint| checkpoint.step);
        assert!(last >= saved(&out), "{name}");
        for checkpoint in &before {
            for file in ["adapter_config.json", "adapter_model.safetensors", "trainer.safetensors"] {
                assert!(checkpoint.path.join(file).is_file(), "{name}: {file}");
            }
        }
        let (code, told, failed) = place.run(&name, &format!("{SHORT} --resume"));
        assert_eq!(code, 0, "{name}: {failed}");
        assert_eq!(told.contains("going on from"), last > 0, "{name}: {told}");
        let found = result(&out);
        assert!(found.0 == expected.0, "{name}, killed at step {reached}: the adapters differ");
        assert_eq!(losses(&found.1), losses(&expected.1), "{name}, killed at step {reached}");
        let left: Vec<String> = fs::read_dir(&out)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.starts_with('.'))
            .collect();
        assert!(left.is_empty(), "{name}: {left:?}");
        fs::remove_dir_all(&out).unwrap();
        at.push(reached);
        lost = lost.max(reached - last.min(reached));
        unborn += usize::from(before.is_empty());
    }
    println!(
        "killed {kills} runs, at steps {at:?}; {unborn} before the first checkpoint; at most {lost} steps lost"
    );
    assert!(lost <= 3);
}
