//! What to tell about an adapter that was put onto a model.

use std::collections::BTreeMap;
use std::fmt;

use crate::summary::count;

/// What an adapter was attached to.
///
/// Printed, it names what a user may have got wrong: targets and patterns that matched nothing, and layers without a
/// module that the others have.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq)]
pub struct InjectionReport {
    /// The adapter's name.
    pub adapter: String,
    /// The adapted modules, in the model's order.
    pub modules: Vec<AdaptedModule>,
    /// How many modules of each name were adapted and in which layers, sorted by name.
    pub coverage: Vec<TargetCoverage>,
    /// Names of `target_modules` that no module has.
    pub unmatched_targets: Vec<String>,
    /// Names of `exclude_modules` that kept nothing out.
    pub unused_exclusions: Vec<String>,
    /// Keys of `rank_pattern` that match no adapted module.
    pub unmatched_rank_patterns: Vec<String>,
    /// Keys of `alpha_pattern` that match no adapted module.
    pub unmatched_alpha_patterns: Vec<String>,
    /// Paths of the parameters that are trained as copies: `modules_to_save` and biases.
    pub copied_parameters: Vec<String>,
    /// Names of `modules_to_save` that no module's name ends with.
    pub unmatched_modules_to_save: Vec<String>,
    pub(super) num_params: usize,
}

/// One adapted module.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq)]
pub struct AdaptedModule {
    /// The module's path, `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// Rows of `A`: inputs of a linear layer, vocabulary of an embedding, `channels_in * kernel` of a convolution.
    pub d_input: usize,
    /// Columns of `B`: outputs of a linear layer, width of an embedding, `channels_out` of a convolution.
    pub d_output: usize,
    /// Rank of the adapter, if its method has one.
    pub r: Option<usize>,
    /// Whether the adapter works on activations ([`LoraLinear`](crate::LoraLinear),
    /// [`LoraEmbedding`](crate::LoraEmbedding)) or on the weight (plain layers).
    pub activation_space: bool,
}

/// The adapted modules that differ in the number of their layer alone.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetCoverage {
    /// What stands behind the layer's number, `self_attn.q_proj`; the whole name of a module outside of all layers.
    pub name: String,
    /// What stands before the layer's number, `model.layers`; empty for a module outside of all layers.
    pub stack: String,
    /// How many there are.
    pub modules: usize,
    /// The numbers of their layers, ascending.
    pub layers: Vec<usize>,
    /// Layers of the stack that the configuration also targets but that have no such module.
    pub missing_layers: Vec<usize>,
}

impl InjectionReport {
    /// Trainable parameters: `Σ r (d_input + d_output)`, and the elements of copies and of `lora_bias`.
    pub fn num_params(&self) -> usize {
        self.num_params
    }
}

impl fmt::Display for InjectionReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dense = self.modules.iter().filter(|module| !module.activation_space).count();
        write!(f, "adapter `{}`: {} adapted", self.adapter, count(self.modules.len(), "module"))?;
        if self.coverage.iter().any(|coverage| !coverage.layers.is_empty()) {
            let told: Vec<String> = self.coverage.iter().map(ToString::to_string).collect();
            write!(f, " ({})", told.join(", "))?;
        }
        if dense > 0 {
            write!(f, ", {dense} of them through their dense weight")?;
        }
        if !self.copied_parameters.is_empty() {
            write!(f, ", {} copied", count(self.copied_parameters.len(), "parameter"))?;
        }
        let lists = [
            ("no module is named", &self.unmatched_targets),
            ("nothing was excluded by", &self.unused_exclusions),
            ("no adapted module matches the `rank_pattern`", &self.unmatched_rank_patterns),
            ("no adapted module matches the `alpha_pattern`", &self.unmatched_alpha_patterns),
            ("nothing to save is named", &self.unmatched_modules_to_save),
        ];
        for (what, names) in lists.iter().filter(|(_, names)| !names.is_empty()) {
            write!(f, "; {what} {}", names.join(", "))?;
        }
        Ok(())
    }
}

impl fmt::Display for TargetCoverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.modules)?;
        if !self.missing_layers.is_empty() {
            let all = self.layers.len() + self.missing_layers.len();
            write!(f, " of {all}, not in layers {}", ranges(&self.missing_layers))?;
        }
        Ok(())
    }
}

/// Where the adapted modules lie.
///
/// `modules` are all modules of the model; `is_meant` says whether the configuration would adapt a
/// module of this name.
pub(super) fn coverage<'a, E>(
    adapted: impl IntoIterator<Item = &'a str>,
    modules: impl IntoIterator<Item = &'a str>,
    mut is_meant: impl FnMut(&str) -> Result<bool, E>,
) -> Result<Vec<TargetCoverage>, E> {
    let mut stacks: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (stack, layer, _) in modules.into_iter().filter_map(split_layer) {
        stacks.entry(stack).or_default().push(layer);
    }
    let mut found: BTreeMap<(&str, &str), Vec<usize>> = BTreeMap::new();
    let mut all = vec![];
    for module in adapted {
        match split_layer(module) {
            Some((stack, layer, name)) => found.entry((name, stack)).or_default().push(layer),
            None => all.push(TargetCoverage {
                name: module.to_string(),
                stack: String::new(),
                modules: 1,
                layers: vec![],
                missing_layers: vec![],
            }),
        }
    }
    for ((name, stack), mut layers) in found {
        layers.sort_unstable();
        let mut others = stacks.remove(stack).unwrap_or_default();
        others.sort_unstable();
        others.dedup();
        stacks.insert(stack, others.clone());
        let mut missing_layers = vec![];
        for layer in others {
            if layers.binary_search(&layer).is_err() && is_meant(&format!("{stack}.{layer}.{name}"))? {
                missing_layers.push(layer);
            }
        }
        let (name, stack) = (name.to_string(), stack.to_string());
        all.push(TargetCoverage { name, stack, modules: layers.len(), layers, missing_layers });
    }
    all.sort_by(|one, other| (&one.name, &one.stack).cmp(&(&other.name, &other.stack)));
    Ok(all)
}

/// A module's name around the number of its layer, the first component that is a number behind another component.
fn split_layer(module: &str) -> Option<(&str, usize, &str)> {
    let mut start = module.find('.')? + 1;
    loop {
        let end = start + module[start..].find('.')?;
        if let Ok(layer) = module[start..end].parse() {
            return Some((&module[..start - 1], layer, &module[end + 1..]));
        }
        start = end + 1;
    }
}

/// `3, 7, 11-13` for ascending numbers.
fn ranges(numbers: &[usize]) -> String {
    let mut parts: Vec<(usize, usize)> = vec![];
    for &number in numbers {
        match parts.last_mut() {
            Some((_, end)) if *end + 1 == number => *end = number,
            _ => parts.push((number, number)),
        }
    }
    let part = |(start, end)| if start == end { format!("{start}") } else { format!("{start}-{end}") };
    parts.into_iter().map(part).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn told(adapted: &[&str], modules: &[&str], is_meant: impl Fn(&str) -> bool) -> Vec<String> {
        let found = coverage(adapted.iter().copied(), modules.iter().copied(), |name| {
            Ok::<_, Infallible>(is_meant(name))
        });
        found.unwrap().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn modules_are_counted_by_name_with_the_layers_that_lack_them() {
        let names: Vec<String> = (0..10)
            .flat_map(|i| ["q", "v"].map(|name| format!("model.layers.{i}.attn.{name}")))
            .chain(["model.embed".to_string()])
            .collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let has_v =
            |name: &&str| !name.ends_with(".v") || !["1", "4", "5", "6"].iter().any(|i| name.contains(i));
        let adapted: Vec<&str> = names.iter().copied().filter(has_v).collect();
        let expected = ["attn.q 10", "attn.v 6 of 10, not in layers 1, 4-6", "model.embed 1"];
        assert_eq!(told(&adapted, &names, |_| true), expected);
        // What the configuration does not mean is not missing.
        assert_eq!(told(&adapted, &names, |name| name.contains("5"))[1], "attn.v 6 of 7, not in layers 5");
        assert_eq!(told(&adapted, &names, |_| false)[1], "attn.v 6");
    }

    #[test]
    fn the_layer_is_the_first_number_behind_a_component() {
        assert_eq!(
            split_layer("model.layers.11.mlp.experts.2.up"),
            Some(("model.layers", 11, "mlp.experts.2.up"))
        );
        assert_eq!(split_layer("0.layers.x"), None);
        assert_eq!(split_layer("layers.3"), None);
        assert_eq!(split_layer("lm_head"), None);
    }
}
