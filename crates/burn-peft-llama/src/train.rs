//! A short training loop: AdamW, schedule, global clipping, token-weighted accumulation.

use std::{
    cmp::Reverse,
    ops::ControlFlow,
    time::{Duration, Instant},
};

use burn::{
    config::Config,
    module::{Module, ModuleVisitor, Param, ParamGroup},
    optim::{AdamWConfig, GradientsAccumulator, GradientsParams, ModuleOptimizer},
    tensor::{Device, FloatDType, Tensor},
};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};

use crate::{Batch, Collator, Example, LlamaError, LlamaForCausalLm, Schedule, clip_grad_norm};

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

/// How to train. The defaults are those of transformers' `Trainer`, but for `log_every`.
///
/// ```
/// use burn_peft_llama::{Schedule, TrainingConfig};
///
/// let config = TrainingConfig::new().with_learning_rate(2e-4).with_schedule(Schedule::Cosine);
/// assert_eq!((config.epochs, config.batch_size, config.max_grad_norm), (3, 8, Some(1.0)));
/// ```
#[derive(Config, Debug, PartialEq)]
pub struct TrainingConfig {
    /// Highest learning rate. LoRA wants about ten times that of full fine-tuning: 1e-4 to 1e-3. Default: 5e-5.
    #[config(default = 5e-5)]
    pub learning_rate: f64,
    /// Passes over the examples. Default: 3.
    #[config(default = 3)]
    pub epochs: usize,
    /// Optimizer steps, instead of `epochs`: examples are repeated as often as needed. Default: `None`.
    #[config(default = "None")]
    pub max_steps: Option<usize>,
    /// Examples per batch, that is per forward pass. Default: 8.
    #[config(default = 8)]
    pub batch_size: usize,
    /// Batches per optimizer step. Each labelled token weighs the same, whatever batch it is in. Default: 1.
    #[config(default = 1)]
    pub grad_accumulation: usize,
    /// Optimizer steps over which the learning rate rises from 0. Default: 0.
    #[config(default = 0)]
    pub warmup_steps: usize,
    /// What the learning rate does after the warm-up. Default: `linear`.
    #[config(default = "Schedule::Linear")]
    pub schedule: Schedule,
    /// AdamW's decoupled weight decay; norms and biases are left out of it, as by transformers. Default: 0.
    #[config(default = 0.0)]
    pub weight_decay: f32,
    /// Largest global norm of the gradients, or `None` for no clipping. Default: 1.
    #[config(default = "Some(1.0)")]
    pub max_grad_norm: Option<f64>,
    /// Seed of the order of the examples. Default: 42.
    #[config(default = 42)]
    pub seed: u64,
    /// The loss is read from the device once in so many optimizer steps. Default: 10.
    #[config(default = 10)]
    pub log_every: usize,
}

impl TrainingConfig {
    fn check(&self) -> Result<(), LlamaError> {
        let counts = [
            ("batch_size", self.batch_size),
            ("grad_accumulation", self.grad_accumulation),
            ("log_every", self.log_every),
            ("epochs", if self.max_steps.is_some() { 1 } else { self.epochs }),
            ("max_steps", self.max_steps.unwrap_or(1)),
        ];
        for (option, value) in counts {
            if value == 0 {
                return Err(LlamaError::TrainingOption {
                    option,
                    expected: "1 or more",
                    found: "0".to_owned(),
                });
            }
        }
        let expected = "a finite number of 0 or more";
        let numbers = [
            ("learning_rate", self.learning_rate),
            ("weight_decay", f64::from(self.weight_decay)),
            ("max_grad_norm", self.max_grad_norm.unwrap_or(1.0)),
        ];
        if self.max_grad_norm == Some(0.0) {
            let expected = "a number above 0, or none";
            return Err(LlamaError::TrainingOption {
                option: "max_grad_norm",
                expected,
                found: "0".to_owned(),
            });
        }
        for (option, value) in numbers {
            if !(value.is_finite() && value >= 0.0) {
                return Err(LlamaError::TrainingOption { option, expected, found: value.to_string() });
            }
        }
        Ok(())
    }

    /// AdamW with torch's defaults: betas 0.9 and 0.999, epsilon 1e-8.
    fn optimizer(&self) -> ModuleOptimizer {
        let config = AdamWConfig::new().with_epsilon(1e-8).with_weight_decay(self.weight_decay);
        if self.weight_decay == 0.0 {
            return config.init();
        }
        let undecayed = ParamGroup::from_any_predicates(vec!["norm.weight", ".bias"]);
        config.init().with_group(undecayed, config.with_weight_decay(0.0).build(), None)
    }
}

/// What happened in one optimizer step.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StepReport {
    /// The step, from 1.
    pub step: usize,
    /// Steps of the whole training.
    pub total_steps: usize,
    /// Passes over the examples so far, such as 1.5.
    pub epoch: f64,
    /// The step's learning rate.
    pub learning_rate: f64,
    /// Mean loss per labelled token over the steps since the last one that had a loss; `None` between them.
    pub loss: Option<f64>,
    /// Norm of the step's gradients before clipping, where there is a loss and clipping is on.
    pub grad_norm: Option<f64>,
    /// Tokens seen so far, without padding.
    pub num_tokens: usize,
    /// Time since the training began.
    pub elapsed: Duration,
}

impl StepReport {
    /// Tokens per second since the training began, without padding.
    pub fn tokens_per_second(&self) -> f64 {
        self.num_tokens as f64 / self.elapsed.as_secs_f64().max(f64::MIN_POSITIVE)
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
///
/// - [`LlamaError::TrainingOption`] for a configuration that makes no sense,
/// - [`LlamaError::NotTrainable`] if the model is not on an autodiff device, or all its parameters are frozen,
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

/// What [`evaluate`] measures.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Evaluation {
    /// Mean loss per labelled token, in nats.
    pub loss: f64,
    /// Number of labelled tokens.
    pub num_targets: usize,
}

impl Evaluation {
    /// The exponential of the loss.
    pub fn perplexity(&self) -> f64 {
        self.loss.exp()
    }
}

/// The mean loss of `model` per labelled token of `examples`, in batches of `batch_size` of like length.
///
/// A model that is being trained is evaluated as `model.valid()`: without gradients and dropout.
///
/// # Errors
///
/// [`LlamaError::TrainingOption`] if `batch_size` is 0, those of [`Collator::collate`], and
/// [`LlamaError::DeviceRead`] if the loss cannot be read.
pub fn evaluate<M: CausalLmLoss>(
    model: &M,
    examples: &[Example],
    collator: &Collator,
    batch_size: usize,
) -> Result<Evaluation, LlamaError> {
    TrainingConfig::new().with_batch_size(batch_size).check()?;
    check_examples(examples, collator, model.vocab_size())?;
    let device = device(model)?;
    let model = if device.is_autodiff() { model.valid() } else { model.clone() };
    let device = device.inner();
    let mut order: Vec<&Example> = examples.iter().collect();
    order.sort_by_key(|example| Reverse(example.input_ids.len()));
    let mut mean = MeanLoss::default();
    for batch in order.chunks(batch_size) {
        let batch: Vec<Example> = batch.iter().copied().cloned().collect();
        let batch = collator.collate(&batch, &device)?;
        mean.add((model.loss(&batch) * batch.num_targets as f64, batch.num_targets));
    }
    let num_targets = mean.count;
    Ok(Evaluation { loss: mean.take()?.unwrap_or(f64::NAN), num_targets })
}

/// The gradient of the mean loss over all labelled tokens of several batches, and that loss as sum and count.
fn window_grads<M: CausalLmLoss>(
    model: &M,
    window: &[Batch],
) -> Result<(GradientsParams, (Tensor<1>, usize)), LlamaError> {
    let total: usize = window.iter().map(|batch| batch.num_targets).sum();
    let mut accumulator = GradientsAccumulator::new();
    let mut losses = MeanLoss::default();
    for batch in window {
        let loss = model.loss(batch);
        losses.add((loss.clone().inner() * batch.num_targets as f64, batch.num_targets));
        // The mean of means would weigh the tokens of short batches more.
        let loss = if window.len() == 1 { loss } else { loss * (batch.num_targets as f64 / total as f64) };
        accumulator.accumulate(model, GradientsParams::from_grads(loss.backward(), model));
    }
    let grads = accumulator.grads();
    match losses.sum {
        Some(sum) if !grads.is_empty() => Ok((grads, (sum, losses.count))),
        _ => Err(LlamaError::NotTrainable { hint: "the loss does not depend on any trainable parameter" }),
    }
}

/// A mean loss that stays on the device until it is asked for.
#[derive(Default)]
struct MeanLoss {
    sum: Option<Tensor<1>>,
    count: usize,
}

impl MeanLoss {
    /// Adds the sum of the losses of `count` tokens.
    fn add(&mut self, (sum, count): (Tensor<1>, usize)) {
        let sum = sum.cast(FloatDType::F32);
        self.sum = Some(match self.sum.take() {
            Some(before) => before + sum,
            None => sum,
        });
        self.count += count;
    }

    /// Reads the mean and begins anew.
    fn take(&mut self) -> Result<Option<f64>, LlamaError> {
        let Self { sum, count } = std::mem::take(self);
        sum.map(|sum| Ok(scalar(sum)? / count as f64)).transpose()
    }
}

fn scalar(tensor: Tensor<1>) -> Result<f64, LlamaError> {
    tensor.try_into_scalar::<f64>().map_err(|error| LlamaError::DeviceRead { source: error.into() })
}

fn check_examples(
    examples: &[Example],
    collator: &Collator,
    vocab_size: Option<usize>,
) -> Result<(), LlamaError> {
    if examples.is_empty() {
        return Err(LlamaError::EmptyBatch);
    }
    for (index, example) in examples.iter().enumerate() {
        collator.check(index, example)?;
        // Labels are tokens of the example or masked; padding may stand beside it.
        let mut ids = example.input_ids.iter().chain([&collator.pad_token_id]);
        let vocab_size = vocab_size.unwrap_or(usize::MAX);
        if let Some(&id) = ids.find(|&&id| id as usize >= vocab_size) {
            return Err(LlamaError::ExampleTokenOutOfRange { index, id, vocab_size });
        }
    }
    Ok(())
}

fn device<M: Module>(model: &M) -> Result<Device, LlamaError> {
    model.devices().first().cloned().ok_or(LlamaError::NotTrainable { hint: "the model has no parameters" })
}

fn check_trainable<M: Module>(model: &M, device: &Device) -> Result<(), LlamaError> {
    struct AnyTrainable(bool);
    impl ModuleVisitor for AnyTrainable {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0 |= param.is_require_grad();
        }
    }
    if !device.is_autodiff() {
        let hint = "the model is not on an autodiff device; load it on `device.autodiff()`";
        return Err(LlamaError::NotTrainable { hint });
    }
    let mut any = AnyTrainable(false);
    model.visit(&mut any);
    if any.0 {
        Ok(())
    } else {
        Err(LlamaError::NotTrainable { hint: "all parameters are frozen; add an adapter" })
    }
}

/// Batches within which lengths are sorted: enough to save padding, few enough to keep the order random.
const SORTED_BATCHES: usize = 16;

/// The examples of one pass as batches of indices, in random order.
fn epoch_batches(lengths: &[usize], batch_size: usize, seed: u64, epoch: usize) -> Vec<Vec<usize>> {
    let mut rng =
        StdRng::seed_from_u64(seed.wrapping_add((epoch as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.shuffle(&mut rng);
    for window in order.chunks_mut(batch_size.saturating_mul(SORTED_BATCHES)) {
        window.sort_by_key(|&i| Reverse(lengths[i]));
    }
    let mut batches: Vec<Vec<usize>> = order.chunks(batch_size).map(<[usize]>::to_vec).collect();
    batches.shuffle(&mut rng);
    batches
}

#[cfg(test)]
mod tests {
    use burn::{
        nn::{Embedding, Linear},
        tensor::{TensorData, activation::log_softmax},
    };

    use super::*;
    use crate::LlamaConfig;

    /// Predicts the next token from the present one alone.
    #[derive(Module, Debug)]
    struct Bigram {
        embedding: Embedding,
        head: Linear,
    }

    impl Bigram {
        /// Always the same weights: the generator of the device is shared with tests that run at the same time.
        fn new(device: &Device) -> Self {
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

    fn autodiff() -> Device {
        Device::flex().autodiff()
    }

    /// Each token is followed by the next one; lengths from 2 to 6, so that means of batches weigh differently.
    fn examples() -> Vec<Example> {
        let example = |i: u32| {
            let input_ids: Vec<u32> = (0..2 + i % 5).map(|j| (i + j) % 7).collect();
            let labels = input_ids.iter().map(|&id| i64::from(id)).collect();
            Example { input_ids, labels }
        };
        (0..21).map(example).collect()
    }

    fn config() -> TrainingConfig {
        TrainingConfig::new().with_learning_rate(0.05).with_epochs(8).with_batch_size(4)
    }

    fn run(config: &TrainingConfig) -> (Bigram, Vec<StepReport>) {
        let mut reports = Vec::new();
        let model = fit(Bigram::new(&autodiff()), &examples(), &Collator::new(7), config, |report, _| {
            reports.push(report.clone());
            ControlFlow::Continue(())
        });
        (model.unwrap(), reports)
    }

    fn weights(model: &Bigram) -> Vec<f32> {
        model.head.weight.val().into_data().iter::<f32>().collect()
    }

    fn furthest(a: &[f32], b: &[f32]) -> f32 {
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
    fn accumulated_batches_give_the_gradient_of_one_large_batch() {
        let model = Bigram::new(&autodiff());
        let collator = Collator::new(7);
        let rows = examples();
        // 1, 5 and 4 labelled tokens: the mean of the means is another gradient.
        let parts = [&rows[0..1], &rows[4..5], &rows[3..4]];
        let whole = collator.collate(&parts.concat(), &autodiff()).unwrap();
        let parts: Vec<Batch> =
            parts.iter().map(|rows| collator.collate(rows, &autodiff()).unwrap()).collect();
        let counts: Vec<usize> = parts.iter().map(|part| part.num_targets).collect();
        assert_eq!(counts, [1, 5, 4]);
        let (grads, (sum, count)) = window_grads(&model, &parts).unwrap();
        let (expected, (expected_sum, _)) = window_grads(&model, &[whole]).unwrap();
        assert_eq!(count, 10);
        assert!((scalar(sum).unwrap() - scalar(expected_sum).unwrap()).abs() < 1e-5);
        let id = model.head.weight.id;
        let values = |grads: &GradientsParams| -> Vec<f32> {
            grads.get::<2>(id).unwrap().into_data().iter::<f32>().collect()
        };
        assert!(furthest(&values(&grads), &values(&expected)) < 1e-6);
        let mut means = GradientsAccumulator::new();
        for part in &parts {
            let loss = model.loss(part) / 3.0;
            means.accumulate(&model, GradientsParams::from_grads(loss.backward(), &model));
        }
        assert!(furthest(&values(&means.grads()), &values(&expected)) > 1e-3);
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
    fn adamw_is_the_one_of_torch() {
        // One weight, gradients 0.5, -1, 0.25, learning rate 0.1, in f64 by torch's formula.
        for (decay, path_decays) in [(0.0f32, true), (0.5, true), (0.5, false)] {
            let gradients = [0.5f64, -1.0, 0.25];
            let (mut expected, mut m, mut v) = (1.0f64, 0.0f64, 0.0f64);
            for (t, g) in gradients.iter().enumerate() {
                let t = t as i32 + 1;
                let decayed = if path_decays { f64::from(decay) } else { 0.0 };
                expected *= 1.0 - 0.1 * decayed;
                (m, v) = (0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g);
                let denominator = v.sqrt() / (1.0 - 0.999f64.powi(t)).sqrt() + 1e-8;
                expected -= 0.1 / (1.0 - 0.9f64.powi(t)) * m / denominator;
            }
            let mut model = Bigram::new(&autodiff());
            model.head.weight = model.head.weight.map(|w| w.ones_like().detach().require_grad());
            model.head.bias = model.head.bias.map(|b| b.map(|b| b.ones_like().detach().require_grad()));
            let mut optimizer = config().with_weight_decay(decay).optimizer();
            for g in gradients {
                let mut grads = GradientsParams::new();
                let plain = Device::flex();
                grads.register(model.head.weight.id, Tensor::<2>::full([6, 8], g, &plain));
                grads.register(model.head.bias.as_ref().unwrap().id, Tensor::<1>::full([8], g, &plain));
                model = optimizer.step(0.1, model, grads);
            }
            let actual = match path_decays {
                true => weights(&model)[0],
                false => model.head.bias.unwrap().val().into_data().iter::<f32>().next().unwrap(),
            };
            assert!((f64::from(actual) - expected).abs() < 2e-6, "{actual} != {expected} at decay {decay}");
        }
    }

    #[test]
    fn batches_hold_each_example_once_with_like_lengths_in_another_order_each_time() {
        let lengths: Vec<usize> = (0..1000).map(|i| 1 + (i * 37) % 90).collect();
        let batches = epoch_batches(&lengths, 8, 1, 0);
        let mut all: Vec<usize> = batches.concat();
        all.sort_unstable();
        assert_eq!(all, (0..1000).collect::<Vec<_>>());
        assert_eq!(batches, epoch_batches(&lengths, 8, 1, 0));
        assert_ne!(batches, epoch_batches(&lengths, 8, 1, 1));
        assert_ne!(batches, epoch_batches(&lengths, 8, 2, 0));
        let padded: usize =
            batches.iter().map(|b| b.len() * b.iter().map(|&i| lengths[i]).max().unwrap()).sum();
        let tokens: usize = lengths.iter().sum();
        assert!(padded * 10 < tokens * 12, "{padded} for {tokens}");
        // Without the last shuffle, each window would go from long to short.
        let first: Vec<usize> = batches[..16].iter().map(|b| lengths[b[0]]).collect();
        assert!(!first.is_sorted_by(|a, b| a >= b), "{first:?}");
    }

    #[test]
    fn what_cannot_be_trained_is_an_error_before_the_first_step() {
        let never = |_: &StepReport, _: &Bigram| -> ControlFlow<()> { panic!("a step was made") };
        let fit =
            |model, examples: &[Example], config| fit(model, examples, &Collator::new(7), &config, never);
        let model = || Bigram::new(&autodiff());
        assert!(matches!(fit(model(), &[], config()), Err(LlamaError::EmptyBatch)));
        let unlabelled = [Example { input_ids: vec![1, 2], labels: vec![-100, -100] }];
        assert!(matches!(fit(model(), &unlabelled, config()), Err(LlamaError::NoLabels { index: 0 })));
        let option = |config| match fit(model(), &examples(), config) {
            Err(LlamaError::TrainingOption { option, .. }) => option,
            other => panic!("{other:?}"),
        };
        assert_eq!(option(config().with_batch_size(0)), "batch_size");
        assert_eq!(option(config().with_epochs(0)), "epochs");
        assert_eq!(option(config().with_learning_rate(f64::NAN)), "learning_rate");
        let plain = fit(Bigram::new(&Device::flex()), &examples(), config()).unwrap_err().to_string();
        assert!(plain.contains("autodiff()"), "{plain}");
        let frozen = fit(model().no_grad(), &examples(), config()).unwrap_err().to_string();
        assert!(frozen.contains("frozen"), "{frozen}");
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
            .add_adapter(
                "default",
                &LoraConfig::new(4).with_target_modules(["q_proj", "v_proj", "down_proj"]),
            )
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
    fn a_configuration_round_trips_through_json() {
        let config =
            config().with_schedule(Schedule::Cosine).with_max_grad_norm(None).with_max_steps(Some(3));
        let json = serde_json::to_string(&config).unwrap();
        assert!(json.contains("\"cosine\""), "{json}");
        assert_eq!(serde_json::from_str::<TrainingConfig>(&json).unwrap(), config);
    }
}
