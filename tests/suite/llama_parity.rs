//! The bare model computes what transformers computes.

use burn::optim::GradientsParams;
use burn::tensor::Device;
use burn_peft_llama::{GenerateOptions, LlamaConfig, LlamaForCausalLm, PaddingSide};
use burn_peft_tests::fixture::{BASES, Fixture};
use burn_peft_tests::parameters::{from_torch, gradients, parameters};
use burn_peft_tests::tolerance::{FORWARD, GRADIENT, LOSS, assert_close, assert_close_number};

use crate::common::{SIDES, load_base, masked_logits};

#[test]
fn configurations_of_both_generations_are_read() {
    let load = |case| LlamaConfig::load(&Fixture::open(case).directory).unwrap();
    let new = load("rope-scaled");
    assert_eq!(
        (new.hidden_size, new.num_attention_heads, new.num_key_value_heads, new.head_dim),
        (32, 4, 1, 12)
    );
    assert_eq!((new.tie_word_embeddings, new.attention_bias, new.mlp_bias), (false, false, false));
    assert_eq!((new.bos_token_id, new.eos_token_ids, new.pad_token_id), (Some(1), vec![2], Some(0)));

    let old = load("mha-biased");
    assert_eq!(
        (old.hidden_size, old.num_attention_heads, old.num_key_value_heads, old.head_dim),
        (48, 3, 3, 16)
    );
    assert_eq!((old.tie_word_embeddings, old.attention_bias, old.mlp_bias), (false, true, true));
    assert_eq!(old.eos_token_ids, [2, 3]);
    assert_eq!(old.rms_norm_eps, 1e-6);

    let tied = load("gqa-tied");
    assert_eq!((tied.tie_word_embeddings, tied.num_key_value_heads, tied.head_dim), (true, 2, 8));
    assert_eq!(tied.rms_norm_eps, 1e-5);

    let qwen2 = load("qwen2");
    assert_eq!((qwen2.model_type(), tied.model_type()), ("qwen2", "llama"));
    assert_eq!((qwen2.head_dim, qwen2.rope.rope_theta, qwen2.tie_word_embeddings), (8, 1e6, true));
}

#[test]
fn parameters_have_the_names_and_the_number_of_transformers() {
    for case in BASES {
        let fixture = Fixture::open(case);
        let model = load_base(case, &Device::default());
        let names: Vec<String> = parameters(&model).into_keys().collect();
        let expected: Vec<String> = fixture.with_prefix("grad.").into_keys().collect();
        assert_eq!(names, expected, "{case}");
        assert_eq!(Some(burn::module::Module::num_params(&model)), fixture.facts.num_parameters, "{case}");
    }
}

#[test]
fn logits_are_those_of_transformers_on_either_side_of_padding() {
    for case in BASES {
        let fixture = Fixture::open(case);
        let model = load_base(case, &Device::default());
        for side in SIDES {
            let batch = fixture.batch(side, &Device::default());
            let logits = masked_logits(&model, &batch);
            let deviation = assert_close(&format!("{case} logits"), &logits, fixture.logits(side), FORWARD);
            println!("{case}, {side:?} padding: logits deviate by {deviation:.1e}");
        }
    }
}

#[test]
fn loss_and_gradients_of_all_parameters_are_those_of_torch() {
    for case in BASES {
        let fixture = Fixture::open(case);
        let device = Device::default().autodiff();
        let model = load_base(case, &device);
        for side in SIDES {
            let loss = model.loss(&fixture.batch(side, &device));
            let value = f64::from(loss.clone().into_scalar::<f32>());
            let deviation = assert_close_number(&format!("{case} loss"), value, fixture.facts.loss, LOSS);

            let found = gradients(&model, &GradientsParams::from_grads(loss.backward(), &model));
            let expected = fixture.with_prefix("grad.");
            assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{case}");
            let worst = expected.iter().map(|(name, gradient)| {
                assert_close(
                    &format!("{case} gradient of {name}"),
                    &found[name],
                    &from_torch(name, gradient),
                    GRADIENT,
                )
            });
            let worst = worst.fold(0.0, f64::max);
            println!("{case}, {side:?} padding: loss deviates by {deviation:.1e}, gradients by {worst:.1e}");
        }
    }
}

#[test]
fn greedy_answers_are_those_of_transformers_together_and_alone() {
    for case in BASES {
        let greedy = Fixture::open(case).facts.greedy.unwrap();
        let options = GenerateOptions::new().with_max_new_tokens(greedy.max_new_tokens);
        for device in [Device::default(), Device::default().autodiff()] {
            let model = load_base(case, &device);
            assert_eq!(model.generate(&greedy.prompts, &options).unwrap(), greedy.answers, "{case}");
            for (prompt, answer) in greedy.prompts.iter().zip(&greedy.answers) {
                let alone = model.generate(std::slice::from_ref(prompt), &options).unwrap();
                assert_eq!(alone, std::slice::from_ref(answer), "{case}");
            }
        }
    }
}

#[test]
fn a_saved_model_comes_back_with_the_same_bits() {
    for case in BASES {
        let model = load_base(case, &Device::default());
        let directory = tempfile::tempdir().unwrap();
        model.save_pretrained(directory.path()).unwrap();
        let again = LlamaForCausalLm::from_pretrained(directory.path(), &Device::default()).unwrap();
        assert_eq!(parameters(&again), parameters(&model), "{case}");
        let batch = Fixture::open(case).batch(PaddingSide::Left, &Device::default());
        assert_eq!(masked_logits(&again, &batch), masked_logits(&model, &batch), "{case}");
    }
}
