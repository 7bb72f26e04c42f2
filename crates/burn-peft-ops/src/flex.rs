//! What the kernels for Burn's CPU backend share.

use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::{Bytes, DispatchTensorKind, Shape};
use burn::tensor::{DType, Tensor};
use gemmkit::{MatMut, MatRef, Parallelism, gemm};
use rayon::prelude::*;

/// Numbers that are worth the start of a task on another thread.
pub(crate) const TASK: usize = 1 << 14;

/// Whether a tensor is on Flex, with autodiff or without.
pub(crate) fn is_on_flex<const D: usize>(tensor: &Tensor<D>) -> bool {
    match tensor.clone().into_dispatch().kind {
        DispatchTensorKind::Autodiff(inner) => matches!(*inner, DispatchTensorKind::Flex(_)),
        kind => matches!(kind, DispatchTensorKind::Flex(_)),
    }
}

/// Whether kernels read a tensor: they know f32 alone, and leave tensors without elements to Burn.
pub(crate) fn is_readable<const D: usize>(tensor: &Tensor<D>) -> bool {
    tensor.dtype() == DType::F32 && tensor.shape().num_elements() > 0 && is_on_flex(tensor)
}

/// The tensor with its numbers in the order of its axes.
pub(crate) fn contiguous(x: FlexTensor) -> FlexTensor {
    if x.is_contiguous() { x } else { x.to_contiguous() }
}

/// The tensor as products read it: each index has a place of its own, and none lies before the first.
pub(crate) fn strided(x: FlexTensor) -> FlexTensor {
    let layout = x.layout();
    let mut axes = layout.strides().iter().zip(layout.shape().iter());
    if axes.all(|(stride, size)| *stride > 0 || *size == 1) { x } else { x.to_contiguous() }
}

/// The numbers of a contiguous tensor.
pub(crate) fn numbers(x: &FlexTensor) -> &[f32] {
    &x.storage::<f32>()[x.layout().start_offset()..][..x.layout().num_elements()]
}

/// The numbers of a contiguous tensor for changes in place, if nobody else holds them.
pub(crate) fn numbers_mut(x: &mut FlexTensor) -> Option<&mut [f32]> {
    let (start, n) = (x.layout().start_offset(), x.layout().num_elements());
    Some(&mut x.try_storage_mut::<f32>()?[start..][..n])
}

pub(crate) fn tensor(numbers: Vec<f32>, shape: impl Into<Shape>) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(numbers), Layout::contiguous(shape.into()), DType::F32)
}

/// So many zeros, written by all threads if they are many: one thread alone would make the others wait.
pub(crate) fn zeros(n: usize) -> Vec<f32> {
    if n < 2 * TASK {
        return vec![0.0; n];
    }
    let blocks = (0..n.div_ceil(BLOCK)).into_par_iter().with_min_len(BLOCKS_OF_TASK);
    let mut zeros = blocks.map(|_| [0.0; BLOCK]).collect::<Vec<Block>>().into_flattened();
    zeros.truncate(n);
    zeros
}

/// Runs `f` with the widest vector instructions of the processor. What `f` calls has to be inlined to have them.
#[inline(always)]
pub(crate) fn vectorised<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// How many rows of `width` numbers make a task.
pub(crate) fn rows_of_task(width: usize) -> usize {
    TASK.div_ceil(width.max(1))
}

/// A matrix in a tensor.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a> {
    pub(crate) numbers: &'a [f32],
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// How far apart rows and columns lie. Not negative, and not zero where there is more than one.
    pub(crate) strides: [isize; 2],
}

/// The longest sum that is left to gemmkit. Made at once, that of 32,768 equal numbers would be 1.7e-5 off, the gradient
/// of a loss over 49,152 tokens 4.9e-6.
const LONGEST_SUM: usize = 8192;
/// Longer ones are made of so many numbers at a time.
const PART_OF_SUM: usize = 2048;

/// The most columns that gemmkit multiplies at a time: for few rows, it copies a part of each of them.
const MOST_COLUMNS: usize = 8192;

impl<'a> Matrix<'a> {
    /// One that lies row by row.
    pub(crate) fn new(numbers: &'a [f32], rows: usize, columns: usize) -> Self {
        Self { numbers, rows, columns, strides: [columns as isize, 1] }
    }

    /// A tensor of two axes as [`strided`] gives it.
    pub(crate) fn of(x: &'a FlexTensor) -> Self {
        let layout = x.layout();
        let [rows, columns] = layout.shape().dims();
        let numbers = &x.storage::<f32>()[layout.start_offset()..];
        Self { numbers, rows, columns, strides: [layout.strides()[0], layout.strides()[1]] }
    }

    /// `self b`, by all threads.
    pub(crate) fn product(self, b: Matrix<'_>) -> FlexTensor {
        let mut y = zeros(self.rows * b.columns);
        for start in (0..b.columns).step_by(MOST_COLUMNS) {
            let part = b.columns(start, MOST_COLUMNS.min(b.columns - start));
            self.times(part, 0.0, &mut y[start..], b.columns, Parallelism::Rayon(0));
        }
        tensor(y, [self.rows, b.columns])
    }

    pub(crate) fn turned(self) -> Self {
        let [of_rows, of_columns] = self.strides;
        Self { rows: self.columns, columns: self.rows, strides: [of_columns, of_rows], ..self }
    }

    /// Some of its columns.
    pub(crate) fn columns(self, start: usize, count: usize) -> Self {
        let numbers = &self.numbers[start * self.strides[1].unsigned_abs()..];
        Self { numbers, columns: count, ..self }
    }

    /// One of its rows, which lie in one piece each.
    pub(crate) fn row(self, i: usize) -> &'a [f32] {
        &self.numbers[i * self.strides[0].unsigned_abs()..][..self.columns]
    }

    fn view(self) -> MatRef<'a, f32> {
        MatRef::new(self.numbers, self.rows, self.columns, self.strides[0], self.strides[1])
    }

    /// `y = self b + beta y`, with rows of `y` that lie `apart` numbers apart.
    pub(crate) fn times(
        self,
        b: Matrix<'_>,
        beta: f32,
        y: &mut [f32],
        apart: usize,
        parallelism: Parallelism,
    ) {
        assert_eq!(self.columns, b.rows, "columns of the left, and rows of the right side of a product");
        let part = if self.columns > LONGEST_SUM { PART_OF_SUM } else { LONGEST_SUM };
        // With a vector on one side, gemmkit does not promise the same bits for any number of threads.
        let is_by_vector = self.rows == 1 || b.columns == 1;
        let parallelism = if is_by_vector { Parallelism::Serial } else { parallelism };
        let product = |start: usize, beta: f32, y: &mut [f32], apart: usize| {
            let count = part.min(self.columns - start);
            let (a, b) = (self.columns(start, count), b.turned().columns(start, count).turned());
            let y = MatMut::new(y, a.rows, b.columns, apart as isize, 1);
            gemm(1.0, a.view(), b.view(), beta, y, parallelism);
        };
        product(0, beta, y, apart);
        let mut further = vec![];
        for start in (part..self.columns).step_by(part) {
            // Not added by the product itself: of a single row, it would go on with the sum that is there.
            further.resize(self.rows * b.columns, 0.0);
            product(start, 0.0, &mut further, b.columns);
            for (y, further) in y.chunks_mut(apart).zip(further.chunks_exact(b.columns)) {
                for (y, further) in y.iter_mut().zip(further) {
                    *y += further;
                }
            }
        }
    }
}

/// Numbers that [`dot`] adds up side by side.
const LANES: usize = 16;

/// The sum of what `f` makes of the numbers at the same place, as many as an activation is wide.
#[inline(always)]
pub(crate) fn dot<const N: usize>(of: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> f32 {
    let mut sums = [0.0; LANES];
    let parts = of.map(|numbers| numbers.as_chunks::<LANES>());
    for i in 0..parts[0].0.len() {
        for (lane, sum) in sums.iter_mut().enumerate() {
            *sum += f(parts.map(|(lanes, _)| lanes[i][lane]));
        }
    }
    let mut sum = sums.iter().sum();
    for i in 0..parts[0].1.len() {
        sum += f(parts.map(|(_, rest)| rest[i]));
    }
    sum
}

/// Numbers that [`map`] and [`map_to_two`] compute at a time.
const BLOCK: usize = 256;
/// Blocks that are worth the start of a task.
const BLOCKS_OF_TASK: usize = TASK / BLOCK;

type Block = [f32; BLOCK];

/// The numbers that `f` computes from those at the same place of `inputs`, which have the same length.
///
/// Blocks are computed one by one and collected, so the memory of the result is written once. A vector of zeros to write
/// into would be written twice, the first time by one thread alone.
pub(crate) fn map<const N: usize>(inputs: [&[f32]; N], f: impl Fn([f32; N]) -> f32 + Sync) -> Vec<f32> {
    let block =
        |of: [&Block; N]| vectorised(|| std::array::from_fn(|i| f(std::array::from_fn(|k| of[k][i]))));
    let (blocks, rest) = in_blocks(inputs);
    let mut output = Vec::with_capacity(blocks.len() + 1);
    blocks.into_par_iter().with_min_len(BLOCKS_OF_TASK).map(block).collect_into_vec(&mut output);
    in_one(output, &block(rest.each_ref()), inputs[0].len())
}

/// As [`map`], for two results.
pub(crate) fn map_to_two<const N: usize>(
    inputs: [&[f32]; N],
    f: impl Fn([f32; N]) -> (f32, f32) + Sync,
) -> (Vec<f32>, Vec<f32>) {
    let block = |of: [&Block; N]| {
        let (mut first, mut second) = ([0.0; BLOCK], [0.0; BLOCK]);
        vectorised(|| {
            for i in 0..BLOCK {
                (first[i], second[i]) = f(std::array::from_fn(|k| of[k][i]));
            }
        });
        (first, second)
    };
    let (blocks, rest) = in_blocks(inputs);
    let (mut first, mut second) =
        (Vec::with_capacity(blocks.len() + 1), Vec::with_capacity(blocks.len() + 1));
    blocks.into_par_iter().with_min_len(BLOCKS_OF_TASK).map(block).unzip_into_vecs(&mut first, &mut second);
    let rest = block(rest.each_ref());
    (in_one(first, &rest.0, inputs[0].len()), in_one(second, &rest.1, inputs[0].len()))
}

/// The blocks of some slices of the same length, and what is left behind the last, filled up with zeros.
fn in_blocks<const N: usize>(inputs: [&[f32]; N]) -> (Vec<[&Block; N]>, [Block; N]) {
    let parts = inputs.map(|input| input.as_chunks::<BLOCK>());
    let blocks = (0..parts[0].0.len()).map(|i| parts.map(|(blocks, _)| &blocks[i])).collect();
    let mut rest = [[0.0; BLOCK]; N];
    for (rest, (_, left)) in rest.iter_mut().zip(parts) {
        rest[..left.len()].copy_from_slice(left);
    }
    (blocks, rest)
}

/// The first `n` numbers of blocks and a last one.
fn in_one(blocks: Vec<Block>, last: &Block, n: usize) -> Vec<f32> {
    // The vector has room for the last block.
    let mut numbers = blocks.into_flattened();
    numbers.extend_from_slice(&last[..n - numbers.len()]);
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::drawn_numbers;

    #[test]
    fn zeros_are_as_many_as_asked_for() {
        for n in [0, 5, 2 * TASK - 1, 2 * TASK, 2 * TASK + 1, 5 * TASK + 3] {
            assert_eq!(zeros(n), vec![0.0; n]);
        }
    }

    #[test]
    fn products_are_the_same_with_one_thread_and_with_all() {
        for [rows, sums, columns] in [[1, 8192, 512], [20_000, 512, 1], [64, 3000, 3], [300, 2048, 256]] {
            let (a, b) = (drawn_numbers(rows * sums, 1.0, 1), drawn_numbers(sums * columns, 1.0, 2));
            let a = Matrix::new(&a, rows, sums);
            for b in [Matrix::new(&b, sums, columns), Matrix::new(&b, columns, sums).turned()] {
                let product = |parallelism| {
                    let mut y = vec![0.0; rows * columns];
                    a.times(b, 0.0, &mut y, columns, parallelism);
                    y
                };
                let is_same = product(Parallelism::Serial) == product(Parallelism::Rayon(0));
                assert!(is_same, "{rows} x {sums} x {columns}");
            }
        }
    }

    #[test]
    fn blocks_and_what_is_left_are_in_order() {
        for n in [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * TASK + 3] {
            let a: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let b: Vec<f32> = a.iter().map(|a| a * 0.5).collect();
            let sum: Vec<f32> = a.iter().map(|a| a * 1.5).collect();
            assert_eq!(map([&a, &b], |[a, b]| a + b), sum);
            assert_eq!(map_to_two([&a, &b], |[a, b]| (a + b, a)), (sum, a));
        }
    }
}
