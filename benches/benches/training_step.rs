//! A training step of a LLaMA with 12 blocks of width 768: plain LoRA beside DoRA.
//!
//! Vocabulary 32000, feed-forward 2048, 12 heads for 4 keys, tied; 4 sequences of 128 tokens, the last 20 % labelled; rank
//! 16 on `q_proj` and `v_proj`, dropout 0.05, AdamW. mimalloc is the allocator.

use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::Device;
use burn_peft::{LoraConfig, PeftModel};
use burn_peft_llama::{Batch, Collator, Example, LlamaConfig, LlamaForCausalLm};
use divan::Bencher;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const VOCABULARY: usize = 32_000;
const LENGTH: usize = 128;
const SEQUENCES: u32 = 4;

fn main() {
    divan::main();
}

/// What a step works on.
struct Training {
    model: LlamaForCausalLm,
    optimizer: ModuleOptimizer,
    batch: Batch,
}

impl Training {
    #[expect(clippy::expect_used, reason = "a benchmark without its model measures nothing")]
    fn new(use_dora: bool) -> Self {
        let device = Device::default().autodiff();
        device.seed(0);
        let config = LlamaConfig::new(VOCABULARY, 768, 12)
            .with_heads(12, 4)
            .with_intermediate_size(2048)
            .with_tie_word_embeddings(true);
        let mut model = config.init(&device);
        let adapter = LoraConfig::new(16)
            .with_lora_alpha(32.0)
            .with_lora_dropout(0.05)
            .with_use_dora(use_dora)
            .with_target_modules(["q_proj", "v_proj"]);
        model.add_adapter("default", adapter).expect("the model takes the adapter");
        let example = |row: u32| {
            let input_ids: Vec<u32> =
                (0..LENGTH as u32).map(|i| (row * 7919 + i * 104_729) % VOCABULARY as u32).collect();
            let labelled = LENGTH - LENGTH / 5;
            let labels = input_ids.iter().enumerate();
            let labels = labels.map(|(i, &id)| if i < labelled { -100 } else { i64::from(id) }).collect();
            Example { input_ids, labels }
        };
        let examples: Vec<Example> = (0..SEQUENCES).map(example).collect();
        let batch = Collator::new(0).collate(&examples, &device).expect("the examples have labels");
        Self { model, optimizer: AdamWConfig::new().init(), batch }
    }

    fn step(&mut self) {
        let loss = self.model.loss(&self.batch);
        let gradients = GradientsParams::from_grads(loss.backward(), &self.model);
        self.model = self.optimizer.step(1e-4, self.model.clone(), gradients);
    }
}

fn measure(bencher: Bencher, use_dora: bool) {
    let mut training = Training::new(use_dora);
    training.step();
    bencher.bench_local(|| training.step());
}

#[divan::bench(sample_count = 10, sample_size = 1)]
fn lora(bencher: Bencher) {
    measure(bencher, false);
}

#[divan::bench(sample_count = 10, sample_size = 1)]
fn dora(bencher: Bencher) {
    measure(bencher, true);
}
