//! Checkpoints: a training on disk.

mod fingerprint;
mod optimizer;
mod parameters;
mod state;

use std::fs;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::Tensor;
use burn_peft::{PeftConfig, PeftModel};
use burn_peft_files::{StagedDirectory, remove_directory};

use self::parameters::{Values, entries};
use self::state::{AdapterState, State};
use super::CausalLmLoss;
use super::check::device;
use super::numbers::{self, StepNumbers};
use super::trainer::Trainer;
use crate::error::LlamaError;
use crate::file::{self, unwritten};
use crate::weights::writer;

pub(super) use self::fingerprint::Fingerprint;
pub use self::state::CheckpointDifference;
pub(super) use self::state::Progress;

const STATE_FILE: &str = "trainer_state.json";
const TENSOR_FILE: &str = "trainer.safetensors";
const PREFIX: &str = "checkpoint-";

/// A checkpoint that [`Trainer::save`] wrote.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Its directory.
    pub path: PathBuf,
    /// The steps that had been made.
    pub step: usize,
    /// The loss of the [`evaluate`](Trainer::evaluate) at this step, if there was one.
    pub eval_loss: Option<f64>,
}

impl Checkpoint {
    /// The checkpoints in `directory`, in the order of their steps. None if there is no such directory.
    ///
    /// # Errors
    /// [`LlamaError::ReadFile`] and [`LlamaError::Json`] if something in it cannot be read.
    pub fn list(directory: impl AsRef<Path>) -> Result<Vec<Self>, LlamaError> {
        let directory = directory.as_ref();
        let unread = |source| LlamaError::ReadFile { path: directory.into(), source, hint: HINT };
        let entries = match fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
            Err(error) => return Err(unread(error)),
        };
        let mut found = vec![];
        for entry in entries {
            let path = entry.map_err(unread)?.path();
            if is_named(&path) {
                found.extend(Self::open(&path)?);
            }
        }
        found.sort_by_key(|checkpoint| checkpoint.step);
        Ok(found)
    }

    /// The one with the most steps.
    ///
    /// # Errors
    /// As [`list`](Self::list).
    pub fn latest(directory: impl AsRef<Path>) -> Result<Option<Self>, LlamaError> {
        Ok(Self::list(directory)?.pop())
    }

    /// The one with the least loss of an evaluation at its step.
    ///
    /// # Errors
    /// As [`list`](Self::list).
    pub fn best(directory: impl AsRef<Path>) -> Result<Option<Self>, LlamaError> {
        Ok(best(&Self::list(directory)?).cloned())
    }

    /// What `directory` is, `None` if no checkpoint.
    fn open(directory: &Path) -> Result<Option<Self>, LlamaError> {
        let Some(state) = State::read(directory)? else { return Ok(None) };
        let step = state.progress.step;
        Ok(Some(Self { path: directory.into(), step, eval_loss: state.progress.loss_at(step) }))
    }
}

const HINT: &str = "expected the directory that the checkpoints are in";

fn best(checkpoints: &[Checkpoint]) -> Option<&Checkpoint> {
    let loss = |checkpoint: &&Checkpoint| checkpoint.eval_loss.filter(|loss| !loss.is_nan());
    let measured = checkpoints.iter().filter(|checkpoint| loss(checkpoint).is_some());
    measured.min_by(|a, b| loss(a).partial_cmp(&loss(b)).unwrap_or(std::cmp::Ordering::Equal))
}

/// Writes a checkpoint and removes those that are not to be kept.
pub(super) fn save<M: CausalLmLoss>(
    trainer: &mut Trainer,
    model: &M,
    directory: &Path,
) -> Result<PathBuf, LlamaError> {
    let place = directory.join(format!("{PREFIX}{}", trainer.progress.step));
    check_place(directory, &place, trainer.progress.step)?;
    if !device(model)?.is_autodiff() || model.adapters().iter().any(|adapter| adapter.merged) {
        let hint =
            "a checkpoint is of the model that is trained: not of `valid()`, and with no adapter merged";
        return Err(LlamaError::NotTrainable { hint });
    }
    numbers::read(&trainer.unread, model)?;
    let started = match trainer.started.take() {
        Some(started) => started,
        None => trainer.start(model)?,
    };
    let started = trainer.started.insert(started);
    let optimizer = optimizer::to_state(&started.optimizer, model, trainer.progress.step)?;
    let fingerprint = match trainer.fingerprint.take() {
        Some(fingerprint) => fingerprint,
        None => Fingerprint::of(model, trainer)?,
    };
    let fingerprint = trainer.fingerprint.insert(fingerprint).clone();
    let mut tensors = entries(model, trainer.progress.step)?;
    tensors.extend(optimizer.tensors);
    let state = State::new(trainer, adapters(model), fingerprint, optimizer.parameters)?;

    let staged = StagedDirectory::beside(&place).map_err(unwritten(&place))?;
    if !state.adapters.is_empty() {
        model.save_adapters(staged.path())?;
    }
    let writer = file::writer(staged.path())?;
    let path = staged.path().join(TENSOR_FILE);
    file::put(writer::write(&writer, &path, tensors)?, &path)?;
    let path = staged.path().join(STATE_FILE);
    file::put(file::stage(&writer, &path, &state.to_json())?, &path)?;
    drop(writer);
    staged.replace().map_err(unwritten(&place))?;
    prune(directory, trainer.config.save_total_limit)?;
    Ok(place)
}

/// Refuses to save beside what belongs to another training: a later step would be taken for this training's last one.
fn check_place(directory: &Path, place: &Path, step: usize) -> Result<(), LlamaError> {
    let later = readable(directory).into_iter().find(|checkpoint| checkpoint.step > step);
    let is_other = place.exists() && !matches!(Checkpoint::open(place), Ok(Some(_)));
    let in_the_way = later.map(|later| later.path).or_else(|| is_other.then(|| place.into()));
    match in_the_way {
        Some(path) => Err(LlamaError::CheckpointInTheWay { path, step }),
        None => Ok(()),
    }
}

/// The checkpoints in `directory` that can be read, in the order of their steps. Others are none of this trainer.
fn readable(directory: &Path) -> Vec<Checkpoint> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let named = entries.filter(|path| is_named(path));
    let mut found: Vec<_> = named.filter_map(|path| Checkpoint::open(&path).ok().flatten()).collect();
    found.sort_by_key(|checkpoint| checkpoint.step);
    found
}

fn is_named(path: &Path) -> bool {
    file::name(path).strip_prefix(PREFIX).is_some_and(|step| step.parse::<usize>().is_ok())
}

/// Removes the checkpoints that are not to be kept.
fn prune(directory: &Path, limit: Option<usize>) -> Result<(), LlamaError> {
    let Some(limit) = limit else { return Ok(()) };
    let checkpoints = readable(directory);
    let best = best(&checkpoints).map(|best| best.step);
    let old = &checkpoints[..checkpoints.len().saturating_sub(limit)];
    for Checkpoint { path, .. } in old.iter().filter(|checkpoint| Some(checkpoint.step) != best) {
        remove_directory(path).map_err(unwritten(path))?;
    }
    Ok(())
}

fn adapters<M: Module>(model: &M) -> Vec<AdapterState> {
    let state = |adapter: burn_peft::AdapterStatus| AdapterState {
        name: adapter.name,
        active: adapter.active,
        scale: adapter.scale,
        config: adapter.config,
    };
    model.adapters().into_iter().map(state).collect()
}

/// Sets `model` and `trainer`, which has made no step, to the checkpoint in `directory`.
pub(super) fn resume<M: CausalLmLoss>(
    directory: &Path,
    model: &mut M,
    mut trainer: Trainer,
) -> Result<Trainer, LlamaError> {
    let none = || LlamaError::NoCheckpoint { path: directory.into() };
    let path = match Checkpoint::open(directory)? {
        Some(checkpoint) => checkpoint.path,
        None => Checkpoint::latest(directory)?.ok_or_else(none)?.path,
    };
    let state = State::read(&path)?.ok_or_else(none)?;
    state.check(&path)?;
    let values = Values::open(&path.join(TENSOR_FILE))?;

    let mut differences = state.differences(&trainer)?;
    differences.extend(state.fingerprint.differences(model, &trainer, &values)?);
    let mut missing = vec![];
    for adapter in &state.adapters {
        match model.adapters().into_iter().find(|present| present.name == adapter.name) {
            Some(present) => differences.extend(adapter.differences(&present.config)),
            None => missing.push(adapter),
        }
    }
    let is_known = |name: &str| state.adapters.iter().any(|adapter| adapter.name == name);
    for present in model.adapters().into_iter().filter(|present| !is_known(&present.name)) {
        differences.push(CheckpointDifference::new(format!("adapter `{}`", present.name), "none", "one"));
    }
    refuse(&path, differences)?;

    let mut resumed = model.clone();
    for AdapterState { name, config, .. } in missing {
        resumed.add_adapter(name, PeftConfig::clone(config))?;
    }
    for AdapterState { name, scale, .. } in &state.adapters {
        resumed.set_scale(name, *scale)?;
    }
    if !state.adapters.is_empty() {
        let active = state.adapters.iter().filter(|adapter| adapter.active);
        resumed.set_adapter(&active.map(|adapter| &*adapter.name).collect::<Vec<_>>())?;
    }
    refuse(&path, values.differences(&resumed, &state.optimizer))?;
    let resumed = values.fill(resumed);
    trainer.progress = state.progress;
    let mut started = trainer.start(&resumed)?;
    started.optimizer = optimizer::from_state(started.optimizer, &resumed, &state.optimizer, &values)?;
    let device = device(&resumed)?.inner();
    let first = trainer.progress.step + 1 - state.unread.len();
    let unread = state.unread.iter().enumerate().map(|(i, unread)| StepNumbers {
        step: first + i,
        examples: vec![],
        loss: Tensor::from_data([unread.loss], &device),
        num_targets: unread.num_targets,
        squares: None,
    });
    trainer.unread = unread.collect();
    trainer.started = Some(started);
    trainer.fingerprint = Some(state.fingerprint);
    *model = resumed;
    Ok(trainer)
}

fn refuse(path: &Path, differences: Vec<CheckpointDifference>) -> Result<(), LlamaError> {
    match differences.is_empty() {
        true => Ok(()),
        false => Err(LlamaError::CheckpointDiffers { path: path.into(), differences }),
    }
}

#[cfg(test)]
mod tests {
    use burn_peft::{Bias, InitLoraWeights, LoraConfig};
    use safetensors::SafeTensors;

    use super::parameters::is_saved;
    use super::*;
    use crate::batch::Collator;
    use crate::conversation::Example;
    use crate::model::LlamaForCausalLm;
    use crate::testing::model;
    use crate::train::tests::{autodiff, config, examples};
    use crate::train::{StepReport, TrainingConfig};

    /// 9 steps of 2 batches, over one epoch and a half; the loss is read at 1, 4, 8 and 9.
    fn training() -> TrainingConfig {
        config().with_learning_rate(0.01).with_grad_accumulation(2).with_max_steps(Some(9)).with_log_every(4)
    }

    fn lora() -> LoraConfig {
        LoraConfig::new(2).with_lora_alpha(6.0).with_target_modules(["q_proj", "v_proj", "down_proj"])
    }

    /// Everything that is trained, bit by bit.
    fn bits(model: &LlamaForCausalLm) -> Vec<(String, Vec<u8>)> {
        let saved = crate::parameters::parameters(model).into_iter().filter(is_saved);
        saved.map(|of| (of.name.clone(), (of.read)().unwrap().as_bytes().to_vec())).collect()
    }

    fn same(report: &StepReport) -> StepReport {
        StepReport { elapsed: Default::default(), ..report.clone() }
    }

    /// Trains to the end, saving after `steps`.
    fn train(
        model: &mut LlamaForCausalLm,
        trainer: &mut Trainer,
        steps: &[usize],
        directory: &Path,
    ) -> Vec<StepReport> {
        let mut reports = vec![];
        while let Some(report) = trainer.step(model).unwrap() {
            if steps.contains(&report.step) {
                trainer.evaluate(model, &examples()[..5]).unwrap();
                trainer.save(model, directory).unwrap();
            }
            reports.push(same(&report));
        }
        reports
    }

    #[test]
    fn whatever_is_trained_goes_on_bit_by_bit_from_any_step() {
        let pissa = lora().with_init_lora_weights(InitLoraWeights::Pissa);
        let more = lora().with_use_dora(true).with_modules_to_save(["norm"]).with_bias(Bias::All);
        let kinds = [
            ("full", training().with_weight_decay(0.1), Vec::<(&str, LoraConfig)>::new()),
            ("lora", training(), vec![("default", lora())]),
            (
                "lora+",
                training().with_loraplus_lr_ratio(Some(4.0)).with_weight_decay(0.1),
                vec![("a", lora())],
            ),
            ("pissa", training(), vec![("default", pissa)]),
            ("more", training(), vec![("default", more), ("second", lora().with_use_rslora(true))]),
        ];
        for (kind, config, adapters) in kinds {
            let base = model(&autodiff(), false);
            let mut whole = base.clone();
            for (name, lora) in &adapters {
                whole.add_adapter(name, lora).unwrap();
            }
            if adapters.len() > 1 {
                whole.set_adapter(&["default", "second"]).unwrap();
                whole.set_scale("second", 0.5).unwrap();
            }
            let directory = tempfile::tempdir().unwrap();
            let config = config.with_save_total_limit(None);
            let collator = Collator::new(7);
            let mut trainer = Trainer::new(&config, examples(), &collator).unwrap();
            trainer.save(&whole, directory.path()).unwrap();
            let all = [1, 2, 3, 4, 5, 6, 7, 8, 9];
            let reports = train(&mut whole, &mut trainer, &all, directory.path());
            let expected = bits(&whole);
            assert!(expected.len() > 4, "{kind}");
            for step in 0..=9 {
                let place = directory.path().join(format!("checkpoint-{step}"));
                let mut resumed = base.clone();
                // Checkpoints of a run that is gone on with take the places of those that are there.
                let again = tempfile::tempdir().unwrap();
                let mut trainer =
                    Trainer::resume(&place, &mut resumed, &config, examples(), &collator).unwrap();
                assert_eq!(trainer.steps(), step, "{kind}");
                let rest = train(&mut resumed, &mut trainer, &all, again.path());
                let skip = |report: &StepReport| StepReport { without_gradient: vec![], ..report.clone() };
                assert_eq!(
                    rest.iter().map(skip).collect::<Vec<_>>(),
                    reports[step..].iter().map(skip).collect::<Vec<_>>(),
                    "{kind} from {step}"
                );
                assert!(bits(&resumed) == expected, "{kind} from {step}");
                assert_eq!(
                    trainer.evaluations_since_best(),
                    trainer_of(&reports, directory.path()),
                    "{kind}"
                );
            }
        }
    }

    /// The evaluations since the best one, by the checkpoints.
    fn trainer_of(reports: &[StepReport], directory: &Path) -> usize {
        let best = Checkpoint::best(directory).unwrap().unwrap();
        reports.len() - best.step
    }

    #[test]
    fn a_checkpoint_is_an_adapter_and_the_last_ones_and_the_best_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let mut net = model(&autodiff(), false);
        net.add_adapter("default", lora()).unwrap();
        let mut trainer = Trainer::new(&training(), examples(), &Collator::new(7)).unwrap();
        let collator = Collator::new(7);
        assert_eq!(Checkpoint::list(directory.path().join("none")).unwrap(), []);
        while let Some(report) = trainer.step(&mut net).unwrap() {
            // The second is the best.
            trainer.progress.evaluated(if report.step == 2 { 0.5 } else { 1.0 + report.step as f64 });
            trainer.save(&net, directory.path()).unwrap();
        }
        let kept = Checkpoint::list(directory.path()).unwrap();
        let steps: Vec<_> = kept.iter().map(|kept| (kept.step, kept.eval_loss)).collect();
        assert_eq!(steps, [(2, Some(0.5)), (8, Some(9.0)), (9, Some(10.0))]);
        assert_eq!(Checkpoint::best(directory.path()).unwrap().unwrap(), kept[0]);
        assert_eq!((trainer.best_loss(), trainer.evaluations_since_best()), (Some(0.5), 7));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 3);

        let mut loaded = model(&autodiff(), false);
        loaded.load_adapter("default", &kept[2].path).unwrap();
        let loss = |net: &LlamaForCausalLm| crate::evaluate(net, &examples(), &collator, 8).unwrap().loss;
        assert_eq!(loss(&loaded), loss(&net));
        assert!(loss(&loaded) != loss(&model(&autodiff(), false)));
    }

    #[test]
    fn another_base_other_examples_options_adapters_or_versions_are_all_named() {
        let directory = tempfile::tempdir().unwrap();
        let mut net = model(&autodiff(), false);
        net.add_adapter("default", lora()).unwrap();
        let mut trainer = Trainer::new(&training(), examples(), &Collator::new(7)).unwrap();
        trainer.step(&mut net).unwrap();
        trainer.save(&net, directory.path()).unwrap();
        let resume = |net: &mut LlamaForCausalLm, config: TrainingConfig, examples: Vec<Example>, pad| {
            let before = bits(net);
            match Trainer::resume(directory.path(), net, &config, examples, &Collator::new(pad)) {
                Err(error) => {
                    assert!(bits(net) == before);
                    error.to_string()
                }
                Ok(_) => String::new(),
            }
        };
        let base = || model(&autodiff(), false);
        let free = training().with_log_every(1).with_save_total_limit(None);
        assert_eq!(resume(&mut base(), free, examples(), 7), "");
        // An adapter that is there already is given the numbers of the checkpoint.
        let mut present = base();
        present.add_adapter("default", lora()).unwrap();
        assert_eq!(resume(&mut present, training(), examples(), 7), "");
        assert!(bits(&present) == bits(&net));

        let found = resume(&mut base(), training().with_learning_rate(0.02).with_seed(3), examples(), 6);
        for line in [
            "`learning_rate`: 0.01 in the checkpoint, 0.02 now",
            "`seed`: 42 in the checkpoint, 3 now",
            "collator, `pad_token_id`: 7 in the checkpoint, 6 now",
            "hint: go on as it was begun",
        ] {
            assert!(found.contains(line), "{found}");
        }
        let mut fewer = examples();
        fewer.pop();
        let found = resume(&mut base(), training(), fewer, 7);
        assert!(found.contains("examples: 21 with 82 tokens, ") && found.contains("20 with"), "{found}");
        let mut relabelled = examples();
        relabelled[3].labels[1] = -100;
        assert!(resume(&mut base(), training(), relabelled, 7).contains("examples: 21"));

        let mut other = base();
        other.model.norm.weight = other.model.norm.weight.map(|w| (w * 1.5).detach().require_grad());
        let found = resume(&mut other, training(), examples(), 7);
        assert!(
            found.matches("in the checkpoint").count() == 1 && found.contains("`model.norm.weight`"),
            "{found}"
        );
        let found = resume(&mut model(&autodiff(), true), training(), examples(), 7);
        assert!(found.contains("`lm_head.weight`: F32"), "{found}");

        let mut other = base();
        other.add_adapter("default", lora().with_lora_dropout(0.25)).unwrap();
        let found = resume(&mut other, training(), examples(), 7);
        let expected = "adapter `default`, `lora_dropout`: 0.0 in the checkpoint, 0.25 now";
        assert!(found.contains(expected), "{found}");
        let mut other = present.clone();
        other.add_adapter("more", lora()).unwrap();
        let found = resume(&mut other, training(), examples(), 7);
        assert!(found.contains("adapter `more`: none in the checkpoint, one now"), "{found}");

        let file = directory.path().join("checkpoint-1").join(STATE_FILE);
        let text = fs::read_to_string(&file).unwrap();
        fs::write(&file, text.replacen(env!("CARGO_PKG_VERSION"), "0.0.1", 1)).unwrap();
        let found = resume(&mut base(), training(), examples(), 7);
        assert!(found.contains("burn-peft-llama: 0.0.1 in the checkpoint"), "{found}");
        fs::write(&file, "{").unwrap();
        assert!(resume(&mut base(), training(), examples(), 7).contains("cannot parse"));
        fs::remove_file(&file).unwrap();
        let found = resume(&mut base(), training(), examples(), 7);
        assert!(found.contains("no checkpoint in") && found.contains("`checkpoint-<step>`"), "{found}");
    }

    #[test]
    fn a_state_that_lacks_a_tensor_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let mut net = model(&autodiff(), false);
        net.add_adapter("default", lora()).unwrap();
        let mut trainer = Trainer::new(&training(), examples(), &Collator::new(7)).unwrap();
        trainer.step(&mut net).unwrap();
        let place = trainer.save(&net, directory.path()).unwrap();
        let path = place.join(TENSOR_FILE);
        let bytes = fs::read(&path).unwrap();
        let resume = || {
            let mut net = model(&autodiff(), false);
            let resumed = Trainer::resume(&place, &mut net, &training(), examples(), &Collator::new(7));
            resumed.err().map(|error| error.to_string()).unwrap_or_default()
        };
        let file = SafeTensors::deserialize(&bytes).unwrap();
        for lost in ["optimizer.model.layers.0.self_attn.q_proj.weight.peft.default.a", "parameter.model"] {
            let name = file.names().into_iter().find(|name| name.starts_with(lost)).unwrap().to_string();
            let rest = file.tensors().into_iter().filter(|(of, _)| *of != name);
            fs::write(&path, safetensors::serialize(rest, None).unwrap()).unwrap();
            let found = resume();
            assert!(found.contains(name.trim_start_matches("parameter.")), "{name}: {found}");
            assert_eq!(found.matches("in the checkpoint").count(), 1, "{found}");
        }
        fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert!(resume().contains("malformed weights"), "{}", resume());
    }

    #[test]
    fn half_precision_goes_on_bit_by_bit() {
        let files = tempfile::tempdir().unwrap();
        model(&autodiff().inner(), false).save_pretrained(files.path()).unwrap();
        let base = || {
            let dtype = burn::tensor::FloatDType::BF16;
            LlamaForCausalLm::from_pretrained_as(files.path(), &autodiff(), dtype).unwrap()
        };
        // All of it in bf16, then copies in bf16 beside factors in f32.
        for adapter in [None, Some(lora().with_modules_to_save(["norm", "lm_head"]))] {
            let mut whole = base();
            if let Some(adapter) = &adapter {
                whole.add_adapter("default", adapter).unwrap();
            }
            let directory = tempfile::tempdir().unwrap();
            let config = training().with_save_total_limit(None);
            let mut trainer = Trainer::new(&config, examples(), &Collator::new(7)).unwrap();
            let reports = train(&mut whole, &mut trainer, &[3], directory.path());
            let mut resumed = base();
            let again = tempfile::tempdir().unwrap();
            let collator = Collator::new(7);
            let mut trainer =
                Trainer::resume(directory.path(), &mut resumed, &config, examples(), &collator).unwrap();
            assert_eq!(train(&mut resumed, &mut trainer, &[], again.path()), reports[3..]);
            assert!(bits(&resumed) == bits(&whole));
        }
    }

    #[test]
    fn a_checkpoint_is_replaced_and_what_is_of_another_training_stays() {
        let directory = tempfile::tempdir().unwrap();
        let mut net = model(&autodiff(), false);
        net.add_adapter("default", lora()).unwrap();
        let new = || Trainer::new(&training(), examples(), &Collator::new(7)).unwrap();
        let mut trainer = new();
        trainer.step(&mut net).unwrap();
        let place = trainer.save(&net, directory.path()).unwrap();
        trainer.evaluate(&net, &examples()).unwrap();
        assert_eq!(trainer.save(&net, directory.path()).unwrap(), place);
        assert!(Checkpoint::list(directory.path()).unwrap()[0].eval_loss.is_some());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);

        let error = new().save(&net, directory.path()).unwrap_err().to_string();
        assert!(error.contains("checkpoint-1` is in the way of a checkpoint of step 0\nhint: "), "{error}");
        trainer.step(&mut net).unwrap();
        let other = directory.path().join("checkpoint-2");
        fs::create_dir(&other).unwrap();
        fs::write(other.join(STATE_FILE), "{\"global_step\": 2}").unwrap();
        let error = trainer.save(&net, directory.path()).unwrap_err().to_string();
        assert!(error.contains("checkpoint-2` is in the way"), "{error}");
        assert!(other.join(STATE_FILE).exists());
        assert!(matches!(Checkpoint::list(directory.path()), Err(LlamaError::Json { .. })));
        // Another program's checkpoint does not keep this one from being saved.
        trainer.step(&mut net).unwrap();
        trainer.save(&net, directory.path()).unwrap();

        let file = place.join(STATE_FILE);
        let text = fs::read_to_string(&file).unwrap();
        for (from, to, what) in [
            ("\"seconds\": ", "\"seconds\": -", "-"),
            (
                "\"unread\": []",
                "\"unread\": [{\"loss\": 1, \"num_targets\": 1}, {\"loss\": 1, \"num_targets\": 1}]",
                "2 losses of 1 steps",
            ),
        ] {
            assert!(text.contains(from), "{text}");
            fs::write(&file, text.replacen(from, to, 1)).unwrap();
            let mut net = model(&autodiff(), false);
            let resumed = Trainer::resume(&place, &mut net, &training(), examples(), &Collator::new(7));
            let error = resumed.err().unwrap().to_string();
            assert!(error.contains("trainer_state.json` is damaged: ") && error.contains(what), "{error}");
        }
    }

    #[test]
    fn numbers_that_are_none_are_not_saved() {
        let directory = tempfile::tempdir().unwrap();
        let mut net = model(&autodiff(), false);
        net.add_adapter("default", lora()).unwrap();
        let mut trainer = Trainer::new(&training(), examples(), &Collator::new(7)).unwrap();
        trainer.step(&mut net).unwrap();
        trainer.save(&net, directory.path()).unwrap();
        let good = net.clone();
        let weight = &mut net.model.layers[0].mlp.down_proj;
        *weight = weight.clone().map(&mut Infinite);
        let error = trainer.save(&net, directory.path()).unwrap_err().to_string();
        assert!(
            error.starts_with("a number of `model.layers.0.mlp.down_proj.weight.peft.default.a` is inf"),
            "{error}"
        );
        // Steps 2 and 3 go wrong, which step 4 would say.
        trainer.step(&mut net).unwrap();
        trainer.step(&mut net).unwrap();
        let error = trainer.save(&net, directory.path()).unwrap_err();
        assert!(
            matches!(&error, LlamaError::NotFinite { step: 2, examples, .. } if examples.len() == 8),
            "{error}"
        );
        assert_eq!(Checkpoint::list(directory.path()).unwrap().len(), 1);
        let mut resumed = model(&autodiff(), false);
        Trainer::resume(directory.path(), &mut resumed, &training(), examples(), &Collator::new(7)).unwrap();
        assert!(bits(&resumed) == bits(&good));
    }

    struct Infinite;

    impl burn::module::ModuleMapper for Infinite {
        fn map_float<const D: usize>(
            &mut self,
            param: burn::module::Param<Tensor<D>>,
        ) -> burn::module::Param<Tensor<D>> {
            if !param.is_require_grad() {
                return param;
            }
            param.map(|value| (value.ones_like() * f64::INFINITY).detach().require_grad())
        }
    }
}
