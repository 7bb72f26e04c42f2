use std::collections::BTreeSet;
use std::path::Path;

use burn::module::Module;

use crate::adapter::Adapter;
use crate::error::PeftError;
use crate::inject::{InjectionReport, Plan};
use crate::lora::LoraConfig;
use crate::merge;
use crate::seam::{Layout, attach};
use crate::store::{self, LoadReport};
use crate::summary::ParameterSummary;

/// The name that PEFT gives to an adapter that was not named.
pub const DEFAULT_ADAPTER: &str = "default";

/// Adapters on any Burn [`Module`]: the model keeps its type, and every module has these methods.
///
/// An adapter is attached to the weights it adapts. From there Burn carries it: its factors reach optimizers, records
/// and devices, and follow [`valid`](Module::valid) and [`train`](Module::train). Its name, scaling and dropout are not
/// part of a record; [`save_adapter`](Self::save_adapter) writes them.
///
/// An operation that fails leaves the model as it was.
///
/// # Example
/// ```
/// use burn::module::Module;
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
    ///   [`LoraConfig::validate`]
    /// - [`InvalidAdapterName`](PeftError::InvalidAdapterName), [`AdapterExists`](PeftError::AdapterExists)
    /// - [`NoModuleMatched`](PeftError::NoModuleMatched), [`AllModulesExcluded`](PeftError::AllModulesExcluded)
    /// - [`UnsupportedModules`](PeftError::UnsupportedModules): a target is no linear and no embedding layer
    /// - [`DropoutNeedsLoraLinear`](PeftError::DropoutNeedsLoraLinear)
    /// - [`ForeignReparameterization`](PeftError::ForeignReparameterization)
    fn add_adapter(&mut self, name: &str, config: &LoraConfig) -> Result<InjectionReport, PeftError> {
        let mut layout = Layout::of(self)?;
        let plan = Plan::new(&layout, name, config)?;
        plan.add_to(&mut layout.states, |target| {
            let (name, config) = (plan.name.clone(), plan.config.clone());
            Some(Adapter::init(name, config, target.kind, target.dims, &target.device))
        });
        attach(self, layout.states, true);
        Ok(plan.into_report())
    }

    /// Makes exactly these adapters active: their updates are summed, and they are the ones that are trained. An empty
    /// list disables all of them.
    ///
    /// # Errors
    /// [`UnknownAdapter`](PeftError::UnknownAdapter), [`ForeignReparameterization`](PeftError::ForeignReparameterization).
    fn set_adapter(&mut self, names: &[&str]) -> Result<(), PeftError> {
        let mut layout = Layout::of(self)?;
        for name in names {
            require(&layout, name)?;
        }
        for state in layout.states.values_mut() {
            for adapter in &mut state.list {
                let active = names.contains(&&*adapter.info.name);
                *adapter = adapter.clone().set_active(active);
            }
        }
        attach(self, layout.states, false);
        Ok(())
    }

    /// Removes an adapter.
    ///
    /// # Errors
    /// [`UnknownAdapter`](PeftError::UnknownAdapter), [`ForeignReparameterization`](PeftError::ForeignReparameterization).
    fn delete_adapter(&mut self, name: &str) -> Result<(), PeftError> {
        let mut layout = Layout::of(self)?;
        require(&layout, name)?;
        for state in layout.states.values_mut() {
            state.list.retain(|adapter| &*adapter.info.name != name);
        }
        attach(self, layout.states, false);
        Ok(())
    }

    /// The names of all adapters, and whether each is active, sorted by name.
    fn adapters(&self) -> Vec<(String, bool)> {
        let layout = Layout::read_only(self);
        let adapters = layout.states.values().flat_map(|state| &state.list);
        let names: BTreeSet<(String, bool)> =
            adapters.map(|adapter| (adapter.info.name.to_string(), adapter.info.active)).collect();
        names.into_iter().collect()
    }

    /// Folds the active adapters into the weights, `W + Σ scaling * A B`, and removes every adapter; the model is a
    /// plain one again. PEFT's `merge_and_unload(safe_merge=True)`.
    ///
    /// The sum is formed in the type of the factors, f32 as a rule, and rounded once to the type of the weight.
    ///
    /// # Errors
    /// [`NonFiniteMerge`](PeftError::NonFiniteMerge), [`ForeignReparameterization`](PeftError::ForeignReparameterization).
    fn merge_and_unload(&mut self) -> Result<(), PeftError> {
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
        let size = |adapter: &Adapter| adapter.a.lazy_shape().num_elements() + adapter.b.lazy_shape().num_elements();
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
    /// `PeftModel.from_pretrained` reads. The directory is created if need be; each file appears whole or not at all.
    ///
    /// # Errors
    /// [`UnknownAdapter`](PeftError::UnknownAdapter), [`Io`](PeftError::Io),
    /// [`ForeignReparameterization`](PeftError::ForeignReparameterization).
    fn save_adapter(&self, name: &str, directory: impl AsRef<Path>) -> Result<(), PeftError> {
        let layout = Layout::of(self)?;
        require(&layout, name)?;
        store::save(&layout.states, name, directory.as_ref())
    }

    /// Adds an adapter from a directory in PEFT's format, as [`add_adapter`](Self::add_adapter) adds a fresh one.
    ///
    /// # Errors
    /// - [`NoAdapter`](PeftError::NoAdapter), [`Io`](PeftError::Io), [`Json`](PeftError::Json),
    ///   [`Safetensors`](PeftError::Safetensors): the directory or a file in it
    /// - [`UnsupportedConfig`](PeftError::UnsupportedConfig): the configuration asks for more than LoRA as it is here
    /// - [`IncompatibleAdapter`](PeftError::IncompatibleAdapter): every tensor that is missing, unexpected or misshapen
    /// - the errors of [`add_adapter`](Self::add_adapter)
    fn load_adapter(&mut self, name: &str, directory: impl AsRef<Path>) -> Result<LoadReport, PeftError> {
        let mut layout = Layout::of(self)?;
        let report = store::load(&mut layout, name, directory.as_ref())?;
        attach(self, layout.states, true);
        Ok(report)
    }
}

impl<M: Module> PeftModel for M {}

fn require(layout: &Layout, name: &str) -> Result<(), PeftError> {
    let names: BTreeSet<&str> =
        layout.states.values().flat_map(|state| &state.list).map(|adapter| &*adapter.info.name).collect();
    if names.contains(name) {
        return Ok(());
    }
    Err(PeftError::UnknownAdapter {
        name: name.to_string(),
        available: names.into_iter().map(str::to_string).collect(),
    })
}
