//! An adapted model computes what peft computes.

use std::collections::{BTreeMap, BTreeSet};

use burn::optim::GradientsParams;
use burn::tensor::{Device, TensorData};
use burn_peft::{DEFAULT_ADAPTER, LoraConfig, ParameterSummary, PeftError, PeftModel, TargetModules};
use burn_peft_llama::PaddingSide;
use burn_peft_tests::fixture::{ADAPTERS, Fixture};
use burn_peft_tests::parameters::{base_parameters, from_torch, gradients, parameters, to_peft};
use burn_peft_tests::tolerance::{
    FORWARD, GRADIENT, LOSS, REORDERED, assert_close, assert_close_number, assert_different,
};

use crate::common::{SIDES, load_adapted, load_base, masked_logits};

#[test]
fn the_same_modules_are_adapted_with_the_same_ranks_and_the_same_parameters_trained_in_full() {
    for case in ADAPTERS {
        let fixture = Fixture::open(case);
        let mut model = load_base(fixture.facts.base.as_ref().unwrap(), &Device::default());
        let base = parameters(&model);
        let injection = model.load_adapter(DEFAULT_ADAPTER, &fixture.directory).unwrap().injection;
        let found: BTreeMap<String, usize> =
            injection.modules.iter().filter_map(|module| Some((module.path.clone(), module.r?))).collect();
        assert_eq!(found, fixture.facts.ranks, "{case}");
        assert_eq!(names(found.keys()), names(&fixture.facts.adapted_modules), "{case}");

        let bias = fixture.config()["bias"].clone();
        let is_trained = |path: &&String| {
            let (module, parameter) = path.rsplit_once('.').unwrap();
            let is_saved = fixture.facts.saved_modules.iter().any(|saved| saved == module);
            is_saved
                || parameter == "bias" && (bias == "all" || bias == "lora_only" && found.contains_key(module))
        };
        assert_eq!(names(&injection.copied_parameters), names(base.keys().filter(is_trained)), "{case}");
    }
}

#[test]
fn the_same_parameters_are_counted() {
    for case in ADAPTERS {
        let fixture = Fixture::open(case);
        let mut model = load_base(fixture.facts.base.as_ref().unwrap(), &Device::default());
        let injection = model.load_adapter(DEFAULT_ADAPTER, &fixture.directory).unwrap().injection;
        // peft trains biases of the base in place. Here a copy is trained, and counted beside the base's; what is saved
        // whole is a copy there too.
        let is_saved =
            |path: &String| fixture.facts.saved_modules.iter().any(|saved| path.starts_with(saved));
        let base = base_parameters(&model);
        let in_place = injection.copied_parameters.iter().filter(|path| !is_saved(path));
        let in_place: usize = in_place.map(|path| base[path].shape().num_elements()).sum();
        assert_eq!(in_place > 0, fixture.config()["bias"] != "none", "{case}");

        let found = model.trainable_parameters();
        assert_eq!(found.trainable, injection.num_params(), "{case}");
        let there = ParameterSummary { all: found.all - in_place, ..found };
        assert_eq!(Some(there.to_string()), fixture.facts.trainable_parameters, "{case}");
    }
}

#[test]
fn all_linear_is_what_peft_takes_it_for() {
    for case in ["gqa-tied-rslora", "mha-biased-all-linear", "mha-biased-patterns"] {
        let fixture = Fixture::open(case);
        let mut model = load_base(fixture.facts.base.as_ref().unwrap(), &Device::default());
        let config = LoraConfig::new(2).with_target_modules(TargetModules::AllLinear);
        let report = model.add_adapter(DEFAULT_ADAPTER, &config).unwrap();
        let found = names(report.modules.iter().map(|module| &module.path));
        assert_eq!(found, names(&fixture.facts.adapted_modules), "{case}");
    }
}

#[test]
fn logits_are_those_of_peft() {
    for case in ADAPTERS {
        let fixture = Fixture::open(case);
        let model = load_adapted(&fixture, &Device::default());
        let base = load_base(fixture.facts.base.as_ref().unwrap(), &Device::default());
        for side in SIDES {
            let batch = fixture.batch(side, &Device::default());
            let logits = masked_logits(&model, &batch);
            let deviation = assert_close(&format!("{case} logits"), &logits, fixture.logits(side), FORWARD);
            assert_different(case, &logits, &masked_logits(&base, &batch));
            println!("{case}, {side:?} padding: logits deviate by {deviation:.1e}");
        }
    }
}

#[test]
fn loss_and_gradients_of_all_adapter_tensors_are_those_of_peft() {
    for case in ADAPTERS {
        let fixture = Fixture::open(case);
        let device = Device::default().autodiff();
        let model = load_adapted(&fixture, &device);
        for side in SIDES {
            let loss = model.loss(&fixture.batch(side, &device));
            let value = f64::from(loss.clone().into_scalar::<f32>());
            let deviation = assert_close_number(&format!("{case} loss"), value, fixture.facts.loss, LOSS);

            let found = gradients(&model, &GradientsParams::from_grads(loss.backward(), &model));
            let count = found.len();
            let found = to_peft(&model, &found);
            let expected = fixture.with_prefix("grad.");
            assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{case}");
            assert_eq!(count, expected.len(), "{case}: the base has gradients");
            let worst = expected.iter().map(|(key, gradient)| {
                assert_close(&format!("{case} gradient of {key}"), &found[key], gradient, GRADIENT)
            });
            let worst = worst.fold(0.0, f64::max);
            println!("{case}, {side:?} padding: loss deviates by {deviation:.1e}, gradients by {worst:.1e}");
        }
    }
}

#[test]
fn merged_logits_are_those_of_peft_and_not_those_of_the_base() {
    for case in ADAPTERS {
        let fixture = Fixture::open(case);
        if !fixture.has("merged.logits") {
            // peft itself merges the embedding's adapter into the tied head as well.
            let is_tied = ["gqa-tied-embedding", "gqa-tied-dora-embedding"].contains(&case);
            assert_ne!(fixture.facts.merge_error.is_some(), is_tied, "{case}");
            continue;
        }
        for device in [Device::default(), Device::default().autodiff()] {
            let batch = fixture.batch(PaddingSide::Right, &device);
            let base = load_base(fixture.facts.base.as_ref().unwrap(), &device);
            let mut model = load_adapted(&fixture, &device);
            let adapted = masked_logits(&model, &batch);
            model.merge_and_unload().unwrap();
            let merged = masked_logits(&model, &batch);
            let deviation = assert_close(case, &merged, fixture.data("merged.logits"), FORWARD);
            assert_close(case, &merged, &adapted, REORDERED);
            assert_different(case, &merged, &masked_logits(&base, &batch));
            assert!(model.adapters().is_empty());
            println!("{case}: merged logits deviate by {deviation:.1e}");
        }
    }
}

#[test]
fn what_peft_cannot_merge_is_refused_and_the_model_stays_as_it_was() {
    let is_refused = |case: &&str| Fixture::open(case).facts.merge_error.is_some();
    let cases: Vec<&str> = ADAPTERS.into_iter().filter(is_refused).collect();
    assert_eq!(cases, ["gqa-tied-lora-bias"]);
    for case in cases {
        let fixture = Fixture::open(case);
        let device = Device::default();
        let batch = fixture.batch(PaddingSide::Right, &device);
        let mut model = load_adapted(&fixture, &device);
        let before = (parameters(&model), masked_logits(&model, &batch), model.adapters());
        let error = model.merge_and_unload().unwrap_err();
        let PeftError::NoBiasToMergeInto { name, modules } = &error else { panic!("{error}") };
        assert_eq!(name, DEFAULT_ADAPTER);
        assert_eq!(names(modules), names(&fixture.facts.adapted_modules));
        assert_eq!((parameters(&model), masked_logits(&model, &batch), model.adapters()), before);
    }
}

#[test]
fn merging_for_now_changes_no_logits_and_unmerging_no_bits() {
    for case in ADAPTERS {
        let fixture = Fixture::open(case);
        for device in [Device::default(), Device::default().autodiff()] {
            let mut model = load_adapted(&fixture, &device);
            let logits = |model: &_| SIDES.map(|side| masked_logits(model, &fixture.batch(side, &device)));
            let (before, adapted) = (parameters(&model), logits(&model));
            let report = model.merge_adapter().unwrap();
            assert!(model.adapters()[0].merged, "{case}");
            assert_eq!(report.largest_error, 0.0, "{case}: everything is f32");
            let merged = logits(&model);
            for (merged, adapted) in merged.iter().zip(&adapted) {
                let deviation = assert_close(case, merged, adapted, REORDERED);
                println!("{case}: logits merged for now deviate by {deviation:.1e}");
            }
            if fixture.has("merged.logits") {
                assert_close(case, &merged[0], fixture.data("merged.logits"), FORWARD);
            }
            model.unmerge_adapter().unwrap();
            assert!(!model.adapters()[0].merged, "{case}");
            assert_eq!(logits(&model), adapted, "{case}");
            assert_eq!(parameters(&model), before, "{case}");
        }
    }
}

/// Every adapted weight becomes `W + scaling * A B` with peft's scaling, and nothing else changes but what is trained in
/// full and the biases that take up a `lora_bias`: these become what the file has.
#[test]
fn merged_parameters_are_the_formula_in_double_precision() {
    for case in ADAPTERS {
        let fixture = Fixture::open(case);
        if fixture.facts.merge_error.is_some() {
            continue;
        }
        let mut model = load_adapted(&fixture, &Device::default());
        let base = base_parameters(&model);
        model.merge_and_unload().unwrap();
        let stored = fixture.adapter_tensors();
        for (path, merged) in parameters(&model) {
            let (module, parameter) = path.rsplit_once('.').unwrap();
            let scaling = fixture.facts.scalings.get(module).copied();
            let find = |suffix: &str| stored.get(&format!("base_model.model.{module}.{suffix}"));
            let factors = [["lora_A.weight", "lora_B.weight"], ["lora_embedding_A", "lora_embedding_B"]];
            let factors = factors.map(|[a, b]| Some((find(a)?, find(b)?))).into_iter().flatten().next();
            let bias = find("lora_B.bias");
            let saved = find(parameter).or_else(|| find("base_layer.bias").filter(|_| parameter == "bias"));
            let tokens = find("token_adapter.trainable_tokens_delta");
            let magnitude = find("lora_magnitude_vector");
            let expected = match (parameter, factors, bias, saved) {
                (_, _, _, Some(saved)) => from_torch(&path, saved),
                ("weight", None, ..) if tokens.is_some() => {
                    with_rows(&base[&path], module == "lm_head", &fixture.tokens(module), tokens.unwrap())
                }
                ("weight", Some((a, b)), ..) if magnitude.is_some() => {
                    let moved = sum(&base[&path], scaling.unwrap(), &product(a, b));
                    with_norms(&moved, magnitude.unwrap())
                }
                ("weight", Some((a, b)), ..) => sum(&base[&path], scaling.unwrap(), &product(a, b)),
                ("bias", _, Some(bias), _) => {
                    sum(&base[&path], scaling.unwrap(), &bias.iter::<f64>().collect::<Vec<_>>())
                }
                // The output layer of a tied base gets a copy of the table before an update is merged into that.
                _ if path == "lm_head.weight" && !base.contains_key(&path) => {
                    from_torch(&path, &base["model.embed_tokens.weight"])
                }
                _ => base[&path].clone(),
            };
            assert_close(&format!("{case} {path}"), &merged, &expected, REORDERED);
        }
    }
}

/// `base + scaling * update`.
fn sum(base: &TensorData, scaling: f64, update: &[f64]) -> TensorData {
    let sum = base.iter::<f64>().zip(update).map(|(base, update)| base + scaling * update);
    TensorData::new(sum.collect::<Vec<_>>(), base.shape().clone())
}

/// The columns of a matrix `[d_in, d_out]` with these norms: DoRA's formula.
fn with_norms(matrix: &TensorData, norms: &TensorData) -> TensorData {
    let (columns, norms) = (matrix.shape()[1], norms.iter::<f64>().collect::<Vec<_>>());
    let values: Vec<f64> = matrix.iter().collect();
    let square = |column: usize| values.iter().skip(column).step_by(columns).map(|x| x * x).sum::<f64>();
    let gains: Vec<f64> = (0..columns).map(|column| norms[column] / square(column).sqrt()).collect();
    let scaled = values.iter().enumerate().map(|(at, x)| x * gains[at % columns]);
    TensorData::new(scaled.collect::<Vec<_>>(), matrix.shape().clone())
}

/// A matrix with these rows, or columns, in the place of those of the tokens.
fn with_rows(matrix: &TensorData, are_columns: bool, tokens: &[usize], rows: &TensorData) -> TensorData {
    let (columns, width) = (matrix.shape()[1], rows.shape()[1]);
    let (mut values, rows): (Vec<f64>, Vec<f64>) = (matrix.iter().collect(), rows.iter().collect());
    for (row, &token) in tokens.iter().enumerate() {
        for i in 0..width {
            let at = if are_columns { i * columns + token } else { token * columns + i };
            values[at] = rows[row * width + i];
        }
    }
    TensorData::new(values, matrix.shape().clone())
}

/// `A B` row by row, from torch's `[r, d_in]` and `[d_out, r]`.
fn product(a: &TensorData, b: &TensorData) -> Vec<f64> {
    let ([r, d_in], d_out) = ([a.shape()[0], a.shape()[1]], b.shape()[0]);
    let (a, b): (Vec<f64>, Vec<f64>) = (a.iter().collect(), b.iter().collect());
    let element = |i: usize, j: usize| (0..r).map(|k| a[k * d_in + i] * b[j * r + k]).sum();
    (0..d_in).flat_map(|i| (0..d_out).map(move |j| (i, j))).map(|(i, j)| element(i, j)).collect()
}

fn names<'a>(names: impl IntoIterator<Item = &'a String>) -> BTreeSet<&'a str> {
    names.into_iter().map(String::as_str).collect()
}
