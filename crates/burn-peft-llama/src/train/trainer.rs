//! Training as a loop of yours.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use burn::module::{Module, ModuleMapper, Param};
use burn::optim::ModuleOptimizer;
use burn::tensor::{Device, Tensor};
use burn_peft::{LoraPlusGroups, PeftModel};
use burn_peft_ops::with_dropout_seed;

use super::accumulation::window_grads;
use super::check::{check_examples, check_trainable, device};
use super::checkpoint::{self, Progress};
use super::evaluation::{Evaluation, evaluate};
use super::numbers::{self, Read, StepNumbers};
use super::order::{epoch_batches, spread_seed};
use super::{CausalLmLoss, StepReport, TrainingConfig};
use crate::batch::Collator;
use crate::conversation::Example;
use crate::error::LlamaError;
use crate::gradient::{Squares, clip};
use crate::parameters::parameters;

/// Trains a model, one optimizer step at a time, in a loop of yours: AdamW, a schedule, clipping by the global norm,
/// accumulation in which each labelled token weighs the same.
///
/// ```
/// use burn::tensor::Device;
/// use burn_peft::{LoraConfig, PeftModel};
/// use burn_peft_llama::{Collator, Example, LlamaConfig, Trainer, TrainingConfig};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let runs = tempfile::tempdir()?;
/// # let run = runs.path().join("run");
/// let mut model = LlamaConfig::new(100, 32, 2).with_heads(4, 2).init(&Device::flex().autodiff());
/// model.add_adapter("default", &LoraConfig::new(8).with_target_modules(["q_proj", "v_proj"]))?;
/// let example = |id: u32| Example { input_ids: vec![1, id, id], labels: vec![-100, -100, i64::from(id)] };
/// let (examples, held_out) = ((5..25).map(example).collect::<Vec<_>>(), [example(30), example(31)]);
///
/// let config = TrainingConfig::new().with_learning_rate(2e-4).with_epochs(2);
/// let mut trainer = Trainer::new(&config, examples, &Collator::new(0))?;
/// while let Some(report) = trainer.step(&mut model)? {
///     if let Some(loss) = report.loss {
///         println!("step {} of {}: loss {loss:.3}", report.step, report.total_steps);
///     }
///     if report.step % 3 == 0 {
///         trainer.evaluate(&model, &held_out)?;
///         trainer.save(&model, &run)?;
///         if trainer.evaluations_since_best() >= 3 {
///             break;
///         }
///     }
/// }
/// # Ok(())
/// # }
/// ```
///
/// [`resume`](Self::resume) goes on where [`save`](Self::save) was called, as if nothing had happened: on the CPU, every
/// bit of the adapters and of the reports is the same. That includes dropout, because each step seeds the generator of the
/// device, with a number that only [`TrainingConfig::seed`] and the step decide. So do not rely on a seed of your own
/// across steps.
///
/// Every pass over the examples has its own order, drawn from the seed; within windows of some batches, examples of like
/// length share a batch, which leaves little padding.
pub struct Trainer {
    pub(super) config: TrainingConfig,
    pub(super) examples: Vec<Example>,
    pub(super) collator: Collator,
    lengths: Vec<usize>,
    pub(super) progress: Progress,
    /// The steps since the loss was last read.
    pub(super) unread: Vec<StepNumbers>,
    /// The batches of an epoch.
    order: Option<(usize, Vec<Vec<usize>>)>,
    /// What depends on the model: from the first step on.
    pub(super) started: Option<Started>,
    pub(super) fingerprint: Option<checkpoint::Fingerprint>,
}

/// What depends on the model.
pub(super) struct Started {
    device: Device,
    groups: Option<LoraPlusGroups>,
    pub(super) optimizer: ModuleOptimizer,
    /// Whether a step has shown which parameters get gradients.
    is_checked: bool,
}

impl Trainer {
    /// A training that has yet to make its first step.
    ///
    /// # Errors
    /// - [`LlamaError::InvalidOption`] for a configuration that makes no sense,
    /// - [`LlamaError::EmptyBatch`] without examples, otherwise those of [`Collator::collate`] for any of them.
    pub fn new(
        config: &TrainingConfig,
        examples: impl Into<Vec<Example>>,
        collator: &Collator,
    ) -> Result<Self, LlamaError> {
        let examples = examples.into();
        config.check()?;
        check_examples(&examples, collator, None)?;
        Ok(Self {
            config: config.clone(),
            lengths: examples.iter().map(|example| example.input_ids.len()).collect(),
            examples,
            collator: collator.clone(),
            progress: Progress::default(),
            unread: vec![],
            order: None,
            started: None,
            fingerprint: None,
        })
    }

    /// Makes one optimizer step. `None` if all of them have been made.
    ///
    /// # Errors
    /// At the first step:
    /// - [`LlamaError::NotTrainable`] if the model is not on an autodiff device, or nothing in it is trained: all its
    ///   parameters are frozen, its adapters are merged or inactive, or rows of a batch name them,
    /// - [`LlamaError::TrainableF16`] if a parameter that would be trained is f16; a frozen base may be,
    /// - [`LlamaError::ExampleTokenOutOfRange`] for an example with a token that the model does not know,
    /// - [`LlamaError::NoGradient`] if the loss does not depend on an active adapter.
    ///
    /// At any step:
    /// - [`LlamaError::NotFinite`] if a loss or a gradient is infinite or not a number. It is noticed at the next step that
    ///   reports a loss, and names the step where it came up. The model is spoilt then: go on from a checkpoint.
    /// - [`LlamaError::DeviceRead`] if the device fails.
    pub fn step<M: CausalLmLoss>(&mut self, model: &mut M) -> Result<Option<StepReport>, LlamaError> {
        if self.progress.step >= self.total_steps() {
            return Ok(None);
        }
        let start = Instant::now();
        if self.config.gradient_checkpointing {
            model.enable_gradient_checkpointing();
        }
        if self.started.is_none() {
            self.started = Some(self.start(model)?);
        }
        let step = self.progress.step;
        let window = self.window(step);
        let examples = window.concat();
        let Some(Started { device, groups, optimizer, is_checked }) = &mut self.started else {
            return Ok(None);
        };
        let batches = window.iter().map(|batch| {
            let batch: Vec<Example> = batch.iter().map(|&i| self.examples[i].clone()).collect();
            self.collator.collate(&batch, device)
        });
        let batches = batches.collect::<Result<Vec<_>, _>>()?;

        // Dropout is a function of the seed and the step.
        let seed = spread_seed(self.config.seed, step as u64 + 1);
        device.seed(seed);
        let grads = || window_grads(model, &batches);
        // With gradient checkpointing, the seed of dropout would otherwise be read from the device, which has to be waited for.
        let (mut grads, (loss, num_targets)) =
            if self.config.gradient_checkpointing { with_dropout_seed(seed, grads)? } else { grads()? };
        let squares = Squares::of(model, &grads);
        let without_gradient = match &squares {
            Some(squares) if !*is_checked => without_gradient(model, squares)?,
            _ => vec![],
        };
        *is_checked = true;
        if let (Some(max_norm), Some(squares)) = (self.config.max_grad_norm, &squares) {
            grads = clip(model, grads, &squares.norm, max_norm);
        }
        let total_steps = self.config.total_steps(self.lengths.len());
        let factor = self.config.schedule.factor(step, self.config.warmup_steps, total_steps);
        let learning_rate = self.config.learning_rate * factor;
        let taken = take(model);
        *model = match groups {
            Some(groups) => optimizer.step(groups.learning_rates(learning_rate), taken, grads),
            None => optimizer.step(learning_rate, taken, grads),
        };

        let step = step + 1;
        self.progress.step = step;
        self.progress.num_tokens += batches.iter().map(|batch| batch.num_tokens).sum::<usize>();
        self.unread.push(StepNumbers { step, examples, loss, num_targets, squares });
        let is_read = step.is_multiple_of(self.config.log_every) || step == 1 || step == total_steps;
        let mut read = Read { loss: None, grad_norm: None };
        if is_read {
            read = numbers::read(&self.unread, model)?;
            self.unread.clear();
        }
        self.progress.seconds += start.elapsed().as_secs_f64();
        Ok(Some(StepReport {
            step,
            total_steps,
            epoch: self.epoch(),
            learning_rate,
            loss: read.loss,
            grad_norm: read.grad_norm,
            num_tokens: self.progress.num_tokens,
            elapsed: Duration::from_secs_f64(self.progress.seconds),
            without_gradient,
        }))
    }

    /// The loss of the model on examples that it is not trained on, in batches of [`TrainingConfig::batch_size`]: see
    /// [`evaluate`](crate::evaluate), which also says what the errors are. The trainer remembers it, for
    /// [`best_loss`](Self::best_loss), [`evaluations_since_best`](Self::evaluations_since_best) and the checkpoints of
    /// [`save`](Self::save).
    ///
    /// # Errors
    /// Those of [`evaluate`](crate::evaluate), and [`LlamaError::NotFinite`] if the loss is infinite or not a number.
    pub fn evaluate<M: CausalLmLoss>(
        &mut self,
        model: &M,
        examples: &[Example],
    ) -> Result<Evaluation, LlamaError> {
        let evaluation = evaluate(model, examples, &self.collator, self.config.batch_size)?;
        if !evaluation.loss.is_finite() {
            let (what, step) = ("the loss on held-out examples".to_string(), self.progress.step);
            return Err(LlamaError::NotFinite { what, value: evaluation.loss, step, examples: vec![] });
        }
        self.progress.evaluated(evaluation.loss);
        Ok(evaluation)
    }

    /// Writes a checkpoint to the directory `checkpoint-<step>` in `directory`, and returns its path.
    ///
    /// It is an adapter in PEFT's format, which anybody can load, with all that [`resume`](Self::resume) needs beside it:
    ///
    /// | file | |
    /// |---|---|
    /// | `adapter_config.json`, `adapter_model.safetensors` | the adapter `default`; others in sub-directories of their names |
    /// | `trainer.safetensors` | the trained parameters as the model holds them, and the state of AdamW |
    /// | `trainer_state.json` | the configuration, counters, and fingerprints of the base and of the examples |
    ///
    /// The directory appears when all of it is on disk: whenever the process ends, there is a whole checkpoint or none.
    /// Then those that are older than the last [`save_total_limit`](TrainingConfig::save_total_limit) are removed, but not
    /// the one with the least loss of an evaluation at its step. A checkpoint of the same step is replaced.
    ///
    /// If the base is trained, there is no adapter: then the checkpoint is for [`resume`](Self::resume) alone.
    ///
    /// # Errors
    /// - [`LlamaError::NotFinite`] if a loss, a gradient or a trained parameter is infinite or not a number: nothing is
    ///   written then, so checkpoints hold numbers,
    /// - [`LlamaError::NotTrainable`] if the adapters are merged or the model is not on an autodiff device,
    /// - [`LlamaError::CheckpointInTheWay`] if the directory has a checkpoint of a later step, or something else by the name
    ///   of the checkpoint,
    /// - [`LlamaError::WriteFile`] and [`LlamaError::Adapters`] if a file cannot be written; earlier checkpoints stay,
    /// - [`LlamaError::OptimizerState`] if Burn cannot write the state of the optimizer,
    /// - [`LlamaError::DeviceRead`] if the device fails.
    pub fn save<M: CausalLmLoss>(
        &mut self,
        model: &M,
        directory: impl AsRef<Path>,
    ) -> Result<PathBuf, LlamaError> {
        checkpoint::save(self, model, directory.as_ref())
    }

    /// Goes on from a checkpoint. `directory` is one, or holds some: then it is the latest.
    ///
    /// The model is the base, as it was when the training began. Adapters that it lacks are added as the checkpoint says,
    /// those that it has must be configured like that; then all trained parameters are set to those of the checkpoint.
    /// `config`, `examples` and `collator` must be those of the training, but for [`TrainingConfig::log_every`] and
    /// [`TrainingConfig::save_total_limit`].
    ///
    /// # Errors
    /// The model is as it was then.
    /// - [`LlamaError::NoCheckpoint`] if there is none,
    /// - [`LlamaError::CheckpointDiffers`] if the base, the examples, the configuration, the adapters or the version of this
    ///   crate are not those of the checkpoint: every difference,
    /// - [`LlamaError::ReadFile`], [`LlamaError::Json`], [`LlamaError::WrongFile`], [`LlamaError::WeightsFile`],
    ///   [`LlamaError::OptimizerState`] if a file cannot be read or used,
    /// - those of [`new`](Self::new) and of [`PeftModel::add_adapter`].
    pub fn resume<M: CausalLmLoss>(
        directory: impl AsRef<Path>,
        model: &mut M,
        config: &TrainingConfig,
        examples: impl Into<Vec<Example>>,
        collator: &Collator,
    ) -> Result<Self, LlamaError> {
        checkpoint::resume(directory.as_ref(), model, Self::new(config, examples, collator)?)
    }

    /// The steps that have been made.
    pub fn steps(&self) -> usize {
        self.progress.step
    }

    /// The steps of the whole training.
    pub fn total_steps(&self) -> usize {
        self.config.total_steps(self.lengths.len())
    }

    /// Passes over the examples so far, such as 1.5.
    pub fn epoch(&self) -> f64 {
        let per_epoch = self.config.steps_per_epoch(self.lengths.len());
        let (step, done) = (self.progress.step % per_epoch, self.progress.step / per_epoch);
        done as f64 + step as f64 / per_epoch as f64
    }

    /// The examples.
    pub fn examples(&self) -> &[Example] {
        &self.examples
    }

    /// The least loss of an [`evaluate`](Self::evaluate), those before a resume included.
    pub fn best_loss(&self) -> Option<f64> {
        self.progress.best.map(|best| best.loss)
    }

    /// How many times [`evaluate`](Self::evaluate) was called since the loss was least, for stopping early.
    pub fn evaluations_since_best(&self) -> usize {
        self.progress.evaluations_since_best
    }

    /// The numbers of the examples of each batch of a step, which is counted from 0.
    fn window(&mut self, step: usize) -> Vec<Vec<usize>> {
        let per_epoch = self.config.steps_per_epoch(self.lengths.len());
        let (epoch, window) = (step / per_epoch, step % per_epoch);
        if self.order.as_ref().is_none_or(|(of, _)| *of != epoch) {
            let batches = epoch_batches(&self.lengths, self.config.batch_size, self.config.seed, epoch);
            self.order = Some((epoch, batches));
        }
        let batches = self.order.iter().flat_map(|(_, batches)| batches);
        let count = self.config.grad_accumulation;
        batches.skip(window * count).take(count).cloned().collect()
    }

    /// Checks the model.
    pub(super) fn start<M: CausalLmLoss>(&self, model: &M) -> Result<Started, LlamaError> {
        check_examples(&self.examples, &self.collator, model.vocab_size())?;
        let device = device(model)?;
        check_trainable(model, &device)?;
        let groups = self.config.lora_plus().map(|plus| plus.groups(model)).transpose()?;
        let optimizer = self.config.optimizer(groups.as_ref());
        // A batch that has nothing for an adapter must not end a training that has gone on for long.
        Ok(Started { device, groups, optimizer, is_checked: self.progress.step > 0 })
    }
}

/// The trained parameters that got no gradient.
///
/// # Errors
/// [`LlamaError::NoGradient`] for an active adapter of which no parameter got one.
fn without_gradient<M: Module>(model: &M, squares: &Squares) -> Result<Vec<String>, LlamaError> {
    for adapter in model.adapters().into_iter().filter(|adapter| adapter.active && !adapter.merged) {
        let tensors = model.adapter_tensors(&adapter.name)?;
        if !tensors.iter().any(|tensor| squares.parameters.contains(&tensor.id)) {
            return Err(LlamaError::NoGradient { adapter: adapter.name });
        }
    }
    let trained = parameters(model).into_iter().filter(|parameter| parameter.is_trained());
    let without = trained.filter(|parameter| !squares.parameters.contains(&parameter.id));
    Ok(without.map(|parameter| parameter.name).collect())
}

/// Takes a model out of its place and leaves one of the same structure there whose trained parameters are empty. A clone
/// would keep the old values in memory until the new ones are all there.
fn take<M: Module>(model: &mut M) -> M {
    struct Empty;

    impl ModuleMapper for Empty {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if param.is_require_grad() {
                param.map(|tensor| Tensor::empty([0; D], &tensor.device()))
            } else {
                param
            }
        }
    }

    let empty = model.clone().map(&mut Empty);
    std::mem::replace(model, empty)
}
