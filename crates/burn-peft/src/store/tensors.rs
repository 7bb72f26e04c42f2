//! Factors to and from safetensors bytes.
//!
//! The `safetensors` crate is used directly: burn-store writes a module's own parameters under the module's own paths,
//! and here neither the paths nor the layout nor the set of tensors are the module's.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_peft_files::to_f32;
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};

use super::files::unreadable;
use super::keys;
use crate::error::{PeftError, TensorProblem};

/// A tensor on its way to a file: its key, its shape there, its elements.
pub(super) type Stored = (String, Vec<usize>, Tensor<1>);

/// The bytes of a safetensors file with these tensors and the metadata that PyTorch's readers ask for.
pub(super) fn to_bytes(path: &Path, tensors: &[Stored]) -> Result<Vec<u8>, PeftError> {
    let stored: Vec<(&String, Dtype, &Vec<usize>, TensorData)> = tensors
        .iter()
        .map(|(key, shape, tensor)| {
            let data = tensor.to_data();
            let dtype = match data.dtype() {
                DType::F16 => Dtype::F16,
                DType::BF16 => Dtype::BF16,
                _ => Dtype::F32,
            };
            let data = if dtype == Dtype::F32 { data.convert::<f32>() } else { data };
            (key, dtype, shape, data)
        })
        .collect();
    let error = |source| PeftError::Safetensors { path: path.into(), source };
    let views = stored
        .iter()
        .map(|(key, dtype, shape, data)| {
            Ok((*key, TensorView::new(*dtype, shape.to_vec(), data.as_bytes())?))
        })
        .collect::<Result<Vec<_>, _>>()
        .map_err(error)?;
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    serialize(views, Some(metadata)).map_err(error)
}

/// Hands out the tensors of a file one by one, by keys without the name of an adapter.
pub(super) struct Reader<'a> {
    file: SafeTensors<'a>,
    /// The keys as the file has them by the keys that are asked for.
    keys: BTreeMap<String, String>,
    taken: BTreeSet<String>,
    /// How many of those that were taken fitted.
    read: usize,
}

impl<'a> Reader<'a> {
    /// # Errors
    /// [`PeftError::NotTheFile`], [`PeftError::Safetensors`], [`PeftError::NoAdapter`] for tensors of several adapters.
    pub(super) fn new(path: &Path, bytes: &'a [u8]) -> Result<Self, PeftError> {
        let file = SafeTensors::deserialize(bytes).map_err(|source| {
            unreadable(path, bytes, PeftError::Safetensors { path: path.into(), source })
        })?;
        let keys = without_names(path, file.names())?;
        Ok(Self { file, keys, taken: BTreeSet::new(), read: 0 })
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.keys.contains_key(key)
    }

    /// The tensor `key`, in f32 and flattened, if it has the expected shape.
    pub(super) fn take(
        &mut self,
        key: &str,
        expected: &[usize],
        device: &Device,
    ) -> Result<Tensor<1>, TensorProblem> {
        let missing = || TensorProblem::Missing { key: key.to_string(), closest: None };
        let in_file = self.keys.get(key).ok_or_else(missing)?;
        let view = self.file.tensor(in_file).map_err(|_| missing())?;
        self.taken.insert(key.to_string());
        if view.shape() != expected {
            return Err(TensorProblem::Shape {
                key: key.to_string(),
                expected: expected.to_vec(),
                found: view.shape().to_vec(),
            });
        }
        let tensor = decode(view.dtype(), view.data(), device).ok_or_else(|| TensorProblem::DType {
            key: key.to_string(),
            found: format!("{:?}", view.dtype()),
        })?;
        self.read += 1;
        Ok(tensor)
    }

    /// How many of the tensors that were taken fitted.
    pub(super) fn count(&self) -> usize {
        self.read
    }

    /// Keys that nobody took, sorted.
    pub(super) fn leftover(&self) -> Vec<String> {
        self.keys.keys().filter(|key| !self.taken.contains(*key)).cloned().collect()
    }
}

/// The keys of a file by what they are without the name of an adapter.
///
/// # Errors
/// [`PeftError::NoAdapter`] if they have different names in them.
pub(super) fn without_names<'k>(
    path: &Path,
    keys: impl IntoIterator<Item = &'k str>,
) -> Result<BTreeMap<String, String>, PeftError> {
    let (mut found, mut names) = (BTreeMap::new(), BTreeSet::new());
    let mut is_twice = false;
    for key in keys {
        let (without, name) = keys::without_name(key);
        names.extend(name);
        is_twice |= found.insert(without, key.to_string()).is_some();
    }
    if names.len() < 2 && !is_twice {
        return Ok(found);
    }
    let names: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    let reason = match names.len() {
        0 | 1 => "its keys are there with the name of an adapter and without it".into(),
        _ => format!("its keys belong to several adapters, {}", names.join(", ")),
    };
    Err(PeftError::NoAdapter {
        path: path.into(),
        reason,
        hint: "save each of them alone, with PEFT's `save_pretrained`".into(),
    })
}

/// The elements of a tensor in a file, in f32; `None` if its type is no floating-point type that adapters can have.
pub(super) fn decode(dtype: Dtype, bytes: &[u8], device: &Device) -> Option<Tensor<1>> {
    let values = to_f32(dtype, bytes)?;
    let elements = values.len();
    Some(Tensor::from_data(TensorData::new(values, [elements]), (device, DType::F32)))
}

/// Half of the last of bfloat16's 8 significant bits is 2^-8 of the number at worst.
const RELATIVE: f64 = 1.0 / 256.0;
/// The smallest step of f16.
const ABSOLUTE: f64 = 1.0 / (1 << 24) as f64;

/// Whether two tensors differ by no more than one of them having been rounded to a 16-bit type.
pub(super) fn equal_up_to_rounding(one: &Tensor<1>, other: &Tensor<1>) -> bool {
    let (one, other) = (plain_f32(one), plain_f32(other));
    let allowed = other.clone().abs().mul_scalar(RELATIVE).add_scalar(ABSOLUTE);
    (one - other).abs().lower_equal(allowed).all().into_scalar::<bool>()
}

/// The same of numbers on the host.
pub(super) fn values_equal_up_to_rounding(one: &[f32], other: &[f32]) -> bool {
    let is_near = |(one, other): (&f32, &f32)| {
        let (one, other) = (f64::from(*one), f64::from(*other));
        (one - other).abs() <= other.abs() * RELATIVE + ABSOLUTE
    };
    one.len() == other.len() && one.iter().zip(other).all(is_near)
}

/// The tensor in f32, without its graph.
fn plain_f32(tensor: &Tensor<1>) -> Tensor<1> {
    let tensor = tensor.clone().cast(DType::F32);
    if tensor.is_autodiff() { tensor.inner() } else { tensor }
}
