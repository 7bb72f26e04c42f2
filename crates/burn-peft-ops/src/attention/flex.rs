//! Attention on Burn's CPU backend: the scores of one block of queries at a time.

use std::ops::Range;
use std::sync::Arc;
use std::{iter, mem};

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
use crate::flex::{Matrix, TASK, dot, is_readable, strided, tensor, vectorised, zeros};
use crate::token_tree::Segment;

/// Queries whose scores are computed together.
const BLOCK: usize = 64;
/// Fewer tasks than that are made smaller.
const FEW_TASKS: usize = 8;
/// And in backward, where the largest task has the whole beginning that sequences share.
const FEW_TASKS_OF_BACKWARD: usize = 16;

/// Whether [`attention`] is for these.
pub(super) fn has_kernel(q: &Tensor<5>, k: &Tensor<4>, v: &Tensor<4>) -> bool {
    is_readable(q) && is_readable(k) && is_readable(v)
}

pub(super) fn attention(q: Tensor<5>, k: Tensor<4>, v: Tensor<4>, mask: &CausalMask) -> Tensor<5> {
    let sight = match mask.tree() {
        Some(tree) => Sight { segments: tree.segments(), padding: None },
        None => {
            let [s, t] = mask.dims();
            let segment = |batch| Segment { batch, queries: 0..s, keys: iter::once(0..t).collect() };
            Sight { segments: (0..q.dims()[0]).map(segment).collect(), padding: mask.padding_on_host() }
        }
    };
    let [q, k, v] = [q.into_dispatch(), k.into_dispatch(), v.into_dispatch()];
    Tensor::from_dispatch(Dispatch::causal_attention(q, k, v, sight))
}

/// Which keys the queries see.
#[derive(Debug, Clone)]
struct Sight {
    /// Those of the first sequence, in order, then those of the next.
    segments: Arc<[Segment]>,
    /// `true` at padding, `b * t` of them.
    padding: Option<Arc<[bool]>>,
}

#[backend_extension(Flex, Autodiff)]
trait Attention: Backend {
    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        sight: Sight,
    ) -> FloatTensor<Self>;
}

impl Attention for Flex {
    fn causal_attention(q: FlexTensor, k: FlexTensor, v: FlexTensor, sight: Sight) -> FlexTensor {
        Inputs::new(q, k, v, sight).forward().0
    }
}

/// What attention reads.
#[derive(Debug, Clone)]
struct Inputs {
    q: FlexTensor,
    k: FlexTensor,
    v: FlexTensor,
    sight: Sight,
}

/// Of a query: the largest score, and `1 / Σ exp(score - max)` over the keys that it sees.
#[derive(Debug, Clone, Copy, Default)]
struct Row {
    max: f32,
    inverse: f32,
}

/// Positions of a segment that are computed together.
#[derive(Clone, Copy)]
struct Block<'a> {
    segment: &'a Segment,
    /// The first of them, counted from that of the segment.
    position: usize,
    count: usize,
}

/// Queries of a block whose scores are one matrix.
#[derive(Clone, Copy)]
struct Queries<'a> {
    block: Block<'a>,
    /// The head of keys and values.
    head: usize,
    /// The first query head of them.
    group: usize,
    /// How many there are: positions of one head or, where there is one position, all heads of the group.
    rows: usize,
}

impl Inputs {
    fn new(q: FlexTensor, k: FlexTensor, v: FlexTensor, sight: Sight) -> Self {
        let [q, k, v] = [q, k, v].map(strided);
        Self { q, k, v, sight }
    }

    /// `[b, n, g, s, d]`
    fn dims_of_queries(&self) -> [usize; 5] {
        self.q.layout().shape().dims()
    }

    /// `[b, n, t, d]`
    fn dims_of_keys(&self) -> [usize; 4] {
        self.k.layout().shape().dims()
    }

    /// All positions, at most `size` in a block, in order.
    fn blocks(&self, size: usize) -> impl Iterator<Item = Block<'_>> {
        self.sight.segments.iter().flat_map(move |segment| {
            let length = segment.queries.len();
            let block = move |position| Block { segment, position, count: size.min(length - position) };
            (0..length).step_by(size).map(block)
        })
    }

    /// The output, in memory as the layer behind it reads it: `[b, s, n, g, d]`. One [`Row`] for each query, `[b, s, n, g]`.
    fn forward(&self) -> (FlexTensor, Vec<Row>) {
        let [b, n, g, s, d] = self.dims_of_queries();
        let mut y = zeros(b * s * n * g * d);
        let mut rows = vec![Row::default(); b * s * n * g];
        // A task has some positions of all heads, or one position of a head and its group. A single short sequence has smaller
        // blocks, to give several threads work; their size depends on shapes alone, so that results do not on threads.
        let size = if self.blocks(BLOCK).count() < FEW_TASKS { BLOCK / 4 } else { BLOCK };
        let parts = if s == 1 { n } else { 1 };
        let (mut y_left, mut rows_left) = (&mut y[..], &mut rows[..]);
        let mut tasks = vec![];
        for (block, part) in self.blocks(size).flat_map(|block| (0..parts).map(move |part| (block, part))) {
            let queries = block.count * n * g / parts;
            let (y, rest) = mem::take(&mut y_left).split_at_mut(queries * d);
            let (rows, rest_of_rows) = mem::take(&mut rows_left).split_at_mut(queries);
            (y_left, rows_left) = (rest, rest_of_rows);
            tasks.push((block, part, y, rows));
        }
        tasks.into_par_iter().for_each(|(block, part, y, rows)| {
            let mut scores = vec![];
            if s == 1 {
                let all = Queries { block, head: part, group: 0, rows: g };
                return self.output(all, &mut scores, y, rows, 1);
            }
            for i in 0..n * g {
                let queries = Queries { block, head: i / g, group: i % g, rows: block.count };
                self.output(queries, &mut scores, &mut y[i * d..], &mut rows[i..], n * g);
            }
        });
        (of_strides(y, [b, n, g, s, d], [s * n * g * d, g * d, d, n * g * d, 1]), rows)
    }

    /// The output of some queries. It begins in `y` and `rows` at the first of them; the next is `apart` queries further.
    fn output(&self, of: Queries<'_>, scores: &mut Vec<f32>, y: &mut [f32], rows: &mut [Row], apart: usize) {
        let d = self.q.layout().shape()[4];
        let seen = self.seen(of);
        scores.resize(of.rows * seen, 0.0);
        let scores = &mut scores[..of.rows * seen];
        self.scores(of, scores);
        let hidden = self.padding_of(of);
        vectorised(|| {
            let rows = rows.iter_mut().step_by(apart);
            for (i, (scores, row)) in scores.chunks_exact_mut(seen).zip(rows).enumerate() {
                let scores = visible(scores, self.seen_by(of, i), hidden);
                let max = largest(scores);
                *row = Row { max, inverse: (1.0 / exponentiate(scores, max)) as f32 };
            }
        });
        let weights = Matrix::new(scores, of.rows, seen);
        for (place, keys) in self.runs(of) {
            let beta = if place == 0 { 0.0 } else { 1.0 };
            let weights = weights.columns(place, keys.len());
            multiply(weights, self.of_keys(&self.v, of, keys), beta, y, apart * d);
        }
        for (y, row) in y.chunks_mut(apart * d).zip(rows.iter().step_by(apart)).take(of.rows) {
            for y in &mut y[..d] {
                *y *= row.inverse;
            }
        }
    }

    /// The gradients of queries, keys and values. Those of queries are in memory as `[b, n, s, g, d]`.
    fn backward(&self, rows: &[Row], dy: &FlexTensor) -> [FlexTensor; 3] {
        let [b, n, g, s, d] = self.dims_of_queries();
        let [_, _, t, _] = self.dims_of_keys();
        // A task has one head of keys and values. Where these are few, its blocks are dealt out to several tasks, whose gradients
        // of keys and values are added up; how many depends on shapes alone, so that results do not on threads.
        let blocks: Vec<Block<'_>> = self.blocks(BLOCK).collect();
        let blocks_of_sequence = blocks.len() / b;
        let parts = FEW_TASKS_OF_BACKWARD.div_ceil(b * n).min(blocks_of_sequence);
        let mut to_q = zeros(b * n * g * s * d);
        let [mut to_k, mut to_v] = [(); 2].map(|()| zeros(parts * b * n * t * d));
        let mut tasks: Vec<_> = to_k.chunks_exact_mut(t * d).zip(to_v.chunks_exact_mut(t * d)).collect();
        let mut blocks_of_tasks: Vec<Vec<_>> = tasks.iter().map(|_| vec![]).collect();
        let mut left = &mut to_q[..];
        for blocks in blocks.chunks(blocks_of_sequence) {
            for head in 0..n {
                for (i, block) in blocks.iter().enumerate() {
                    let (to_q, rest) = mem::take(&mut left).split_at_mut(block.count * g * d);
                    left = rest;
                    let task = ((i % parts) * b + block.segment.batch) * n + head;
                    blocks_of_tasks[task].push((*block, head, to_q));
                }
            }
        }
        tasks.par_iter_mut().zip(blocks_of_tasks).for_each(|((to_k, to_v), blocks)| {
            let [mut weights, mut slopes] = [(); 2].map(|()| vec![]);
            for (block, head, to_q) in blocks {
                let first = block.segment.batch * s + block.segment.queries.start + block.position;
                for group in 0..g {
                    let rows = &rows[(first * n + head) * g + group..];
                    let of = Queries { block, head, group, rows: block.count };
                    let to_q = &mut to_q[group * d..];
                    self.gradients(of, rows, dy, [&mut weights, &mut slopes], [to_q, to_k, to_v]);
                }
            }
        });
        for to in [&mut to_k, &mut to_v] {
            let (sum, further) = to.split_at_mut(b * n * t * d);
            for part in further.chunks_exact(sum.len()) {
                let numbers = sum.par_iter_mut().with_min_len(TASK).zip(part);
                numbers.for_each(|(sum, part)| *sum += part);
            }
            to.truncate(b * n * t * d);
        }
        let to_q = of_strides(to_q, [b, n, g, s, d], [n * s * g * d, s * g * d, d, g * d, 1]);
        [to_q, tensor(to_k, [b, n, t, d]), tensor(to_v, [b, n, t, d])]
    }

    /// Writes the gradient of some queries, each behind those of a group, and adds what they give to the gradients of keys
    /// and values. Their first row is the first of `rows`.
    fn gradients(
        &self,
        of: Queries<'_>,
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
        let hidden = self.padding_of(of);
        vectorised(|| {
            let rows = rows.iter().step_by(n * g);
            for (i, (weights, row)) in weights.chunks_exact_mut(seen).zip(rows).enumerate() {
                for weight in visible(weights, self.seen_by(of, i), hidden) {
                    *weight = exp(*weight - row.max) * row.inverse;
                }
            }
        });
        let dy = self.of_queries(dy, of);
        let all = Matrix::new(weights, of.rows, seen);
        for (place, keys) in self.runs(of) {
            let of_run = all.columns(place, keys.len()).turned();
            multiply(of_run, dy, 1.0, &mut to_v[keys.start * d..], d);
            multiply(dy, self.of_keys(&self.v, of, keys).turned(), 0.0, &mut slopes[place..], seen);
        }
        // Through the softmax: `weight * (slope - Σ weight * slope)`.
        vectorised(|| {
            for (weights, slopes) in weights.chunks_exact(seen).zip(slopes.chunks_exact_mut(seen)) {
                let mean = dot([weights, slopes], |[weight, slope]| weight * slope);
                for (slope, weight) in slopes.iter_mut().zip(weights) {
                    *slope = weight * (*slope - mean);
                }
            }
        });
        let all = Matrix::new(slopes, of.rows, seen);
        for (place, keys) in self.runs(of) {
            let beta = if place == 0 { 0.0 } else { 1.0 };
            let of_run = all.columns(place, keys.len());
            multiply(of_run.turned(), self.queries(of), 1.0, &mut to_k[keys.start * d..], d);
            multiply(of_run, self.of_keys(&self.k, of, keys), beta, to_q, g * d);
        }
    }

    /// `q kᵀ` for the keys that the last of these queries sees.
    fn scores(&self, of: Queries<'_>, scores: &mut [f32]) {
        for (place, keys) in self.runs(of) {
            let keys = self.of_keys(&self.k, of, keys).turned();
            multiply(self.queries(of), keys, 0.0, &mut scores[place..], self.seen(of));
        }
    }

    fn queries(&self, of: Queries<'_>) -> Matrix<'_> {
        self.of_queries(&self.q, of)
    }

    /// Their rows of a tensor `[b, n, g, s, d]`.
    fn of_queries<'a>(&self, x: &'a FlexTensor, of: Queries<'_>) -> Matrix<'a> {
        let axis = if self.dims_of_queries()[3] == 1 { 2 } else { 3 };
        let Block { segment, position, .. } = of.block;
        matrix(x, &[segment.batch, of.head, of.group, segment.queries.start + position], axis, of.rows)
    }

    /// The keys that the last of these queries sees, run by run: the place of the first among them, and which they are.
    fn runs<'a>(&self, of: Queries<'a>) -> impl Iterator<Item = (usize, Range<usize>)> + use<'a> {
        let seen = self.seen(of);
        let mut place = 0;
        of.block.segment.keys.iter().map(move |run| {
            let (start, count) = (place, run.len().min(seen - place));
            place += count;
            (start, run.start..run.start + count)
        })
    }

    /// Some keys, or their values.
    fn of_keys<'a>(&self, x: &'a FlexTensor, of: Queries<'_>, keys: Range<usize>) -> Matrix<'a> {
        matrix(x, &[of.block.segment.batch, of.head, keys.start], 2, keys.len())
    }

    /// How many keys the last of these queries sees, but for padding.
    fn seen(&self, of: Queries<'_>) -> usize {
        self.seen_by(of, of.rows - 1)
    }

    /// How many keys one of these queries sees, but for padding. The last of them is its own.
    fn seen_by(&self, of: Queries<'_>, row: usize) -> usize {
        let Block { segment, position, .. } = of.block;
        let keys: usize = segment.keys.iter().map(Range::len).sum();
        if self.dims_of_queries()[3] == 1 { keys } else { keys - segment.queries.len() + position + row + 1 }
    }

    /// `true` at padding.
    fn padding_of(&self, of: Queries<'_>) -> Option<&[bool]> {
        let [_, _, t, _] = self.dims_of_keys();
        Some(&self.sight.padding.as_deref()?[of.block.segment.batch * t..][..t])
    }
}

fn of_strides<const D: usize>(numbers: Vec<f32>, shape: [usize; D], strides: [usize; D]) -> FlexTensor {
    let strides = strides.map(|stride| stride as isize).to_vec();
    FlexTensor::new(Bytes::from_elems(numbers), Layout::new(Shape::new(shape), strides, 0), DType::F32)
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
        sight: Sight,
    ) -> FloatTensor<Self> {
        let ((q, of_q), (k, of_k), (v, of_v)) = (q.into_parts(), k.into_parts(), v.into_parts());
        let inputs = Inputs::new(q, k, v, sight);
        let (y, rows) = inputs.forward();
        match AttentionBackward.prepare::<C>([of_q, of_k, of_v]).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => prepared.finish((inputs, rows), y),
            OpsKind::UnTracked(prepared) => prepared.finish(y),
        }
    }
}
