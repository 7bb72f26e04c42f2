//! `merge`: a model with adapters in its weights.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use burn::tensor::{Device, FloatDType};
use burn_peft::{AdapterDirectory, MergeReport, TensorRole};
use burn_peft_examples::model;
use burn_peft_llama::{MergedDirectory, check_output, merge_directory};
use indicatif::ProgressBar;

use crate::base::BaseFiles;
use crate::cli::{MergeArgs, name_of};
use crate::inspect::refusals;
use crate::numbers::{bytes, count, thousands};

/// Merges and prints what became of it.
pub fn run(args: &MergeArgs) -> Result<()> {
    let args = &MergeArgs {
        model: model::directory(&args.model, "adapter", "")?,
        adapter: args.adapter.iter().map(|name| model::adapter(name, "adapter")).collect::<Result<_>>()?,
        ..args.clone()
    };
    let start = Instant::now();
    let spinner = ProgressBar::new_spinner();
    spinner.enable_steady_tick(Duration::from_millis(100));
    let plan = Plan::new(args)?;
    spinner.suspend(|| print!("{plan}"));
    spinner.set_message("merging ...");
    let merged = plan.carry_out();
    spinner.finish_and_clear();
    println!("{}in {:.1} s", merged?, start.elapsed().as_secs_f64());
    Ok(())
}

/// A merge of which everything has been checked that can be checked before the weights are read.
pub struct Plan {
    model: PathBuf,
    base: BaseFiles,
    adapters: Vec<(AdapterDirectory, f64)>,
    dtype: FloatDType,
    untie: bool,
    out: PathBuf,
}

/// What a merge did.
#[derive(Debug)]
pub struct Merged {
    pub merged: MergedDirectory,
    values: usize,
    out: PathBuf,
    files: Vec<(String, u64)>,
}

impl Plan {
    /// # Errors
    /// Whatever would go wrong later: the base, an adapter, how they fit together, the weights, the output directory.
    pub fn new(args: &MergeArgs) -> Result<Self> {
        let base = BaseFiles::open(&args.model)?;
        let weights = match args.weights.len() {
            0 => vec![1.0; args.adapter.len()],
            n if n == args.adapter.len() => args.weights.clone(),
            n => bail!(
                "expected as many weights as adapters, found {n} for {}",
                count(args.adapter.len(), "adapter")
            ),
        };
        let mut adapters = vec![];
        for (path, weight) in args.adapter.iter().zip(weights) {
            let adapter = AdapterDirectory::open(path)?;
            let refusals = refusals(&adapter.problems());
            if !refusals.is_empty() {
                bail!("cannot use the adapter `{}`:\n{}", path.display(), refusals.trim_end());
            }
            base.check(&adapter)?;
            adapters.push((adapter, weight));
        }
        check_copies(&adapters)?;
        check_output(&args.out)?;
        Ok(Self {
            dtype: args.dtype.resolve(base.dtype),
            untie: adapters.iter().any(|(adapter, _)| base.config.needs_untying(adapter)),
            out: args.out.clone(),
            model: args.model.clone(),
            base,
            adapters,
        })
    }

    fn is_weighted(&self) -> bool {
        self.adapters.iter().any(|(_, weight)| *weight != 1.0)
    }

    /// Merges and writes.
    ///
    /// # Errors
    /// The weights are malformed, the adapter belongs to another base, the merged weights are not finite, or a file
    /// cannot be written.
    pub fn carry_out(&self) -> Result<Merged> {
        let adapters: Vec<_> =
            self.adapters.iter().map(|(adapter, weight)| (adapter.path(), *weight)).collect();
        let merged = merge_directory(&self.model, &adapters, Some(self.dtype), &self.out, &Device::flex())?;
        let shapes = merged.report.parameters.iter().filter_map(|name| self.base.shape(name));
        let values = shapes.map(|shape| shape.iter().product::<usize>()).sum();
        let mut files = vec![];
        for entry in std::fs::read_dir(&self.out)? {
            let entry = entry?;
            files.push((entry.file_name().to_string_lossy().into_owned(), entry.metadata()?.len()));
        }
        files.sort();
        Ok(Merged { values, merged, out: self.out.clone(), files })
    }
}

/// Finds copies of parameters that cannot be merged as it was asked.
///
/// # Errors
/// Two adapters have a copy of one parameter, or one that has copies is weighted.
fn check_copies(adapters: &[(AdapterDirectory, f64)]) -> Result<()> {
    let weighted = adapters.iter().any(|(_, weight)| *weight != 1.0);
    let mut owners: BTreeMap<&str, &AdapterDirectory> = BTreeMap::new();
    for (adapter, _) in adapters {
        let copies = adapter.tensors().iter().filter(|tensor| tensor.role == TensorRole::Copy);
        for key in copies.map(|tensor| &*tensor.key) {
            let shown = adapter.path().display();
            if weighted {
                bail!(
                    "the adapter `{shown}` has a trained copy of a parameter, which cannot be weighted: `{key}`\n\
                     hint: leave `--weights` out"
                );
            }
            if let Some(owner) = owners.insert(key, adapter) {
                bail!(
                    "the adapters `{}` and `{shown}` both have a trained copy of one parameter: `{key}`\n\
                     hint: merge one of them",
                    owner.path().display()
                );
            }
        }
    }
    Ok(())
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (model, dtype) = (self.model.display(), name_of(self.base.dtype));
        writeln!(f, "base     {model}: {}, {dtype}", count(self.base.num_params(), "parameter"))?;
        for (adapter, weight) in &self.adapters {
            write!(f, "adapter  {}: {}", adapter.path().display(), count(adapter.modules().len(), "module"))?;
            if let Some(config) = adapter.config().as_lora() {
                write!(f, ", r {}, lora_alpha {}", config.r, config.lora_alpha)?;
            }
            if self.is_weighted() { writeln!(f, ", weight {weight}")? } else { writeln!(f)? }
        }
        if self.untie {
            writeln!(
                f,
                "note     an adapter changes the embedding or the output layer, which share one table here: the merged\n         \
                 model has a table for each (tie_word_embeddings false)"
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for Merged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let MergeReport { parameters, largest_error, worst_parameter, .. } = &self.merged.report;
        if self.merged.has_other_head {
            writeln!(
                f,
                "note     config.json says tied, and the weights have another `lm_head`; it is used"
            )?;
        }
        let (tensors, values) = (count(parameters.len(), "tensor"), thousands(self.values));
        write!(f, "merged   {tensors} of {values} parameters, largest rounding error ")?;
        match worst_parameter {
            Some(worst) => writeln!(f, "{largest_error:.1e} at {worst}")?,
            None => writeln!(f, "0")?,
        }
        let size = self.files.iter().map(|(_, size)| *size as usize).sum();
        let names: Vec<&str> = self.files.iter().map(|(name, _)| &**name).collect();
        let dtype = name_of(self.merged.dtype);
        writeln!(f, "wrote    {}: {}, {dtype}, {}", self.out.display(), bytes(size), names.join(", "))?;
        write!(f, "         ")
    }
}
