//! The encoder against transformers and peft: on a small BERT of the fixtures, and on the real model that `BURN_PEFT_MINILM`
//! names. `tests/fixtures/README.md` says how both were made.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig};
use burn::optim::GradientsParams;
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use burn_peft::{KeyMapping, LoadOptions, PeftError};
use burn_peft_tests::fixture::{directory, read_facts, read_file, read_json, write_adapter};
use burn_peft_tests::parameters::{gradients, parameters, to_peft};
use burn_peft_tests::tolerance::{FORWARD, GRADIENT, REORDERED, assert_close, assert_different};
use serde::Deserialize;

use super::*;
use crate::encoder::{Encoder, EncoderConfig};
use crate::text::Batch;
use crate::weights::names;

/// The directory of the real model.
const MINILM: &str = "BURN_PEFT_MINILM";

/// What Python computed of a few sentences.
struct Fixture {
    directory: PathBuf,
    sentences: Vec<String>,
    expected: BTreeMap<String, TensorData>,
}

#[derive(Deserialize)]
struct Facts {
    sentences: Vec<String>,
}

impl Fixture {
    fn open(case: &str) -> Self {
        let directory = directory(case);
        let Facts { sentences } = read_facts(&directory);
        let expected = read_file(&directory.join("expected.safetensors"));
        Self { directory, sentences, expected }
    }

    /// The sentences as Python's tokenizer has them.
    fn batch(&self, device: &Device) -> Batch {
        let tensor = |name: &str| Tensor::<2, Int>::from_data(self.expected[name].clone(), device);
        Batch { ids: tensor("input_ids"), mask: tensor("attention_mask").equal_elem(1) }
    }

    /// The sentences as a model directory's tokenizer has them here.
    fn encoded(&self, model: &Path) -> Batch {
        let max_length = weights::read_config(model).unwrap().max_position_embeddings;
        let tokenizer = text::tokenizer(model, max_length).unwrap();
        let sentences: Vec<&str> = self.sentences.iter().map(String::as_str).collect();
        text::batch(&tokenizer, &sentences, &Device::flex()).unwrap()
    }
}

/// The embeddings of sentences by a module of any kind.
trait Embeds: PeftModel {
    fn load(directory: &Path, device: &Device) -> Self;
    fn names() -> KeyMapping;
    fn embeddings(&self, batch: Batch) -> Tensor<2>;
}

impl Embeds for Encoder {
    fn load(directory: &Path, device: &Device) -> Self {
        let config = weights::read_config(directory).unwrap();
        weights::load(directory, &config, device).unwrap().0
    }

    fn names() -> KeyMapping {
        names()
    }

    fn embeddings(&self, batch: Batch) -> Tensor<2> {
        self.embed(batch.ids, batch.mask)
    }
}

/// The same encoder made of Burn's own one, whose layers are plain.
#[derive(Module, Debug)]
struct PlainEncoder {
    words: Embedding,
    positions: Embedding,
    segments: Embedding,
    norm: LayerNorm,
    encoder: TransformerEncoder,
}

impl PlainEncoder {
    fn new(config: &EncoderConfig, device: &Device) -> Self {
        let width = config.hidden_size;
        let table = |rows| EmbeddingConfig::new(rows, width).init(device);
        let (heads, layers) = (config.num_attention_heads, config.num_hidden_layers);
        let encoder = TransformerEncoderConfig::new(width, config.intermediate_size, heads, layers)
            .with_dropout(0.0)
            .with_layer_norm_eps(config.layer_norm_eps);
        Self {
            words: table(config.vocab_size),
            positions: table(config.max_position_embeddings),
            segments: table(config.type_vocab_size),
            norm: LayerNormConfig::new(width).with_epsilon(config.layer_norm_eps).init(device),
            encoder: encoder.init(device),
        }
    }
}

impl Embeds for PlainEncoder {
    fn load(directory: &Path, device: &Device) -> Self {
        let mut encoder = Self::new(&weights::read_config(directory).unwrap(), device);
        weights::load_into(&mut encoder, &Self::names(), &directory.join("model.safetensors")).unwrap();
        encoder
    }

    fn names() -> KeyMapping {
        KeyMapping::new([
            (r"^words\.", "embeddings.word_embeddings."),
            (r"^positions\.", "embeddings.position_embeddings."),
            (r"^segments\.", "embeddings.token_type_embeddings."),
            (r"^norm\.", "embeddings.LayerNorm."),
            (r"^encoder\.layers\.(\d+)\.", "encoder.layer.$1."),
            (r"\.mha\.(query|key|value)\.", ".attention.self.$1."),
            (r"\.mha\.output\.", ".attention.output.dense."),
            (r"\.norm_1\.", ".attention.output.LayerNorm."),
            (r"\.pwff\.linear_inner\.", ".intermediate.dense."),
            (r"\.pwff\.linear_outer\.", ".output.dense."),
            (r"\.norm_2\.", ".output.LayerNorm."),
        ])
    }

    fn embeddings(&self, Batch { ids, mask }: Batch) -> Tensor<2> {
        let positions = Tensor::arange(0..ids.dims()[1] as i64, &ids.device()).unsqueeze();
        let x = self.words.forward(ids.clone())
            + self.positions.forward(positions)
            + self.segments.forward(ids.zeros_like());
        let padding: Tensor<2, Bool> = mask.clone().bool_not();
        let input = TransformerEncoderInput::new(self.norm.forward(x)).mask_pad(padding);
        encoder::mean(self.encoder.forward(input), mask)
    }
}

#[test]
fn embeddings_gradients_and_files_are_those_of_transformers_and_peft() {
    check::<Encoder>(true);
    check::<PlainEncoder>(false);
}

fn check<M: Embeds>(activation_space: bool) {
    let fixture = Fixture::open("bert");
    let expected = &fixture.expected;
    let device = Device::flex().autodiff();
    let batch = fixture.batch(&device);
    let mut encoder = M::load(&fixture.directory, &device);
    let base = encoder.embeddings(batch.clone()).into_data();
    let of_base = assert_close("base", &base, &expected["base.embeddings"], FORWARD);

    let adapter = fixture.directory.join("adapter");
    let options = LoadOptions::new().with_key_mapping(M::names());
    let report = encoder.load_adapter_with("default", &adapter, &options).unwrap();
    assert_eq!((report.tensors, report.injection.modules.len()), (24, 12));
    assert!(report.injection.modules.iter().all(|module| module.activation_space == activation_space));
    let embeddings = encoder.embeddings(batch.clone());
    let data = embeddings.clone().into_data();
    let of_adapter = assert_close("adapted", &data, &expected["embeddings"], FORWARD);
    assert_different("adapted", &data, &base);

    let directions = Tensor::<2>::from_data(expected["directions"].clone(), &device);
    let loss = (embeddings * directions).sum();
    let found = GradientsParams::from_grads(loss.backward(), &encoder);
    let found = to_peft(&encoder, &gradients(&encoder, &found));
    let named = |(key, data): (String, TensorData)| {
        let name = M::names().apply(key.strip_prefix("base_model.model.").unwrap()).unwrap();
        (format!("base_model.model.{name}"), data)
    };
    let found: BTreeMap<String, TensorData> = found.into_iter().map(named).collect();
    let wanted = expected.iter().filter_map(|(name, data)| Some((name.strip_prefix("grad.")?, data)));
    let of_gradients: Vec<f64> =
        wanted.map(|(key, data)| assert_close(key, &found[key], data, GRADIENT)).collect();
    assert_eq!(of_gradients.len(), found.len());

    let saved = tempfile::tempdir().unwrap();
    encoder.save_adapter("default", saved.path()).unwrap();
    let file = |directory: &Path| read_file(&directory.join("adapter_model.safetensors"));
    assert_eq!(file(saved.path()), file(&adapter));
    let config = |directory: &Path| read_json(&directory.join("adapter_config.json"));
    let (ours, theirs) = (config(saved.path()), config(&adapter));
    for field in ["r", "lora_alpha", "target_modules", "exclude_modules", "bias", "base_model_name_or_path"] {
        assert_eq!(ours[field], theirs[field], "{field}");
    }

    encoder.merge_and_unload().unwrap();
    let merged = encoder.embeddings(batch).into_data();
    let of_merged = assert_close("merged", &merged, &expected["merged.embeddings"], REORDERED);
    let of_gradients = of_gradients.into_iter().fold(0.0, f64::max);
    println!(
        "base {of_base:.1e}, adapted {of_adapter:.1e}, gradients {of_gradients:.1e}, merged {of_merged:.1e}"
    );
}

#[test]
fn the_tokenizer_has_pythons_ids_and_the_file_no_other_tensors_than_the_pooler() {
    let fixture = Fixture::open("bert");
    check_ids(&fixture, &fixture.directory);
    let config = weights::read_config(&fixture.directory).unwrap();
    let (_, unused) = weights::load(&fixture.directory, &config, &Device::flex()).unwrap();
    assert_eq!(unused, ["pooler.dense.bias", "pooler.dense.weight"]);
}

fn check_ids(fixture: &Fixture, model: &Path) {
    let (here, there) = (fixture.encoded(model), fixture.batch(&Device::flex()));
    let numbers = |batch: &Batch| -> (Vec<i64>, Vec<i64>) {
        (batch.ids.to_data().iter().collect(), batch.mask.clone().int().into_data().iter().collect())
    };
    assert_eq!(numbers(&here), numbers(&there));
}

#[test]
fn an_adapter_of_the_pooler_too_is_refused_by_name() {
    let fixture = Fixture::open("bert");
    let adapter = fixture.directory.join("adapter");
    let mut tensors = read_file(&adapter.join("adapter_model.safetensors"));
    for (name, shape) in [("lora_A", [3, 32]), ("lora_B", [32, 3])] {
        let key = format!("base_model.model.pooler.dense.{name}.weight");
        tensors.insert(key, TensorData::new(vec![0.5_f32; 96], shape));
    }
    let mut config = read_json(&adapter.join("adapter_config.json"));
    config["exclude_modules"] = serde_json::Value::Null;
    let place = tempfile::tempdir().unwrap();
    write_adapter(place.path(), &config, &tensors);

    let device = Device::flex();
    let mut encoder = Encoder::load(&fixture.directory, &device);
    let options = LoadOptions::new().with_key_mapping(names());
    let error = encoder.load_adapter_with("default", place.path(), &options).unwrap_err();
    assert!(
        matches!(&error, PeftError::IncompatibleAdapter { problems, .. } if problems.len() == 2),
        "{error}"
    );
    assert!(error.to_string().contains("`base_model.model.pooler.dense.lora_A.weight`"), "{error}");
    let report = encoder.load_adapter_with("default", place.path(), &options.with_lenient(true)).unwrap();
    assert_eq!((report.tensors, report.problems.len()), (24, 2));
    let embeddings = encoder.embeddings(fixture.batch(&device)).into_data();
    assert_close("without the pooler", &embeddings, &fixture.expected["embeddings"], FORWARD);
}

/// A run of the program, and the directory that it wrote to.
fn program(model: &Path, more: &[&str]) -> Result<([Separation; 2], tempfile::TempDir)> {
    let out = tempfile::tempdir()?;
    let paths = [model, out.path()].map(|path| path.to_str().unwrap().to_string());
    let args = ["encoder", "--model", &paths[0], "--out", &paths[1]];
    let args = Args::try_parse_from(args.iter().chain(more)).unwrap();
    Ok((run(&args)?, out))
}

/// The adapter that was saved computes, on a new base, the embeddings that were written.
fn check_saved(model: &Path, out: &Path) -> Encoder {
    let written = read_file(&out.join("embeddings.safetensors"));
    let tensor = |name: &str| Tensor::<2, Int>::from_data(written[name].clone(), &Device::flex());
    let batch = Batch { ids: tensor("input_ids"), mask: tensor("attention_mask").equal_elem(1) };
    let mut encoder = Encoder::load(model, &Device::flex());
    let base = encoder.embeddings(batch.clone()).into_data();
    assert_close("base", &base, &written["base.embeddings"], FORWARD);
    let options = LoadOptions::new().with_key_mapping(names());
    encoder.load_adapter_with("default", out.join("adapter"), &options).unwrap();
    let embeddings = encoder.embeddings(batch).into_data();
    assert_close("adapted", &embeddings, &written["embeddings"], FORWARD);
    assert_different("adapted", &embeddings, &base);
    encoder
}

#[test]
fn a_run_trains_the_adapter_alone_and_saves_what_it_computed() {
    let model = directory("bert");
    let ([before, after], out) = program(&model, &["--epochs", "6", "--rank", "3"]).unwrap();
    assert_ne!(before, after);
    let mut trained = check_saved(&model, out.path());
    trained.unload().unwrap();
    assert_eq!(parameters(&trained), parameters(&Encoder::load(&model, &Device::flex())));
}

#[test]
fn bad_inputs_are_told_with_the_way_out() {
    let error = |model: &Path, more: &[&str]| failure::text(&program(model, more).unwrap_err());
    let missing = error(Path::new("nowhere"), &[]);
    assert!(
        missing.contains("`nowhere/config.json` cannot be read") && missing.contains("hint:"),
        "{missing}"
    );
    let llama = error(Path::new("pokemon/base"), &[]);
    assert!(llama.contains("`pokemon/base/config.json` does not describe a BERT model"), "{llama}");
    let data = error(&directory("bert"), &["--data", "nowhere.tsv"]);
    assert!(data.contains("`nowhere.tsv` cannot be read"), "{data}");

    let place = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(directory("bert").join(file), place.path().join(file)).unwrap();
    }
    let config = fs::read_to_string(place.path().join("config.json")).unwrap();
    fs::write(place.path().join("config.json"), config.replace("\"gelu\"", "\"relu\"")).unwrap();
    let relu = error(place.path(), &[]);
    assert!(
        relu.contains("expected `model_type` bert with `hidden_act` gelu, found bert with relu"),
        "{relu}"
    );
    let layers = config.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3");
    fs::write(place.path().join("config.json"), layers).unwrap();
    let weights = error(place.path(), &[]);
    assert!(
        weights.contains("model.safetensors` cannot be loaded") && weights.contains("blocks.2"),
        "{weights}"
    );
}

/// The directory of the real model, if there is one.
fn minilm() -> Option<PathBuf> {
    let path = std::env::var_os(MINILM).map(PathBuf::from);
    if path.is_none() {
        println!("skipped: `{MINILM}` names no directory of all-MiniLM-L6-v2");
    }
    path
}

#[test]
fn a_real_encoder_has_the_embeddings_of_transformers() {
    let Some(model) = minilm() else { return };
    let fixture = Fixture::open("minilm");
    check_ids(&fixture, &model);
    let (batch, device) = (fixture.encoded(&model), Device::flex());
    let expected = &fixture.expected["base.embeddings"];
    let furthest = |found: TensorData| {
        let pairs = found.iter::<f32>().zip(expected.iter::<f32>());
        pairs.map(|(found, expected)| (found - expected).abs()).fold(0.0, f32::max)
    };
    let own = furthest(Encoder::load(&model, &device).embeddings(batch.clone()).into_data());
    let plain = furthest(PlainEncoder::load(&model, &device).embeddings(batch).into_data());
    println!("largest difference {own:.1e}, with Burn's encoder {plain:.1e}");
    assert!(own < 1e-5 && plain < 1e-5, "{own} {plain}");
}

#[test]
fn a_real_encoder_learns_what_messages_are_for() {
    let Some(model) = minilm() else { return };
    let ([before, after], out) = program(&model, &["--epochs", "3"]).unwrap();
    println!("before {before}\nafter  {after}");
    assert!(before.nearest < 0.3, "the subject decides: {before}");
    assert!(after.nearest > 0.7, "what is wanted decides: {after}");
    check_saved(&model, out.path());
}

/// Every block of code in the guide is a part of this example.
#[test]
fn the_guide_shows_this_example() {
    let guide = fs::read_to_string("../docs/src/own-model.md").unwrap();
    let sources = ["encoder.rs", "main.rs", "tests.rs", "training.rs", "weights.rs"]
        .map(|file| fs::read_to_string(Path::new("encoder").join(file)).unwrap());
    // Without indentation: the guide shows parts of functions.
    let flat = |text: &str| text.lines().map(str::trim).collect::<Vec<_>>().join("\n");
    let sources = flat(&sources.concat());
    let blocks: Vec<&str> =
        guide.split("```rust,ignore\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert!(blocks.len() > 3 && !guide.contains("```rust\n"), "{}", blocks.len());
    for block in blocks {
        // `..` stands for lines that are left out.
        for part in block.split("\n..\n") {
            assert!(sources.contains(flat(part).trim()), "not in the example:\n{part}");
        }
    }
}
