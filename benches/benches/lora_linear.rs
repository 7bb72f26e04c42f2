//! One linear layer with an adapter: forward, backward and both, beside the bare layer and Burn's own `apply_lora`.
//!
//! The input requires a gradient, as it does everywhere but in a model's first layer. mimalloc is the allocator.

use burn::tensor::{Device, Distribution, Tensor};
use burn_peft_benches::{Bare, BurnApplyLora, BurnPeft, Case, Contestant};
use divan::Bencher;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const CASES: [Case; 8] = [
    Case { n: 64, width: 512, r: 8 },
    Case { n: 1024, width: 512, r: 8 },
    Case { n: 1024, width: 512, r: 64 },
    Case { n: 64, width: 2048, r: 16 },
    Case { n: 256, width: 2048, r: 16 },
    Case { n: 1024, width: 2048, r: 8 },
    Case { n: 1024, width: 2048, r: 16 },
    Case { n: 1024, width: 2048, r: 64 },
];

fn main() {
    divan::main();
}

/// The layer and its input, computed before the clock starts.
fn set_up<L: Contestant>(case: Case) -> (L, Tensor<2>) {
    let device = Device::default().autodiff();
    #[expect(clippy::expect_used, reason = "a benchmark without its layer measures nothing")]
    let layer = L::new(case, &device).expect("the layer takes the adapter");
    let x = Tensor::random([case.n, case.width], Distribution::Default, &device).require_grad();
    (layer, x)
}

#[divan::bench(types = [Bare, BurnPeft, BurnApplyLora], args = CASES, sample_count = 20)]
fn forward<L: Contestant>(bencher: Bencher, case: Case) {
    let (layer, x) = set_up::<L>(case);
    bencher.bench_local(|| layer.forward(x.clone()).inner());
}

#[divan::bench(types = [Bare, BurnPeft, BurnApplyLora], args = CASES, sample_count = 20)]
fn backward<L: Contestant>(bencher: Bencher, case: Case) {
    let (layer, x) = set_up::<L>(case);
    bencher.with_inputs(|| layer.forward(x.clone()).sum()).bench_local_values(|loss| loss.backward());
}

#[divan::bench(types = [Bare, BurnPeft, BurnApplyLora], args = CASES, sample_count = 20)]
fn forward_backward<L: Contestant>(bencher: Bencher, case: Case) {
    let (layer, x) = set_up::<L>(case);
    bencher.bench_local(|| layer.forward(x.clone()).sum().backward());
}
