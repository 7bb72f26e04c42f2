//! One adapter put in the place of another.

use std::path::Path;
use std::time::{Duration, Instant};

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};
use burn_peft::{KeyMapping, LoadOptions, LoraConfig, LoraLinear, PeftError, PeftModel, WrongFile};
use burn_peft_tests::parameters::parameters;
use burn_peft_tests::tolerance::assert_different;
use tempfile::TempDir;

use super::{Net, base, random, stir};

/// An adapter of its own in a directory.
fn stored(config: &LoraConfig) -> TempDir {
    let mut net = Net::new(&Device::default());
    net.add_adapter("x", config).unwrap();
    let directory = tempfile::tempdir().unwrap();
    stir(net).save_adapter("x", directory.path()).unwrap();
    directory
}

fn loaded(adapters: &[(&str, &Path)], device: &Device) -> Net {
    let mut net = Net::new(device);
    for (name, directory) in adapters {
        net.load_adapter(name, directory).unwrap();
    }
    net
}

#[test]
fn rank_and_targets_may_change_and_the_active_stay_active() {
    let old = stored(&random(2, ["up", "conv"]));
    let new =
        stored(&random(5, ["down", "token", "up"]).with_modules_to_save(["norm"]).with_use_rslora(true));
    let other = stored(&random(2, ["up", "position"]));
    for device in [Device::default(), Device::default().autodiff()] {
        for active in [&["one"][..], &["two"], &["one", "two"], &[]] {
            let mut net = loaded(&[("one", old.path()), ("two", other.path())], &device);
            net.set_adapter(active).unwrap();
            let (before, bits) = (net.output(), base(&net));
            let report = net.hotswap_adapter("one", new.path()).unwrap();
            assert_eq!(report.injection.adapter, "one");
            assert_eq!(report.injection.modules.len(), 3);
            assert!(report.injection.modules.iter().all(|module| module.r == Some(5)));

            let mut expected = loaded(&[("one", new.path()), ("two", other.path())], &device);
            expected.set_adapter(active).unwrap();
            assert_eq!(parameters(&net), parameters(&expected));
            assert_eq!(net.adapters(), expected.adapters());
            assert_eq!(net.output(), expected.output());
            assert_eq!(net.trainable_parameters(), expected.trainable_parameters());
            assert_eq!(
                base(&net).into_values().map(|(id, _)| id).collect::<Vec<_>>(),
                bits.into_values().map(|(id, _)| id).collect::<Vec<_>>(),
            );
            if active.contains(&"one") {
                assert_different("swapped", &net.output(), &before);
            } else {
                assert_eq!(net.output(), before);
            }
        }
    }
}

#[test]
fn the_old_adapter_stays_if_the_new_one_cannot_come() {
    let copying = || random(2, ["up"]).with_modules_to_save(["norm"]);
    let (old, other) = (stored(&random(2, ["up", "conv"])), stored(&copying()));
    let (conflicting, broken) = (stored(&copying()), stored(&random(2, ["up"])));
    std::fs::write(broken.path().join("adapter_model.safetensors"), b"").unwrap();
    let mut net = loaded(&[("one", old.path()), ("two", other.path())], &Device::default());
    net.set_adapter(&["one", "two"]).unwrap();
    let state = |net: &Net| (parameters(net), net.adapters(), net.output());
    let before = state(&net);
    let mut fails = |name: &str, directory: &Path| {
        let error = net.hotswap_adapter(name, directory).unwrap_err();
        assert_eq!(state(&net), before);
        error
    };
    assert!(matches!(fails("one", broken.path()), PeftError::NotTheFile { found: WrongFile::Empty, .. }));
    assert!(matches!(fails("one", &old.path().join("absent")), PeftError::NoAdapter { .. }));
    assert!(matches!(fails("three", old.path()), PeftError::UnknownAdapter { .. }));
    // The one that it replaces counts no more, the one beside it does.
    assert!(matches!(fails("one", conflicting.path()), PeftError::ConflictingCopies { .. }));
    net.hotswap_adapter("two", conflicting.path()).unwrap();
    net.merge_adapter().unwrap();
    assert!(matches!(net.hotswap_adapter("one", old.path()).unwrap_err(), PeftError::MergedAdapter { .. }));
}

#[test]
fn the_names_in_files_are_those_of_the_adapter_that_is_replaced() {
    let names = KeyMapping::new([(r"^up\.", "encoder.dense.")]);
    let [old, new] = [2, 3].map(|r| stored(&random(r, ["dense"]).with_key_mapping(names.clone())));
    let mut net = Net::new(&Device::default());
    net.load_adapter_with("one", old.path(), &LoadOptions::new().with_key_mapping(names)).unwrap();
    net.hotswap_adapter("one", new.path()).unwrap();
    let report = net.hotswap_adapter("one", old.path()).unwrap();
    assert_eq!(report.injection.modules[0].path, "up");
}

/// The projections of one block of Llama 3.2 1B that are adapted most.
#[derive(Module, Debug)]
struct Block {
    q_proj: LoraLinear,
    v_proj: LoraLinear,
}

#[derive(Module, Debug)]
struct Blocks {
    layers: Vec<Block>,
}

/// Prints how long it takes to swap an adapter of a model as large as Llama 3.2 1B, from disk to the next forward pass.
/// `cargo test --release hotswap_time -- --ignored --nocapture`
#[test]
#[ignore = "measures, and needs 340 MB"]
fn hotswap_time() {
    const SWAPS: u32 = 20;
    let device = Device::default();
    let linear = |d_in, d_out| -> LoraLinear {
        let weight = Tensor::<2>::zeros([d_in, d_out], &device);
        Linear { weight: Param::from_tensor(weight), bias: None }.into()
    };
    let block = |_| Block { q_proj: linear(2048, 2048), v_proj: linear(2048, 512) };
    let mut model = Blocks { layers: (0..16).map(block).collect() };
    let config = random(8, ["q_proj", "v_proj"]);
    let directories = [1, 2].map(|_| tempfile::tempdir().unwrap());
    for directory in &directories {
        model.add_adapter("default", &config).unwrap();
        model.save_adapter("default", directory.path()).unwrap();
        model.delete_adapter("default").unwrap();
    }
    model.load_adapter("default", directories[0].path()).unwrap();
    let mut times: Vec<Duration> = (0..SWAPS)
        .map(|i| {
            let start = Instant::now();
            model.hotswap_adapter("default", directories[(i as usize + 1) % 2].path()).unwrap();
            start.elapsed()
        })
        .collect();
    times.sort();
    let build = if cfg!(debug_assertions) { "debug" } else { "release" };
    println!("{build}: hotswap takes {:.1?}, at most {:.1?}", times[times.len() / 2], times[times.len() - 1]);
}
