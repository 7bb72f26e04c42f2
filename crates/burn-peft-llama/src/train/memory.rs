//! How much memory a training needs, before it has any.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use burn::tensor::{DType, FloatDType};
use burn_peft::PeftModel;
use burn_peft_ops::{WIDENED_AT_ONCE, has_kernels};

use crate::batch::Collator;
use crate::config::LlamaConfig;
use crate::conversation::Example;
use crate::gradient_checkpointing::has_dropout;
use crate::loss::{CHUNK, keeps_no_logits};
use crate::model::LlamaForCausalLm;
use crate::packing::{Packing, pays};
use crate::parameters::{Parameter, parameters};

/// What the graph keeps about the operations of a block, beside their tensors.
const GRAPH: usize = 116_000;

/// The memory of a training on the CPU at its peak, in bytes, estimated from the model and the largest batch. What the
/// program itself takes is not part of it.
///
/// The formulas count the tensors that Burn 0.22's autodiff keeps between the forward and the backward pass of this crate's
/// LLaMA. For LoRA, they are within 5 % of the bytes that are allocated; with gradient accumulation, the gradients come on
/// top. DoRA keeps more, and so does, without the kernels of `burn_peft_ops`, a base in 16 bits, whose activations are cast
/// for adapters in f32.
/// Each thread of the CPU has buffers of its own, which are not part of it either: they matter if the model is small and the
/// threads are many.
/// Allocators, kernels of GPUs and their memory pools need more.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// The parameters that are not trained.
    pub weights: usize,
    /// The parameters that are trained.
    pub trained: usize,
    /// The gradients of those. Twice with gradient checkpointing: those that the loss has ready, and those that `backward`
    /// makes of them.
    pub gradients: usize,
    /// The two moments of AdamW.
    pub optimizer: usize,
    /// What the forward pass keeps for the backward pass.
    pub activations: usize,
    /// What is needed at the height of that: logits and their gradient, or temporary results of a layer.
    pub temporary: usize,
}

impl MemoryEstimate {
    /// Of a training of `model`, whose base has the type `dtype`, on batches of `batch_size` of the `examples`.
    ///
    /// No step is made: the shapes of the parameters tell.
    pub fn new(
        model: &LlamaForCausalLm,
        dtype: FloatDType,
        examples: &[Example],
        collator: &Collator,
        batch_size: usize,
    ) -> Self {
        // Batches are of examples of like length, so the longest may well be together. They share what all examples begin with;
        // two of them may have more in common.
        let mut lengths: Vec<(usize, usize)> =
            examples.iter().map(|of| (collator.kept(of), of.num_targets())).collect();
        lengths.sort_unstable_by(|one, other| other.cmp(one));
        lengths.truncate(batch_size);
        let shared = match collator.packing {
            Packing::SharedPrefix => common_prefix(examples).min(lengths.last().map_or(0, |last| last.0)),
            Packing::Packed | Packing::Padded => 0,
        };
        let (sequences, length) = (lengths.len(), lengths.first().map_or(0, |longest| longest.0));
        let packed = shared + lengths.iter().map(|(length, _)| length - shared).sum::<usize>();
        let is_packed = collator.packing != Packing::Padded && pays(packed, [sequences, length]);
        let batch = Positions {
            count: if is_packed { packed } else { sequences * length },
            sequences,
            length,
            labelled: lengths.iter().map(|length| length.1).sum(),
        };
        Self::of_positions(model, dtype, batch)
    }

    /// As [`new`](Self::new), on padded batches of `[sequences, tokens]` with so many labelled tokens.
    pub fn of_batch(
        model: &LlamaForCausalLm,
        dtype: FloatDType,
        [sequences, length]: [usize; 2],
        labelled: usize,
    ) -> Self {
        let batch = Positions { count: sequences * length, sequences, length, labelled };
        Self::of_positions(model, dtype, batch)
    }

    fn of_positions(model: &LlamaForCausalLm, dtype: FloatDType, batch: Positions) -> Self {
        let of_weights = DType::from(dtype).size();
        // Kernels compute in f32 with weights in 16 bits.
        let has_kernels = has_kernels(&model.model.embed_tokens.weight.base());
        let element = if has_kernels { of_weights.max(DType::F32.size()) } else { of_weights };
        let parameters = parameters(model);
        let size = |parameter: &Parameter| {
            let element = if parameter.adapter { parameter.dtype.size() } else { of_weights };
            parameter.shape.iter().product::<usize>() * element
        };
        let bytes = |is: fn(&Parameter) -> bool| -> usize {
            parameters.iter().filter(|parameter| is(parameter)).map(size).sum()
        };
        let config = model.config();
        let trained = bytes(|parameter| parameter.is_trained());
        let blocks = Adapted::of_blocks(model, &parameters);
        let (d, f) = (config.hidden_size, config.intermediate_size);
        let head = model.head();
        let in_chunk = (CHUNK / config.vocab_size).max(1).min(batch.labelled);
        let logits = in_chunk * config.vocab_size;
        // Logits in f32, which kernels turn into their gradient in place; a layer that is trained keeps that for its own, which
        // is added up with those of further chunks.
        let of_head = match head.trained_numbers() {
            0 => logits,
            of_layer if keeps_no_logits(head, batch.labelled, config.vocab_size) => {
                let further = in_chunk.min(batch.labelled - in_chunk) * config.vocab_size;
                (2 * logits).max(2 * further + of_layer).max(further + 2 * of_layer)
            }
            _ => logits + batch.labelled * config.vocab_size,
        };
        let of_logits = 4 * (of_head + if has_kernels { 0 } else { logits });
        // A part of a weight in 16 bits, while a product reads it.
        let widened = if of_weights < element {
            WIDENED_AT_ONCE.min(d * f.max(config.vocab_size)) * element
        } else {
            0
        };
        let each = blocks.iter().map(|block| block.activations(config, batch, element, has_kernels));
        let activations = match model.is_gradient_checkpointing() {
            // The inputs of the blocks, and one block with its output, the gradient of that, and their product.
            true => (blocks.len() + 3) * batch.count * d * element + each.max().unwrap_or(0),
            false => each.sum(),
        };
        Self {
            weights: bytes(|parameter| !parameter.is_trained()),
            trained,
            gradients: if model.is_gradient_checkpointing() { 2 * trained } else { trained },
            optimizer: 2 * trained,
            activations,
            // The gradients of the feed-forward layer, or the logits.
            temporary: widened + (batch.count * element * (2 * f).max(3 * d)).max(of_logits),
        }
    }

    /// All of it together. Gradients take the place of activations, layer by layer, so the larger counts.
    pub fn total(&self) -> usize {
        let Self { weights, trained, gradients, optimizer, activations, temporary } = *self;
        weights + trained + optimizer + (activations + temporary).max(gradients)
    }
}

/// How many tokens all examples begin with in common.
fn common_prefix(examples: &[Example]) -> usize {
    let [first, others @ ..] = examples else { return 0 };
    let common = |a: &[u32], b: &[u32]| a.iter().zip(b).take_while(|(a, b)| a == b).count();
    others
        .iter()
        .fold(first.input_ids.len(), |prefix, other| common(&first.input_ids[..prefix], &other.input_ids))
}

/// The positions of a batch.
#[derive(Clone, Copy)]
struct Positions {
    /// Those that are computed.
    count: usize,
    sequences: usize,
    /// Tokens of the longest.
    length: usize,
    labelled: usize,
}

impl Positions {
    /// Whether they lie in one row, without padding.
    fn are_packed(self) -> bool {
        self.count < self.sequences * self.length
    }
}

/// What is trained in a block.
#[derive(Default)]
struct Adapted {
    /// The modules, by the last part of their name.
    modules: BTreeSet<String>,
    /// The ranks of all their factors.
    ranks: usize,
    has_dropout: bool,
}

impl Adapted {
    /// Of each block that needs a graph: those above the first that is trained.
    fn of_blocks(model: &LlamaForCausalLm, parameters: &[Parameter]) -> Vec<Self> {
        let count = model.config().num_hidden_layers;
        let mut blocks: BTreeMap<usize, Self> = BTreeMap::new();
        let mut first = count;
        for parameter in parameters.iter().filter(|parameter| parameter.is_trained()) {
            let Some(rest) = parameter.name.strip_prefix("model.layers.") else {
                // What stands below the blocks needs a graph through all of them.
                if parameter.name.starts_with("model.embed_tokens") {
                    first = 0;
                }
                continue;
            };
            let mut parts = rest.split('.');
            let Some(block) = parts.next().and_then(|block| block.parse::<usize>().ok()) else { continue };
            first = first.min(block);
            let of = blocks.entry(block).or_default();
            let module = parts.find(|part| part.ends_with("_proj") || part.ends_with("norm"));
            of.modules.extend(module.map(str::to_string));
            if parameter.name.ends_with(".a") {
                of.ranks += parameter.shape.iter().copied().min().unwrap_or(0);
            }
        }
        let has_dropout = has_dropout(&model.adapters());
        let block = |i| Self { has_dropout, ..blocks.remove(&i).unwrap_or_default() };
        (first..count).map(block).collect()
    }

    /// Bytes that the forward pass of the block keeps: see `burn_peft_ops` for what each operation does.
    fn activations(
        &self,
        config: &LlamaConfig,
        batch: Positions,
        element: usize,
        has_kernels: bool,
    ) -> usize {
        let (d, f, h) = (config.hidden_size, config.intermediate_size, config.num_attention_heads);
        let (q, kv) = (h * config.head_dim, config.num_key_value_heads * config.head_dim);
        let count = |names: &[&str]| names.iter().filter(|name| self.modules.contains(**name)).count();
        // The inputs of what is trained: one tensor for all that read it, or with composed dropout one for each.
        let inputs = [
            (d, count(&["q_proj", "k_proj", "v_proj"])),
            (q, count(&["o_proj"])),
            (d, count(&["gate_proj", "up_proj"])),
            (f, count(&["down_proj"])),
        ];
        let kept = |(width, modules): &(usize, usize)| match self.has_dropout && !has_kernels {
            true => width * modules * element,
            false => width * element * (*modules).min(1),
        };
        let inputs: usize = inputs.iter().map(kept).sum();
        // The inputs of both norms, queries, keys and values, gate and up.
        let own = (2 * d + q + 2 * kv + 2 * f) * element;
        let own = match has_kernels {
            // And a number for each row of a norm, two for each row of scores.
            true => batch.count * (own + (2 + 2 * h) * 4),
            // And two results on the way to the gate's; norms that are trained keep what is multiplied with their weight;
            // queries, keys and values of packed sequences once more, each in a row of its own; the scores and their softmax.
            false => {
                let norms = d * count(&["input_layernorm", "post_attention_layernorm"]);
                let Positions { count, sequences, length, .. } = batch;
                let unpacked =
                    if batch.are_packed() { sequences * length * (q + 2 * kv) * element } else { 0 };
                let scores = 3 * 4 * sequences * h * length * length;
                count * (own + (2 * f + norms) * element) + unpacked + scores
            }
        };
        own + batch.count * (inputs + self.ranks * 4) + GRAPH * (55 + 45 * self.modules.len() / 7) / 100
    }
}

impl fmt::Display for MemoryEstimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mb = |bytes: usize| bytes as f64 / 1e6;
        let Self { weights, trained, optimizer, activations, temporary, .. } = *self;
        write!(
            f,
            "{:.0} MB: frozen weights {:.0}, trained parameters {:.0}, AdamW {:.0}, activations {:.0}, temporary {:.0}",
            mb(self.total()),
            mb(weights),
            mb(trained),
            mb(optimizer),
            mb(activations),
            mb(temporary)
        )
    }
}
