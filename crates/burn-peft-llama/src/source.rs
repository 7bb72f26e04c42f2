//! Where the parameters of a new model come from.

use std::convert::Infallible;

use burn::module::Param;
use burn::nn::{Initializer, Linear};
use burn::tensor::{Device, Tensor};
use burn_peft::LoraLinear;

/// Where the parameters of a new model come from, by their path.
pub(crate) trait ParameterSource {
    type Error;
    /// A matrix that multiplies from the right. `[d_in, d_out]`
    fn linear(&mut self, path: &str, shape: [usize; 2]) -> Result<Param<Tensor<2>>, Self::Error>;
    /// `[n, d]`
    fn embedding(&mut self, path: &str, shape: [usize; 2]) -> Result<Param<Tensor<2>>, Self::Error>;
    /// `[d]`
    fn norm(&mut self, path: &str, d: usize) -> Result<Param<Tensor<1>>, Self::Error>;
    /// `[d]`
    fn bias(&mut self, path: &str, d: usize) -> Result<Param<Tensor<1>>, Self::Error>;

    /// A linear layer from its weight and bias.
    fn layer(&mut self, path: &str, shape: [usize; 2], with_bias: bool) -> Result<LoraLinear, Self::Error> {
        let weight = self.linear(&format!("{path}.weight"), shape)?;
        let bias = with_bias.then(|| self.bias(&format!("{path}.bias"), shape[1])).transpose()?;
        Ok(Linear { weight, bias }.into())
    }
}

/// Random parameters, made when they are first used.
pub(crate) struct Fresh<'a> {
    pub(crate) device: &'a Device,
    pub(crate) weights: Initializer,
}

impl ParameterSource for Fresh<'_> {
    type Error = Infallible;

    fn linear(&mut self, _path: &str, shape: [usize; 2]) -> Result<Param<Tensor<2>>, Infallible> {
        Ok(self.weights.init(shape, self.device))
    }

    fn embedding(&mut self, _path: &str, shape: [usize; 2]) -> Result<Param<Tensor<2>>, Infallible> {
        Ok(self.weights.init(shape, self.device))
    }

    fn norm(&mut self, _path: &str, d: usize) -> Result<Param<Tensor<1>>, Infallible> {
        Ok(Initializer::Ones.init([d], self.device))
    }

    fn bias(&mut self, _path: &str, d: usize) -> Result<Param<Tensor<1>>, Infallible> {
        Ok(Initializer::Zeros.init([d], self.device))
    }
}
