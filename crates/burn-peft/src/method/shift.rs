//! The `lora_bias` of a layer that works through its weight: `scaling * shift` on the layer's own bias.

use std::sync::Arc;

use burn::tensor::{DType, Tensor};
use burn_peft_ops::cast;

use super::low_rank::{BIAS, KEY_BIAS};
use super::{Chosen, Description, Method, Parameters, Summand, TensorSpec, Update};
use crate::config::PeftConfig;
use crate::error::PeftError;
use crate::init::Start;
use crate::layer::{Layer, Site, Space};

/// Adds to a bias.
#[derive(Debug)]
struct Shift {
    scaling: f64,
}

const SHIFT: &str = BIAS;

/// Its key is that of the `lora_bias` of a layer that works on activations.
pub(super) const DESCRIPTION: Description = Description { keys: &[], of, check };

fn of(config: &PeftConfig, at: &Chosen) -> Option<Arc<dyn Method>> {
    let config = config.as_lora().filter(|config| config.lora_bias)?;
    let is_wanted =
        at.is_adapted && !at.is_saved && at.site.parameter == "bias" && at.site.space == Space::Weight;
    is_wanted.then(|| Arc::new(Shift { scaling: config.scaling_of(at.r, at.lora_alpha) }) as Arc<dyn Method>)
}

/// # Errors
/// [`PeftError::LoraBiasUnsupported`]: PEFT's embeddings have none, and a plain layer needs a bias of its own to carry it.
fn check(config: &PeftConfig, parameters: &Parameters) -> Result<(), PeftError> {
    if config.as_lora().is_none_or(|config| !config.lora_bias) {
        return Ok(());
    }
    let modules = parameters.names(|at| {
        let has_none = at.site.space == Space::Weight && !parameters.has_bias(&at.site.name);
        at.is_target() && (at.site.layer == Layer::Embedding || has_none)
    });
    if modules.is_empty() { Ok(()) } else { Err(PeftError::LoraBiasUnsupported { modules }) }
}

impl Method for Shift {
    fn tensors(&self, site: &Site) -> Vec<TensorSpec> {
        vec![TensorSpec::vector(SHIFT, KEY_BIAS, site.shape.clone())]
    }

    fn start(&self, at: &Start) -> Result<Vec<Tensor<2>>, PeftError> {
        Ok(vec![Tensor::zeros([1, at.site.elements()], (&at.device, DType::F32))])
    }

    fn scaling(&self) -> f64 {
        self.scaling
    }

    fn apply(&self, of: &Update, value: Tensor<2>, _base: &Tensor<2>) -> Tensor<2> {
        let shift = of[SHIFT].val().mul_scalar(of.scaling);
        cast(value, shift.dtype()) + shift
    }

    fn summand(&self, of: &Update) -> Option<Summand> {
        Some(Summand { factors: None, bias: Some(of[SHIFT].val()) })
    }
}
