//! LoRA+: a higher learning rate for `B` than for `A`.

use burn::module::{Module, ParamGroup};
use burn::optim::lr_scheduler::module_lr_scheduler::{ModuleLearningRate, ModuleLrScheduler};

use crate::error::PeftError;
use crate::method::Update;
use crate::seam::Layout;

/// The learning rates of LoRA+ ([Hayou et al., 2024](https://arxiv.org/abs/2402.12354)), as PEFT's
/// `create_loraplus_optimizer` has them.
///
/// | parameters | learning rate | weight decay |
/// |---|---|---|
/// | `A`, trained tokens, copies of matrices | `lr` | as configured |
/// | `B`, magnitudes, copies of vectors | `ratio * lr` | as configured |
/// | biases | `ratio * lr` | none |
/// | both factors of an embedding | [`lr_embedding`](Self::lr_embedding) | as configured |
///
/// ```
/// use burn::module::Module;
/// use burn::nn::LinearConfig;
/// use burn::optim::{AdamWConfig, GradientsParams};
/// use burn::tensor::{Device, Tensor};
/// use burn_peft::{LoraConfig, LoraLinear, LoraPlus, PeftModel};
///
/// # #[derive(Module, Debug)]
/// # struct Model {
/// #     proj: LoraLinear,
/// # }
/// # fn main() -> Result<(), burn_peft::PeftError> {
/// # let device = Device::default().autodiff();
/// # let mut model = Model { proj: LinearConfig::new(4, 3).init(&device).into() };
/// model.add_adapter("default", &LoraConfig::new(2).with_target_modules(["proj"]))?;
/// let groups = LoraPlus::new(16.0).groups(&model)?;
///
/// let adamw = AdamWConfig::new().with_weight_decay(0.01);
/// let without_decay = adamw.clone().with_weight_decay(0.0).build();
/// let mut optimizer = adamw.init().with_group(groups.without_decay(), without_decay, None);
/// let loss = model.proj.forward(Tensor::<2>::ones([2, 4], &device)).square().mean();
/// let gradients = GradientsParams::from_grads(loss.backward(), &model);
/// let model = optimizer.step(groups.learning_rates(1e-4), model, gradients);
/// # Ok(())
/// # }
/// ```
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraPlus {
    /// How many times as high the learning rate of `B` is as that of `A`, at least 1. PEFT's `loraplus_lr_ratio`.
    pub ratio: f64,
    /// The learning rate of the factors of embeddings; it follows no schedule. Default 1e-6. PEFT's
    /// `loraplus_lr_embedding`.
    pub lr_embedding: f64,
}

/// The parameters of a model by their learning rate: see [`LoraPlus`].
#[derive(Debug, Clone)]
pub struct LoraPlusGroups {
    plus: LoraPlus,
    raised: ParamGroup,
    embeddings: ParamGroup,
    biases: ParamGroup,
}

impl LoraPlus {
    /// This ratio, and PEFT's defaults.
    pub fn new(ratio: f64) -> Self {
        Self { ratio, lr_embedding: 1e-6 }
    }

    /// Sets [`lr_embedding`](Self::lr_embedding).
    pub fn with_lr_embedding(mut self, lr_embedding: f64) -> Self {
        self.lr_embedding = lr_embedding;
        self
    }

    /// Sorts the parameters of the adapters that `model` has.
    ///
    /// # Errors
    /// [`PeftError::InvalidConfig`] for a ratio below 1 or a learning rate that is no finite number of 0 or more,
    /// [`PeftError::ForeignReparameterization`].
    pub fn groups<M: Module>(&self, model: &M) -> Result<LoraPlusGroups, PeftError> {
        if !(self.ratio.is_finite() && self.ratio >= 1.0) {
            return Err(PeftError::invalid("ratio", "a finite number of 1 or more", self.ratio));
        }
        if !(self.lr_embedding.is_finite() && self.lr_embedding >= 0.0) {
            let expected = "a finite number of 0 or more";
            return Err(PeftError::invalid("lr_embedding", expected, self.lr_embedding));
        }
        let (mut raised, mut embeddings, mut biases) = (vec![], vec![], vec![]);
        for adapter in Layout::of(model)?.states.values().flat_map(|state| &state.list) {
            for (spec, tensor) in adapter.updates.iter().flat_map(Update::parts) {
                // PEFT decides by names and axes, so this works for every method.
                let is_raised = spec.key.starts_with("lora_B") || spec.shape.len() == 1;
                if spec.key.starts_with("lora_embedding") {
                    embeddings.push(tensor.id);
                } else if is_raised {
                    raised.push(tensor.id);
                }
                if is_raised && spec.key.ends_with("bias") {
                    biases.push(tensor.id);
                }
            }
        }
        Ok(LoraPlusGroups {
            plus: *self,
            raised: ParamGroup::from_ids(raised),
            embeddings: ParamGroup::from_ids(embeddings),
            biases: ParamGroup::from_ids(biases),
        })
    }
}

impl LoraPlusGroups {
    /// The learning rates of a step where that of `A` is `lr`, for Burn's `ModuleOptimizer::step`.
    pub fn learning_rates(&self, lr: f64) -> ModuleLearningRate {
        ModuleLrScheduler::new(lr)
            .with_group(self.raised.clone(), lr * self.plus.ratio)
            .with_group(self.embeddings.clone(), self.plus.lr_embedding)
            .step()
    }

    /// The parameters without weight decay, for Burn's `ModuleOptimizer::with_group`.
    pub fn without_decay(&self) -> ParamGroup {
        self.biases.clone()
    }
}
