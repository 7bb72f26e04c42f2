//! LoRA: `scaling * A B` beside the weight.
//!
//! ```text
//!            d_out                       r         d_out
//!        ┌───────────┐                ┌─────┐   ┌───────────┐
//!        │           │                │     │ r │     B     │   B = 0 at the start
//!   d_in │  W frozen │ + scaling * d_in  A  │   └───────────┘
//!        │           │                │     │        A ~ U(-1/sqrt(d_in), 1/sqrt(d_in))
//!        └───────────┘                └─────┘        scaling = lora_alpha / r
//! ```

use std::sync::Arc;

use burn::tensor::{DType, Tensor};
use burn_peft_ops::cast;

use super::{Chosen, Description, KeyEnd, Method, Parameters, Pass, Summand, Tells, TensorSpec, Update};
use crate::config::{LoraConfig, PeftConfig};
use crate::error::PeftError;
use crate::init::{InitLoraWeights, Start};
use crate::layer::{Layer, Site, Space};
use crate::ops::{Input, low_rank};

/// An update of low rank. In memory its factors are `A`, `[d_in, r]`, and `B`, `[r, d_out]`: the transposes of PEFT's
/// `lora_A.weight [r, d_in]` and `lora_B.weight [d_out, r]`.
#[derive(Debug, Clone)]
pub(crate) struct LowRank {
    r: usize,
    scaling: f64,
    dropout: f64,
    /// PEFT's `lora_B.bias`, the `lora_bias` of a layer that works on activations.
    has_bias: bool,
    init: InitLoraWeights,
    /// Whether the start of other layers, if not of this one, is part of the base, so that the file has twice the rank.
    is_doubled_in_file: bool,
}

pub(crate) const A: &str = "a";
pub(crate) const B: &str = "b";
/// Where the factors started, if that start is part of the base.
const A0: &str = "a0";
const B0: &str = "b0";
pub(crate) const BIAS: &str = "bias";

const KEY_A: KeyEnd = KeyEnd::new("lora_A", ".weight", "A", Tells::Input);
const KEY_B: KeyEnd = KeyEnd::new("lora_B", ".weight", "B", Tells::Output);
pub(super) const KEY_BIAS: KeyEnd = KeyEnd::new("lora_B", ".bias", "bias of B", Tells::Nothing);
const EMBEDDING_A: KeyEnd =
    KeyEnd::new("lora_embedding_A", "", "A of an embedding", Tells::Input).of(Layer::Embedding);
const EMBEDDING_B: KeyEnd =
    KeyEnd::new("lora_embedding_B", "", "B of an embedding", Tells::Output).of(Layer::Embedding);

pub(super) const DESCRIPTION: Description =
    Description { keys: &[KEY_A, KEY_B, KEY_BIAS, EMBEDDING_A, EMBEDDING_B], of, check };

fn of(config: &PeftConfig, at: &Chosen) -> Option<Arc<dyn Method>> {
    let config = config.as_lora().filter(|config| !config.use_dora)?;
    Some(Arc::new(LowRank::of(config, at)?))
}

/// # Errors
/// [`PeftError::DropoutNeedsLoraLinear`], as adapters cannot see the input of a plain layer;
/// [`PeftError::InvalidConfig`] for a start that convolutions do not have.
fn check(config: &PeftConfig, parameters: &Parameters) -> Result<(), PeftError> {
    let Some(config) = config.as_lora() else { return Ok(()) };
    let convolutions = parameters.names(|at| at.is_target() && at.site.layer == Layer::Conv);
    if let Some(name) = convolutions.first().filter(|_| !config.init_lora_weights.allows_convolutions()) {
        let expected = "`true`, `false` or \"gaussian\" for convolutions, as in PEFT";
        let found = format!("{} for `{name}`", config.init_lora_weights.to_json());
        return Err(PeftError::invalid("init_lora_weights", expected, found));
    }
    if config.lora_dropout == 0.0 {
        return Ok(());
    }
    let is_plain = |at: &Chosen| at.site.space == Space::Weight && at.site.layer != Layer::Embedding;
    let modules = parameters.names(|at| at.is_target() && is_plain(at));
    if modules.is_empty() { Ok(()) } else { Err(PeftError::DropoutNeedsLoraLinear { modules }) }
}

impl LowRank {
    /// The update that `config` asks for at a parameter, if it asks for one.
    pub(super) fn of(config: &LoraConfig, at: &Chosen) -> Option<Self> {
        (at.is_target() && !at.is_saved).then(|| Self {
            r: at.r,
            scaling: config.scaling_of(at.r, at.lora_alpha),
            dropout: config.lora_dropout,
            has_bias: config.lora_bias
                && at.site.space == Space::Activations
                && at.site.layer != Layer::Embedding,
            init: config.init_lora_weights.at(at.site.layer),
            is_doubled_in_file: config.init_lora_weights.is_part_of_base(),
        })
    }

    /// `scaling * (x A0) B0`, if the start is part of the base.
    pub(super) fn start_of(&self, of: &Update, x: &Input) -> Option<Tensor<2>> {
        self.init.is_part_of_base().then(|| {
            let (a, b) = Self::start_factors(of);
            low_rank::product(x, a, b, of.scaling)
        })
    }

    /// `A0` and `B0`, which are constants even if the whole model is made trainable.
    fn start_factors(of: &Update) -> (Tensor<2>, Tensor<2>) {
        (of[A0].val().detach(), of[B0].val().detach())
    }

    /// `A` and `B` of the whole change: `[A, A0]` and `[B; -B0]` where the start is part of the base, so that it is taken
    /// off again.
    pub(super) fn factors(&self, of: &Update) -> (Tensor<2>, Tensor<2>) {
        let (a, b) = (of[A].val(), of[B].val());
        if !self.init.is_part_of_base() {
            return (a, b);
        }
        let (a0, b0) = Self::start_factors(of);
        (Tensor::cat(vec![a, a0], 1), Tensor::cat(vec![b, b0.neg()], 0))
    }

    /// The same change as factors of twice the rank that start from the base as it is, if the file needs it.
    pub(super) fn doubled(&self, of: &Update) -> Option<(Self, Vec<Tensor<2>>)> {
        if !self.is_doubled_in_file {
            return None;
        }
        let (mut a, mut b) = self.factors(of);
        if !self.init.is_part_of_base() {
            a = Tensor::cat(vec![a.clone(), a.zeros_like()], 1);
            b = Tensor::cat(vec![b.clone(), b.zeros_like()], 0);
        }
        let (r, init) = (2 * self.r, InitLoraWeights::default());
        Some((Self { r, init, is_doubled_in_file: false, ..self.clone() }, vec![a, b]))
    }
}

impl Method for LowRank {
    fn tensors(&self, site: &Site) -> Vec<TensorSpec> {
        let ([d_in, d_out], r) = (site.dims(), self.r);
        let (mut a, mut b) = (vec![r, d_in], vec![d_out, r]);
        if site.layer == Layer::Conv {
            // `A` is a convolution of the same kernel, `B` one of kernel 1.
            a = [&[r], &site.shape[1..]].concat();
            b.resize(site.shape.len(), 1);
        }
        let is_embedding = site.layer == Layer::Embedding;
        let (key_a, key_b) = if is_embedding { (EMBEDDING_A, EMBEDDING_B) } else { (KEY_A, KEY_B) };
        let mut tensors = vec![TensorSpec::factor(A, key_a, a), TensorSpec::factor(B, key_b, b)];
        if self.init.is_part_of_base() {
            tensors.extend([TensorSpec::constant(A0, [d_in, r]), TensorSpec::constant(B0, [r, d_out])]);
        }
        if self.has_bias {
            tensors.push(TensorSpec::vector(BIAS, KEY_BIAS, vec![d_out]));
        }
        tensors
    }

    /// Always f32, as with PEFT's `autocast_adapter_dtype`.
    fn start(&self, at: &Start) -> Result<Vec<Tensor<2>>, PeftError> {
        let (a, b) = self.init.factors(at, self.r, self.scaling)?;
        let mut tensors = vec![a.clone(), b.clone()];
        if self.init.is_part_of_base() {
            tensors.extend([a, b]);
        }
        if self.has_bias {
            let [_, d_out] = at.site.dims();
            tensors.push(Tensor::zeros([1, d_out], (&at.device, DType::F32)));
        }
        Ok(tensors)
    }

    fn scaling(&self) -> f64 {
        self.scaling
    }

    fn dropout(&self) -> f64 {
        self.dropout
    }

    fn allows_mixed_batches(&self) -> bool {
        true
    }

    /// `value + scaling * A B`
    fn apply(&self, of: &Update, value: Tensor<2>, _base: &Tensor<2>) -> Tensor<2> {
        // A base in f32 gets its update in f32, so that merging in 16 bits rounds once.
        let dtype = if value.dtype() == DType::F32 { DType::F32 } else { of[A].dtype() };
        let (a, b) = self.factors(of);
        cast(value, dtype) + low_rank::matrix(a, b, of.scaling, dtype)
    }

    /// `scaling * (dropout(x) A) B`, and the start off again, if it is part of the base: `- scaling * (x A0) B0`.
    fn forward(&self, of: &Update, pass: &Pass) -> Option<Tensor<2>> {
        let (a, b) = (of[A].val(), of[B].val());
        let update = low_rank::product_behind_dropout(pass.input, pass.dropout(of), a, b, of.scaling);
        Some(match self.start_of(of, pass.input) {
            Some(start) => update - start,
            None => update,
        })
    }

    fn constant(&self, of: &Update, _bias: Option<&Tensor<1>>) -> Option<Tensor<2>> {
        Some(of.get(BIAS)?.val().mul_scalar(of.scaling))
    }

    fn plain(&self, of: &Update, site: &Site) -> Option<Update> {
        let (method, mut tensors) = self.doubled(of)?;
        tensors.extend(of.get(BIAS).map(|bias| bias.val()));
        Some(Update::new(Arc::new(method), site, tensors).scaled(of.scaling))
    }

    fn summand(&self, of: &Update) -> Option<Summand> {
        Some(Summand { factors: Some(self.factors(of)), bias: of.get(BIAS).map(|bias| bias.val()) })
    }

    fn rank(&self) -> Option<usize> {
        Some(self.r)
    }
}
