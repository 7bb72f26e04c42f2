//! One adapted layer of the sizes that `benches/python/compare.py` gives to torch and peft.

use burn::tensor::{Device, Distribution, FloatDType, Tensor};
use burn_peft::{LoraLinear, PeftModel};
use burn_peft_ops::activation_dtype;
use serde::Serialize;

use crate::training::both_ways;
use crate::{Case, Model, config, linear};

/// A layer with a name that selects it.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Named {
    /// The name.
    pub name: &'static str,
    /// Its sizes. The adapter has `lora_dropout` 0.05.
    #[serde(flatten)]
    pub case: Case,
}

/// A layer of Llama-3.2-1B with many and with few tokens.
pub const LAYERS: [Named; 2] = [
    Named { name: "layer-1024", case: Case { n: 1024, width: 2048, r: 16 } },
    Named { name: "layer-64", case: Case { n: 64, width: 2048, r: 16 } },
];

/// A layer with an adapter, and its input, which requires a gradient.
pub struct Layer {
    case: Case,
    dtype: FloatDType,
    model: Model<LoraLinear>,
    x: Tensor<2>,
}

impl Layer {
    /// A layer with random weights in `dtype` and an adapter in f32.
    ///
    /// # Panics
    /// If the layer takes no adapter.
    #[expect(clippy::expect_used, reason = "a benchmark without its layer measures nothing")]
    pub fn new(case: Case, dtype: FloatDType) -> Self {
        let device = Device::default().autodiff();
        let mut layer = linear(case, &device);
        layer.weight = layer.weight.map(|weight| weight.cast(dtype));
        let dtype_of_input = activation_dtype(&layer.weight.val());
        let mut model = Model { layer: LoraLinear::from(layer) };
        model
            .add_adapter("default", config(case).with_lora_dropout(0.05))
            .expect("the layer takes the adapter");
        let x = Tensor::random([case.n, case.width], Distribution::Default, (&device, dtype_of_input));
        Self { case, dtype, model, x: x.require_grad() }
    }

    /// Forward and backward; returns the sum of the outputs.
    pub fn step(&mut self) -> f64 {
        let sum = self.model.layer.forward(self.x.clone()).sum();
        let _gradients = sum.backward();
        sum.into_scalar()
    }

    /// Seconds of the two products with the frozen weight alone.
    pub fn floor(&self) -> f64 {
        let Case { n, width, .. } = self.case;
        both_ways(&self.x.device().inner(), self.dtype, [n, width, width], false)
    }
}
