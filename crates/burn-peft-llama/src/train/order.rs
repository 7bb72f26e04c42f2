//! The order of the examples.

use std::cmp::Reverse;

use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

/// Batches within which lengths are sorted: enough to save padding, few enough to keep the order random.
const SORTED_BATCHES: usize = 16;

/// A seed for part `part` of what `seed` decides.
pub(super) fn spread_seed(seed: u64, part: u64) -> u64 {
    seed.wrapping_add(part.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// The examples of one pass as batches of indices, in random order.
pub(super) fn epoch_batches(
    lengths: &[usize],
    batch_size: usize,
    seed: u64,
    epoch: usize,
) -> Vec<Vec<usize>> {
    let mut rng = StdRng::seed_from_u64(spread_seed(seed, epoch as u64));
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.shuffle(&mut rng);
    for window in order.chunks_mut(batch_size.saturating_mul(SORTED_BATCHES)) {
        window.sort_by_key(|&i| Reverse(lengths[i]));
    }
    let mut batches: Vec<Vec<usize>> = order.chunks(batch_size).map(<[usize]>::to_vec).collect();
    batches.shuffle(&mut rng);
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_hold_each_example_once_with_like_lengths_in_another_order_each_time() {
        let lengths: Vec<usize> = (0..1000).map(|i| 1 + (i * 37) % 90).collect();
        let batches = epoch_batches(&lengths, 8, 1, 0);
        let mut all: Vec<usize> = batches.concat();
        all.sort_unstable();
        assert_eq!(all, (0..1000).collect::<Vec<_>>());
        assert_eq!(batches, epoch_batches(&lengths, 8, 1, 0));
        assert_ne!(batches, epoch_batches(&lengths, 8, 1, 1));
        assert_ne!(batches, epoch_batches(&lengths, 8, 2, 0));
        let padded: usize =
            batches.iter().map(|b| b.len() * b.iter().map(|&i| lengths[i]).max().unwrap()).sum();
        let tokens: usize = lengths.iter().sum();
        assert!(padded * 10 < tokens * 12, "{padded} for {tokens}");
        // Without the last shuffle, each window would go from long to short.
        let first: Vec<usize> = batches[..16].iter().map(|b| lengths[b[0]]).collect();
        assert!(!first.is_sorted_by(|a, b| a >= b), "{first:?}");
    }
}
