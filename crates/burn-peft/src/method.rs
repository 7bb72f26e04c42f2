//! What a method is: the one description that keys, loading, saving, inspection, counts, reports and refusals read.
//!
//! A method changes one parameter. Everything about it stands in one file below `method/`, whose name is a word in
//! `methods![..]`. It sees the parameter as a matrix of [`Site::dims`] and is asked for two things: what it makes of the
//! weight ([`Method::apply`]), and what it adds to the output of a layer that works on activations ([`Method::forward`]).

mod update;

use std::fmt::Debug;
use std::sync::Arc;

use burn::tensor::Tensor;

use crate::config::PeftConfig;
use crate::error::PeftError;
use crate::init::Start;
use crate::layer::{Layer, Site, product};
use crate::ops::Input;

pub(crate) use low_rank::LowRank;
pub(crate) use update::Update;

/// Each name is a file that describes a method in a constant `DESCRIPTION`.
macro_rules! methods {
    ($($name:ident),*) => {
        $(pub(crate) mod $name;)*

        /// The methods there are. At one parameter they act in this order.
        pub(crate) const METHODS: &[Description] = &[$($name::DESCRIPTION),*];
    };
}

methods![copied, low_rank, dora, tokens, shift];

/// The module into which PEFT moves the parameters of one that it adapts.
pub(crate) const BASE_LAYER: &str = "base_layer.";

/// What can be said about a method before there is a model.
pub(crate) struct Description {
    /// How the keys of its tensors end.
    pub(crate) keys: &'static [KeyEnd],
    /// The method that `config` asks for at a parameter.
    pub(crate) of: fn(config: &PeftConfig, at: &Chosen) -> Option<Arc<dyn Method>>,
    /// Finds the parameters where the method cannot do what `config` asks for.
    pub(crate) check: fn(config: &PeftConfig, parameters: &Parameters) -> Result<(), PeftError>,
}

/// The parameters that a configuration is judged by.
pub(crate) struct Parameters<'a> {
    pub(crate) list: &'a [Chosen],
    /// True for all parameters of a model, false for those found in a file.
    pub(crate) are_all: bool,
}

/// A parameter, and what the configuration says about its module.
#[derive(Debug, Clone)]
pub(crate) struct Chosen {
    pub(crate) site: Arc<Site>,
    /// The module is a target.
    pub(crate) is_adapted: bool,
    /// The module is trained whole.
    pub(crate) is_saved: bool,
    /// An output layer reads the module's weight as well.
    pub(crate) is_tied: bool,
    /// Rank and `lora_alpha` of the module, patterns considered.
    pub(crate) r: usize,
    pub(crate) lora_alpha: f64,
}

impl Parameters<'_> {
    /// The names of the modules of those that `is_meant`.
    pub(crate) fn names(&self, is_meant: impl Fn(&Chosen) -> bool) -> Vec<String> {
        self.list.iter().filter(|at| is_meant(at)).map(|at| at.site.name.clone()).collect()
    }

    /// Whether the module of that name has a bias.
    pub(crate) fn has_bias(&self, name: &str) -> bool {
        self.list.iter().any(|at| at.site.name == name && at.site.parameter == "bias")
    }
}

impl Chosen {
    /// Whether it is the weight of a target.
    pub(crate) fn is_target(&self) -> bool {
        self.is_adapted && self.site.is_adaptable()
    }

    /// The methods that `config` asks for here, in the order in which they act.
    pub(crate) fn methods(&self, config: &PeftConfig) -> Vec<Arc<dyn Method>> {
        METHODS.iter().filter_map(|method| (method.of)(config, self)).collect()
    }
}

/// How the key of a tensor ends, behind the module's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct KeyEnd {
    /// Up to where PEFT, in memory, puts the name of the adapter: `lora_A`.
    pub(crate) front: &'static str,
    /// What follows it: `.weight`, or nothing.
    pub(crate) back: &'static str,
    /// What the tensor is called where a file is described.
    pub(crate) tensor: &'static str,
    /// The kind of layer that has it, if only one has.
    pub(crate) layer: Option<Layer>,
    /// Which axes of its shape are the sizes of the layer's weight.
    pub(crate) tells: Tells,
    /// Whether an output layer that is tied to the layer reads it too: see [`Method::forward_tied`].
    pub(crate) is_read_by_tied_output: bool,
}

impl KeyEnd {
    pub(crate) const fn new(
        front: &'static str,
        back: &'static str,
        tensor: &'static str,
        tells: Tells,
    ) -> Self {
        Self { front, back, tensor, layer: None, tells, is_read_by_tied_output: false }
    }

    const fn of(self, layer: Layer) -> Self {
        Self { layer: Some(layer), ..self }
    }

    const fn tied(self) -> Self {
        Self { is_read_by_tied_output: true, ..self }
    }

    /// The end as files have it.
    pub(crate) fn text(&self) -> String {
        format!("{}{}", self.front, self.back)
    }
}

/// What the shape of a tensor tells about the weight that it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tells {
    /// All axes but the first are the input's.
    Input,
    /// The first axis is the output's.
    Output,
    /// The last axis is the output's.
    Width,
    Nothing,
}

/// One tensor of an update.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TensorSpec {
    /// Its name in memory, the last component of its path: `a`.
    pub(crate) name: &'static str,
    /// What follows the module's name in its key: `lora_A.weight`.
    pub(crate) key: String,
    /// Its shape in the file, PyTorch's layout.
    pub(crate) shape: Vec<usize>,
    /// Its shape in memory, where every tensor is a matrix.
    pub(crate) dims: [usize; 2],
    /// Whether the file has the transpose.
    pub(crate) is_transposed: bool,
    /// Whether it is trained and stored; a constant is neither.
    pub(crate) is_trained: bool,
}

impl TensorSpec {
    /// A factor: `[.., first axis of the file]` in memory.
    pub(crate) fn factor(name: &'static str, key: KeyEnd, shape: Vec<usize>) -> Self {
        let rows = product(shape.get(1..).unwrap_or_default());
        let dims = [rows, shape.first().copied().unwrap_or(0)];
        Self { name, key: key.text(), shape, dims, is_transposed: true, is_trained: true }
    }

    /// A vector: one row in memory.
    pub(crate) fn vector(name: &'static str, key: KeyEnd, shape: Vec<usize>) -> Self {
        let dims = [1, product(&shape)];
        Self { name, key: key.text(), shape, dims, is_transposed: false, is_trained: true }
    }

    /// Rows of a matrix, in the file as in memory.
    pub(crate) fn rows(name: &'static str, key: KeyEnd, dims: [usize; 2]) -> Self {
        let shape = dims.to_vec();
        Self { name, key: key.text(), shape, dims, is_transposed: false, is_trained: true }
    }

    /// A constant of the update: no part of the file.
    pub(crate) fn constant(name: &'static str, dims: [usize; 2]) -> Self {
        let (key, shape) = (String::new(), dims.to_vec());
        Self { name, key, shape, dims, is_transposed: false, is_trained: false }
    }

    /// The parameter at `site` itself, whose own name in the file stands behind `front`.
    pub(crate) fn parameter(name: &'static str, front: &str, site: &Site) -> Self {
        let (shape, is_transposed) = site.stored();
        let key = format!("{front}{}", site.parameter);
        Self { name, key, shape, dims: site.dims(), is_transposed, is_trained: true }
    }

    pub(crate) fn elements(&self) -> usize {
        product(&self.dims)
    }

    /// The tensor as the file has it, flattened.
    pub(crate) fn to_file(&self, tensor: Tensor<2>) -> Tensor<1> {
        let tensor = if self.is_transposed {
            let first = self.shape[0];
            tensor.reshape([self.elements() / first.max(1), first]).transpose()
        } else {
            tensor
        };
        tensor.reshape([self.elements()])
    }

    /// The inverse of [`to_file`](Self::to_file).
    ///
    /// Flat on the way, so that its elements are in the order of a fresh tensor's: a view in another order makes
    /// backends sum products in another order, and a loaded adapter would not compute bit for bit what the saved one
    /// did.
    pub(crate) fn to_memory(&self, stored: Tensor<1>) -> Tensor<2> {
        let stored = if self.is_transposed {
            let first = self.shape[0];
            stored.reshape([first, self.elements() / first.max(1)]).transpose().reshape([self.elements()])
        } else {
            stored
        };
        stored.reshape(self.dims)
    }
}

/// How an adapter changes one parameter, with every number that this takes but the tensors, which are in an [`Update`].
pub(crate) trait Method: Debug + Send + Sync {
    /// Its tensors at `site`.
    fn tensors(&self, site: &Site) -> Vec<TensorSpec>;

    /// The values that its tensors start from, in the order of [`tensors`](Self::tensors), on the device and in the type
    /// that they are trained in.
    fn start(&self, at: &Start) -> Result<Vec<Tensor<2>>, PeftError>;

    /// The factor of the change, PEFT's `scaling`.
    fn scaling(&self) -> f64 {
        1.0
    }

    /// The probability with which an element of a layer's input is zeroed while training.
    fn dropout(&self) -> f64 {
        0.0
    }

    /// Whether it takes the parameter's place, below whatever other methods add to it.
    fn replaces(&self) -> bool {
        false
    }

    /// Whether two active adapters cannot both have it at one parameter.
    fn is_exclusive(&self) -> bool {
        self.replaces()
    }

    /// Whether an output layer that is tied to the embedding reads the change too: see
    /// [`forward_tied`](Self::forward_tied).
    fn is_read_by_tied_output(&self) -> bool {
        false
    }

    /// Whether only some rows of a batch can have it, on a layer that works on activations.
    fn allows_mixed_batches(&self) -> bool {
        false
    }

    /// `value` with this change. `base` is what the parameter is without any: the base, or the copy in its place.
    fn apply(&self, of: &Update, value: Tensor<2>, base: &Tensor<2>) -> Tensor<2>;

    /// What it adds to the input of a linear layer that works on activations before the weight meets it, `[n, d_in]`: a
    /// method that multiplies the input by `l` adds `(l - 1) x`. Other methods see the input without it.
    fn input(&self, _of: &Update, _x: &Tensor<2>) -> Option<Tensor<2>> {
        None
    }

    /// What it adds to the output of a layer that works on activations, `[n, d_out]`; what it adds whatever the input
    /// is belongs to [`constant`](Self::constant). `None` for methods that act on the weight or on the input alone.
    fn forward(&self, _of: &Update, _pass: &Pass) -> Option<Tensor<2>> {
        None
    }

    /// What it adds to the output of a layer that works on activations whatever the input is, `[1, d_out]`: what cannot be
    /// folded into the weight, but can be into the layer's own `bias`, `[d_out]` and of any floating-point type.
    fn constant(&self, _of: &Update, _bias: Option<&Tensor<1>>) -> Option<Tensor<2>> {
        None
    }

    /// What it adds to the output of an output layer that is tied to the embedding it is on: to `x Wᵀ`, `[n, rows of W]`.
    fn forward_tied(&self, _of: &Update, _x: &Tensor<2>, _table: &Tensor<2>) -> Option<Tensor<2>> {
        None
    }

    /// The change as an update that starts from the base as it is and needs no scaling that a file cannot hold, if it is
    /// none already. [`Configuration::make_plain`](crate::config::Configuration::make_plain) is its other half.
    fn plain(&self, _of: &Update, _site: &Site) -> Option<Update> {
        None
    }

    /// What a combination of adapters sums, if the change can be summed.
    fn summand(&self, _of: &Update) -> Option<Summand> {
        None
    }

    /// The rank, of a method that has one.
    fn rank(&self) -> Option<usize> {
        None
    }
}

/// What can be summed over adapters: a scaled update of low rank, a scaled bias of the output or of a bias, or both.
pub(crate) struct Summand {
    /// `A` and `B`.
    pub(crate) factors: Option<(Tensor<2>, Tensor<2>)>,
    /// `[1, d_out]`
    pub(crate) bias: Option<Tensor<2>>,
}

/// What a method sees of a forward pass.
pub(crate) struct Pass<'a> {
    pub(crate) input: &'a Input,
    /// What the base gives, its bias left out: `x W`. `[n, d_out]`
    pub(crate) product: &'a dyn Fn() -> Tensor<2>,
    /// The base of the weight, `[d_in, d_out]`.
    pub(crate) base: &'a Tensor<2>,
    /// Whether dropout can act: not where rows of a batch have adapters of their own.
    pub(crate) drops: bool,
}

impl Pass<'_> {
    /// The input as the adapter `of` sees it while training, and the factor that makes up for what was dropped; whether
    /// anything was.
    pub(crate) fn dropped(&self, of: &Update, like: &Tensor<2>) -> Dropped {
        let prob = self.dropout(of);
        let (input, factor) = self.input.dropped(prob, like);
        Dropped { input, factor, acts: prob > 0.0 && matches!(self.input, Input::Activations(_)) }
    }

    /// The probability with which an element of the input does not reach the adapter `of`, 0 where dropout does not act.
    pub(crate) fn dropout(&self, of: &Update) -> f64 {
        let acts = self.drops && of.drops() && self.input.is_autodiff();
        if acts { of.method.dropout() } else { 0.0 }
    }
}

/// An input after dropout.
pub(crate) struct Dropped {
    pub(crate) input: Input,
    pub(crate) factor: f64,
    pub(crate) acts: bool,
}
