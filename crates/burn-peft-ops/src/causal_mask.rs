//! Which positions see which. A window of attention would be a further condition here.

#[cfg(feature = "flex")]
use std::sync::Arc;
use std::sync::OnceLock;

use burn::tensor::{Bool, DType, Device, Tensor};

use crate::TokenTree;
use crate::token_tree::Places;

/// What the queries of a pass see: each sees itself and the tokens before it, never padding.
///
/// The queries are the last `s` of `t` positions: all of them in training, one while an answer is written. Padding sees
/// itself as well. Its results are used nowhere, but a row that sees nothing would be `0 / 0`.
///
/// Or the tokens of a batch lie in one row, and each sees those on its way back in a [`TokenTree`].
///
/// Padding behind the last token of a sequence needs no mention: no token sees what comes after it.
///
/// A mask is for one device, and for one or more passes of the same batch.
#[derive(Clone, Debug)]
pub struct CausalMask {
    queries: usize,
    keys: usize,
    /// `true` at padding, `[b, t]`.
    padding: Option<Tensor<2, Bool>>,
    /// Where tokens see their way back in it.
    tree: Option<TokenTree>,
    /// What follows is made for the first operation that needs it.
    bias: OnceLock<Option<Tensor<5>>>,
    places: OnceLock<Places>,
    #[cfg(feature = "flex")]
    padding_on_host: OnceLock<Arc<[bool]>>,
}

impl CausalMask {
    /// The mask of `queries` positions at the end of `keys` positions, without padding between tokens.
    ///
    /// # Panics
    /// If there are more queries than keys.
    pub fn new(queries: usize, keys: usize) -> Self {
        assert!(queries <= keys, "{queries} queries cannot be the last of {keys} positions");
        Self {
            queries,
            keys,
            padding: None,
            tree: None,
            bias: OnceLock::new(),
            places: OnceLock::new(),
            #[cfg(feature = "flex")]
            padding_on_host: OnceLock::new(),
        }
    }

    /// The same, where `tokens` is `false` at padding, `[b, keys]`.
    ///
    /// # Panics
    /// If the sequences have another length, and on the mask of a tree, which has no padding.
    pub fn with_tokens(self, tokens: Tensor<2, Bool>) -> Self {
        assert!(self.tree.is_none(), "a tree of tokens has no padding");
        let [_, length] = tokens.dims();
        assert!(length == self.keys, "the attention mask has {length} positions, not {}", self.keys);
        Self { padding: Some(tokens.inner().bool_not()), ..Self::new(self.queries, self.keys) }
    }

    /// The mask of one row of tokens, in which each sees those on its way back in the tree.
    pub fn of_tree(tree: TokenTree) -> Self {
        let n = tree.len();
        Self { tree: Some(tree), ..Self::new(n, n) }
    }

    /// The tree of [`of_tree`](Self::of_tree).
    pub fn tree(&self) -> Option<&TokenTree> {
        self.tree.as_ref()
    }

    /// Number of sequences, if the mask is for so many alone.
    pub(crate) fn batch(&self) -> Option<usize> {
        let of_tree = self.tree.as_ref().map(|_| 1);
        self.padding.as_ref().map(|padding| padding.dims()[0]).or(of_tree)
    }

    /// How the tokens of a tree lie in sequences of their own.
    pub(crate) fn places(&self, tree: &TokenTree, device: &Device) -> &Places {
        self.places.get_or_init(|| tree.places(device))
    }

    /// Number of queries and keys.
    pub(crate) fn dims(&self) -> [usize; 2] {
        [self.queries, self.keys]
    }

    /// `true` at padding, `b * t` of them.
    #[cfg(feature = "flex")]
    pub(crate) fn padding_on_host(&self) -> Option<Arc<[bool]>> {
        let read = |padding: &Tensor<2, Bool>| padding.to_data().iter::<bool>().collect();
        self.padding.as_ref().map(|padding| self.padding_on_host.get_or_init(|| read(padding)).clone())
    }

    /// 0 where a query sees a key, negative infinity elsewhere, `[b or 1, 1, 1, s, t]`; `None` if everything is seen.
    pub(crate) fn bias(&self, device: &Device) -> Option<&Tensor<5>> {
        self.bias.get_or_init(|| self.hidden(&device.clone().inner()).map(bias_of)).as_ref()
    }

    /// `true` where a query does not see a key, `[b or 1, s, t]`.
    fn hidden(&self, device: &Device) -> Option<Tensor<3, Bool>> {
        let (s, t) = (self.queries, self.keys);
        let before = (t - s) as i64;
        let later = || Tensor::<2, Bool>::tril_mask([s, t], before, device).unsqueeze::<3>();
        match &self.padding {
            None if s == 1 => None,
            None => Some(later()),
            Some(padding) => {
                let padding = padding.clone().unsqueeze_dim::<3>(1);
                let others = Tensor::<2, Bool>::diag_mask([s, t], before, device).unsqueeze::<3>();
                let shape = [padding.dims()[0], s, t];
                Some(later().expand(shape).bool_or(padding.expand(shape).bool_and(others.expand(shape))))
            }
        }
    }
}

/// Negative infinity where a key is hidden, else 0. `[b, s, t]` to `[b, 1, 1, s, t]`.
fn bias_of(hidden: Tensor<3, Bool>) -> Tensor<5> {
    let zeros = Tensor::<3>::zeros(hidden.dims(), (&hidden.device(), DType::F32));
    zeros.mask_fill(hidden, f32::NEG_INFINITY).unsqueeze_dims(&[1, 1])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::values;

    fn tokens<const B: usize>(rows: [[bool; 3]; B]) -> Tensor<2, Bool> {
        Tensor::from_data(rows, &Device::flex())
    }

    #[test]
    fn the_bias_hides_the_future_and_padding_but_never_a_position_itself() {
        let device = Device::flex();
        let mask = CausalMask::new(3, 3).with_tokens(tokens([[false, true, true], [true, true, false]]));
        let bias = mask.bias(&device).unwrap().clone();
        assert_eq!(bias.dims(), [2, 1, 1, 3, 3]);
        let seen: Vec<bool> = values(bias).iter().map(|value| *value == 0.0).collect();
        let expected = [
            [[true, false, false], [false, true, false], [false, true, true]],
            [[true, false, false], [true, true, false], [true, true, true]],
        ];
        assert_eq!(seen, expected.concat().concat());
        let causal = values(CausalMask::new(2, 2).bias(&device).unwrap().clone());
        assert_eq!(causal, [0.0, f32::NEG_INFINITY, 0.0, 0.0]);
    }

    #[test]
    fn queries_are_the_last_positions() {
        let device = Device::flex();
        assert!(CausalMask::new(1, 1).bias(&device).is_none());
        assert!(CausalMask::new(1, 7).bias(&device).is_none());
        let two = values(CausalMask::new(2, 4).bias(&device).unwrap().clone());
        assert_eq!(two, [0.0, 0.0, 0.0, f32::NEG_INFINITY, 0.0, 0.0, 0.0, 0.0]);
        let one = CausalMask::new(1, 3).with_tokens(tokens([[false, false, true], [false, true, false]]));
        let hidden = f32::NEG_INFINITY;
        let one = values(one.bias(&device).unwrap().clone());
        assert_eq!(one, [hidden, hidden, 0.0, hidden, 0.0, 0.0]);
    }
}
