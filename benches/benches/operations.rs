//! The operations of `burn-peft-ops`, forward and backward, beside what Burn has for the same: its layers, its attention
//! with keys and values repeated, its loss. Shapes of SmolLM2-135M with 16 sequences of 92 tokens.
//!
//! mimalloc is the allocator.

use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{DropoutConfig, RmsNormConfig, RotaryEncodingConfig};
use burn::tensor::activation::silu;
use burn::tensor::module::attention as burns_attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Device, Distribution, Int, Tensor};
use burn_peft_ops::{CausalMask, attention, cross_entropy, dropped_product, rms_norm, rotate, swiglu};
use divan::Bencher;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SEQUENCES: usize = 16;
const LENGTH: usize = 92;
const POSITIONS: usize = SEQUENCES * LENGTH;
const WIDTH: usize = 576;
const FEED_FORWARD: usize = 1536;
const HEADS_OF_KEYS: usize = 3;
const GROUP: usize = 3;
const HEAD: usize = 64;
const RANK: usize = 16;
const VOCABULARY: usize = 49_152;
/// Positions with a label.
const LABELLED: usize = 80;

fn main() {
    divan::main();
}

fn device() -> Device {
    let device = Device::default().autodiff();
    device.seed(0);
    device
}

fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &device()).require_grad()
}

/// Forward and backward, with a gradient that is a tensor of its own.
fn measure<const N: usize, const D: usize, const E: usize>(
    bencher: Bencher,
    inputs: [Tensor<D>; N],
    f: impl Fn([Tensor<D>; N]) -> Tensor<E>,
) {
    let slope = Tensor::<E>::ones(f(inputs.clone()).dims(), &device()) * 0.5;
    bencher.bench_local(|| (f(inputs.clone()) * slope.clone()).sum().backward());
}

#[divan::bench_group(sample_count = 20, sample_size = 1)]
mod rms_norm_ {
    use super::*;

    #[divan::bench]
    fn ours(bencher: Bencher) {
        let weight = Tensor::ones([WIDTH], &device());
        measure(bencher, [random([POSITIONS, WIDTH])], |[x]| rms_norm(x, weight.clone(), 1e-5));
    }

    #[divan::bench]
    fn burn(bencher: Bencher) {
        let norm = burn::module::Module::no_grad(RmsNormConfig::new(WIDTH).init(&device()));
        measure(bencher, [random([POSITIONS, WIDTH])], |[x]| norm.forward(x));
    }
}

#[divan::bench_group(sample_count = 20, sample_size = 1)]
mod swiglu_ {
    use super::*;

    #[divan::bench]
    fn ours(bencher: Bencher) {
        let x = || random([POSITIONS, FEED_FORWARD]);
        measure(bencher, [x(), x()], |[gate, up]| swiglu(gate, up));
    }

    #[divan::bench]
    fn burn(bencher: Bencher) {
        let x = || random([POSITIONS, FEED_FORWARD]);
        measure(bencher, [x(), x()], |[gate, up]| silu(gate) * up);
    }
}

#[divan::bench_group(sample_count = 20, sample_size = 1)]
mod rotation {
    use super::*;

    #[divan::bench]
    fn ours(bencher: Bencher) {
        let table = || Tensor::<2>::random([LENGTH, HEAD], Distribution::Default, &device());
        let (cos, sin) = (table(), table());
        let x = random([SEQUENCES, LENGTH, HEADS_OF_KEYS, GROUP, HEAD]);
        measure(bencher, [x], |[x]| rotate(x, &cos, &sin));
    }

    /// Which also moves the heads before the positions.
    #[divan::bench]
    fn burn(bencher: Bencher) {
        let rotary = RotaryEncodingConfig::new(LENGTH, HEAD).init(&device());
        let x = random([SEQUENCES, LENGTH, HEADS_OF_KEYS * GROUP, HEAD]);
        measure(bencher, [x], |[x]| rotary.forward(x.swap_dims(1, 2)));
    }
}

#[divan::bench_group(sample_count = 20, sample_size = 1)]
mod causal_attention {
    use super::*;

    #[divan::bench]
    fn ours(bencher: Bencher) {
        let x = random([SEQUENCES, HEADS_OF_KEYS, (GROUP + 2) * LENGTH, HEAD]);
        let mask = CausalMask::new(LENGTH, LENGTH);
        measure(bencher, [x], |[x]| {
            let q = x.clone().narrow(2, 0, GROUP * LENGTH);
            let q = q.reshape([SEQUENCES, HEADS_OF_KEYS, GROUP, LENGTH, HEAD]);
            let k = x.clone().narrow(2, GROUP * LENGTH, LENGTH);
            attention(q, k, x.narrow(2, (GROUP + 1) * LENGTH, LENGTH), &mask)
        });
    }

    #[divan::bench]
    fn burn(bencher: Bencher) {
        let x = random([SEQUENCES, HEADS_OF_KEYS, (GROUP + 2) * LENGTH, HEAD]);
        let heads = [SEQUENCES, HEADS_OF_KEYS * GROUP, LENGTH, HEAD];
        let options = AttentionModuleOptions { is_causal: true, ..AttentionModuleOptions::default() };
        measure(bencher, [x], |[x]| {
            let q = x.clone().narrow(2, 0, GROUP * LENGTH).reshape(heads);
            let of_keys = |start| {
                let x = x.clone().narrow(2, start, LENGTH).unsqueeze_dim::<5>(2);
                x.repeat_dim(2, GROUP).reshape(heads)
            };
            let (k, v) = (of_keys(GROUP * LENGTH), of_keys((GROUP + 1) * LENGTH));
            burns_attention(q, k, v, None, None, options)
        });
    }
}

#[divan::bench_group(sample_count = 20, sample_size = 1)]
mod dropout_and_product {
    use super::*;

    #[divan::bench]
    fn ours(bencher: Bencher) {
        let a = random([WIDTH, RANK]);
        measure(bencher, [random([POSITIONS, WIDTH])], |[x]| dropped_product(x, a.clone(), 0.05));
    }

    #[divan::bench]
    fn burn(bencher: Bencher) {
        let a = random([WIDTH, RANK]);
        let dropout = DropoutConfig::new(0.05).init();
        measure(bencher, [random([POSITIONS, WIDTH])], |[x]| dropout.forward(x).matmul(a.clone()));
    }
}

#[divan::bench_group(sample_count = 10, sample_size = 1)]
mod loss {
    use super::*;

    fn targets() -> Tensor<1, Int> {
        Tensor::arange(0..LABELLED as i64, &device())
    }

    #[divan::bench]
    fn ours(bencher: Bencher) {
        let x = [random([LABELLED, VOCABULARY])];
        measure(bencher, x, |[logits]| cross_entropy(logits * 1.0, targets()));
    }

    #[divan::bench]
    fn burn(bencher: Bencher) {
        let loss = CrossEntropyLossConfig::new().init(&device());
        let x = [random([LABELLED, VOCABULARY])];
        measure(bencher, x, |[logits]| loss.forward(logits * 1.0, targets()));
    }
}
