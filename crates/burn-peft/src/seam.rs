//! The one place that knows how Burn carries adapters: reading every state of a model and putting edited ones back.
//!
//! Only the owner of a parameter can read its reparameterization, and the modules of a model are not ours. So the states
//! themselves help: while a model is traversed here, each [`Adapters`] that the traversal meets looks at the
//! [`Wish`] of this thread and hands out a copy of itself, or tells itself to drop at the next `materialize()`. In every
//! other traversal there is no wish.
//!
//! This rests on three things that Burn does, and a test below names the one that is missing, should it change:
//! - it traverses the state of a parameter between `enter_module` and `exit_module` with the state's name and the
//!   container "Reparameterization", behind the parameter itself,
//! - it does so on the thread that asked for the traversal,
//! - `materialize()` replaces a parameter by what its state makes of it and removes the state.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::Arc;

use burn::module::{
    Devices, Module, ModuleMapper, ModuleVisitor, Param, Reparameterization, Reparameterizer,
};
use burn::tensor::{DType, Device, Shape, Tensor};

use crate::adapter::{Adapter, Adapters, AttachedState, Merged};
use crate::error::PeftError;
use crate::layer::Site;
use crate::method::Update;
use crate::states::States;

/// What a layer of this crate tells visitors about itself before it shows its inner layer. It adds nothing to parameter
/// paths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mark {
    /// The adapters of the layer work on activations.
    ActivationSpace,
    /// The output layer of the model reads the table of this embedding.
    TiedTable,
}

impl Mark {
    /// The container name that stands for it.
    fn container(self) -> &'static str {
        match self {
            Self::ActivationSpace => "ActivationSpace",
            Self::TiedTable => "TiedTable",
        }
    }

    pub(crate) fn announce<V: ModuleVisitor>(self, visitor: &mut V) {
        visitor.enter_module("", self.container());
        visitor.exit_module("", self.container());
    }
}

/// The container name that Burn gives to the traversal of a reparameterization.
const REPARAMETERIZATION: &str = "Reparameterization";

/// A floating-point parameter of the base model.
#[derive(Clone)]
pub(crate) struct BaseParameter {
    pub(crate) path: String,
    pub(crate) shape: Shape,
    pub(crate) dtype: DType,
    pub(crate) device: Device,
    /// The container that owns it, `Struct:Linear` for example.
    pub(crate) container: String,
    pub(crate) requires_grad: bool,
    value: Arc<dyn Fn() -> Tensor<1>>,
}

impl BaseParameter {
    /// Its value without adapters and without a graph, flattened.
    pub(crate) fn value(&self) -> Tensor<1> {
        (self.value)()
    }
}

/// What a model consists of, as far as adapters are concerned.
#[derive(Default)]
pub(crate) struct Layout {
    pub(crate) parameters: Vec<BaseParameter>,
    pub(crate) states: States,
    /// Paths of the modules whose adapters work on activations.
    pub(crate) activation_space: BTreeSet<String>,
    /// Paths of the embeddings whose table the output layer reads as well.
    pub(crate) tied_tables: BTreeSet<String>,
}

impl Layout {
    /// Reads a model.
    ///
    /// # Errors
    /// [`PeftError::ForeignReparameterization`]: attaching over another state would lose one of the two silently.
    pub(crate) fn of<M: Module>(model: &M) -> Result<Self, PeftError> {
        let reader = Reader::of(model);
        match reader.foreign {
            paths if paths.is_empty() => Ok(reader.layout),
            paths => Err(PeftError::ForeignReparameterization { paths }),
        }
    }

    /// Reads a model without changing it; the parameters of foreign states count as the model's own.
    pub(crate) fn read_only<M: Module>(model: &M) -> Self {
        Reader::of(model).layout
    }

    /// The bias of the layer that `site` belongs to, if it has one.
    pub(crate) fn bias_of(&self, site: &Site) -> Option<&BaseParameter> {
        let path = format!("{}.bias", site.module);
        self.parameters.iter().find(|parameter| parameter.path == path)
    }
}

/// Replaces all states of `model` by `states`; the base keeps its bits and its parameter ids.
///
/// `freeze_base` stops the training of every base parameter; without it their training state is left as it is.
pub(crate) fn attach<M: Module>(model: &mut M, states: States, freeze_base: bool) {
    let bare = Wish::Drop.during(|| model.clone().map(&mut Untouched));
    let mut bare = bare.materialize();
    if freeze_base {
        bare = bare.no_grad();
    }
    *model = bare.apply_reparameterization(Table(states));
}

#[derive(Default)]
struct Reader {
    path: Vec<String>,
    containers: Vec<String>,
    layout: Layout,
    foreign: Vec<String>,
}

impl Reader {
    fn of<M: Module>(model: &M) -> Self {
        let mut reader = Self::default();
        Wish::Read(None).during(|| model.visit(&mut reader));
        reader
    }
}

impl ModuleVisitor for Reader {
    fn enter_module(&mut self, name: &str, container: &str) {
        let marked = [
            (Mark::ActivationSpace, &mut self.layout.activation_space),
            (Mark::TiedTable, &mut self.layout.tied_tables),
        ];
        for (mark, paths) in marked {
            if container == mark.container() {
                paths.insert(self.path.join("."));
            }
        }
        if container == REPARAMETERIZATION && name != Adapters::NAME {
            self.foreign.push(self.path.join("."));
        }
        self.path.push(name.to_string());
        self.containers.push(container.to_string());
    }

    fn exit_module(&mut self, name: &str, container: &str) {
        self.path.pop();
        self.containers.pop();
        if container == REPARAMETERIZATION && name == Adapters::NAME {
            let state = Wish::take();
            self.layout.states.extend(state.map(|state| (self.path.join("."), state)));
        }
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let mut levels = self.containers.iter().zip(&self.path);
        if levels.any(|(container, name)| container == REPARAMETERIZATION && name == Adapters::NAME) {
            return;
        }
        // Reading the value initialises a lazy parameter, so that the clone that `attach` freezes
        // no longer shares its initialisation with other clones of the model.
        let base = param.base();
        self.layout.parameters.push(BaseParameter {
            path: self.path.join("."),
            shape: base.shape(),
            dtype: base.dtype(),
            device: param.lazy_device(),
            container: self.containers.last().cloned().unwrap_or_default(),
            requires_grad: base.is_require_grad(),
            // Flattening may copy, so it waits until somebody asks.
            value: Arc::new(move || {
                let base = base.clone();
                let base = if base.is_autodiff() { base.inner() } else { base };
                let elements = base.shape().num_elements();
                base.reshape([elements])
            }),
        });
    }
}

/// Changes nothing.
struct Untouched;

impl ModuleMapper for Untouched {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param
    }
}

/// Attaches states by path.
struct Table(States);

impl Reparameterizer for Table {
    type Reparam = Adapters;

    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Adapters>) {
        let state = self.0.remove(path).filter(|state| !state.list.is_empty());
        (param, state)
    }
}

/// What a traversal wants of the states that it meets.
enum Wish {
    /// A copy of the one that was met last.
    Read(Option<Box<Adapters>>),
    /// That they drop themselves.
    Drop,
}

thread_local! {
    /// The wish of the traversal that runs on this thread.
    static WISH: RefCell<Option<Wish>> = const { RefCell::new(None) };
}

impl Wish {
    /// Runs a traversal with this wish.
    fn during<T>(self, traversal: impl FnOnce() -> T) -> T {
        /// Takes the wish back, also if the traversal panics.
        struct Guard;
        impl Drop for Guard {
            fn drop(&mut self) {
                WISH.set(None);
            }
        }
        WISH.set(Some(self));
        let _guard = Guard;
        traversal()
    }

    /// The copy that a state has handed out.
    fn take() -> Option<Adapters> {
        WISH.with_borrow_mut(|wish| match wish {
            Some(Self::Read(state)) => state.take().map(|state| *state),
            _ => None,
        })
    }

    /// Hands out a copy of `state`, if it is wished for.
    fn offer(state: &Adapters) {
        WISH.with_borrow_mut(|wish| {
            if let Some(Self::Read(place)) = wish {
                *place = Some(Box::new(state.clone()));
            }
        });
    }

    fn is_drop() -> bool {
        WISH.with_borrow(|wish| matches!(wish, Some(Self::Drop)))
    }
}

/// What [`Adapters`] calls the traversal of one adapter.
const ADAPTER: &str = "Adapter";

impl Adapters {
    /// The same state with every adapter and every plain tensor changed.
    fn map_each(self, each: impl FnMut(Adapter) -> Adapter, plain: impl Fn(Tensor<1>) -> Tensor<1>) -> Self {
        Self {
            list: self.list.into_iter().map(each).collect(),
            merged: self.merged.map(|merged| Merged { value: plain(merged.value), ..merged }),
            rows: self.rows.into_iter().map(|(name, rows)| (name, plain(rows))).collect(),
            attached: self.attached,
        }
    }
}

/// Parameters appear as `<parameter>.peft.<adapter>.<tensor>`.
impl Module for Adapters {
    fn collect_devices(&self, devices: Devices) -> Devices {
        self.list.collect_devices(devices)
    }

    fn fork(self, device: &Device) -> Self {
        let plain = device.clone().without_autodiff();
        self.map_each(|adapter| adapter.fork(device), |tensor| tensor.to_device(&plain))
    }

    fn to_device(self, device: &Device) -> Self {
        let plain = device.clone().without_autodiff();
        self.map_each(|adapter| adapter.to_device(device), |tensor| tensor.to_device(&plain))
    }

    fn train(self) -> Self {
        self.map_each(Module::train, |tensor| tensor)
    }

    fn valid(&self) -> Self {
        self.clone().map_each(|adapter| adapter.valid(), |tensor| tensor)
    }

    fn materialize(self) -> Self {
        self
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        Wish::offer(self);
        for Adapter { updates, info } in &self.list {
            visitor.enter_module(&info.name, ADAPTER);
            for update in updates {
                for (spec, tensor) in update.parts() {
                    visitor.enter_module(spec.name, ADAPTER);
                    Module::visit(tensor, visitor);
                    visitor.exit_module(spec.name, ADAPTER);
                }
                if let Some(dropout) = &update.dropout {
                    visitor.enter_module(DROPOUT, ADAPTER);
                    dropout.visit(visitor);
                    visitor.exit_module(DROPOUT, ADAPTER);
                }
            }
            visitor.exit_module(&info.name, ADAPTER);
        }
    }

    /// A mapper may change the base or the factors, so a merged value does not survive it: it would be out of date
    /// without a sign.
    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        if Wish::is_drop() {
            return Self { attached: AttachedState::Dropped, ..self };
        }
        let map_update = |mapper: &mut M, update: Update| {
            let mut update = update.map_parts(|spec, tensor| {
                mapper.enter_module(spec.name, ADAPTER);
                let tensor = Module::map(tensor, mapper);
                mapper.exit_module(spec.name, ADAPTER);
                tensor
            });
            update.dropout = update.dropout.map(|dropout| {
                mapper.enter_module(DROPOUT, ADAPTER);
                let dropout = Module::map(dropout, mapper);
                mapper.exit_module(DROPOUT, ADAPTER);
                dropout
            });
            update
        };
        let map_one = |Adapter { updates, info }: Adapter| {
            mapper.enter_module(&info.name, ADAPTER);
            let updates = updates.into_iter().map(|update| map_update(mapper, update)).collect();
            mapper.exit_module(&info.name, ADAPTER);
            Adapter { updates, info }
        };
        let list = self.list.into_iter().map(map_one).collect();
        Self { list, merged: None, rows: self.rows, attached: self.attached }
    }
}

/// The component of a path for what decides whether dropout acts.
const DROPOUT: &str = "dropout";

#[cfg(test)]
mod tests {
    use burn::nn::{Linear, LinearConfig};

    use super::*;
    use crate::{LoraConfig, PeftModel};

    #[derive(Module, Debug)]
    struct Model {
        layer: Linear,
    }

    fn adapted() -> Model {
        let mut model = Model { layer: LinearConfig::new(3, 2).init(&Device::default()) };
        model.add_adapter("default", LoraConfig::new(2).with_target_modules(["layer"])).unwrap();
        model
    }

    /// What the module documentation says of Burn, one by one.
    #[test]
    fn burn_still_does_what_this_file_rests_on() {
        let model = adapted();
        assert!(
            model.layer.weight.reparameterization::<Adapters>().is_some(),
            "Burn's `apply_reparameterization` no longer attaches a state by the parameter's path"
        );

        /// The containers and names on the way to each parameter, and the thread.
        #[derive(Default)]
        struct Seen(Vec<(String, String)>, Vec<Vec<(String, String)>>, Vec<std::thread::ThreadId>);
        impl ModuleVisitor for Seen {
            fn enter_module(&mut self, name: &str, container: &str) {
                self.0.push((name.to_string(), container.to_string()));
            }
            fn exit_module(&mut self, _name: &str, _container: &str) {
                self.0.pop();
            }
            fn visit_float<const D: usize>(&mut self, _param: &Param<Tensor<D>>) {
                self.1.push(self.0.clone());
                self.2.push(std::thread::current().id());
            }
        }
        let mut seen = Seen::default();
        model.visit(&mut seen);
        let level = (Adapters::NAME.to_string(), REPARAMETERIZATION.to_string());
        let inside: Vec<bool> = seen.1.iter().map(|path| path.contains(&level)).collect();
        assert_eq!(
            inside,
            [false, true, true, false],
            "Burn no longer traverses the state of a parameter right behind it, as a level with the state's name and the \
             container \"Reparameterization\": {:?}",
            seen.1
        );
        let here = std::thread::current().id();
        assert!(
            seen.2.iter().all(|thread| *thread == here),
            "Burn no longer traverses a module on the thread that asked for it"
        );

        let dropped = Wish::Drop.during(|| model.clone().map(&mut Untouched));
        let bare = dropped.materialize();
        assert!(
            bare.layer.weight.reparameterization::<Adapters>().is_none(),
            "Burn's `materialize()` no longer removes the state of a parameter"
        );
        assert_eq!(
            bare.layer.weight.val().into_data(),
            model.layer.weight.base().into_data(),
            "Burn's `materialize()` no longer asks a state what it makes of the base"
        );
    }

    #[test]
    fn other_traversals_have_no_wish() {
        let model = adapted();
        assert_eq!(Layout::read_only(&model).states.len(), 1);
        assert!(Wish::take().is_none() && !Wish::is_drop());
        // Whatever ends a traversal early.
        let result = std::panic::catch_unwind(|| Wish::Drop.during(|| panic!("in a module of somebody")));
        assert!(result.is_err() && !Wish::is_drop());
        assert_eq!(model.clone().map(&mut Untouched).adapters().len(), 1);
    }
}
