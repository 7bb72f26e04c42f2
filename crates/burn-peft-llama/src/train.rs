//! Training: the loop, its options, its checkpoints.

mod accumulation;
mod adamw;
pub(crate) mod check;
mod checkpoint;
mod config;
mod evaluation;
mod mean_loss;
mod memory;
mod numbers;
mod order;
mod report;
mod trainer;

use burn::module::Module;
use burn::tensor::Tensor;

use crate::batch::Batch;
use crate::model::LlamaForCausalLm;

pub use checkpoint::{Checkpoint, CheckpointDifference};
pub use config::TrainingConfig;
pub use evaluation::{Evaluation, evaluate};
pub use memory::MemoryEstimate;
pub use report::StepReport;
pub use trainer::Trainer;

/// A language model that [`Trainer`] and [`evaluate`] can work on.
pub trait CausalLmLoss: Module {
    /// Mean cross-entropy over the labelled tokens of `batch`, in nats, `[1]`.
    fn loss(&self, batch: &Batch) -> Tensor<1>;

    /// Number of tokens that the model knows. Examples with others are refused before training begins; `None` trusts
    /// them.
    fn vocab_size(&self) -> Option<usize> {
        None
    }

    /// Asks the model to compute things again in backward instead of keeping them. A model that cannot does nothing.
    fn enable_gradient_checkpointing(&mut self) {}
}

impl CausalLmLoss for LlamaForCausalLm {
    fn loss(&self, batch: &Batch) -> Tensor<1> {
        Self::loss(self, batch)
    }

    fn vocab_size(&self) -> Option<usize> {
        Some(self.config().vocab_size)
    }

    fn enable_gradient_checkpointing(&mut self) {
        self.set_gradient_checkpointing(true);
    }
}

#[cfg(test)]
mod tests {
    use burn::module::Param;
    use burn::nn::{Embedding, Linear};
    use burn::tensor::activation::log_softmax;
    use burn::tensor::{Device, FloatDType, TensorData};

    use super::*;
    use crate::batch::Collator;
    use crate::config::LlamaConfig;
    use crate::conversation::Example;
    use crate::error::LlamaError;
    use crate::testing::model;

    /// Predicts the next token from the present one alone.
    #[derive(Module, Debug)]
    pub(super) struct Bigram {
        pub(super) embedding: Embedding,
        pub(super) head: Linear,
    }

    impl Bigram {
        /// Always the same weights: the generator of the device is shared with tests that run at the same time.
        pub(super) fn new(device: &Device) -> Self {
            let weights = |rows: usize, columns: usize| {
                let value = |i: usize| ((i * 37 + 11) % 101) as f32 / 101.0 - 0.5;
                let values: Vec<f32> = (0..rows * columns).map(value).collect();
                Param::from_data(TensorData::new(values, [rows, columns]), device)
            };
            let embedding = Embedding { weight: weights(8, 6) };
            let bias = Some(Param::from_data([0.0f32; 8], device));
            Self { embedding, head: Linear { weight: weights(6, 8), bias } }
        }
    }

    impl CausalLmLoss for Bigram {
        fn loss(&self, batch: &Batch) -> Tensor<1> {
            let hidden: Tensor<2> = self.embedding.forward(batch.input_ids.clone()).flatten(0, 1);
            let logits = self.head.forward(hidden.select(0, batch.positions.clone()));
            let targets = batch.targets.clone().unsqueeze_dim(1);
            log_softmax(logits, 1).gather(1, targets).mean().neg()
        }
    }

    pub(super) fn autodiff() -> Device {
        Device::default().autodiff()
    }

    /// Each token is followed by the next one; lengths from 2 to 6, so that means of batches weigh differently.
    pub(super) fn examples() -> Vec<Example> {
        let example = |i: u32| {
            let input_ids: Vec<u32> = (0..2 + i % 5).map(|j| (i + j) % 7).collect();
            let labels = input_ids.iter().map(|&id| i64::from(id)).collect();
            Example { input_ids, labels }
        };
        (0..21).map(example).collect()
    }

    pub(super) fn config() -> TrainingConfig {
        TrainingConfig::new().with_learning_rate(0.05).with_epochs(8).with_batch_size(4)
    }

    /// All steps, and their reports.
    pub(super) fn fit<M: CausalLmLoss>(
        model: &mut M,
        examples: &[Example],
        config: &TrainingConfig,
    ) -> Result<Vec<StepReport>, LlamaError> {
        let mut trainer = Trainer::new(config, examples, &Collator::new(7))?;
        let mut reports = vec![];
        while let Some(report) = trainer.step(model)? {
            reports.push(report);
        }
        Ok(reports)
    }

    pub(super) fn run(config: &TrainingConfig) -> (Bigram, Vec<StepReport>) {
        let mut model = Bigram::new(&autodiff());
        let reports = fit(&mut model, &examples(), config).unwrap();
        (model, reports)
    }

    pub(super) fn weights(model: &Bigram) -> Vec<f32> {
        model.head.weight.val().into_data().iter::<f32>().collect()
    }

    pub(super) fn furthest(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    #[test]
    fn training_learns_and_reports() {
        let (model, reports) = run(&config().with_warmup_steps(4));
        assert_eq!(reports.len(), 8 * 6);
        let last = reports.last().unwrap();
        assert_eq!((last.step, last.total_steps, last.epoch), (48, 48, 8.0));
        assert_eq!(last.num_tokens, 8 * examples().iter().map(|e| e.input_ids.len()).sum::<usize>());
        assert_eq!(reports[0].learning_rate, 0.0);
        assert!((reports[4].learning_rate - 0.05).abs() < 1e-12 && last.learning_rate > 0.0);
        let read: Vec<usize> = reports.iter().filter(|r| r.loss.is_some()).map(|r| r.step).collect();
        assert_eq!(read, [1, 10, 20, 30, 40, 48]);
        assert!(reports[0].grad_norm.unwrap() > 0.0 && reports[1].grad_norm.is_none());
        assert!((reports[0].loss.unwrap() - 8f64.ln()).abs() < 1.0);
        assert!(last.loss.unwrap() < 0.3, "{last:?}");
        let evaluation = evaluate(&model, &examples(), &Collator::new(7), 5).unwrap();
        assert!(evaluation.loss < 0.3 && evaluation.perplexity() > 1.0);
        assert_eq!(evaluation.num_targets, examples().iter().map(Example::num_targets).sum::<usize>());
    }

    /// Its norms are in f64, its losses are added up in f32, and both are read together.
    #[test]
    fn a_model_in_f64_is_trained() {
        let mut model = Bigram::new(&Device::flex().autodiff());
        fn wide<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
            Tensor::from_inner(tensor.inner().cast(FloatDType::F64)).require_grad()
        }
        model.embedding.weight = model.embedding.weight.map(wide);
        model.head.weight = model.head.weight.map(wide);
        model.head.bias = model.head.bias.map(|bias| bias.map(wide));
        let mut trainer = Trainer::new(&config(), examples(), &Collator::new(7)).unwrap();
        let report = trainer.step(&mut model).unwrap().unwrap();
        assert!(report.loss.unwrap() > 1.0 && report.grad_norm.unwrap() > 0.0, "{report:?}");
    }

    #[test]
    fn the_seed_decides_and_the_input_model_does_not_change_the_order() {
        let once = run(&config()).0;
        assert_eq!(weights(&once), weights(&run(&config()).0));
        assert!(furthest(&weights(&once), &weights(&run(&config().with_seed(7)).0)) > 1e-3);
    }

    #[test]
    fn accumulation_counts_optimizer_steps_and_clipping_limits_them() {
        let (_, reports) = run(&config().with_epochs(2).with_grad_accumulation(4).with_log_every(1));
        assert_eq!(reports.len(), 4);
        assert_eq!((reports[0].epoch, reports[1].epoch, reports[3].epoch), (0.5, 1.0, 2.0));
        let free = run(&config().with_max_grad_norm(None)).1;
        assert!(free[0].loss.is_some() && free[0].grad_norm.is_some());
    }

    #[test]
    fn max_steps_repeats_the_examples_and_the_loop_may_end_early() {
        let (_, reports) = run(&config().with_epochs(1).with_max_steps(Some(9)));
        assert_eq!((reports.len(), reports[8].total_steps, reports[8].epoch), (9, 9, 1.5));
        let mut model = Bigram::new(&autodiff());
        let mut trainer = Trainer::new(&config(), examples(), &Collator::new(7)).unwrap();
        while let Some(report) = trainer.step(&mut model).unwrap() {
            assert!(model.devices()[0].is_autodiff());
            if report.step == 3 {
                break;
            }
        }
        assert_eq!((trainer.steps(), trainer.total_steps(), trainer.epoch()), (3, 48, 0.5));
    }

    #[test]
    fn a_number_that_goes_wrong_is_named_with_its_step_and_its_examples() {
        let message = |model: &mut Bigram, config: &TrainingConfig| match fit(model, &examples(), config) {
            Err(LlamaError::NotFinite { what, step, examples, .. }) => (what, step, examples),
            other => panic!("{other:?}"),
        };
        let mut model = Bigram::new(&autodiff());
        model.head.weight = model.head.weight.map(|w| (w * f64::NAN).detach().require_grad());
        let order = order::epoch_batches(&lengths(), 4, 42, 0);
        assert_eq!(message(&mut model, &config()), ("the loss".to_string(), 1, order[0].clone()));

        // The loss of the fourth step is the first to feel a rate that is far too high; it is read at the tenth.
        let mut model = Bigram::new(&autodiff());
        let high = config().with_learning_rate(1e38).with_warmup_steps(3).with_max_grad_norm(None);
        let (what, step, examples) = message(&mut model, &high);
        assert!((2..6).contains(&step), "{what} {step}");
        assert_eq!(examples, order[step - 1]);

        // A finite loss whose gradient is too large for f32.
        let mut model = Bigram::new(&autodiff());
        model.embedding.weight = model.embedding.weight.map(|w| (w * 1e25).detach().require_grad());
        model.head.weight = model.head.weight.map(|w| (w * 1e-25).detach().require_grad());
        let expected = "the squared norm of the gradient of `head.weight`".to_string();
        assert_eq!(message(&mut model, &config()), (expected, 1, order[0].clone()));
    }

    fn lengths() -> Vec<usize> {
        examples().iter().map(|example| example.input_ids.len()).collect()
    }

    #[test]
    fn an_adapter_that_gets_no_gradient_says_so_at_the_first_step() {
        use burn_peft::{LoraConfig, PeftModel};
        #[derive(Module, Debug)]
        struct Two {
            used: Bigram,
            unused: Linear,
        }
        impl CausalLmLoss for Two {
            fn loss(&self, batch: &Batch) -> Tensor<1> {
                self.used.loss(batch)
            }
        }
        let two = || {
            let used = Bigram::new(&autodiff());
            Two { unused: used.head.clone(), used }
        };
        let mut model = two();
        model.add_adapter("unused", LoraConfig::new(2).with_target_modules(["unused"])).unwrap();
        model.add_adapter("used", LoraConfig::new(2).with_target_modules(["head"])).unwrap();
        model.set_adapter(&["unused", "used"]).unwrap();
        let error = fit(&mut model, &examples(), &config()).unwrap_err();
        assert!(matches!(&error, LlamaError::NoGradient { adapter } if adapter == "unused"), "{error}");

        let mut model = two();
        model.add_adapter("both", LoraConfig::new(2).with_target_modules(["unused", "head"])).unwrap();
        let reports = fit(&mut model, &examples(), &config()).unwrap();
        let expected = ["unused.weight.peft.both.a", "unused.weight.peft.both.b"];
        assert_eq!(reports[0].without_gradient, expected);
        assert!(reports[1..].iter().all(|report| report.without_gradient.is_empty()));
    }

    #[test]
    fn an_adapter_learns_and_the_frozen_base_stays() {
        use burn_peft::{LoraConfig, PeftModel};
        let device = autodiff();
        device.seed(5);
        let mut model = LlamaConfig::new(8, 16, 2).with_heads(2, 1).init(&device);
        model
            .add_adapter("default", LoraConfig::new(4).with_target_modules(["q_proj", "v_proj", "down_proj"]))
            .unwrap();
        let base = |model: &LlamaForCausalLm| -> Vec<f32> {
            model.model.layers[0].mlp.down_proj.weight.base().into_data().iter::<f32>().collect()
        };
        let before = (base(&model), evaluate(&model, &examples(), &Collator::new(7), 8).unwrap().loss);
        // Enough for any start: other tests draw from the same generator.
        fit(&mut model, &examples(), &config().with_epochs(30)).unwrap();
        assert_eq!(base(&model), before.0);
        let after = evaluate(&model, &examples(), &Collator::new(7), 8).unwrap().loss;
        assert!(after < 0.9 * before.1, "{} to {after}", before.1);
    }

    /// Whether the device's generator stands where the step began. On Flex, because dropout sets the generator of other
    /// devices. Other tests draw from the same one, so one time in many is enough, and the seed is one that no other test has.
    #[test]
    fn with_gradient_checkpointing_dropout_takes_no_number_from_the_device() {
        use burn::tensor::Distribution;
        use burn_peft::{LoraConfig, PeftModel};
        let device = Device::flex().autodiff();
        let mut model = model(&device, false);
        let lora = LoraConfig::new(2).with_lora_dropout(0.5).with_target_modules(["q_proj"]);
        model.add_adapter("default", &lora).unwrap();
        let drawn = || Tensor::<1>::random([8], Distribution::Default, &device).into_data();
        let draws_nothing = |is_checkpointing| {
            let config = config().with_seed(0x5eed).with_max_steps(Some(1));
            let config = config.with_gradient_checkpointing(is_checkpointing);
            fit(&mut model.clone(), &examples(), &config).unwrap();
            let after = drawn();
            device.seed(order::spread_seed(config.seed, 1));
            after == drawn()
        };
        assert!((0..1_000).any(|_| draws_nothing(true)));
        assert!((0..50).all(|_| !draws_nothing(false)));
    }

    #[test]
    fn a_base_in_half_precision_takes_an_adapter_but_in_f16_no_full_training() {
        use burn_peft::{LoraConfig, PeftModel};
        let dir = tempfile::tempdir().unwrap();
        // A GPU may lack one of the types.
        let device = Device::flex();
        model(&device, false).save_pretrained(dir.path()).unwrap();
        let device = device.autodiff();
        // All examples in each batch, so that the losses of the steps compare.
        let config = config().with_batch_size(21).with_max_steps(Some(12)).with_log_every(1);
        let train = |mut model: LlamaForCausalLm| -> Result<Vec<f64>, LlamaError> {
            let reports = fit(&mut model, &examples(), &config)?;
            Ok(reports.into_iter().filter_map(|report| report.loss).collect())
        };
        for dtype in [FloatDType::BF16, FloatDType::F16] {
            let mut model = LlamaForCausalLm::from_pretrained_as(dir.path(), &device, dtype).unwrap();
            match (dtype, train(model.clone())) {
                (FloatDType::F16, Err(LlamaError::TrainableF16 { parameter })) => {
                    assert_eq!(parameter, "model.embed_tokens.weight");
                }
                (FloatDType::BF16, Ok(losses)) => assert!(losses[11] < losses[0], "{losses:?}"),
                (_, other) => panic!("{dtype:?}: {other:?}"),
            }
            let lora = LoraConfig::new(4).with_target_modules(["q_proj", "v_proj", "down_proj"]);
            model.add_adapter("default", &lora).unwrap();
            assert_eq!(model.model.norm.weight.base().dtype(), dtype.into());
            let losses = train(model).unwrap();
            assert!(losses.len() == 12 && losses.iter().all(|loss| loss.is_finite()), "{losses:?}");
            assert!(losses[11] < 0.8 * losses[0], "{dtype:?}: {losses:?}");
        }
    }
}
