//! What adapters do over a model's life: added, switched, mixed, merged, swapped, trained, saved and removed.

mod hotswap;
mod layers;
mod merging;
mod mixed_batch;
mod operations;
mod training;
mod two_adapters;

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{
    Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig, PaddingConfig2d,
};
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft::{InitLoraWeights, LoraConfig, LoraEmbedding, LoraLinear};
use burn_peft_tests::parameters::{is_adapter, with_changed};

/// A layer of every kind that can be adapted, and one that can only be copied.
#[derive(Module, Debug)]
struct Net {
    token: LoraEmbedding,
    position: Embedding,
    conv: Conv2d,
    norm: LayerNorm,
    up: LoraLinear,
    down: Linear,
}

impl Net {
    /// The same numbers every time.
    fn new(device: &Device) -> Self {
        let net = Self {
            token: EmbeddingConfig::new(11, 6).init(device).into(),
            position: EmbeddingConfig::new(4, 6).init(device),
            conv: Conv2dConfig::new([1, 2], [3, 3])
                .with_padding(PaddingConfig2d::Explicit(1, 1, 1, 1))
                .init(device),
            norm: LayerNormConfig::new(6).init(device),
            up: LinearConfig::new(6, 10).init(device).into(),
            down: LinearConfig::new(10, 4).init(device),
        };
        net.map(&mut Waves(0.0))
    }

    /// `[batch, sequence]` to `[batch, sequence, 4]`.
    fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let [b, s] = ids.dims();
        let positions = Tensor::<1, Int>::arange(0..s as i64, &ids.device()).unsqueeze::<2>();
        let x = self.token.forward(ids) + self.position.forward(positions);
        let seen = self.conv.forward(x.reshape([b, 1, s, 6])).sum_dim(1).reshape([b, s, 6]);
        self.down.forward(self.up.forward(self.norm.forward(seen.tanh())).tanh())
    }

    fn output(&self) -> TensorData {
        self.forward(ids(&self.devices()[0])).into_data()
    }
}

/// Three rows.
fn ids(device: &Device) -> Tensor<2, Int> {
    Tensor::from_data([[1, 5, 10, 2], [0, 3, 7, 7], [9, 9, 4, 6]], device)
}

/// Rank `r` on `targets`, not a no-op.
fn random<const N: usize>(r: usize, targets: [&str; N]) -> LoraConfig {
    LoraConfig::new(r)
        .with_lora_alpha(3.0)
        .with_init_lora_weights(InitLoraWeights::Random)
        .with_target_modules(targets)
}

/// Fills parameters with numbers in [-0.6, 0.6] that follow each other without a pattern.
struct Waves(f64);

impl ModuleMapper for Waves {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        self.0 += 0.37;
        let start = self.0;
        param.map(|tensor| {
            let (shape, dtype) = (tensor.shape(), tensor.dtype());
            let wave = |i: usize| (0.6 * (start + 1.7 * i as f64).sin()) as f32;
            let values: Vec<f32> = (0..shape.num_elements()).map(wave).collect();
            Tensor::from_data(TensorData::new(values, shape), (&tensor.device(), dtype))
                .set_require_grad(tensor.is_require_grad())
        })
    }
}

/// Moves what an adapter has away from zero: biases and copies start where they change nothing.
fn stir<M: Module>(model: M) -> M {
    with_changed(model, |path, data| {
        if !is_adapter(path) || !(path.ends_with(".bias") || path.ends_with(".copy")) {
            return None;
        }
        let wave = |i: usize| (0.3 * (path.len() as f64 + 2.3 * i as f64).cos()) as f32;
        let moved: Vec<f32> = data.iter::<f32>().enumerate().map(|(i, number)| number + wave(i)).collect();
        Some(TensorData::new(moved, data.shape()).convert_dtype(data.dtype()))
    })
}

/// Puts a number into every parameter whose path ends so.
fn poisoned<M: Module>(model: M, end: &str, number: f32) -> M {
    with_changed(model, |path, data| {
        path.ends_with(end).then(|| TensorData::full_dtype(data.shape(), number, data.dtype()))
    })
}

/// The identity and the value of every parameter of the base.
fn base<M: Module>(model: &M) -> BTreeMap<String, (ParamId, TensorData)> {
    #[derive(Default)]
    struct Collector(Vec<String>, BTreeMap<String, (ParamId, TensorData)>);

    impl ModuleVisitor for Collector {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.0.push(name.to_string());
        }

        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.0.pop();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let path = self.0.join(".");
            if !is_adapter(&path) {
                self.1.insert(path, (param.id, param.base().into_data()));
            }
        }
    }

    let mut collector = Collector::default();
    model.visit(&mut collector);
    collector.1
}
