//! Saving, resuming, and what is refused.

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
        ("lora+", training().with_loraplus_lr_ratio(Some(4.0)).with_weight_decay(0.1), vec![("a", lora())]),
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
            let mut trainer = Trainer::resume(&place, &mut resumed, &config, examples(), &collator).unwrap();
            assert_eq!(trainer.steps(), step, "{kind}");
            let rest = train(&mut resumed, &mut trainer, &all, again.path());
            let skip = |report: &StepReport| StepReport { without_gradient: vec![], ..report.clone() };
            assert_eq!(
                rest.iter().map(skip).collect::<Vec<_>>(),
                reports[step..].iter().map(skip).collect::<Vec<_>>(),
                "{kind} from {step}"
            );
            assert!(bits(&resumed) == expected, "{kind} from {step}");
            assert_eq!(trainer.evaluations_since_best(), trainer_of(&reports, directory.path()), "{kind}");
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
    // A base that has moved is the same base.
    let mut moved = base();
    moved.add_adapter("default", lora().with_base_model_name_or_path("elsewhere")).unwrap();
    assert_eq!(resume(&mut moved, training(), examples(), 7), "");

    let other = training().with_learning_rate(0.02).with_seed(3).with_gradient_checkpointing(true);
    let found = resume(&mut base(), other, examples(), 6);
    for line in [
        "`gradient_checkpointing`: false in the checkpoint, true now",
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
    // A GPU may lack the type.
    let device = burn::tensor::Device::flex();
    model(&device, false).save_pretrained(files.path()).unwrap();
    let device = device.autodiff();
    let base = || {
        let dtype = burn::tensor::FloatDType::BF16;
        LlamaForCausalLm::from_pretrained_as(files.path(), &device, dtype).unwrap()
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
