//! A short training loop: AdamW, schedule, global clipping, token-weighted accumulation.

mod accumulation;
pub(crate) mod check;
mod config;
mod evaluation;
mod mean_loss;
mod order;
mod report;

use std::ops::ControlFlow;
use std::time::Instant;

use burn::module::Module;
use burn::tensor::Tensor;

use self::accumulation::window_grads;
use self::check::{check_examples, check_trainable, device};
use self::mean_loss::{MeanLoss, scalar};
use self::order::epoch_batches;
use crate::batch::{Batch, Collator};
use crate::conversation::Example;
use crate::error::LlamaError;
use crate::gradient::clip_grad_norm;
use crate::model::LlamaForCausalLm;

pub use config::TrainingConfig;
pub use evaluation::{Evaluation, evaluate};
pub use report::StepReport;

/// A language model that [`fit`] and [`evaluate`] can work on.
pub trait CausalLmLoss: Module {
    /// Mean cross-entropy over the labelled tokens of `batch`, in nats, `[1]`.
    fn loss(&self, batch: &Batch) -> Tensor<1>;

    /// Number of tokens that the model knows. Examples with others are refused before training begins; `None` trusts
    /// them.
    fn vocab_size(&self) -> Option<usize> {
        None
    }
}

impl CausalLmLoss for LlamaForCausalLm {
    fn loss(&self, batch: &Batch) -> Tensor<1> {
        Self::loss(self, batch)
    }

    fn vocab_size(&self) -> Option<usize> {
        Some(self.config().vocab_size)
    }
}

/// Trains `model` on `examples` and returns it.
///
/// Every pass has its own order, drawn from the seed; within windows of some batches, examples of like length share
/// a batch, which leaves little padding. `on_step` is called after each optimizer step with the report and the model:
/// draw a bar, evaluate, save, or end the training with [`ControlFlow::Break`].
///
/// For checkpoints of the optimizer, several devices, or Burn's dashboard, use Burn's own learner (feature `train`).
///
/// # Errors
/// - [`LlamaError::InvalidOption`] for a configuration that makes no sense,
/// - [`LlamaError::NotTrainable`] if the model is not on an autodiff device, or nothing in it is trained: all its
///   parameters are frozen, its adapters are merged or inactive, or rows of a batch name them,
/// - [`LlamaError::TrainableF16`] if a parameter that would be trained is f16; a frozen base may be,
/// - those of [`Collator::collate`], for any of the examples, before training begins,
/// - [`LlamaError::NonFiniteLoss`] if a loss that is read is not a number,
/// - [`LlamaError::DeviceRead`] if it cannot be read.
pub fn fit<M: CausalLmLoss>(
    mut model: M,
    examples: &[Example],
    collator: &Collator,
    config: &TrainingConfig,
    mut on_step: impl FnMut(&StepReport, &M) -> ControlFlow<()>,
) -> Result<M, LlamaError> {
    config.check()?;
    check_examples(examples, collator, model.vocab_size())?;
    let device = device(&model)?;
    check_trainable(&model, &device)?;

    let lengths: Vec<usize> = examples.iter().map(|example| example.input_ids.len()).collect();
    let num_batches = examples.len().div_ceil(config.batch_size);
    let steps_per_epoch = num_batches.div_ceil(config.grad_accumulation);
    let total_steps = config.max_steps.unwrap_or(config.epochs * steps_per_epoch);
    let start = Instant::now();
    let mut optimizer = config.optimizer();
    let mut logged = MeanLoss::default();
    let mut num_tokens = 0;

    let mut step = 0;
    for epoch in 0.. {
        let batches = epoch_batches(&lengths, config.batch_size, config.seed, epoch);
        for (in_epoch, window) in batches.chunks(config.grad_accumulation).enumerate() {
            if step == total_steps {
                return Ok(model);
            }
            let window = window
                .iter()
                .map(|batch| {
                    let batch: Vec<Example> = batch.iter().map(|&i| examples[i].clone()).collect();
                    collator.collate(&batch, &device)
                })
                .collect::<Result<Vec<_>, _>>()?;
            let (grads, loss) = window_grads(&model, &window)?;
            logged.add(loss);
            num_tokens += window.iter().map(|batch| batch.num_tokens).sum::<usize>();

            let (grads, norm) = match config.max_grad_norm {
                Some(max_norm) => clip_grad_norm(&model, grads, max_norm),
                None => (grads, None),
            };
            let factor = config.schedule.factor(step, config.warmup_steps, total_steps);
            let learning_rate = config.learning_rate * factor;
            model = optimizer.step(learning_rate, model, grads);
            step += 1;

            let read = step % config.log_every == 0 || step == 1 || step == total_steps;
            let (loss, grad_norm) =
                if read { (logged.take()?, norm.map(scalar).transpose()?) } else { (None, None) };
            // An infinite norm has turned the gradients into NaN, whatever the loss was.
            if let Some(loss) = loss.into_iter().chain(grad_norm).find(|number| !number.is_finite()) {
                return Err(LlamaError::NonFiniteLoss { step, loss });
            }
            let epoch = epoch as f64 + (in_epoch + 1) as f64 / steps_per_epoch as f64;
            let elapsed = start.elapsed();
            let report =
                StepReport { step, total_steps, epoch, learning_rate, loss, grad_norm, num_tokens, elapsed };
            if on_step(&report, &model).is_break() {
                return Ok(model);
            }
        }
    }
    Ok(model)
}

#[cfg(test)]
mod tests {
    use burn::module::Param;
    use burn::nn::{Embedding, Linear};
    use burn::tensor::activation::log_softmax;
    use burn::tensor::{Device, FloatDType, TensorData};

    use super::*;
    use crate::config::LlamaConfig;
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
        Device::flex().autodiff()
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

    pub(super) fn run(config: &TrainingConfig) -> (Bigram, Vec<StepReport>) {
        let mut reports = vec![];
        let model = fit(Bigram::new(&autodiff()), &examples(), &Collator::new(7), config, |report, _| {
            reports.push(report.clone());
            ControlFlow::Continue(())
        });
        (model.unwrap(), reports)
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
        assert!(free[0].loss.is_some() && free[0].grad_norm.is_none());
    }

    #[test]
    fn max_steps_repeats_the_examples_and_break_ends_early() {
        let (_, reports) = run(&config().with_epochs(1).with_max_steps(Some(9)));
        assert_eq!((reports.len(), reports[8].total_steps, reports[8].epoch), (9, 9, 1.5));
        let mut seen = 0;
        let stopped =
            fit(Bigram::new(&autodiff()), &examples(), &Collator::new(7), &config(), |report, model| {
                seen = report.step;
                assert!(model.devices()[0].is_autodiff());
                if report.step == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
        assert!(stopped.is_ok() && seen == 3);
    }

    #[test]
    fn a_loss_that_is_not_a_number_ends_the_training() {
        let mut model = Bigram::new(&autodiff());
        model.head.weight = model.head.weight.map(|w| (w * f64::NAN).detach().require_grad());
        let result = fit(model, &examples(), &Collator::new(7), &config(), |_, _| ControlFlow::Continue(()));
        assert!(matches!(result, Err(LlamaError::NonFiniteLoss { step: 1, .. })));
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
        let model =
            fit(model, &examples(), &Collator::new(7), &config(), |_, _| ControlFlow::Continue(())).unwrap();
        assert_eq!(base(&model), before.0);
        let after = evaluate(&model, &examples(), &Collator::new(7), 8).unwrap().loss;
        assert!(after < 0.9 * before.1, "{} to {after}", before.1);
    }

    #[test]
    fn a_base_in_half_precision_takes_an_adapter_but_in_f16_no_full_training() {
        use burn_peft::{LoraConfig, PeftModel};
        let dir = tempfile::tempdir().unwrap();
        model(&Device::flex(), false).save_pretrained(dir.path()).unwrap();
        // All examples in each batch, so that the losses of the steps compare.
        let config = config().with_batch_size(21).with_max_steps(Some(12)).with_log_every(1);
        let train = |model: LlamaForCausalLm| {
            let mut losses = vec![];
            let trained = fit(model, &examples(), &Collator::new(7), &config, |report, _| {
                losses.extend(report.loss);
                ControlFlow::Continue(())
            });
            trained.map(|_| losses)
        };
        for dtype in [FloatDType::BF16, FloatDType::F16] {
            let mut model = LlamaForCausalLm::from_pretrained_as(dir.path(), &autodiff(), dtype).unwrap();
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
