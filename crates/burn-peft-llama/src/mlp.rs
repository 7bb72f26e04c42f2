//! The feed-forward layer of a block.

use burn::module::Module;
use burn::tensor::Tensor;
use burn_peft::LoraLinear;
use burn_peft_ops::swiglu;

use crate::config::LlamaConfig;
use crate::source::Source;

/// SwiGLU: `down_proj(silu(gate_proj(x)) * up_proj(x))`.
#[derive(Module, Debug)]
pub struct LlamaMlp {
    /// `hidden_size` to `intermediate_size`.
    pub gate_proj: LoraLinear,
    /// `hidden_size` to `intermediate_size`.
    pub up_proj: LoraLinear,
    /// `intermediate_size` to `hidden_size`.
    pub down_proj: LoraLinear,
}

impl LlamaMlp {
    pub(crate) fn build<S: Source>(config: &LlamaConfig, from: &mut S, path: &str) -> Result<Self, S::Error> {
        let (hidden, ffn, bias) = (config.hidden_size, config.intermediate_size, config.has_mlp_bias());
        Ok(Self {
            gate_proj: from.layer(&format!("{path}.gate_proj"), [hidden, ffn], bias)?,
            up_proj: from.layer(&format!("{path}.up_proj"), [hidden, ffn], bias)?,
            down_proj: from.layer(&format!("{path}.down_proj"), [ffn, hidden], bias)?,
        })
    }

    /// Applies the layer to every position.
    ///
    /// # Shapes
    /// - input: `[b, s, hidden_size]`
    /// - output: `[b, s, hidden_size]`
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let gate = self.gate_proj.forward(x.clone());
        self.down_proj.forward(swiglu(gate, self.up_proj.forward(x)))
    }
}

#[cfg(test)]
mod tests {
    use burn::module::Param;
    use burn::nn::Linear;
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::testing::{assert_close, values};

    /// Row-major `[d_in, d_out]` and a bias of `d_out`.
    struct Layer<'a> {
        weight: &'a [f32],
        bias: &'a [f32],
    }

    impl Layer<'_> {
        fn on(&self, device: &Device) -> LoraLinear {
            let d_out = self.bias.len();
            let weight = TensorData::new(self.weight.to_vec(), [self.weight.len() / d_out, d_out]);
            let bias = Param::from_data(TensorData::new(self.bias.to_vec(), [d_out]), device);
            Linear { weight: Param::from_data(weight, device), bias: Some(bias) }.into()
        }

        /// One position, one number after the other.
        fn apply(&self, x: &[f32]) -> Vec<f32> {
            let mut y = self.bias.to_vec();
            for (i, x) in x.iter().enumerate() {
                for (j, y) in y.iter_mut().enumerate() {
                    *y += x * self.weight[i * self.bias.len() + j];
                }
            }
            y
        }
    }

    #[test]
    fn values_match_the_formula_element_by_element() {
        let gate = Layer { weight: &[0.5, -1.0, 2.0, 1.5, 0.25, -0.75], bias: &[0.1, -0.2, 0.3] };
        let up = Layer { weight: &[1.0, 0.5, -0.5, -2.0, 1.25, 0.75], bias: &[0.0, 0.4, -0.6] };
        let down = Layer { weight: &[1.0, -1.0, 0.5, 2.0, -1.5, 0.25], bias: &[0.7, -0.7] };
        let device = Device::default();
        let mlp =
            LlamaMlp { gate_proj: gate.on(&device), up_proj: up.on(&device), down_proj: down.on(&device) };
        let positions = [[1.0, 2.0], [-3.0, 0.5], [0.0, 0.0], [2.0, -3.0]];
        let expected: Vec<f32> = positions
            .iter()
            .flat_map(|x| {
                let silu = |x: f32| x / (1.0 + (-x).exp());
                let gated: Vec<f32> =
                    gate.apply(x).iter().zip(up.apply(x)).map(|(gate, up)| silu(*gate) * up).collect();
                down.apply(&gated)
            })
            .collect();
        let x = Tensor::<2>::from_data(positions, &device).reshape([2, 2, 2]);
        let y = mlp.forward(x);
        assert_eq!(y.dims(), [2, 2, 2]);
        assert_close(&values(y), &expected, 1e-5);
    }
}
