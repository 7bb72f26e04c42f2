//! `merge`: a model with adapters in its weights.
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, FloatDType, Tensor};
use burn_peft::{AdapterDirectory, CombinationType, MergeReport, PeftModel, TensorRole};
use burn_peft_llama::LlamaForCausalLm;
use indicatif::ProgressBar;

use crate::base::BaseFiles;
use crate::cli::{MergeArgs, names_of};
use crate::inspect::refusals;
use crate::numbers::{bytes, count, thousands};
use crate::output::Output;

/// The name of the adapter that weighted ones are combined into.
const WEIGHTED: &str = "weighted";

/// Merges and prints what became of it.
pub fn run(args: &MergeArgs) -> Result<()> {
    let start = Instant::now();
    let spinner = ProgressBar::new_spinner();
    spinner.enable_steady_tick(Duration::from_millis(100));
    let plan = Plan::new(args)?;
    spinner.suspend(|| print!("{plan}"));
    let merged = plan.carry_out(|step| spinner.set_message(format!("{step} ...")));
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
    output: Output,
    out: PathBuf,
}

/// What a merge did.
#[derive(Debug)]
pub struct Merged {
    pub report: MergeReport,
    values: usize,
    /// Whether the base has an output layer of its own although its configuration says tied.
    has_other_head: bool,
    dtype: FloatDType,
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
        Ok(Self {
            dtype: args.dtype.resolve(base.dtype),
            untie: adapters.iter().any(|(adapter, _)| base.needs_untying(adapter)),
            output: Output::new(&args.out)?,
            out: args.out.clone(),
            model: args.model.clone(),
            base,
            adapters,
        })
    }

    fn is_weighted(&self) -> bool {
        self.adapters.iter().any(|(_, weight)| *weight != 1.0)
    }

    /// Merges and writes; `tell` hears of each step.
    ///
    /// # Errors
    /// The weights are malformed, the adapter belongs to another base, the merged weights are not finite, or a file
    /// cannot be written.
    pub fn carry_out(&self, tell: impl Fn(&str)) -> Result<Merged> {
        tell("reading the base model");
        // Where the type changes, too, the sum is formed in f32 and rounded to the new type, not to the old one before.
        let wide = if self.dtype == self.base.dtype { self.dtype } else { FloatDType::F32 };
        let mut model = LlamaForCausalLm::from_pretrained_as(&self.model, &Device::flex(), wide)?;
        let has_other_head = self.base.config.tie_word_embeddings && !model.config().tie_word_embeddings;
        if self.untie {
            model.untie_lm_head();
        }
        tell("loading the adapters");
        let names: Vec<String> = (1..=self.adapters.len()).map(|i| format!("adapter-{i}")).collect();
        for (name, (adapter, _)) in names.iter().zip(&self.adapters) {
            model.load_adapter(name, adapter.path())?;
        }
        if self.is_weighted() {
            let weights = self.adapters.iter().map(|(_, weight)| *weight);
            let sources: Vec<(&str, f64)> = names.iter().map(String::as_str).zip(weights).collect();
            model.add_weighted_adapter(WEIGHTED, &sources, CombinationType::Cat)?;
            model.set_adapter(&[WEIGHTED])?;
        } else {
            model.set_adapter(&names.iter().map(String::as_str).collect::<Vec<_>>())?;
        }
        tell("merging");
        let mut report = model.merge_and_unload()?;
        if wide != self.dtype {
            model = convert(model, self.dtype.into(), &mut report)?;
        }
        tell("writing the merged model");
        let files = self.output.write(&model, names_of(self.dtype).1, &self.model)?;
        let shapes = report.parameters.iter().filter_map(|name| self.base.shape(name));
        let values = shapes.map(|shape| shape.iter().product::<usize>()).sum();
        Ok(Merged { values, report, has_other_head, dtype: self.dtype, out: self.out.clone(), files })
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
        let (model, dtype) = (self.model.display(), names_of(self.base.dtype).0);
        writeln!(f, "base     {model}: {}, {dtype}", count(self.base.num_params(), "parameter"))?;
        for (adapter, weight) in &self.adapters {
            let config = adapter.config();
            write!(f, "adapter  {}: {}", adapter.path().display(), count(adapter.modules().len(), "module"))?;
            write!(f, ", r {}, lora_alpha {}", config.r, config.lora_alpha)?;
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
        let MergeReport { parameters, largest_error, worst_parameter, .. } = &self.report;
        if self.has_other_head {
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
        let dtype = names_of(self.dtype).0;
        writeln!(f, "wrote    {}: {}, {dtype}, {}", self.out.display(), bytes(size), names.join(", "))?;
        write!(f, "         ")
    }
}

/// The model with every parameter in `dtype`; rounding errors go into `report`.
///
/// # Errors
/// A value is too large for the type.
fn convert(model: LlamaForCausalLm, dtype: DType, report: &mut MergeReport) -> Result<LlamaForCausalLm> {
    struct Converter<'a> {
        dtype: DType,
        path: Vec<String>,
        overflowing: Option<String>,
        report: &'a mut MergeReport,
    }

    impl ModuleMapper for Converter<'_> {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.path.push(name.to_string());
        }

        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.pop();
        }

        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|exact| {
                let rounded = exact.clone().cast(self.dtype);
                let error = (rounded.clone().cast(exact.dtype()) - exact).abs().max().into_scalar::<f32>();
                if !error.is_finite() {
                    self.overflowing = Some(self.path.join("."));
                } else if error > self.report.largest_error {
                    self.report.largest_error = error;
                    self.report.worst_parameter = Some(self.path.join("."));
                }
                rounded
            })
        }
    }

    let mut converter = Converter { dtype, path: vec![], overflowing: None, report };
    let model = model.map(&mut converter);
    match converter.overflowing {
        None => Ok(model),
        Some(path) => Err(anyhow::anyhow!(
            "a value of `{path}` is too large for {dtype:?}\nhint: give `--dtype bf16` or `f32`"
        ))
        .context("cannot convert the merged model"),
    }
}
