//! The one place that knows how Burn carries adapters: reading every state of a model and putting edited ones back.
//!
//! Burn shows a parameter's reparameterization to nobody but the parameter's owner. What it does show, to visitors and
//! mappers, are the parameters *inside* the reparameterization, and those may carry a reparameterization themselves.
//! That is the way in: while [`Adapters`] is traversed, its first parameter carries a [`Note`]. A visitor finds the
//! whole state in it; a mapper leaves one that tells the state to drop itself at the next `materialize()`.

use std::collections::BTreeSet;
use std::sync::Arc;

use burn::module::{
    Devices, Flag, Module, ModuleMapper, ModuleVisitor, Param, Reparameterization, Reparameterizer,
};
use burn::tensor::{Device, Shape, Tensor};

use crate::adapter::{Adapter, Adapters, AttachedState, Merged};
use crate::error::PeftError;
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
        let mut reader = Reader::default();
        model.visit(&mut reader);
        match reader.foreign {
            paths if paths.is_empty() => Ok(reader.layout),
            paths => Err(PeftError::ForeignReparameterization { paths }),
        }
    }

    /// Reads a model of which nothing will be changed; the parameters of foreign states count as the model's own.
    pub(crate) fn read_only<M: Module>(model: &M) -> Self {
        let mut reader = Reader::default();
        model.visit(&mut reader);
        reader.layout
    }
}

/// Replaces all states of `model` by `states`; the base keeps its bits and its parameter ids.
///
/// `freeze_base` stops the training of every base parameter; without it their training state is left as it is.
pub(crate) fn attach<M: Module>(model: &mut M, states: States, freeze_base: bool) {
    let mut bare = model.clone().map(&mut Dropper::default()).materialize();
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

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
        self.containers.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let mut levels = self.containers.iter().zip(&self.path);
        let inside =
            levels.position(|(container, name)| container == REPARAMETERIZATION && name == Adapters::NAME);
        match (inside, param.reparameterization::<Note>()) {
            (Some(depth), Some(Note::Offer(state))) => {
                self.layout.states.insert(self.path[..depth].join("."), Adapters::clone(state));
            }
            (Some(_), _) => {}
            (None, _) => {
                // Reading the value initialises a lazy parameter, so that the clone that `attach` freezes
                // no longer shares its initialisation with other clones of the model.
                let base = param.base();
                self.layout.parameters.push(BaseParameter {
                    path: self.path.join("."),
                    shape: base.shape(),
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
    }
}

/// Marks every state of ours as dropped.
#[derive(Default)]
struct Dropper {
    depth: usize,
}

impl ModuleMapper for Dropper {
    fn enter_module(&mut self, name: &str, container: &str) {
        if self.depth > 0 || (container == REPARAMETERIZATION && name == Adapters::NAME) {
            self.depth += 1;
        }
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.depth = self.depth.saturating_sub(1);
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.depth > 0 { with_note(param, Note::Drop) } else { param }
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

/// What the first parameter of a state carries during a traversal. As a reparameterization it changes nothing.
#[derive(Debug, Clone)]
enum Note {
    /// To visitors: the state itself.
    Offer(Box<Adapters>),
    /// From mappers: the state is to be dropped.
    Drop,
}

impl Reparameterization for Note {
    const NAME: &'static str = "peft_note";

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        base
    }
}

impl Module for Note {
    fn collect_devices(&self, devices: Devices) -> Devices {
        devices
    }

    fn fork(self, _device: &Device) -> Self {
        self
    }

    fn to_device(self, _device: &Device) -> Self {
        self
    }

    fn train(self) -> Self {
        self
    }

    fn valid(&self) -> Self {
        self.clone()
    }

    fn materialize(self) -> Self {
        self
    }

    fn visit<V: ModuleVisitor>(&self, _visitor: &mut V) {}

    fn map<M: ModuleMapper>(self, _mapper: &mut M) -> Self {
        self
    }
}

fn with_note<const D: usize>(param: Param<Tensor<D>>, note: Note) -> Param<Tensor<D>> {
    struct One(Option<Note>);

    impl Reparameterizer for One {
        type Reparam = Note;

        fn reparameterize<const D: usize>(
            &mut self,
            _path: &str,
            param: Param<Tensor<D>>,
        ) -> (Param<Tensor<D>>, Option<Note>) {
            (param, self.0.take())
        }
    }

    param.apply_reparameterization(One(Some(note)))
}

/// Hands a state's parameters to a visitor, the first one with the offer of the state.
struct Offering<'a, V> {
    visitor: &'a mut V,
    note: &'a mut Option<Note>,
}

impl<V: ModuleVisitor> ModuleVisitor for Offering<'_, V> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.visitor.enter_module(name, container);
    }

    fn exit_module(&mut self, name: &str, container: &str) {
        self.visitor.exit_module(name, container);
    }

    fn visit_flag(&mut self, flag: &Param<Flag>) {
        self.visitor.visit_flag(flag);
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        match self.note.take() {
            Some(note) => self.visitor.visit_float(&with_note(param.clone(), note)),
            None => self.visitor.visit_float(param),
        }
    }
}

/// Hands a state's parameters to a mapper and takes its notes off again.
struct Listening<'a, M> {
    mapper: &'a mut M,
    attached: &'a mut AttachedState,
}

impl<M: ModuleMapper> ModuleMapper for Listening<'_, M> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.mapper.enter_module(name, container);
    }

    fn exit_module(&mut self, name: &str, container: &str) {
        self.mapper.exit_module(name, container);
    }

    fn map_flag(&mut self, flag: Param<Flag>) -> Param<Flag> {
        self.mapper.map_flag(flag)
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let param = self.mapper.map_float(param);
        if let Some(Note::Drop) = param.reparameterization::<Note>() {
            *self.attached = AttachedState::Dropped;
            let (id, tensor, mapper) = param.consume();
            return Param::from_mapped_value(id, tensor, mapper);
        }
        param
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

/// Parameters appear as `<parameter>.peft.<adapter>.{a,b,bias,copy}`.
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
        let mut note = Some(Note::Offer(Box::new(self.clone())));
        for adapter in &self.list {
            visitor.enter_module(&adapter.info.name, ADAPTER);
            let mut offering = Offering { visitor: &mut *visitor, note: &mut note };
            for update in &adapter.updates {
                for (spec, tensor) in update.parts() {
                    offering.enter_module(spec.name, ADAPTER);
                    Module::visit(tensor, &mut offering);
                    offering.exit_module(spec.name, ADAPTER);
                }
                if let Some(dropout) = &update.dropout {
                    offering.enter_module(DROPOUT, ADAPTER);
                    dropout.visit(&mut offering);
                    offering.exit_module(DROPOUT, ADAPTER);
                }
            }
            visitor.exit_module(&adapter.info.name, ADAPTER);
        }
    }

    /// A mapper may change the base or the factors, so a merged value does not survive it: it would be out of date
    /// without a sign.
    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        let mut attached = self.attached;
        let map_one = |adapter: Adapter| {
            let Adapter { updates, info } = adapter;
            mapper.enter_module(&info.name, ADAPTER);
            let mut listening = Listening { mapper: &mut *mapper, attached: &mut attached };
            let map_update = |update: Update| {
                let mut update = update.map_parts(|spec, tensor| {
                    listening.enter_module(spec.name, ADAPTER);
                    let tensor = Module::map(tensor, &mut listening);
                    listening.exit_module(spec.name, ADAPTER);
                    tensor
                });
                update.dropout = update.dropout.map(|dropout| {
                    listening.enter_module(DROPOUT, ADAPTER);
                    let dropout = Module::map(dropout, &mut listening);
                    listening.exit_module(DROPOUT, ADAPTER);
                    dropout
                });
                update
            };
            let updates = updates.into_iter().map(map_update).collect();
            mapper.exit_module(&info.name, ADAPTER);
            Adapter { updates, info }
        };
        let list = self.list.into_iter().map(map_one).collect();
        Self { list, merged: None, rows: self.rows, attached }
    }
}

/// The component of a path for what decides whether dropout acts.
const DROPOUT: &str = "dropout";
