//! Examples to tensors: padding, the attention mask and the labelled positions.

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};

use crate::conversation::{Example, IGNORE_INDEX};
use crate::error::LlamaError;
use crate::packing::{PackedBatch, Packing, Row, pays};

/// A padded batch of token sequences together with the positions the loss is computed at.
///
/// `b` is the number of sequences, `s` the length of the longest one, `n` the number of labelled tokens.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Token ids, `[b, s]`.
    pub input_ids: Tensor<2, Int>,
    /// `true` where `input_ids` holds a token of the example and `false` where it holds padding, `[b, s]`.
    pub attention_mask: Tensor<2, Bool>,
    /// The side that padding is on. On the right, attention needs no mask for it: no token sees what comes after it.
    pub padding_side: PaddingSide,
    /// Index into the flattened `[b * s]` positions of each position that *predicts* a labelled token,
    /// ascending, `[n]`. Position `i` of a sequence predicts token `i + 1`.
    pub positions: Tensor<1, Int>,
    /// The labelled tokens, in the order of `positions`, `[n]`.
    pub targets: Tensor<1, Int>,
    /// The same tokens in one row, if that has a tenth less of them, and nobody wished otherwise ([`Packing`]).
    pub packed: Option<PackedBatch>,
    /// Number of tokens that are not padding.
    pub num_tokens: usize,
    /// Number of labelled tokens, `n`. Weight the mean loss by it when batches are combined.
    pub num_targets: usize,
}

impl Batch {
    /// Number of sequences and padded length, `[b, s]`.
    pub fn shape(&self) -> [usize; 2] {
        self.input_ids.dims()
    }

    /// Moves the batch to `device`.
    pub fn to_device(self, device: &Device) -> Self {
        Self {
            input_ids: self.input_ids.to_device(device),
            attention_mask: self.attention_mask.to_device(device),
            positions: self.positions.to_device(device),
            targets: self.targets.to_device(device),
            packed: self.packed.map(|packed| packed.on_device(device)),
            ..self
        }
    }
}

/// The side of a sequence that padding is put on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PaddingSide {
    /// After the sequence: the convention for training.
    #[default]
    Right,
    /// Before the sequence: the convention for generation, where the last position must be a token.
    Left,
}

/// Turns [`Example`]s into a padded [`Batch`].
///
/// Which tokens are labelled is read from the examples and never from the token ids, so a model whose padding
/// token is also its end token (`pad_token_id == eos_token_id`) keeps its end tokens labelled.
///
/// ```
/// use burn::tensor::Device;
/// use burn_peft_llama::{Collator, Example};
///
/// # fn main() -> Result<(), burn_peft_llama::LlamaError> {
/// let examples = [
///     Example { input_ids: vec![5, 6, 2], labels: vec![-100, 6, 2] },
///     Example { input_ids: vec![7, 2], labels: vec![-100, 2] },
/// ];
/// let batch = Collator::new(2).collate(&examples, &Device::flex())?;
/// assert_eq!(batch.shape(), [2, 3]);
/// assert_eq!(batch.positions.to_data().iter::<i64>().collect::<Vec<_>>(), [0, 1, 3]);
/// assert_eq!(batch.targets.to_data().iter::<i64>().collect::<Vec<_>>(), [6, 2, 2]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collator {
    /// Token id that padding is filled with. Padding is masked, so any id of the vocabulary will do.
    pub pad_token_id: u32,
    /// Side that padding is put on. Default: [`PaddingSide::Right`].
    pub side: PaddingSide,
    /// Longest sequence that is accepted, in tokens. Default: `None`, no limit.
    pub max_length: Option<usize>,
    /// Whether a sequence longer than `max_length` loses its end instead of being an error. Default: `false`.
    pub truncate: bool,
    /// How the tokens lie while the model computes with them. Default: [`Packing::SharedPrefix`].
    pub packing: Packing,
}

impl Collator {
    /// A collator that pads on the right with `pad_token_id` and accepts sequences of any length.
    pub fn new(pad_token_id: u32) -> Self {
        Self {
            pad_token_id,
            side: PaddingSide::Right,
            max_length: None,
            truncate: false,
            packing: Packing::default(),
        }
    }

    /// Sets the side that padding is put on.
    pub fn with_side(mut self, side: PaddingSide) -> Self {
        self.side = side;
        self
    }

    /// Sets how the tokens lie while the model computes with them.
    pub fn with_packing(mut self, packing: Packing) -> Self {
        self.packing = packing;
        self
    }

    /// Makes sequences of more than `max_length` tokens an error.
    pub fn with_max_length(mut self, max_length: usize) -> Self {
        self.max_length = Some(max_length);
        self.truncate = false;
        self
    }

    /// Cuts sequences after `max_length` tokens. An example that loses all its labels this way is an error.
    pub fn with_truncation(mut self, max_length: usize) -> Self {
        self.max_length = Some(max_length);
        self.truncate = true;
        self
    }

    /// Pads `examples` to their longest and finds the labelled positions.
    ///
    /// The first token of an example has no position that predicts it: its label is dropped, on either side of padding.
    /// transformers drops it where nothing stands before the example; with padding on the left, it counts it, as if the
    /// padding predicted it.
    ///
    /// # Errors
    /// - [`LlamaError::EmptyBatch`] for no examples,
    /// - [`LlamaError::LabelCount`] if an example's label and token counts differ,
    /// - [`LlamaError::InvalidLabel`] for a negative label other than [`IGNORE_INDEX`],
    /// - [`LlamaError::SequenceTooLong`] for more than `max_length` tokens without truncation,
    /// - [`LlamaError::NoLabels`] for an example without a token to learn.
    pub fn collate(&self, examples: &[Example], device: &Device) -> Result<Batch, LlamaError> {
        if examples.is_empty() {
            return Err(LlamaError::EmptyBatch);
        }
        for (index, example) in examples.iter().enumerate() {
            self.check(index, example)?;
        }
        let length = |example: &Example| self.kept(example);
        let (b, s) = (examples.len(), examples.iter().map(length).max().unwrap_or(0));

        let mut input_ids = vec![i64::from(self.pad_token_id); b * s];
        let mut mask = vec![false; b * s];
        let (mut positions, mut targets) = (vec![], vec![]);
        let (mut one_row, mut packed_positions) = (Row::new(self.packing), vec![]);
        let mut num_tokens = 0;
        for (row, example) in examples.iter().enumerate() {
            let kept = length(example);
            let start = row * s
                + match self.side {
                    PaddingSide::Right => 0,
                    PaddingSide::Left => s - kept,
                };
            num_tokens += kept;
            let places = one_row.add(&example.input_ids[..kept]);
            for (i, &id) in example.input_ids[..kept].iter().enumerate() {
                input_ids[start + i] = i64::from(id);
                mask[start + i] = true;
            }
            for (i, &label) in example.labels[..kept].iter().enumerate().skip(1) {
                if label != IGNORE_INDEX {
                    positions.push((start + i - 1) as i64);
                    packed_positions.push(places[i - 1]);
                    targets.push(label);
                }
            }
        }

        let n = targets.len();
        let pays = self.packing != Packing::Padded && pays(one_row.len(), [b, s]);
        Ok(Batch {
            input_ids: Tensor::from_data(TensorData::new(input_ids, [b, s]), device),
            attention_mask: Tensor::from_data(TensorData::new(mask, [b, s]), device),
            padding_side: self.side,
            positions: Tensor::from_data(TensorData::new(positions, [n]), device),
            targets: Tensor::from_data(TensorData::new(targets, [n]), device),
            packed: pays.then(|| one_row.packed(packed_positions, device)),
            num_tokens,
            num_targets: n,
        })
    }

    /// Checks one example as [`collate`](Self::collate) does; `index` is its number in error messages.
    pub(crate) fn check(&self, index: usize, example: &Example) -> Result<(), LlamaError> {
        let (tokens, labels) = (example.input_ids.len(), example.labels.len());
        if tokens != labels {
            return Err(LlamaError::LabelCount { index, tokens, labels });
        }
        if let Some(max_length) = self.max_length.filter(|&max| tokens > max && !self.truncate) {
            return Err(LlamaError::SequenceTooLong { index, length: tokens, max_length });
        }
        if let Some(&label) = example.labels.iter().find(|&&label| label < 0 && label != IGNORE_INDEX) {
            return Err(LlamaError::InvalidLabel { index, label });
        }
        let labelled = &example.labels[..self.kept(example)];
        if !labelled.iter().skip(1).any(|&label| label != IGNORE_INDEX) {
            return Err(LlamaError::NoLabels { index });
        }
        Ok(())
    }

    /// Number of tokens of `example` that remain after truncation.
    pub(crate) fn kept(&self, example: &Example) -> usize {
        example.input_ids.len().min(self.max_length.unwrap_or(usize::MAX))
    }
}

/// Collates for Burn's data loaders.
///
/// # Panics
/// `batch` panics where [`Collator::collate`] returns an error, because Burn's trait has no way to return one.
/// Check the examples once with `collate` before handing them to a data loader.
#[cfg(feature = "train")]
impl burn::data::dataloader::batcher::Batcher<Example, Batch> for Collator {
    #[allow(clippy::panic, reason = "the trait has no error to return")]
    fn batch(&self, items: Vec<Example>, device: &Device) -> Batch {
        match self.collate(&items, device) {
            Ok(batch) => batch,
            Err(error) => panic!("{error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(ids: &[u32], labels: &[i64]) -> Example {
        Example { input_ids: ids.to_vec(), labels: labels.to_vec() }
    }

    fn ints<const D: usize>(tensor: &Tensor<D, Int>) -> Vec<i64> {
        tensor.to_data().iter::<i64>().collect()
    }

    fn bools(tensor: &Tensor<2, Bool>) -> Vec<bool> {
        tensor.to_data().iter::<bool>().collect()
    }

    fn two() -> [Example; 2] {
        [example(&[5, 6, 2, 2], &[-100, -100, 2, 2]), example(&[7, 9], &[-100, 9])]
    }

    #[test]
    fn right_padding_masks_the_end_and_keeps_labels_equal_to_the_padding_token() {
        let batch = Collator::new(2).collate(&two(), &Device::default()).unwrap();
        assert_eq!(ints(&batch.input_ids), [5, 6, 2, 2, 7, 9, 2, 2]);
        assert_eq!(bools(&batch.attention_mask), [true, true, true, true, true, true, false, false]);
        assert_eq!(ints(&batch.positions), [1, 2, 4]);
        assert_eq!(ints(&batch.targets), [2, 2, 9]);
        assert_eq!((batch.num_tokens, batch.num_targets), (6, 3));
        let packed = batch.packed.unwrap();
        assert_eq!(ints(&packed.input_ids), [5, 6, 2, 2, 7, 9]);
        assert_eq!(ints(&packed.positions), [1, 2, 4]);
    }

    #[test]
    fn what_is_shared_is_there_once_and_where_nothing_is_gained_rows_stay() {
        let rows = [example(&[5, 6, 7], &[-100, 6, 7]), example(&[5, 6, 8], &[-100, 6, 8])];
        let of = |packing| {
            let collator = Collator::new(0).with_side(PaddingSide::Left).with_packing(packing);
            let batch = collator.collate(&rows, &Device::default()).unwrap();
            batch.packed
        };
        let shared = of(Packing::SharedPrefix).unwrap();
        assert_eq!(ints(&shared.input_ids), [5, 6, 7, 8]);
        assert_eq!(ints(&shared.positions), [0, 1, 0, 1]);
        assert!(of(Packing::Packed).is_none() && of(Packing::Padded).is_none());
    }

    #[test]
    fn left_padding_moves_the_positions_with_the_tokens() {
        let collator = Collator::new(0).with_side(PaddingSide::Left);
        let batch = collator.collate(&two(), &Device::default()).unwrap();
        assert_eq!(ints(&batch.input_ids), [5, 6, 2, 2, 0, 0, 7, 9]);
        assert_eq!(bools(&batch.attention_mask)[4..], [false, false, true, true]);
        assert_eq!(ints(&batch.positions), [1, 2, 6]);
        assert_eq!(ints(&batch.targets), [2, 2, 9]);
    }

    #[test]
    fn a_label_of_the_first_token_is_dropped_and_does_not_leak_into_the_row_before() {
        let rows = [example(&[3, 4], &[3, 4]), example(&[5, 6], &[5, 6])];
        let batch = Collator::new(0).collate(&rows, &Device::default()).unwrap();
        assert_eq!(ints(&batch.positions), [0, 2]);
        assert_eq!(ints(&batch.targets), [4, 6]);
    }

    #[test]
    fn truncation_keeps_the_start() {
        let rows = [example(&[1, 2, 3, 4], &[-100, 2, 3, 4])];
        let batch = Collator::new(0).with_truncation(3).collate(&rows, &Device::default()).unwrap();
        assert_eq!(ints(&batch.input_ids), [1, 2, 3]);
        assert_eq!(ints(&batch.targets), [2, 3]);
    }

    #[test]
    fn what_cannot_be_learnt_from_is_an_error_that_names_the_example() {
        let device = Device::default();
        let good = example(&[1, 2], &[-100, 2]);
        let collate =
            |collator: Collator, bad: Example| collator.collate(&[good.clone(), bad], &device).unwrap_err();
        assert!(matches!(Collator::new(0).collate(&[], &device), Err(LlamaError::EmptyBatch)));
        assert!(matches!(
            collate(Collator::new(0), example(&[1, 2], &[-100])),
            LlamaError::LabelCount { index: 1, tokens: 2, labels: 1 }
        ));
        assert!(matches!(
            collate(Collator::new(0), example(&[1, 2], &[-100, -1])),
            LlamaError::InvalidLabel { index: 1, label: -1 }
        ));
        assert!(matches!(
            collate(Collator::new(0), example(&[1, 2], &[1, -100])),
            LlamaError::NoLabels { index: 1 }
        ));
        assert!(matches!(collate(Collator::new(0), example(&[], &[])), LlamaError::NoLabels { index: 1 }));
        assert!(matches!(
            collate(Collator::new(0).with_max_length(2), example(&[1, 2, 3], &[-100, 2, 3])),
            LlamaError::SequenceTooLong { index: 1, length: 3, max_length: 2 }
        ));
        assert!(matches!(
            collate(Collator::new(0).with_truncation(2), example(&[1, 2, 3], &[-100, -100, 3])),
            LlamaError::NoLabels { index: 1 }
        ));
    }

    #[cfg(feature = "train")]
    #[test]
    fn the_batcher_gives_what_collate_gives() {
        use burn::data::dataloader::batcher::Batcher;
        let device = Device::default();
        let batch: Batch = Collator::new(2).batch(two().to_vec(), &device);
        assert_eq!(ints(&batch.positions), [1, 2, 4]);
    }
}
