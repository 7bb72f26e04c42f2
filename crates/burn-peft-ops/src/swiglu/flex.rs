//! SwiGLU on Burn's CPU backend.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;

use crate::exp::exp;
use crate::flex::{contiguous, is_readable, map, map_to_two, numbers, tensor};

/// Whether [`swiglu`] is for these two.
pub(super) fn has_kernel<const D: usize>(gate: &Tensor<D>, up: &Tensor<D>) -> bool {
    gate.shape() == up.shape() && is_readable(gate) && is_readable(up)
}

pub(super) fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    Tensor::from_dispatch(Dispatch::swiglu(gate.into_dispatch(), up.into_dispatch()))
}

#[backend_extension(Flex, Autodiff)]
trait Swiglu: Backend {
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

impl Swiglu for Flex {
    fn swiglu(gate: FlexTensor, up: FlexTensor) -> FlexTensor {
        let [gate, up] = [gate, up].map(contiguous);
        let y = map([&gate, &up].map(numbers), |[gate, up]| gate * sigmoid(gate) * up);
        tensor(y, gate.layout().shape().clone())
    }
}

/// The gradients of `gate` and `up`.
fn backward(gate: FlexTensor, up: FlexTensor, dy: FlexTensor) -> [FlexTensor; 2] {
    let [gate, up, dy] = [gate, up, dy].map(contiguous);
    let (to_gate, to_up) = map_to_two([&gate, &up, &dy].map(numbers), |[gate, up, dy]| {
        let sigmoid = sigmoid(gate);
        let silu = gate * sigmoid;
        (dy * up * (sigmoid + silu * (1.0 - sigmoid)), dy * silu)
    });
    [to_gate, to_up].map(|gradient| tensor(gradient, gate.layout().shape().clone()))
}

#[derive(Debug)]
struct SwigluBackward;

impl Backward<Flex, 2> for SwigluBackward {
    /// Gate and up.
    type State = (FlexTensor, FlexTensor);

    fn backward(self, ops: Ops<Self::State, 2>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let dy = gradients.consume::<Flex>(&ops.node);
        let (gate, up) = ops.state;
        for (parent, gradient) in ops.parents.into_iter().zip(backward(gate, up, dy)) {
            if let Some(parent) = parent {
                gradients.register::<Flex>(parent.id, gradient);
            }
        }
    }
}

impl<C: CheckpointStrategy> Swiglu for Autodiff<Flex, C> {
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        let ((gate, of_gate), (up, of_up)) = (gate.into_parts(), up.into_parts());
        let y = Flex::swiglu(gate.clone(), up.clone());
        match SwigluBackward.prepare::<C>([of_gate, of_up]).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => prepared.finish((gate, up), y),
            OpsKind::UnTracked(prepared) => prepared.finish(y),
        }
    }
}
