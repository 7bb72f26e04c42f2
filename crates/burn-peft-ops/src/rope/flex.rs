//! The rotation on Burn's CPU backend.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::flex::{contiguous, is_readable, numbers, rows_of_task, strided, tensor, vectorised, zeros};

/// Whether [`rotate`] is for these.
pub(super) fn has_kernel(x: &Tensor<5>, cos: &Tensor<2>, sin: &Tensor<2>) -> bool {
    let [_, s, _, _, d] = x.dims();
    let fits = |table: &Tensor<2>| table.dims() == [s, d] && is_readable(table);
    is_readable(x) && d % 2 == 0 && fits(cos) && fits(sin)
}

pub(super) fn rotate(x: Tensor<5>, cos: &Tensor<2>, sin: &Tensor<2>) -> Tensor<5> {
    let [cos, sin] = [cos, sin].map(|table| table.clone().into_dispatch());
    Tensor::from_dispatch(Dispatch::rotate(x.into_dispatch(), cos, sin))
}

#[backend_extension(Flex, Autodiff)]
trait Rotate: Backend {
    fn rotate(x: FloatTensor<Self>, cos: FloatTensor<Self>, sin: FloatTensor<Self>) -> FloatTensor<Self>;
}

impl Rotate for Flex {
    fn rotate(x: FlexTensor, cos: FlexTensor, sin: FlexTensor) -> FlexTensor {
        let [x, cos, sin] = [x, cos, sin].map(contiguous);
        let [b, s, n, g, d] = x.layout().shape().dims();
        let (x, cos, sin) = (numbers(&x), numbers(&cos), numbers(&sin));
        let mut y = zeros(x.len());
        // One head each.
        let heads = y.par_chunks_mut(s * d).with_min_len(rows_of_task(s * d)).enumerate();
        heads.for_each(|(i, y)| {
            let (batch, head) = (i / (n * g), i % (n * g));
            let tables = cos.chunks_exact(d).zip(sin.chunks_exact(d));
            vectorised(|| {
                for (position, (y, (cos, sin))) in y.chunks_exact_mut(d).zip(tables).enumerate() {
                    let x = &x[((batch * s + position) * n * g + head) * d..][..d];
                    let (sin_of_low, sin_of_high) = sin.split_at(d / 2);
                    turn(y, x, cos, [sin_of_low, sin_of_high]);
                }
            });
        });
        tensor(y, [b, n, g, s, d])
    }
}

/// `y = x * cos + swapped(x) * sin`, with `sin` in two halves.
#[inline(always)]
fn turn(y: &mut [f32], x: &[f32], cos: &[f32], sin: [&[f32]; 2]) {
    let half = x.len() / 2;
    let (low, high) = x.split_at(half);
    let parts = y.chunks_exact_mut(half).zip([(low, high), (high, low)]);
    for ((y, (x, swapped)), (cos, sin)) in parts.zip(cos.chunks_exact(half).zip(sin)) {
        for ((((y, x), swapped), cos), sin) in y.iter_mut().zip(x).zip(swapped).zip(cos).zip(sin) {
            *y = x * cos + swapped * sin;
        }
    }
}

/// The gradient of the input: `dy * cos + swapped(dy * sin)`, positions before heads again.
fn backward(dy: FlexTensor, cos: &FlexTensor, sin: &FlexTensor) -> FlexTensor {
    let dy = strided(dy);
    // Heads need not lie in the order of the axes, but each as a whole.
    let dy = if dy.layout().strides()[4] == 1 { dy } else { contiguous(dy) };
    let layout = dy.layout();
    let [b, n, g, s, d] = layout.shape().dims();
    let strides: Vec<usize> = layout.strides().iter().map(|stride| stride.unsigned_abs()).collect();
    let dy = &dy.storage::<f32>()[layout.start_offset()..];
    let (cos, sin) = (numbers(cos), numbers(sin));
    let mut dx = zeros(b * s * n * g * d);
    // One position each.
    let positions = dx.par_chunks_mut(n * g * d).with_min_len(rows_of_task(n * g * d)).enumerate();
    positions.for_each(|(i, dx)| {
        let (batch, position) = (i / s, i % s);
        let (cos, sin) = (&cos[position * d..][..d], &sin[position * d..][..d]);
        vectorised(|| {
            for (head, dx) in dx.chunks_exact_mut(d).enumerate() {
                let place = [batch, head / g, head % g, position];
                let start: usize = place.iter().zip(&strides).map(|(i, stride)| i * stride).sum();
                let dy = &dy[start..][..d];
                let (sin_of_low, sin_of_high) = sin.split_at(d / 2);
                turn(dx, dy, cos, [sin_of_high, sin_of_low]);
            }
        });
    });
    tensor(dx, [b, s, n, g, d])
}

#[derive(Debug)]
struct RotateBackward;

impl Backward<Flex, 1> for RotateBackward {
    /// The tables.
    type State = (FlexTensor, FlexTensor);

    fn backward(self, ops: Ops<Self::State, 1>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let dy = gradients.consume::<Flex>(&ops.node);
        if let [Some(x)] = ops.parents {
            let (cos, sin) = ops.state;
            gradients.register::<Flex>(x.id, backward(dy, &cos, &sin));
        }
    }
}

impl<C: CheckpointStrategy> Rotate for Autodiff<Flex, C> {
    fn rotate(x: FloatTensor<Self>, cos: FloatTensor<Self>, sin: FloatTensor<Self>) -> FloatTensor<Self> {
        let [cos, sin] = [cos, sin].map(|table| contiguous(table.into_primitive()));
        let (x, node) = x.into_parts();
        let y = Flex::rotate(x, cos.clone(), sin.clone());
        match RotateBackward.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => prepared.finish((cos, sin), y),
            OpsKind::UnTracked(prepared) => prepared.finish(y),
        }
    }
}
