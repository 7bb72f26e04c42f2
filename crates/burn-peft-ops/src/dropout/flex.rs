//! Dropout on Burn's CPU backend.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;
use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};
use rayon::prelude::*;

use super::next_dropout_seed;
use crate::flex::{
    Matrix, contiguous, is_readable, numbers, numbers_mut, strided, tensor, vectorised, zeros,
};

/// Elements that have a generator of their own, so that the bits do not depend on the number of threads.
const CHUNK: usize = 1 << 14;
/// Generators side by side.
const LANES: usize = 16;

/// xoshiro128++ (D. Blackman, S. Vigna, "Scrambled linear pseudorandom number generators", 2021) in vector instructions,
/// which rand has no generator for.
struct Lanes([[u32; LANES]; 4]);

impl Lanes {
    fn new(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        Self(std::array::from_fn(|_| std::array::from_fn(|_| rng.next_u32())))
    }

    #[inline(always)]
    fn next(&mut self) -> [u32; LANES] {
        let [a, b, c, d] = &mut self.0;
        std::array::from_fn(|i| {
            let result = a[i].wrapping_add(d[i]).rotate_left(7).wrapping_add(a[i]);
            let shifted = b[i] << 9;
            c[i] ^= a[i];
            d[i] ^= b[i];
            b[i] ^= c[i];
            a[i] ^= d[i];
            c[i] ^= shifted;
            d[i] = d[i].rotate_left(11);
            result
        })
    }
}

/// Whether [`zero_some`] is for `x`.
pub(super) fn has_kernel<const D: usize>(x: &Tensor<D>) -> bool {
    is_readable(x)
}

pub(super) fn zero_some<const D: usize>(x: Tensor<D>, prob: f64) -> Tensor<D> {
    let dropped = Dropped::new(&x, prob);
    with(x, dropped)
}

pub(super) fn dropped_product(x: Tensor<2>, a: Tensor<2>, prob: f64) -> Tensor<2> {
    let dropped = Dropped::new(&x, prob);
    Tensor::from_dispatch(Dispatch::dropped_product(x.into_dispatch(), a.into_dispatch(), dropped))
}

/// Which elements are dropped: where the 16 bits that the seed gives an element are below the threshold.
#[derive(Debug, Clone, Copy)]
struct Dropped {
    threshold: u32,
    seed: u64,
}

impl Dropped {
    fn new<const D: usize>(x: &Tensor<D>, prob: f64) -> Self {
        Self::with_seed(prob, next_dropout_seed(&x.device().inner()))
    }

    fn with_seed(prob: f64, seed: u64) -> Self {
        // A probability below 1 keeps something.
        let most = if prob < 1.0 { 65_535.0 } else { 65_536.0 };
        Self { threshold: (prob * 65_536.0).round().min(most) as u32, seed }
    }

    /// `x` with zeros, in its own memory if nobody else holds it.
    fn zeroed(self, x: FlexTensor) -> FlexTensor {
        let mut x = contiguous(x);
        // Seeds that lie close together shall have no chunk in common.
        let first = SmallRng::seed_from_u64(self.seed).next_u64();
        let seed_of = |chunk: usize| first.wrapping_add(chunk as u64);
        if let Some(numbers) = numbers_mut(&mut x) {
            let chunks = numbers.par_chunks_mut(CHUNK).enumerate();
            chunks.for_each(|(i, numbers)| self.zero(numbers, seed_of(i)));
            return x;
        }
        let mut kept = zeros(x.layout().num_elements());
        let chunks = kept.par_chunks_mut(CHUNK).zip(numbers(&x).par_chunks(CHUNK)).enumerate();
        chunks.for_each(|(i, (kept, numbers))| {
            kept.copy_from_slice(numbers);
            self.zero(kept, seed_of(i));
        });
        tensor(kept, x.layout().shape().clone())
    }

    /// Zeroes what is dropped of one chunk.
    fn zero(self, numbers: &mut [f32], seed: u64) {
        let mut lanes = Lanes::new(seed);
        vectorised(|| {
            for numbers in numbers.chunks_mut(2 * LANES) {
                let bits = lanes.next();
                // Each has the bits of two elements.
                let both = [bits.map(|bits| bits & 0xffff), bits.map(|bits| bits >> 16)];
                for (numbers, own) in numbers.chunks_mut(LANES).zip(both) {
                    for (number, own) in numbers.iter_mut().zip(own) {
                        *number = if own < self.threshold { 0.0 } else { *number };
                    }
                }
            }
        });
    }
}

fn with<const D: usize>(x: Tensor<D>, dropped: Dropped) -> Tensor<D> {
    Tensor::from_dispatch(Dispatch::zero_some(x.into_dispatch(), dropped))
}

#[backend_extension(Flex, Autodiff)]
trait ZeroSome: Backend {
    fn zero_some(x: FloatTensor<Self>, dropped: Dropped) -> FloatTensor<Self>;

    /// `zero_some(x) A`
    fn dropped_product(x: FloatTensor<Self>, a: FloatTensor<Self>, dropped: Dropped) -> FloatTensor<Self>;
}

impl ZeroSome for Flex {
    fn zero_some(x: FlexTensor, dropped: Dropped) -> FlexTensor {
        dropped.zeroed(x)
    }

    fn dropped_product(x: FlexTensor, a: FlexTensor, dropped: Dropped) -> FlexTensor {
        let (x, a) = (dropped.zeroed(x), strided(a));
        Matrix::of(&x).product(Matrix::of(&a))
    }
}

#[derive(Debug)]
struct ZeroSomeBackward;

impl Backward<Flex, 1> for ZeroSomeBackward {
    type State = Dropped;

    fn backward(self, ops: Ops<Dropped, 1>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let dy = gradients.consume::<Flex>(&ops.node);
        if let [Some(x)] = ops.parents {
            gradients.register::<Flex>(x.id, ops.state.zeroed(dy));
        }
    }
}

#[derive(Debug)]
struct DroppedProductBackward;

impl Backward<Flex, 2> for DroppedProductBackward {
    /// `x` and `A`.
    type State = (FlexTensor, FlexTensor, Dropped);

    fn backward(self, ops: Ops<Self::State, 2>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let dy = strided(gradients.consume::<Flex>(&ops.node));
        let (x, a, dropped) = ops.state;
        let [of_x, of_a] = ops.parents;
        if let Some(node) = of_a {
            let kept = dropped.zeroed(x);
            let to_a = Matrix::of(&kept).turned().product(Matrix::of(&dy));
            gradients.register::<Flex>(node.id, to_a);
        }
        if let Some(node) = of_x {
            let a = strided(a);
            let dx = Matrix::of(&dy).product(Matrix::of(&a).turned());
            gradients.register::<Flex>(node.id, dropped.zeroed(dx));
        }
    }
}

impl<C: CheckpointStrategy> ZeroSome for Autodiff<Flex, C> {
    fn zero_some(x: FloatTensor<Self>, dropped: Dropped) -> FloatTensor<Self> {
        let (x, node) = x.into_parts();
        let y = dropped.zeroed(x);
        match ZeroSomeBackward.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => prepared.finish(dropped, y),
            OpsKind::UnTracked(prepared) => prepared.finish(y),
        }
    }

    fn dropped_product(x: FloatTensor<Self>, a: FloatTensor<Self>, dropped: Dropped) -> FloatTensor<Self> {
        let ((x, of_x), (a, of_a)) = (x.into_parts(), a.into_parts());
        let y = Flex::dropped_product(x.clone(), a.clone(), dropped);
        match DroppedProductBackward.prepare::<C>([of_x, of_a]).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => prepared.finish((x, a, dropped), y),
            OpsKind::UnTracked(prepared) => prepared.finish(y),
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    const N: usize = 1 << 20;

    /// Which of `N` elements were dropped.
    fn dropped(prob: f64, seed: u64) -> Vec<bool> {
        let found =
            with(Tensor::<2>::ones([1024, N / 1024], &Device::flex()), Dropped::with_seed(prob, seed))
                .into_data();
        found.iter::<f32>().map(|x| x == 0.0).collect()
    }

    /// By how many standard deviations the share of `true` is off `expected`.
    fn deviations(of: impl Iterator<Item = bool>, expected: f64) -> f64 {
        let (mut count, mut n) = (0.0, 0.0);
        for is_true in of {
            count += f64::from(u8::from(is_true));
            n += 1.0;
        }
        (count - n * expected) / (n * expected * (1.0 - expected)).sqrt()
    }

    #[test]
    fn the_rate_is_the_probability() {
        for prob in [0.001, 0.05, 0.1, 0.5, 0.9] {
            let rounded = (prob * 65_536.0_f64).round() / 65_536.0;
            let found = deviations(dropped(prob, 7).into_iter(), rounded);
            assert!(found.abs() < 4.0, "{prob}: {found} standard deviations");
        }
        assert!(!dropped(0.0, 1).contains(&true) && dropped(1.0 - 1e-9, 1).contains(&false));
    }

    /// Neighbours at every distance at which numbers or chunks could repeat, and calls with seeds that lie close together.
    #[test]
    fn elements_and_calls_are_independent() {
        let one = dropped(0.25, 7);
        let both = |a: &[bool], b: &[bool]| deviations(a.iter().zip(b).map(|(a, b)| *a && *b), 0.0625);
        for distance in [1, 2, 3, 4, 8, 16, 64, 1024, CHUNK, CHUNK + 1, 2 * CHUNK, N / 2] {
            let found = both(&one, &one[distance..]);
            assert!(found.abs() < 4.0, "distance {distance}: {found}");
        }
        for seed in [0, 6, 8, 7 << 1, u64::MAX] {
            let two = dropped(0.25, seed);
            for distance in [0, CHUNK] {
                let found = both(&one[distance..], &two);
                assert!(found.abs() < 4.0, "seed {seed}, distance {distance}: {found}");
            }
        }
    }

    #[test]
    fn a_seed_gives_the_same_whatever_the_threads() {
        let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert_eq!(alone.install(|| dropped(0.3, 5)), dropped(0.3, 5));
    }
}
