//! Not tests of their own: models, adapters and logits for `tests/check_in_python.py`.

use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, TensorData};
use burn_peft::{Bias, DEFAULT_ADAPTER, InitLoraWeights, LoraConfig, PeftModel, TargetModules};
use burn_peft_llama::{Batch, Collator, Example, LlamaForCausalLm, PaddingSide, Tokenizer};
use burn_peft_tests::fixture::{ADAPTERS, Fixture, Training, directory};
use serde_json::{Map, Value, json};

use crate::common::{SIDES, load_adapted, load_base, masked_logits, train};
use crate::toy;

/// The directory to export to.
const EXPORT: &str = "BURN_PEFT_EXPORT";

/// The names of a batch's rows in `two-adapters`.
const ROWS: [Option<&str>; 3] = [Some("one"), None, Some("two")];

/// Writes every case of the fixtures as it is written here, and adapters that were never in Python.
#[test]
fn export_for_python() {
    let Some(root) = std::env::var_os(EXPORT) else {
        println!("skipped: `{EXPORT}` names no directory to export to");
        return;
    };
    let (root, device) = (Path::new(&root), Device::default());
    for case in ADAPTERS {
        let fixture = Fixture::open(case);
        let model = load_adapted(&fixture, &device);
        let is_merged = fixture.has("merged.logits");
        let expected = Expected::new(&fixture).with(&model, "").with_merged(&model, is_merged, "");
        expected.write(&root.join(case), &model);
    }
    export_named(&root.join("two-adapters"));
    export_trained(root);
    toy::export(root);
}

/// Two adapters in directories of their names.
fn export_named(root: &Path) {
    let fixture = Fixture::open("gqa-tied");
    let mut model = load_base("gqa-tied", &Device::default());
    for name in ["one", "two"] {
        model.load_adapter(name, directory("two-adapters").join(name)).unwrap();
    }
    let mut expected = Expected::new(&fixture);
    for (label, active) in [("one.", &["one"][..]), ("two.", &["two"]), ("both.", &["one", "two"])] {
        model.set_adapter(active).unwrap();
        expected = expected.with(&model, label).with_merged(&model, true, label);
    }
    expected = expected.with(&model.for_rows(&ROWS).unwrap(), "mixed.");
    let names = ROWS.map(|name| name.unwrap_or("__base__"));
    expected.entries.insert("adapter_names".into(), json!(names));
    expected.write(root, &model);
}

/// Adapters with settings away from their defaults, after a few steps, so that nothing is where it started.
fn export_trained(root: &Path) {
    let adapters = [
        (
            "new",
            "rope-scaled",
            LoraConfig::new(5)
                .with_lora_alpha(7.5)
                .with_use_rslora(true)
                .with_lora_dropout(0.1)
                .with_target_modules(TargetModules::Regex(r".*\.(q|k|down)_proj".into()))
                .with_exclude_modules(["layers.1.mlp.down_proj"])
                .with_init_lora_weights(InitLoraWeights::Random),
        ),
        (
            "new-whole",
            "mha-biased",
            LoraConfig::new(4)
                .with_lora_alpha(6.0)
                .with_target_modules(["embed_tokens", "q_proj", "v_proj", "o_proj"])
                .with_rank_pattern([("q_proj", 2), (r"layers\.1\..*", 3)])
                .with_alpha_pattern([(r"layers\.1\..*", 5.0), ("q_proj", 3.0)])
                .with_layers_to_transform([1])
                .with_layers_pattern(["layers"])
                .with_bias(Bias::LoraOnly)
                .with_modules_to_save(["lm_head", "layers.0.mlp.up_proj", "norm"])
                .with_init_lora_weights(InitLoraWeights::Gaussian),
        ),
        (
            "new-biases",
            "mha-biased",
            LoraConfig::new(3)
                .with_lora_alpha(5.0)
                .with_target_modules(["q_proj", "o_proj", "gate_proj", "down_proj"])
                .with_bias(Bias::All)
                .with_lora_bias(true),
        ),
        (
            "new-lora-bias",
            "mha-biased",
            LoraConfig::new(3)
                .with_lora_alpha(5.0)
                .with_target_modules(TargetModules::AllLinear)
                .with_lora_bias(true),
        ),
    ];
    for (name, base, config) in adapters {
        let fixture = Fixture::open(base);
        let device = Device::default().autodiff();
        let mut model = load_base(base, &device);
        let named =
            |config: LoraConfig| config.with_base_model_name_or_path(base).with_task_type("CAUSAL_LM");
        let has_biases = config.bias != Bias::None;
        model.add_adapter(DEFAULT_ADAPTER, named(config)).unwrap();
        let plan = Training { lr: 1e-2, weight_decay: 0.1, losses: vec![0.0; 3] };
        let (mut model, _) = train(model, &fixture.batch(PaddingSide::Right, &device), &plan);
        let second = LoraConfig::new(2)
            .with_target_modules(["k_proj", "v_proj"])
            .with_init_lora_weights(InitLoraWeights::Random);
        model.add_adapter("second", named(second)).unwrap();
        let mut expected = Expected::new(&fixture);
        let mut labels = vec![("", vec![DEFAULT_ADAPTER]), ("both.", vec![DEFAULT_ADAPTER, "second"])];
        // In peft, the biases that the first one trained stay where they are when it is not active.
        if !has_biases {
            labels.push(("second.", vec!["second"]));
        }
        for (label, active) in &labels {
            model.set_adapter(active).unwrap();
            let inference = model.valid();
            expected = expected.with(&inference, label).with_merged(&inference, true, label);
        }
        expected.write(&root.join(name), &model.valid());
    }
}

/// What the script compares, by the names that it asks for.
struct Expected {
    batches: [(&'static str, Batch); 2],
    entries: Map<String, Value>,
}

impl Expected {
    fn new(fixture: &Fixture) -> Self {
        let batches = SIDES.map(|side| {
            let prefix = match side {
                PaddingSide::Right => "right.",
                PaddingSide::Left => "left.",
            };
            (prefix, fixture.batch(side, &Device::default()))
        });
        let mut entries = Map::new();
        for (side, batch) in &batches {
            entries.insert(format!("{side}input_ids"), json!(rows(&batch.input_ids.to_data())));
            let mask = batch.attention_mask.clone().int().into_data();
            entries.insert(format!("{side}attention_mask"), json!(rows(&mask)));
        }
        Self { batches, entries }
    }

    /// The logits of both batches under `label`.
    fn with(mut self, model: &LlamaForCausalLm, label: &str) -> Self {
        for (side, batch) in &self.batches {
            let logits = json!(rows_of_floats(&masked_logits(model, batch)));
            self.entries.insert(format!("{side}{label}logits"), logits);
        }
        self
    }

    fn with_merged(self, model: &LlamaForCausalLm, is_merged: bool, label: &str) -> Self {
        if !is_merged {
            return self;
        }
        let mut merged = model.clone();
        merged.merge_and_unload().unwrap();
        self.with(&merged, &format!("{label}merged."))
    }

    /// Writes the base of `model`, its adapters and all that was collected.
    fn write(self, root: &Path, model: &LlamaForCausalLm) {
        let mut base = model.clone();
        base.unload().unwrap();
        base.save_pretrained(root.join("base")).unwrap();
        let written = model.save_adapters(root.join("adapter")).unwrap();
        assert_eq!(written.len(), model.adapters().len());
        let entries = Value::Object(self.with(&base, "base.").entries);
        std::fs::write(root.join("expected.json"), entries.to_string()).unwrap();
    }
}

/// Logits of any base model with any adapter, such as those that the Pokémon experiment saved.
#[test]
fn export_any_adapter_for_python() {
    let paths = [EXPORT, "BURN_PEFT_EXPORT_BASE", "BURN_PEFT_EXPORT_ADAPTER"].map(std::env::var_os);
    let [Some(root), Some(base), Some(adapter)] = paths else {
        println!("skipped: no base and adapter to export");
        return;
    };
    let mut model = LlamaForCausalLm::from_pretrained(Path::new(&base), &Device::default()).unwrap();
    model.load_adapter(DEFAULT_ADAPTER, &adapter).unwrap();
    let tokenizer = Tokenizer::load(Path::new(&base)).unwrap();
    let examples: Vec<Example> = ["Pikachu is an Electric-type Pokémon.", "Types:"]
        .map(|text| tokenizer.encode_document(text).unwrap())
        .into();
    let collator = Collator::new(0).with_side(PaddingSide::Left);
    let batch = collator.collate(&examples, &Device::default()).unwrap();
    let expected = json!({
        "input_ids": rows(&batch.input_ids.to_data()),
        "attention_mask": rows(&batch.attention_mask.clone().int().into_data()),
        "logits": rows_of_floats(&masked_logits(&model, &batch)),
    });
    std::fs::create_dir_all(&root).unwrap();
    std::fs::write(Path::new(&root).join("expected.json"), expected.to_string()).unwrap();
}

fn rows(data: &TensorData) -> Vec<Vec<i64>> {
    data.iter::<i64>().collect::<Vec<_>>().chunks(data.shape()[1]).map(<[i64]>::to_vec).collect()
}

fn rows_of_floats(data: &TensorData) -> Vec<Vec<Vec<f32>>> {
    let values: Vec<f32> = data.iter().collect();
    let (width, depth) = (data.shape()[1], data.shape()[2]);
    values.chunks(width * depth).map(|row| row.chunks(depth).map(<[f32]>::to_vec).collect()).collect()
}
