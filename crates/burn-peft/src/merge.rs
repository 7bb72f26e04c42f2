use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::Tensor;

use crate::adapter::Adapters;
use crate::error::PeftError;
use crate::seam::{Layout, States, attach};

/// Folds the active adapters into the weights and removes every adapter.
///
/// All merged weights are computed and checked before the first one is put into the model.
pub(crate) fn merge_and_unload<M: Module>(model: &mut M) -> Result<(), PeftError> {
    let layout = Layout::of(model)?;
    let mut merged = Merger::new(&layout.states);
    model.visit(&mut merged);
    if !merged.broken.is_empty() {
        return Err(PeftError::NonFiniteMerge { name: active_names(&layout.states), modules: merged.broken });
    }
    let mut placer = Placer { path: vec![], weights: merged.weights };
    attach(model, States::new(), false);
    *model = model.clone().map(&mut placer);
    Ok(())
}

fn active_names(states: &States) -> String {
    let names: BTreeSet<&str> =
        states.values().flat_map(Adapters::active).map(|adapter| &*adapter.info.name).collect();
    names.into_iter().collect::<Vec<_>>().join("+")
}

/// Computes the merged weights without a graph.
struct Merger<'a> {
    states: &'a States,
    path: Vec<String>,
    /// Flattened: weights may be of any rank.
    weights: BTreeMap<String, Tensor<1>>,
    broken: Vec<String>,
}

impl<'a> Merger<'a> {
    fn new(states: &'a States) -> Self {
        Self { states, path: vec![], weights: BTreeMap::new(), broken: vec![] }
    }
}

impl ModuleVisitor for Merger<'_> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let path = self.path.join(".");
        let Some(state) = self.states.get(&path).filter(|state| state.active().next().is_some()) else {
            return;
        };
        let weight = state.effective(param.base());
        if !weight.clone().is_finite().all().into_scalar::<bool>() {
            self.broken.push(path.strip_suffix(".weight").unwrap_or(&path).to_string());
        }
        let elements = weight.shape().num_elements();
        self.weights.insert(path, weight.reshape([elements]));
    }
}

/// Puts the merged weights in the place of the old ones; ids and training state stay.
struct Placer {
    path: Vec<String>,
    weights: BTreeMap<String, Tensor<1>>,
}

impl ModuleMapper for Placer {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(weight) = self.weights.remove(&self.path.join(".")) else { return param };
        param.map(|base| {
            let weight = weight.reshape(base.shape());
            if base.is_autodiff() {
                Tensor::from_inner(weight).set_require_grad(base.is_require_grad())
            } else {
                weight
            }
        })
    }
}
