//! Starts that are taken from the weight.

use burn::module::Module;
use burn::nn::EmbeddingConfig;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Distribution, Int, Tensor, TensorData};
use burn_peft::{InitLoraWeights, LoraConfig, LoraEmbedding, PeftError, PeftModel};
use burn_peft_llama::PaddingSide;
use burn_peft_tests::fixture::{Fixture, Training, directory, read_file, read_json};
use burn_peft_tests::parameters::{base_parameters, parameters, transposed};
use burn_peft_tests::tolerance::{
    FORWARD, REORDERED, TRAINED, TRAJECTORY, assert_close, assert_close_number, assert_different,
};
use serde::Deserialize;

use super::{One, tensors, update};
use crate::common::{load_base, masked_logits, train};

const CASES: [&str; 3] = ["gqa-tied-pissa", "gqa-tied-pissa-rslora", "gqa-tied-olora"];

#[derive(Deserialize)]
struct Start {
    weight: String,
    init_lora_weights: String,
    r: usize,
    lora_alpha: f64,
    use_rslora: bool,
    scaling: f64,
    changes_weight: bool,
}

fn init(word: &str) -> InitLoraWeights {
    match word {
        "pissa" => InitLoraWeights::Pissa,
        "olora" => InitLoraWeights::Olora,
        "pissa_niter_16" => InitLoraWeights::PissaNiter(16),
        other => panic!("{other}"),
    }
}

#[test]
fn products_are_those_of_peft_and_nothing_changes_at_first() {
    let starts = read_json(&directory("starts").join("expected.json"))["starts"].clone();
    let starts: Vec<Start> = serde_json::from_value(starts).unwrap();
    let stored = read_file(&directory("starts").join("expected.safetensors"));
    assert!(starts.len() >= 20);
    let device = Device::default();
    device.seed(5);
    for start in starts.iter().filter(|start| start.changes_weight) {
        let kind = if start.use_rslora { "rslora" } else { "lora" };
        let name = format!("{}.{}.{kind}", start.weight, start.init_lora_weights);
        let weight = &stored[&format!("{}.weight", start.weight)];
        let mut model = One::new(transposed(weight), &device);
        let x = Tensor::<2>::random([5, weight.shape()[1]], Distribution::Normal(0.0, 1.0), &device);
        let before = model.layer.forward(x.clone()).into_data();
        let config = LoraConfig::new(start.r)
            .with_lora_alpha(start.lora_alpha)
            .with_use_rslora(start.use_rslora)
            .with_init_lora_weights(init(&start.init_lora_weights))
            .with_target_modules(["layer"]);
        model.add_adapter("default", &config).unwrap();
        assert_close(&name, &model.layer.forward(x).into_data(), &before, REORDERED);

        let found = update(&model, "layer", start.scaling);
        let [a, b] = ["lora_A", "lora_B"]
            .map(|factor| Tensor::<2>::from_data(stored[&format!("{name}.{factor}")].clone(), &device));
        let expected = b.matmul(a).mul_scalar(start.scaling).into_data();
        let deviation = assert_close(&name, &found, &expected, FORWARD);
        let residual = weight.iter::<f64>().zip(found.iter::<f64>()).map(|(weight, update)| weight - update);
        let residual = TensorData::new(residual.collect::<Vec<_>>(), weight.shape().clone());
        // Relative to the weight that it is what is left of.
        let scale = weight.iter::<f64>().fold(0.0, |most, x| x.abs().max(most));
        let worst = residual.iter::<f64>().zip(stored[&format!("{name}.residual")].iter::<f64>());
        let worst = worst.fold(0.0, |most, (a, b): (f64, f64)| (a - b).abs().max(most));
        assert!(worst <= FORWARD.0 * scale, "{name}: {worst} of {scale}");
        println!("{name}: the product deviates by {deviation:.1e}");

        // Without the adapter the model is the base, to the bit: peft's is what is left of it.
        assert_eq!(base_parameters(&model)["layer.weight"], transposed(weight), "{name}");
    }
}

#[test]
fn an_embedding_starts_as_ever() {
    #[derive(burn::module::Module, Debug)]
    struct Net {
        embed: LoraEmbedding,
    }
    let device = Device::default();
    for start in ["pissa", "olora"] {
        let mut net = Net { embed: EmbeddingConfig::new(7, 5).init(&device).into() };
        let config = LoraConfig::new(2).with_init_lora_weights(init(start)).with_target_modules(["embed"]);
        net.add_adapter("default", &config).unwrap();
        let tensors = tensors(&net);
        assert_eq!(tensors.len(), 2, "{start}");
        assert!(tensors[&("embed".to_string(), "a")].to_data().iter::<f32>().all(|x| x == 0.0));
        // The file has twice the rank, as that of every other layer.
        let directory = tempfile::tempdir().unwrap();
        net.save_adapter("default", directory.path()).unwrap();
        let file = read_file(&directory.path().join("adapter_model.safetensors"));
        assert_eq!(file["base_model.model.embed.lora_embedding_A"].shape()[..], [4, 7]);
        let mut again = Net { embed: net.embed.clone() };
        again.unload().unwrap();
        again.load_adapter("default", directory.path()).unwrap();
        let ids = Tensor::<2, Int>::from_data([[0, 3, 6]], &device);
        let [found, expected] = [&again, &net].map(|net| net.embed.forward(ids.clone()).into_data());
        assert_close(start, &found, &expected, REORDERED);
    }
}

#[test]
fn training_from_the_start_follows_peft() {
    for case in CASES {
        let fixture = Fixture::open(case);
        let device = Device::default().autodiff();
        let facts = read_json(&fixture.directory.join("expected.json"))["start"].clone();
        let training: Training = serde_json::from_value(facts).unwrap();
        let batch = fixture.batch(PaddingSide::Right, &device);
        let mut model = load_base("gqa-tied", &device);
        let base = parameters(&model);
        let config = LoraConfig::from_pretrained(fixture.directory.join("raw")).unwrap();
        model.add_adapter("default", &config).unwrap();
        let scaling = config.scaling();
        for (key, expected) in fixture.with_prefix("start.delta.") {
            assert_close(&format!("{case} {key}"), &update(&model, &key, scaling), &expected, FORWARD);
        }

        let (model, losses) = train(model, &batch, &training);
        for (step, (found, expected)) in losses.iter().zip(&training.losses).enumerate() {
            assert_close_number(&format!("{case} loss before step {step}"), *found, *expected, TRAJECTORY);
        }
        assert!(losses.len() == 10 && losses[9] < losses[0]);
        let deltas = fixture.with_prefix("start.trained.delta.");
        assert!(!deltas.is_empty());
        for (key, expected) in deltas {
            assert_close(&format!("{case} {key}"), &update(&model, &key, scaling), &expected, TRAINED);
        }
        let logits = masked_logits(&model, &batch);
        assert_close(case, &logits, fixture.data("start.trained.logits"), TRAINED);
        assert_eq!(base_parameters(&model), base, "{case}: the base has changed");
    }
}

/// The adapter as it is saved in Python without a conversion, to be applied to what is left of the base.
#[test]
fn an_adapter_that_was_not_converted_is_the_one_that_was() {
    for case in CASES {
        let fixture = Fixture::open(case);
        let device = Device::default();
        let batch = fixture.batch(PaddingSide::Right, &device);
        let mut model = load_base("gqa-tied", &device);
        model.load_adapter("default", fixture.directory.join("raw")).unwrap();
        let logits = masked_logits(&model, &batch);
        let deviation = assert_close(case, &logits, fixture.logits(PaddingSide::Right), FORWARD);
        println!("{case}: logits deviate by {deviation:.1e}");

        // It is saved as peft converts it.
        let written = tempfile::tempdir().unwrap();
        model.save_adapter("default", written.path()).unwrap();
        let mut config = read_json(&written.path().join("adapter_config.json"));
        config["target_modules"].as_array_mut().unwrap().sort_by_key(ToString::to_string);
        let expected = fixture.config();
        let alphas = [&config, &expected].map(|config| config["lora_alpha"].as_f64().unwrap());
        assert!((alphas[0] - alphas[1]).abs() < 1e-12, "{case}: {alphas:?}");
        config["lora_alpha"] = expected["lora_alpha"].clone();
        assert_eq!(config, expected, "{case}");
        model.delete_adapter("default").unwrap();
        model.load_adapter("default", written.path()).unwrap();
        assert_close(case, &masked_logits(&model, &batch), &logits, REORDERED);
    }
}

#[test]
fn orthogonal_factors_have_no_product_and_are_not_zero() {
    let device = Device::default();
    device.seed(11);
    let mut model = One::new(TensorData::new(vec![0.5f32; 240 * 160], [240, 160]), &device);
    let config = LoraConfig::new(6)
        .with_lora_alpha(9.0)
        .with_init_lora_weights(InitLoraWeights::Orthogonal)
        .with_target_modules(["layer"]);
    model.add_adapter("default", &config).unwrap();
    let product = update(&model, "layer", 1.5);
    assert!(product.iter::<f64>().all(|x| x.abs() < 1e-6));
    for (_, factor) in tensors(&model) {
        let values: Vec<f64> = factor.to_data().iter().collect();
        let variance = values.iter().map(|x| x * x).sum::<f64>() / values.len() as f64;
        // N(0, 1) through half of the rows of an orthogonal matrix, over 10: 1/200. There are 480 such numbers or more, so that
        // six standard deviations of the mean of their squares are 39 %.
        assert!((variance / 0.005 - 1.0).abs() < 0.4, "{variance}");
    }

    let mut odd = config.clone();
    odd.r = 3;
    model.unload().unwrap();
    let error = model.add_adapter("default", &odd).unwrap_err();
    assert!(matches!(error, PeftError::InvalidConfig { field: "r", .. }), "{error}");
}

/// At the size of a real layer: the product is the best approximation there is, by its own defining property.
#[test]
fn the_leading_triplets_of_a_large_weight_are_found() {
    let device = Device::default();
    device.seed(3);
    let (d_in, d_out, r) = (512, 1536, 16);
    let weight = Tensor::<2>::random([d_in, d_out], Distribution::Normal(0.0, 0.02), &device);
    let mut model = One::new(weight.clone().into_data(), &device);
    let config = LoraConfig::new(r)
        .with_lora_alpha(r as f64)
        .with_init_lora_weights(InitLoraWeights::Pissa)
        .with_target_modules(["layer"]);
    model.add_adapter("default", &config).unwrap();
    let tensors = tensors(&model);
    let [a, b] = ["a", "b"].map(|name| tensors[&("layer".to_string(), name)].clone());
    // A = U sqrt(S), B = sqrt(S) Vᵀ: the Gram matrices are the same diagonal, and W Bᵀ = A S.
    let (of_a, of_b) = (a.clone().transpose().matmul(a.clone()), b.clone().matmul(b.clone().transpose()));
    assert_close("Gram matrices", &of_a.clone().into_data(), &of_b.into_data(), FORWARD);
    let scaled = a.clone().matmul(of_a);
    assert_close("W Bᵀ", &weight.matmul(b.transpose()).into_data(), &scaled.into_data(), TRAINED);
}

/// In peft the start is a part of the base, and dropout acts on the adapter's input alone.
#[test]
fn dropout_leaves_the_start_in_the_base() {
    let device = Device::default().autodiff();
    for use_dora in [false, true] {
        device.seed(4);
        let mut model = One::new(TensorData::new(vec![1.0f32, 0.0, 0.0, 1.0], [2, 2]), &device);
        let config = LoraConfig::new(2)
            .with_lora_alpha(3.0)
            .with_lora_dropout(0.5)
            .with_use_dora(use_dora)
            .with_init_lora_weights(InitLoraWeights::Pissa)
            .with_target_modules(["layer"]);
        model.add_adapter("default", config).unwrap();
        // Nothing is left of the weight beside the adapter, which sees 0 or 2 for each 1.
        const ROWS: usize = 1_000;
        let y = model.layer.forward(Tensor::<2>::ones([ROWS, 2], &device)).into_data();
        let found: Vec<f64> = y.iter().collect();
        assert!(found.iter().all(|y| y.abs() < 1e-5 || (y - 2.0).abs() < 1e-5), "dora: {use_dora}");
        let share = found.iter().filter(|y| **y > 1.0).count() as f64 / found.len() as f64;
        // Six standard deviations of 2 000 draws.
        assert!((share - 0.5).abs() < 0.07, "{share}");
    }
}

#[test]
fn a_model_made_trainable_does_not_train_the_start() {
    let device = Device::default().autodiff();
    for dora in [false, true] {
        let weight: Vec<f32> = (0..12).map(|i| (i as f32).sin()).collect();
        let mut model = One::new(TensorData::new(weight, [4, 3]), &device);
        let config = LoraConfig::new(2)
            .with_init_lora_weights(InitLoraWeights::Pissa)
            .with_use_dora(dora)
            .with_target_modules(["layer"]);
        model.add_adapter("default", &config).unwrap();
        let model = model.unfreeze();
        let loss = model.layer.forward(Tensor::<2>::ones([2, 4], &device)).square().mean();
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        for tensor in model.adapter_tensors("default").unwrap() {
            assert_eq!(gradients.get::<2>(tensor.id).is_some(), tensor.is_trained, "{}", tensor.name);
        }
    }
}

#[test]
fn dora_from_a_start_is_saved_and_loaded() {
    let device = Device::default();
    device.seed(6);
    let weight = Tensor::<2>::random([9, 7], Distribution::Normal(0.0, 1.0), &device).into_data();
    let x = Tensor::<2>::random([4, 9], Distribution::Normal(0.0, 1.0), &device);
    for start in [InitLoraWeights::Pissa, InitLoraWeights::Olora] {
        let mut model = One::new(weight.clone(), &device);
        let before = model.layer.forward(x.clone()).into_data();
        let config = LoraConfig::new(2)
            .with_lora_alpha(3.0)
            .with_use_dora(true)
            .with_use_rslora(true)
            .with_init_lora_weights(start)
            .with_target_modules(["layer"]);
        model.add_adapter("default", config).unwrap();
        assert_close("fresh", &model.layer.forward(x.clone()).into_data(), &before, REORDERED);
        let moved = TensorData::new((0..14).map(|i| 0.1 * i as f32 - 0.6).collect::<Vec<_>>(), [2, 7]);
        let magnitudes = TensorData::new((0..7).map(|i| 1.0 + 0.2 * i as f32).collect::<Vec<_>>(), [1, 7]);
        let mut model = super::with_values(model, &[("b", moved), ("magnitude", magnitudes)]);
        let expected = model.layer.forward(x.clone()).into_data();
        assert_different("trained", &expected, &before);

        let directory = tempfile::tempdir().unwrap();
        model.save_adapter("default", directory.path()).unwrap();
        let mut again = One::new(weight.clone(), &device);
        let report = again.load_adapter("default", directory.path()).unwrap();
        assert_eq!(report.injection.modules[0].r, Some(4));
        assert_close("loaded", &again.layer.forward(x.clone()).into_data(), &expected, REORDERED);
        // Merged, through the dense weight.
        model.merge_and_unload().unwrap();
        assert_close("merged", &model.layer.forward(x.clone()).into_data(), &expected, REORDERED);
    }
}

#[test]
fn weights_that_cannot_be_decomposed_are_refused() {
    let device = Device::default();
    let mut values = vec![0.5f32; 12];
    values[5] = f32::NAN;
    for start in [InitLoraWeights::Pissa, InitLoraWeights::Olora, InitLoraWeights::PissaNiter(2)] {
        let config = LoraConfig::new(2).with_init_lora_weights(start).with_target_modules(["layer"]);
        let mut model = One::new(TensorData::new(values.clone(), [4, 3]), &device);
        let error = model.add_adapter("default", &config).unwrap_err();
        assert!(matches!(&error, PeftError::NonFiniteWeight { modules } if modules == &["layer"]), "{error}");
        let mut model = One::new(TensorData::new(vec![0.5f32; 12], [4, 3]), &device);
        let error = model.add_adapter("default", config.clone().with_target_modules(["layer"])).err();
        assert!(error.is_none());
        model.unload().unwrap();
        let large = LoraConfig::new(4).with_init_lora_weights(start).with_target_modules(["layer"]);
        let error = model.add_adapter("default", large).unwrap_err();
        assert!(matches!(error, PeftError::InvalidConfig { field: "r", .. }), "{error}");
    }
    let mut model = One::new(TensorData::new(vec![0.5f32; 12], [4, 3]), &device);
    let negative = LoraConfig::new(2).with_lora_alpha(-2.0).with_init_lora_weights(InitLoraWeights::Pissa);
    let error = model.add_adapter("default", negative.with_target_modules(["layer"])).unwrap_err();
    assert!(matches!(error, PeftError::InvalidConfig { field: "lora_alpha", .. }), "{error}");
    let huge = LoraConfig::new(2).with_lora_alpha(1e300).with_init_lora_weights(InitLoraWeights::Random);
    model.add_adapter("default", huge.with_target_modules(["layer"])).unwrap();
    let error = model.convert_to_lora("plain", "default", 2).unwrap_err();
    assert!(matches!(error, PeftError::NonFiniteWeight { .. }), "{error}");
}
