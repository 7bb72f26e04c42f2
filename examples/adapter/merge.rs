//! `merge`: a model with adapters in its weights.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use burn::tensor::{Device, FloatDType};
use burn_peft::MergeReport;
use burn_peft_llama::{MergedDirectory, check_output, merge_directory};
use indicatif::ProgressBar;

use crate::cli::{MergeArgs, name_of};
use crate::inputs::Inputs;
use crate::numbers::{bytes, count, thousands};

/// Merges and prints what became of it.
pub fn run(args: &MergeArgs) -> Result<()> {
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
    inputs: Inputs,
    dtype: FloatDType,
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
        let inputs = Inputs::open(&args.model, &args.adapter, &args.weights)?;
        check_output(&args.out)?;
        Ok(Self { dtype: args.dtype.resolve(inputs.base.dtype), inputs, out: args.out.clone() })
    }

    /// Merges and writes.
    ///
    /// # Errors
    /// The weights are malformed, the adapter belongs to another base, the merged weights are not finite, or a file
    /// cannot be written.
    pub fn carry_out(&self) -> Result<Merged> {
        let (model, adapters) = (&self.inputs.model, self.inputs.paths());
        let merged = merge_directory(model, &adapters, Some(self.dtype), &self.out, &Device::flex())?;
        let shapes = merged.report.parameters.iter().filter_map(|name| self.inputs.base.shape(name));
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

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.inputs)?;
        if self.inputs.unties() {
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
