//! What PEFT calls the tensors of an adapter, and how it lays them out.

use burn::tensor::Tensor;

use crate::adapter::{Adapter, Change, Copied, LayerKind, Site, Update};
use crate::lora::{Bias, LowRank};

/// PEFT wraps the model twice, in `PeftModel` and in `LoraModel`, and saves the path through both.
pub(super) const PREFIX: &str = "base_model.model.";

/// One tensor of an adapter's file.
pub(super) struct Entry {
    pub(super) key: String,
    /// The shape in the file, PyTorch's layout.
    pub(super) shape: Vec<usize>,
    pub(super) part: Part,
}

/// What a tensor is to the adapter of one parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    A,
    B,
    /// The bias of `B`, wherever it is kept in memory.
    Bias,
    Copy,
}

/// The tensors that the adapter of the parameter at `site` has in a file.
///
/// `is_adapted` tells whether the same adapter has an update of low rank in the same module: PEFT has moved the
/// module's own parameters into `base_layer` then.
pub(super) fn entries(site: &Site, change: Change, lora_bias: bool, is_adapted: bool) -> Vec<Entry> {
    let entry = |suffix: &str, shape: Vec<usize>, part| Entry {
        key: format!("{PREFIX}{}.{suffix}", site.name),
        shape,
        part,
    };
    match change {
        Change::LowRank { r, .. } => {
            let [d_in, d_out] = site.factor_dims();
            if site.kind.is_embedding() {
                return vec![
                    entry("lora_embedding_A", vec![r, d_in], Part::A),
                    entry("lora_embedding_B", vec![d_out, r], Part::B),
                ];
            }
            let (mut a, mut b) = (vec![r, d_in], vec![d_out, r]);
            if site.kind == LayerKind::Conv {
                // `A` is a convolution of the same kernel, `B` one of kernel 1.
                a = [&[r], &site.shape[1..]].concat();
                b.resize(site.shape.len(), 1);
            }
            let mut entries = vec![entry("lora_A.weight", a, Part::A), entry("lora_B.weight", b, Part::B)];
            if lora_bias && site.kind.in_activation_space() {
                entries.push(entry("lora_B.bias", vec![d_out], Part::Bias));
            }
            entries
        }
        Change::Shift { .. } => vec![entry("lora_B.bias", site.shape.clone(), Part::Bias)],
        Change::Copy { shift } => {
            let mut entries = vec![base(site, is_adapted)];
            if shift.is_some() {
                entries.push(entry("lora_B.bias", site.shape.clone(), Part::Bias));
            }
            entries
        }
    }
}

/// A key taken apart: the module's name, and what stands behind it. `None` if it is no key of PEFT's.
pub(super) fn split(key: &str) -> Option<(&str, &str)> {
    const ENDS: &[&str] = &[
        "lora_A.weight",
        "lora_B.weight",
        "lora_B.bias",
        "lora_embedding_A",
        "lora_embedding_B",
        "base_layer.weight",
        "base_layer.bias",
    ];
    let path = key.strip_prefix(PREFIX)?;
    let known = ENDS.iter().find_map(|end| Some((path.strip_suffix(end)?.strip_suffix('.')?, *end)));
    known.or_else(|| path.rsplit_once('.'))
}

/// A key without the name of an adapter in it, and that name: `x.lora_A.default.weight` is `x.lora_A.weight` of
/// `default`.
///
/// So are keys named in memory, where a model has several adapters, and in files of those who save what is in memory.
pub(super) fn without_name(key: &str) -> (String, Option<&str>) {
    let parts: Vec<&str> = key.split('.').collect();
    let named = parts.iter().enumerate().find_map(|(i, part)| {
        let behind = &parts[i + 1..];
        match (*part, behind) {
            // The wrapper of a module that is saved whole goes with the name.
            ("modules_to_save", [_, _]) => Some((i, i + 2)),
            ("lora_A" | "lora_B", [_, "weight" | "bias"]) | ("lora_magnitude_vector", [_, "weight"]) => {
                Some((i + 1, i + 2))
            }
            ("lora_embedding_A" | "lora_embedding_B", [_]) => Some((i + 1, i + 2)),
            _ => None,
        }
    });
    match named {
        Some((start, end)) => ([&parts[..start], &parts[end..]].concat().join("."), Some(parts[end - 1])),
        None => (key.to_string(), None),
    }
}

/// What PEFT calls the two modules into which it puts one that is saved whole.
const WRAPPERS: [&str; 2] = ["modules_to_save", "original_module"];

/// Whether a key is one of those under which PEFT, with `bias` "all", writes the biases of saved modules again. It does
/// not read them.
pub(super) fn is_written_again(key: &str, bias: Bias) -> bool {
    bias == Bias::All && key.ends_with(".bias") && key.split('.').any(|part| WRAPPERS.contains(&part))
}

/// Whether a key is that of a parameter of the base, `x.weight` or `x.bias`.
pub(super) fn is_of_base(key: &str) -> bool {
    let is_of_adapter =
        |part: &str| part.starts_with("lora_") || part == "token_adapter" || WRAPPERS.contains(&part);
    key.starts_with(PREFIX)
        && key.rsplit('.').next().is_some_and(|end| ["weight", "bias"].contains(&end))
        && !key.split('.').any(is_of_adapter)
}

/// The key of a module's tensor; the inverse of [`split`].
pub(super) fn join(module: &str, end: &str) -> String {
    format!("{PREFIX}{module}.{end}")
}

/// A parameter of the base as a file has it, which PEFT adds for embeddings and output layers.
pub(super) fn base(site: &Site, is_adapted: bool) -> Entry {
    let mut shape = site.shape.clone();
    if is_transposed(site) {
        shape.reverse();
    }
    let inside = if is_adapted { "base_layer." } else { "" };
    Entry { key: format!("{PREFIX}{}.{inside}{}", site.name, site.parameter), shape, part: Part::Copy }
}

/// Burn keeps the weight of a linear layer as `[d_in, d_out]`, PyTorch as `[d_out, d_in]`.
fn is_transposed(site: &Site) -> bool {
    site.kind.is_linear() && site.parameter == "weight"
}

/// A tensor of `adapter` as the file has it, flattened.
pub(super) fn to_file(adapter: &Adapter, part: Part) -> Option<Tensor<1>> {
    let matrix = |tensor: Tensor<2>| {
        let elements = tensor.shape().num_elements();
        tensor.transpose().reshape([elements])
    };
    match (&adapter.update, part) {
        (Update::LowRank(factors), Part::A) => Some(matrix(factors.a.val())),
        (Update::LowRank(factors), Part::B) => Some(matrix(factors.b.val())),
        (Update::LowRank(LowRank { bias: Some(bias), .. }), Part::Bias) => Some(bias.val()),
        (Update::Shift(shift), Part::Bias) => Some(shift.val()),
        (Update::Copy(Copied { bias: Some(bias), .. }), Part::Bias) => Some(bias.val()),
        (Update::Copy(Copied { copy, .. }), Part::Copy) => Some(flip(copy.val(), &adapter.info.site)),
        _ => None,
    }
}

/// A copy in the other of the two layouts.
fn flip(copy: Tensor<1>, site: &Site) -> Tensor<1> {
    match (is_transposed(site), &site.shape[..]) {
        (true, [d_in, d_out]) => {
            let elements = d_in * d_out;
            copy.reshape([*d_in, *d_out]).transpose().reshape([elements])
        }
        _ => copy,
    }
}

/// The factor in a file, flattened, as it is in memory.
///
/// Flat on the way, so that its elements are in the order of a fresh factor's: a view in another order makes backends sum
/// products in another order, and a loaded adapter would not compute bit for bit what the saved one did.
pub(super) fn factor_from_file(stored: Tensor<1>, rows: usize) -> Tensor<2> {
    let elements = stored.shape().num_elements();
    let columns = elements / rows.max(1);
    stored.reshape([rows, columns]).transpose().reshape([elements]).reshape([columns, rows])
}

/// A copied parameter in a file, flattened, as it is in memory.
pub(super) fn copy_from_file(stored: Tensor<1>, site: &Site) -> Tensor<1> {
    match (is_transposed(site), &site.shape[..]) {
        (true, [d_in, d_out]) => {
            let elements = d_in * d_out;
            stored.reshape([*d_out, *d_in]).transpose().reshape([elements])
        }
        _ => stored,
    }
}
