//! The formulas of layers beside the linear one, against loops in f64 that do nothing else.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig, PaddingConfig2d};
use burn::tensor::{Device, Distribution, Int, Tensor, TensorData};
use burn_peft::{DEFAULT_ADAPTER, LoraConfig, LoraEmbedding, LoraLinear, PeftModel};
use burn_peft_tests::parameters::parameters;
use burn_peft_tests::tolerance::FORWARD;
use proptest::prelude::*;

use super::{random, stir};

/// Rank, `lora_alpha` and rsLoRA.
#[derive(Clone, Copy, Debug)]
struct Scale {
    r: usize,
    alpha: f64,
    rslora: bool,
}

impl Scale {
    fn any() -> impl Strategy<Value = Self> {
        (1..7_usize, 0.25..20.0_f64, any::<bool>()).prop_map(|(r, alpha, rslora)| Self { r, alpha, rslora })
    }

    fn config(self) -> LoraConfig {
        random(self.r, ["layer"]).with_lora_alpha(self.alpha).with_use_rslora(self.rslora)
    }

    fn scaling(self) -> f64 {
        let r = self.r as f64;
        self.alpha / if self.rslora { r.sqrt() } else { r }
    }
}

/// A path for the layer.
#[derive(Module, Debug)]
struct Wrapper<L> {
    layer: L,
}

fn numbers(parameters: &BTreeMap<String, TensorData>, path: &str) -> Vec<f64> {
    parameters[path].iter().collect()
}

fn factors(parameters: &BTreeMap<String, TensorData>) -> (Vec<f64>, Vec<f64>) {
    let factor = |name: &str| numbers(parameters, &format!("layer.weight.peft.default.{name}"));
    (factor("a"), factor("b"))
}

/// A sum and the sum of the absolute values, to which rounding is relative.
#[derive(Clone, Copy, Default)]
struct Sum(f64, f64);

impl Sum {
    fn add(&mut self, term: f64) {
        self.0 += term;
        self.1 += term.abs();
    }
}

#[track_caller]
fn assert_sums(name: &str, found: &TensorData, expected: &[Sum]) {
    assert_eq!(found.shape().num_elements(), expected.len());
    for (i, (found, sum)) in found.iter::<f64>().zip(expected).enumerate() {
        // Terms of the update are products of three; their own rounding is within the sum of absolute values too.
        let allowed = FORWARD.0 * sum.1.max(1e-3);
        assert!((found - sum.0).abs() <= allowed, "{name}: {found} instead of {} at {i}", sum.0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// `y = W[id] + scaling * A[id] B`.
    #[test]
    fn an_embedding_adds_the_rows_of_its_factors(
        entries in 1..12_usize,
        width in 1..9_usize,
        scale in Scale::any(),
        ids in prop::collection::vec(0..1000_usize, 1..8),
    ) {
        let device = Device::default();
        let layer = EmbeddingConfig::new(entries, width).init(&device);
        let mut model = Wrapper { layer: LoraEmbedding::from(layer) };
        model.add_adapter(DEFAULT_ADAPTER, scale.config()).unwrap();
        let all = parameters(&model);
        let (w, (a, b)) = (numbers(&all, "layer.weight"), factors(&all));
        let ids: Vec<usize> = ids.into_iter().map(|id| id % entries).collect();
        let mut expected = vec![];
        for id in &ids {
            for j in 0..width {
                let mut sum = Sum::default();
                sum.add(w[id * width + j]);
                (0..scale.r).for_each(|k| sum.add(scale.scaling() * a[id * scale.r + k] * b[k * width + j]));
                expected.push(sum);
            }
        }
        let rows = ids.len();
        let ids: Vec<i64> = ids.into_iter().map(|id| id as i64).collect();
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, rows]), &device);
        assert_sums("activation space", &model.layer.forward(ids.clone()).into_data(), &expected);
        let plain: Embedding = model.layer.clone().into();
        assert_sums("weight space", &plain.forward(ids.clone()).into_data(), &expected);
        model.merge_adapter().unwrap();
        assert_sums("merged", &model.layer.forward(ids).into_data(), &expected);
    }

    /// `y[o] = bias[o] + scaling * shift[o] + Σ x[c, i, j] (W[o, c, i, j] + scaling * Σ_k A[(c, i, j), k] B[k, o])`, the
    /// `shift` with `lora_bias`.
    #[test]
    fn a_convolution_adds_its_factors_to_its_kernel(
        channels in (1..4_usize, 1..4_usize),
        kernel in (1..4_usize, 1..4_usize),
        stride in 1..3_usize,
        padding in 0..2_usize,
        scale in Scale::any(),
        bias in any::<bool>(),
    ) {
        let device = Device::default();
        let ((c_in, c_out), (height, width)) = (channels, kernel);
        let layer = Conv2dConfig::new([c_in, c_out], [height, width])
            .with_stride([stride, stride])
            .with_padding(PaddingConfig2d::Explicit(padding, padding, padding, padding))
            .with_bias(bias)
            .init(&device);
        let mut model = Wrapper::<Conv2d> { layer };
        model.add_adapter(DEFAULT_ADAPTER, scale.config().with_lora_bias(bias)).unwrap();
        let mut model = stir(model);
        let x = Tensor::<4>::random([2, c_in, 5, 4], Distribution::Normal(0.0, 1.0), &device);

        let all = parameters(&model);
        let (w, (a, b)) = (numbers(&all, "layer.weight"), factors(&all));
        let zeros = || vec![0.0; c_out];
        let (base, shift) = if bias {
            (numbers(&all, "layer.bias"), numbers(&all, "layer.bias.peft.default.bias"))
        } else {
            (zeros(), zeros())
        };
        prop_assert!(!bias || shift.iter().any(|value| *value != 0.0));
        let input: Vec<f64> = x.to_data().iter().collect();
        let at = |n: usize, c: usize, i: usize, j: usize| {
            let (i, j) = (i.checked_sub(padding)?, j.checked_sub(padding)?);
            (i < 5 && j < 4).then(|| input[((n * c_in + c) * 5 + i) * 4 + j])
        };
        let rows = (5 + 2 * padding - height) / stride + 1;
        let columns = (4 + 2 * padding - width) / stride + 1;
        let mut expected = vec![];
        for (n, o, row, column) in every([2, c_out, rows, columns]) {
            let mut sum = Sum::default();
            sum.add(base[o]);
            sum.add(scale.scaling() * shift[o]);
            for (_, c, i, j) in every([1, c_in, height, width]) {
                let Some(x) = at(n, c, row * stride + i, column * stride + j) else { continue };
                let tap = (c * height + i) * width + j;
                sum.add(x * w[o * c_in * height * width + tap]);
                (0..scale.r).for_each(|k| {
                    sum.add(x * scale.scaling() * a[tap * scale.r + k] * b[k * c_out + o]);
                });
            }
            expected.push(sum);
        }
        assert_sums("adapted", &model.layer.forward(x.clone()).into_data(), &expected);
        model.merge_and_unload().unwrap();
        assert_sums("merged", &model.layer.forward(x).into_data(), &expected);
    }

    /// `y = x W + bias + scaling * ((x A) B + shift)`.
    #[test]
    fn a_bias_of_the_update_is_scaled_with_it(
        rows in 1..4_usize,
        d_in in 1..8_usize,
        d_out in 1..8_usize,
        scale in Scale::any(),
        bias in any::<bool>(),
    ) {
        let device = Device::default();
        let layer = || LinearConfig::new(d_in, d_out).with_bias(bias).init(&device);
        let config = scale.config().with_lora_bias(true);
        let mut fast = Wrapper { layer: LoraLinear::from(layer()) };
        fast.add_adapter(DEFAULT_ADAPTER, &config).unwrap();
        let fast = stir(fast);
        let x = Tensor::<2>::random([rows, d_in], Distribution::Normal(0.0, 1.0), &device);
        let input: Vec<f64> = x.to_data().iter().collect();
        let naive = |all: &BTreeMap<String, TensorData>, shift: &str| {
            let (w, (a, b), shift) = (numbers(all, "layer.weight"), factors(all), numbers(all, shift));
            let base = if bias { numbers(all, "layer.bias") } else { vec![0.0; d_out] };
            let mut sums = vec![];
            for (_, _, row, j) in every([1, 1, rows, d_out]) {
                let mut sum = Sum::default();
                sum.add(base[j]);
                sum.add(scale.scaling() * shift[j]);
                for i in 0..d_in {
                    let x = input[row * d_in + i];
                    sum.add(x * w[i * d_out + j]);
                    (0..scale.r).for_each(|k| sum.add(x * scale.scaling() * a[i * scale.r + k] * b[k * d_out + j]));
                }
                sums.push(sum);
            }
            sums
        };
        let expected = naive(&parameters(&fast), "layer.weight.peft.default.bias");
        assert_sums("activation space", &fast.layer.forward(x.clone()).into_data(), &expected);
        if bias {
            let mut plain = Wrapper::<Linear> { layer: layer() };
            plain.add_adapter(DEFAULT_ADAPTER, &config).unwrap();
            let mut plain = stir(plain);
            let expected = naive(&parameters(&plain), "layer.bias.peft.default.bias");
            assert_sums("weight space", &plain.layer.forward(x.clone()).into_data(), &expected);
            plain.merge_adapter().unwrap();
            assert_sums("merged", &plain.layer.forward(x).into_data(), &expected);
        }
    }
}

/// Every index of a shape, the last one fastest.
fn every([a, b, c, d]: [usize; 4]) -> impl Iterator<Item = (usize, usize, usize, usize)> {
    (0..a * b * c * d).map(move |i| (i / (b * c * d), i / (c * d) % b, i / d % c, i % d))
}
