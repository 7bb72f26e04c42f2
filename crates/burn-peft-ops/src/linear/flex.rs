//! On Burn's CPU backend: a product with a constant, with a backward of its own.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Tensor};
use gemmkit::Parallelism;

use crate::flex::{Matrix, contiguous, is_on_flex, numbers, tensor};

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
        if x.dtype() == DType::F32 && is_turned(&weight) {
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
    let x = contiguous(x);
    let (n, k, m) = (x.layout().shape()[0], x.layout().shape()[1], weight.layout().shape()[1]);
    let mut y = vec![0.0; n * m];
    let layout = weight.layout();
    let right = Matrix {
        numbers: &weight.storage::<f32>()[layout.start_offset()..],
        rows: k,
        columns: m,
        strides: [layout.strides()[0], layout.strides()[1]],
    };
    Matrix::new(numbers(&x), n, k).times(right, 0.0, &mut y, m, Parallelism::Rayon(0));
    tensor(y, [n, m])
}

#[derive(Debug)]
struct FrozenBackward;

impl Backward<Flex, 1> for FrozenBackward {
    /// The weight.
    type State = FlexTensor;

    fn backward(self, ops: Ops<Self::State, 1>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let dy = gradients.consume::<Flex>(&ops.node);
        if let [Some(x)] = ops.parents {
            let turned = Flex::float_swap_dims(ops.state, 0, 1);
            gradients.register::<Flex>(x.id, Flex::frozen_product(dy, turned));
        }
    }
}

impl<C: CheckpointStrategy> FrozenProduct for Autodiff<Flex, C> {
    fn frozen_product(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let weight = weight.into_primitive();
        let (x, node) = x.into_parts();
        let y = Flex::frozen_product(x, weight.clone());
        match FrozenBackward.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => prepared.finish(weight, y),
            OpsKind::UnTracked(prepared) => prepared.finish(y),
        }
    }
}
