//! A run from the files to the adapter.

use std::path::{Path, PathBuf};

use anyhow::{Context, Error, Result, bail};
use burn::tensor::Device;
use burn_peft::{DEFAULT_ADAPTER, LoraConfig, PeftModel};
use burn_peft_examples::arguments::Precision;
use burn_peft_examples::canvas::{self, Curve, head, in_the_middle, loss_curves};
use burn_peft_examples::device::DeviceName;
use burn_peft_examples::progress::Progress;
use burn_peft_examples::{command, model, output};
use burn_peft_llama::{
    Checkpoint, Collator, LlamaConfig, LlamaError, LlamaForCausalLm, MemoryEstimate, Tokenizer, Trainer,
    TrainingConfig,
};
use plotters::style::RGBColor;
use serde::{Deserialize, Serialize};

use crate::cli::Args;
use crate::data::{self, Data};
use crate::exam::{Exam, Marks};
use crate::interrupt::Interrupt;
use crate::memory;
use crate::metrics::{Event, Metric, Metrics};

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// All steps are made, or were enough.
    Done,
    /// The user wished it.
    Interrupted,
}

/// The most tokens of an example if the user names no limit.
const MAX_LENGTH: usize = 2048;

/// What a run must know to go on, beside its checkpoints.
#[derive(Serialize, Deserialize)]
struct Begun {
    /// The day that chat templates saw.
    date: String,
    /// What was answered before the training.
    before: Option<Marks>,
}

pub fn run(args: &Args, interrupt: &Interrupt) -> Result<End> {
    data::check(&args.data)?;
    let device = args.device.open("finetune", args.dtype)?.autodiff();
    let directory = model::directory(&args.model, "")?;
    let adapter = args.adapter.as_ref().map(model::directory_of_adapter).transpose()?;
    let checkpoint = checkpoint(args)?;
    let begun = begun(args)?;
    let date = match (&args.date, &begun) {
        (Some(date), _) => date.clone(),
        (None, Some(begun)) => begun.date.clone(),
        (None, None) => jiff::Zoned::now().date().to_string(),
    };
    let tokenizer = Tokenizer::load(&directory)?.with_date(&date)?;
    let config = LlamaConfig::load(&directory)?;
    let max_length = args.max_length.unwrap_or(config.max_position_embeddings.min(MAX_LENGTH));
    if max_length > config.max_position_embeddings {
        println!(
            "note: `--max-length {max_length}`: the model was made for up to {} tokens",
            config.max_position_embeddings
        );
    }
    let mut data = Data::load(args, &tokenizer, max_length)?;
    data.show(&tokenizer, args.show)?;
    if args.patience.is_some() && data.valid.is_none() {
        bail!(
            "`--patience` needs held-out examples\nhint: a file `valid.jsonl` beside `train.jsonl`, or `--valid-split 0.1`"
        );
    }

    let training = training(args, data.train.examples().len());
    let total = training.total_steps(data.train.examples().len());
    let pad = tokenizer.pad_token_id().context(
        "the tokenizer has no token to pad with\nhint: name a `pad_token` or `eos_token` in tokenizer_config.json",
    )?;
    let collator = Collator::new(pad).with_packing(args.packing.into());
    let data_size = memory::allocated();
    let mut model = LlamaForCausalLm::from_pretrained_as(&directory, &device, args.dtype.into())?;
    // The estimate is of this model.
    model.set_gradient_checkpointing(args.gradient_checkpointing);
    device.seed(args.seed);
    adapt(args, adapter.as_deref(), &mut model)?;
    println!("\n{}", model.trainable_parameters());
    println!(
        "{total} steps of {} x {} examples, learning rate up to {:e} after {} steps of warm-up",
        training.grad_accumulation, training.batch_size, training.learning_rate, training.warmup_steps
    );
    let examples = data.train.examples();
    let estimate = MemoryEstimate::new(&model, args.dtype.into(), examples, &collator, args.batch_size);
    let is_on_cpu = device.clone().without_autodiff() == Device::flex();
    let estimated = memory::mb(estimate.total() + if is_on_cpu { data_size } else { 0 });
    if is_on_cpu {
        println!("memory that is allocated at the peak, estimated: {estimated:.0} MB");
        println!("  tokenizer and examples {:.0} MB; {estimate}", memory::mb(data_size));
    } else {
        println!(
            "memory of the device at the peak, without what its allocator adds, estimated: {estimated:.0} MB"
        );
        println!("  {estimate}");
    }
    if args.dry_run {
        return Ok(End::Done);
    }
    let with_advice = |error| advised(error, args, memory::mb(estimate.total()));

    interrupt.await_it();
    output::make_directory(&args.out)?;
    let examples = std::mem::take(&mut data.train.encoded.examples);
    let exam = Exam::new(&data, &tokenizer, &collator, args.batch_size)?;
    // A copy, which shares the tensors: what cannot be gone on with is refused before anything takes time.
    let untrained = model.clone();
    let trainer = match &checkpoint {
        Some(checkpoint) => {
            println!("going on from `{}`", checkpoint.path.display());
            let resumed = Trainer::resume(&checkpoint.path, &mut model, &training, examples, &collator);
            resumed.map_err(|error| of_another(error, &checkpoint.path))?
        }
        None => Trainer::new(&training, examples, &collator)?,
    };
    let earlier = begun.filter(|_| checkpoint.is_some()).and_then(|begun| begun.before);
    let before = match earlier.filter(|marks| exam.fits(marks)) {
        Some(marks) => marks,
        None => {
            println!("\nanswering before the training");
            let Some(marks) = exam.take(&untrained, interrupt).map_err(with_advice)? else {
                println!("stopped before the training; this begins it again:\n  {}", resuming());
                return Ok(End::Interrupted);
            };
            marks
        }
    };
    drop(untrained);
    let begun = Begun { date, before: Some(before) };
    output::write(&args.out.join(BEGUN), serde_json::to_string(&begun)?)?;
    let before = begun.before;
    let metrics = Metrics::open(&args.out, trainer.steps())?;
    let mut run =
        Run { args, data: &data, trainer, model, metrics, total, estimated: memory::mb(estimate.total()) };
    match run.train(interrupt) {
        Ok(End::Done) => {}
        Ok(End::Interrupted) => {
            println!("stopped after step {} of {total}; this goes on:", run.trainer.steps());
            println!("  {}", resuming());
            return Ok(End::Interrupted);
        }
        Err(error) => {
            let is_of_numbers = error.chain().any(|cause| {
                matches!(cause.downcast_ref::<LlamaError>(), Some(LlamaError::NotFinite { .. }))
            });
            return Err(match Checkpoint::latest(&args.out) {
                // The same options would go wrong in the same way.
                Ok(Some(kept)) if is_of_numbers => error.context(format!(
                    "the training ended at step {}\nhint: the checkpoint of step {} is good; `--adapter {}` trains its adapter further, with another `--out`",
                    run.trainer.steps(),
                    kept.step,
                    kept.path.display()
                )),
                Ok(Some(kept)) => error.context(format!(
                    "the training ended at step {}\nhint: the checkpoint of step {} is there; this goes on from it: {}",
                    run.trainer.steps(),
                    kept.step,
                    resuming()
                )),
                _ => error,
            });
        }
    }
    let most = memory::mb(memory::most_allocated());
    if is_on_cpu {
        println!("memory that was allocated at the peak: {most:.0} MB, estimated {estimated:.0} MB");
    } else {
        println!("memory that was allocated at the peak, beside the device's: {most:.0} MB");
    }
    if let Some(peak) = memory::peak_of_process() {
        let kept = if std::env::var("MIMALLOC_PURGE_DELAY").is_ok_and(|delay| delay == "-1") {
            "; less with MIMALLOC_PURGE_DELAY=10, and steps take longer"
        } else {
            ""
        };
        println!(
            "  the process with its program and what the allocator keeps: {:.0} MB{kept}",
            memory::mb(peak)
        );
    }
    let adapter = args.out.join("adapter");
    run.model.save_adapter(DEFAULT_ADAPTER, &adapter)?;
    run.plot()?;
    if let (Some(before), Some(after)) = (before, exam.take(&run.model, interrupt).map_err(with_advice)?) {
        exam.show(&before, &after);
    }
    run.tell(&adapter)?;
    Ok(End::Done)
}

const BEGUN: &str = "finetune.json";

/// The checkpoint to go on from.
fn checkpoint(args: &Args) -> Result<Option<Checkpoint>> {
    if args.out.is_file() {
        bail!("`{}` is a file\nhint: choose a directory with `--out`", args.out.display());
    }
    let found = Checkpoint::latest(&args.out)?;
    if found.is_some() && !args.resume && !args.dry_run {
        bail!(
            "`{}` has the checkpoints of a run\nhint: `--resume` goes on with it; choose another directory with `--out` for a new one",
            args.out.display()
        );
    }
    Ok(found)
}

/// What an earlier run knew, if this one goes on with it: a prompt with a date must not change in between.
fn begun(args: &Args) -> Result<Option<Begun>> {
    let path = args.out.join(BEGUN);
    if !args.resume || !path.exists() {
        return Ok(None);
    }
    let text = std::fs::read(&path).with_context(|| format!("`{}` cannot be read", path.display()))?;
    let begun = serde_json::from_slice(&text);
    // With a date, nothing in it is needed.
    if args.date.is_some() {
        return Ok(begun.ok());
    }
    begun.map(Some).with_context(|| {
        format!("`{}` is damaged\nhint: give the day of the run with `--date`", path.display())
    })
}

/// The options of the training, with defaults that depend on how long it is.
fn training(args: &Args, examples: usize) -> TrainingConfig {
    let config = TrainingConfig::new()
        .with_learning_rate(args.learning_rate)
        .with_epochs(args.epochs)
        .with_max_steps(args.max_steps)
        .with_batch_size(args.batch_size)
        .with_grad_accumulation(args.grad_accumulation)
        .with_schedule(args.schedule.into())
        .with_weight_decay(args.weight_decay as f32)
        .with_max_grad_norm((args.max_grad_norm > 0.0).then_some(args.max_grad_norm))
        .with_loraplus_lr_ratio(args.loraplus_lr_ratio)
        .with_gradient_checkpointing(args.gradient_checkpointing)
        .with_seed(args.seed)
        .with_save_total_limit(Some(args.save_total_limit));
    let total = config.total_steps(examples);
    config
        .with_warmup_steps(args.warmup.unwrap_or(total * 3 / 100))
        .with_log_every(args.log_every.unwrap_or((total / 100).clamp(1, 10)))
}

/// Adds the adapter that is to be trained: the saved one, or a new one.
fn adapt(args: &Args, saved: Option<&Path>, model: &mut LlamaForCausalLm) -> Result<()> {
    let Some(adapter) = saved else {
        let config = LoraConfig::new(args.rank)
            .with_lora_alpha(args.alpha.unwrap_or(2.0 * args.rank as f64))
            .with_lora_dropout(args.dropout)
            .with_use_rslora(args.use_rslora)
            .with_use_dora(args.use_dora)
            .with_target_modules(args.targets.clone())
            .with_task_type("CAUSAL_LM")
            .with_base_model_name_or_path(model::name_or_path(&args.model));
        let report = model::adapting(model, |model| model.add_adapter(DEFAULT_ADAPTER, &config))?;
        for target in &report.unmatched_targets {
            println!("note: nothing in the model is called `{target}`");
        }
        return Ok(());
    };
    model::adapting(model, |model| model.load_adapter(DEFAULT_ADAPTER, adapter))?;
    Ok(())
}

/// An error of `--resume`, with the option that trains the adapter further if the checkpoint is of another training.
fn of_another(error: LlamaError, checkpoint: &Path) -> Error {
    let is_other = matches!(error, LlamaError::CheckpointDiffers { .. });
    let error = Error::from(error);
    if !is_other {
        return error;
    }
    error.context(format!(
        "`--resume` goes on with the same model, data and options only\nhint: `--adapter {}` with another `--out` trains its adapter further",
        checkpoint.display()
    ))
}

/// The error; if a device failed, with what needs less of its memory. Each backend reports that memory ran out in its own
/// words, so every failure gets the advice.
fn advised(error: Error, args: &Args, estimated: f64) -> Error {
    match error.downcast() {
        // In the place of the advice that the error has itself, which names no options.
        Ok(LlamaError::DeviceRead { source }) => Error::from_boxed(source).context(device_failed(
            estimated,
            args.gradient_checkpointing,
            args.dtype,
        )),
        Ok(error) => error.into(),
        Err(error) => error,
    }
}

/// The message for a device that failed.
fn device_failed(estimated: f64, has_gradient_checkpointing: bool, dtype: Precision) -> String {
    let mut less =
        vec!["a smaller `--batch-size` (with more `--grad-accumulation`)", "a smaller `--max-length`"];
    if !has_gradient_checkpointing {
        less.push("`--gradient-checkpointing`");
    }
    if dtype == Precision::F32 {
        less.push("a `--dtype` of 16 bits");
    }
    format!(
        "the device failed; the training was estimated to need {estimated:.0} MB of its memory\nhint: if it has less, try {}",
        less.join(", ")
    )
}

/// The command of this run, with `--resume`.
fn resuming() -> String {
    let resume = std::env::args_os().all(|word| word != "--resume").then(|| "--resume".into());
    command::text("finetune", std::env::args_os().skip(1).chain(resume))
}

/// A training in progress.
struct Run<'a> {
    args: &'a Args,
    data: &'a Data,
    trainer: Trainer,
    model: LlamaForCausalLm,
    metrics: Metrics,
    total: usize,
    /// The most memory that the training was expected to need, in millions of bytes.
    estimated: f64,
}

impl Run<'_> {
    fn train(&mut self, interrupt: &Interrupt) -> Result<End> {
        let save_every = self.args.save_every.unwrap_or((self.total / 10).max(1));
        let eval_every = self.args.eval_every.unwrap_or(save_every);
        let progress = Progress::new("training", self.total);
        if self.trainer.steps() == 0 {
            self.evaluate()?;
        }
        if self.is_enough() {
            return Ok(End::Done);
        }
        while let Some(report) = self.trainer.step(&mut self.model).map_err(|error| self.explained(error))? {
            let step = report.step;
            if !report.without_gradient.is_empty() {
                let (count, first) = (report.without_gradient.len(), &report.without_gradient[0]);
                println!(
                    "note: {count} trained parameters got no gradient at the first step, first `{first}`"
                );
            }
            let speed = report.tokens_per_second();
            if let Some(loss) = report.loss {
                progress.report(step, &format!("loss {loss:.3}, {speed:.0} tokens/s"));
                let (learning_rate, grad_norm) = (report.learning_rate, report.grad_norm);
                let tokens = report.num_tokens;
                let event =
                    Event::Trained { loss, learning_rate, grad_norm, tokens, tokens_per_second: speed };
                self.metrics.push(Metric { step, epoch: report.epoch, event })?;
            }
            let is_last = step == self.total;
            let mut is_enough = false;
            if step.is_multiple_of(eval_every) || is_last {
                self.evaluate()?;
                is_enough = self.is_enough();
            }
            let is_wished = interrupt.is_wished();
            if step.is_multiple_of(save_every) || is_last || is_enough || is_wished {
                self.save()?;
            }
            if is_enough {
                progress.finish();
                println!("the held-out loss does not become less any more: stopped at step {step}");
                return Ok(End::Done);
            }
            if is_wished && !is_last {
                progress.finish();
                return Ok(End::Interrupted);
            }
        }
        progress.finish();
        Ok(End::Done)
    }

    /// Whether the held-out loss has not become less for so long that the user wants an end.
    fn is_enough(&self) -> bool {
        self.args.patience.is_some_and(|patience| self.trainer.evaluations_since_best() >= patience)
    }

    /// Measures the held-out loss, if something is held out.
    fn evaluate(&mut self) -> Result<()> {
        let Some(valid) = &self.data.valid else { return Ok(()) };
        let evaluation = self.trainer.evaluate(&self.model, valid.examples());
        let eval_loss = evaluation.map_err(|error| self.explained(error))?.loss;
        let (step, epoch) = (self.trainer.steps(), self.trainer.epoch());
        self.metrics.push(Metric { step, epoch, event: Event::Evaluated { eval_loss } })
    }

    fn save(&mut self) -> Result<()> {
        let saved = self.trainer.save(&self.model, &self.args.out);
        let path = saved.map_err(|error| self.explained(error))?;
        let checkpoint = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let (step, epoch) = (self.trainer.steps(), self.trainer.epoch());
        self.metrics.push(Metric { step, epoch, event: Event::Saved { checkpoint } })
    }

    /// Says where in the file the examples of a step are that went wrong, and what needs less memory if the device failed.
    fn explained(&self, error: LlamaError) -> Error {
        match error {
            LlamaError::NotFinite { ref examples, .. } => {
                let places =
                    examples.iter().take(16).map(|example| self.data.train.place(*example).to_string());
                let places: Vec<String> = places.collect();
                let told = format!("the training went wrong on {}", places.join(", "));
                Error::from(error).context(told)
            }
            _ => advised(error.into(), self.args, self.estimated),
        }
    }

    /// Writes loss.png.
    fn plot(&self) -> Result<()> {
        let lines = || self.metrics.lines.iter();
        let trained = lines().filter_map(|line| match line.event {
            Event::Trained { loss, .. } => Some((line.step, loss)),
            _ => None,
        });
        let held_out = lines().filter_map(|line| match line.event {
            Event::Evaluated { eval_loss } => Some((line.step as f64, eval_loss)),
            _ => None,
        });
        let mut curves = vec![Curve {
            title: "training",
            color: RGBColor(37, 99, 235),
            dashed: false,
            points: in_the_middle(trained).collect(),
        }];
        let held_out: Vec<_> = held_out.collect();
        if !held_out.is_empty() {
            let color = RGBColor(234, 124, 60);
            curves.push(Curve { title: "held out", color, dashed: false, points: vec![] });
            curves.push(Curve { title: "held out", color, dashed: true, points: held_out });
        }
        let subtitle = format!("{} on {}", self.args.model, self.args.data.display());
        canvas::draw(&self.args.out.join("loss.png"), |area| {
            head(area, "Mean loss of a token that is learnt", &subtitle)?;
            loss_curves(area, &curves, self.trainer.steps() as f64, "optimizer steps", |step| {
                format!("{step:.0}")
            })
        })
    }

    /// Prints what came out, and what can be done with it.
    fn tell(&self, adapter: &Path) -> Result<()> {
        let evaluations: Vec<(usize, f64)> = self
            .metrics
            .lines
            .iter()
            .filter_map(|line| match line.event {
                Event::Evaluated { eval_loss } => Some((line.step, eval_loss)),
                _ => None,
            })
            .collect();
        let trained = self.metrics.lines.iter().filter_map(|line| match line.event {
            Event::Trained { loss, .. } => Some((line.step, loss)),
            _ => None,
        });
        let trained: Vec<(usize, f64)> = trained.collect();
        if let [(from, first), .., (to, last)] = trained[..] {
            println!("training loss: {first:.4} at step {from}, {last:.4} at step {to}");
        }
        if let (Some((_, first)), Some((_, last))) = (evaluations.first(), evaluations.last()) {
            println!("held-out loss: {first:.4} before, {last:.4} after");
        }
        if let Some(best) = Checkpoint::best(&self.args.out)?.filter(|best| best.step != self.trainer.steps())
        {
            let loss = best.eval_loss.unwrap_or(f64::NAN);
            println!("it was least at step {}, {loss:.4}: `{}`", best.step, best.path.display());
        }
        let quoted = |path: &Path| path.display().to_string();
        println!("\nadapter: `{}`", quoted(adapter));
        println!(
            "losses:  `{}`, `{}`",
            quoted(&self.args.out.join("loss.png")),
            quoted(&self.metrics_file())
        );
        let adapter_path = quoted(adapter);
        println!("\nask it; see what is in it; merge it into the model:");
        let command = |example: &str, words: &[&str]| {
            command::text(example, words.iter().map(|word| std::ffi::OsString::from(*word)))
        };
        let words = |words: &[&str]| command("adapter", words);
        let mut asked = vec!["--model", &self.args.model, "--adapter", &adapter_path];
        let (device, dtype) = (self.args.device.name(), self.args.dtype.name());
        if self.args.device != DeviceName::Cpu {
            asked.extend(["--device", device]);
        }
        if self.args.dtype != Precision::F32 {
            asked.extend(["--dtype", dtype]);
        }
        println!("  {}", command("generate", &asked));
        println!("  {}", words(&["inspect", &quoted(adapter)]));
        let merged = quoted(&self.args.out.join("merged"));
        println!(
            "  {}",
            words(&["merge", "--model", &self.args.model, "--adapter", &quoted(adapter), "--out", &merged])
        );
        println!("in Python: `PeftModel.from_pretrained(model, \"{}\")`", quoted(adapter));
        Ok(())
    }

    fn metrics_file(&self) -> PathBuf {
        self.args.out.join(crate::metrics::FILE)
    }
}

#[cfg(test)]
mod tests {
    use burn_peft_examples::failure;

    use super::*;

    #[test]
    fn a_device_that_failed_is_told_with_the_estimate_and_what_is_not_done_yet() {
        let told = device_failed(685.4, false, Precision::F32);
        for part in ["685 MB", "--gradient-checkpointing", "--batch-size", "--max-length", "--dtype"] {
            assert!(told.contains(part), "{told}");
        }
        let told = device_failed(685.4, true, Precision::Bf16);
        assert!(!told.contains("checkpointing") && !told.contains("--dtype"), "{told}");

        let args = <Args as clap::Parser>::parse_from(["finetune", "--model", "m", "--data", "d"]);
        let text = |error: LlamaError| failure::text(&advised(error.into(), &args, 685.4));
        let told = text(LlamaError::DeviceRead { source: "it is full".into() });
        assert!(
            told.contains("because: it is full\nhint: ") && told.matches("hint: ").count() == 1,
            "{told}"
        );
        assert!(!text(LlamaError::EmptyBatch).contains("685 MB"));
    }
}
