//! Floating-point numbers in files.

use half::{bf16, f16};
use safetensors::Dtype;

/// Whether tensors of this type can be read: f32, f16 and bf16.
pub fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// Little-endian numbers in f32; `None` if [`is_float`] does not hold. Bytes behind the last whole number are left out.
///
/// ```
/// use burn_peft_files::to_f32;
/// use safetensors::Dtype;
///
/// assert_eq!(to_f32(Dtype::BF16, &[0x80, 0x3f, 0x00, 0xc0]), Some(vec![1.0, -2.0]));
/// assert_eq!(to_f32(Dtype::I32, &[0; 4]), None);
/// ```
pub fn to_f32(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    match dtype {
        Dtype::F32 => Some(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()),
        Dtype::F16 => Some(bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect()),
        Dtype::BF16 => Some(bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect()),
        _ => None,
    }
}
