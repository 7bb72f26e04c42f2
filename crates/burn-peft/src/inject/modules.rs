//! The modules of a model by the names that files give them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::adapter::{LayerKind, Site};
use crate::error::PeftError;
use crate::key_mapping::KeyMapping;
use crate::seam::{BaseParameter, Layout};
use crate::target::matches_name;

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
            kind: kind_of(base, layout.activation_space.contains(module)),
            shape: base.shape[..].to_vec(),
        };
        let full = format!("{}.{}", site.name, site.parameter);
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

fn kind_of(parameter: &BaseParameter, shows_its_input: bool) -> LayerKind {
    match (&*parameter.container, shows_its_input) {
        ("Struct:Linear", true) => LayerKind::LoraLinear,
        ("Struct:Linear", false) => LayerKind::Linear,
        ("Struct:Embedding", true) => LayerKind::LoraEmbedding,
        ("Struct:Embedding", false) => LayerKind::Embedding,
        ("Struct:Conv1d" | "Struct:Conv2d" | "Struct:Conv3d", _) => LayerKind::Conv,
        _ => LayerKind::Other,
    }
}

/// The names of all modules: whatever a parameter's name leads through.
pub(crate) fn module_names<'a>(parameters: &'a [Parameter]) -> BTreeSet<&'a str> {
    parameters.iter().flat_map(|(_, site)| ancestors_and_self(&site.name)).collect()
}

/// Whether `module` is one that `modules_to_save` names or lies within one, by the rule with which PEFT keeps updates
/// of low rank out of them.
pub(crate) fn lies_within(module: &str, saved: &str) -> bool {
    ancestors_and_self(module).any(|module| matches_name(module, saved))
}

/// Whether a parameter of `module` is copied because of the entry `saved`: PEFT copies every module whose name ends
/// with it, not only behind a dot, with all it contains.
pub(crate) fn is_part_of(module: &str, saved: &str) -> bool {
    !saved.is_empty() && ancestors_and_self(module).any(|module| module.ends_with(saved))
}

fn ancestors_and_self(module: &str) -> impl Iterator<Item = &str> {
    module.match_indices('.').map(|(end, _)| &module[..end]).chain([module])
}
