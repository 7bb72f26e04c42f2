//! How long an adapter takes to start on a weight of 2048 by 8192, by how its factors start.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::Device;
use burn_peft::{InitLoraWeights, LoraConfig, LoraLinear, PeftModel};
use divan::Bencher;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    divan::main();
}

#[derive(Module, Debug)]
struct Model {
    layer: LoraLinear,
}

const STARTS: [InitLoraWeights; 5] = [
    InitLoraWeights::KaimingUniform,
    InitLoraWeights::Orthogonal,
    InitLoraWeights::Olora,
    InitLoraWeights::Pissa,
    InitLoraWeights::PissaNiter(16),
];

#[divan::bench(args = STARTS, sample_count = 3, sample_size = 1)]
fn start(bencher: Bencher, start: InitLoraWeights) {
    let device = Device::default();
    device.seed(0);
    let layer: Linear = LinearConfig::new(2048, 8192).with_bias(false).init(&device);
    let config = LoraConfig::new(16).with_init_lora_weights(start).with_target_modules(["layer"]);
    bencher
        .with_inputs(|| Model { layer: layer.clone().into() })
        .bench_local_values(|mut model| model.add_adapter("default", &config).map(|_| model));
}
