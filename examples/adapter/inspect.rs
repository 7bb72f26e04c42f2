//! `inspect`: what is in an adapter and whether it can be used.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use burn::tensor::{Device, Tensor};
use burn_peft::{AdapterDirectory, LoraConfig, PeftError, StoredModule, TargetModules, TensorRole};

use crate::cli::InspectArgs;
use crate::numbers::{bytes, count, ranges, short, thousands};
use crate::{programs, table};
use burn_peft_examples::{failure, model};

/// Entries of a long list that are told.
const SHOWN: usize = 8;

/// Prints what is in the directory; whether every adapter in it can be used.
pub fn run(args: &InspectArgs) -> Result<bool> {
    let report = report(&model::adapter(&args.directory)?)?;
    print!("{}", report.text);
    Ok(report.usable)
}

/// What is told about adapters.
pub struct Report {
    pub text: String,
    pub usable: bool,
}

/// Describes the adapter in `directory`, or those in its sub-directories.
///
/// # Errors
/// There is none.
pub fn report(directory: &Path) -> Result<Report> {
    let named = named_adapters(directory)?;
    if is_adapter(directory) || named.is_empty() {
        let mut report = describe(&AdapterDirectory::open(directory)?)?;
        if !named.is_empty() {
            let names =
                named.iter().filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
            let names: Vec<String> = names.collect();
            let _ = writeln!(report.text, "\nmore adapters in sub-directories: {}", names.join(", "));
        }
        return Ok(report);
    }
    let mut all = Report { text: String::new(), usable: true };
    for (i, path) in named.iter().enumerate() {
        let opened = AdapterDirectory::open(path).map_err(anyhow::Error::from);
        let one = match opened.and_then(|adapter| describe(&adapter)) {
            Ok(one) => one,
            Err(error) => {
                Report { text: format!("{}\n{}", path.display(), failure::text(&error)), usable: false }
            }
        };
        all.text.push_str(if i > 0 { "\n" } else { "" });
        all.text.push_str(&one.text);
        all.usable &= one.usable;
    }
    Ok(all)
}

fn is_adapter(directory: &Path) -> bool {
    directory.join("adapter_config.json").exists()
}

/// The sub-directories with adapters, where PEFT puts those that are not named `default`.
fn named_adapters(directory: &Path) -> Result<Vec<PathBuf>> {
    let cannot_read = || format!("cannot read the directory `{}`", directory.display());
    let entries = std::fs::read_dir(directory).with_context(cannot_read)?;
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>();
    let mut paths = paths.with_context(cannot_read)?;
    paths.retain(|path| is_adapter(path));
    paths.sort();
    Ok(paths)
}

fn describe(adapter: &AdapterDirectory) -> Result<Report> {
    let mut text = format!("{}\n", adapter.path().display());
    text.push_str(&settings(adapter));
    let contents = Contents::read(adapter)?;
    text.push_str(&file_line(adapter));
    text.push_str(&contents.tables());
    text.push_str(&contents.notes);
    let ignored = adapter.ignored_keys().iter().map(|(key, value)| format!("`{key}`: {value}"));
    let ignored: Vec<String> = ignored.collect();
    if !ignored.is_empty() {
        let _ = writeln!(text, "\nnote: configuration keys without effect: {}", ignored.join(", "));
    }
    let refusals = refusals(&adapter.problems());
    if refusals.is_empty() {
        text.push_str("\nusable: loads on any model with these modules\n");
    } else {
        text.push_str("\nwould be refused:\n");
        text.push_str(&refusals);
    }
    text.push_str(&programs::lines(adapter, refusals.is_empty(), &contents.broken));
    Ok(Report { text, usable: refusals.is_empty() })
}

/// The configuration by PEFT's names: what matters always, and what differs from PEFT's defaults.
fn settings(adapter: &AdapterDirectory) -> String {
    let (targeting, file) = (adapter.config().targeting(), adapter.config().file());
    let Some(config) = adapter.config().as_lora() else { return String::new() };
    let LoraConfig { r, lora_alpha, lora_dropout, .. } = config;
    let list = |names: &[String]| names.join(", ");
    let targets = |targets: &TargetModules| match targets {
        TargetModules::Names(names) => {
            let told = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
            match names.len().saturating_sub(SHOWN) {
                0 => told,
                more => format!("{told} and {more} more"),
            }
        }
        other => other.to_string(),
    };
    let told = |text: &Option<String>| text.clone().unwrap_or_else(|| "not told".into());
    let patterns = |patterns: Vec<(String, String)>| {
        let told = patterns.into_iter().map(|(pattern, value)| format!("{pattern} = {value}"));
        told.collect::<Vec<_>>().join(", ")
    };
    let ranks = config.rank_pattern.iter().map(|(pattern, r)| (pattern.clone(), r.to_string()));
    let alphas = config.alpha_pattern.iter().map(|(pattern, alpha)| (pattern.clone(), alpha.to_string()));
    let layers = targeting.layers_to_transform.as_deref().map(|layers| {
        let mut layers = layers.to_vec();
        layers.sort_unstable();
        ranges(&layers)
    });
    let init = config.init_lora_weights.to_string();
    let differs = |differs: bool, text: String| differs.then_some(text);
    let rows = [
        ("peft_version", Some(adapter.peft_version().unwrap_or("not told").to_string())),
        ("base_model_name_or_path", Some(told(&file.base_model_name_or_path))),
        ("task_type", file.task_type.clone()),
        ("r", Some(r.to_string())),
        ("lora_alpha", Some(format!("{lora_alpha} (scaling {})", scaling(config.scaling())))),
        ("use_rslora", differs(config.use_rslora, "true".into())),
        ("use_dora", differs(config.use_dora, "true".into())),
        ("lora_dropout", Some(lora_dropout.to_string())),
        ("target_modules", Some(targeting.target_modules.as_ref().map_or("none".into(), targets))),
        ("exclude_modules", targeting.exclude_modules.as_ref().map(targets)),
        ("rank_pattern", differs(!config.rank_pattern.is_empty(), patterns(ranks.collect()))),
        ("alpha_pattern", differs(!config.alpha_pattern.is_empty(), patterns(alphas.collect()))),
        ("layers_to_transform", layers),
        ("layers_pattern", differs(!targeting.layers_pattern.is_empty(), list(&targeting.layers_pattern))),
        ("bias", Some(config.bias.as_str().into())),
        ("lora_bias", differs(config.lora_bias, "true".into())),
        ("modules_to_save", differs(!targeting.modules_to_save.is_empty(), list(&targeting.modules_to_save))),
        ("init_lora_weights", differs(init != "true", init)),
        ("fan_in_fan_out", differs(config.fan_in_fan_out, "true".into())),
    ];
    let rows: Vec<(&str, String)> = rows.into_iter().filter_map(|(key, value)| Some((key, value?))).collect();
    let width = rows.iter().map(|(key, _)| key.len()).max().unwrap_or_default();
    rows.iter().map(|(key, value)| format!("  {key:<width$}  {value}\n")).collect()
}

/// A scaling without the noise of its last bits.
fn scaling(scaling: f64) -> String {
    let rounded = (scaling * 1e4).round() / 1e4;
    if rounded == 0.0 { short(scaling) } else { rounded.to_string() }
}

fn file_line(adapter: &AdapterDirectory) -> String {
    let mut dtypes: BTreeMap<&str, usize> = BTreeMap::new();
    for tensor in adapter.tensors() {
        *dtypes.entry(&tensor.dtype).or_default() += 1;
    }
    let dtypes: Vec<String> = match dtypes.len() {
        1 => dtypes.into_keys().map(str::to_string).collect(),
        _ => dtypes.into_iter().map(|(dtype, count)| format!("{count} {dtype}")).collect(),
    };
    format!(
        "\nadapter_model.safetensors: {}, {} ({}), {}\n",
        bytes(adapter.file_size()),
        count(adapter.tensors().len(), "tensor"),
        dtypes.join(", "),
        count(adapter.num_params(), "parameter"),
    )
}

/// What is in the tensors of an adapter.
struct Contents {
    updates: BTreeMap<Kind, Vec<Update>>,
    others: BTreeMap<(TensorRole, String, Vec<usize>), Vec<f64>>,
    /// The keys of tensors with infinities or NaNs.
    broken: Vec<String>,
    notes: String,
}

/// Modules that are told in one line: the name behind the layer's number, sizes, rank, and scaling.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    suffix: String,
    sizes: [usize; 2],
    r: usize,
    scaling: String,
}

/// The Frobenius norms of one module's update.
struct Update {
    layer: Option<usize>,
    a: f64,
    b: f64,
    /// That of `scaling B A`; not a number if the factors do not fit together.
    product: f64,
}

impl Contents {
    fn read(adapter: &AdapterDirectory) -> Result<Self> {
        let device = Device::flex();
        let (updates, others) = (BTreeMap::new(), BTreeMap::new());
        let mut contents = Self { updates, others, broken: vec![], notes: String::new() };
        for tensor in adapter.tensors() {
            // What has another type is among the problems.
            let Ok(value) = adapter.read(&tensor.key, &device) else { continue };
            if !value.clone().is_finite().all().into_scalar::<bool>() {
                contents.broken.push(tensor.key.clone());
            }
            let is_factor =
                adapter.modules().iter().any(|module| [&module.a, &module.b].contains(&&tensor.key));
            if !is_factor && !matches!(tensor.role, TensorRole::Unknown | TensorRole::Repeated) {
                let parameter = tensor.key.rsplit('.').next().unwrap_or_default();
                let name = match tensor.role {
                    TensorRole::Copy => format!("{}.{parameter}", split_layer(&tensor.module).1),
                    _ => split_layer(&tensor.module).1.to_string(),
                };
                let group = (tensor.role, name, tensor.shape.clone());
                contents.others.entry(group).or_default().push(norm(value));
            }
        }
        for module in adapter.modules() {
            let (layer, suffix) = split_layer(&module.name);
            let kind = Kind {
                suffix: suffix.to_string(),
                sizes: [module.d_input, module.d_output],
                r: module.r,
                scaling: scaling(module.scaling),
            };
            if let Ok(update) = Update::of(adapter, module, layer, &device) {
                contents.updates.entry(kind).or_default().push(update);
            }
        }
        let broken = &contents.broken;
        if !broken.is_empty() {
            let list = shown(broken.len(), broken.iter().map(|key| format!("  {key}\n")));
            let what = count(broken.len(), "tensor");
            contents.notes =
                format!("\nwarning: {what} with infinities or NaNs; merging will be refused\n{list}");
        }
        let mut updates = contents.updates.values().flatten().peekable();
        if updates.peek().is_some() && updates.all(|update| update.product == 0.0) {
            contents.notes.push_str("\nnote: every update is zero, as before training\n");
        }
        Ok(contents)
    }

    fn tables(&self) -> String {
        let cells = |cells: &[&str]| cells.iter().map(ToString::to_string).collect::<Vec<String>>();
        let mean = |values: &mut dyn ExactSizeIterator<Item = f64>| {
            let n = values.len() as f64;
            values.sum::<f64>() / n
        };
        let mut text = String::new();
        if !self.updates.is_empty() {
            let head = [
                "module", "count", "layers", "in", "out", "rank", "scaling", "|update|", "largest", "|A|",
                "|B|",
            ];
            let mut rows = vec![cells(&head)];
            for (kind, updates) in &self.updates {
                let mut layers: Vec<usize> = updates.iter().filter_map(|update| update.layer).collect();
                layers.sort_unstable();
                let largest = updates
                    .iter()
                    .map(|update| update.product)
                    .fold(0.0, |a, b| if b.is_nan() || b > a { b } else { a });
                rows.push(vec![
                    kind.suffix.clone(),
                    updates.len().to_string(),
                    ranges(&layers),
                    thousands(kind.sizes[0]),
                    thousands(kind.sizes[1]),
                    kind.r.to_string(),
                    kind.scaling.clone(),
                    short(mean(&mut updates.iter().map(|update| update.product))),
                    short(largest),
                    short(mean(&mut updates.iter().map(|update| update.a))),
                    short(mean(&mut updates.iter().map(|update| update.b))),
                ]);
            }
            text.push_str(&table::text(&rows, &[0]));
            text.push_str(
                "  |.| are Frobenius norms, means over the modules; |update| is that of scaling B A\n",
            );
        }
        if !self.others.is_empty() {
            let mut rows = vec![cells(&["other tensors", "what", "count", "shape", "norm"])];
            for ((role, name, shape), norms) in &self.others {
                let what = match role {
                    TensorRole::Adapter(tensor) => tensor,
                    TensorRole::BaseLayer => "the base's own weight, repeated",
                    _ => "trained copy",
                };
                rows.push(vec![
                    name.clone(),
                    what.to_string(),
                    norms.len().to_string(),
                    format!("{shape:?}"),
                    short(mean(&mut norms.iter().copied())),
                ]);
            }
            let _ = write!(text, "\n{}", table::text(&rows, &[0, 1]));
        }
        text
    }
}

impl Update {
    fn of(
        adapter: &AdapterDirectory,
        module: &StoredModule,
        layer: Option<usize>,
        device: &Device,
    ) -> Result<Self, PeftError> {
        let (a, b) = (adapter.read(&module.a, device)?, adapter.read(&module.b, device)?);
        let rows = |tensor: &Tensor<1>, columns: usize| tensor.shape().num_elements() / columns.max(1);
        let (of_a, of_b) = (rows(&a, module.d_input), rows(&b, module.d_output));
        let product = if of_a == of_b && of_a > 0 {
            let a = a.clone().reshape([of_a, module.d_input]);
            let b = b.clone().reshape([module.d_output, of_b]);
            // |B A|² is the trace of (A Aᵀ)(Bᵀ B), and both of these are small.
            let gram = a.clone().matmul(a.transpose()) * b.clone().transpose().matmul(b);
            // Rounding may leave a zero below zero.
            module.scaling.abs() * f64::from(gram.sum().into_scalar::<f32>()).max(0.0).sqrt()
        } else {
            f64::NAN
        };
        // `max` takes the other number for one that is none.
        let (a, b) = (norm(a), norm(b));
        let product = if a.is_finite() && b.is_finite() { product } else { f64::NAN };
        Ok(Self { layer, a, b, product })
    }
}

/// The Frobenius norm.
fn norm(tensor: Tensor<1>) -> f64 {
    f64::from((tensor.clone() * tensor).sum().into_scalar::<f32>()).sqrt()
}

/// A module's layer number and the name behind it; the last component where there is none.
fn split_layer(module: &str) -> (Option<usize>, &str) {
    let mut start = 0;
    let mut found = (None, module.rsplit('.').next().unwrap_or(module));
    for part in module.split('.') {
        let end = start + part.len();
        if let (Ok(layer), Some(suffix)) = (part.parse(), module.get(end + 1..)) {
            found = (Some(layer), suffix);
        }
        start = end + 1;
    }
    found
}

/// Every reason for which an adapter would be refused, one a line.
pub fn refusals(problems: &[PeftError]) -> String {
    let mut text = String::new();
    for problem in problems {
        match problem {
            PeftError::UnsupportedConfig { problems, .. } => {
                text.extend(problems.iter().map(|problem| format!("  {problem}\n")));
            }
            PeftError::InconsistentAdapter { problems, .. } => {
                text.push_str(&shown(
                    problems.len(),
                    problems.iter().map(|problem| format!("  {problem}\n")),
                ));
            }
            other => text.extend(other.to_string().lines().map(|line| format!("  {line}\n"))),
        }
    }
    text
}

/// The first of many lines and how many there are more.
fn shown(count: usize, lines: impl Iterator<Item = String>) -> String {
    let mut text: String = lines.take(SHOWN).collect();
    if count > SHOWN {
        let _ = writeln!(text, "  and {} more", thousands(count - SHOWN));
    }
    text
}
