//! A device that recomputes activations: everything works there, with the gradients of a device that keeps them.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{Device, TensorData};
use burn_peft::{Bias, CombinationType, InitLoraWeights, LoraConfig, PeftModel};
use burn_peft_llama::{
    Collator, Example, GenerateOptions, LlamaForCausalLm, PaddingSide, Trainer, TrainingConfig, evaluate,
};
use burn_peft_tests::fixture::{Fixture, PAD_TOKEN_ID};
use burn_peft_tests::parameters::{gradients, parameters};
use burn_peft_tests::tolerance::{GRADIENT, REORDERED, TRAINED, assert_close, assert_different};

use crate::common::{load_base, masked_logits};

fn devices() -> [Device; 2] {
    [Device::default().autodiff(), Device::default().autodiff().gradient_checkpointing()]
}

fn config<const N: usize>(targets: [&str; N]) -> LoraConfig {
    LoraConfig::new(3)
        .with_lora_alpha(5.0)
        .with_init_lora_weights(InitLoraWeights::Random)
        .with_target_modules(targets)
}

/// Adapters of every kind, by the base that they are for; without one, the whole model is trained.
fn kinds() -> Vec<(&'static str, Option<LoraConfig>)> {
    let blocks = ["q_proj", "v_proj", "down_proj"];
    vec![
        ("gqa-tied", None),
        ("mha-biased", None),
        ("gqa-tied", Some(config(blocks))),
        ("gqa-tied", Some(config(["embed_tokens", "o_proj"]))),
        ("gqa-tied", Some(config(blocks).with_modules_to_save(["norm", "embed_tokens"]))),
        ("mha-biased", Some(config(["lm_head", "embed_tokens", "up_proj"]))),
        ("mha-biased", Some(config(blocks).with_bias(Bias::All))),
        ("mha-biased", Some(config(blocks).with_lora_bias(true))),
        ("mha-biased", Some(config(["q_proj"]).with_modules_to_save(["lm_head"]))),
    ]
}

/// An adapter on disk, drawn once: the generator is shared with tests that run at the same time.
fn drawn(base: &str, config: &LoraConfig) -> tempfile::TempDir {
    let files = tempfile::tempdir().unwrap();
    let mut model = load_base(base, &Device::default());
    model.add_adapter("default", config).unwrap();
    model.save_adapter("default", files.path()).unwrap();
    files
}

fn examples(base: &str) -> Vec<Example> {
    Fixture::open(base).examples()
}

/// Three steps of training without regard for anything but the loss.
fn train(mut model: LlamaForCausalLm, examples: &[Example]) -> LlamaForCausalLm {
    let config = TrainingConfig::new().with_learning_rate(0.01).with_batch_size(2).with_max_steps(Some(3));
    let mut trainer = Trainer::new(&config, examples, &Collator::new(PAD_TOKEN_ID)).unwrap();
    while trainer.step(&mut model).unwrap().is_some() {}
    model
}

fn gradients_of(model: &LlamaForCausalLm, base: &str) -> BTreeMap<String, TensorData> {
    let batch = Fixture::open(base).batch(PaddingSide::Right, &model.devices()[0]);
    gradients(model, &GradientsParams::from_grads(model.loss(&batch).backward(), model))
}

#[test]
fn gradients_and_training_are_those_without_checkpointing() {
    for (base, config) in kinds() {
        let adapter = config.as_ref().map(|config| drawn(base, config));
        let (mut expected, mut trained) = (None, None);
        for device in devices() {
            let mut model = load_base(base, &device);
            if let Some(adapter) = &adapter {
                model.load_adapter("default", adapter.path()).unwrap();
            }
            let name = format!("{base} {:?}", config.as_ref().map(|config| &config.targeting.target_modules));
            let found = gradients_of(&model, base);
            assert!(found.len() > 3, "{name}");
            let after = parameters(&train(model.clone(), &examples(base)));
            assert!(after != parameters(&model), "{name}: nothing was trained");
            let (expected, trained) =
                (expected.get_or_insert(found.clone()), trained.get_or_insert(after.clone()));
            for (path, gradient) in &found {
                assert_close(&format!("{name} {path}"), gradient, &expected[path], GRADIENT);
            }
            for (path, value) in &after {
                assert_close(&format!("{name} {path}"), value, &trained[path], TRAINED);
            }
            assert_eq!((found.len(), after.len()), (expected.len(), trained.len()));
        }
    }
}

#[test]
fn the_life_of_an_adapter_goes_its_way_there() {
    let [_, device] = devices();
    for (base, config) in kinds() {
        let Some(config) = config else { continue };
        let fixture = Fixture::open(base);
        let batch = fixture.batch(PaddingSide::Left, &device);
        let logits = |model: &LlamaForCausalLm| masked_logits(model, &batch);
        let mut net = load_base(base, &device);
        let bare = logits(&net);
        net.add_adapter("default", &config).unwrap();
        net = train(net, &fixture.examples());
        let adapted = logits(&net);
        assert_different(base, &adapted, &bare);

        // Dropout and generation.
        let collator = Collator::new(PAD_TOKEN_ID);
        assert!(evaluate(&net, &fixture.examples(), &collator, 2).unwrap().loss.is_finite());
        let options = GenerateOptions::new().with_max_new_tokens(4);
        let answers = net.generate(&[vec![5, 6, 7], vec![9]], &options).unwrap();

        net.merge_adapter().unwrap();
        assert_close(base, &logits(&net), &adapted, REORDERED);
        assert_eq!(net.generate(&[vec![5, 6, 7], vec![9]], &options).unwrap(), answers);
        assert!(evaluate(&net, &fixture.examples(), &collator, 2).unwrap().loss.is_finite());
        net.unmerge_adapter().unwrap();
        assert_eq!(logits(&net), adapted);
        net = train(net, &fixture.examples());
        let adapted = logits(&net);

        let files = tempfile::tempdir().unwrap();
        net.save_adapter("default", files.path()).unwrap();
        let mut other = load_base(base, &device);
        other.load_adapter("default", files.path()).unwrap();
        assert_eq!(logits(&other), adapted);
        other.hotswap_adapter("default", files.path()).unwrap();
        other = train(other, &fixture.examples());
        assert_different(base, &logits(&other), &bare);
        other.merge_and_unload().unwrap();
        assert_different(base, &logits(&other), &bare);
        other.unload().unwrap();
        train(other.unfreeze(), &fixture.examples());

        net.unload().unwrap();
        assert_eq!(logits(&net), bare);
    }
}

#[test]
fn several_adapters_and_mixed_batches_work_there() {
    let [_, device] = devices();
    let fixture = Fixture::open("mha-biased");
    let batch = fixture.batch(PaddingSide::Right, &device);
    let mut model = load_base("mha-biased", &device);
    let bare = masked_logits(&model, &batch);
    for (name, targets) in [("one", ["q_proj", "lm_head"]), ("two", ["embed_tokens", "v_proj"])] {
        model.add_adapter(name, config(targets).with_lora_dropout(0.1)).unwrap();
    }
    for kind in [CombinationType::Linear, CombinationType::Cat] {
        let name = format!("{kind:?}").to_lowercase();
        model.add_weighted_adapter(&name, &[("one", 0.5), ("two", 0.7)], kind).unwrap();
        model.set_adapter(&[&name, "two"]).unwrap();
        assert_different(&name, &masked_logits(&model, &batch), &bare);
        model = train(model, &fixture.examples());
    }
    let mixed = model.for_rows(&[Some("one"), None, Some("two")]).unwrap();
    assert_different("mixed", &masked_logits(&mixed, &batch), &bare);
    assert!(mixed.loss(&batch).into_scalar::<f32>().is_finite());
    let options = GenerateOptions::new().with_max_new_tokens(4);
    assert_eq!(mixed.generate(&[vec![5], vec![6], vec![7, 8]], &options).unwrap().len(), 3);
}

#[test]
fn a_freed_head_trains_there() {
    let [_, device] = devices();
    let fixture = Fixture::open("gqa-tied");
    let mut model = load_base("gqa-tied", &device);
    model.untie_lm_head();
    model.add_adapter("default", config(["lm_head", "q_proj"])).unwrap();
    let batch = fixture.batch(PaddingSide::Right, &device);
    let before = model.loss(&batch).into_scalar::<f32>();
    let after = train(model, &fixture.examples()).loss(&batch).into_scalar::<f32>();
    assert!(after < before, "{before} to {after}");
}
