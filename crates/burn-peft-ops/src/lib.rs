//! What layers compute, as functions of tensors that know no layer, configuration or adapter.
//!
//! Each has a body composed of Burn's operations, for every backend and type. With the feature `flex`, tensors in f32 on
//! Flex, Burn's CPU backend, take a kernel instead: one pass over memory where the composed body has many, a backward
//! written by hand, and less kept for it. Both compute the same formula, and the tests compare both with f64.
//!
//! | function | what | paper or origin |
//! |---|---|---|
//! | [`linear`] | `x W + b`, made for a `W` that is not trained, also of one in 16 bits; [`in_full_precision`] | |
//! | [`zero_some`], [`dropped_product`] | dropout, and dropout before a product; [`with_dropout_seed`] | Srivastava et al. 2014 |
//! | [`rms_norm`] | `x / sqrt(mean(x²) + ε) * weight` | Zhang and Sennrich 2019 |
//! | [`swiglu`] | `silu(gate) * up` | Shazeer 2020 |
//! | [`rotate`] | rotary position embeddings | Su et al. 2021 |
//! | [`attention`] | causal attention with shared key and value heads; [`CausalMask`] and [`TokenTree`] say what is seen | Vaswani et al. 2017, Ainslie et al. 2023 |
//! | [`cross_entropy`], [`cross_entropy_of_frozen`] | the loss of the next token | |
//! | [`sum_all`], [`RunningSum`] | long sums in f32 | |
//!
//! ```
//! use burn::tensor::{Device, Tensor};
//! use burn_peft_ops::rms_norm;
//!
//! let device = Device::flex();
//! let x = Tensor::<2>::from_data([[3.0, 4.0]], &device);
//! let y = rms_norm(x, Tensor::ones([2], &device), 0.0).into_data().try_to_vec::<f32>().unwrap();
//! assert!((y[0] - 3.0 / 12.5f32.sqrt()).abs() < 1e-6);
//! ```

mod attention;
mod causal_mask;
mod cross_entropy;
mod dropout;
#[cfg(feature = "flex")]
mod exp;
#[cfg(feature = "flex")]
mod flex;
mod linear;
mod rms_norm;
mod rope;
mod sum;
mod swiglu;
#[cfg(test)]
mod testing;
mod token_tree;

use burn::tensor::{DType, Device, Tensor};

pub use attention::attention;
pub use causal_mask::CausalMask;
pub use cross_entropy::{cross_entropy, cross_entropy_of_frozen};
pub use dropout::{dropped_product, next_dropout_seed, with_dropout_seed, zero_some};
pub use linear::{WIDENED_AT_ONCE, activation_dtype, in_full_precision, linear};
pub use rms_norm::rms_norm;
pub use rope::rotate;
pub use sum::{RunningSum, sum_all};
pub use swiglu::swiglu;
pub use token_tree::TokenTree;

/// Whether the device of a tensor has kernels: Flex, Burn's CPU backend, with the feature `flex`.
pub fn has_kernels<const D: usize>(tensor: &Tensor<D>) -> bool {
    #[cfg(feature = "flex")]
    return flex::is_on_flex(tensor);
    #[cfg(not(feature = "flex"))]
    return {
        let _ = tensor;
        false
    };
}

/// The tensor in another floating-point type. Costs nothing if it has that type. A tensor that is quantized, or a type
/// that has no fractions, leaves it as it is.
pub fn cast<const D: usize>(x: Tensor<D>, dtype: DType) -> Tensor<D> {
    if x.dtype() == dtype || !x.dtype().is_float() || !dtype.is_float() { x } else { x.cast(dtype) }
}

/// `tensor`, which has no graph, with autodiff where `device` has it.
///
/// `Tensor::from_inner` alone gives it the default checkpointing strategy, and an operation on tensors of two strategies
/// panics.
pub fn on_kind_of<const D: usize>(tensor: Tensor<D>, device: &Device) -> Tensor<D> {
    match device.gradient_checkpointing_strategy() {
        Some(strategy) => Tensor::from_inner(tensor).with_gradient_checkpointing_strategy(strategy),
        None => tensor,
    }
}
