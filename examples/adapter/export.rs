//! `export`: an adapter or a model for llama.cpp.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use burn::tensor::{Device, FloatDType};
use burn_peft_examples::command;
use burn_peft_examples::progress::Progress;
use burn_peft_llama::{GgufAdapter, GgufModel, GgufType, check_gguf_output};
use indicatif::ProgressBar;

use crate::cli::{ExportArgs, name_of};
use crate::inputs::Inputs;
use crate::numbers::{bytes, count, short};

/// Exports and prints what became of it.
pub fn run(args: &ExportArgs) -> Result<()> {
    let start = Instant::now();
    let plan = Plan::new(args)?;
    print!("{plan}");
    print!("{}", plan.carry_out()?);
    println!("         in {:.1} s", start.elapsed().as_secs_f64());
    println!("next     {}", plan.next());
    Ok(())
}

/// An export of which everything has been checked that can be checked before the weights are read.
pub struct Plan {
    inputs: Inputs,
    /// The adapter that is written, unless it is a model.
    adapter: Option<GgufAdapter>,
    /// What llama.cpp does otherwise, and what the file has otherwise than the base.
    notes: Vec<String>,
    dtype: GgufType,
    out: PathBuf,
}

/// What an export did.
#[derive(Debug)]
pub struct Exported {
    size: u64,
    tensors: usize,
    merged: usize,
    alpha: Option<f32>,
    dtype: GgufType,
    out: PathBuf,
}

impl Plan {
    /// # Errors
    /// Whatever would go wrong later: the base, an adapter, how they fit together, what llama.cpp does not compute, the
    /// output file.
    pub fn new(args: &ExportArgs) -> Result<Self> {
        if !args.merged && args.adapter.len() != 1 {
            bail!(
                "expected one adapter for one file, found {}\nhint: export each into a file of its own, which llama.cpp \
                 loads together; or with `--merged`, the model with all of them in its weights",
                args.adapter.len()
            );
        }
        if !args.merged && !args.weights.is_empty() {
            bail!(
                "an exported adapter has no weight\nhint: give it to llama.cpp, `--lora-scaled adapter.gguf:0.5`, or \
                 export the merged model with `--merged`"
            );
        }
        let inputs = Inputs::open(&args.model, &args.adapter, &args.weights)?;
        let (mut adapter, mut notes) = (None, vec![]);
        if args.merged {
            let model = GgufModel::open(&inputs.model, &Device::flex())?;
            notes = model.notes().to_vec();
            if model.is_tied() && inputs.unties() {
                notes.push(
                    "an adapter changes the embedding or the output layer, which share one table here: the file has\n         \
                     a table for each"
                        .into(),
                );
            }
        } else if let Some((directory, _)) = inputs.adapters.first() {
            adapter = Some(GgufAdapter::new(&inputs.model, directory.clone())?);
        }
        check_gguf_output(&args.out)?;
        let dtype = match args.dtype {
            Some(dtype) => dtype.into(),
            None if args.merged => GgufType::F16,
            None => GgufType::F32,
        };
        Ok(Self { inputs, adapter, notes, dtype, out: args.out.clone() })
    }

    /// Merges where it was asked for, and writes.
    ///
    /// # Errors
    /// The weights are malformed, a number is too large for the type, or the file cannot be written.
    pub fn carry_out(&self) -> Result<Exported> {
        let (tensors, merged, size);
        if let Some(adapter) = &self.adapter {
            (tensors, merged) = (adapter.num_tensors(), 0);
            size = self.write(tensors, |on_tensor| adapter.write(&self.out, self.dtype, on_tensor))?;
        } else {
            let model;
            (model, merged) = self.model()?;
            tensors = model.num_tensors();
            size = self.write(tensors, |on_tensor| model.write(&self.out, self.dtype, on_tensor))?;
        }
        let alpha = self.adapter.as_ref().map(GgufAdapter::alpha);
        Ok(Exported { size, tensors, merged, alpha, dtype: self.dtype, out: self.out.clone() })
    }

    /// The model with its adapters merged, and the number of tensors that changed.
    fn model(&self) -> Result<(GgufModel, usize)> {
        let device = Device::flex();
        if self.inputs.adapters.is_empty() {
            return Ok((GgufModel::open(&self.inputs.model, &device)?, 0));
        }
        let spinner = ProgressBar::new_spinner().with_message("merging ...");
        spinner.enable_steady_tick(Duration::from_millis(100));
        let merged = GgufModel::merged(&self.inputs.model, &self.inputs.paths(), &device);
        spinner.finish_and_clear();
        let (model, report) = merged?;
        Ok((model, report.parameters.len()))
    }

    /// Shows the progress of writing.
    fn write<E: Into<anyhow::Error>>(
        &self,
        tensors: usize,
        write: impl FnOnce(&mut dyn FnMut(usize, usize)) -> Result<u64, E>,
    ) -> Result<u64> {
        let progress = Progress::new("writing tensors", tensors);
        let size = write(&mut |done, _| progress.report(done, ""));
        progress.finish();
        size.map_err(Into::into)
    }

    /// The command with which llama.cpp uses the file.
    pub fn next(&self) -> String {
        let quoted = |path: &Path| command::quoted(&path.to_string_lossy());
        let out = quoted(&self.out);
        if self.adapter.is_none() {
            return format!("llama-cli -m {out}");
        }
        let base = self.out.with_file_name("base.gguf");
        let make = [
            "export",
            "--model",
            &self.inputs.model.to_string_lossy(),
            "--merged",
            "--out",
            &base.to_string_lossy(),
        ]
        .map(Into::into);
        format!(
            "the base, unless you have it as GGUF:\n         {}\n         llama-cli -m {} --lora {out}",
            command::text("adapter", make.into_iter()),
            quoted(&base),
        )
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.inputs)?;
        for note in &self.notes {
            writeln!(f, "note     {note}")?;
        }
        match self.adapter.as_ref().map(GgufAdapter::num_rescaled) {
            None | Some(0) => Ok(()),
            Some(modules) => writeln!(
                f,
                "note     a file has one alpha, and the modules of this adapter several scales: B of {} is multiplied by\n         \
                 what is missing",
                count(modules, "module")
            ),
        }
    }
}

impl fmt::Display for Exported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.merged > 0 {
            writeln!(f, "merged   {}", count(self.merged, "tensor"))?;
        }
        let dtype = match self.dtype {
            GgufType::F16 => name_of(FloatDType::F16),
            _ => name_of(FloatDType::F32),
        };
        let (size, tensors) = (bytes(self.size as usize), count(self.tensors, "tensor"));
        write!(f, "wrote    {}: {size}, {dtype}, {tensors}", Path::display(&self.out))?;
        match self.alpha {
            Some(alpha) => writeln!(f, ", alpha {}", short(alpha.into())),
            None => writeln!(f),
        }
    }
}
