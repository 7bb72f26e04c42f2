//! Products with a weight that is constant, read as it lies in memory.

use std::ops::Range;

use burn::tensor::{bf16, f16};
use gemmkit::Parallelism;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::{WIDENED_AT_ONCE, few_rows};
use crate::flex::{Matrix, rows_of_task, vectorised, zeros};

/// How much of a line is read at a time, so that a part of a weight is neither too thin nor too long.
const WIDTH: usize = 4096;

/// For few rows, a task makes so many results of each, if lines are columns.
const COLUMNS_OF_TASK: usize = 32;
/// If lines are rows, it makes so many: what it adds to has to stay in the nearest cache.
const FEW_COLUMNS: usize = 128;
/// Where several tasks add to the same results, there are at most so many tasks.
const MOST_TASKS: usize = 32;
/// Each of those has at least so many inputs, if there is more than one row.
const LONG: usize = 512;
/// A task reads about so many numbers of a weight at a time.
const READ_AT_ONCE: usize = 1 << 14;
/// More than that is widened by all threads.
const WIDENED_BY_ONE: usize = 1 << 16;

/// A weight whose rows, or whose columns, lie in one piece each: its lines.
#[derive(Clone, Copy)]
pub(super) struct Stored<'a, E> {
    pub(super) numbers: &'a [E],
    pub(super) lines: usize,
    pub(super) length: usize,
    /// How far apart lines begin.
    pub(super) apart: usize,
    /// Whether lines are rows.
    pub(super) is_by_row: bool,
}

/// A part of a weight: some lines, and which of their numbers.
pub(super) struct Part {
    lines: Range<usize>,
    of_line: Range<usize>,
}

/// A type that weights are stored in.
pub(super) trait Number: Copy + Sync {
    /// A part of a weight in f32, line by line: in `buffer`, if it is stored in another type.
    fn read<'a>(of: Stored<'a, Self>, part: Part, buffer: &'a mut Vec<f32>) -> Matrix<'a>;
}

impl Number for f32 {
    fn read<'a>(of: Stored<'a, Self>, part: Part, _: &'a mut Vec<f32>) -> Matrix<'a> {
        let numbers = &of.numbers[part.lines.start * of.apart + part.of_line.start..];
        let strides = [of.apart as isize, 1];
        Matrix { numbers, rows: part.lines.len(), columns: part.of_line.len(), strides }
    }
}

impl Number for f16 {
    fn read<'a>(of: Stored<'a, Self>, part: Part, buffer: &'a mut Vec<f32>) -> Matrix<'a> {
        of.widened(part, buffer, |stored, numbers| stored.convert_to_f32_slice(numbers))
    }
}

impl Number for bf16 {
    fn read<'a>(of: Stored<'a, Self>, part: Part, buffer: &'a mut Vec<f32>) -> Matrix<'a> {
        of.widened(part, buffer, widen)
    }
}

pub(super) fn widen(stored: &[bf16], numbers: &mut [f32]) {
    vectorised(|| {
        for (number, stored) in numbers.iter_mut().zip(stored) {
            // bf16 is the upper half of f32.
            *number = f32::from_bits(u32::from(stored.to_bits()) << 16);
        }
    });
}

impl<E: Number> Stored<'_, E> {
    /// By all threads, if that is more than one task.
    fn widened<'a>(
        self,
        part: Part,
        buffer: &'a mut Vec<f32>,
        widen: impl Fn(&[E], &mut [f32]) + Sync,
    ) -> Matrix<'a> {
        let (count, width) = (part.lines.len(), part.of_line.len());
        buffer.resize(count * width, 0.0);
        let line = |(i, numbers): (usize, &mut [f32])| {
            let start = (part.lines.start + i) * self.apart + part.of_line.start;
            widen(&self.numbers[start..start + width], numbers);
        };
        if count * width <= WIDENED_BY_ONE {
            buffer.chunks_exact_mut(width).enumerate().for_each(line);
        } else {
            let lines = buffer.par_chunks_exact_mut(width).with_min_len(rows_of_task(width));
            lines.enumerate().for_each(line);
        }
        Matrix::new(buffer, count, width)
    }

    /// `x W`, row by row.
    pub(super) fn product(self, x: Matrix<'_>) -> Vec<f32> {
        if x.rows <= few_rows::MOST_ROWS { self.product_of_few(x) } else { self.product_of_many(x) }
    }

    /// Part after part, each multiplied by all threads.
    fn product_of_many(self, x: Matrix<'_>) -> Vec<f32> {
        let d_out = if self.is_by_row { self.length } else { self.lines };
        let mut y = zeros(x.rows * d_out);
        let mut buffer = vec![];
        for of_line in ranges(self.length, WIDTH) {
            for lines in ranges(self.lines, (WIDENED_AT_ONCE / of_line.len()).max(1)) {
                let (inputs, outputs, is_first) = match self.is_by_row {
                    true => (lines.clone(), of_line.start, lines.start == 0),
                    false => (of_line.clone(), lines.start, of_line.start == 0),
                };
                let part = E::read(self, Part { lines, of_line: of_line.clone() }, &mut buffer);
                let part = if self.is_by_row { part } else { part.turned() };
                let beta = if is_first { 0.0 } else { 1.0 };
                let x = x.columns(inputs.start, inputs.len());
                x.times(part, beta, &mut y[outputs..], d_out, Parallelism::Rayon(0));
            }
        }
        y
    }

    /// Each task reads a part of the weight, which is what such a product waits for. The rows of `x` lie in one piece each.
    fn product_of_few(self, x: Matrix<'_>) -> Vec<f32> {
        let (d_in, d_out) =
            if self.is_by_row { (self.lines, self.length) } else { (self.length, self.lines) };
        let (inputs, outputs) = match (self.is_by_row, x.rows) {
            (false, _) => (d_in, COLUMNS_OF_TASK),
            (true, 1) if d_out > 2 * WIDTH => (d_in, WIDTH),
            // A single row has so few results that each task can add to all of them, and read in the order of memory.
            (true, 1) => ((READ_AT_ONCE / d_out).max(d_in.div_ceil(MOST_TASKS)), d_out),
            (true, _) => {
                let tasks = (MOST_TASKS / d_out.div_ceil(FEW_COLUMNS)).min(d_in / LONG).max(1);
                (d_in.div_ceil(tasks), FEW_COLUMNS)
            }
        };
        let pairs = |outputs: Range<usize>| ranges(d_in, inputs).map(move |inputs| (inputs, outputs.clone()));
        let tasks: Vec<_> = ranges(d_out, outputs).flat_map(pairs).collect();
        let products = tasks.into_par_iter().map(|(inputs, outputs)| {
            let mut sum = vec![0.0; x.rows * outputs.len()];
            let (mut product, mut buffer) = (sum.clone(), vec![]);
            // Sums of parts are added, because the error of a sum in one piece would grow with its length.
            let longest = few_rows::LONGEST_SUM * if self.is_by_row { 1 } else { few_rows::SIDE_BY_SIDE };
            let at_once = (READ_AT_ONCE / outputs.len()).clamp(few_rows::ADDED, longest);
            for some in ranges(inputs.len(), at_once) {
                let some = inputs.start + some.start..inputs.start + some.end;
                let (lines, of_line) = match self.is_by_row {
                    true => (some.clone(), outputs.clone()),
                    false => (outputs.clone(), some.clone()),
                };
                let part = E::read(self, Part { lines, of_line }, &mut buffer);
                let part = if self.is_by_row { part } else { part.turned() };
                few_rows::product(x.columns(some.start, some.len()), part, &mut product);
                sum.iter_mut().zip(&product).for_each(|(sum, product)| *sum += product);
            }
            (outputs, sum)
        });
        let mut y = zeros(x.rows * d_out);
        for (outputs, product) in products.collect::<Vec<_>>() {
            for (y, product) in y.chunks_exact_mut(d_out).zip(product.chunks_exact(outputs.len())) {
                y[outputs.clone()].iter_mut().zip(product).for_each(|(y, product)| *y += product);
            }
        }
        y
    }
}

/// `0..end` in ranges of at most `count`.
fn ranges(end: usize, count: usize) -> impl Iterator<Item = Range<usize>> {
    (0..end).step_by(count).map(move |start| start..end.min(start + count))
}
