//! Which modules a configuration means: what peft says, and what a naive reading of the rules says.

use std::collections::BTreeSet;

use burn::tensor::Device;
use burn_peft::{DEFAULT_ADAPTER, InjectionReport, LoraConfig, PeftError, PeftModel, TargetModules};
use burn_peft_tests::fixture::{directory, read_facts};
use burn_peft_tests::parameters::parameters;
use burn_peft_tests::tree::Tree;
use proptest::prelude::*;
use serde::Deserialize;

#[derive(Deserialize)]
struct Truth {
    keys: Vec<String>,
    rows: Vec<Row>,
    layer_rows: Vec<LayerRow>,
    pattern_rows: Vec<PatternRow>,
    saved_rows: Vec<SavedRow>,
}

#[derive(Deserialize)]
struct Row {
    target_modules: Names,
    exclude_modules: Option<Names>,
    matched: Option<BTreeSet<String>>,
    error: Option<String>,
}

#[derive(Debug, Deserialize)]
struct LayerRow {
    key: String,
    target_modules: Names,
    layers_to_transform: Option<Layers>,
    layers_pattern: Option<Names>,
    matched: Option<bool>,
    error: Option<String>,
}

#[derive(Debug, Deserialize)]
struct PatternRow {
    patterns: Vec<String>,
    key: String,
    found: Option<String>,
}

#[derive(Debug, Deserialize)]
struct SavedRow {
    target_modules: Names,
    modules_to_save: Vec<String>,
    adapted: Option<BTreeSet<String>>,
    saved: Option<BTreeSet<String>>,
    error: Option<String>,
}

/// As in `adapter_config.json`.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Layers {
    One(i64),
    Many(Vec<i64>),
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

#[test]
fn layers_are_chosen_as_peft_chooses_them() {
    let truth: Truth = read_facts(&directory("targeting"));
    assert!(truth.layer_rows.len() >= 60);
    let mut without_type = vec![];
    for row in truth.layer_rows {
        let mut config = LoraConfig::new(2).with_target_modules(row.target_modules.clone());
        let layers = match row.layers_to_transform.clone() {
            None => None,
            Some(Layers::One(layer)) => Some(vec![layer]),
            Some(Layers::Many(layers)) => Some(layers),
        };
        if let Some(layers) = layers {
            let Ok(layers) = layers.into_iter().map(usize::try_from).collect::<Result<Vec<_>, _>>() else {
                without_type.push(row);
                continue;
            };
            config = config.with_layers_to_transform(layers);
        }
        config = match row.layers_pattern.clone() {
            None => config,
            Some(Names::Text(text)) if text.is_empty() => config,
            Some(Names::Text(pattern)) => config.with_layers_pattern([pattern]),
            Some(Names::List(patterns)) => config.with_layers_pattern(patterns),
        };
        let key = [row.key.clone()];
        let answer = match Tree::new(&key, &Device::default()).add_adapter(DEFAULT_ADAPTER, &config) {
            Ok(report) => {
                assert_eq!(paths(&report), key.into(), "{row:?}");
                Ok(true)
            }
            Err(PeftError::NoModuleMatched { .. }) => Ok(false),
            Err(PeftError::InvalidConfig { .. }) => Err("invalid"),
            Err(other) => panic!("{row:?}: {other}"),
        };
        assert_eq!((answer.ok(), answer.err()), (row.matched, row.error.as_deref()), "{row:?}");
    }
    // No layer has a negative number, and none can be asked for here.
    assert_eq!(without_type.len(), 1, "{without_type:?}");
    assert_eq!(without_type[0].matched, Some(false));
}

#[test]
fn the_pattern_that_decides_is_the_one_that_decides_in_peft() {
    let truth: Truth = read_facts(&directory("targeting"));
    assert!(truth.pattern_rows.len() >= 30);
    for row in truth.pattern_rows {
        const DEFAULT: usize = 2;
        let rank_of = |pattern: &String| 10 + row.patterns.iter().position(|other| other == pattern).unwrap();
        let ranks = row.patterns.iter().map(|pattern| (pattern, rank_of(pattern)));
        let config = LoraConfig::new(DEFAULT).with_target_modules([&row.key]).with_rank_pattern(ranks);
        let mut tree = Tree::new(std::slice::from_ref(&row.key), &Device::default());
        let report = tree.add_adapter(DEFAULT_ADAPTER, &config).unwrap();
        assert_eq!(report.modules[0].r, Some(row.found.as_ref().map_or(DEFAULT, rank_of)), "{row:?}");
    }
}

#[test]
fn modules_are_saved_as_peft_saves_them() {
    let truth: Truth = read_facts(&directory("targeting"));
    assert!(truth.saved_rows.len() >= 25);
    let mut refused = vec![];
    for row in truth.saved_rows {
        let config = LoraConfig::new(2)
            .with_target_modules(row.target_modules.clone())
            .with_modules_to_save(&row.modules_to_save);
        let mut tree = Tree::new(&truth.keys, &Device::default());
        let base = parameters(&tree);
        match tree.add_adapter(DEFAULT_ADAPTER, &config) {
            Ok(report) => {
                assert_eq!(Some(paths(&report)), row.adapted, "{row:?}");
                let saved = row.saved.as_ref().unwrap();
                let is_saved =
                    |path: &&String| saved.iter().any(|saved| path.starts_with(&format!("{saved}.")));
                let expected: BTreeSet<&String> = base.keys().filter(is_saved).collect();
                assert_eq!(report.copied_parameters.iter().collect::<BTreeSet<_>>(), expected, "{row:?}");
            }
            Err(PeftError::TargetAlsoSaved { .. }) => {
                assert_eq!(row.error.as_deref(), Some("overlap"), "{row:?}")
            }
            Err(PeftError::AllModulesExcluded { .. }) => {
                assert_eq!(row.error.as_deref(), Some("excluded"), "{row:?}");
            }
            Err(PeftError::NoModuleToSave { .. }) => refused.push(row),
            Err(other) => panic!("{row:?}: {other}"),
        }
    }
    // peft saves nothing, without a word, where no module has any of the names. Here that is an error: nobody asks for
    // nothing, and what the names were meant for would not be trained.
    let names: Vec<&String> = refused.iter().flat_map(|row| &row.modules_to_save).collect();
    assert_eq!(names, [".*head", "layers.*", "no_such_module"]);
    assert!(refused.iter().all(|row| row.saved.as_ref().is_some_and(BTreeSet::is_empty)));
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
    config.targeting.exclude_modules = exclusions;
    let mut tree = Tree::new(keys, &Device::default());
    let report = tree.add_adapter(DEFAULT_ADAPTER, &config)?;
    Ok(paths(&report))
}

fn paths(report: &InjectionReport) -> BTreeSet<String> {
    report.modules.iter().map(|module| module.path.clone()).collect()
}
