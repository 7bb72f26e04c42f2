//! DoRA where one adapter of a LLaMA does not show it: dropout, several adapters, what it refuses.

use burn::tensor::{Device, Tensor, TensorData};
use burn_peft::{InitLoraWeights, LoraConfig, PeftError, PeftModel};
use burn_peft_tests::fixture::{directory, read_file};
use burn_peft_tests::tolerance::{FORWARD, REORDERED, assert_close, assert_different};

use super::{One, with_values};
use crate::common::load_base;

fn identity() -> TensorData {
    TensorData::new(vec![1.0f32, 0.0, 0.0, 1.0], [2, 2])
}

/// `y = x W + (g - 1) x̃ W + g s (x̃ A) B`, with one `x̃` in both places, as in peft.
#[test]
fn dropout_acts_on_both_parts_alike() {
    let device = Device::default().autodiff();
    device.seed(9);
    let mut model = One::new(identity(), &device);
    let config = LoraConfig::new(2)
        .with_lora_alpha(6.0)
        .with_lora_dropout(0.5)
        .with_use_dora(true)
        .with_target_modules(["layer"]);
    model.add_adapter("default", &config).unwrap();
    // s = 3, A B = I / 6: the norms are 1.5, and with magnitudes of 3 the gains are 2.
    let sixth = TensorData::new(vec![1.0f32 / 6.0, 0.0, 0.0, 1.0 / 6.0], [2, 2]);
    let magnitude = TensorData::new(vec![3.0f32; 2], [1, 2]);
    let model = with_values(model, &[("a", identity()), ("b", sixth), ("magnitude", magnitude)]);
    const ROWS: usize = 2_000;
    let x = Tensor::<2>::ones([ROWS, 2], &device);
    let found: Vec<f64> = model.layer.forward(x.clone()).into_data().iter().collect();
    // Kept: 1 + (2 - 1) 2 + 2 * 3 * 2 / 6. Dropped: 1.
    let (kept, dropped) = (5.0, 1.0);
    assert!(found.iter().all(|y| (y - kept).abs() < 1e-5 || (y - dropped).abs() < 1e-5));
    let share = found.iter().filter(|y| (**y - kept).abs() < 1e-5).count() as f64 / found.len() as f64;
    // Six standard deviations of 4 000 draws.
    assert!((share - 0.5).abs() < 0.05, "{share}");
    // Without dropout: g (x W + s x A B).
    use burn::module::Module;
    let plain: Vec<f64> = model.valid().layer.forward(x.inner()).into_data().iter().collect();
    assert!(plain.iter().all(|y| (y - 3.0).abs() < 1e-5));
}

#[test]
fn a_column_of_zeros_gives_no_nan() {
    let device = Device::default();
    let mut model = One::new(TensorData::new(vec![1.0f32, 0.0, 2.0, 0.0], [2, 2]), &device);
    let config = LoraConfig::new(2).with_lora_alpha(3.0).with_use_dora(true).with_target_modules(["layer"]);
    model.add_adapter("default", &config).unwrap();
    let y = model.layer.forward(Tensor::<2>::ones([1, 2], &device)).into_data();
    assert_eq!(y.iter::<f32>().collect::<Vec<_>>(), [3.0, 0.0]);
}

/// Each adapter is measured against the base and adds to it, so that neither the order nor a merge of some of them decides.
/// In peft the later one also scales what the earlier ones added, but not where dropout acts.
#[test]
fn several_adapters_add_up_whatever_is_merged() {
    let device = Device::default();
    let mut model = load_base("gqa-tied", &device);
    let case = directory("two-dora");
    let expected = read_file(&case.join("expected.safetensors"));
    let ids = Tensor::<2, burn::tensor::Int>::from_data(expected["right.input_ids"].clone(), &device);
    let mask = &expected["right.attention_mask"];
    let logits = |model: &burn_peft_llama::LlamaForCausalLm| {
        let mask = Tensor::<2, burn::tensor::Int>::from_data(mask.clone(), &device).bool();
        let real = mask.clone().float().unsqueeze_dim::<3>(2);
        (model.forward(ids.clone(), Some(mask)) * real).into_data()
    };
    for name in ["one", "two"] {
        model.load_adapter(name, case.join(name)).unwrap();
    }
    for name in ["one", "two"] {
        model.set_adapter(&[name]).unwrap();
        assert_close(name, &logits(&model), &expected[&format!("{name}.logits")], FORWARD);
    }
    model.set_adapter(&["one", "two"]).unwrap();
    let both = logits(&model);
    assert_different("both", &both, &expected["one.logits"]);
    for merged in [&["one"][..], &["two"], &["one", "two"]] {
        model.merge_adapters(merged).unwrap();
        assert_close("both", &logits(&model), &both, REORDERED);
        model.unmerge_adapter().unwrap();
    }
}

#[test]
fn what_peft_refuses_is_refused_by_name() {
    let device = Device::default();
    let mut model = One::new(identity(), &device);
    let dora = LoraConfig::new(2).with_use_dora(true).with_target_modules(["layer"]);
    let error = model.add_adapter("default", dora.clone().with_lora_bias(true)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "invalid `lora_bias`: expected false beside `use_dora`, as in PEFT, found true"
    );
    model.add_adapter("default", &dora).unwrap();
    let error = model.for_rows(&[Some("default"), None]).unwrap_err();
    assert!(matches!(&error, PeftError::MixedBatch { name, .. } if name == "default"), "{error}");
    let random = LoraConfig::new(2).with_init_lora_weights(InitLoraWeights::Random);
    model.add_adapter("plain", random.with_target_modules(["layer"])).unwrap();
    // A batch that names other adapters alone is none of its business.
    model.for_rows(&[Some("plain"), None]).unwrap();
    let sources = [("default", 0.5), ("plain", 0.5)];
    let error = model.add_weighted_adapter("both", &sources, burn_peft::CombinationType::Cat).unwrap_err();
    assert!(matches!(&error, PeftError::CannotCombine { name, .. } if name == "default"), "{error}");
}
