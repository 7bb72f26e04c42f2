//! Losses and gradients at the sizes of real models, against float64.
//!
//! `BURN_PEFT_SMOLLM2` names the directory of SmolLM2-135M-Instruct, `BURN_PEFT_SMOLLM2_GRADIENTS` what
//! `tests/fixtures/real_model.py` made of it. Run that test with `--release`.

use std::path::PathBuf;

use burn::module::{Module, Param};
use burn::nn::{Embedding, Linear};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use burn_peft::{DEFAULT_ADAPTER, LoraConfig, PeftModel};
use burn_peft_llama::{Collator, Example, LlamaConfig, LlamaForCausalLm, evaluate};
use burn_peft_tests::fixture::{directory, read_facts, read_file};
use burn_peft_tests::parameters::{gradients, to_peft, with_fixed_factors};
use burn_peft_tests::tolerance::{LOSS_F64, REAL_GRADIENT, assert_close, assert_close_number, gradient_f64};
use serde::Deserialize;

#[derive(Deserialize)]
struct Vocabularies {
    hidden_size: usize,
    rms_norm_eps: f64,
    sizes: Vec<Vocabulary>,
}

#[derive(Deserialize)]
struct Vocabulary {
    vocab_size: usize,
    /// Standard deviation of the logits.
    spread: f64,
    input_ids: Vec<u32>,
    loss: f64,
    norm: Vec<f64>,
    embedding: Vec<f64>,
    tokens: Vec<usize>,
    head: Vec<f64>,
}

/// The numbers of `generate.py`.
fn numbers(count: usize, seed: u32, width: f32) -> Vec<f32> {
    let number = |i: usize| {
        let mut x = (i as u32 + 1).wrapping_mul(2_654_435_761).wrapping_add(seed * 97);
        x = (x ^ (x >> 15)).wrapping_mul(739_982_445);
        x = (x ^ (x >> 13)).wrapping_mul(695_872_825);
        ((x >> 16) as f32 / 65_536.0 - 0.5) * width
    };
    (0..count).map(number).collect()
}

impl Vocabulary {
    fn model(&self, d: usize, epsilon: f64, device: &Device) -> LlamaForCausalLm {
        let vocab = self.vocab_size;
        let mut config = LlamaConfig::new(vocab, d, 0).with_heads(2, 2).with_tie_word_embeddings(false);
        config.rms_norm_eps = epsilon;
        let mut model = config.init(device);
        let matrix = |seed| TensorData::new(numbers(vocab * d, seed, 2.0), [vocab, d]);
        let norm: Vec<f32> = numbers(d, 2, 0.5).iter().map(|x| 1.0 + x).collect();
        model.model.embed_tokens = Embedding { weight: Param::from_data(matrix(1), device) }.into();
        model.model.norm.weight = Param::from_data(TensorData::new(norm, [d]), device);
        let plain = Device::default();
        let head = Tensor::<2>::from_data(matrix(3), &plain).transpose().into_data();
        model.lm_head = Some(Linear { weight: Param::from_data(head, device), bias: None }.into());
        model
    }

    fn example(&self) -> Example {
        let labels = self.input_ids.iter().map(|&id| i64::from(id)).collect();
        Example { input_ids: self.input_ids.clone(), labels }
    }
}

/// Values in f64 as they are.
fn data(values: &[f64]) -> TensorData {
    TensorData::new(values.to_vec(), [values.len()])
}

#[test]
fn losses_of_real_vocabularies_are_those_of_float64() {
    let facts: Vocabularies = read_facts(&directory("vocabulary"));
    let (device, tolerance) = (Device::default().autodiff(), gradient_f64());
    for size in &facts.sizes {
        let (vocab, d) = (size.vocab_size, facts.hidden_size);
        assert!(size.spread > 1.0, "the exponentials must differ");
        let mut model = size.model(d, facts.rms_norm_eps, &device);
        let batch = Collator::new(0).collate(&[size.example()], &device).unwrap();
        // The rows of one gradient that the fixture has.
        let rows = |data: &TensorData, rows: &mut dyn Iterator<Item = usize>| {
            let values: Vec<f32> = data.iter().collect();
            let rows: Vec<f32> = rows.flat_map(|row| values[row * d..][..d].to_vec()).collect();
            let count = rows.len();
            TensorData::new(rows, [count])
        };
        for trained in ["everything", "the embedding"] {
            if trained == "the embedding" {
                let frozen = model.lm_head.take().unwrap().no_grad();
                model.lm_head = Some(frozen);
            }
            let name = format!("{vocab}, trained: {trained}");
            let loss = model.loss(&batch);
            let found = f64::from(loss.clone().into_scalar::<f32>());
            let loss_off = assert_close_number(&name, found, size.loss, LOSS_F64);
            let found = gradients(&model, &GradientsParams::from_grads(loss.backward(), &model));
            let norm = assert_close(&name, &found["model.norm.weight"], &data(&size.norm), tolerance);
            let mut ids = size.input_ids[..size.input_ids.len() - 1].iter().map(|&id| id as usize);
            let embedding = rows(&found["model.embed_tokens.weight"], &mut ids);
            let embedding = assert_close(&name, &embedding, &data(&size.embedding), tolerance);
            println!("{name}: loss {loss_off:.1e}, norm {norm:.1e}, embedding {embedding:.1e}");
            assert_eq!(found.contains_key("lm_head.weight"), trained == "everything");
            if let Some(head) = found.get("lm_head.weight") {
                let head = Tensor::<2>::from_data(head.clone(), &Device::default()).transpose().into_data();
                let head = rows(&head, &mut size.tokens.iter().copied());
                println!("head {:.1e}", assert_close(&name, &head, &data(&size.head), tolerance));
            }
        }
        let evaluation = evaluate(&model, &[size.example()], &Collator::new(0), 1).unwrap();
        assert_close_number("evaluation", evaluation.loss, size.loss, LOSS_F64);

        // A merged head is frozen as well, with another weight than its base.
        let config = LoraConfig::new(2)
            .with_lora_alpha(6.0)
            .with_init_lora_weights(burn_peft::InitLoraWeights::Random)
            .with_target_modules(["lm_head", "embed_tokens"]);
        model.add_adapter(DEFAULT_ADAPTER, &config).unwrap();
        model = with_fixed_factors(model, DEFAULT_ADAPTER);
        let adapted = f64::from(model.loss(&batch).into_scalar::<f32>());
        assert!((adapted - size.loss).abs() > 1e-4, "the adapter matters");
        model.merge_adapter().unwrap();
        let merged = f64::from(model.loss(&batch).into_scalar::<f32>());
        assert!((merged / adapted - 1.0).abs() < 1e-5, "{merged} {adapted}");
    }
}

#[test]
fn gradients_of_a_real_model_are_those_of_float64() {
    let [Some(base), Some(adapter)] = ["BURN_PEFT_SMOLLM2", "BURN_PEFT_SMOLLM2_GRADIENTS"].map(|name| {
        let path = std::env::var_os(name).map(PathBuf::from);
        if path.is_none() {
            println!("skipped: `{name}` is not set");
        }
        path
    }) else {
        return;
    };
    let expected = read_file(&adapter.join("expected.safetensors"));
    let integers = |name: &str| expected[name].iter::<i64>().collect::<Vec<_>>();
    let (ids, labels, width) = (integers("input_ids"), integers("labels"), expected["input_ids"].shape()[1]);
    let examples: Vec<Example> = ids
        .chunks(width)
        .zip(labels.chunks(width))
        .map(|(ids, labels)| {
            // The last token of every sequence is labelled.
            let length = labels.iter().rposition(|&label| label >= 0).unwrap() + 1;
            let input_ids = ids[..length].iter().map(|&id| u32::try_from(id).unwrap()).collect();
            Example { input_ids, labels: labels[..length].to_vec() }
        })
        .collect();

    let device = Device::default().autodiff();
    let mut model = LlamaForCausalLm::from_pretrained(base, &device).unwrap();
    model.load_adapter(DEFAULT_ADAPTER, &adapter).unwrap();
    let batch = Collator::new(0).collate(&examples, &device).unwrap();
    let loss = model.loss(&batch);
    let found = f64::from(loss.clone().into_scalar::<f32>());
    let expected_loss: Vec<f32> = expected["loss"].iter().collect();
    let loss_off = assert_close_number("loss", found, f64::from(expected_loss[0]), LOSS_F64);
    let found = to_peft(&model, &gradients(&model, &GradientsParams::from_grads(loss.backward(), &model)));
    let wanted = expected.iter().filter_map(|(name, data)| Some((name.strip_prefix("grad.")?, data)));
    let deviations: Vec<f64> =
        wanted.map(|(key, data)| assert_close(key, &found[key], data, REAL_GRADIENT)).collect();
    assert_eq!(deviations.len(), found.len());
    let worst = deviations.into_iter().fold(0.0, f64::max);
    println!("{} tensors: loss {loss_off:.1e}, gradients {worst:.1e}", found.len());
}
