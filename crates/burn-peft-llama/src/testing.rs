//! What the tests of several files need: models that are always the same, numbers that can be compared.

use std::collections::HashSet;
use std::convert::Infallible;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{DType, Device, Gradients, Tensor, TensorData};
use burn_peft::{LoraConfig, PeftModel};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::batch::Batch;
use crate::config::LlamaConfig;
use crate::model::LlamaForCausalLm;
use crate::source::{Kind, Source};

pub(crate) fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

#[track_caller]
pub(crate) fn assert_close(found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((found - expected).abs() <= tolerance, "{i}: {found} {expected}");
    }
}

/// Parameters from a generator of its own: the device's is shared with tests that run at the same time.
struct Drawn<'a> {
    device: &'a Device,
    rng: StdRng,
}

impl Drawn<'_> {
    /// Uniform numbers around `middle`, large enough for logits to differ.
    fn draw<const D: usize>(&mut self, shape: [usize; D], middle: f32, width: f32) -> Param<Tensor<D>> {
        let count = shape.iter().product();
        let values: Vec<f32> =
            (0..count).map(|_| middle + width * (self.rng.random::<f32>() - 0.5)).collect();
        Param::from_data(TensorData::new(values, shape), self.device)
    }
}

impl Source for Drawn<'_> {
    type Error = Infallible;

    fn parameter<const D: usize>(
        &mut self,
        _path: &str,
        shape: [usize; D],
        kind: Kind,
    ) -> Result<Param<Tensor<D>>, Infallible> {
        Ok(match kind {
            Kind::Linear | Kind::Embedding => self.draw(shape, 0.0, 1.4),
            Kind::Norm => self.draw(shape, 1.0, 0.4),
            Kind::Bias => self.draw(shape, 0.0, 0.4),
        })
    }
}

/// Always the same model.
pub(crate) fn model(device: &Device, tied: bool) -> LlamaForCausalLm {
    let config = LlamaConfig::new(13, 16, 2).with_heads(4, 2).with_intermediate_size(24);
    drawn(&config.with_tie_word_embeddings(tied), device)
}

/// Always the same model for a configuration.
pub(crate) fn drawn(config: &LlamaConfig, device: &Device) -> LlamaForCausalLm {
    let Ok(model) = LlamaForCausalLm::build(config, &mut Drawn { device, rng: StdRng::seed_from_u64(17) });
    model
}

/// Adds an adapter whose factors are as large as `InitLoraWeights::Random` draws them, and always the same.
pub(crate) fn add_drawn_adapter(model: &mut LlamaForCausalLm, name: &str, config: &LoraConfig) {
    struct Redraw(HashSet<ParamId>, StdRng);

    impl ModuleMapper for Redraw {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if !self.0.contains(&param.id) {
                return param;
            }
            param.map(|tensor| {
                let (shape, is_trained) = (tensor.shape(), tensor.is_require_grad());
                let width = 2.0 / (shape[0] as f32).sqrt();
                let values = (0..shape.num_elements()).map(|_| width * (self.1.random::<f32>() - 0.5));
                let values = TensorData::new(values.collect::<Vec<_>>(), shape);
                Tensor::from_data(values, &tensor.device()).set_require_grad(is_trained)
            })
        }
    }

    model.add_adapter(name, config).unwrap();
    let mut factors = model.adapter_tensors(name).unwrap();
    factors.retain(|tensor| ["a", "b"].contains(&tensor.name));
    let ids = factors.iter().map(|tensor| tensor.id).collect();
    *model = model.clone().map(&mut Redraw(ids, StdRng::seed_from_u64(19)));
}

/// The vocabularies of SmolLM2 and Llama 3.
pub(crate) const REAL_VOCABULARIES: [usize; 2] = [49_152, 128_256];

pub(crate) fn drawn_numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    // Irwin-Hall, nearly N(0, 2.5²).
    (0..count).map(|_| 2.5 * ((0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0)).collect()
}

pub(crate) fn wide(numbers: &[f32]) -> Vec<f64> {
    numbers.iter().copied().map(f64::from).collect()
}

/// Largest difference, relative to the largest expected magnitude.
pub(crate) fn deviation<T: Copy + Into<f64>>(found: &[T], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
    found.iter().zip(expected).map(|(a, b)| ((*a).into() - b).abs()).fold(0.0, f64::max) / largest
}

/// What `value` gives for a batch, and all gradients.
pub(crate) fn results(
    value: impl Fn(&LlamaForCausalLm, &Batch) -> Tensor<1>,
    model: &LlamaForCausalLm,
    batch: &Batch,
) -> [Vec<f64>; 2] {
    struct Read(Gradients, Vec<f64>);
    impl ModuleVisitor for Read {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.1.extend(param.base().grad(&self.0).into_iter().flat_map(numbers));
        }
    }
    fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
        tensor.into_data().iter::<f64>().collect()
    }
    let value = value(model, batch);
    let mut read = Read(value.clone().backward(), vec![]);
    model.visit(&mut read);
    [numbers(value), read.1]
}

/// The same model in f64, without the kernels of its layers; a loss is computed in f32.
pub(crate) fn in_f64(model: &LlamaForCausalLm) -> LlamaForCausalLm {
    struct Cast;
    impl ModuleMapper for Cast {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let is_trained = param.is_require_grad();
            let cast = |tensor: Tensor<D>| tensor.cast(DType::F64).detach().set_require_grad(is_trained);
            param.map(cast)
        }
    }
    model.clone().map(&mut Cast)
}
