//! The output layer: from hidden states to logits.

use burn::tensor::{Int, Tensor};
use burn_peft::{LoraEmbedding, LoraLinear, PeftModel};
use burn_peft_ops::in_full_precision;

use crate::parameters::trained_numbers;

/// The output layer of a model.
#[derive(Clone, Copy)]
pub(crate) enum Head<'a> {
    /// The table of the embedding.
    Tied(&'a LoraEmbedding),
    /// A layer of its own.
    Own(&'a LoraLinear),
}

/// Hidden states at some positions of a batch.
#[derive(Clone)]
pub(crate) struct Picked {
    /// `[n, hidden_size]`
    pub(crate) hidden: Tensor<2>,
    /// The sequence that each of them belongs to, `[n]`.
    pub(crate) rows: Tensor<1, Int>,
}

impl Picked {
    /// Those from `start` on, `count` of them.
    pub(crate) fn narrow(&self, start: usize, count: usize) -> Self {
        Self {
            hidden: self.hidden.clone().narrow(0, start, count),
            rows: self.rows.clone().narrow(0, start, count),
        }
    }
}

impl Head<'_> {
    /// `[.., hidden_size]` to `[.., vocab_size]`.
    pub(crate) fn logits<const D: usize>(self, hidden: Tensor<D>) -> Tensor<D> {
        in_full_precision(|| match self {
            Self::Own(layer) => layer.forward(hidden),
            Self::Tied(embedding) => {
                let mut shape = hidden.dims();
                let [vocab_size, d] = embedding.weight.base().dims();
                let n: usize = shape[..D - 1].iter().product();
                shape[D - 1] = vocab_size;
                embedding.tied_output(hidden.reshape([n, d])).reshape(shape)
            }
        })
    }

    /// The logits of hidden states that were picked from a batch. `[n, vocab_size]`
    pub(crate) fn logits_of(self, picked: Picked) -> Tensor<2> {
        match self {
            Self::Own(layer) => in_full_precision(|| layer.forward_rows(picked.hidden, &picked.rows)),
            Self::Tied(_) => self.logits(picked.hidden),
        }
    }

    /// How many numbers of the layer are trained.
    pub(crate) fn trained_numbers(self) -> usize {
        match self {
            Self::Own(layer) => trained_numbers(layer),
            Self::Tied(embedding) if embedding.trains_tied_output() => trained_numbers(embedding),
            Self::Tied(_) => 0,
        }
    }

    /// Whether a parameter of the layer requires a gradient.
    pub(crate) fn is_trained(self) -> bool {
        self.trained_numbers() > 0
    }

    /// The weight that the layer multiplies with, without a graph, `[hidden_size, vocab_size]`; `None` if something in
    /// the layer is trained, or if it computes with more than one weight because rows of the batch name their adapters.
    pub(crate) fn frozen_weight(self) -> Option<Tensor<2>> {
        if self.is_trained() {
            return None;
        }
        match self {
            Self::Own(layer) if layer.batch_rows().is_some() => None,
            // With all active adapters, merged or not.
            Self::Own(layer) => Some(dense(layer.weight.val().inner())),
            Self::Tied(embedding) => Some(dense(embedding.weight.base().inner()).transpose()),
        }
    }
}

/// The numbers that a quantized weight stands for.
fn dense(weight: Tensor<2>) -> Tensor<2> {
    if weight.dtype().is_float() { weight } else { weight.dequantize() }
}
