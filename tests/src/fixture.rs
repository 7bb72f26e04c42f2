//! What the real torch, transformers and peft computed: see `tests/fixtures/README.md`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, TensorData};
use burn_peft_llama::{Batch, Collator, Example, Packing, PaddingSide};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// The version that `generate.py` must have written.
pub const FIXTURE_VERSION: u64 = 2;

/// The token that the batches are padded with.
pub const PAD_TOKEN_ID: u32 = 0;

/// The cases that are base models.
pub const BASES: [&str; 4] = ["gqa-tied", "mha-biased", "rope-scaled", "qwen2"];

/// The cases that are adapters of one of the bases.
pub const ADAPTERS: [&str; 36] = [
    "gqa-tied-qv",
    "gqa-tied-rslora",
    "gqa-tied-embedding",
    "mha-biased-all-linear",
    "mha-biased-qv-rslora",
    "mha-biased-head",
    "mha-biased-patterns",
    "gqa-tied-layers",
    "mha-biased-layers-pattern",
    "gqa-tied-exclude",
    "rope-scaled-regex",
    "mha-biased-embedding-head",
    "gqa-tied-gaussian",
    "mha-biased-bias-all",
    "mha-biased-bias-lora-only",
    "mha-biased-lora-bias",
    "gqa-tied-lora-bias",
    "mha-biased-save-head",
    "mha-biased-save-norm",
    "gqa-tied-save-layernorm",
    "rope-scaled-save-embedding",
    "mha-biased-save-linear",
    "qwen2-qv",
    "gqa-tied-dora",
    "mha-biased-dora-rslora",
    "gqa-tied-dora-embedding",
    "mha-biased-dora-embedding",
    "mha-biased-dora-head",
    "gqa-tied-tokens",
    "gqa-tied-tokens-tied",
    "mha-biased-tokens",
    "mha-biased-tokens-both",
    "mha-biased-tokens-head",
    "gqa-tied-pissa",
    "gqa-tied-pissa-rslora",
    "gqa-tied-olora",
];

/// The cases that are adapters of one of the bases, trained with LoRA+.
pub const LORA_PLUS: [&str; 2] = ["gqa-tied-loraplus", "gqa-tied-loraplus-embedding"];

/// The cases that are adapters of a model of plain layers.
pub const TOYS: [&str; 3] = ["toy", "toy-biases", "toy-dora"];

/// The cases that are something else, each read by a test of its own.
pub const OTHERS: [&str; 13] = [
    "bert",
    "chat-templates",
    "converted",
    "fan-in-fan-out",
    "gguf",
    "minilm",
    "old",
    "starts",
    "targeting",
    "two-adapters",
    "two-dora",
    "vocabulary",
    "weighted",
];

/// One case: a directory of a model or an adapter, and what is expected of it.
pub struct Fixture {
    /// The directory, which is also what `from_pretrained` or `load_adapter` takes.
    pub directory: PathBuf,
    /// Expected numbers and names.
    pub facts: Facts,
    tensors: BTreeMap<String, TensorData>,
}

/// The `expected.json` of a base model or an adapter.
#[derive(Debug, Deserialize)]
pub struct Facts {
    /// Of an adapter: the case of its base model.
    pub base: Option<String>,
    /// Mean cross-entropy over the labelled tokens.
    pub loss: f64,
    /// Of a base model: the number of its parameters.
    pub num_parameters: Option<usize>,
    /// Of a base model: greedy answers.
    pub greedy: Option<Greedy>,
    /// Of an adapter: the adapted modules.
    #[serde(default)]
    pub adapted_modules: Vec<String>,
    /// Of an adapter: the rank at each adapted module.
    #[serde(default)]
    pub ranks: BTreeMap<String, usize>,
    /// Of an adapter: the factor of the update at each adapted module.
    #[serde(default)]
    pub scalings: BTreeMap<String, f64>,
    /// Of an adapter: the modules that are trained in full.
    #[serde(default)]
    pub saved_modules: Vec<String>,
    /// Of an adapter: why peft does not merge it.
    pub merge_error: Option<String>,
    /// Of an adapter: what peft's `print_trainable_parameters` prints.
    pub trainable_parameters: Option<String>,
    /// AdamW on the right-padded batch.
    pub training: Training,
}

/// Greedy answers without their end token.
#[derive(Debug, Deserialize)]
pub struct Greedy {
    /// Prompts.
    pub prompts: Vec<Vec<u32>>,
    /// The answer to each.
    pub answers: Vec<Vec<u32>>,
    /// Longest answer.
    pub max_new_tokens: usize,
}

/// A few steps of AdamW.
#[derive(Debug, Deserialize)]
pub struct Training {
    /// Learning rate.
    pub lr: f64,
    /// Weight decay.
    pub weight_decay: f32,
    /// The loss before each step.
    pub losses: Vec<f64>,
}

impl Fixture {
    /// Reads a case.
    ///
    /// # Panics
    /// If it is absent or was written by another version of `generate.py`; the message has the command that writes it.
    pub fn open(case: &str) -> Self {
        let directory = directory(case);
        let facts = read_facts(&directory);
        let tensors = read_file(&directory.join("expected.safetensors"));
        Self { directory, facts, tensors }
    }

    /// The `adapter_config.json` of an adapter.
    pub fn config(&self) -> serde_json::Value {
        read_json(&self.directory.join("adapter_config.json"))
    }

    /// The tokens that an adapter trains in a module.
    ///
    /// # Panics
    /// If there are none.
    pub fn tokens(&self, module: &str) -> Vec<usize> {
        let tokens = self.config()["trainable_token_indices"].clone();
        let of_module = tokens.as_object().map(|modules| {
            modules
                .iter()
                .find(|(name, _)| module.ends_with(&***name))
                .map(|(_, tokens)| tokens.clone())
                .unwrap()
        });
        serde_json::from_value(of_module.unwrap_or(tokens)).unwrap()
    }

    /// The `adapter_model.safetensors` of an adapter.
    pub fn adapter_tensors(&self) -> BTreeMap<String, TensorData> {
        read_file(&self.directory.join("adapter_model.safetensors"))
    }

    /// A tensor by name.
    ///
    /// # Panics
    /// If there is none.
    pub fn data(&self, name: &str) -> &TensorData {
        self.tensors
            .get(name)
            .unwrap_or_else(|| panic!("no tensor `{name}` in `{}`", self.directory.display()))
    }

    /// Whether there is a tensor of that name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensors whose name starts with `prefix`, by the rest of their name.
    pub fn with_prefix(&self, prefix: &str) -> BTreeMap<String, TensorData> {
        let named = |(name, data): (&String, &TensorData)| {
            Some((name.strip_prefix(prefix)?.to_string(), data.clone()))
        };
        self.tensors.iter().filter_map(named).collect()
    }

    /// The sequences without padding, with their labels.
    pub fn examples(&self) -> Vec<Example> {
        let [ids, mask, labels] = ["input_ids", "attention_mask", "labels"]
            .map(|name| self.data(&format!("right.{name}")).iter::<i64>().collect::<Vec<_>>());
        let width = self.data("right.input_ids").shape()[1];
        let rows = ids.chunks(width).zip(mask.chunks(width)).zip(labels.chunks(width));
        rows.map(|((ids, mask), labels)| {
            let length = mask.iter().filter(|&&real| real == 1).count();
            Example {
                input_ids: ids[..length].iter().map(|&id| u32::try_from(id).unwrap()).collect(),
                labels: labels[..length].to_vec(),
            }
        })
        .collect()
    }

    /// The sequences as a batch, which must be what Python made of them. Losses of a batch with padding on the right are
    /// computed of one row without padding, those of the other of what they are in Python.
    pub fn batch(&self, side: PaddingSide, device: &Device) -> Batch {
        let packing = match side {
            PaddingSide::Right => Packing::SharedPrefix,
            PaddingSide::Left => Packing::Padded,
        };
        let collator = Collator::new(PAD_TOKEN_ID).with_side(side).with_packing(packing);
        let batch = collator.collate(&self.examples(), device).unwrap();
        assert_eq!(batch.packed.is_some(), side == PaddingSide::Right);
        let expected = self.data(&format!("{}.input_ids", prefix(side)));
        let ids: Vec<i64> = batch.input_ids.to_data().iter().collect();
        assert_eq!(ids, expected.iter::<i64>().collect::<Vec<_>>(), "the batch is not the fixture's");
        batch
    }

    /// Expected logits, zero at padding.
    pub fn logits(&self, side: PaddingSide) -> &TensorData {
        self.data(&format!("{}.logits", prefix(side)))
    }
}

/// The directory of a case.
pub fn directory(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(case)
}

/// Reads the `expected.json` of a case and checks its version.
///
/// # Panics
/// If it is absent or was written by another version of `generate.py`; the message has the command that writes it.
pub fn read_facts<T: DeserializeOwned>(directory: &Path) -> T {
    const HINT: &str = "hint: run `python tests/fixtures/generate.py`";
    let path = directory.join("expected.json");
    let text = std::fs::read(&path)
        .unwrap_or_else(|error| panic!("cannot read `{}`: {error}\n{HINT}", path.display()));
    let facts: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let version = facts["fixture_version"].as_u64();
    assert_eq!(version, Some(FIXTURE_VERSION), "`{}` has another version\n{HINT}", path.display());
    serde_json::from_value(facts).unwrap_or_else(|error| panic!("`{}`: {error}\n{HINT}", path.display()))
}

/// Reads a JSON file.
///
/// # Panics
/// If it cannot be read.
pub fn read_json(path: &Path) -> serde_json::Value {
    let text = std::fs::read(path).unwrap_or_else(|error| panic!("`{}`: {error}", path.display()));
    serde_json::from_slice(&text).unwrap()
}

/// The tensors of a safetensors file by name: see [`read_tensors`].
///
/// # Panics
/// If it cannot be read.
pub fn read_file(path: &Path) -> BTreeMap<String, TensorData> {
    read_tensors(&std::fs::read(path).unwrap_or_else(|error| panic!("`{}`: {error}", path.display())))
}

/// Writes a safetensors file of f32.
///
/// # Panics
/// If it cannot be written.
pub fn write_file(path: &Path, tensors: &BTreeMap<String, TensorData>) {
    let stored = |(name, data): (&String, &TensorData)| {
        (
            name.clone(),
            data.shape().to_vec(),
            data.iter::<f32>().flat_map(f32::to_le_bytes).collect::<Vec<_>>(),
        )
    };
    let stored: Vec<_> = tensors.iter().map(stored).collect();
    let views = stored
        .iter()
        .map(|(name, shape, bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// Writes an adapter directory with whatever it is given.
///
/// # Panics
/// If it cannot be written.
pub fn write_adapter(directory: &Path, config: &serde_json::Value, tensors: &BTreeMap<String, TensorData>) {
    std::fs::create_dir_all(directory).unwrap();
    std::fs::write(directory.join("adapter_config.json"), config.to_string()).unwrap();
    write_file(&directory.join("adapter_model.safetensors"), tensors);
}

/// The tensors of a safetensors file of f32 and i64 by name.
///
/// # Panics
/// If the file holds anything else.
pub fn read_tensors(bytes: &[u8]) -> BTreeMap<String, TensorData> {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let read = |(name, view): (String, TensorView<'_>)| {
        let (bytes, shape) = (view.data(), view.shape().to_vec());
        let data = match view.dtype() {
            Dtype::F32 => {
                let floats = bytes.chunks_exact(4).map(|raw| f32::from_le_bytes(raw.try_into().unwrap()));
                TensorData::new(floats.collect::<Vec<_>>(), shape)
            }
            Dtype::I64 => {
                let ints = bytes.chunks_exact(8).map(|raw| i64::from_le_bytes(raw.try_into().unwrap()));
                TensorData::new(ints.collect::<Vec<_>>(), shape)
            }
            other => panic!("unexpected type {other:?} of `{name}`"),
        };
        (name, data)
    };
    file.tensors().into_iter().map(read).collect()
}

fn prefix(side: PaddingSide) -> &'static str {
    match side {
        PaddingSide::Right => "right",
        PaddingSide::Left => "left",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_case_is_forgotten() {
        let entries = std::fs::read_dir(directory("")).unwrap().map(Result::unwrap);
        let folders = entries.filter(|entry| entry.path().join("expected.json").is_file());
        let found: BTreeSet<String> = folders.map(|entry| entry.file_name().into_string().unwrap()).collect();
        let known = BASES.iter().chain(&ADAPTERS).chain(&LORA_PLUS).chain(&TOYS).chain(&OTHERS);
        assert_eq!(found, known.map(ToString::to_string).collect());
        let is_adapter = |case: &&String| directory(case).join("adapter_config.json").is_file();
        let adapters: BTreeSet<String> = found.iter().filter(is_adapter).cloned().collect();
        assert_eq!(
            adapters,
            ADAPTERS.iter().chain(&LORA_PLUS).chain(&TOYS).map(ToString::to_string).collect()
        );
    }
}
