use std::ops::Deref;

use burn::module::{
    Content, Devices, DisplaySettings, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper,
    ModuleVisitor,
};
use burn::nn::Linear;
use burn::tensor::module::linear;
use burn::tensor::{Device, Tensor};

use crate::adapter::Adapters;
use crate::seam::LORA_LINEAR_MARK;

/// `nn::Linear` whose adapters work on activations:
///
/// `y = x W + b + Σ scaling * (dropout(x) A) B`, summed over the active adapters.
///
/// Neither the dense update `A B` nor a gradient of `W` is ever built, which is what makes LoRA cheap; on a plain
/// `nn::Linear` the same adapter works through `W + scaling * A B`. Without an adapter the layer costs what
/// `nn::Linear` costs.
///
/// The wrapper is transparent: a field `q_proj: LoraLinear` has the parameters `q_proj.weight` and `q_proj.bias`, so
/// records and checkpoints of the model with `nn::Linear` fit. [`From`] converts in both directions, and the layer
/// dereferences to `nn::Linear`.
///
/// # Example
/// ```
/// use burn::nn::LinearConfig;
/// use burn::tensor::{Device, Tensor};
/// use burn_peft::LoraLinear;
///
/// let device = Device::default();
/// let layer = LoraLinear::from(LinearConfig::new(4, 2).init(&device));
/// assert_eq!(layer.forward(Tensor::<3>::ones([1, 3, 4], &device)).dims(), [1, 3, 2]);
/// ```
#[derive(Clone, Debug)]
pub struct LoraLinear(Linear);

impl LoraLinear {
    /// Applies the layer and its active adapters.
    ///
    /// The input of an adapter is cast to the type of its factors, and its output back.
    ///
    /// # Shapes
    /// - input: `[.., d_input]`
    /// - output: `[.., d_output]`
    ///
    /// # Panics
    /// If the input's last axis is not `d_input`.
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        let Some(adapters) = self.0.weight.reparameterization::<Adapters>() else {
            return self.0.forward(input);
        };
        let bias = self.0.bias.as_ref().map(|bias| bias.val());
        let output = linear(input.clone(), self.0.weight.base(), bias);
        adapters.active().fold(output, |output, adapter| output + adapter.forward(input.clone()))
    }
}

impl From<Linear> for LoraLinear {
    fn from(layer: Linear) -> Self {
        Self(layer)
    }
}

/// The plain layer; adapters stay attached and work through the weight.
impl From<LoraLinear> for Linear {
    fn from(layer: LoraLinear) -> Self {
        layer.0
    }
}

impl Deref for LoraLinear {
    type Target = Linear;

    fn deref(&self) -> &Linear {
        &self.0
    }
}

impl Module for LoraLinear {
    fn collect_devices(&self, devices: Devices) -> Devices {
        self.0.collect_devices(devices)
    }

    fn fork(self, device: &Device) -> Self {
        Self(self.0.fork(device))
    }

    fn to_device(self, device: &Device) -> Self {
        Self(self.0.to_device(device))
    }

    fn train(self) -> Self {
        Self(self.0.train())
    }

    fn valid(&self) -> Self {
        Self(self.0.valid())
    }

    fn materialize(self) -> Self {
        Self(self.0.materialize())
    }

    /// Announces the wrapper, which adds nothing to the path, and visits the inner layer.
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        visitor.enter_module("", LORA_LINEAR_MARK);
        visitor.exit_module("", LORA_LINEAR_MARK);
        self.0.visit(visitor);
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        Self(self.0.map(mapper))
    }
}

impl ModuleDisplay for LoraLinear {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        self.0.custom_settings()
    }

    fn custom_content(&self, content: Content) -> Option<Content> {
        let content = self.0.custom_content(content)?;
        let Some(adapters) = self.0.weight.reparameterization::<Adapters>() else {
            return Some(content);
        };
        let names: Vec<String> = adapters
            .list
            .iter()
            .map(|adapter| {
                let [_, r] = adapter.a.shape().dims();
                format!("{} (r {r}{})", adapter.info.name, if adapter.info.active { "" } else { ", inactive" })
            })
            .collect();
        Some(content.add("adapters", &names.join(", ")))
    }
}

impl ModuleDisplayDefault for LoraLinear {
    fn content(&self, content: Content) -> Option<Content> {
        ModuleDisplayDefault::content(&self.0, content)
    }
}
