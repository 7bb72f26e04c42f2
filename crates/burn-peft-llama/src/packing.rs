//! The tokens of a batch in one row.

use std::collections::HashMap;

use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_peft_ops::TokenTree;

/// How the tokens of a batch lie while the model computes with them.
///
/// Loss and gradients are the same but for rounding, without dropout. In f32, on two trained models with fresh adapters,
/// gradients differ by 7e-7 to 7e-6 of the largest; padded rows are as far from f64. What differs is how much there is to
/// compute. A batch that would have less than a tenth fewer tokens stays padded.
///
/// Models of other crates, and [`LlamaForCausalLm`](crate::LlamaForCausalLm) for rows that name their adapters, read the
/// padded tensors of a [`Batch`](crate::Batch), whatever this says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Packing {
    /// Each example has a row, and short rows are filled up.
    Padded,
    /// One row has the examples one behind another, each with positions of its own and blind for the others (TRL's
    /// `padding_free`): there is no padding.
    Packed,
    /// As `Packed`, and examples that begin alike share what they begin with, such as a system text: it is computed once,
    /// forward and backward. It is found in each batch by itself.
    ///
    /// With `lora_dropout`, the shared part gets one dropout mask, where every row would have had its own.
    #[default]
    SharedPrefix,
}

/// The tokens of a batch in one row, without padding: see [`Packing`].
#[derive(Clone, Debug)]
pub struct PackedBatch {
    /// Token ids, `[1, n]`.
    pub input_ids: Tensor<2, Int>,
    /// Which token each of them stands behind.
    pub tree: TokenTree,
    /// [`Batch::positions`](crate::Batch::positions) in this row, `[num_targets]`. Examples may share one.
    pub positions: Tensor<1, Int>,
}

impl PackedBatch {
    /// Moves the tokens to `device`.
    pub(crate) fn on_device(self, device: &Device) -> Self {
        let Self { input_ids, tree, positions } = self;
        Self { input_ids: input_ids.to_device(device), tree, positions: positions.to_device(device) }
    }
}

/// Whether one row of so many tokens is worth the shorter products of attention, instead of `[b, s]` padded ones.
pub(crate) fn pays(tokens: usize, [b, s]: [usize; 2]) -> bool {
    10 * tokens <= 9 * b * s
}

/// Sequences on their way into one row.
#[derive(Default)]
pub(crate) struct Row {
    shares: bool,
    ids: Vec<u32>,
    /// The token that each stands behind.
    behind: Vec<Option<usize>>,
    /// The token with this id behind another, if sequences share.
    places: HashMap<(Option<usize>, u32), usize>,
}

impl Row {
    pub(crate) fn new(packing: Packing) -> Self {
        Self { shares: packing == Packing::SharedPrefix, ..Self::default() }
    }

    /// Adds a sequence, and says where its tokens are.
    pub(crate) fn add(&mut self, ids: &[u32]) -> Vec<usize> {
        let mut behind = None;
        let place = |&id: &u32| {
            let next = self.ids.len();
            let place = if self.shares { *self.places.entry((behind, id)).or_insert(next) } else { next };
            if place == next {
                self.ids.push(id);
                self.behind.push(behind);
            }
            behind = Some(place);
            place
        };
        ids.iter().map(place).collect()
    }

    /// Number of tokens.
    pub(crate) fn len(&self) -> usize {
        self.ids.len()
    }

    /// With the places of the positions that predict a label.
    pub(crate) fn packed(&self, positions: Vec<usize>, device: &Device) -> PackedBatch {
        let upload = |numbers: Vec<i64>| {
            let count = numbers.len();
            Tensor::<1, Int>::from_data(TensorData::new(numbers, [count]), device)
        };
        PackedBatch {
            input_ids: upload(self.ids.iter().map(|&id| i64::from(id)).collect()).unsqueeze(),
            tree: TokenTree::new(&self.behind),
            positions: upload(positions.into_iter().map(|position| position as i64).collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use burn_peft::{LoraConfig, PeftModel, TargetModules};

    use super::*;
    use crate::batch::{Batch, Collator, PaddingSide};
    use crate::conversation::Example;
    use crate::model::LlamaForCausalLm;
    use crate::testing::{add_drawn_adapter, deviation, in_f64, model, results, values};

    /// A system text of 70 tokens that all share; further tokens that two share; a label that is the same in two rows, and
    /// one in the middle of what others share; a row that begins otherwise.
    fn examples() -> Vec<Example> {
        let system: Vec<u32> = (0..70).map(|i| (i * 7 + i / 5) % 13).collect();
        let example = |end: &[u32], labelled: usize| {
            let input_ids = [&system, end].concat();
            let label = |(i, &id): (usize, &u32)| {
                if i + labelled >= input_ids.len() { i64::from(id) } else { -100 }
            };
            let labels = input_ids.iter().enumerate().map(label).collect();
            Example { input_ids, labels }
        };
        let mut all =
            vec![example(&[1, 2, 3, 4], 2), example(&[1, 2, 5], 2), example(&[1, 2], 6), example(&[9], 1)];
        all.push(Example { input_ids: vec![5, 6, 7], labels: vec![-100, 6, 7] });
        all.push(all[0].clone());
        all
    }

    fn batch(packing: Packing, side: PaddingSide, device: &Device) -> Batch {
        Collator::new(0).with_packing(packing).with_side(side).collate(&examples(), device).unwrap()
    }

    #[test]
    fn loss_and_gradients_are_those_of_padded_rows() {
        // The test needs f64, which a GPU may lack.
        let plain = Device::flex().autodiff();
        for device in [plain.clone(), plain.gradient_checkpointing()] {
            for (tied, is_adapted) in [(true, true), (false, true), (false, false)] {
                let mut model = model(&device, tied);
                if is_adapted {
                    let config = LoraConfig::new(2).with_target_modules(TargetModules::AllLinear);
                    add_drawn_adapter(&mut model, "default", &config);
                }
                let wide = in_f64(&model);
                // A loss would be computed in f32.
                let squares =
                    |model: &LlamaForCausalLm, batch: &Batch| model.labelled(batch).hidden.square().sum();
                let padded = batch(Packing::Padded, PaddingSide::Right, &device);
                let expected = results(squares, &wide, &padded);
                let expected_of_loss = results(LlamaForCausalLm::loss, &model, &padded);
                assert!(expected[1].iter().filter(|gradient| gradient.abs() > 1e-3).count() > 100);
                for (packing, tokens) in [(Packing::Packed, 367), (Packing::SharedPrefix, 79)] {
                    let batch = batch(packing, PaddingSide::Right, &device);
                    assert_eq!(batch.packed.as_ref().unwrap().tree.len(), tokens);
                    let found = results(squares, &wide, &batch);
                    let found_of_loss = results(LlamaForCausalLm::loss, &model, &batch);
                    let case = format!("{packing:?}, tied: {tied}, adapted: {is_adapted}");
                    for (found, expected) in found.iter().zip(&expected) {
                        let off = deviation(found, expected);
                        assert!(off < 1e-12, "{case}: {off:e}");
                    }
                    // In f32, this model is 1e-5 off f64 with padded rows as well: its weights are large.
                    for (found, expected) in found_of_loss.iter().zip(&expected_of_loss) {
                        let off = deviation(found, expected);
                        assert!(off < 2e-4, "{case}: {off:e}");
                    }
                }
            }
        }
    }

    #[test]
    fn rows_that_name_their_adapters_stay_rows() {
        let device = Device::default();
        let mut model = model(&device, false);
        let config = LoraConfig::new(2).with_target_modules(["q_proj", "lm_head"]);
        add_drawn_adapter(&mut model, "one", &config);
        let rows = [Some("one"), None, Some("one"), None, None, Some("one")];
        let model = model.for_rows(&rows).unwrap();
        let loss = |packing| values(model.loss(&batch(packing, PaddingSide::Right, &device)));
        assert_eq!(loss(Packing::SharedPrefix), loss(Packing::Padded));
    }

    #[test]
    fn sequences_share_what_they_begin_with_and_nothing_behind_it() {
        let sequences: [&[u32]; 5] = [&[1, 2, 3, 4], &[1, 2, 5, 4], &[6, 2, 3], &[1, 2], &[1, 2, 5, 7]];
        let mut row = Row::new(Packing::SharedPrefix);
        let places = sequences.map(|ids| row.add(ids));
        assert_eq!(row.ids, [1, 2, 3, 4, 5, 4, 6, 2, 3, 7]);
        assert_eq!(places[1], [0, 1, 4, 5]);
        assert_eq!((&*places[3], &*places[4]), (&[0, 1][..], &[0, 1, 4, 9][..]));
        for (places, ids) in places.iter().zip(sequences) {
            assert!(places.iter().map(|&place| row.ids[place]).eq(ids.iter().copied()));
            let expected = std::iter::once(None).chain(places.iter().map(|&place| Some(place)));
            assert!(places.iter().map(|&place| row.behind[place]).eq(expected.take(places.len())));
        }

        let mut row = Row::new(Packing::Packed);
        let places = sequences.map(|ids| row.add(ids));
        assert_eq!(row.ids, sequences.concat());
        assert_eq!(places.concat(), (0..17).collect::<Vec<_>>());
    }
}
