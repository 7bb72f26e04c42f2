//! Any sequence of operations, against a model that knows only which adapters should be active.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::optim::{GradientsParams, SgdConfig};
use burn::tensor::{Device, TensorData};
use burn_peft::{Bias, LoraConfig, PeftError, PeftModel};
use burn_peft_tests::parameters::{is_adapter, parameters};
use burn_peft_tests::tolerance::{REORDERED, assert_close};
use proptest::prelude::*;
use tempfile::TempDir;

use super::{Net, base, ids, random, stir};

const NAMES: [&str; 3] = ["a", "b", "default"];

/// How an adapter may be configured, the parameters that it copies, and whether a mixed batch may name it.
fn kinds() -> [(LoraConfig, &'static [&'static str], bool); 7] {
    const BIASES: &[&str] = &["conv.bias", "norm.beta", "up.bias", "down.bias"];
    [
        (random(2, ["up", "token"]), &[], true),
        (random(3, ["up"]).with_lora_bias(true).with_use_rslora(true), &[], true),
        (random(2, ["down", "position", "conv"]), &[], false),
        (random(4, ["up", "down"]).with_bias(Bias::All), BIASES, false),
        (random(2, ["up", "conv"]).with_bias(Bias::LoraOnly), &["conv.bias", "up.bias"], false),
        (random(1, ["token"]).with_modules_to_save(["norm"]), &["norm.gamma", "norm.beta"], false),
        (
            random(3, ["conv", "down"]).with_lora_bias(true).with_modules_to_save(["up"]),
            &["up.weight", "up.bias"],
            false,
        ),
    ]
}

#[derive(Clone, Debug)]
enum Operation {
    Add { name: usize, kind: usize },
    Load { name: usize, kind: usize },
    LoadBroken { name: usize },
    Set(Vec<usize>),
    SetUnknown,
    Delete { name: usize },
    Hotswap { name: usize, kind: usize },
    HotswapBroken { name: usize },
    Merge,
    Unmerge,
    Disable,
    Mix(Vec<Option<usize>>),
    ValidAndBack,
    Save { name: usize },
    Record,
    Train,
}

impl Operation {
    fn any() -> impl Strategy<Value = Self> {
        let (name, kind) = (0..NAMES.len(), 0..kinds().len());
        let both = || (name.clone(), kind.clone());
        prop_oneof![
            2 => both().prop_map(|(name, kind)| Self::Add { name, kind }),
            4 => both().prop_map(|(name, kind)| Self::Load { name, kind }),
            1 => name.clone().prop_map(|name| Self::LoadBroken { name }),
            5 => prop::collection::vec(name.clone(), 0..4).prop_map(Self::Set),
            1 => Just(Self::SetUnknown),
            2 => name.clone().prop_map(|name| Self::Delete { name }),
            3 => both().prop_map(|(name, kind)| Self::Hotswap { name, kind }),
            1 => name.clone().prop_map(|name| Self::HotswapBroken { name }),
            4 => Just(Self::Merge),
            1 => Just(Self::Unmerge),
            1 => Just(Self::Disable),
            3 => prop::collection::vec(prop::option::of(name.clone()), 3).prop_map(Self::Mix),
            1 => Just(Self::ValidAndBack),
            1 => name.prop_map(|name| Self::Save { name }),
            1 => Just(Self::Record),
            2 => Just(Self::Train),
        ]
    }
}

/// What is known of an adapter: where its tensors are, and of which kind it is.
#[derive(Clone, Debug)]
struct Known {
    directory: PathBuf,
    kind: usize,
}

/// The model under test, the prediction, and the files that both come from.
struct Run {
    net: Net,
    bare: Net,
    known: BTreeMap<&'static str, Known>,
    active: Vec<&'static str>,
    merged: bool,
    files: TempDir,
    number: usize,
}

impl Run {
    fn new(device: &Device) -> Self {
        let bare = Net::new(device).no_grad();
        Self {
            net: bare.clone(),
            bare,
            known: BTreeMap::new(),
            active: vec![],
            merged: false,
            files: tempfile::tempdir().unwrap(),
            number: 0,
        }
    }

    /// A directory that was never used.
    fn directory(&mut self) -> PathBuf {
        self.number += 1;
        self.files.path().join(self.number.to_string())
    }

    /// A stored adapter of that kind, with numbers of its own.
    fn stored(&mut self, kind: usize) -> PathBuf {
        let mut net = self.bare.clone();
        net.add_adapter("x", &kinds()[kind].0).unwrap();
        let directory = self.directory();
        stir(net).save_adapter("x", &directory).unwrap();
        directory
    }

    /// A stored adapter without one of its tensors' places: the rank of the configuration is not that of the tensors.
    fn broken(&mut self) -> PathBuf {
        let directory = self.stored(0);
        let path = directory.join("adapter_config.json");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(path, text.replace("\"r\": 2", "\"r\": 3")).unwrap();
        directory
    }

    /// The model that has nothing but these adapters, all of them active.
    fn fresh(&self, names: &[&'static str]) -> Net {
        let mut net = self.bare.clone();
        for name in names {
            net.load_adapter(name, &self.known[name].directory).unwrap();
        }
        net.set_adapter(names).unwrap();
        net
    }

    fn copies_overlap(&self, names: &[&'static str]) -> bool {
        let copies = |name: &'static str| kinds()[self.known[name].kind].1;
        names.iter().enumerate().any(|(i, one)| {
            names[..i].iter().any(|other| copies(one).iter().any(|path| copies(other).contains(path)))
        })
    }

    /// An adapter has come under a name that was free.
    fn arrived(&mut self, name: &'static str, directory: PathBuf, kind: usize) {
        if self.known.is_empty() {
            self.active = vec![name];
        }
        self.known.insert(name, Known { directory, kind });
    }

    /// Performs the operation on the model and on the prediction.
    fn perform(&mut self, operation: &Operation) {
        let before = (parameters(&self.net), self.net.adapters(), self.net.output());
        let failed = match operation {
            Operation::Add { name, kind } => {
                let (name, config) = (NAMES[*name], &kinds()[*kind].0);
                let result = self.net.add_adapter(name, config);
                if self.known.contains_key(name) {
                    assert!(matches!(result, Err(PeftError::AdapterExists { .. })), "{result:?}");
                    true
                } else {
                    result.unwrap();
                    let directory = self.directory();
                    self.net.save_adapter(name, &directory).unwrap();
                    self.arrived(name, directory, *kind);
                    false
                }
            }
            Operation::Load { name, kind } => {
                let (name, directory) = (NAMES[*name], self.stored(*kind));
                let result = self.net.load_adapter(name, &directory);
                if self.known.contains_key(name) {
                    assert!(matches!(result, Err(PeftError::AdapterExists { .. })), "{result:?}");
                    true
                } else {
                    result.unwrap();
                    self.arrived(name, directory, *kind);
                    false
                }
            }
            Operation::LoadBroken { name } => {
                let directory = self.broken();
                self.net.load_adapter(NAMES[*name], directory).unwrap_err();
                true
            }
            Operation::Set(names) => {
                let mut names: Vec<&'static str> = names.iter().map(|name| NAMES[*name]).collect();
                let result = self.net.set_adapter(&names);
                names.sort_unstable();
                names.dedup();
                if names.iter().any(|name| !self.known.contains_key(name)) {
                    assert!(matches!(result, Err(PeftError::UnknownAdapter { .. })), "{result:?}");
                    true
                } else if self.copies_overlap(&names) {
                    assert!(matches!(result, Err(PeftError::ConflictingCopies { .. })), "{result:?}");
                    true
                } else {
                    result.unwrap();
                    (self.active, self.merged) = (names, false);
                    false
                }
            }
            Operation::SetUnknown => {
                let result = self.net.set_adapter(&["unknown"]);
                assert!(matches!(result, Err(PeftError::UnknownAdapter { .. })), "{result:?}");
                true
            }
            Operation::Delete { name } => {
                let name = NAMES[*name];
                let result = self.net.delete_adapter(name);
                if !self.known.contains_key(name) {
                    assert!(matches!(result, Err(PeftError::UnknownAdapter { .. })), "{result:?}");
                    true
                } else if self.merged && self.active.contains(&name) {
                    assert!(matches!(result, Err(PeftError::MergedAdapter { .. })), "{result:?}");
                    true
                } else {
                    result.unwrap();
                    self.known.remove(name);
                    self.active.retain(|active| *active != name);
                    false
                }
            }
            Operation::Hotswap { name, kind } => self.hotswap(NAMES[*name], *kind),
            Operation::HotswapBroken { name } => {
                let directory = self.broken();
                self.net.hotswap_adapter(NAMES[*name], directory).unwrap_err();
                true
            }
            Operation::Merge => {
                let report = self.net.merge_adapter().unwrap();
                assert_eq!(report.largest_error, 0.0);
                self.merged = !self.active.is_empty();
                assert_eq!(report.parameters.is_empty(), !self.merged);
                false
            }
            Operation::Unmerge => {
                self.net.unmerge_adapter().unwrap();
                self.merged = false;
                false
            }
            Operation::Disable => {
                assert_eq!(self.net.without_adapters().unwrap().output(), self.bare.output());
                true
            }
            Operation::Mix(rows) => {
                self.mix(&rows.iter().map(|row| row.map(|name| NAMES[name])).collect::<Vec<_>>());
                true
            }
            Operation::ValidAndBack => {
                if self.net.devices()[0].is_autodiff() {
                    self.net = self.net.valid().train();
                }
                true
            }
            Operation::Save { name } => {
                let (name, directory) = (NAMES[*name], self.directory());
                let result = self.net.save_adapter(name, &directory);
                match self.known.get(name) {
                    Some(known) => {
                        result.unwrap();
                        assert_eq!(files(&directory), files(&known.directory));
                    }
                    None => assert!(matches!(result, Err(PeftError::UnknownAdapter { .. })), "{result:?}"),
                }
                true
            }
            Operation::Record => {
                let record = self.net.clone().into_record();
                self.net = self.net.clone().load_record(record);
                self.merged = false;
                false
            }
            Operation::Train => {
                self.train();
                false
            }
        };
        if failed {
            let after = (parameters(&self.net), self.net.adapters(), self.net.output());
            assert_eq!(after, before, "{operation:?} should have changed nothing");
        }
    }

    /// Returns whether it failed.
    fn hotswap(&mut self, name: &'static str, kind: usize) -> bool {
        let directory = self.stored(kind);
        let result = self.net.hotswap_adapter(name, &directory);
        let Some(old) = self.known.get(name).cloned() else {
            assert!(matches!(result, Err(PeftError::UnknownAdapter { .. })), "{result:?}");
            return true;
        };
        if self.merged {
            assert!(matches!(result, Err(PeftError::MergedAdapter { .. })), "{result:?}");
            return true;
        }
        self.known.insert(name, Known { directory, kind });
        if self.copies_overlap(&self.active) {
            assert!(matches!(result, Err(PeftError::ConflictingCopies { .. })), "{result:?}");
            self.known.insert(name, old);
            return true;
        }
        result.unwrap();
        false
    }

    /// Every row of a mixed batch is what its adapter makes of it alone.
    fn mix(&self, rows: &[Option<&'static str>]) {
        let result = self.net.for_rows(rows);
        let mut names = rows.iter().flatten();
        if names.clone().any(|name| !self.known.contains_key(name)) {
            assert!(matches!(result, Err(PeftError::UnknownAdapter { .. })), "{result:?}");
            return;
        }
        if self.merged {
            assert!(matches!(result, Err(PeftError::MergedAdapter { .. })), "{result:?}");
            return;
        }
        if names.any(|name| !kinds()[self.known[name].kind].2) {
            assert!(matches!(result, Err(PeftError::MixedBatch { .. })), "{result:?}");
            return;
        }
        let mixed = result.unwrap().output();
        for (i, row) in rows.iter().enumerate() {
            let alone = match row {
                Some(name) => self.fresh(&[*name]).output(),
                None => self.bare.output(),
            };
            assert_eq!(super::mixed_batch::row(&mixed, i), super::mixed_batch::row(&alone, i), "row {i}");
        }
    }

    /// One step of gradient descent, after which the active adapters have other tensors and nothing is merged.
    fn train(&mut self) {
        let device = self.net.devices()[0].clone();
        if !device.is_autodiff() || self.merged || self.active.is_empty() {
            return;
        }
        let loss = self.net.forward(ids(&device)).square().mean();
        let gradients = GradientsParams::from_grads(loss.backward(), &self.net);
        let before = parameters(&self.net);
        self.net = SgdConfig::new().init().step(0.1, self.net.clone(), gradients);
        for (path, value) in parameters(&self.net) {
            let is_active = self.active.iter().any(|name| path.contains(&format!(".peft.{name}.")));
            if is_adapter(&path) && !is_active {
                assert_eq!(value, before[&path], "{path} is not active");
            }
        }
        for name in self.active.clone() {
            let (directory, kind) = (self.directory(), self.known[name].kind);
            self.net.save_adapter(name, &directory).unwrap();
            self.known.insert(name, Known { directory, kind });
        }
    }

    /// The model is what is predicted.
    fn check(&self, history: &[Operation]) {
        assert_eq!(base(&self.net), base(&self.bare), "{history:?}");
        let status = |name: &&'static str| {
            let active = self.active.contains(name);
            (name.to_string(), active, active && self.merged)
        };
        let expected: Vec<_> = self.known.keys().map(status).collect();
        let found = self.net.adapters().into_iter().map(|status| (status.name, status.active, status.merged));
        assert_eq!(found.collect::<Vec<_>>(), expected, "{history:?}");

        let expected = self.fresh(&self.active).output();
        if self.merged {
            assert_close("merged", &self.net.output(), &expected, REORDERED);
        } else {
            assert_eq!(self.net.output(), expected, "{history:?}");
        }
    }
}

/// The tensors of an adapter and its configuration.
fn files(directory: &Path) -> (BTreeMap<String, TensorData>, Vec<u8>) {
    let read = |name: &str| std::fs::read(directory.join(name)).unwrap();
    (burn_peft_tests::fixture::read_tensors(&read("adapter_model.safetensors")), read("adapter_config.json"))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn the_active_set_alone_decides_whatever_came_before(
        operations in prop::collection::vec(Operation::any(), 1..24),
        autodiff in any::<bool>(),
    ) {
        let device = if autodiff { Device::default().autodiff() } else { Device::default() };
        let mut run = Run::new(&device);
        for (i, operation) in operations.iter().enumerate() {
            run.perform(operation);
            run.check(&operations[..=i]);
        }
    }
}
