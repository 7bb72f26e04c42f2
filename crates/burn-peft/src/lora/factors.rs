//! The factors `A` and `B`: how they start, what they compute.

use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::module::{embedding, linear};
use burn::tensor::{DType, Device, Distribution, Int, Tensor};

use crate::adapter::Site;
use crate::lora::{InitLoraWeights, LoraConfig};
use crate::tensor::{cast, like};

/// The factors of an update, in Burn's layout, the transposes of PEFT's `lora_A.weight [r, d_in]` and
/// `lora_B.weight [d_out, r]`.
#[derive(Module, Debug)]
pub(crate) struct LowRank {
    /// `A`, `[d_in, r]`.
    pub(crate) a: Param<Tensor<2>>,
    /// `B`, `[r, d_out]`.
    pub(crate) b: Param<Tensor<2>>,
    /// `[d_out]`: PEFT's `lora_B.bias`, the `lora_bias` of a layer that works on activations.
    pub(crate) bias: Option<Param<Tensor<1>>>,
    pub(crate) dropout: Dropout,
}

impl LowRank {
    /// Fresh factors of rank `r` for a parameter that lives on `device`.
    ///
    /// They are f32 whatever the weight's type is, as PEFT's `autocast_adapter_dtype` has it.
    pub(crate) fn init(config: &LoraConfig, r: usize, site: &Site, device: &Device) -> Self {
        let [d_in, d_out] = site.factor_dims();
        let (a, b) = match config.init_lora_weights {
            InitLoraWeights::KaimingUniform | InitLoraWeights::Gaussian if site.kind.is_embedding() => {
                (Start::Zeros, Start::Normal(1.0))
            }
            InitLoraWeights::KaimingUniform => (Start::Uniform(1.0 / (d_in as f64).sqrt()), Start::Zeros),
            InitLoraWeights::Gaussian => (Start::Normal(1.0 / r as f64), Start::Zeros),
            InitLoraWeights::Random => {
                (Start::Uniform(1.0 / (d_in as f64).sqrt()), Start::Uniform(1.0 / (r as f64).sqrt()))
            }
        };
        let bias = (config.lora_bias && site.kind.in_activation_space())
            .then(|| Tensor::zeros([d_out], (device, DType::F32)));
        Self::new(a.tensor([d_in, r], device), b.tensor([r, d_out], device), bias, config.lora_dropout)
    }

    pub(crate) fn new(a: Tensor<2>, b: Tensor<2>, bias: Option<Tensor<1>>, dropout: f64) -> Self {
        Self {
            a: Param::from_tensor(a),
            b: Param::from_tensor(b),
            bias: bias.map(Param::from_tensor),
            dropout: DropoutConfig::new(dropout).init(),
        }
    }

    pub(crate) fn rank(&self) -> usize {
        self.a.lazy_shape()[1]
    }

    /// `scaling * A B`, `[d_in, d_out]`, in `dtype`.
    pub(crate) fn product(&self, scaling: f64, dtype: DType) -> Tensor<2> {
        cast(self.a.val(), dtype).mul_scalar(scaling).matmul(cast(self.b.val(), dtype))
    }

    /// `scaling * (dropout(x) A) B + scaling * bias`, `[.., d_in]` to `[.., d_out]`, in the type of `x`. With `rows`,
    /// only for the rows of the batch, the first axis, where it is 1, and without dropout.
    ///
    /// The scaling meets the smallest tensor on the way, `x A`, and takes dropout's `1 / (1 - p)` along.
    pub(crate) fn forward<const D: usize>(
        &self,
        x: Tensor<D>,
        scaling: f64,
        rows: Option<&Tensor<1>>,
    ) -> Tensor<D> {
        let outer = x.dtype();
        let x = cast(x, self.a.dtype());
        let (x, factor) = if rows.is_none() && self.drops(&x) {
            (zero_some(x, self.dropout.prob), scaling / (1.0 - self.dropout.prob))
        } else {
            (x, scaling)
        };
        let hidden = linear(x, self.a.val(), None).mul_scalar(factor);
        cast(self.expand(hidden, scaling, rows), outer)
    }

    /// `scaling * A[ids] B`, `[batch, sequence]` to `[batch, sequence, d_out]`: the rows of `A` that are asked for, never
    /// the dense table.
    pub(crate) fn look_up(&self, ids: Tensor<2, Int>, scaling: f64, rows: Option<&Tensor<1>>) -> Tensor<3> {
        self.expand(embedding(self.a.val(), ids).mul_scalar(scaling), scaling, rows)
    }

    /// `hidden B + scaling * bias`, 0 where `rows` does not allow it: put there and not multiplied by, so that whatever an
    /// adapter gives, infinities and NaNs included, stays in its rows.
    fn expand<const D: usize>(&self, hidden: Tensor<D>, scaling: f64, rows: Option<&Tensor<1>>) -> Tensor<D> {
        let output = linear(hidden, self.b.val(), None);
        let output = match &self.bias {
            Some(bias) => output + bias.val().mul_scalar(scaling).unsqueeze::<D>(),
            None => output,
        };
        let Some(rows) = rows else { return output };
        let (batch, asked) = (output.shape()[0], rows.shape()[0]);
        assert!(batch == asked, "the batch has {batch} rows, adapters were named for {asked}");
        let mut shape = [1; D];
        shape[0] = batch;
        let is_other = like(rows.clone(), &output).equal_elem(0.0).reshape(shape).expand(output.shape());
        output.mask_fill(is_other, 0.0)
    }

    /// Whether dropout acts, by the rules of `nn::Dropout`: while training, on a layer that was not frozen.
    fn drops<const D: usize>(&self, x: &Tensor<D>) -> bool {
        self.dropout.prob > 0.0 && self.dropout.training.is_enabled() && x.device().is_autodiff()
    }
}

/// Each element with probability `prob` replaced by 0.
///
/// `nn::Dropout` draws Bernoulli numbers, which cost Burn's CPU backend twice the time of uniform ones, and multiplies
/// twice, forward and backward.
fn zero_some<const D: usize>(x: Tensor<D>, prob: f64) -> Tensor<D> {
    let uniform = Tensor::<D>::random(x.shape(), Distribution::Default, (&x.device(), DType::F32));
    x.mask_fill(uniform.lower_elem(prob), 0.0)
}

/// A distribution that a factor starts from.
enum Start {
    Zeros,
    /// `U(-bound, bound)`.
    Uniform(f64),
    /// `N(0, std²)`.
    Normal(f64),
}

impl Start {
    fn tensor(&self, shape: [usize; 2], device: &Device) -> Tensor<2> {
        let options = (device, DType::F32);
        match *self {
            Self::Zeros => Tensor::zeros(shape, options),
            Self::Uniform(bound) => Tensor::random(shape, Distribution::Uniform(-bound, bound), options),
            Self::Normal(std) => Tensor::random(shape, Distribution::Normal(0.0, std), options),
        }
    }
}
