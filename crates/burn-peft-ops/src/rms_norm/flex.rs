//! RMSNorm on Burn's CPU backend.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::flex::{contiguous, dot, is_readable, numbers, rows_of_task, tensor, vectorised, zeros};

/// The most tasks that the gradient of the weight has.
const TASKS: usize = 64;

/// Whether [`rms_norm`] is for these two.
pub(super) fn has_kernel<const D: usize>(x: &Tensor<D>, weight: &Tensor<1>) -> bool {
    D > 0 && x.dims()[D - 1] == weight.dims()[0] && is_readable(x) && is_readable(weight)
}

pub(super) fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, epsilon: f64) -> Tensor<D> {
    Tensor::from_dispatch(Dispatch::rms_norm(x.into_dispatch(), weight.into_dispatch(), epsilon))
}

#[backend_extension(Flex, Autodiff)]
trait RmsNorm: Backend {
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, epsilon: f64) -> FloatTensor<Self>;
}

impl RmsNorm for Flex {
    fn rms_norm(x: FlexTensor, weight: FlexTensor, epsilon: f64) -> FlexTensor {
        forward(&contiguous(x), &contiguous(weight), epsilon).0
    }
}

/// The output, and what each row was multiplied by.
fn forward(x: &FlexTensor, weight: &FlexTensor, epsilon: f64) -> (FlexTensor, Vec<f32>) {
    let (numbers_of_x, weight) = (numbers(x), numbers(weight));
    let (d, rows) = (weight.len(), rows_of_task(weight.len()));
    let mut y = zeros(numbers_of_x.len());
    let mut inverses = vec![0.0; y.len() / d];
    let tasks = y.par_chunks_mut(rows * d).zip(inverses.par_chunks_mut(rows));
    tasks.zip(numbers_of_x.par_chunks(rows * d)).for_each(|((y, inverses), x)| {
        vectorised(|| {
            for ((y, inverse), x) in y.chunks_exact_mut(d).zip(inverses).zip(x.chunks_exact(d)) {
                let mean = dot([x, x], |[a, b]| a * b) / d as f32;
                *inverse = 1.0 / (mean + epsilon as f32).sqrt();
                for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
                    *y = x * *inverse * weight;
                }
            }
        });
    });
    (tensor(y, x.layout().shape().clone()), inverses)
}

/// What backward needs.
#[derive(Debug, Clone)]
struct Kept {
    x: FlexTensor,
    weight: FlexTensor,
    inverses: Vec<f32>,
}

/// The gradient of `x`: `r (w dy - x r² mean(w dy x))`, where `r` is what the row was multiplied by.
fn to_x(kept: &Kept, dy: &FlexTensor) -> FlexTensor {
    let (x, weight, dy) = (numbers(&kept.x), numbers(&kept.weight), numbers(dy));
    let (d, rows) = (weight.len(), rows_of_task(weight.len()));
    let mut to_x = zeros(x.len());
    let tasks = to_x.par_chunks_mut(rows * d).zip(x.par_chunks(rows * d)).zip(dy.par_chunks(rows * d));
    tasks.zip(kept.inverses.par_chunks(rows)).for_each(|(((to_x, x), dy), inverses)| {
        vectorised(|| {
            let rows = to_x.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(dy.chunks_exact(d));
            for (((to_x, x), dy), inverse) in rows.zip(inverses) {
                let along_x = dot([x, weight, dy], |[x, weight, dy]| x * (weight * dy)) / d as f32;
                let along_x = along_x * inverse * inverse;
                for (((to_x, x), weight), dy) in to_x.iter_mut().zip(x).zip(weight).zip(dy) {
                    *to_x = inverse * (weight * dy - x * along_x);
                }
            }
        });
    });
    tensor(to_x, kept.x.layout().shape().clone())
}

/// The gradient of the weight: `Σ dy x r` over the rows, in an order that does not depend on threads.
fn to_weight(kept: &Kept, dy: &FlexTensor) -> FlexTensor {
    let (x, dy) = (numbers(&kept.x), numbers(dy));
    let d = kept.weight.layout().num_elements();
    // Each task has sums of its own, so there are not many, however many rows.
    let rows = rows_of_task(d).max(kept.inverses.len().div_ceil(TASKS));
    let tasks = x.par_chunks(rows * d).zip(dy.par_chunks(rows * d)).zip(kept.inverses.par_chunks(rows));
    let sums = tasks.map(|((x, dy), inverses)| {
        let mut sums = vec![0.0; d];
        vectorised(|| {
            for ((x, dy), inverse) in x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(inverses) {
                for ((sum, x), dy) in sums.iter_mut().zip(x).zip(dy) {
                    *sum += dy * x * inverse;
                }
            }
        });
        sums
    });
    let mut to_weight = vec![0.0; d];
    for sums in sums.collect::<Vec<Vec<f32>>>() {
        for (sum, next) in to_weight.iter_mut().zip(sums) {
            *sum += next;
        }
    }
    tensor(to_weight, [d])
}

#[derive(Debug)]
struct RmsNormBackward;

impl Backward<Flex, 2> for RmsNormBackward {
    type State = Kept;

    fn backward(self, ops: Ops<Kept, 2>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let dy = contiguous(gradients.consume::<Flex>(&ops.node));
        let [x, weight] = ops.parents;
        if let Some(x) = x {
            gradients.register::<Flex>(x.id, to_x(&ops.state, &dy));
        }
        if let Some(weight) = weight {
            gradients.register::<Flex>(weight.id, to_weight(&ops.state, &dy));
        }
    }
}

impl<C: CheckpointStrategy> RmsNorm for Autodiff<Flex, C> {
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, epsilon: f64) -> FloatTensor<Self> {
        let ((x, of_x), (weight, of_weight)) = (x.into_parts(), weight.into_parts());
        let (x, weight) = (contiguous(x), contiguous(weight));
        let (y, inverses) = forward(&x, &weight, epsilon);
        match RmsNormBackward.prepare::<C>([of_x, of_weight]).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => prepared.finish(Kept { x, weight, inverses }, y),
            OpsKind::UnTracked(prepared) => prepared.finish(y),
        }
    }
}
