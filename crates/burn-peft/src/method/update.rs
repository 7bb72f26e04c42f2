//! A method at work: its tensors, and the factor that it is applied with.

use std::ops::Index;
use std::sync::Arc;

use burn::module::{Module, Param};
use burn::nn::{Dropout, DropoutConfig};
use burn::tensor::Tensor;

use super::{Method, TensorSpec};
use crate::layer::Site;

/// One change of one parameter: a method and its tensors.
#[derive(Module, Debug)]
pub(crate) struct Update {
    tensors: Vec<Param<Tensor<2>>>,
    /// While training, whether dropout acts.
    pub(crate) dropout: Option<Dropout>,
    #[module(skip)]
    pub(crate) method: Arc<dyn Method>,
    /// What each tensor is.
    #[module(skip)]
    specs: Arc<[TensorSpec]>,
    /// The factor of the change.
    #[module(skip)]
    pub(crate) scaling: f64,
}

impl Update {
    /// The method with these values for its tensors, in its order.
    pub(crate) fn new(method: Arc<dyn Method>, site: &Site, tensors: Vec<Tensor<2>>) -> Self {
        let prob = method.dropout();
        Self {
            tensors: tensors.into_iter().map(Param::from_tensor).collect(),
            dropout: (prob > 0.0).then(|| DropoutConfig::new(prob).init()),
            specs: method.tensors(site).into(),
            scaling: method.scaling(),
            method,
        }
    }

    pub(crate) fn scaled(mut self, scaling: f64) -> Self {
        self.scaling = scaling;
        self
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Param<Tensor<2>>> {
        self.parts().find(|(spec, _)| spec.name == name).map(|(_, tensor)| tensor)
    }

    /// Its tensors and what they are.
    pub(crate) fn parts(&self) -> impl Iterator<Item = (&TensorSpec, &Param<Tensor<2>>)> {
        self.specs.iter().zip(&self.tensors)
    }

    /// The same with every tensor changed.
    pub(crate) fn map_parts(
        mut self,
        mut change: impl FnMut(&TensorSpec, Param<Tensor<2>>) -> Param<Tensor<2>>,
    ) -> Self {
        let tensors = self.specs.iter().zip(self.tensors);
        self.tensors = tensors.map(|(spec, tensor)| change(spec, tensor)).collect();
        self
    }

    /// How many parameters it trains.
    pub(crate) fn num_params(&self) -> usize {
        self.specs.iter().filter(|spec| spec.is_trained).map(TensorSpec::elements).sum()
    }

    /// Whether dropout acts, by the rules of `nn::Dropout`: on a layer that was not frozen.
    pub(crate) fn drops(&self) -> bool {
        self.dropout.as_ref().is_some_and(|dropout| dropout.training.is_enabled())
    }
}

/// A tensor that the method has described.
impl Index<&str> for Update {
    type Output = Param<Tensor<2>>;

    fn index(&self, name: &str) -> &Param<Tensor<2>> {
        let at = self.specs.iter().position(|spec| spec.name == name);
        &self.tensors[at.unwrap_or(self.tensors.len())]
    }
}
