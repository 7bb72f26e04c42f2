//! Which modules a configuration means: what peft says, and what a naive reading of the rules says.

use std::collections::BTreeSet;

use burn::module::{Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor};
use burn::nn::{Embedding, EmbeddingConfig, LinearConfig};
use burn::tensor::Device;
use burn_peft::{DEFAULT_ADAPTER, LoraConfig, LoraLinear, PeftError, PeftModel, TargetModules};
use burn_peft_tests::fixture::{directory, read_facts};
use proptest::prelude::*;
use serde::Deserialize;

#[derive(Deserialize)]
struct Truth {
    keys: Vec<String>,
    rows: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    target_modules: Names,
    exclude_modules: Option<Names>,
    matched: Option<BTreeSet<String>>,
    error: Option<String>,
}

/// As in `adapter_config.json`.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Names {
    Text(String),
    List(Vec<String>),
}

impl From<Names> for TargetModules {
    fn from(names: Names) -> Self {
        match names {
            Names::Text(text) if text.eq_ignore_ascii_case("all-linear") => Self::AllLinear,
            Names::Text(pattern) => Self::Regex(pattern),
            Names::List(names) => names.into_iter().collect(),
        }
    }
}

#[test]
fn every_row_of_the_table_is_answered_as_peft_answers_it() {
    let truth: Truth = read_facts(&directory("targeting"));
    assert!(truth.rows.len() >= 40);
    for row in truth.rows {
        let question = format!("{:?} without {:?}", row.target_modules, row.exclude_modules);
        let answer = adapted(&truth.keys, row.target_modules.into(), row.exclude_modules.map(Into::into));
        assert_eq!(answer.as_ref().ok(), row.matched.as_ref(), "{question}: {answer:?}");
        assert_eq!(answer.err().map(kind), row.error.as_deref(), "{question}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn lists_of_names_are_read_by_the_plain_rule(
        keys in prop::collection::btree_set(path(1..5), 1..12),
        targets in prop::collection::vec(path(1..4), 1..4),
        exclusions in prop::collection::vec(path(1..4), 0..3),
    ) {
        // What contains modules is no leaf itself.
        let is_container = |key: &String| keys.iter().any(|other| other.starts_with(&format!("{key}.")));
        let leaves: Vec<String> = keys.iter().filter(|key| !is_container(key)).cloned().collect();
        let exclude = (!exclusions.is_empty()).then(|| exclusions.iter().collect::<TargetModules>());
        let answer = adapted(&leaves, targets.iter().collect(), exclude);

        let naive = naive(&leaves, &targets, &exclusions);
        prop_assert_eq!(answer.map_err(kind), naive);
    }
}

/// PEFT's rule for lists: the whole path, or its end after a dot.
fn naive(
    leaves: &[String],
    targets: &[String],
    exclusions: &[String],
) -> Result<BTreeSet<String>, &'static str> {
    let is_in = |path: &str, names: &[String]| {
        names.iter().any(|name| path == name || path.ends_with(&format!(".{name}")))
    };
    let parents =
        |leaf: &str| leaf.match_indices('.').map(|(end, _)| leaf[..end].to_string()).collect::<Vec<_>>();
    if leaves
        .iter()
        .flat_map(|leaf| parents(leaf))
        .any(|path| is_in(&path, targets) && !is_in(&path, exclusions))
    {
        return Err("unsupported");
    }
    let matched: Vec<&String> = leaves.iter().filter(|leaf| is_in(leaf, targets)).collect();
    if matched.is_empty() {
        return Err("not found");
    }
    let kept: BTreeSet<String> =
        matched.into_iter().filter(|leaf| !is_in(leaf, exclusions)).cloned().collect();
    if kept.is_empty() { Err("excluded") } else { Ok(kept) }
}

/// Paths of segments that are suffixes and prefixes of each other.
fn path(length: std::ops::Range<usize>) -> impl Strategy<Value = String> {
    let segment = prop::sample::select(vec!["proj", "q_proj", "q", "0", "10", "attn"]);
    prop::collection::vec(segment, length).prop_map(|segments| segments.join("."))
}

fn kind(error: PeftError) -> &'static str {
    match error {
        PeftError::NoModuleMatched { .. } => "not found",
        PeftError::AllModulesExcluded { .. } => "excluded",
        PeftError::UnsupportedModules { .. } => "unsupported",
        other => panic!("unexpected error: {other}"),
    }
}

fn adapted(
    keys: &[String],
    targets: TargetModules,
    exclusions: Option<TargetModules>,
) -> Result<BTreeSet<String>, PeftError> {
    let mut config = LoraConfig::new(2).with_target_modules(targets);
    config.exclude_modules = exclusions;
    let mut tree = Tree::new(keys, &Device::flex());
    let report = tree.add_adapter(DEFAULT_ADAPTER, &config)?;
    Ok(report.modules.into_iter().map(|module| module.path).collect())
}

/// A module with leaves at any paths: linear layers, and embeddings where the path says so.
#[derive(Clone, Debug)]
struct Tree {
    linears: Vec<(String, LoraLinear)>,
    embeddings: Vec<(String, Embedding)>,
}

impl Tree {
    fn new(keys: &[String], device: &Device) -> Self {
        let (embeddings, linears): (Vec<_>, Vec<_>) =
            keys.iter().cloned().partition(|key| key.ends_with("embed_tokens"));
        let linear = |key| (key, LinearConfig::new(3, 2).init(device).into());
        let embedding = |key| (key, EmbeddingConfig::new(5, 3).init(device));
        Self {
            linears: linears.into_iter().map(linear).collect(),
            embeddings: embeddings.into_iter().map(embedding).collect(),
        }
    }

    fn each(
        self,
        linear: impl FnMut(LoraLinear) -> LoraLinear,
        embedding: impl FnMut(Embedding) -> Embedding,
    ) -> Self {
        fn each<T>(list: Vec<(String, T)>, mut change: impl FnMut(T) -> T) -> Vec<(String, T)> {
            list.into_iter().map(|(key, module)| (key, change(module))).collect()
        }
        Self { linears: each(self.linears, linear), embeddings: each(self.embeddings, embedding) }
    }
}

const CONTAINER: &str = "Struct:Tree";

impl Module for Tree {
    fn collect_devices(&self, devices: Devices) -> Devices {
        let devices =
            self.linears.iter().fold(devices, |devices, (_, module)| module.collect_devices(devices));
        self.embeddings.iter().fold(devices, |devices, (_, module)| module.collect_devices(devices))
    }

    fn fork(self, device: &Device) -> Self {
        self.each(|module| module.fork(device), |module| module.fork(device))
    }

    fn to_device(self, device: &Device) -> Self {
        self.each(|module| module.to_device(device), |module| module.to_device(device))
    }

    fn train(self) -> Self {
        self.each(Module::train, Module::train)
    }

    fn valid(&self) -> Self {
        self.clone().each(|module| module.valid(), |module| module.valid())
    }

    fn materialize(self) -> Self {
        self.each(Module::materialize, Module::materialize)
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        fn within<V: ModuleVisitor>(visitor: &mut V, key: &str, module: &impl Module) {
            key.split('.').for_each(|segment| visitor.enter_module(segment, CONTAINER));
            module.visit(visitor);
            key.rsplit('.').for_each(|segment| visitor.exit_module(segment, CONTAINER));
        }
        self.linears.iter().for_each(|(key, module)| within(visitor, key, module));
        self.embeddings.iter().for_each(|(key, module)| within(visitor, key, module));
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        fn within<M: ModuleMapper, T: Module>(mapper: &mut M, (key, module): (String, T)) -> (String, T) {
            key.split('.').for_each(|segment| mapper.enter_module(segment, CONTAINER));
            let module = module.map(mapper);
            key.rsplit('.').for_each(|segment| mapper.exit_module(segment, CONTAINER));
            (key, module)
        }
        Self {
            linears: self.linears.into_iter().map(|leaf| within(mapper, leaf)).collect(),
            embeddings: self.embeddings.into_iter().map(|leaf| within(mapper, leaf)).collect(),
        }
    }
}

impl ModuleDisplay for Tree {}

impl ModuleDisplayDefault for Tree {
    fn content(&self, content: burn::module::Content) -> Option<burn::module::Content> {
        Some(content)
    }
}
