//! Sequences in one row of tokens, those that begin alike in part.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::CausalMask;

/// Tokens in one row, each of which begins a sequence or stands behind an earlier one. A token sees itself and those before
/// it on its way back to the beginning.
///
/// Without branches, these are sequences one behind another: *packing*, with attention that is block-diagonal and positions
/// that start anew. With branches, sequences share what they begin with, and it is computed once.
///
/// ```
/// use burn_peft_ops::TokenTree;
///
/// // "a b c" and "a b d e": the fourth token stands behind the second.
/// let tree = TokenTree::new(&[None, Some(0), Some(1), Some(1), Some(3)]);
/// assert_eq!(tree.position_ids(), [0, 1, 2, 2, 3]);
/// ```
#[derive(Clone, Debug)]
pub struct TokenTree {
    position_ids: Arc<[usize]>,
    segments: Arc<[Segment]>,
}

/// Tokens that stand one behind another in memory and in the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Their sequence in the batch.
    pub(crate) batch: usize,
    /// Their places among the queries.
    pub(crate) queries: Range<usize>,
    /// The places of all keys on the way to the last of them. The last keys are those of the segment itself.
    pub(crate) keys: Arc<[Range<usize>]>,
}

/// How the tokens lie if each segment gets a sequence of its own, from its beginning and filled up behind its end.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    /// Number of sequences, and their length.
    pub(crate) dims: [usize; 2],
    /// The token at each place of the sequences, `[sequences * length]`; behind their ends it is the first.
    pub(crate) tokens: Tensor<1, Int>,
    /// The place of each token in the sequence of its segment, `[n]`.
    pub(crate) places: Tensor<1, Int>,
    /// Of those sequences.
    pub(crate) mask: Box<CausalMask>,
}

impl TokenTree {
    /// The tree in which token `i` stands behind token `behind[i]`, or begins a sequence.
    ///
    /// # Panics
    /// If a token stands behind itself or one that comes later.
    pub fn new(behind: &[Option<usize>]) -> Self {
        let mut position_ids: Vec<usize> = Vec::with_capacity(behind.len());
        let mut segments: Vec<Segment> = vec![];
        let mut segment_of: Vec<usize> = Vec::with_capacity(behind.len());
        for (i, &behind) in behind.iter().enumerate() {
            let goes_on = behind.is_some_and(|behind| behind + 1 == i);
            if let (true, Some(segment)) = (goes_on, segments.last_mut()) {
                segment.queries.end = i + 1;
            } else {
                segments.push(Segment { batch: 0, queries: i..i + 1, keys: [].into() });
            }
            position_ids.push(behind.map_or(0, |behind| {
                assert!(behind < i, "token {i} cannot stand behind token {behind}");
                position_ids[behind] + 1
            }));
            segment_of.push(segments.len() - 1);
        }
        for i in 0..segments.len() {
            let own = segments[i].queries.clone();
            let mut keys = match behind[own.start] {
                // What is on the way to the other segment, and of itself the part before the branch.
                Some(last) => {
                    let mut keys = segments[segment_of[last]].keys.to_vec();
                    if let Some(run) = keys.last_mut() {
                        run.end = last + 1;
                    }
                    keys
                }
                None => vec![],
            };
            keys.push(own);
            segments[i].keys = keys.into();
        }
        Self { position_ids: position_ids.into(), segments: segments.into() }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.position_ids.len()
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.position_ids.is_empty()
    }

    /// The position of each token in its sequence, from 0.
    pub fn position_ids(&self) -> &[usize] {
        &self.position_ids
    }

    /// In the order of their tokens.
    #[cfg(feature = "flex")]
    pub(crate) fn segments(&self) -> Arc<[Segment]> {
        self.segments.clone()
    }

    /// Number of tokens of the longest sequence.
    pub fn longest(&self) -> usize {
        self.position_ids.iter().max().map_or(0, |last| last + 1)
    }

    pub(crate) fn places(&self, device: &Device) -> Places {
        let dims @ [_, longest] = [self.segments.len(), self.longest()];
        let mut tokens = vec![0; dims[0] * dims[1]];
        let mut places = vec![0; self.len()];
        for (row, segment) in self.segments.iter().enumerate() {
            for token in segment.keys.iter().cloned().flatten() {
                let place = row * longest + self.position_ids[token];
                tokens[place] = token as i64;
                if segment.queries.contains(&token) {
                    places[token] = place as i64;
                }
            }
        }
        let upload = |numbers: Vec<i64>| {
            let count = numbers.len();
            Tensor::from_data(TensorData::new(numbers, [count]), &device.clone().inner())
        };
        let mask = Box::new(CausalMask::new(longest, longest));
        Places { dims, tokens: upload(tokens), places: upload(places), mask }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tokens that each sees, itself included.
    fn seen(tree: &TokenTree) -> Vec<Vec<usize>> {
        let of_segment = |segment: &Segment| {
            let keys: Vec<usize> = segment.keys.iter().cloned().flatten().collect();
            let before = keys.len() - segment.queries.len();
            (1..=segment.queries.len()).map(|count| keys[..before + count].to_vec()).collect::<Vec<_>>()
        };
        tree.segments.iter().flat_map(of_segment).collect()
    }

    #[test]
    fn a_token_sees_its_way_back() {
        // 0 1 2 | 1 3 4 | 4 5 | 6 7 | 2 8: a branch of a branch, a sequence of its own, a branch at an end.
        let behind = [None, Some(0), Some(1), Some(1), Some(3), Some(3), None, Some(6), Some(2)];
        let tree = TokenTree::new(&behind);
        let expected: Vec<Vec<usize>> = (0..behind.len())
            .map(|i| {
                let mut way: Vec<usize> = std::iter::successors(Some(i), |&i| behind[i]).collect();
                way.reverse();
                way
            })
            .collect();
        assert_eq!(seen(&tree), expected);
        let positions: Vec<usize> = expected.iter().map(|way| way.len() - 1).collect();
        assert_eq!(tree.position_ids(), positions);

        let device = Device::flex();
        let Places { dims, tokens, places, .. } = tree.places(&device);
        let ints = |tensor: &Tensor<1, Int>| tensor.to_data().iter::<i64>().collect::<Vec<_>>();
        let (tokens, places) = (ints(&tokens), ints(&places));
        assert_eq!(dims[0] * dims[1], tokens.len());
        for (i, (&place, way)) in places.iter().zip(&expected).enumerate() {
            let place = place as usize;
            let found = &tokens[place / dims[1] * dims[1]..=place];
            assert!(found.iter().map(|&token| token as usize).eq(way.iter().copied()), "{i}: {found:?}");
        }
    }

    #[test]
    #[should_panic(expected = "token 1 cannot stand behind token 1")]
    fn a_token_behind_itself_is_refused() {
        TokenTree::new(&[None, Some(1)]);
    }
}
