//! On Burn's CPU backend: a product with a constant, with a backward of its own.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Bytes, Dispatch, Flex, Shape, backend_extension};
use burn::tensor::{DType, Tensor};
use gemmkit::{MatMut, MatRef, Parallelism, gemm};

use crate::ops::flex::is_on_flex;

/// The longest sums that gemmkit makes. With its products (0.1.2), the gradient of a loss over 49,152 tokens was 4.9e-6 off;
/// with those of `gemm` it is within the 2e-6 that `loss_and_gradients_of_a_real_vocabulary_are_those_in_f64` allows.
const LONGEST_SUM: usize = 8192;

/// Whether [`product`] is for these two.
pub(super) fn is_frozen<const D: usize>(x: &Tensor<D>, weight: &Tensor<2>) -> bool {
    weight.dtype().is_float()
        && x.dtype() == weight.dtype()
        && !weight.is_tracked()
        && D > 1
        && x.shape().num_elements() > 0
        && x.dims()[D - 1] == weight.dims()[0]
        && is_on_flex(weight)
}

/// `x W`, `[n, d_in]` to `[n, d_out]`; `W` gets no gradient.
pub(super) fn product(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::frozen_product(x.into_dispatch(), weight.into_dispatch()))
}

#[backend_extension(Flex, Autodiff)]
trait FrozenProduct: Backend {
    fn frozen_product(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self>;
}

impl FrozenProduct for Flex {
    fn frozen_product(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        if x.dtype() == DType::F32 && is_turned(&weight) && weight.layout().shape()[0] <= LONGEST_SUM {
            return turned_product(x, weight);
        }
        Self::float_matmul(x, weight)
    }
}

/// Whether columns of a matrix lie together.
fn is_turned(matrix: &FlexTensor) -> bool {
    let [rows, columns] = matrix.layout().strides() else { return false };
    *rows == 1 && *columns > 1
}

/// Burn multiplies with `gemm`, which packs a transposed right side slowly; gemmkit does not.
fn turned_product(x: FlexTensor, weight: FlexTensor) -> FlexTensor {
    let x = x.to_contiguous();
    let (n, k, m) = (x.layout().shape()[0], x.layout().shape()[1], weight.layout().shape()[1]);
    let mut y = vec![0.0; n * m];
    let start = weight.layout().start_offset();
    let left = MatRef::from_row_major(&x.storage::<f32>()[x.layout().start_offset()..][..n * k], n, k);
    let stride = weight.layout().strides()[1];
    let right = MatRef::new(&weight.storage::<f32>()[start..], k, m, 1, stride);
    gemm(1.0, left, right, 0.0, MatMut::from_row_major(&mut y, n, m), Parallelism::Rayon(0));
    FlexTensor::new(Bytes::from_elems(y), Layout::contiguous(Shape::new([n, m])), DType::F32)
}

#[derive(Debug)]
struct FrozenBackward;

impl<B: FrozenProduct> Backward<B, 1> for FrozenBackward {
    /// The weight.
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let dy = gradients.consume::<B>(&ops.node);
        if let [Some(x)] = ops.parents {
            let turned = B::float_swap_dims(ops.state, 0, 1);
            gradients.register::<B>(x.id, B::frozen_product(dy, turned));
        }
    }
}

impl<B: FrozenProduct, C: CheckpointStrategy> FrozenProduct for Autodiff<B, C> {
    fn frozen_product(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let weight = weight.into_primitive();
        let (x, node) = x.into_parts();
        match FrozenBackward.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => {
                let y = B::frozen_product(x, weight.clone());
                prepared.finish(weight, y)
            }
            OpsKind::UnTracked(prepared) => prepared.finish(B::frozen_product(x, weight)),
        }
    }
}
