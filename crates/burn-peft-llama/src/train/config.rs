//! The options of a training.

use burn::config::Config;
use burn::module::ParamGroup;
use burn::optim::{AdamWConfig, ModuleOptimizer};
use burn_peft::{LoraPlus, LoraPlusGroups};

use super::adamw::LoadableAdamW;
use crate::error::LlamaError;
use crate::schedule::Schedule;

/// How to train. The defaults are those of transformers' `Trainer`, but for `log_every`.
///
/// ```
/// use burn_peft_llama::{Schedule, TrainingConfig};
///
/// let config = TrainingConfig::new().with_learning_rate(2e-4).with_schedule(Schedule::Cosine);
/// assert_eq!((config.epochs, config.batch_size, config.max_grad_norm), (3, 8, Some(1.0)));
/// ```
#[non_exhaustive]
#[derive(Config, Debug, PartialEq)]
pub struct TrainingConfig {
    /// Highest learning rate. LoRA needs about ten times that of full fine-tuning: 1e-4 to 1e-3. Default: 5e-5.
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
    /// With LoRA+, how many times as high the learning rate of `B` is as that of `A`: see [`LoraPlus`], which also says
    /// what decays. PEFT's `loraplus_lr_ratio`. Default: `None`, plain AdamW.
    #[config(default = "None")]
    pub loraplus_lr_ratio: Option<f64>,
    /// With LoRA+, the learning rate of the factors of embeddings, which follows no schedule. PEFT's
    /// `loraplus_lr_embedding`. Default: 1e-6.
    #[config(default = 1e-6)]
    pub loraplus_lr_embedding: f64,
    /// Largest global norm of the gradients, or `None` for no clipping. Default: 1.
    #[config(default = "Some(1.0)")]
    pub max_grad_norm: Option<f64>,
    /// Whether the model computes each block a second time instead of keeping what it computed: see
    /// [`LlamaForCausalLm::set_gradient_checkpointing`](crate::LlamaForCausalLm::set_gradient_checkpointing). transformers'
    /// `gradient_checkpointing`. A model that is not from this crate may ignore it. Default: as
    /// the model is set, which is `false` unless you changed it.
    #[config(default = false)]
    pub gradient_checkpointing: bool,
    /// Seed of the order of the examples and of dropout. Default: 42.
    #[config(default = 42)]
    pub seed: u64,
    /// How many optimizer steps lie between two readings of the loss from the device. Default: 10.
    #[config(default = 10)]
    pub log_every: usize,
    /// How many checkpoints are kept, beside the one with the least loss of an evaluation; `None` for all. transformers'
    /// `save_total_limit`. Default: 2.
    #[config(default = "Some(2)")]
    pub save_total_limit: Option<usize>,
}

impl TrainingConfig {
    /// Optimizer steps of one pass over so many examples.
    pub fn steps_per_epoch(&self, examples: usize) -> usize {
        examples.div_ceil(self.batch_size).div_ceil(self.grad_accumulation)
    }

    /// Optimizer steps of a training on so many examples.
    pub fn total_steps(&self, examples: usize) -> usize {
        self.max_steps.unwrap_or(self.epochs * self.steps_per_epoch(examples))
    }

    pub(super) fn check(&self) -> Result<(), LlamaError> {
        let refuse = |option, expected, found| Err(LlamaError::InvalidOption { option, expected, found });
        let counts = [
            ("batch_size", self.batch_size),
            ("grad_accumulation", self.grad_accumulation),
            ("log_every", self.log_every),
            ("epochs", if self.max_steps.is_some() { 1 } else { self.epochs }),
            ("max_steps", self.max_steps.unwrap_or(1)),
            ("save_total_limit", self.save_total_limit.unwrap_or(1)),
        ];
        if let Some((option, _)) = counts.into_iter().find(|(_, count)| *count == 0) {
            return refuse(option, "1 or more", "0".to_string());
        }
        if self.max_grad_norm == Some(0.0) {
            return refuse("max_grad_norm", "a number above 0, or none", "0".to_string());
        }
        let numbers = [
            ("learning_rate", self.learning_rate),
            ("weight_decay", f64::from(self.weight_decay)),
            ("max_grad_norm", self.max_grad_norm.unwrap_or(1.0)),
        ];
        for (option, value) in numbers {
            if !(value.is_finite() && value >= 0.0) {
                return refuse(option, "a finite number of 0 or more", value.to_string());
            }
        }
        Ok(())
    }

    /// The learning rates of LoRA+, if they are asked for.
    pub(super) fn lora_plus(&self) -> Option<LoraPlus> {
        let ratio = self.loraplus_lr_ratio?;
        Some(LoraPlus::new(ratio).with_lr_embedding(self.loraplus_lr_embedding))
    }

    /// AdamW with torch's defaults: betas 0.9 and 0.999, epsilon 1e-8.
    pub(super) fn optimizer(&self, lora_plus: Option<&LoraPlusGroups>) -> ModuleOptimizer {
        let config = AdamWConfig::new().with_epsilon(1e-8).with_weight_decay(self.weight_decay);
        let optimizer = ModuleOptimizer::from(LoadableAdamW(config.build()));
        if self.weight_decay == 0.0 {
            return optimizer;
        }
        let undecayed = match lora_plus {
            Some(groups) => groups.without_decay(),
            None => ParamGroup::from_any_predicates(vec!["norm.weight", ".bias"]),
        };
        optimizer.with_group(undecayed, LoadableAdamW(config.with_weight_decay(0.0).build()), None)
    }
}

#[cfg(test)]
mod tests {
    use burn::optim::GradientsParams;
    use burn::tensor::{Device, Tensor};

    use super::*;
    use crate::train::tests::{Bigram, autodiff, config, weights};

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
            let mut optimizer = config().with_weight_decay(decay).optimizer(None);
            for g in gradients {
                let mut grads = GradientsParams::new();
                let plain = Device::default();
                grads.register(model.head.weight.id, Tensor::<2>::full([6, 8], g, &plain));
                grads.register(model.head.bias.as_ref().unwrap().id, Tensor::<1>::full([8], g, &plain));
                model = optimizer.step(0.1, model, grads);
            }
            let actual = if path_decays {
                weights(&model)[0]
            } else {
                model.head.bias.unwrap().val().into_data().iter::<f32>().next().unwrap()
            };
            assert!((f64::from(actual) - expected).abs() < 2e-6, "{actual} != {expected} at decay {decay}");
        }
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
