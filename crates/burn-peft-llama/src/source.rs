//! Where the parameters of a new model come from.

use std::convert::Infallible;

use burn::module::Param;
use burn::nn::{Initializer, Linear};
use burn::tensor::{Device, Tensor};
use burn_peft::LoraLinear;

/// Gives the parameters of a new model, by their path.
pub(crate) trait Source {
    type Error;

    /// The parameter of that path.
    fn parameter<const D: usize>(
        &mut self,
        path: &str,
        shape: [usize; D],
        kind: Kind,
    ) -> Result<Param<Tensor<D>>, Self::Error>;

    /// A linear layer from its weight and bias. `[d_in, d_out]`
    fn layer(&mut self, path: &str, shape: [usize; 2], with_bias: bool) -> Result<LoraLinear, Self::Error> {
        let weight = self.parameter(&format!("{path}.weight"), shape, Kind::Linear)?;
        let bias = || self.parameter(&format!("{path}.bias"), [shape[1]], Kind::Bias);
        Ok(Linear { weight, bias: with_bias.then(bias).transpose()? }.into())
    }
}

/// What a parameter is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A matrix that multiplies from the right, `[d_in, d_out]`.
    Linear,
    /// A vector for each token, `[n, d]`.
    Embedding,
    /// `[d]`
    Norm,
    /// `[d]`
    Bias,
}

/// Random parameters, made when they are first used.
pub(crate) struct Fresh<'a> {
    pub(crate) device: &'a Device,
    pub(crate) weights: Initializer,
}

impl Source for Fresh<'_> {
    type Error = Infallible;

    fn parameter<const D: usize>(
        &mut self,
        _path: &str,
        shape: [usize; D],
        kind: Kind,
    ) -> Result<Param<Tensor<D>>, Infallible> {
        let initializer = match kind {
            Kind::Linear | Kind::Embedding => &self.weights,
            Kind::Norm => &Initializer::Ones,
            Kind::Bias => &Initializer::Zeros,
        };
        Ok(initializer.init(shape, self.device))
    }
}
