//! The layers that the benchmarks compare, all with weights of the same shape. Our adapters start with `B != 0`; Burn starts
//! its own at zero, which costs the same.

pub mod layer;
pub mod process;
pub mod training;

use burn::module::{Lora, Module, ParamGroup};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Tensor};
use burn_peft::{InitLoraWeights, LoraConfig, LoraLinear, PeftError, PeftModel};
use serde::Serialize;

/// Sizes of one comparison.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Case {
    /// Rows of the input: batch times sequence.
    pub n: usize,
    /// Inputs and outputs of the layer.
    pub width: usize,
    /// Rank of the adapter.
    pub r: usize,
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "n={} width={} r={}", self.n, self.width, self.r)
    }
}

/// A layer to compare.
pub trait Contestant: Sized {
    /// The layer for a case, ready to train.
    ///
    /// # Errors
    /// If the adapter cannot be attached.
    fn new(case: Case, device: &Device) -> Result<Self, PeftError>;

    /// `[n, width]` to `[n, width]`.
    fn forward(&self, x: Tensor<2>) -> Tensor<2>;
}

#[derive(Module, Debug)]
struct Model<L: Module> {
    layer: L,
}

fn config(case: Case) -> LoraConfig {
    LoraConfig::new(case.r)
        .with_lora_alpha(2.0 * case.r as f64)
        .with_init_lora_weights(InitLoraWeights::Random)
        .with_target_modules(["layer"])
}

fn linear(case: Case, device: &Device) -> Linear {
    device.seed(0);
    LinearConfig::new(case.width, case.width).with_bias(false).init(device)
}

/// `nn::Linear`, frozen, without an adapter: the floor.
#[derive(Debug)]
pub struct Bare(Linear);

impl Contestant for Bare {
    fn new(case: Case, device: &Device) -> Result<Self, PeftError> {
        Ok(Self(linear(case, device).no_grad()))
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.0.forward(x)
    }
}

/// [`LoraLinear`]: the adapter works on activations.
#[derive(Debug)]
pub struct BurnPeft(Model<LoraLinear>);

impl Contestant for BurnPeft {
    fn new(case: Case, device: &Device) -> Result<Self, PeftError> {
        let mut model = Model { layer: LoraLinear::from(linear(case, device)) };
        model.add_adapter("default", config(case))?;
        Ok(Self(model))
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.0.layer.forward(x)
    }
}

/// Burn's own `apply_lora` on `nn::Linear`: the adapter works on the weight.
#[derive(Debug)]
pub struct BurnApplyLora(Linear);

impl Contestant for BurnApplyLora {
    fn new(case: Case, device: &Device) -> Result<Self, PeftError> {
        let lora = Lora::new(case.r, 2.0 * case.r as f64).set_param_group(ParamGroup::all());
        Ok(Self(linear(case, device).apply_lora(lora)))
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.0.forward(x)
    }
}
