//! Dropout on Burn's CPU backend.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::{FlexTensor, Layout};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Bytes, Dispatch, Flex, backend_extension};
use burn::tensor::{DType, Distribution, Tensor};
use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};
use rayon::prelude::*;

use crate::ops::flex::is_on_flex;

/// Elements that have a generator of their own, so that the bits do not depend on the number of threads.
const CHUNK: usize = 1 << 14;
/// Elements for which one number of a generator is enough.
const PER_NUMBER: usize = 4;

/// Whether [`zero_some`] is for `x`.
pub(super) fn has_kernel<const D: usize>(x: &Tensor<D>) -> bool {
    x.dtype() == DType::F32 && is_on_flex(x)
}

pub(super) fn zero_some<const D: usize>(x: Tensor<D>, prob: f64) -> Tensor<D> {
    // Each has 24 random bits.
    let drawn =
        Tensor::<1>::random([3], Distribution::Default, (&x.device().inner(), DType::F32)).into_data();
    with_seed(x, prob, drawn.iter::<f32>().fold(0, |seed, x| (seed << 21) ^ (x * 16_777_216.0) as u64))
}

/// The same for a seed.
fn with_seed<const D: usize>(x: Tensor<D>, prob: f64, seed: u64) -> Tensor<D> {
    // A probability below 1 keeps something.
    let threshold = (prob * 65_536.0).round().min(65_535.0) as u32;
    Tensor::from_dispatch(Dispatch::zero_some(x.into_dispatch(), threshold, seed))
}

#[backend_extension(Flex, Autodiff)]
trait ZeroSome: Backend {
    /// `x`, 0 where the 16 bits that `seed` gives an element are below `threshold`.
    fn zero_some(x: FloatTensor<Self>, threshold: u32, seed: u64) -> FloatTensor<Self>;
}

impl ZeroSome for Flex {
    fn zero_some(x: FloatTensor<Self>, threshold: u32, seed: u64) -> FloatTensor<Self> {
        let x = x.to_contiguous();
        let shape = x.layout().shape().clone();
        let start = x.layout().start_offset();
        let values = &x.storage::<f32>()[start..][..shape.num_elements()];
        let mut kept = vec![0.0; values.len()];
        // Seeds that lie close together shall have no chunk in common.
        let first = SmallRng::seed_from_u64(seed).next_u64();
        let chunks = kept.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK)).enumerate();
        chunks.for_each(|(i, (kept, values))| keep(kept, values, threshold, first.wrapping_add(i as u64)));
        FlexTensor::new(Bytes::from_elems(kept), Layout::contiguous(shape), DType::F32)
    }
}

/// Copies what is not dropped of one chunk.
fn keep(kept: &mut [f32], values: &[f32], threshold: u32, seed: u64) {
    let mut rng = SmallRng::seed_from_u64(seed);
    for (kept, values) in kept.chunks_mut(PER_NUMBER).zip(values.chunks(PER_NUMBER)) {
        let bits = rng.next_u64();
        for (i, (kept, value)) in kept.iter_mut().zip(values).enumerate() {
            let own = (bits >> (16 * i)) as u16;
            *kept = if u32::from(own) < threshold { 0.0 } else { *value };
        }
    }
}

#[derive(Debug)]
struct ZeroSomeBackward;

impl<B: ZeroSome> Backward<B, 1> for ZeroSomeBackward {
    /// Threshold and seed.
    type State = (u32, u64);

    fn backward(self, ops: Ops<Self::State, 1>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let dy = gradients.consume::<B>(&ops.node);
        if let [Some(x)] = ops.parents {
            let (threshold, seed) = ops.state;
            gradients.register::<B>(x.id, B::zero_some(dy, threshold, seed));
        }
    }
}

impl<B: ZeroSome, C: CheckpointStrategy> ZeroSome for Autodiff<B, C> {
    fn zero_some(x: FloatTensor<Self>, threshold: u32, seed: u64) -> FloatTensor<Self> {
        let (x, node) = x.into_parts();
        let y = B::zero_some(x, threshold, seed);
        match ZeroSomeBackward.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => prepared.finish((threshold, seed), y),
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
        let found = with_seed(Tensor::<2>::ones([1024, N / 1024], &Device::flex()), prob, seed).into_data();
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
