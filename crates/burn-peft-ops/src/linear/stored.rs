//! Products with a weight that is constant, read as it lies in memory.

use burn::tensor::{bf16, f16};
use gemmkit::Parallelism;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::WIDENED;
use crate::flex::{Matrix, rows_of_task, vectorised};

/// Rows of activations so few that reading the weight takes longer than multiplying.
pub(super) const FEW_ROWS: usize = 16;
/// Numbers of a weight that a task reads then, if that makes no more tasks than [`MOST_PIECES`].
const PIECE: usize = 1 << 16;
const MOST_PIECES: usize = 32;

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

/// A type that weights are stored in.
pub(super) trait Number: Copy + Sync {
    /// Some lines of a weight in f32, each behind the other in `buffer` if they are not already.
    fn lines<'a>(of: Stored<'a, Self>, first: usize, count: usize, buffer: &'a mut Vec<f32>) -> Matrix<'a>;
}

impl Number for f32 {
    fn lines<'a>(of: Stored<'a, Self>, first: usize, count: usize, _: &'a mut Vec<f32>) -> Matrix<'a> {
        let strides = [of.apart as isize, 1];
        Matrix { numbers: &of.numbers[first * of.apart..], rows: count, columns: of.length, strides }
    }
}

impl Number for f16 {
    fn lines<'a>(of: Stored<'a, Self>, first: usize, count: usize, buffer: &'a mut Vec<f32>) -> Matrix<'a> {
        of.widened(first, count, buffer, |stored, numbers| stored.convert_to_f32_slice(numbers))
    }
}

impl Number for bf16 {
    fn lines<'a>(of: Stored<'a, Self>, first: usize, count: usize, buffer: &'a mut Vec<f32>) -> Matrix<'a> {
        of.widened(first, count, buffer, |stored, numbers| {
            vectorised(|| {
                for (number, stored) in numbers.iter_mut().zip(stored) {
                    // bf16 is the upper half of f32.
                    *number = f32::from_bits(u32::from(stored.to_bits()) << 16);
                }
            });
        })
    }
}

impl<E: Number> Stored<'_, E> {
    fn widened<'a>(
        self,
        first: usize,
        count: usize,
        buffer: &'a mut Vec<f32>,
        widen: impl Fn(&[E], &mut [f32]) + Sync,
    ) -> Matrix<'a> {
        buffer.resize(count * self.length, 0.0);
        let lines = buffer.par_chunks_exact_mut(self.length).with_min_len(rows_of_task(self.length));
        lines.enumerate().for_each(|(i, numbers)| {
            let start = (first + i) * self.apart;
            widen(&self.numbers[start..start + self.length], numbers);
        });
        Matrix::new(buffer, count, self.length)
    }

    /// `x W`, row by row.
    pub(super) fn product(self, x: Matrix<'_>) -> Vec<f32> {
        let d_out = if self.is_by_row { self.length } else { self.lines };
        let mut y = vec![0.0; x.rows * d_out];
        let is_few = x.rows <= FEW_ROWS;
        let count = match is_few {
            true => (PIECE / self.length).max(self.lines.div_ceil(MOST_PIECES)),
            false => WIDENED / self.length,
        };
        let count = count.max(1);
        let firsts = (0..self.lines).step_by(count);
        let pieces: Vec<(usize, usize)> =
            firsts.map(|first| (first, count.min(self.lines - first))).collect();
        if !is_few {
            let mut buffer = vec![];
            for (first, count) in pieces {
                let piece = E::lines(self, first, count, &mut buffer);
                match self.is_by_row {
                    true => {
                        let beta = if first == 0 { 0.0 } else { 1.0 };
                        x.columns(first, count).times(piece, beta, &mut y, d_out, Parallelism::Rayon(0));
                    }
                    false => x.times(piece.turned(), 0.0, &mut y[first..], d_out, Parallelism::Rayon(0)),
                }
            }
            return y;
        }
        let products = pieces.into_par_iter().map(|(first, count)| {
            let mut buffer = vec![];
            let piece = E::lines(self, first, count, &mut buffer);
            let (x, piece, start) = match self.is_by_row {
                true => (x.columns(first, count), piece, 0),
                false => (x, piece.turned(), first),
            };
            let mut y = vec![0.0; x.rows * piece.columns];
            x.times(piece, 0.0, &mut y, piece.columns, Parallelism::Serial);
            (start, piece.columns, y)
        });
        for (start, columns, product) in products.collect::<Vec<_>>() {
            for (y, product) in y.chunks_exact_mut(d_out).zip(product.chunks_exact(columns)) {
                y[start..][..columns].iter_mut().zip(product).for_each(|(y, product)| *y += product);
            }
        }
        y
    }
}
