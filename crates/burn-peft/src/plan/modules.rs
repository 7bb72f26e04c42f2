//! The modules of a model by the names that files give them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::error::PeftError;
use crate::key_mapping::KeyMapping;
use crate::layer::{Layer, Site, Space};
use crate::seam::{BaseParameter, Layout};
use crate::target::ancestors_and_self;

pub(crate) type Parameter<'a> = (&'a BaseParameter, Arc<Site>);

/// Every parameter that belongs to a module, in the model's order, by the names that files give them.
///
/// # Errors
/// [`PeftError::InvalidPattern`], [`PeftError::EndlessPattern`], [`PeftError::AmbiguousKeyMapping`].
pub(crate) fn parameters<'a>(
    layout: &'a Layout,
    mapping: &KeyMapping,
) -> Result<Vec<Parameter<'a>>, PeftError> {
    let mapping = mapping.compile()?;
    let mut seen: BTreeMap<String, &str> = BTreeMap::new();
    let mut parameters = vec![];
    for base in &layout.parameters {
        let Some((module, _)) = base.path.rsplit_once('.') else { continue };
        let mapped = mapping.apply(&base.path)?;
        let (name, parameter) = mapped.rsplit_once('.').unwrap_or((module, &mapped));
        let site = Site {
            module: module.to_string(),
            name: name.to_string(),
            parameter: name_in_files(parameter, &base.container).to_string(),
            layer: layer_of(base),
            space: if layout.activation_space.contains(module) { Space::Activations } else { Space::Weight },
            shape: base.shape[..].to_vec(),
        };
        let full = site.full_name();
        if let Some(other) = seen.insert(full.clone(), &base.path) {
            return Err(PeftError::AmbiguousKeyMapping {
                name: full,
                paths: vec![other.to_string(), base.path.clone()],
            });
        }
        parameters.push((base, Arc::new(site)));
    }
    Ok(parameters)
}

/// Norms call their parameters `gamma` and `beta` in Burn, `weight` and `bias` in PyTorch.
fn name_in_files<'a>(parameter: &'a str, container: &str) -> &'a str {
    match parameter {
        "gamma" if container.ends_with("Norm") => "weight",
        "beta" if container.ends_with("Norm") => "bias",
        other => other,
    }
}

fn layer_of(parameter: &BaseParameter) -> Layer {
    match &*parameter.container {
        "Struct:Linear" => Layer::Linear,
        "Struct:Embedding" => Layer::Embedding,
        "Struct:Conv1d" | "Struct:Conv2d" | "Struct:Conv3d" => Layer::Conv,
        _ => Layer::Other,
    }
}

/// The names of all modules: whatever a parameter's name leads through.
pub(crate) fn module_names<'a>(parameters: &'a [Parameter]) -> BTreeSet<&'a str> {
    parameters.iter().flat_map(|(_, site)| ancestors_and_self(&site.name)).collect()
}
