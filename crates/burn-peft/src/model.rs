//! The operations on a model's adapters.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use burn::module::{Module, ParamId, Reparameterization};
use burn::tensor::{DType, Int, Tensor, TensorData};

use crate::adapter::{Adapter, Adapters};
use crate::combination_type::CombinationType;
use crate::config::PeftConfig;
use crate::convert::{self, LoraRank};
use crate::error::PeftError;
use crate::merge::{self, MergeReport};
use crate::method::Update;
use crate::plan::{InjectionReport, Plan, Target};
use crate::seam::{Layout, attach};
use crate::status::AdapterStatus;
use crate::store::{self, LoadOptions, LoadReport};
use crate::summary::ParameterSummary;
use crate::weighted;

/// The name that PEFT gives to an adapter that was not named.
pub const DEFAULT_ADAPTER: &str = "default";

/// Adapters on any Burn [`Module`]: the model keeps its type, and every module has these methods.
///
/// An adapter is attached to the weights it adapts. From there Burn carries it: its tensors reach optimizers, records
/// and devices, and follow [`valid`](Module::valid) and [`train`](Module::train). Its name, scaling and dropout are not
/// part of a record; [`save_adapter`](Self::save_adapter) writes them.
///
/// An operation that fails leaves the model as it was. Methods that return a model return a copy, which shares its tensors
/// with this one; all others that change something change this one.
///
/// # Operations
/// | | |
/// |---|---|
/// | Add | [`add_adapter`](Self::add_adapter), [`delete_adapter`](Self::delete_adapter) |
/// | Switch | [`set_adapter`](Self::set_adapter), [`set_scale`](Self::set_scale); as a copy: [`without_adapters`](Self::without_adapters), [`for_rows`](Self::for_rows), [`select_rows`](Self::select_rows) |
/// | Combine | [`add_weighted_adapter`](Self::add_weighted_adapter), [`convert_to_lora`](Self::convert_to_lora) |
/// | Merge | for now: [`merge_adapter`](Self::merge_adapter), [`merge_adapters`](Self::merge_adapters), [`unmerge_adapter`](Self::unmerge_adapter); for good: [`merge_and_unload`](Self::merge_and_unload), [`unload`](Self::unload) |
/// | Files | [`save_adapter`](Self::save_adapter), [`save_adapters`](Self::save_adapters), [`load_adapter`](Self::load_adapter), [`load_adapter_with`](Self::load_adapter_with), [`hotswap_adapter`](Self::hotswap_adapter) |
/// | Inspect | [`adapters`](Self::adapters), [`trainable_parameters`](Self::trainable_parameters), [`adapter_tensors`](Self::adapter_tensors), [`batch_rows`](Self::batch_rows) |
/// | Train | Burn's optimizers find the active adapters by themselves; [`LoraPlus`](crate::LoraPlus) gives them learning rates of their own |
///
/// # Example
/// ```
/// use burn::module::{Module, ParamId, Reparameterization};
/// use burn::nn::{Linear, LinearConfig};
/// use burn::tensor::{Device, Tensor};
/// use burn_peft::{LoraConfig, LoraLinear, PeftModel};
///
/// #[derive(Module, Debug)]
/// struct Mlp {
///     up: LoraLinear,
///     down: LoraLinear,
/// }
///
/// # fn main() -> Result<(), burn_peft::PeftError> {
/// let device = Device::default().autodiff();
/// let mut model = Mlp {
///     up: LinearConfig::new(8, 32).init(&device).into(),
///     down: LinearConfig::new(32, 8).init(&device).into(),
/// };
/// let config = LoraConfig::new(4).with_lora_alpha(8.0).with_target_modules(["up", "down"]);
/// let report = model.add_adapter("default", &config)?;
/// assert_eq!(report.modules.len(), 2);
/// assert_eq!(
///     model.trainable_parameters().to_string(),
///     "trainable params: 320 || all params: 872 || trainable%: 36.6972"
/// );
/// # Ok(())
/// # }
/// ```
pub trait PeftModel: Module {
    /// Adapts the modules that `config` means and stops the training of everything else. PEFT's `add_adapter`, and
    /// its `get_peft_model` for the first one.
    ///
    /// The first adapter of a model becomes active; a further one waits for [`set_adapter`](Self::set_adapter). The
    /// factors start as [`InitLoraWeights`](crate::InitLoraWeights) says, drawn from the device's generator (see
    /// `Device::seed`), in f32, on the device of the weight.
    ///
    /// # Errors
    /// - [`InvalidConfig`](PeftError::InvalidConfig), [`InvalidPattern`](PeftError::InvalidPattern): see
    ///   [`LoraConfig::validate`](crate::LoraConfig::validate)
    /// - [`InvalidAdapterName`](PeftError::InvalidAdapterName), [`AdapterExists`](PeftError::AdapterExists)
    /// - [`NoModuleMatched`](PeftError::NoModuleMatched), [`AllModulesExcluded`](PeftError::AllModulesExcluded),
    ///   [`NoModuleToSave`](PeftError::NoModuleToSave)
    /// - [`UnsupportedModules`](PeftError::UnsupportedModules): a target is no linear, embedding or convolution layer
    /// - [`DropoutNeedsLoraLinear`](PeftError::DropoutNeedsLoraLinear),
    ///   [`LoraBiasUnsupported`](PeftError::LoraBiasUnsupported)
    /// - [`AmbiguousKeyMapping`](PeftError::AmbiguousKeyMapping)
    /// - [`NonFiniteWeight`](PeftError::NonFiniteWeight) for a start that is taken from the weight
    /// - [`ForeignReparameterization`](PeftError::ForeignReparameterization)
    fn add_adapter(
        &mut self,
        name: &str,
        config: impl Into<PeftConfig>,
    ) -> Result<InjectionReport, PeftError> {
        let mut layout = Layout::of(self)?;
        let config = config.into();
        config.kind().check_new()?;
        let plan = Plan::new(&layout, name, &config)?;
        let updates = plan.targets.iter().map(Target::fresh).collect::<Result<_, _>>()?;
        plan.add_to(&mut layout.states, updates);
        attach(self, layout.states, true);
        Ok(plan.into_report())
    }

    /// Makes exactly these adapters active: the model computes the sum of their updates, and they are the ones that are
    /// trained. An empty list disables all adapters. Merged adapters are unmerged first.
    ///
    /// The active set alone decides what the model computes, bit for bit. Neither earlier operations nor the order in which
    /// adapters were added or are named here make a difference.
    ///
    /// # Errors
    /// [`UnknownAdapter`](PeftError::UnknownAdapter), [`ConflictingCopies`](PeftError::ConflictingCopies),
    /// [`ForeignReparameterization`](PeftError::ForeignReparameterization).
    fn set_adapter(&mut self, names: &[&str]) -> Result<(), PeftError> {
        let mut layout = Layout::of(self)?;
        for name in names {
            layout.states.require(name)?;
        }
        layout.states.activate(names)?;
        attach(self, layout.states, false);
        Ok(())
    }

    /// A copy of the model with no adapter active and none merged: the base. The copy shares every tensor with this model,
    /// which stays as it is. PEFT's `with model.disable_adapter():`.
    ///
    /// ```
    /// # use burn::module::{Module, ParamId, Reparameterization};
    /// # use burn::nn::LinearConfig;
    /// # use burn::tensor::{Device, Tensor};
    /// # use burn_peft::{InitLoraWeights, LoraConfig, LoraLinear, PeftModel};
    /// # #[derive(Module, Debug)]
    /// # struct Model {
    /// #     proj: LoraLinear,
    /// # }
    /// # fn main() -> Result<(), burn_peft::PeftError> {
    /// # let device = Device::default();
    /// # let mut model = Model { proj: LinearConfig::new(4, 4).init(&device).into() };
    /// # let random = LoraConfig::new(2).with_init_lora_weights(InitLoraWeights::Random);
    /// # model.add_adapter("default", &random.with_target_modules(["proj"]))?;
    /// let x = Tensor::<2>::ones([1, 4], &device);
    /// let base = model.without_adapters()?.proj.forward(x.clone());
    /// let adapted = model.proj.forward(x);
    /// # assert_ne!(base.into_data(), adapted.into_data());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ForeignReparameterization`](PeftError::ForeignReparameterization).
    fn without_adapters(&self) -> Result<Self, PeftError> {
        let mut base = self.clone();
        base.set_adapter(&[])?;
        Ok(base)
    }

    /// A copy of the model for a batch whose rows name their adapters: it computes row `i` with the adapter `rows[i]` alone,
    /// or with none, all rows at once. The copy shares every tensor with this model, which stays as it is. It is for
    /// inference: dropout does not act, and nothing is trained. PEFT's `adapter_names=[..]`, with `None` for its
    /// `"__base__"`.
    ///
    /// Each adapter that is named costs its two narrow products on the whole batch; there is no loop over rows. The
    /// first axis of what the layers receive must be the batch.
    ///
    /// # Errors
    /// [`UnknownAdapter`](PeftError::UnknownAdapter), [`MergedAdapter`](PeftError::MergedAdapter),
    /// [`MixedBatch`](PeftError::MixedBatch) for adapters that work through the weight, which all rows share, that replace
    /// parameters, or that use DoRA or trained tokens under a tied output layer,
    /// [`ForeignReparameterization`](PeftError::ForeignReparameterization).
    ///
    /// # Panics
    /// The layers of the result panic on a batch with another number of rows.
    fn for_rows(&self, rows: &[Option<&str>]) -> Result<Self, PeftError> {
        let mut layout = Layout::of(self)?;
        let names: BTreeSet<&str> = rows.iter().copied().flatten().collect();
        for name in &names {
            layout.states.require(name)?;
        }
        layout.states.check_mixed_batch(&names)?;
        layout.states.activate(&[])?;
        for parameter in &layout.parameters {
            let Some(state) = layout.states.get_mut(&parameter.path) else { continue };
            let device = parameter.device.clone().without_autodiff();
            let named = state.list.iter().filter(|adapter| names.contains(&*adapter.info.name));
            state.rows = named
                .map(|adapter| {
                    let name = adapter.info.name.clone();
                    let mask = |row: &Option<&str>| if *row == Some(&*name) { 1.0 } else { 0.0 };
                    let mask: Vec<f32> = rows.iter().map(mask).collect();
                    (name.clone(), Tensor::from_data(mask.as_slice(), (&device, DType::F32)))
                })
                .collect();
        }
        let mut model = self.clone();
        attach(&mut model, layout.states, false);
        Ok(model)
    }

    /// The number of rows of the batch that [`for_rows`](Self::for_rows) was called for, if one of its rows names an
    /// adapter. `None` for every other model, whose batches may have any number of rows.
    fn batch_rows(&self) -> Option<usize> {
        let layout = Layout::read_only(self);
        layout.states.values().flat_map(|state| &state.rows).map(|(_, mask)| mask.shape()[0]).next()
    }

    /// A copy of a model from [`for_rows`](Self::for_rows) for a batch of these of its rows: row `i` has the adapter of row
    /// `rows[i]`. With it, a batch can shrink when a sequence ends, grow, or change its order. The copy shares every tensor
    /// with this model. If no row names an adapter, it equals this model.
    ///
    /// # Errors
    /// [`ForeignReparameterization`](PeftError::ForeignReparameterization).
    ///
    /// # Panics
    /// On a row that the batch of `for_rows` did not have.
    fn select_rows(&self, rows: &[usize]) -> Result<Self, PeftError> {
        let mut layout = Layout::of(self)?;
        let Some((_, mask)) = layout.states.values().flat_map(|state| &state.rows).next() else {
            return Ok(self.clone());
        };
        let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        let rows = Tensor::<1, Int>::from_data(TensorData::new(rows.clone(), [rows.len()]), &mask.device());
        for state in layout.states.values_mut() {
            *state = std::mem::take(state).select_rows(&rows);
        }
        let mut model = self.clone();
        attach(&mut model, layout.states, false);
        Ok(model)
    }

    /// Removes an adapter.
    ///
    /// # Errors
    /// [`UnknownAdapter`](PeftError::UnknownAdapter), [`MergedAdapter`](PeftError::MergedAdapter),
    /// [`ForeignReparameterization`](PeftError::ForeignReparameterization).
    fn delete_adapter(&mut self, name: &str) -> Result<(), PeftError> {
        let mut layout = Layout::of(self)?;
        layout.states.require(name)?;
        layout.states.refuse_merged(|merged| merged == name)?;
        layout.states.remove_adapter(name);
        attach(self, layout.states, false);
        Ok(())
    }

    /// Adds an adapter that combines others, each with a weight, for example as `Σ weight * scaling * A B`
    /// ([`CombinationType`] has the formulas). It waits for [`set_adapter`](Self::set_adapter). PEFT's method of this
    /// name.
    ///
    /// The new adapter has scaling 1 and covers every module that one of the sources adapts; its `lora_bias` is
    /// `Σ weight * scaling * bias`.
    ///
    /// # Errors
    /// - [`UnknownAdapter`](PeftError::UnknownAdapter), [`AdapterExists`](PeftError::AdapterExists),
    ///   [`InvalidAdapterName`](PeftError::InvalidAdapterName)
    /// - [`InvalidConfig`](PeftError::InvalidConfig): no sources, a weight that is not finite, a density or rank outside
    ///   its range
    /// - [`UnequalRanks`](PeftError::UnequalRanks), [`NonFiniteCombination`](PeftError::NonFiniteCombination)
    /// - [`CannotCombine`](PeftError::CannotCombine): a source has trained copies of parameters, DoRA or trained tokens
    /// - [`ForeignReparameterization`](PeftError::ForeignReparameterization)
    fn add_weighted_adapter(
        &mut self,
        name: &str,
        sources: &[(&str, f64)],
        combination_type: CombinationType,
    ) -> Result<InjectionReport, PeftError> {
        let mut layout = Layout::of(self)?;
        for (source, _) in sources {
            layout.states.require(source)?;
        }
        let report = weighted::add(&mut layout, name, sources, combination_type)?;
        attach(self, layout.states, true);
        Ok(report)
    }

    /// Adds an adapter of plain LoRA that changes the weights as another one does, as closely as its rank allows: it
    /// consists of the leading singular triplets of the change. It waits for [`set_adapter`](Self::set_adapter), and
    /// [`save_adapter`](Self::save_adapter) writes it for programs that read only plain LoRA. PEFT's `convert_to_lora` and
    /// `save_as_lora`.
    ///
    /// The whole change is converted, with magnitudes of DoRA and trained tokens. PEFT drops the magnitudes silently, and
    /// refuses tokens, embeddings and convolutions.
    ///
    /// # Errors
    /// - [`UnknownAdapter`](PeftError::UnknownAdapter), [`AdapterExists`](PeftError::AdapterExists),
    ///   [`InvalidAdapterName`](PeftError::InvalidAdapterName)
    /// - [`InvalidConfig`](PeftError::InvalidConfig) for a rank of 0 or a share outside `(0, 1]`
    /// - [`CannotConvert`](PeftError::CannotConvert) for an adapter that changes more than single weights: trained biases,
    ///   `lora_bias`, whole modules, trained tokens of a tied table
    /// - [`NonFiniteWeight`](PeftError::NonFiniteWeight)
    /// - [`ForeignReparameterization`](PeftError::ForeignReparameterization)
    fn convert_to_lora(
        &mut self,
        name: &str,
        source: &str,
        rank: impl Into<LoraRank>,
    ) -> Result<InjectionReport, PeftError> {
        let mut layout = Layout::of(self)?;
        layout.states.require(source)?;
        let report = convert::add(&mut layout, name, source, rank.into())?;
        attach(self, layout.states, true);
        Ok(report)
    }

    /// Multiplies the configured scaling of an adapter by `scale`. A later call replaces this factor, it does not multiply
    /// again. [`save_adapter`](Self::save_adapter) writes a `lora_alpha` that includes the factor. PEFT's `set_scale`, which
    /// PEFT does not save.
    ///
    /// # Errors
    /// [`UnknownAdapter`](PeftError::UnknownAdapter), [`MergedAdapter`](PeftError::MergedAdapter),
    /// [`InvalidConfig`](PeftError::InvalidConfig) for a number that is not finite,
    /// [`ForeignReparameterization`](PeftError::ForeignReparameterization).
    fn set_scale(&mut self, name: &str, scale: f64) -> Result<(), PeftError> {
        let mut layout = Layout::of(self)?;
        layout.states.require(name)?;
        layout.states.refuse_merged(|merged| merged == name)?;
        if !scale.is_finite() {
            return Err(PeftError::invalid("scale", "a finite number", scale));
        }
        for state in layout.states.values_mut() {
            for adapter in state.list.iter_mut().filter(|adapter| &*adapter.info.name == name) {
                adapter.info.scale = scale;
                for update in &mut adapter.updates {
                    update.scaling = scale * update.method.scaling();
                }
            }
        }
        attach(self, layout.states, false);
        Ok(())
    }

    /// The tensors of an adapter, in the model's order: for regularisers, analysis, and groups of an optimizer.
    ///
    /// ```
    /// # use burn::nn::LinearConfig;
    /// # use burn::tensor::Device;
    /// # use burn_peft::{LoraConfig, LoraLinear, PeftModel};
    /// # #[derive(burn::module::Module, Debug)]
    /// # struct Model {
    /// #     proj: LoraLinear,
    /// # }
    /// # fn main() -> Result<(), burn_peft::PeftError> {
    /// # let mut model = Model { proj: LinearConfig::new(4, 3).init(&Device::default()).into() };
    /// model.add_adapter("default", &LoraConfig::new(2).with_target_modules(["proj"]))?;
    /// let tensors = model.adapter_tensors("default")?;
    /// assert_eq!((&*tensors[0].path, tensors[0].name), ("proj.weight.peft.default.a", "a"));
    /// assert_eq!(tensors[0].tensor.dims(), [4, 2]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`UnknownAdapter`](PeftError::UnknownAdapter),
    /// [`ForeignReparameterization`](PeftError::ForeignReparameterization).
    fn adapter_tensors(&self, name: &str) -> Result<Vec<AdapterTensor>, PeftError> {
        let layout = Layout::of(self)?;
        layout.states.require(name)?;
        let mut tensors = vec![];
        for parameter in &layout.parameters {
            let state = layout.states.get(&parameter.path);
            let Some(adapter) = state.and_then(|state| state.get(name)) else { continue };
            for (spec, tensor) in adapter.updates.iter().flat_map(Update::parts) {
                tensors.push(AdapterTensor {
                    path: format!("{}.{}.{name}.{}", parameter.path, Adapters::NAME, spec.name),
                    module: adapter.info.site.module.clone(),
                    name: spec.name,
                    id: tensor.id,
                    is_trained: spec.is_trained,
                    tensor: tensor.val(),
                });
            }
        }
        Ok(tensors)
    }

    /// All adapters and what they are doing, sorted by name.
    fn adapters(&self) -> Vec<AdapterStatus> {
        AdapterStatus::list(&Layout::read_only(self).states)
    }

    /// Folds the active adapters into the weights for now, `W + Σ scaling * A B`: from then on they cost nothing. PEFT's
    /// `merge_adapter(safe_merge=True)`.
    ///
    /// The base is kept beside the merged weights, and [`unmerge_adapter`](Self::unmerge_adapter) gives it back bit for
    /// bit. Merged adapters are not trained. Whatever changes parameters (an optimizer's step, a record that is loaded)
    /// unmerges them, as does [`set_adapter`](Self::set_adapter).
    ///
    /// A tied output layer reads the table of the embedding without its adapters, and does so while they are merged.
    ///
    /// # Errors
    /// [`NonFiniteMerge`](PeftError::NonFiniteMerge), [`ForeignReparameterization`](PeftError::ForeignReparameterization).
    fn merge_adapter(&mut self) -> Result<MergeReport, PeftError> {
        merge::merge(self, None)
    }

    /// Folds some of the active adapters into the weights for now, as [`merge_adapter`](Self::merge_adapter) does with all
    /// of them. The other active ones go on working beside the merged weights, and adapters that were merged before stay
    /// merged. PEFT's `merge_adapter(adapter_names=[..])`, after which the other active adapters do not act.
    ///
    /// # Errors
    /// - [`InactiveAdapter`](PeftError::InactiveAdapter): only active adapters are merged
    /// - [`CoveredByCopy`](PeftError::CoveredByCopy): an active adapter that is not named replaces a parameter
    /// - the errors of [`merge_adapter`](Self::merge_adapter)
    fn merge_adapters(&mut self, names: &[&str]) -> Result<MergeReport, PeftError> {
        merge::merge(self, Some(names))
    }

    /// Undoes [`merge_adapter`](Self::merge_adapter): the base has its bits, the adapters work beside it again. Does
    /// nothing if nothing is merged.
    ///
    /// # Errors
    /// [`ForeignReparameterization`](PeftError::ForeignReparameterization).
    fn unmerge_adapter(&mut self) -> Result<(), PeftError> {
        let mut layout = Layout::of(self)?;
        for state in layout.states.values_mut() {
            state.merged = None;
        }
        attach(self, layout.states, false);
        Ok(())
    }

    /// Folds the active adapters into the weights, `W + Σ scaling * A B`, and removes every adapter; the model is a
    /// plain one again. PEFT's `merge_and_unload(safe_merge=True)`.
    ///
    /// The sum is formed in the type of the factors, f32 as a rule, and rounded once to the type of the weight.
    ///
    /// An adapter of a table that a tied output layer reads as well cannot be merged: the merged model would compute
    /// something else. Trained tokens can, since both ends read them. `LlamaForCausalLm` of burn-peft-llama has a method of
    /// this name that unties first. If the output layer of your own model is tied, call
    /// [`LoraEmbedding::set_tied_output`](crate::LoraEmbedding::set_tied_output). Any other shared weight changes wherever
    /// it is read.
    ///
    /// # Errors
    /// [`NonFiniteMerge`](PeftError::NonFiniteMerge), [`NoBiasToMergeInto`](PeftError::NoBiasToMergeInto),
    /// [`TiedOutput`](PeftError::TiedOutput), [`ForeignReparameterization`](PeftError::ForeignReparameterization).
    fn merge_and_unload(&mut self) -> Result<MergeReport, PeftError> {
        merge::merge_and_unload(self)
    }

    /// Removes every adapter and gives the base back, bit for bit. It stays frozen; `unfreeze()` makes it trainable.
    ///
    /// # Errors
    /// [`ForeignReparameterization`](PeftError::ForeignReparameterization).
    fn unload(&mut self) -> Result<(), PeftError> {
        Layout::of(self)?;
        attach(self, Default::default(), false);
        Ok(())
    }

    /// Counts parameters. PEFT's `print_trainable_parameters` prints what the result displays.
    fn trainable_parameters(&self) -> ParameterSummary {
        let layout = Layout::read_only(self);
        let adapters = || layout.states.values().flat_map(|state| &state.list);
        let size = |adapter: &Adapter| adapter.num_params();
        let base = |only_trained: bool| -> usize {
            let counted = layout.parameters.iter().filter(|p| p.requires_grad || !only_trained);
            counted.map(|parameter| parameter.shape.num_elements()).sum()
        };
        ParameterSummary {
            trainable: base(true) + adapters().filter(|adapter| adapter.info.active).map(size).sum::<usize>(),
            all: base(false) + adapters().map(size).sum::<usize>(),
        }
    }

    /// Writes an adapter in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, which Python's
    /// `PeftModel.from_pretrained` reads. The directory is created if need be.
    ///
    /// The directory always holds a whole adapter or none, never parts of two, even if the process is killed or other
    /// processes write there at the same time. Other calls of this crate wait, in this process and in others. The next save
    /// removes what a killed process left behind.
    ///
    /// An adapter with a start that is a part of the base ([`Pissa`](crate::InitLoraWeights::Pissa),
    /// [`Olora`](crate::InitLoraWeights::Olora)) is written as plain LoRA of twice the rank.
    ///
    /// Long lists of targets become the shortest ends of names that mean the same modules, as in PEFT; `all-linear` is always
    /// written like that.
    ///
    /// # Errors
    /// [`UnknownAdapter`](PeftError::UnknownAdapter), [`Io`](PeftError::Io),
    /// [`ForeignReparameterization`](PeftError::ForeignReparameterization).
    fn save_adapter(&self, name: &str, directory: impl AsRef<Path>) -> Result<(), PeftError> {
        let layout = Layout::of(self)?;
        layout.states.require(name)?;
        store::save(&layout, name, directory.as_ref())
    }

    /// Writes every adapter as PEFT's `save_pretrained` lays them out: the one named `default` into `directory` itself,
    /// any other into the sub-directory of its name. Returns the directories.
    ///
    /// # Errors
    /// As [`save_adapter`](Self::save_adapter); [`UnknownAdapter`](PeftError::UnknownAdapter) if there is none.
    fn save_adapters(&self, directory: impl AsRef<Path>) -> Result<Vec<PathBuf>, PeftError> {
        let layout = Layout::of(self)?;
        let facts = layout.states.facts();
        if facts.is_empty() {
            layout.states.require(DEFAULT_ADAPTER)?;
        }
        let mut directories = vec![];
        for name in facts.into_keys() {
            let root = directory.as_ref();
            let place = if name == DEFAULT_ADAPTER { root.to_path_buf() } else { root.join(name) };
            store::save(&layout, name, &place)?;
            directories.push(place);
        }
        Ok(directories)
    }

    /// Adds an adapter from a directory in PEFT's format, as [`add_adapter`](Self::add_adapter) adds a fresh one.
    ///
    /// # Errors
    /// As [`load_adapter_with`](Self::load_adapter_with), strictly.
    fn load_adapter(&mut self, name: &str, directory: impl AsRef<Path>) -> Result<LoadReport, PeftError> {
        self.load_adapter_with(name, directory, &LoadOptions::new())
    }

    /// As [`load_adapter`](Self::load_adapter), with [`LoadOptions`]: other names in the file, or tensors that do not fit left
    /// out.
    ///
    /// # Errors
    /// - [`NoAdapter`](PeftError::NoAdapter), [`Io`](PeftError::Io), [`Json`](PeftError::Json),
    ///   [`Safetensors`](PeftError::Safetensors): the directory or a file in it
    /// - [`UnsupportedConfig`](PeftError::UnsupportedConfig): the configuration asks for something that is not computed here
    /// - [`IncompatibleAdapter`](PeftError::IncompatibleAdapter), unless lenient: every tensor that is missing,
    ///   unexpected or misshapen, or is a weight of another base model
    /// - the errors of [`add_adapter`](Self::add_adapter)
    fn load_adapter_with(
        &mut self,
        name: &str,
        directory: impl AsRef<Path>,
        options: &LoadOptions,
    ) -> Result<LoadReport, PeftError> {
        let mut layout = Layout::of(self)?;
        let report = store::load(&mut layout, name, directory.as_ref(), options)?;
        attach(self, layout.states, true);
        Ok(report)
    }

    /// Replaces the adapter `name` by the one in `directory`, active if the old one was. The base does not change. Rank,
    /// targets and settings may differ. PEFT's `hotswap_adapter`.
    ///
    /// # Errors
    /// [`UnknownAdapter`](PeftError::UnknownAdapter), [`MergedAdapter`](PeftError::MergedAdapter), and those of
    /// [`load_adapter`](Self::load_adapter). The old adapter stays if the new one cannot be loaded.
    fn hotswap_adapter(&mut self, name: &str, directory: impl AsRef<Path>) -> Result<LoadReport, PeftError> {
        let mut layout = Layout::of(self)?;
        layout.states.require(name)?;
        layout.states.refuse_merged(|_| true)?;
        let facts = layout.states.facts();
        let active: Vec<String> =
            facts.iter().filter(|(_, facts)| facts.is_active).map(|(name, _)| name.to_string()).collect();
        let mut options = LoadOptions::new();
        if let Some(facts) = facts.get(name) {
            options.key_mapping = facts.config.targeting().key_mapping.clone();
        }
        layout.states.remove_adapter(name);
        let report = store::load(&mut layout, name, directory.as_ref(), &options)?;
        let active: Vec<&str> = active.iter().map(String::as_str).collect();
        layout.states.activate(&active)?;
        attach(self, layout.states, true);
        Ok(report)
    }
}

impl<M: Module> PeftModel for M {}

/// One tensor of an adapter, as [`PeftModel::adapter_tensors`] lists them.
#[non_exhaustive]
#[derive(Debug, Clone)]
pub struct AdapterTensor {
    /// Its path in the model, `….q_proj.weight.peft.default.a`.
    pub path: String,
    /// The path of the module that is adapted.
    pub module: String,
    /// What it is: `a` and `b` (`[d_in, r]`, `[r, d_out]`), `bias`, `magnitude`, `tokens`, `copy`; `a0` and `b0` where the
    /// factors started as a part of the base.
    pub name: &'static str,
    /// The id of the parameter, as optimizers and gradients know it.
    pub id: ParamId,
    /// Whether it is trained while the adapter is active. `a0` and `b0` are not.
    pub is_trained: bool,
    /// Its value, in the graph of the model: vectors are one row.
    pub tensor: Tensor<2>,
}

#[cfg(test)]
mod tests {
    use burn::module::ParamId;
    use burn::nn::transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput};
    use burn::nn::{Embedding, EmbeddingConfig, LinearConfig};
    use burn::optim::{AdamWConfig, GradientsParams};
    use burn::tensor::{Device, Int, Tensor, TensorData, Tolerance};

    use super::*;
    use crate::{InitLoraWeights, LoraConfig, LoraLinear, TargetModules};

    #[derive(Module, Debug)]
    struct Net {
        embed: Embedding,
        up: LoraLinear,
        down: LoraLinear,
    }

    impl Net {
        fn new(device: &Device) -> Self {
            device.seed(3);
            Self {
                embed: EmbeddingConfig::new(11, 6).init(device),
                up: LinearConfig::new(6, 10).init(device).into(),
                down: LinearConfig::new(10, 4).with_bias(false).init(device).into(),
            }
        }

        fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
            self.down.forward(self.up.forward(self.embed.forward(ids)).tanh())
        }
    }

    fn ids(device: &Device) -> Tensor<2, Int> {
        Tensor::from_data([[1, 5, 10], [0, 3, 7]], device)
    }

    fn config() -> LoraConfig {
        LoraConfig::new(2)
            .with_lora_alpha(6.0)
            .with_init_lora_weights(InitLoraWeights::Random)
            .with_target_modules(["up", "down", "embed"])
    }

    fn output(net: &Net) -> TensorData {
        let net = net.valid();
        let device = net.devices()[0].clone();
        net.forward(ids(&device)).into_data()
    }

    fn weights(net: &Net) -> Vec<TensorData> {
        vec![
            net.embed.weight.base().into_data(),
            net.up.weight.base().into_data(),
            net.down.weight.base().into_data(),
        ]
    }

    fn parameter_ids(net: &Net) -> Vec<ParamId> {
        vec![net.embed.weight.id, net.up.weight.id, net.down.weight.id]
    }

    fn distance(a: &TensorData, b: &TensorData) -> f32 {
        a.iter::<f32>().zip(b.iter::<f32>()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    #[test]
    fn a_fresh_adapter_is_a_no_op_and_freezes_the_base() {
        let mut net = Net::new(&Device::default().autodiff());
        let before = output(&net);
        let fresh = config().with_init_lora_weights(InitLoraWeights::KaimingUniform);
        let report = net.add_adapter("default", &fresh).unwrap();
        let paths: Vec<&str> = report.modules.iter().map(|module| &*module.path).collect();
        assert_eq!(paths, ["embed", "up", "down"]);
        assert_eq!(output(&net), before);
        let expected = 2 * (11 + 6) + 2 * (6 + 10) + 2 * (10 + 4);
        assert_eq!(net.trainable_parameters().trainable, expected);
        assert_eq!(net.trainable_parameters().all, expected + 11 * 6 + 6 * 10 + 10 + 10 * 4);
    }

    #[test]
    fn training_moves_the_factors_and_nothing_else() {
        let device = Device::default().autodiff();
        let mut net = Net::new(&device);
        net.add_adapter("default", config().with_init_lora_weights(InitLoraWeights::KaimingUniform)).unwrap();
        let (base, bias) = (weights(&net), net.up.bias.as_ref().unwrap().val().into_data());
        let before = output(&net);
        let mut optimizer = AdamWConfig::new().init();
        for step in 0..3 {
            let grads = net.forward(ids(&device)).powi_scalar(2).mean().backward();
            let grads = GradientsParams::from_grads(grads, &net);
            assert_eq!(grads.len(), 6, "step {step}");
            net = optimizer.step(0.05, net, grads);
        }
        assert_eq!(weights(&net), base);
        assert_eq!(net.up.bias.as_ref().unwrap().val().into_data(), bias);
        assert!(distance(&output(&net), &before) > 1e-3);
    }

    #[test]
    fn the_active_set_alone_decides_the_output() {
        let mut net = Net::new(&Device::default().autodiff());
        let bare = output(&net);
        net.add_adapter("one", config()).unwrap();
        let one = output(&net);
        net.add_adapter("two", config().with_lora_alpha(3.0)).unwrap();
        assert_eq!(output(&net), one, "a second adapter waits");
        net.set_adapter(&["two"]).unwrap();
        let two = output(&net);
        assert!(distance(&one, &two) > 1e-3);
        net.set_adapter(&["one", "two"]).unwrap();
        assert!(distance(&output(&net), &one) > 1e-3);
        net.set_adapter(&[]).unwrap();
        assert_eq!(output(&net), bare);
        net.set_adapter(&["one"]).unwrap();
        assert_eq!(output(&net), one);
        net.delete_adapter("two").unwrap();
        let names: Vec<(String, bool)> =
            net.adapters().into_iter().map(|status| (status.name, status.active)).collect();
        assert_eq!(names, [("one".to_string(), true)]);
        assert_eq!(output(&net), one);
    }

    #[test]
    fn merging_keeps_the_output_and_unloading_gives_the_base_back() {
        for device in [Device::default(), Device::default().autodiff()] {
            let mut net = Net::new(&device);
            let (bare, base, ids) = (output(&net), weights(&net), parameter_ids(&net));
            net.add_adapter("default", config()).unwrap();
            let adapted = output(&net);
            assert!(distance(&bare, &adapted) > 1e-2);

            let mut merged = net.clone();
            merged.merge_and_unload().unwrap();
            assert!(merged.adapters().is_empty());
            output(&merged).assert_approx_eq::<f32>(&adapted, Tolerance::absolute(1e-5));
            assert_eq!(parameter_ids(&merged), ids);

            net.unload().unwrap();
            assert_eq!(weights(&net), base);
            assert_eq!(output(&net), bare);
            assert_eq!(parameter_ids(&net), ids);
        }
    }

    #[test]
    fn updates_are_added_to_the_copy_of_another_adapter_whatever_their_names() {
        for [update, copy] in [["a", "b"], ["b", "a"]] {
            let mut net = Net::new(&Device::default());
            net.add_adapter(update, config().with_target_modules(["up"])).unwrap();
            let saving = config().with_target_modules(["down"]).with_modules_to_save(["up"]);
            net.add_adapter(copy, &saving).unwrap();
            net.set_adapter(&[copy]).unwrap();
            let alone = output(&net);
            net.set_adapter(&[update, copy]).unwrap();
            let both = output(&net);
            assert!(distance(&alone, &both) > 1e-3);
            net.merge_and_unload().unwrap();
            output(&net).assert_approx_eq::<f32>(&both, Tolerance::absolute(1e-5));
        }
    }

    #[test]
    fn a_merge_that_would_break_the_weights_changes_nothing() {
        let mut net = Net::new(&Device::default());
        net.add_adapter("default", config().with_lora_alpha(1e300)).unwrap();
        let base = weights(&net);
        let error = net.merge_and_unload().unwrap_err();
        assert!(matches!(&error, PeftError::NonFiniteMerge { name, .. } if name == "default"), "{error}");
        assert_eq!(weights(&net), base);
        assert_eq!(net.adapters().len(), 1);
    }

    #[test]
    fn an_adapter_survives_its_directory() {
        let directory = tempfile::tempdir().unwrap();
        let device = Device::default().autodiff();
        let mut net = Net::new(&device);
        net.add_adapter("default", config()).unwrap();
        net.save_adapter("default", directory.path()).unwrap();
        let adapted = output(&net);

        let mut other = net.clone();
        other.unload().unwrap();
        assert!(distance(&output(&other), &adapted) > 1e-2);
        let report = other.load_adapter("again", directory.path()).unwrap();
        assert_eq!(report.tensors, 6);
        assert_eq!(output(&other), adapted);
    }

    #[test]
    fn records_carry_adapters_between_models_of_the_same_structure() {
        let device = Device::default();
        let mut net = Net::new(&device);
        net.add_adapter("default", config()).unwrap();
        let mut other = Net::new(&device);
        device.seed(99);
        other.add_adapter("default", config()).unwrap();
        assert_ne!(output(&other), output(&net));
        assert_eq!(output(&other.load_record(net.clone().into_record())), output(&net));
    }

    #[test]
    fn plain_layers_of_burns_own_modules_are_adapted_through_their_weights() {
        let device = Device::default().autodiff();
        let mut encoder: TransformerEncoder =
            TransformerEncoderConfig::new(8, 16, 2, 2).with_dropout(0.0).init(&device);
        let x = Tensor::<3>::random([2, 3, 8], burn::tensor::Distribution::Default, &device);
        let forward = |encoder: &TransformerEncoder| {
            encoder.forward(TransformerEncoderInput::new(x.clone())).into_data()
        };
        let bare = forward(&encoder);
        let all = config().with_target_modules(TargetModules::AllLinear);
        let report = encoder.add_adapter("default", &all).unwrap();
        assert_eq!(report.modules.len(), 2 * 6);
        assert!(report.modules.iter().all(|module| !module.activation_space));
        assert!(distance(&forward(&encoder), &bare) > 1e-2);

        let error = encoder.add_adapter("second", all.clone().with_lora_dropout(0.1)).unwrap_err();
        assert!(matches!(error, PeftError::DropoutNeedsLoraLinear { ref modules } if modules.len() == 12));
    }

    #[test]
    fn every_misuse_is_named_and_changes_nothing() {
        let mut net = Net::new(&Device::default());
        let mut message = |config: LoraConfig| net.add_adapter("default", &config).unwrap_err().to_string();
        assert_eq!(
            message(config().with_target_modules(["dwon", "qq"])),
            "no module matched `target_modules` [\"dwon\", \"qq\"]\nhint: the closest modules are `down`"
        );
        assert_eq!(
            message(config().with_exclude_modules(["up", "down", "embed"])),
            "`exclude_modules` [\"down\", \"embed\", \"up\"] removed all 3 modules that `target_modules` [\"down\", \"embed\", \"up\"] matched\nhint: leave one of them to adapt"
        );
        let report = net.add_adapter("default", config().with_target_modules(["up", "side"])).unwrap();
        assert_eq!(report.unmatched_targets, ["side"]);
        assert_eq!(report.to_string(), "adapter `default`: 1 module adapted; no module is named side");
        let exists = net.add_adapter("default", config()).unwrap_err();
        assert!(matches!(exists, PeftError::AdapterExists { .. }));
        assert!(matches!(net.add_adapter("a.b", config()), Err(PeftError::InvalidAdapterName { .. })));
        assert_eq!(
            net.set_adapter(&["other"]).unwrap_err().to_string(),
            "no adapter is named `other`: the model has `default`"
        );
    }

    #[test]
    fn dropout_does_not_concern_embeddings_as_in_peft() {
        let mut net = Net::new(&Device::default());
        let config = config().with_lora_dropout(0.1).with_target_modules(["embed", "up"]);
        assert_eq!(net.add_adapter("default", &config).unwrap().modules.len(), 2);
    }

    #[test]
    fn half_precision_weights_keep_their_type_under_f32_factors() {
        use burn::tensor::{DType, FloatDType};
        // A GPU may lack the type.
        let device = Device::flex();
        let layer = LinearConfig::new(6, 10).init(&device);
        let half = |param: burn::module::Param<Tensor<2>>| param.map(|tensor| tensor.cast(FloatDType::BF16));
        #[derive(Module, Debug)]
        struct Half {
            up: LoraLinear,
        }
        let mut model = Half { up: burn::nn::Linear { weight: half(layer.weight), bias: None }.into() };
        model.add_adapter("default", config().with_target_modules(["up"])).unwrap();
        let x = Tensor::<2>::eye(6, &device).cast(FloatDType::BF16);
        let adapted = model.up.forward(x.clone());
        assert_eq!(adapted.dtype(), DType::BF16);
        let bare = x.clone().matmul(model.up.weight.base());
        model.merge_and_unload().unwrap();
        assert_eq!(model.up.weight.dtype(), DType::BF16);
        let merged = model.up.forward(x);
        assert!(distance(&merged.clone().into_data(), &bare.into_data()) > 0.1);
        assert!(distance(&merged.into_data(), &adapted.into_data()) < 0.05);
    }

    #[test]
    fn another_crates_adapters_are_not_overwritten() {
        let device = Device::default();
        let mut net = Net::new(&device).apply_lora(burn::module::Lora::new(2, 4.0));
        let error = net.add_adapter("default", config()).unwrap_err();
        assert!(
            matches!(&error, PeftError::ForeignReparameterization { paths } if paths[0] == "embed.weight"),
            "{error}"
        );
    }
}
