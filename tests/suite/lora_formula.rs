//! `y = x W + b + scaling * (x A) B`, against loops that do nothing else, for any shape, rank and alpha.

use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Distribution, Tensor, TensorData};
use burn_peft::{DEFAULT_ADAPTER, InitLoraWeights, LoraConfig, LoraLinear, PeftModel};
use burn_peft_tests::parameters::parameters;
use burn_peft_tests::tolerance::{FORWARD, assert_different};
use proptest::prelude::*;

/// One layer and its input.
#[derive(Clone, Debug)]
struct Problem {
    rows: usize,
    d_in: usize,
    d_out: usize,
    r: usize,
    alpha: f64,
    rslora: bool,
    bias: bool,
}

impl Problem {
    fn any() -> impl Strategy<Value = Self> {
        // Ranks above both widths are allowed, by PEFT too.
        (1..6_usize, 1..24_usize, 1..24_usize, 1..12_usize, 0.25..40.0_f64, any::<bool>(), any::<bool>())
            .prop_map(|(rows, d_in, d_out, r, alpha, rslora, bias)| Self {
                rows,
                d_in,
                d_out,
                r,
                alpha,
                rslora,
                bias,
            })
    }

    fn layer(&self, device: &Device) -> Wrapper {
        let layer = LinearConfig::new(self.d_in, self.d_out).with_bias(self.bias).init(device);
        let mut model = Wrapper { layer: layer.into() };
        let config = LoraConfig::new(self.r)
            .with_lora_alpha(self.alpha)
            .with_use_rslora(self.rslora)
            .with_init_lora_weights(InitLoraWeights::Random)
            .with_target_modules(["layer"]);
        model.add_adapter(DEFAULT_ADAPTER, &config).unwrap();
        model
    }

    /// The formula in f64, without and with the adapter, and the largest sum of absolute values of what is added up:
    /// rounding is relative to that, since the sum itself may come out at nearly nothing.
    fn naive(&self, model: &Wrapper, x: &TensorData) -> (TensorData, TensorData, f64) {
        let parameters = parameters(model);
        let matrix = |name: &str| parameters[name].iter::<f64>().collect::<Vec<f64>>();
        let (w, a, b) = (
            matrix("layer.weight"),
            matrix("layer.weight.peft.default.a"),
            matrix("layer.weight.peft.default.b"),
        );
        let bias = if self.bias { matrix("layer.bias") } else { vec![0.0; self.d_out] };
        let x: Vec<f64> = x.iter().collect();
        let r = self.r as f64;
        let scaling = self.alpha / if self.rslora { r.sqrt() } else { r };

        let (mut base, mut adapted, mut magnitude) = (Vec::new(), Vec::new(), 0.0f64);
        for row in 0..self.rows {
            let hidden: Vec<f64> = (0..self.r)
                .map(|k| (0..self.d_in).map(|i| x[row * self.d_in + i] * a[i * self.r + k]).sum())
                .collect();
            for j in 0..self.d_out {
                let dense: f64 = (0..self.d_in).map(|i| x[row * self.d_in + i] * w[i * self.d_out + j]).sum();
                let update: f64 = (0..self.r).map(|k| hidden[k] * b[k * self.d_out + j]).sum();
                base.push(dense + bias[j]);
                adapted.push(dense + bias[j] + scaling * update);
                let dense: f64 =
                    (0..self.d_in).map(|i| (x[row * self.d_in + i] * w[i * self.d_out + j]).abs()).sum();
                let update: f64 = (0..self.r)
                    .map(|k| {
                        let hidden: f64 =
                            (0..self.d_in).map(|i| (x[row * self.d_in + i] * a[i * self.r + k]).abs()).sum();
                        hidden * b[k * self.d_out + j].abs()
                    })
                    .sum();
                magnitude = magnitude.max(dense + bias[j].abs() + scaling * update);
            }
        }
        let shape = [self.rows, self.d_out];
        (TensorData::new(base, shape), TensorData::new(adapted, shape), magnitude)
    }
}

/// A path for the layer.
#[derive(burn::module::Module, Debug)]
struct Wrapper {
    layer: LoraLinear,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn the_layer_computes_the_formula(problem in Problem::any()) {
        let device = Device::default();
        let mut model = problem.layer(&device);
        let x = Tensor::<2>::random([problem.rows, problem.d_in], Distribution::Normal(0.0, 1.0), &device);
        let (base, adapted, magnitude) = problem.naive(&model, &x.to_data());
        let assert_close = |name: &str, found: Tensor<2>, expected: &TensorData| {
            let found = found.into_data();
            let pairs = found.iter::<f64>().zip(expected.iter::<f64>());
            let furthest = pairs.map(|(found, expected)| (found - expected).abs()).fold(0.0, f64::max);
            assert!(furthest <= FORWARD.0 * magnitude, "{name}: {furthest} of {magnitude}");
        };

        assert_close("adapted", model.layer.forward(x.clone()), &adapted);
        // Through the dense weight, as a plain layer does it.
        let plain: Linear = model.layer.clone().into();
        assert_close("weight space", plain.forward(x.clone()), &adapted);

        model.set_adapter(&[]).unwrap();
        assert_close("disabled", model.layer.forward(x.clone()), &base);
        model.set_adapter(&[DEFAULT_ADAPTER]).unwrap();
        model.merge_and_unload().unwrap();
        assert_close("merged", model.layer.forward(x), &adapted);
    }
}

#[test]
fn the_update_matters() {
    let problem = Problem { rows: 3, d_in: 7, d_out: 5, r: 2, alpha: 3.0, rslora: false, bias: true };
    let device = Device::default();
    let model = problem.layer(&device);
    let x = Tensor::<2>::random([3, 7], Distribution::Normal(0.0, 1.0), &device);
    let (base, adapted, _) = problem.naive(&model, &x.to_data());
    assert_different("update", &adapted, &base);
}
