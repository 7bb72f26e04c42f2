//! Attention on Burn's CPU backend: the scores of one block of queries at a time.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Bytes, Dispatch, Flex, Shape, backend_extension};
use burn::tensor::{DType, Tensor};
use gemmkit::Parallelism;
use rayon::prelude::*;

use crate::CausalMask;
use crate::exp::{exp, exponentiate, largest};
use crate::flex::{Matrix, dot, is_readable, strided, tensor, vectorised};

/// Queries whose scores are computed together.
const BLOCK: usize = 64;
/// With fewer blocks, they are smaller.
const FEW_TASKS: usize = 8;

/// Whether [`attention`] is for these.
pub(super) fn has_kernel(q: &Tensor<5>, k: &Tensor<4>, v: &Tensor<4>) -> bool {
    is_readable(q) && is_readable(k) && is_readable(v)
}

pub(super) fn attention(q: Tensor<5>, k: Tensor<4>, v: Tensor<4>, mask: &CausalMask) -> Tensor<5> {
    let [q, k, v] = [q.into_dispatch(), k.into_dispatch(), v.into_dispatch()];
    Tensor::from_dispatch(Dispatch::causal_attention(q, k, v, mask.padding_on_host()))
}

#[backend_extension(Flex, Autodiff)]
trait Attention: Backend {
    /// With `true` at padding, `b * t` of them.
    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        padding: Option<Arc<[bool]>>,
    ) -> FloatTensor<Self>;
}

impl Attention for Flex {
    fn causal_attention(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        padding: Option<Arc<[bool]>>,
    ) -> FlexTensor {
        Inputs::new(q, k, v, padding).forward().0
    }
}

/// What attention reads.
#[derive(Debug, Clone)]
struct Inputs {
    q: FlexTensor,
    k: FlexTensor,
    v: FlexTensor,
    padding: Option<Arc<[bool]>>,
}

/// Of a query: the largest score, and `1 / Σ exp(score - max)` over the keys that it sees.
#[derive(Debug, Clone, Copy, Default)]
struct Row {
    max: f32,
    inverse: f32,
}

/// Queries of a sequence whose scores are one matrix.
#[derive(Clone, Copy)]
struct Queries {
    batch: usize,
    /// The head of keys and values.
    head: usize,
    /// The first query head of them.
    group: usize,
    /// The first position of them.
    position: usize,
    /// How many there are: positions of one head or, where there is one position, all heads of the group.
    rows: usize,
}

impl Inputs {
    fn new(q: FlexTensor, k: FlexTensor, v: FlexTensor, padding: Option<Arc<[bool]>>) -> Self {
        let [q, k, v] = [q, k, v].map(strided);
        Self { q, k, v, padding }
    }

    /// `[b, n, g, s, d]`
    fn dims_of_queries(&self) -> [usize; 5] {
        self.q.layout().shape().dims()
    }

    /// `[b, n, t, d]`
    fn dims_of_keys(&self) -> [usize; 4] {
        self.k.layout().shape().dims()
    }

    /// The output, in memory as the layer behind it reads it: `[b, s, n, g, d]`. One [`Row`] for each query, `[b, s, n, g]`.
    fn forward(&self) -> (FlexTensor, Vec<Row>) {
        let [b, n, g, s, d] = self.dims_of_queries();
        let mut y = vec![0.0; b * s * n * g * d];
        let mut rows = vec![Row::default(); b * s * n * g];
        // A task has some positions of all heads, or one position of a head and its group. A single short sequence has smaller
        // blocks, to give several threads work; their size depends on shapes alone, so that results do not on threads.
        let block = if b * s.div_ceil(BLOCK) < FEW_TASKS { BLOCK / 4 } else { BLOCK };
        let queries_of_task = if s == 1 { g } else { block * n * g };
        let sequences = y.par_chunks_mut(s * n * g * d).zip(rows.par_chunks_mut(s * n * g)).enumerate();
        let tasks = sequences.flat_map(|(batch, (y, rows))| {
            let tasks = y.par_chunks_mut(queries_of_task * d).zip(rows.par_chunks_mut(queries_of_task));
            tasks.enumerate().map(move |(i, (y, rows))| (batch, i, y, rows))
        });
        tasks.for_each(|(batch, i, y, rows)| {
            let mut scores = vec![];
            if s == 1 {
                let all = Queries { batch, head: i, group: 0, position: 0, rows: g };
                return self.output(all, &mut scores, y, rows, 1);
            }
            for head_of_all in 0..n * g {
                let (head, group) = (head_of_all / g, head_of_all % g);
                let (position, count) = (i * block, rows.len() / (n * g));
                let queries = Queries { batch, head, group, position, rows: count };
                self.output(queries, &mut scores, &mut y[head_of_all * d..], &mut rows[head_of_all..], n * g);
            }
        });
        let strides = [s * n * g * d, g * d, d, n * g * d, 1].map(|stride| stride as isize);
        let layout = Layout::new(Shape::new([b, n, g, s, d]), strides.to_vec(), 0);
        (FlexTensor::new(Bytes::from_elems(y), layout, DType::F32), rows)
    }

    /// The output of some queries. It begins in `y` and `rows` at the first of them; the next is `apart` queries further.
    fn output(&self, of: Queries, scores: &mut Vec<f32>, y: &mut [f32], rows: &mut [Row], apart: usize) {
        let d = self.q.layout().shape()[4];
        let seen = self.seen(of);
        scores.resize(of.rows * seen, 0.0);
        let scores = &mut scores[..of.rows * seen];
        self.scores(of, scores);
        let hidden = self.padding_of(of.batch);
        vectorised(|| {
            let rows = rows.iter_mut().step_by(apart);
            for (i, (scores, row)) in scores.chunks_exact_mut(seen).zip(rows).enumerate() {
                let scores = visible(scores, self.seen_by(of, i), hidden);
                let max = largest(scores);
                *row = Row { max, inverse: (1.0 / exponentiate(scores, max)) as f32 };
            }
        });
        multiply(Matrix::new(scores, of.rows, seen), self.values(of), 0.0, y, apart * d);
        for (y, row) in y.chunks_mut(apart * d).zip(rows.iter().step_by(apart)).take(of.rows) {
            for y in &mut y[..d] {
                *y *= row.inverse;
            }
        }
    }

    /// The gradients of queries, keys and values.
    fn backward(&self, rows: &[Row], dy: &FlexTensor) -> [FlexTensor; 3] {
        let [b, n, g, s, d] = self.dims_of_queries();
        let [_, _, t, _] = self.dims_of_keys();
        let mut to_q = vec![0.0; b * n * g * s * d];
        let [mut to_k, mut to_v] = [(); 2].map(|()| vec![0.0; b * n * t * d]);
        // A task has one head of keys and values.
        let tasks =
            to_q.par_chunks_mut(g * s * d).zip(to_k.par_chunks_mut(t * d)).zip(to_v.par_chunks_mut(t * d));
        tasks.enumerate().for_each(|(i, ((to_q, to_k), to_v))| {
            let (batch, head) = (i / n, i % n);
            let [mut weights, mut slopes] = [(); 2].map(|()| vec![]);
            for (group, to_q) in to_q.chunks_exact_mut(s * d).enumerate() {
                for (block, to_q) in to_q.chunks_mut(BLOCK * d).enumerate() {
                    let (position, count) = (block * BLOCK, to_q.len() / d);
                    let of = Queries { batch, head, group, position, rows: count };
                    let first = ((batch * s + position) * n + head) * g + group;
                    let rows = &rows[first..];
                    self.gradients(of, rows, dy, [&mut weights, &mut slopes], [to_q, to_k, to_v]);
                }
            }
        });
        [tensor(to_q, [b, n, g, s, d]), tensor(to_k, [b, n, t, d]), tensor(to_v, [b, n, t, d])]
    }

    /// Writes the gradient of some queries, and adds what they give to the gradients of keys and values. Their first row is
    /// the first of `rows`.
    fn gradients(
        &self,
        of: Queries,
        rows: &[Row],
        dy: &FlexTensor,
        buffers: [&mut Vec<f32>; 2],
        [to_q, to_k, to_v]: [&mut [f32]; 3],
    ) {
        let [_, n, g, _, d] = self.dims_of_queries();
        let seen = self.seen(of);
        let [weights, slopes] = buffers.map(|buffer| {
            buffer.resize(of.rows * seen, 0.0);
            &mut buffer[..of.rows * seen]
        });
        self.scores(of, weights);
        let hidden = self.padding_of(of.batch);
        vectorised(|| {
            let rows = rows.iter().step_by(n * g);
            for (i, (weights, row)) in weights.chunks_exact_mut(seen).zip(rows).enumerate() {
                for weight in visible(weights, self.seen_by(of, i), hidden) {
                    *weight = exp(*weight - row.max) * row.inverse;
                }
            }
        });
        let dy = self.of_queries(dy, of);
        multiply(Matrix::new(weights, of.rows, seen).turned(), dy, 1.0, to_v, d);
        multiply(dy, self.values(of).turned(), 0.0, slopes, seen);
        // Through the softmax: `weight * (slope - Σ weight * slope)`.
        vectorised(|| {
            for (weights, slopes) in weights.chunks_exact(seen).zip(slopes.chunks_exact_mut(seen)) {
                let mean = dot([weights, slopes], |[weight, slope]| weight * slope);
                for (slope, weight) in slopes.iter_mut().zip(weights) {
                    *slope = weight * (*slope - mean);
                }
            }
        });
        let slopes = Matrix::new(slopes, of.rows, seen);
        multiply(slopes, self.keys(of), 0.0, to_q, d);
        multiply(slopes.turned(), self.queries(of), 1.0, to_k, d);
    }

    /// `q kᵀ` for the keys that the last of these queries sees.
    fn scores(&self, of: Queries, scores: &mut [f32]) {
        multiply(self.queries(of), self.keys(of).turned(), 0.0, scores, self.seen(of));
    }

    fn queries(&self, of: Queries) -> Matrix<'_> {
        self.of_queries(&self.q, of)
    }

    /// Their rows of a tensor `[b, n, g, s, d]`.
    fn of_queries<'a>(&self, x: &'a FlexTensor, of: Queries) -> Matrix<'a> {
        let axis = if self.dims_of_queries()[3] == 1 { 2 } else { 3 };
        matrix(x, &[of.batch, of.head, of.group, of.position], axis, of.rows)
    }

    /// The keys that the last of these queries sees.
    fn keys(&self, of: Queries) -> Matrix<'_> {
        matrix(&self.k, &[of.batch, of.head, 0], 2, self.seen(of))
    }

    /// Their values.
    fn values(&self, of: Queries) -> Matrix<'_> {
        matrix(&self.v, &[of.batch, of.head, 0], 2, self.seen(of))
    }

    /// How many keys the last of these queries sees, but for padding.
    fn seen(&self, of: Queries) -> usize {
        self.seen_by(of, of.rows - 1)
    }

    /// How many keys one of these queries sees, but for padding. The last of them is its own.
    fn seen_by(&self, of: Queries, row: usize) -> usize {
        let ([.., s, _], [_, _, t, _]) = (self.dims_of_queries(), self.dims_of_keys());
        if s == 1 { t } else { t - s + of.position + row + 1 }
    }

    /// `true` at padding.
    fn padding_of(&self, batch: usize) -> Option<&[bool]> {
        let [_, _, t, _] = self.dims_of_keys();
        Some(&self.padding.as_deref()?[batch * t..][..t])
    }
}

/// Some rows of a tensor along an axis, from an index on that leaves out the last axis.
fn matrix<'a>(x: &'a FlexTensor, first: &[usize], axis: usize, rows: usize) -> Matrix<'a> {
    let (layout, columns) = (x.layout(), x.layout().shape()[first.len()]);
    let strides = layout.strides();
    let start: usize = first.iter().zip(strides).map(|(i, stride)| i * stride.unsigned_abs()).sum();
    let numbers = &x.storage::<f32>()[layout.start_offset() + start..];
    Matrix { numbers, rows, columns, strides: [strides[axis], strides[first.len()]] }
}

/// `y = a b + beta y`, with rows of `y` that lie `apart` numbers apart, by one thread.
fn multiply(a: Matrix<'_>, b: Matrix<'_>, beta: f32, y: &mut [f32], apart: usize) {
    a.times(b, beta, y, apart, Parallelism::Serial);
}

/// The scores of the keys that a query sees: of padding they are the smallest there is, of later keys 0.
#[inline(always)]
fn visible<'a>(scores: &'a mut [f32], seen: usize, padding: Option<&[bool]>) -> &'a mut [f32] {
    let (scores, later) = scores.split_at_mut(seen);
    later.fill(0.0);
    if let Some(padding) = padding {
        for (score, is_padding) in scores.iter_mut().zip(&padding[..seen - 1]) {
            *score = if *is_padding { f32::NEG_INFINITY } else { *score };
        }
    }
    scores
}

#[derive(Debug)]
struct AttentionBackward;

impl Backward<Flex, 3> for AttentionBackward {
    type State = (Inputs, Vec<Row>);

    fn backward(self, ops: Ops<Self::State, 3>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let dy = strided(gradients.consume::<Flex>(&ops.node));
        let (inputs, rows) = ops.state;
        for (parent, gradient) in ops.parents.into_iter().zip(inputs.backward(&rows, &dy)) {
            if let Some(parent) = parent {
                gradients.register::<Flex>(parent.id, gradient);
            }
        }
    }
}

impl<C: CheckpointStrategy> Attention for Autodiff<Flex, C> {
    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        padding: Option<Arc<[bool]>>,
    ) -> FloatTensor<Self> {
        let ((q, of_q), (k, of_k), (v, of_v)) = (q.into_parts(), k.into_parts(), v.into_parts());
        let inputs = Inputs::new(q, k, v, padding);
        let (y, rows) = inputs.forward();
        match AttentionBackward.prepare::<C>([of_q, of_k, of_v]).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => prepared.finish((inputs, rows), y),
            OpsKind::UnTracked(prepared) => prepared.finish(y),
        }
    }
}
