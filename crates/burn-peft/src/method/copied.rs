//! A trained copy in the parameter's place: `modules_to_save`, and biases that are trained.

use std::sync::Arc;

use burn::tensor::Tensor;

use super::{BASE_LAYER, Chosen, Description, Method, Parameters, TensorSpec, Update};
use crate::config::{Bias, PeftConfig};
use crate::error::PeftError;
use crate::init::Start;
use crate::layer::Site;

/// Takes the parameter's place.
#[derive(Debug)]
struct Copied {
    /// Whether PEFT has moved the module's own parameters into `base_layer`, as it does where the module is adapted too.
    is_in_base_layer: bool,
}

const COPY: &str = "copy";

/// PEFT keeps the copy under the key of the parameter itself.
pub(super) const DESCRIPTION: Description = Description { keys: &[], of, check };

fn of(config: &PeftConfig, at: &Chosen) -> Option<Arc<dyn Method>> {
    let is_trained_bias = at.site.parameter == "bias"
        && match config.kind().bias() {
            Bias::None => false,
            Bias::All => true,
            Bias::LoraOnly => at.is_adapted,
        };
    (at.is_saved || is_trained_bias)
        .then(|| Arc::new(Copied { is_in_base_layer: at.is_adapted }) as Arc<dyn Method>)
}

/// # Errors
/// [`PeftError::TargetAlsoSaved`]: PEFT copies modules whose name ends with an entry of `modules_to_save`, and keeps
/// `target_modules` out of those only that match it between dots.
fn check(_config: &PeftConfig, parameters: &Parameters) -> Result<(), PeftError> {
    let modules = parameters.names(|at| at.is_target() && at.is_saved);
    if modules.is_empty() { Ok(()) } else { Err(PeftError::TargetAlsoSaved { modules }) }
}

impl Method for Copied {
    fn tensors(&self, site: &Site) -> Vec<TensorSpec> {
        vec![TensorSpec::parameter(COPY, if self.is_in_base_layer { BASE_LAYER } else { "" }, site)]
    }

    fn start(&self, at: &Start) -> Result<Vec<Tensor<2>>, PeftError> {
        Ok(vec![at.base()])
    }

    fn replaces(&self) -> bool {
        true
    }

    fn apply(&self, of: &Update, _value: Tensor<2>, _base: &Tensor<2>) -> Tensor<2> {
        of[COPY].val()
    }
}
