//! One adapted layer of the sizes that `benches/python/compare.py` gives to torch and peft.

use burn::nn::LinearConfig;
use burn::tensor::{Device, Distribution, FloatDType, Tensor};
use burn_peft::{LoraConfig, LoraLinear, PeftModel};
use burn_peft_ops::activation_dtype;
use serde::Serialize;

use crate::Model;
use crate::training::both_ways;

/// The sizes of a layer without bias and of its input.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Sizes {
    /// The name that selects it.
    pub name: &'static str,
    /// Rows of the input.
    pub rows: usize,
    /// Inputs and outputs.
    pub width: usize,
    /// Rank of the adapter; `lora_alpha` is twice as much, `lora_dropout` 0.05.
    pub rank: usize,
}

/// A layer of Llama-3.2-1B with many and with few tokens.
pub const LAYERS: [Sizes; 2] = [
    Sizes { name: "layer-1024", rows: 1024, width: 2048, rank: 16 },
    Sizes { name: "layer-64", rows: 64, width: 2048, rank: 16 },
];

/// A layer with an adapter, and its input, which requires a gradient.
pub struct Layer {
    sizes: Sizes,
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
    pub fn new(sizes: Sizes, dtype: FloatDType) -> Self {
        let device = Device::default().autodiff();
        device.seed(0);
        let mut layer = LinearConfig::new(sizes.width, sizes.width).with_bias(false).init(&device);
        layer.weight = layer.weight.map(|weight| weight.cast(dtype));
        let dtype_of_input = activation_dtype(&layer.weight.val());
        let mut model = Model { layer: LoraLinear::from(layer) };
        let config = LoraConfig::new(sizes.rank)
            .with_lora_alpha(2.0 * sizes.rank as f64)
            .with_lora_dropout(0.05)
            .with_target_modules(["layer"]);
        model.add_adapter("default", config).expect("the layer takes the adapter");
        let x = Tensor::random([sizes.rows, sizes.width], Distribution::Default, (&device, dtype_of_input));
        Self { sizes, dtype, model, x: x.require_grad() }
    }

    /// Forward and backward; returns the sum of the outputs.
    pub fn step(&mut self) -> f64 {
        let sum = self.model.layer.forward(self.x.clone()).sum();
        let _gradients = sum.backward();
        sum.into_scalar()
    }

    /// Seconds of the two products with the frozen weight alone.
    pub fn floor(&self) -> f64 {
        let Sizes { rows, width, .. } = self.sizes;
        both_ways(&self.x.device().inner(), self.dtype, [rows, width, width], false)
    }
}
