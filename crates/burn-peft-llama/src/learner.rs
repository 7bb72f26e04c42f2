//! Burn's own learner: the traits of burn-train for [`LlamaForCausalLm`].

use burn::tensor::activation::log_softmax;
use burn::tensor::{ExecutionError, FloatDType, Int, Tensor};
use burn_train::metric::{AccuracyInput, Adaptor, LossInput};
use burn_train::{InferenceStep, ItemLazy, TrainOutput, TrainStep};

use crate::batch::Batch;
use crate::model::LlamaForCausalLm;
use crate::train::check::hint;

/// What a training step gives to metrics: the loss.
#[non_exhaustive]
#[derive(Clone, Debug)]
pub struct TrainingOutput {
    /// Mean loss per labelled token, `[1]`.
    pub loss: Tensor<1>,
    /// Number of labelled tokens.
    pub num_targets: usize,
}

impl Adaptor<LossInput> for TrainingOutput {
    /// The loss once per labelled token, so that the metric's mean over batches is the mean over tokens.
    fn adapt(&self) -> LossInput {
        LossInput::new(self.loss.clone().expand([self.num_targets]))
    }
}

impl ItemLazy for TrainingOutput {
    fn sync(self) -> Result<Self, ExecutionError> {
        self.loss.device().flush()?;
        Ok(Self { loss: self.loss.without_autodiff(), ..self })
    }
}

/// What a validation step gives to metrics: the loss, and which labelled tokens would be predicted greedily.
#[non_exhaustive]
#[derive(Clone, Debug)]
pub struct ValidationOutput {
    /// Mean loss per labelled token, `[1]`.
    pub loss: Tensor<1>,
    /// 1 for each labelled token that has the largest logit, otherwise 0, `[n]`.
    pub correct: Tensor<1, Int>,
}

impl Adaptor<LossInput> for ValidationOutput {
    /// The loss once per labelled token, so that the metric's mean over batches is the mean over tokens.
    fn adapt(&self) -> LossInput {
        LossInput::new(self.loss.clone().expand(self.correct.dims()))
    }
}

impl Adaptor<AccuracyInput> for ValidationOutput {
    /// The logits are not kept for the metric, so there are two classes, wrong and right, and right is always expected.
    fn adapt(&self) -> AccuracyInput {
        let right = self.correct.clone().float().unsqueeze_dim::<2>(1);
        let wrong = right.clone().neg().add_scalar(1.0);
        AccuracyInput::new(Tensor::cat(vec![wrong, right], 1), self.correct.ones_like())
    }
}

impl ItemLazy for ValidationOutput {
    fn sync(self) -> Result<Self, ExecutionError> {
        self.loss.device().flush()?;
        Ok(Self { loss: self.loss.without_autodiff(), ..self })
    }
}

/// Lets Burn's learner train the model.
///
/// Two of the learner's options differ from [`Trainer`](crate::Trainer): its gradient accumulation adds up the mean losses of
/// the batches, so tokens of short batches weigh more and the learning rate is to be divided by the number of
/// batches; and its gradient clipping is by tensor.
impl TrainStep for LlamaForCausalLm {
    type Input = Batch;
    type Output = TrainingOutput;

    /// # Panics
    /// If nothing is trained, for instance because the adapters are merged.
    fn step(&self, batch: Batch) -> TrainOutput<TrainingOutput> {
        let loss = self.loss(&batch);
        assert!(loss.is_tracked(), "no parameter is trainable\nhint: {}", hint(self));
        let output = TrainingOutput { loss: loss.clone(), num_targets: batch.num_targets };
        TrainOutput::new(self, loss.backward(), output)
    }
}

impl InferenceStep for LlamaForCausalLm {
    type Input = Batch;
    type Output = ValidationOutput;

    fn step(&self, batch: Batch) -> ValidationOutput {
        let logits = self.head().logits_of(self.labelled(&batch)).cast(FloatDType::F32);
        let targets = batch.targets.unsqueeze_dim::<2>(1);
        let correct = logits.clone().argmax(1).equal(targets.clone()).int().flatten(0, 1);
        let loss = log_softmax(logits, 1).gather(1, targets).mean().neg();
        ValidationOutput { loss, correct }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use burn::data::dataloader::DataLoaderBuilder;
    use burn::data::dataset::InMemDataset;
    use burn::optim::{AdamWConfig, ModuleOptimizer, SgdConfig};
    use burn::tensor::Device;
    use burn_peft::{LoraConfig, PeftModel};
    use burn_train::logger::InMemoryMetricLogger;
    use burn_train::metric::{AccuracyMetric, LossMetric, Metric, MetricMetadata, Numeric};
    use burn_train::{ExecutionStrategy, Learner, MultiDeviceOptim, SupervisedTraining};

    use super::*;
    use crate::batch::Collator;
    use crate::config::LlamaConfig;
    use crate::conversation::Example;
    use crate::schedule::{LrSchedule, Schedule};
    use crate::testing::{add_drawn_adapter, deviation, drawn};

    fn model(device: &Device) -> LlamaForCausalLm {
        drawn(&LlamaConfig::new(11, 16, 1).with_heads(2, 1), device)
    }

    fn examples() -> Vec<Example> {
        let example = |i: u32| {
            let input_ids: Vec<u32> = (0..3 + i % 3).map(|j| (i + j) % 10).collect();
            let labels = input_ids.iter().map(|&id| i64::from(id)).collect();
            Example { input_ids, labels }
        };
        (0..24).map(example).collect()
    }

    fn batch(device: &Device) -> Batch {
        Collator::new(10).collate(&examples()[..4], device).unwrap()
    }

    fn metadata() -> MetricMetadata {
        let progress = burn::data::dataloader::Progress { items_processed: 1, items_total: 1, unit: None };
        MetricMetadata { progress, iteration: None, lr: None }
    }

    #[test]
    fn a_training_step_has_the_loss_and_a_gradient_of_each_parameter() {
        let device = Device::default().autodiff();
        let model = model(&device);
        let expected = model.loss(&batch(&device)).into_scalar::<f32>();
        let output = TrainStep::step(&model, batch(&device));
        assert!(output.grads.get::<2>(model.model.embed_tokens.weight.id).is_some());
        let mut metric = LossMetric::new();
        metric.update(&output.item.sync().unwrap().adapt(), &metadata()).unwrap();
        assert!((metric.value().unwrap().current() - f64::from(expected)).abs() < 1e-5);
    }

    #[test]
    fn a_validation_step_has_the_loss_and_the_greedy_accuracy() {
        let device = Device::default();
        let model = model(&device);
        let batch = batch(&device);
        let output = InferenceStep::step(&model, batch.clone());
        let expected = model.loss(&batch).into_scalar::<f32>();
        assert!((output.loss.clone().into_scalar::<f32>() - expected).abs() < 1e-5);

        let [b, s] = batch.shape();
        let greedy: Tensor<1, Int> =
            model.forward(batch.input_ids, Some(batch.attention_mask)).argmax(2).reshape([b * s]);
        let hits = greedy.select(0, batch.positions).equal(batch.targets).int().sum().into_scalar::<i64>();
        let mut metric = AccuracyMetric::new();
        metric.update(&output.adapt(), &metadata()).unwrap();
        let expected = 100.0 * hits as f64 / batch.num_targets as f64;
        assert!(
            (metric.value().unwrap().current() - expected).abs() < 1e-6,
            "{hits} of {}",
            batch.num_targets
        );
    }

    fn adapted(device: &Device) -> LlamaForCausalLm {
        let mut model = model(device);
        let config = LoraConfig::new(2).with_lora_alpha(8.0).with_target_modules(["lm_head", "q_proj"]);
        add_drawn_adapter(&mut model, "default", &config);
        model
    }

    /// The gradients of a step are what devices exchange.
    #[test]
    fn a_training_step_with_adapters_has_their_gradients_alone() {
        let device = Device::default().autodiff();
        let model = adapted(&device);
        let output = TrainStep::step(&model, batch(&device));
        let tensors = model.adapter_tensors("default").unwrap();
        assert!(tensors.iter().all(|tensor| output.grads.get::<2>(tensor.id).is_some()));
        assert_eq!((output.grads.len(), tensors.len()), (4, 4));
    }

    #[test]
    fn a_mixed_batch_is_validated_with_the_adapter_of_each_row() {
        let device = Device::default();
        let rows = [Some("default"), None, None, Some("default")];
        let model = adapted(&device);
        let mixed = model.for_rows(&rows).unwrap();
        let loss =
            |model: &LlamaForCausalLm| InferenceStep::step(model, batch(&device)).loss.into_scalar::<f32>();
        let expected = mixed.loss(&batch(&device)).into_scalar::<f32>();
        assert!((loss(&mixed) - expected).abs() < 1e-5);
        assert!((loss(&model) - expected).abs() > 1e-3);
    }

    #[test]
    #[should_panic(expected = "the adapters are merged; call `unmerge_adapter`")]
    fn a_training_step_on_merged_adapters_names_the_cause() {
        let device = Device::default().autodiff();
        let mut model = adapted(&device);
        TrainStep::step(&model, batch(&device));
        model.merge_adapter().unwrap();
        TrainStep::step(&model, batch(&device));
    }

    #[test]
    fn burns_learner_trains_it() {
        let device = Device::default().autodiff();
        let model = model(&device);
        let loader = |device: Device| {
            let builder = DataLoaderBuilder::new(Collator::new(10)).batch_size(4).set_device(device);
            builder.build(InMemDataset::new(examples()))
        };
        let before = model.loss(&batch(&device)).into_scalar::<f32>();
        let schedule = LrSchedule::new(Schedule::Linear, 0.02, 2, 24);
        let learner = Learner::new(model, AdamWConfig::new().with_epsilon(1e-8).init(), schedule);
        let dir = tempfile::tempdir().unwrap();
        let valid: Arc<_> = loader(Device::default());
        let result = SupervisedTraining::new(dir.path(), loader(device.clone()), valid)
            .metric_train_numeric(LossMetric::new())
            .metric_valid_numeric(LossMetric::new())
            .metric_valid_numeric(AccuracyMetric::new())
            .with_metric_logger(InMemoryMetricLogger::new())
            .with_application_logger(None)
            .num_epochs(4)
            .launch(learner);
        let after = result.model.loss(&batch(&Device::default())).into_scalar::<f32>();
        assert!(after < 0.7 * before, "{before} to {after}");
    }

    /// Trains adapters for two epochs and gives the logits of a batch.
    fn trained(
        strategy: ExecutionStrategy,
        examples: Vec<Example>,
        batch_size: usize,
        (optimizer, learning_rate): (ModuleOptimizer, f64),
    ) -> Vec<f64> {
        let device = Device::default();
        let loader = |examples, device| {
            let builder = DataLoaderBuilder::new(Collator::new(10)).batch_size(batch_size).set_device(device);
            builder.build(InMemDataset::new(examples))
        };
        let (training, validation) =
            (loader(examples.clone(), device.clone().autodiff()), loader(examples, device.clone()));
        let learner = Learner::new(adapted(&device.clone().autodiff()), optimizer, learning_rate);
        let dir = tempfile::tempdir().unwrap();
        let result = SupervisedTraining::new(dir.path(), training, validation)
            .with_training_strategy(strategy.into())
            .metric_train_numeric(LossMetric::new())
            .with_metric_logger(InMemoryMetricLogger::new())
            .with_application_logger(None)
            .num_epochs(2)
            .launch(learner);
        let batch = batch(&device);
        result.model.forward(batch.input_ids, Some(batch.attention_mask)).into_data().iter().collect()
    }

    /// Each device takes its part of the examples in order. Burn adds up the gradients of the devices: AdamW's steps do not
    /// depend on how large gradients are, those of plain SGD do.
    #[test]
    fn two_devices_train_as_one_with_the_batches_of_both() {
        let device = Device::default().autodiff();
        let examples: Vec<Example> = (0..24)
            .map(|i: u32| {
                let input_ids: Vec<u32> = (0..4).map(|j| (i * i + 3 * j) % 10).collect();
                Example { labels: input_ids.iter().map(|id| i64::from(*id)).collect(), input_ids }
            })
            .collect();
        let (first, second) = examples.split_at(12);
        let in_turns: Vec<Example> =
            first.chunks(4).zip(second.chunks(4)).flat_map(|(a, b)| [a, b].concat()).collect();
        let adam_w = || AdamWConfig::new().with_epsilon(1e-8).with_weight_decay(0.0).init();
        let sgd = || SgdConfig::new().init();
        let runs = [((adam_w(), 0.02), (adam_w(), 0.02)), ((sgd(), 0.1), (sgd(), 0.2))];
        for (of_two, of_one) in runs {
            let devices = vec![device.clone(), device.clone()];
            let on_two = ExecutionStrategy::multi(devices, MultiDeviceOptim::OptimMainDevice);
            let two = trained(on_two, examples.clone(), 4, of_two);
            let one = trained(ExecutionStrategy::single(device.clone()), in_turns.clone(), 8, of_one.clone());
            let off = deviation(&two, &one);
            assert!(off < 1e-5, "{off:e}");
            let otherwise = trained(ExecutionStrategy::single(device.clone()), first.to_vec(), 4, of_one);
            assert!(deviation(&otherwise, &one) > 1e-2);
        }
    }
}
