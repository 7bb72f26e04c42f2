//! On Burn's CPU backend: a product whose backward computes what is asked for, from what that needs.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, FloatDType, Tensor, bf16, f16};

use super::few_rows::MOST_ROWS;
use super::stored::{Number, Stored};
use super::{is_half, rounded};
use crate::flex::{Matrix, contiguous, is_on_flex, numbers, strided, tensor};

/// From so many rows on, gemmkit multiplies with a matrix that lies row by row; with fewer, Burn's `gemm` is faster. With
/// a turned one, gemmkit is faster throughout.
const MANY_ROWS: usize = 128;
/// From so many results on as well: Burn's product clears and aligns the memory of its result in a second copy of it.
const MANY_RESULTS: usize = 1 << 20;

/// Whether [`product`] is for these two.
pub(super) fn has_kernel<const D: usize>(x: &Tensor<D>, weight: &Tensor<2>) -> bool {
    let is_stored = x.dtype() == DType::F32 && is_half(weight.dtype());
    weight.dtype().is_float()
        && (x.dtype() == weight.dtype() || is_stored)
        && D > 1
        && x.shape().num_elements() > 0
        && weight.shape().num_elements() > 0
        && x.dims()[D - 1] == weight.dims()[0]
        && is_on_flex(weight)
}

/// `x W`, `[n, d_in]` to `[n, d_out]`.
pub(super) fn product(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    let (is_trained, may_round) = (weight.is_tracked(), rounded::is_allowed() && rounded::is_faster());
    Tensor::from_dispatch(Dispatch::product(x.into_dispatch(), weight.into_dispatch(), is_trained, may_round))
}

#[backend_extension(Flex, Autodiff)]
trait Product: Backend {
    /// `is_trained` says that the weight needs a gradient, `may_round` that products with a weight in bf16 are in bf16.
    fn product(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        is_trained: bool,
        may_round: bool,
    ) -> FloatTensor<Self>;
}

impl Product for Flex {
    fn product(x: FlexTensor, weight: FlexTensor, _: bool, may_round: bool) -> FlexTensor {
        let (x, weight) = (strided(x), strided(weight));
        let [rows, _] = x.layout().shape().dims();
        let [_, d_out] = weight.layout().shape().dims();
        if x.dtype() == DType::F32 && (is_half(weight.dtype()) || rows <= MOST_ROWS) {
            let x = if rows <= MOST_ROWS { contiguous(x) } else { x };
            let weight = in_lines(weight);
            let layout = weight.layout();
            let y = match weight.dtype() {
                DType::BF16 if may_round && rows > MOST_ROWS => {
                    rounded::product(numbers(&contiguous(x)), stored(layout, weight.storage()))
                }
                DType::BF16 => stored::<bf16>(layout, weight.storage()).product(Matrix::of(&x)),
                DType::F16 => stored::<f16>(layout, weight.storage()).product(Matrix::of(&x)),
                _ => stored::<f32>(layout, weight.storage()).product(Matrix::of(&x)),
            };
            return tensor(y, [rows, d_out]);
        }
        let is_turned = weight.layout().strides()[1] != 1;
        let is_large = rows >= MANY_ROWS || rows * d_out >= MANY_RESULTS;
        if x.dtype() == DType::F32 && (is_turned || is_large) {
            return Matrix::of(&x).product(Matrix::of(&weight));
        }
        Self::float_matmul(x, weight)
    }
}

/// A matrix whose rows or columns lie in one piece each.
fn in_lines(matrix: FlexTensor) -> FlexTensor {
    match matrix.layout().strides() {
        [_, 1] | [1, _] => matrix,
        _ => matrix.to_contiguous(),
    }
}

/// A weight that lies in lines, in `numbers` as `layout` says.
fn stored<'a, E: Number>(layout: &Layout, numbers: &'a [E]) -> Stored<'a, E> {
    let [d_in, d_out] = layout.shape().dims();
    let [of_rows, of_columns] = [0, 1].map(|axis| layout.strides()[axis].unsigned_abs());
    let numbers = &numbers[layout.start_offset()..];
    match of_columns {
        1 => Stored { numbers, lines: d_in, length: d_out, apart: of_rows, is_by_row: true },
        _ => Stored { numbers, lines: d_out, length: d_in, apart: of_columns, is_by_row: false },
    }
}

/// `aᵀ b`
fn turned_product(a: FlexTensor, b: FlexTensor) -> FlexTensor {
    if a.dtype() == DType::F32 {
        let (a, b) = (strided(a), strided(b));
        return Matrix::of(&a).turned().product(Matrix::of(&b));
    }
    Flex::float_matmul(Flex::float_swap_dims(a, 0, 1), b)
}

#[derive(Debug)]
struct ProductBackward;

impl Backward<Flex, 2> for ProductBackward {
    /// `x`, if the weight is trained, the weight, and whether products may round.
    type State = (Option<FlexTensor>, FlexTensor, bool);

    fn backward(self, ops: Ops<Self::State, 2>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let dy = gradients.consume::<Flex>(&ops.node);
        let (x, weight, may_round) = ops.state;
        let [of_x, of_weight] = ops.parents;
        if let (Some(node), Some(x)) = (of_weight, x) {
            let gradient = turned_product(x, dy.clone());
            let gradient = match weight.dtype() {
                DType::F16 => Flex::float_cast(gradient, FloatDType::F16),
                DType::BF16 => Flex::float_cast(gradient, FloatDType::BF16),
                _ => gradient,
            };
            gradients.register::<Flex>(node.id, gradient);
        }
        if let Some(node) = of_x {
            let turned = Flex::float_swap_dims(weight, 0, 1);
            gradients.register::<Flex>(node.id, Flex::product(dy, turned, false, may_round));
        }
    }
}

impl<C: CheckpointStrategy> Product for Autodiff<Flex, C> {
    fn product(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        is_trained: bool,
        may_round: bool,
    ) -> FloatTensor<Self> {
        let ((x, of_x), (weight, of_weight)) = (x.into_parts(), weight.into_parts());
        let kept = is_trained.then(|| x.clone());
        let y = Flex::product(x, weight.clone(), is_trained, may_round);
        match ProductBackward.prepare::<C>([of_x, of_weight]).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => prepared.finish((kept, weight, may_round), y),
            OpsKind::UnTracked(prepared) => prepared.finish(y),
        }
    }
}
