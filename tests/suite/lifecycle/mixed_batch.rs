//! Batches whose rows have adapters of their own.

use burn::module::Module;
use burn::tensor::{Device, TensorData};
use burn_peft::{Bias, PeftError, PeftModel};
use burn_peft_llama::{Collator, GenerateOptions, LlamaError, LlamaForCausalLm, PaddingSide};
use burn_peft_tests::fixture::{Fixture, PAD_TOKEN_ID, directory};
use burn_peft_tests::parameters::{parameters, with_fixed_factors};
use burn_peft_tests::tolerance::{LOSS, REORDERED, assert_close, assert_close_number, assert_different};

use super::{Net, base, ids, poisoned, random, stir};
use crate::common::{load_base, masked_logits};

/// Row `i` of `[batch, ..]`.
pub(super) fn row(data: &TensorData, i: usize) -> Vec<f32> {
    let values: Vec<f32> = data.iter().collect();
    let width = values.len() / data.shape()[0];
    values[i * width..][..width].to_vec()
}

/// `biased` has a `lora_bias`, `wide` adapts the embedding as well.
fn net(device: &Device) -> Net {
    let mut net = Net::new(device);
    net.add_adapter("biased", random(3, ["up"]).with_lora_bias(true)).unwrap();
    net.add_adapter("wide", random(2, ["up", "token"])).unwrap();
    stir(net)
}

#[test]
fn every_row_is_what_its_adapter_makes_of_it_alone() {
    for device in [Device::default(), Device::default().autodiff()] {
        let mut net = net(&device);
        let bare = net.without_adapters().unwrap().output();
        let mut alone = |name: &str| {
            net.set_adapter(&[name]).unwrap();
            net.output()
        };
        let (biased, wide) = (alone("biased"), alone("wide"));
        assert_different("biased", &biased, &wide);
        assert_different("wide", &wide, &bare);
        let of = |row: &Option<&str>| match row {
            Some("biased") => &biased,
            Some(_) => &wide,
            None => &bare,
        };
        for rows in [
            [Some("biased"), None, Some("wide")],
            [Some("wide"), Some("biased"), Some("wide")],
            [None, None, Some("biased")],
            [None, None, None],
        ] {
            let mixed = net.for_rows(&rows).unwrap();
            let output = mixed.output();
            for (i, name) in rows.iter().enumerate() {
                assert_eq!(row(&output, i), row(of(name), i), "{rows:?}, row {i}");
            }
            assert_eq!(base(&mixed), base(&net));
        }
        assert_eq!(net.output(), wide, "the model itself stays as it was");
    }
}

#[test]
fn other_models_of_the_rows_keep_them_and_switching_ends_them() {
    let net = net(&Device::default().autodiff());
    let rows = [Some("wide"), None, Some("biased")];
    let mut mixed = net.for_rows(&rows).unwrap();
    assert_eq!(mixed.valid().output(), net.valid().for_rows(&rows).unwrap().output());
    assert_eq!(mixed.clone().fork(&Device::default().autodiff()).output(), mixed.output());
    mixed.set_adapter(&["biased"]).unwrap();
    assert_eq!(mixed.output(), net.output());
    assert_eq!(parameters(&mixed), parameters(&net));
}

#[test]
#[should_panic(expected = "the batch has 3 rows, adapters were named for 2")]
fn another_number_of_rows_panics() {
    net(&Device::default()).for_rows(&[Some("biased"), None]).unwrap().output();
}

#[test]
#[should_panic(expected = "the batch has 3 rows, adapters were named for 4")]
fn another_number_of_rows_panics_in_an_embedding() {
    let mixed = net(&Device::default()).for_rows(&[Some("wide"), None, None, None]).unwrap();
    mixed.token.forward(ids(&Device::default()));
}

#[test]
fn what_all_rows_share_cannot_be_named() {
    let reason = |net: &Net, rows: &[Option<&str>]| match net.for_rows(rows) {
        Err(PeftError::MixedBatch { name, reason }) => format!("{name}: {reason}"),
        other => panic!("{other:?}"),
    };
    let mut net = net(&Device::default());
    net.add_adapter("plain", random(2, ["up", "down"])).unwrap();
    net.add_adapter("copies", random(2, ["up"]).with_bias(Bias::LoraOnly)).unwrap();
    let rows = [Some("biased"), Some("plain"), None];
    assert_eq!(reason(&net, &rows), "plain: `down` is a plain layer, whose weight all rows share");
    assert_eq!(reason(&net, &[Some("copies")]), "copies: it replaces a parameter of `up` for all rows");

    net.merge_adapter().unwrap();
    for rows in [[Some("biased")], [Some("wide")], [None]] {
        let error = net.for_rows(&rows).unwrap_err();
        assert!(matches!(error, PeftError::MergedAdapter { ref name } if name == "biased"), "{error}");
    }
    net.unmerge_adapter().unwrap();
    net.for_rows(&[Some("biased"), Some("wide"), None]).unwrap();
}

#[test]
fn prompts_are_answered_together_as_apart() {
    let device = Device::default();
    let mut model = load_base("gqa-tied", &device);
    for name in ["one", "two"] {
        model.load_adapter(name, directory("two-adapters").join(name)).unwrap();
    }
    let prompts = [vec![35, 20, 13, 25], vec![55, 60, 53, 17, 4, 77, 12], vec![35, 20, 13, 25]];
    let options = GenerateOptions::new().with_max_new_tokens(12);
    // All rows must go on for as long as the batch does.
    model.config_mut().eos_token_ids.clear();
    let rows = [Some("one"), Some("two"), None];
    let apart: Vec<Vec<u32>> = rows
        .iter()
        .zip(&prompts)
        .map(|(row, prompt)| {
            let names: Vec<&str> = row.iter().copied().collect();
            model.set_adapter(&names).unwrap();
            model.generate(std::slice::from_ref(prompt), &options).unwrap().remove(0)
        })
        .collect();
    assert_ne!(apart[0], apart[2], "the adapter changes the answer");
    let mixed = model.for_rows(&rows).unwrap();
    assert_eq!(mixed.generate(&prompts, &options).unwrap(), apart);
}

#[test]
fn what_a_broken_adapter_gives_stays_in_its_rows() {
    let mut net = net(&Device::default());
    net.add_adapter("broken", random(2, ["up"])).unwrap();
    let net = poisoned(net, "up.weight.peft.broken.a", f32::NAN);
    let bare = net.without_adapters().unwrap().output();
    let mixed = net.for_rows(&[Some("broken"), None, None]).unwrap().output();
    assert!(row(&mixed, 0).iter().any(|value| !value.is_finite()));
    assert_eq!(row(&mixed, 1), row(&bare, 1));
}

#[test]
fn rows_forget_an_adapter_that_was_deleted() {
    let net = net(&Device::default());
    let bare = net.without_adapters().unwrap().output();
    let mut mixed = net.for_rows(&[Some("wide"), None, None]).unwrap();
    assert_different("wide", &mixed.output(), &bare);
    mixed.delete_adapter("wide").unwrap();
    mixed.add_adapter("wide", random(2, ["up", "token"])).unwrap();
    assert_eq!(mixed.output(), bare);
}

#[test]
fn a_model_whose_rows_name_adapters_is_not_merged() {
    let mut mixed = net(&Device::default()).for_rows(&[Some("wide"), None, None]).unwrap();
    let before = mixed.output();
    for error in [mixed.merge_adapter().unwrap_err(), mixed.merge_and_unload().unwrap_err()] {
        assert!(matches!(&error, PeftError::RowsNameAdapters { name } if name == "wide"), "{error}");
    }
    assert_eq!(mixed.output(), before);
}

#[test]
fn dropout_does_not_act_on_a_mixed_batch() {
    let mut net = Net::new(&Device::default().autodiff());
    net.add_adapter("one", random(3, ["up"]).with_lora_dropout(0.5)).unwrap();
    let mixed = net.for_rows(&[Some("one"), Some("one"), None]).unwrap();
    assert_eq!(mixed.output(), mixed.output());
    assert_different("dropout", &net.output(), &net.output());
}

/// Adapters of everything that reads tokens or makes them: `peft` is the one of the fixture, on the output layer and in
/// the blocks, `wide` is on the embedding and the output layer.
fn with_adapted_head(device: &Device) -> (Fixture, LlamaForCausalLm) {
    let fixture = Fixture::open("mha-biased-head");
    let mut model = load_base("mha-biased", device);
    model.load_adapter("peft", &fixture.directory).unwrap();
    model.add_adapter("wide", random(2, ["embed_tokens", "lm_head", "v_proj"])).unwrap();
    (fixture, with_fixed_factors(model, "wide"))
}

const MIXED: [[Option<&str>; 3]; 3] = [
    [Some("peft"), None, Some("wide")],
    [Some("wide"), Some("wide"), Some("peft")],
    [None, Some("peft"), None],
];

/// The model with that adapter alone, or none.
fn alone(model: &LlamaForCausalLm, name: Option<&str>) -> LlamaForCausalLm {
    let mut model = model.clone();
    model.set_adapter(&name.into_iter().collect::<Vec<_>>()).unwrap();
    model
}

#[test]
fn an_adapted_output_layer_sees_the_rows_of_the_batch() {
    for device in [Device::default(), Device::default().autodiff()] {
        let (fixture, model) = with_adapted_head(&device);
        for side in [PaddingSide::Right, PaddingSide::Left] {
            let batch = fixture.batch(side, &device);
            let bare = masked_logits(&alone(&model, None), &batch);
            assert_close(
                "peft",
                &masked_logits(&alone(&model, Some("peft")), &batch),
                fixture.logits(side),
                REORDERED,
            );
            for rows in MIXED {
                let mixed = masked_logits(&model.for_rows(&rows).unwrap(), &batch);
                for (i, name) in rows.into_iter().enumerate() {
                    let expected = masked_logits(&alone(&model, name), &batch);
                    let one = |data: &TensorData| TensorData::new(row(data, i), [row(data, i).len()]);
                    assert_close(&format!("{rows:?} {i}"), &one(&mixed), &one(&expected), REORDERED);
                    if name.is_some() {
                        assert_different("adapted", &one(&mixed), &one(&bare));
                    }
                }
            }
        }
    }
}

#[test]
fn the_loss_of_a_mixed_batch_is_the_mean_of_its_rows() {
    for device in [Device::default(), Device::default().autodiff()] {
        let (fixture, model) = with_adapted_head(&device);
        let examples = fixture.examples();
        for rows in MIXED {
            let of_row = |i: usize, name: Option<&str>| {
                let batch = Collator::new(PAD_TOKEN_ID).collate(&examples[i..=i], &device).unwrap();
                let loss = alone(&model, name).loss(&batch).into_scalar::<f32>();
                f64::from(loss) * batch.num_targets as f64
            };
            let sum: f64 = rows.into_iter().enumerate().map(|(i, name)| of_row(i, name)).sum();
            for side in [PaddingSide::Right, PaddingSide::Left] {
                let batch = fixture.batch(side, &device);
                let found = model.for_rows(&rows).unwrap().loss(&batch).into_scalar::<f32>();
                let expected = sum / batch.num_targets as f64;
                assert_close_number("loss", f64::from(found), expected, LOSS);
                let bare = alone(&model, None).loss(&batch).into_scalar::<f32>();
                assert!((f64::from(bare) - expected).abs() > 1e-4, "{rows:?}");
            }
        }
    }
}

#[test]
fn rows_that_end_leave_the_others_their_adapters() {
    for device in [Device::default(), Device::default().autodiff()] {
        let (_, mut model) = with_adapted_head(&device);
        model.config_mut().eos_token_ids.clear();
        let prompts = [vec![35, 20, 13, 25], vec![55, 60, 53, 17, 4, 77, 12], vec![8], vec![90, 1, 33]];
        let rows = [Some("peft"), None, Some("wide"), Some("peft")];
        let mixed = model.for_rows(&rows).unwrap();
        let mut options = GenerateOptions::new().with_max_new_tokens(10);
        let apart = |options: &GenerateOptions| -> Vec<Vec<u32>> {
            let answer = |(&name, prompt): (&Option<&str>, &Vec<u32>)| {
                alone(&model, name).generate(std::slice::from_ref(prompt), options).unwrap().remove(0)
            };
            rows.iter().zip(&prompts).map(answer).collect()
        };
        let free = apart(&options);
        assert_eq!(mixed.generate(&prompts, &options).unwrap(), free);
        // Every row ends first once, at once or on the way; several end together.
        for stops in
            [vec![free[0][0]], vec![free[1][0]], vec![free[2][0], free[0][2]], vec![free[3][1], free[1][4]]]
        {
            options.stop_token_ids = stops;
            let expected = apart(&options);
            let lengths: Vec<usize> = expected.iter().map(Vec::len).collect();
            assert!(lengths.iter().any(|length| length != &lengths[0]), "{lengths:?}");
            assert_eq!(mixed.generate(&prompts, &options).unwrap(), expected, "{options:?}");
        }
    }
}

#[test]
fn prompts_without_a_row_and_rows_without_a_prompt_are_an_error() {
    let (_, model) = with_adapted_head(&Device::default());
    let mixed = model.for_rows(&[Some("peft"), None]).unwrap();
    let options = GenerateOptions::new().with_max_new_tokens(2);
    for count in [1, 3] {
        let error = mixed.generate(&vec![vec![5]; count], &options).unwrap_err();
        assert!(matches!(error, LlamaError::BatchRows { rows: 2, prompts } if prompts == count), "{error}");
        let start =
            format!("expected a prompt for each of the 2 rows that name adapters, found {count}\nhint: ");
        assert!(error.to_string().starts_with(&start), "{error}");
    }
    assert_eq!(mixed.generate(&[vec![5], vec![6]], &options).unwrap().len(), 2);
}

#[test]
fn selected_rows_have_the_adapters_of_the_rows_they_were() {
    let net = net(&Device::default().autodiff());
    let mixed = net.for_rows(&[Some("biased"), None, Some("wide"), None]).unwrap();
    assert_eq!((mixed.batch_rows(), net.batch_rows()), (Some(4), None));
    let selected = mixed.select_rows(&[2, 0, 0]).unwrap();
    assert_eq!(selected.batch_rows(), Some(3));
    let expected = net.for_rows(&[Some("wide"), Some("biased"), Some("biased")]).unwrap().output();
    assert_eq!(selected.output(), expected);
    assert_different("the net itself", &expected, &net.output());
    assert_eq!(selected.select_rows(&[1, 2, 0]).unwrap().output(), {
        let rows = [Some("biased"), Some("biased"), Some("wide")];
        net.for_rows(&rows).unwrap().output()
    });
    assert_eq!(net.select_rows(&[9]).unwrap().output(), net.output(), "nothing to select from");
    assert_eq!(base(&selected), base(&net));
}
