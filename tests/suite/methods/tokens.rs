//! Trained tokens: what is refused, and what a tied output layer reads.

use burn::tensor::Device;
use burn_peft::{CombinationType, LoraConfig, PeftError, PeftModel, TokenIndices};
use burn_peft_llama::PaddingSide;
use burn_peft_tests::fixture::Fixture;
use burn_peft_tests::tolerance::{REORDERED, assert_close};

use crate::common::{load_adapted, load_base, masked_logits};

fn config(indices: impl Into<TokenIndices>) -> LoraConfig {
    LoraConfig::new(2).with_target_modules(["q_proj"]).with_trainable_token_indices(indices)
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let mut model = load_base("mha-biased", &Device::default());
    let mut message = |config: LoraConfig| {
        let error = model.add_adapter("default", &config).unwrap_err();
        assert!(
            matches!(error, PeftError::InvalidConfig { field: "trainable_token_indices", .. }),
            "{error}"
        );
        assert!(model.adapters().is_empty());
        error.to_string()
    };
    let start = "invalid `trainable_token_indices`: expected";
    assert_eq!(
        message(config(Vec::<usize>::new())),
        format!("{start} at least one token, found an empty list")
    );
    assert_eq!(message(config([5, 5])), format!("{start} each token once, found 5 twice"));
    assert_eq!(
        message(config([5, 96])),
        format!("{start} tokens of the vocabulary, found 96 for `model.embed_tokens`, which has 96")
    );
    assert_eq!(
        message(config([("nope", vec![5])])),
        format!("{start} names of embeddings or linear layers, found `nope`, which matches none")
    );
    let both = "modules that are neither in `target_modules` nor in `modules_to_save`, found `model.embed_tokens`, which is in";
    assert_eq!(
        message(config([5]).with_target_modules(["q_proj", "embed_tokens"])),
        format!("{start} {both} `target_modules`")
    );
    assert_eq!(
        message(config([5]).with_modules_to_save(["embed_tokens"])),
        format!("{start} {both} `modules_to_save`")
    );
}

#[test]
fn two_adapters_with_tokens_of_one_table_are_not_active_together() {
    let mut model = load_base("mha-biased", &Device::default());
    model.add_adapter("one", config([5])).unwrap();
    model.add_adapter("two", config([7])).unwrap();
    let error = model.set_adapter(&["one", "two"]).unwrap_err();
    assert!(matches!(error, PeftError::ConflictingCopies { .. }), "{error}");
    model.set_adapter(&["two"]).unwrap();
    let error = model.add_weighted_adapter("sum", &[("one", 1.0)], CombinationType::Linear).unwrap_err();
    assert!(matches!(error, PeftError::CannotCombine { .. }), "{error}");
}

#[test]
fn rows_of_a_batch_can_have_tokens_of_their_own_where_the_output_layer_has_its_own_weight() {
    let device = Device::default();
    let fixture = Fixture::open("mha-biased-tokens-both");
    let model = load_adapted(&fixture, &device);
    let batch = fixture.batch(PaddingSide::Right, &device);
    let rows: Vec<Option<&str>> =
        (0..batch.input_ids.dims()[0]).map(|i| (i % 2 == 0).then_some("default")).collect();
    let mixed = masked_logits(&model.for_rows(&rows).unwrap(), &batch);
    let [adapted, base] =
        [model.clone(), model.without_adapters().unwrap()].map(|model| masked_logits(&model, &batch));
    let width = mixed.num_elements() / rows.len();
    let part = |data: &burn::tensor::TensorData, row: usize| -> burn::tensor::TensorData {
        let values: Vec<f32> = data.iter().skip(row * width).take(width).collect();
        burn::tensor::TensorData::new(values, [width])
    };
    for (row, name) in rows.iter().enumerate() {
        let expected = if name.is_some() { &adapted } else { &base };
        assert_close("a row", &part(&mixed, row), &part(expected, row), REORDERED);
    }

    let tied = load_adapted(&Fixture::open("gqa-tied-tokens"), &device);
    let error = tied.for_rows(&[Some("default"), None]).unwrap_err();
    assert!(matches!(error, PeftError::MixedBatch { .. }), "{error}");
}

#[test]
fn merged_tokens_stay_tied() {
    let device = Device::default();
    for case in ["gqa-tied-tokens", "gqa-tied-tokens-tied"] {
        let fixture = Fixture::open(case);
        let mut model = load_adapted(&fixture, &device);
        model.merge_and_unload().unwrap();
        assert!(model.config().tie_word_embeddings, "{case}");
        let batch = fixture.batch(PaddingSide::Right, &device);
        assert_close(case, &masked_logits(&model, &batch), fixture.data("merged.logits"), REORDERED);
    }
}

#[test]
fn merged_tokens_are_not_trained() {
    use burn::optim::GradientsParams;
    use burn_peft_tests::parameters::gradients;
    let device = Device::default().autodiff();
    let fixture = Fixture::open("gqa-tied-tokens");
    let mut model = load_adapted(&fixture, &device);
    model.add_adapter("other", LoraConfig::new(2).with_target_modules(["o_proj"])).unwrap();
    model.set_adapter(&["default", "other"]).unwrap();
    model.merge_adapters(&["default"]).unwrap();
    let loss = model.loss(&fixture.batch(PaddingSide::Right, &device));
    let found = gradients(&model, &GradientsParams::from_grads(loss.backward(), &model));
    assert!(!found.is_empty() && found.keys().all(|path| path.contains(".other.")), "{:?}", found.keys());
}
