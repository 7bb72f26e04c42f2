//! DoRA: the direction of the weight moves by an update of low rank, and a vector of its own has the norms of the columns.
//!
//! `W' = m / ‖W + scaling * A B‖ * (W + scaling * A B)`, column by column, with the norm as a constant: it gets no
//! gradient. [DoRA, Liu et al., 2024](https://arxiv.org/abs/2402.09353), section 4.3.

use std::sync::Arc;

use burn::tensor::{DType, Tensor};
use burn_peft_ops::cast;

use super::{Chosen, Description, KeyEnd, LowRank, Method, Pass, Tells, TensorSpec, Update};
use crate::config::PeftConfig;
use crate::error::PeftError;
use crate::init::Start;
use crate::layer::{Layer, Site};
use crate::ops::column_norm::column_norm;
use crate::ops::low_rank;
use crate::tensor::like;

/// An update of low rank with magnitudes.
#[derive(Debug)]
struct Dora {
    low_rank: LowRank,
}

/// `m`, `[1, d_out]`.
const MAGNITUDE: &str = "magnitude";

const KEY: KeyEnd = KeyEnd::new("lora_magnitude_vector", "", "magnitude", Tells::Nothing);

pub(super) const DESCRIPTION: Description = Description { keys: &[KEY], of, check: |_, _| Ok(()) };

fn of(config: &PeftConfig, at: &Chosen) -> Option<Arc<dyn Method>> {
    let config = config.as_lora().filter(|config| config.use_dora)?;
    Some(Arc::new(Dora { low_rank: LowRank::of(config, at)? }))
}

impl Dora {
    /// `m / ‖W + scaling * A B‖`, `[1, d_out]`. A column of zeros has no direction: its norm counts as 1.
    fn gain(&self, of: &Update, base: &Tensor<2>, a: &Tensor<2>, b: &Tensor<2>) -> Tensor<2> {
        let norm = column_norm(base, a.clone(), b.clone(), of.scaling);
        let norm = norm.clone().mask_fill(norm.equal_elem(0.0), 1.0);
        let magnitude = of[MAGNITUDE].val();
        magnitude.clone() / like(norm, &magnitude)
    }
}

impl Method for Dora {
    fn tensors(&self, site: &Site) -> Vec<TensorSpec> {
        let mut shape = vec![site.dims()[1]];
        if site.layer == Layer::Conv {
            shape.insert(0, 1);
            shape.resize(site.shape.len(), 1);
        }
        let mut tensors = self.low_rank.tensors(site);
        tensors.push(TensorSpec::vector(MAGNITUDE, KEY, shape));
        tensors
    }

    /// The norms that the weight has with the factors it starts from: at first nothing changes.
    fn start(&self, at: &Start) -> Result<Vec<Tensor<2>>, PeftError> {
        let mut tensors = self.low_rank.start(at)?;
        let start = Update::new(Arc::new(self.low_rank.clone()), at.site, tensors.clone());
        let (a, b) = self.low_rank.factors(&start);
        tensors.push(column_norm(&at.matrix(), a, b, self.scaling()));
        Ok(tensors)
    }

    fn scaling(&self) -> f64 {
        self.low_rank.scaling()
    }

    fn dropout(&self) -> f64 {
        self.low_rank.dropout()
    }

    /// `value + (g - 1) W + g scaling A B` with `g = m / ‖W + scaling A B‖`.
    fn apply(&self, of: &Update, value: Tensor<2>, base: &Tensor<2>) -> Tensor<2> {
        let (a, b) = self.low_rank.factors(of);
        let gain = self.gain(of, base, &a, &b);
        let update = low_rank::matrix(a, b, of.scaling, DType::F32) * gain.clone();
        cast(value, DType::F32) + cast(base.clone(), DType::F32) * (gain - 1.0) + update
    }

    /// `(g - 1) x W + g scaling (x A) B`, with `dropout(x)` in the place of both `x`.
    fn forward(&self, of: &Update, pass: &Pass) -> Option<Tensor<2>> {
        let (a, b) = self.low_rank.factors(of);
        let gain = self.gain(of, pass.base, &a, &b);
        let x = pass.dropped(of, &a);
        let product =
            if x.acts { x.input.times(pass.base.clone()).mul_scalar(x.factor) } else { (pass.product)() };
        let update = low_rank::product(&x.input, a, b, of.scaling * x.factor) * gain.clone();
        let output = cast(product, DType::F32) * (gain - 1.0) + update;
        // A start that is part of the base sees the whole input once, as the base does.
        let start_of = |input| if x.acts { self.low_rank.start_of(of, input) } else { None };
        Some(match (start_of(&x.input), start_of(pass.input)) {
            (Some(dropped), Some(whole)) => output + dropped.mul_scalar(x.factor) - whole,
            _ => output,
        })
    }

    fn plain(&self, of: &Update, site: &Site) -> Option<Update> {
        let (low_rank, mut tensors) = self.low_rank.doubled(of)?;
        tensors.push(of[MAGNITUDE].val());
        Some(Update::new(Arc::new(Self { low_rank }), site, tensors).scaled(of.scaling))
    }

    fn rank(&self) -> Option<usize> {
        self.low_rank.rank()
    }
}
