//! Whether a device computes what it should.

mod reference;

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::tensor::module::embedding;
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData, bf16, f16};
use burn_peft_ops::{CausalMask, activation_dtype, attention, cast, linear};

use crate::ops::{Input, low_rank};
use reference::{Matrix, deviation, masked_attention, normal, table_gradient};

/// Computes on `device` what most of training with adapters consists of, and compares it with the host's f64: products of
/// several shapes, transposed and batched, attention with a causal mask and padding, an embedding and a layer with an adapter,
/// these two with their gradients.
///
/// Call it when you open a device, with the types that weights will have, before you load a model: you notice a driver that
/// computes wrongly by nothing but nonsense in the output. f32 is always checked, because adapters are in f32. The check takes
/// milliseconds on a CPU. A GPU compiles kernels for it, and with Burn's feature `autotune` tries many for each product, which
/// can take minutes when a program runs for the first time. It takes no random numbers from the device.
///
/// # Returns
/// How far off the results were, to be printed where a program says what it computes on.
///
/// # Errors
/// - [`DeviceError::UnsupportedDtype`] for a type that the device cannot compute with,
/// - [`DeviceError::WrongResult`] if something is further off than rounding explains,
/// - [`DeviceError::Failed`] if the device fails or cannot be opened. Burn panics then; the panic is caught, and its message
///   stays on standard error.
///
/// # Example
/// ```
/// use burn::tensor::{Device, FloatDType};
///
/// # fn main() -> Result<(), burn_peft::DeviceError> {
/// let check = burn_peft::check_device(&Device::default(), &[FloatDType::BF16])?;
/// assert!(check.deviations().iter().all(|deviation| deviation.relative < 1e-2));
/// # Ok(())
/// # }
/// ```
pub fn check_device(device: &Device, dtypes: &[FloatDType]) -> Result<DeviceCheck, DeviceError> {
    check(device, dtypes, &OPERATIONS)
}

fn check(
    device: &Device,
    dtypes: &[FloatDType],
    operations: &[(&'static str, Compute)],
) -> Result<DeviceCheck, DeviceError> {
    let info = device_info(device)?;
    let (device, name) = (device.clone().without_autodiff().autodiff(), info.name.as_str());
    let supports = |dtype| guarded(name, "to tell its types", || Ok(device.supports_dtype(dtype)));
    let mut all = vec![DType::F32];
    for dtype in dtypes.iter().map(|dtype| DType::from(*dtype)) {
        if !all.contains(&dtype) {
            all.push(dtype);
        }
    }
    let mut deviations = vec![];
    for dtype in all {
        if !supports(dtype)? {
            let mut supported = vec![DType::F32, DType::F16, DType::BF16];
            supported.retain(|dtype| supports(*dtype).unwrap_or(false));
            return Err(DeviceError::UnsupportedDtype { device: info.name, dtype, supported });
        }
        let mut wrong = vec![];
        for &(operation, compute) in operations {
            let of = Inputs { device: &device, dtype };
            let relative = guarded(name, operation, || compute(of))?;
            let deviation = Deviation { operation, dtype, relative };
            if !deviation.is_rounding() {
                wrong.push(deviation);
            }
            deviations.push(deviation);
        }
        if !wrong.is_empty() {
            return Err(DeviceError::WrongResult { device: info.name, wrong });
        }
    }
    Ok(DeviceCheck { info, deviations })
}

/// Opens a device, and says what it is. This computes nothing on the device.
///
/// # Errors
/// [`DeviceError::Failed`] if the device cannot be opened.
pub fn device_info(device: &Device) -> Result<DeviceInfo, DeviceError> {
    guarded(&backend_name(device), "to open it", || {
        // Devices are opened when they are first used. Numbers go there and back without a kernel.
        read(Tensor::<1>::from_data([0.0], device)).map(|_| identify(device))
    })
}

/// What a device is.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The part that computes, if the backend tells, and the backend. Burn does not tell the version of a driver.
    pub name: String,
    /// Whether it is a GPU: neither the CPU nor a driver that computes on the CPU, as SwiftShader and lavapipe do. Burn tells
    /// through the backends that this crate's features name; any other device counts as none.
    pub is_gpu: bool,
}

/// What [`check_device`] found: a device that can be trusted with what was checked.
#[derive(Debug, Clone)]
pub struct DeviceCheck {
    info: DeviceInfo,
    deviations: Vec<Deviation>,
}

impl DeviceCheck {
    /// What the device is.
    pub fn device(&self) -> &DeviceInfo {
        &self.info
    }

    /// Of every operation in every type.
    pub fn deviations(&self) -> &[Deviation] {
        &self.deviations
    }

    /// The largest deviation in a type, 0 for one that was not checked. In f32, about 1e-7 is f32 itself, and 1e-4 to
    /// 1e-3 tells of products that round their factors to TF32.
    pub fn largest(&self, dtype: FloatDType) -> f64 {
        let of_dtype = self.deviations.iter().filter(|deviation| deviation.dtype == DType::from(dtype));
        of_dtype.map(|deviation| deviation.relative).fold(0.0, f64::max)
    }
}

/// How far a device was off in one operation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Deviation {
    /// What was computed.
    pub operation: &'static str,
    /// The type of its inputs. A layer's input is in the type of its activations.
    pub dtype: DType,
    /// The largest difference to the same in f64, relative to the largest number there. Infinite if something is not finite.
    pub relative: f64,
}

impl Deviation {
    /// Whether rounding explains it: up to 3e-3 in f32, which lets TF32 pass, 1e-2 in f16 and 5e-2 in bf16.
    pub fn is_rounding(&self) -> bool {
        self.relative
            <= match self.dtype {
                DType::F64 => 1e-10,
                DType::BF16 => 5e-2,
                DType::F16 => 1e-2,
                _ => 3e-3,
            }
    }
}

impl fmt::Display for Deviation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in {}: {:.1e} of the largest number", self.operation, self.dtype.name(), self.relative)
    }
}

/// Why a device is not to be trusted.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The device cannot compute with a type.
    #[error(
        "the device {device} cannot compute in {}\nhint: choose another type for the weights: {}",
        .dtype.name(), names(.supported)
    )]
    UnsupportedDtype {
        /// The device.
        device: String,
        /// The type.
        dtype: DType,
        /// Of f32, f16 and bf16 those that it can compute in.
        supported: Vec<DType>,
    },

    /// Results are further off than rounding explains.
    #[error(
        "the device {device} computes wrongly:{}\nhint: update its driver, or choose another backend for it (`wgpu` without `vulkan` compiles other kernels), or another device",
        lines(.wrong)
    )]
    WrongResult {
        /// The device.
        device: String,
        /// Where it is wrong, and how far off.
        wrong: Vec<Deviation>,
    },

    /// The device failed.
    #[error(
        "the device {device} failed {operation}: {reason}\nhint: is there such a device, and its driver? A driver in an unusual place may need `LD_LIBRARY_PATH`, for Vulkan `VK_DRIVER_FILES`; the CPU is a device, too"
    )]
    Failed {
        /// The device.
        device: String,
        /// What it was to do.
        operation: &'static str,
        /// What Burn said.
        reason: String,
    },
}

fn names(dtypes: &[DType]) -> String {
    dtypes.iter().map(DType::name).collect::<Vec<_>>().join(", ")
}

fn lines(wrong: &[Deviation]) -> String {
    wrong.iter().map(|deviation| format!("\n  {deviation}")).collect()
}

fn identify(device: &Device) -> DeviceInfo {
    let name = backend_name(device);
    #[cfg(any(feature = "cuda", feature = "rocm", feature = "wgpu", feature = "vulkan", feature = "metal"))]
    if let Some(identity) = device.identity() {
        return DeviceInfo {
            name: format!("{}, {name}", identity.name),
            is_gpu: identity.physical.is_some(),
        };
    }
    DeviceInfo { name, is_gpu: false }
}

/// The backend of a device, and which one of its devices it is, such as `Flex(Cpu)`.
pub fn backend_name(device: &Device) -> String {
    let text = format!("{:?}", device.clone().without_autodiff());
    let text = text.trim_start_matches("Device<").trim_end_matches('>');
    text.strip_prefix("Cube(").and_then(|text| text.strip_suffix(')')).unwrap_or(text).to_string()
}

/// What `f` returns; a panic in it is an error, too.
fn guarded<R>(
    device: &str,
    operation: &'static str,
    f: impl FnOnce() -> Result<R, String>,
) -> Result<R, DeviceError> {
    let reason = match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(found)) => return Ok(found),
        Ok(Err(reason)) => reason,
        Err(panic) => message(&*panic),
    };
    Err(DeviceError::Failed { device: device.into(), operation, reason })
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "it panicked".into())
}

/// The largest deviation of what was computed.
type Compute = fn(Inputs<'_>) -> Result<f64, String>;

const OPERATIONS: [(&str, Compute); 6] = [
    ("products", products),
    ("products with transposed matrices", transposed_products),
    ("batched products", batched_products),
    ("attention with a causal mask and padding", attention_with_padding),
    ("an embedding and its gradient", embedding_and_gradient),
    ("a layer with an adapter and its gradients", layer_and_gradients),
];

/// Rows, inputs and outputs of products: a single row, sizes that tiles divide, and some that they do not. Few, because Burn's
/// autotuning tries many kernels for each.
const SHAPES: [[usize; 3]; 3] = [[1, 64, 96], [64, 128, 64], [130, 257, 66]];

/// Makes tensors on a device of numbers that the host knows.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    device: &'a Device,
    dtype: DType,
}

impl Inputs<'_> {
    /// Normally distributed numbers as the type can hold them, row by row.
    fn numbers(&self, count: usize, seed: u64) -> Vec<f64> {
        self.rounded(normal(count, seed), self.dtype)
    }

    fn rounded(&self, numbers: Vec<f64>, dtype: DType) -> Vec<f64> {
        let round = |x: f64| match dtype {
            DType::F64 => x,
            DType::BF16 => bf16::from_f64(x).to_f64(),
            DType::F16 => f16::from_f64(x).to_f64(),
            _ => f64::from(x as f32),
        };
        numbers.into_iter().map(round).collect()
    }

    fn tensor<const D: usize>(&self, numbers: &[f64], shape: [usize; D], dtype: DType) -> Tensor<D> {
        let data = TensorData::new(numbers.to_vec(), shape);
        Tensor::from_data(data.convert_dtype(dtype), (self.device, dtype))
    }

    /// The type that activations have beside weights of this one.
    fn activations(&self) -> DType {
        activation_dtype(&self.tensor(&[0.0], [1], self.dtype))
    }

    /// A matrix here and there.
    fn matrix(&self, rows: usize, columns: usize, seed: u64) -> (Tensor<2>, Matrix) {
        let numbers = self.numbers(rows * columns, seed);
        (self.tensor(&numbers, [rows, columns], self.dtype), Matrix::from_row_slice(rows, columns, &numbers))
    }
}

fn read<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f64>, String> {
    let data = tensor.try_into_data().map_err(|error| error.to_string())?;
    Ok(data.iter::<f64>().collect())
}

fn products(of: Inputs<'_>) -> Result<f64, String> {
    largest(SHAPES.iter().map(|&[n, d_in, d_out]| {
        let ((x, x_there), (w, w_there)) = (of.matrix(n, d_in, 1), of.matrix(d_in, d_out, 2));
        Ok(deviation(&read(x.matmul(w))?, &row_by_row(&(x_there * w_there))))
    }))
}

fn transposed_products(of: Inputs<'_>) -> Result<f64, String> {
    largest(SHAPES.iter().flat_map(|&[n, d_in, d_out]| {
        let ((x, x_there), (w, w_there)) = (of.matrix(n, d_in, 1), of.matrix(d_out, d_in, 2));
        let ((y, y_there), x) = (of.matrix(n, d_out, 3), x);
        let right = (x.clone().matmul(w.transpose()), &x_there * w_there.transpose());
        let left = (x.transpose().matmul(y), x_there.transpose() * y_there);
        [right, left].map(|(found, expected)| Ok(deviation(&read(found)?, &row_by_row(&expected))))
    }))
}

/// As scores are made: `[b, n, s, d] [b, n, t, d]ᵀ`.
fn batched_products(of: Inputs<'_>) -> Result<f64, String> {
    let [b, n, s, t, d] = [2, 3, 17, 29, 40];
    let (q, k) = (of.numbers(b * n * s * d, 1), of.numbers(b * n * t * d, 2));
    let found =
        of.tensor(&q, [b, n, s, d], of.dtype).matmul(of.tensor(&k, [b, n, t, d], of.dtype).swap_dims(2, 3));
    let each = q.chunks(s * d).zip(k.chunks(t * d));
    let expected = each.flat_map(|(q, k)| {
        row_by_row(&(Matrix::from_row_slice(s, d, q) * Matrix::from_row_slice(t, d, k).transpose()))
    });
    Ok(deviation(&read(found)?, &expected.collect::<Vec<_>>()))
}

fn attention_with_padding(of: Inputs<'_>) -> Result<f64, String> {
    let [b, n, g, s, d] = [2, 2, 3, 23, 16];
    let padding = [0, 5];
    let dtype = of.activations();
    let of = Inputs { dtype, ..of };
    let (k, v) = (of.numbers(b * n * s * d, 2), of.numbers(b * n * s * d, 3));
    // Queries are scaled by `1 / sqrt(d)`.
    let q: Vec<f64> = of.numbers(b * n * g * s * d, 1).into_iter().map(|x| x * 0.25).collect();
    let tokens: Vec<bool> = padding.iter().flat_map(|&padding| (0..s).map(move |i| i >= padding)).collect();
    let tokens = Tensor::from_data(TensorData::new(tokens, [b, s]), of.device);
    let mask = CausalMask::new(s, s).with_tokens(tokens);
    let [k_here, v_here] = [&k, &v].map(|x| of.tensor(x, [b, n, s, d], dtype));
    let y = attention(of.tensor(&q, [b, n, g, s, d], dtype), k_here, v_here, &mask);
    let expected = masked_attention([b, n, g, s, d], [&q, &k, &v], &padding);
    // What padding sees is nobody's business.
    let found = read(y)?;
    let seen = |i: &usize| i / d % s >= padding[i / (n * g * s * d)];
    let [found, expected] = [found, expected]
        .map(|numbers| (0..numbers.len()).filter(seen).map(|i| numbers[i]).collect::<Vec<_>>());
    Ok(deviation(&found, &expected))
}

fn embedding_and_gradient(of: Inputs<'_>) -> Result<f64, String> {
    let [rows, d] = [50, 24];
    // Some rows more than once, most of them never.
    let ids = [3_i64, 49, 3, 0, 17, 3, 49, 21];
    let (table, table_there) = of.matrix(rows, d, 1);
    let (dy, dy_there) = of.matrix(ids.len(), d, 2);
    let table = table.require_grad();
    let ids_here = Tensor::<2, Int>::from_data([ids], of.device);
    let y = embedding(table.clone(), ids_here).reshape([ids.len(), d]);
    let gradients = (y.clone() * dy).sum().backward();
    let gradient = table.grad(&gradients).ok_or("there is no gradient")?;
    let looked_up =
        ids.iter().flat_map(|&id| table_there.row(id as usize).iter().copied().collect::<Vec<_>>());
    let of_table = row_by_row(&table_gradient(rows, &ids, &dy_there));
    largest([
        Ok(deviation(&read(y)?, &looked_up.collect::<Vec<_>>())),
        Ok(deviation(&read(gradient)?, &of_table)),
    ])
}

/// `x W + b + scaling (x A) B` with `W` in the type, the rest as a layer has it, and the gradients of `x`, `A` and `B`.
fn layer_and_gradients(of: Inputs<'_>) -> Result<f64, String> {
    let ([n, d_in, d_out, rank], scaling) = ([37, 70, 33, 4], 2.0);
    let (w, w_there) = of.matrix(d_in, d_out, 1);
    let of_x = Inputs { dtype: activation_dtype(&w), ..of };
    let of_factors = Inputs { dtype: if of.dtype == DType::F64 { DType::F64 } else { DType::F32 }, ..of };
    let ((x, x_there), (dy, dy_there)) = (of_x.matrix(n, d_in, 2), of_x.matrix(n, d_out, 3));
    let (bias, bias_there) = of.matrix(1, d_out, 4);
    let ((a, a_there), (b, b_there)) = (of_factors.matrix(d_in, rank, 5), of_factors.matrix(rank, d_out, 6));
    let [x, a, b] = [x, a, b].map(Tensor::require_grad);
    let change = low_rank::product(&Input::Activations(x.clone()), a.clone(), b.clone(), scaling);
    let y = linear(x.clone(), w, Some(bias.reshape([d_out])));
    let y = y.clone() + cast(change, y.dtype());
    let gradients = (y.clone() * dy).sum().backward();
    let there = [
        &x_there * &w_there
            + &x_there * &a_there * &b_there * scaling
            + Matrix::from_element(n, 1, 1.0) * bias_there,
        &dy_there * w_there.transpose() + &dy_there * b_there.transpose() * a_there.transpose() * scaling,
        x_there.transpose() * &dy_there * b_there.transpose() * scaling,
        (x_there * a_there).transpose() * dy_there * scaling,
    ];
    let mut here = vec![read(y)?];
    for input in [x, a, b] {
        here.push(read(input.grad(&gradients).ok_or("there is no gradient")?)?);
    }
    largest(here.iter().zip(there).map(|(here, there)| Ok(deviation(here, &row_by_row(&there)))))
}

fn row_by_row(matrix: &Matrix) -> Vec<f64> {
    matrix.transpose().as_slice().to_vec()
}

fn largest(deviations: impl IntoIterator<Item = Result<f64, String>>) -> Result<f64, String> {
    deviations.into_iter().try_fold(0.0, |largest: f64, deviation| Ok(largest.max(deviation?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_computes_in_every_type() {
        let check =
            check_device(&Device::flex(), &[FloatDType::BF16, FloatDType::F16, FloatDType::F64]).unwrap();
        assert_eq!(check.deviations().len(), 4 * OPERATIONS.len());
        let [single, bf16, f16] =
            [FloatDType::F32, FloatDType::BF16, FloatDType::F16].map(|dtype| check.largest(dtype));
        assert!(single < 2e-6 && f16 < 5e-3 && bf16 < 3e-2 && bf16 > 0.0, "{single} {f16} {bf16}");
        assert_eq!(*check.device(), device_info(&Device::flex().autodiff()).unwrap());
        assert!(check.device().name.starts_with("Flex") && !check.device().is_gpu);
    }

    #[test]
    fn wrong_results_and_missing_types_are_errors() {
        let swapped: Compute = |of| {
            let (x, there) = of.matrix(64, 64, 1);
            Ok(deviation(&read(x.transpose())?, &row_by_row(&there)))
        };
        let error = check(&Device::flex(), &[], &[OPERATIONS[0], ("a swap", swapped)]).unwrap_err();
        let DeviceError::WrongResult { wrong, .. } = &error else { panic!("{error}") };
        assert_eq!(wrong.iter().map(|wrong| wrong.operation).collect::<Vec<_>>(), ["a swap"]);
        assert!(wrong[0].relative > 0.1, "{error}");
        let error = check_device(&Device::flex(), &[FloatDType::Flex32]).unwrap_err();
        assert!(matches!(error, DeviceError::UnsupportedDtype { dtype: DType::Flex32, .. }), "{error}");
        assert!(error.to_string().ends_with("for the weights: f32, f16, bf16"), "{error}");
    }

    #[test]
    fn deviations_are_relative_and_what_is_no_number_is_infinitely_far() {
        assert_eq!(deviation(&[1.0, -4.0], &[1.5, -4.0]), 0.125);
        for (found, expected) in [
            (&[f64::NAN][..], &[1.0][..]),
            (&[f64::INFINITY], &[1.0]),
            (&[1.0, 1.0], &[1.0]),
            (&[0.0], &[0.0]),
        ] {
            assert_eq!(deviation(found, expected), f64::INFINITY, "{found:?}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_device_operation_and_type() {
        let wrong = Deviation { operation: "products", dtype: DType::F32, relative: 0.7 };
        assert!(!wrong.is_rounding() && !Deviation { relative: f64::INFINITY, ..wrong }.is_rounding());
        let error = DeviceError::WrongResult { device: "SwiftShader, Vulkan".into(), wrong: vec![wrong] };
        let text = error.to_string();
        for part in ["SwiftShader", "\n  products in f32: 7.0e-1", "hint: update its driver"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_panic_is_an_error_with_its_message() {
        type Failure = fn() -> Result<(), String>;
        let failures: [(Failure, &str); 3] = [
            (|| panic!("no adapter"), "no adapter"),
            (|| panic!("adapter {}", 7), "adapter 7"),
            (|| Err("lost".into()), "lost"),
        ];
        for (failure, reason) in failures {
            let error = guarded("Flex(Cpu)", "to open it", failure).unwrap_err();
            let told = format!("the device Flex(Cpu) failed to open it: {reason}\nhint");
            assert!(error.to_string().contains(&told), "{error}");
        }
    }
}
