//! Training steps of LLaMAs with random weights, of the shapes that `benches/python/compare.py` gives to torch and peft.

use std::time::Instant;

use burn::module::{Lora, Module, ParamGroup};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::{Device, Distribution, FloatDType, Tensor};
use burn_peft::{LoraConfig, PeftModel, TargetModules};
use burn_peft_llama::{Batch, Collator, Example, LlamaConfig, LlamaForCausalLm};
use burn_peft_ops::{activation_dtype, in_full_precision, linear};
use serde::Serialize;

use crate::process::median;

/// The sizes of a model and of a batch. The output layer is tied to the embedding.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Shape {
    /// The name that selects it.
    pub name: &'static str,
    /// Number of tokens.
    pub vocabulary: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside of the feed-forward layer.
    pub feed_forward: usize,
    /// Number of blocks.
    pub blocks: usize,
    /// Heads of queries, and heads of keys and values.
    pub heads: [usize; 2],
    /// Sequences, and tokens of each.
    pub batch: [usize; 2],
    /// How many tokens at the beginning all sequences have in common.
    pub prefix: usize,
    /// How many tokens at the end of each sequence are learnt.
    pub labelled: usize,
    /// Rank of the adapters; `lora_alpha` is twice as much, `lora_dropout` 0.05.
    pub rank: usize,
    /// Whether every linear layer has an adapter, or `q_proj` and `v_proj` alone.
    pub is_all_linear: bool,
    /// Whether it is too large for the CPUs that most people have.
    pub is_for_gpus: bool,
}

/// `smol` is SmolLM2-135M on batches of the size of the Pokémon experiment, `smol-prompt` with the prompt that the
/// questions of the experiment begin with; `wide` is a quarter of Llama-3.2-1B, `llama-1b` is all of it.
pub const SHAPES: [Shape; 8] = [
    Shape {
        name: "tiny",
        vocabulary: 4096,
        hidden: 256,
        feed_forward: 704,
        blocks: 4,
        heads: [8, 4],
        batch: [16, 64],
        prefix: 0,
        labelled: 12,
        rank: 16,
        is_all_linear: false,
        is_for_gpus: false,
    },
    MID,
    Shape { name: "mid-all-labelled", labelled: 128, ..MID },
    Shape {
        name: "wide",
        blocks: 4,
        batch: [4, 64],
        labelled: 12,
        is_all_linear: false,
        is_for_gpus: false,
        ..LLAMA_1B
    },
    SMOL,
    Shape { name: "smol-prompt", batch: [16, 91], prefix: 70, ..SMOL },
    LLAMA_1B,
    Shape { name: "llama-1b-all-labelled", labelled: 512, ..LLAMA_1B },
];

const LLAMA_1B: Shape = Shape {
    name: "llama-1b",
    vocabulary: 128_256,
    hidden: 2048,
    feed_forward: 8192,
    blocks: 16,
    heads: [32, 8],
    batch: [8, 512],
    prefix: 0,
    labelled: 102,
    rank: 16,
    is_all_linear: true,
    is_for_gpus: true,
};

const SMOL: Shape = Shape {
    name: "smol",
    vocabulary: 49_152,
    hidden: 576,
    feed_forward: 1536,
    blocks: 30,
    heads: [9, 3],
    batch: [16, 92],
    prefix: 0,
    labelled: 5,
    rank: 16,
    is_all_linear: true,
    is_for_gpus: false,
};

const MID: Shape = Shape {
    name: "mid",
    vocabulary: 32_000,
    hidden: 768,
    feed_forward: 2048,
    blocks: 12,
    heads: [12, 4],
    batch: [4, 128],
    prefix: 0,
    labelled: 25,
    rank: 16,
    is_all_linear: false,
    is_for_gpus: false,
};

impl Shape {
    /// A model of the shape with random weights in `dtype`, on a device with autodiff.
    ///
    /// # Panics
    /// If a weight is too large for `dtype`, which none is.
    #[expect(clippy::expect_used, reason = "a benchmark without its model measures nothing")]
    pub fn model(&self, dtype: FloatDType) -> LlamaForCausalLm {
        let device = Device::default().autodiff();
        device.seed(0);
        let [heads, heads_of_keys] = self.heads;
        let config = LlamaConfig::new(self.vocabulary, self.hidden, self.blocks)
            .with_heads(heads, heads_of_keys)
            .with_intermediate_size(self.feed_forward)
            .with_tie_word_embeddings(true);
        // A fork draws the weights, which are otherwise drawn when they are first used.
        let model = config.init(&device).fork(&device);
        match dtype {
            FloatDType::F32 => model,
            _ => model.to_dtype(dtype).expect("random weights are small").0,
        }
    }
}

/// The type of that name.
///
/// # Errors
/// In words, if there is none.
pub fn dtype(name: &str) -> Result<FloatDType, String> {
    match name {
        "f32" => Ok(FloatDType::F32),
        "bf16" => Ok(FloatDType::BF16),
        "f16" => Ok(FloatDType::F16),
        other => Err(format!("`{other}` is not f32, bf16 or f16")),
    }
}

/// What kind of adapter a model has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// LoRA.
    Lora,
    /// DoRA: LoRA with a magnitude for each output.
    Dora,
    /// Burn's own, which works on the weights, on the same layers. It has no dropout.
    ApplyLora,
}

/// What a step works on.
pub struct Training {
    shape: Shape,
    dtype: FloatDType,
    model: LlamaForCausalLm,
    optimizer: ModuleOptimizer,
    batch: Batch,
}

impl Training {
    /// A model of the shape, its weights in `dtype`, with an adapter in f32, and a batch.
    ///
    /// # Panics
    /// If the model takes no adapter, or the batch has no labels.
    #[expect(clippy::expect_used, reason = "a benchmark without its model measures nothing")]
    pub fn new(shape: Shape, kind: Kind, dtype: FloatDType) -> Self {
        let mut model = shape.model(dtype);
        let device = model.devices()[0].clone();
        let alpha = 2.0 * shape.rank as f64;
        if kind == Kind::ApplyLora {
            let paths = if shape.is_all_linear { vec!["_proj.weight"] } else { vec!["q_proj", "v_proj"] };
            let lora = Lora::new(shape.rank, alpha).set_param_group(ParamGroup::from_any_predicates(paths));
            model = model.apply_lora(lora);
        } else {
            let targets = match shape.is_all_linear {
                true => TargetModules::AllLinear,
                false => ["q_proj", "v_proj"].into(),
            };
            let adapter = LoraConfig::new(shape.rank)
                .with_lora_alpha(alpha)
                .with_lora_dropout(0.05)
                .with_use_dora(kind == Kind::Dora)
                .with_target_modules(targets);
            model.add_adapter("default", adapter).expect("the model takes the adapter");
        }
        let [sequences, length] = shape.batch;
        let example = |row: usize| {
            let id = |i: usize| {
                let row = if i < shape.prefix { 0 } else { row };
                ((row * 7919 + i * 104_729) % shape.vocabulary) as u32
            };
            let input_ids: Vec<u32> = (0..length).map(id).collect();
            let label =
                |(i, id): (usize, &u32)| if i + shape.labelled < length { -100 } else { i64::from(*id) };
            let labels = input_ids.iter().enumerate().map(label).collect();
            Example { input_ids, labels }
        };
        let examples: Vec<Example> = (0..sequences).map(example).collect();
        let batch = Collator::new(0).collate(&examples, &device).expect("the examples have labels");
        Self { shape, dtype, model, optimizer: AdamWConfig::new().init(), batch }
    }

    /// See [`LlamaForCausalLm::set_gradient_checkpointing`].
    pub fn set_gradient_checkpointing(&mut self, enabled: bool) {
        self.model.set_gradient_checkpointing(enabled);
    }

    /// Loss, gradients and an update of AdamW; returns the loss.
    pub fn step(&mut self) -> f64 {
        let loss = self.model.loss(&self.batch);
        let gradients = GradientsParams::from_grads(loss.backward(), &self.model);
        self.model = self.optimizer.step(1e-4, self.model.clone(), gradients);
        loss.into_scalar()
    }

    /// Seconds of the parts of a step: the loss, its gradients, the update. Each part lasts until the device has computed it, so
    /// together they take longer than [`step`](Self::step) on a device that computes while the program goes on.
    ///
    /// # Panics
    /// If the device fails.
    pub fn parts(&mut self) -> [f64; 3] {
        let device = self.model.devices()[0].clone();
        let (loss, forward) = timed(&device, || self.model.loss(&self.batch));
        let (gradients, backward) =
            timed(&device, || GradientsParams::from_grads(loss.backward(), &self.model));
        let (model, update) = timed(&device, || self.optimizer.step(1e-4, self.model.clone(), gradients));
        self.model = model;
        [forward, backward, update]
    }

    /// Seconds that the products with frozen weights of a step take on their own, forward and backward, at the rate at which
    /// this library multiplies: those of the blocks with the rows that a step computes, and that of the output layer with
    /// the labelled ones, at most 64 MiB of logits at a time.
    pub fn floor(&self) -> f64 {
        let Shape { hidden, feed_forward, vocabulary, blocks, heads: [queries, keys], .. } = self.shape;
        let rows = self.batch.packed.as_ref().map_or(self.shape.batch[0] * self.shape.batch[1], |packed| {
            packed.input_ids.shape().num_elements()
        });
        let keys = hidden / queries * keys;
        let layers = [
            (2 * blocks, [rows, hidden, hidden]),
            (2 * blocks, [rows, hidden, keys]),
            (2 * blocks, [rows, hidden, feed_forward]),
            (blocks, [rows, feed_forward, hidden]),
        ];
        let device = self.model.devices()[0].clone().inner();
        let alone = |sizes, is_tied| both_ways(&device, self.dtype, sizes, is_tied);
        let layers = layers.map(|(count, sizes)| count as f64 * alone(sizes, false));
        let labelled = self.batch.num_targets;
        let at_once = labelled.min((1 << 24) / vocabulary);
        let head = in_full_precision(|| alone([at_once, hidden, vocabulary], true));
        layers.iter().sum::<f64>() + head * labelled as f64 / at_once as f64
    }
}

/// What `f` returns, and the seconds until the device has computed it.
#[expect(clippy::expect_used, reason = "a benchmark on a device that fails measures nothing")]
fn timed<R>(device: &Device, f: impl FnOnce() -> R) -> (R, f64) {
    let start = Instant::now();
    let found = f();
    device.sync().expect("the device computes");
    (found, start.elapsed().as_secs_f64())
}

/// Seconds of `x W` and `dy Wᵀ`, the median of five; `W` may be the transpose of a table.
pub(crate) fn both_ways(
    device: &Device,
    dtype: FloatDType,
    [rows, d_in, d_out]: [usize; 3],
    is_tied: bool,
) -> f64 {
    let random = |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Default, device);
    let weight = match is_tied {
        true => random([d_out, d_in]).cast(dtype).transpose(),
        false => random([d_in, d_out]).cast(dtype),
    };
    let [x, dy] = [d_in, d_out].map(|width| random([rows, width]).cast(activation_dtype(&weight)));
    let run = || {
        let start = Instant::now();
        let results = [
            linear(x.clone(), weight.clone(), None).slice([0..1, 0..1]),
            linear(dy.clone(), weight.clone().transpose(), None).slice([0..1, 0..1]),
        ];
        let _ = results.map(|result| result.into_scalar::<f32>());
        start.elapsed().as_secs_f64()
    };
    run();
    median(&[(); 5].map(|()| run()))
}
