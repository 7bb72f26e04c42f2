//! Batches whose rows have adapters of their own.

use burn::module::Module;
use burn::tensor::{Device, TensorData};
use burn_peft::{Bias, PeftError, PeftModel};
use burn_peft_llama::GenerateOptions;
use burn_peft_tests::fixture::directory;
use burn_peft_tests::parameters::parameters;
use burn_peft_tests::tolerance::assert_different;

use super::{Net, base, ids, random, stir};
use crate::common::load_base;

/// Row `i` of `[batch, ..]`.
pub(super) fn row(data: &TensorData, i: usize) -> Vec<f32> {
    let values: Vec<f32> = data.iter().collect();
    let width = values.len() / data.shape()[0];
    values[i * width..][..width].to_vec()
}

/// `biased` has a `lora_bias`, `wide` adapts the embedding as well.
fn net(device: &Device) -> Net {
    let mut net = Net::new(device);
    net.add_adapter("biased", &random(3, ["up"]).with_lora_bias(true)).unwrap();
    net.add_adapter("wide", &random(2, ["up", "token"])).unwrap();
    stir(net)
}

#[test]
fn every_row_is_what_its_adapter_makes_of_it_alone() {
    for device in [Device::flex(), Device::flex().autodiff()] {
        let mut net = net(&device);
        let bare = net.disable_adapter().unwrap().output();
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
            let mixed = net.with_adapter_names(&rows).unwrap();
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
    let net = net(&Device::flex().autodiff());
    let rows = [Some("wide"), None, Some("biased")];
    let mut mixed = net.with_adapter_names(&rows).unwrap();
    assert_eq!(mixed.valid().output(), net.valid().with_adapter_names(&rows).unwrap().output());
    assert_eq!(mixed.clone().fork(&Device::flex().autodiff()).output(), mixed.output());
    mixed.set_adapter(&["biased"]).unwrap();
    assert_eq!(mixed.output(), net.output());
    assert_eq!(parameters(&mixed), parameters(&net));
}

#[test]
#[should_panic(expected = "the batch has 3 rows, adapters were named for 2")]
fn another_number_of_rows_panics() {
    net(&Device::flex()).with_adapter_names(&[Some("biased"), None]).unwrap().output();
}

#[test]
#[should_panic(expected = "the batch has 3 rows, adapters were named for 4")]
fn another_number_of_rows_panics_in_an_embedding() {
    let mixed = net(&Device::flex()).with_adapter_names(&[Some("wide"), None, None, None]).unwrap();
    mixed.token.forward(ids(&Device::flex()));
}

#[test]
fn what_all_rows_share_cannot_be_named() {
    let reason = |net: &Net, rows: &[Option<&str>]| match net.with_adapter_names(rows) {
        Err(PeftError::MixedBatch { name, reason }) => format!("{name}: {reason}"),
        other => panic!("{other:?}"),
    };
    let mut net = net(&Device::flex());
    net.add_adapter("plain", &random(2, ["up", "down"])).unwrap();
    net.add_adapter("copies", &random(2, ["up"]).with_bias(Bias::LoraOnly)).unwrap();
    let rows = [Some("biased"), Some("plain"), None];
    assert_eq!(reason(&net, &rows), "plain: `down` is a plain layer, whose weight all rows share");
    assert_eq!(reason(&net, &[Some("copies")]), "copies: it replaces a parameter of `up` for all rows");

    net.merge_adapter().unwrap();
    for rows in [[Some("biased")], [Some("wide")], [None]] {
        let error = net.with_adapter_names(&rows).unwrap_err();
        assert!(matches!(error, PeftError::MergedAdapter { ref name } if name == "biased"), "{error}");
    }
    net.unmerge_adapter().unwrap();
    net.with_adapter_names(&[Some("biased"), Some("wide"), None]).unwrap();
}

#[test]
fn prompts_are_answered_together_as_apart() {
    let device = Device::flex();
    let mut model = load_base("gqa-tied", &device);
    for name in ["one", "two"] {
        model.load_adapter(name, directory("two-adapters").join(name)).unwrap();
    }
    let prompts = [vec![35, 20, 13, 25], vec![55, 60, 53, 17, 4, 77, 12], vec![35, 20, 13, 25]];
    let options = GenerateOptions { max_new_tokens: 12, ..Default::default() };
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
    let mixed = model.with_adapter_names(&rows).unwrap();
    assert_eq!(mixed.generate(&prompts, &options).unwrap(), apart);
}

#[test]
fn what_a_broken_adapter_gives_stays_in_its_rows() {
    let mut net = net(&Device::flex());
    net.add_adapter("broken", &random(2, ["up"]).with_lora_alpha(1e300)).unwrap();
    let bare = net.disable_adapter().unwrap().output();
    let mixed = net.with_adapter_names(&[Some("broken"), None, None]).unwrap().output();
    assert!(row(&mixed, 0).iter().any(|value| !value.is_finite()));
    assert_eq!(row(&mixed, 1), row(&bare, 1));
}

#[test]
fn rows_forget_an_adapter_that_was_deleted() {
    let net = net(&Device::flex());
    let bare = net.disable_adapter().unwrap().output();
    let mut mixed = net.with_adapter_names(&[Some("wide"), None, None]).unwrap();
    assert_different("wide", &mixed.output(), &bare);
    mixed.delete_adapter("wide").unwrap();
    mixed.add_adapter("wide", &random(2, ["up", "token"])).unwrap();
    assert_eq!(mixed.output(), bare);
}

#[test]
fn a_model_whose_rows_name_adapters_is_not_merged() {
    let mut mixed = net(&Device::flex()).with_adapter_names(&[Some("wide"), None, None]).unwrap();
    let before = mixed.output();
    for error in [mixed.merge_adapter().unwrap_err(), mixed.merge_and_unload().unwrap_err()] {
        assert!(matches!(&error, PeftError::RowsNameAdapters { name } if name == "wide"), "{error}");
    }
    assert_eq!(mixed.output(), before);
}

#[test]
fn dropout_does_not_act_on_a_mixed_batch() {
    let mut net = Net::new(&Device::flex().autodiff());
    net.add_adapter("one", &random(3, ["up"]).with_lora_dropout(0.5)).unwrap();
    let mixed = net.with_adapter_names(&[Some("one"), Some("one"), None]).unwrap();
    assert_eq!(mixed.output(), mixed.output());
    assert_different("dropout", &net.output(), &net.output());
}
