//! What adapters can belong to.

/// Which kind of layer a parameter belongs to; it decides what an adapter can do there and how PEFT stores it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LayerKind {
    /// `nn::Linear`, seen by its adapter in weight space.
    Linear,
    /// `LoraLinear`, seen by its adapter in activation space.
    LoraLinear,
    /// `nn::Embedding`, in weight space.
    Embedding,
    /// `LoraEmbedding`, in activation space.
    LoraEmbedding,
    /// `nn::conv::Conv1d`, `Conv2d`, `Conv3d`, in weight space.
    Conv,
    /// Anything else: no update of low rank, but a trained copy.
    Other,
}

impl LayerKind {
    pub(crate) fn is_linear(self) -> bool {
        matches!(self, Self::Linear | Self::LoraLinear)
    }

    pub(crate) fn is_embedding(self) -> bool {
        matches!(self, Self::Embedding | Self::LoraEmbedding)
    }

    /// Whether the layer shows its input to its adapters.
    pub(crate) fn in_activation_space(self) -> bool {
        matches!(self, Self::LoraLinear | Self::LoraEmbedding)
    }
}

/// A parameter that adapters can belong to.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Site {
    /// The module's path in the Burn model.
    pub(crate) module: String,
    /// The module's name in Hugging Face files.
    pub(crate) name: String,
    /// The parameter's own name there, `weight` or `bias` as a rule.
    pub(crate) parameter: String,
    pub(crate) kind: LayerKind,
    pub(crate) shape: Vec<usize>,
}

impl Site {
    /// The sizes `[d_in, d_out]` between which an update of low rank maps.
    ///
    /// A convolution's weight `[out, in, kernel..]` is seen as the matrix from `in * kernel..` to `out`.
    pub(crate) fn factor_dims(&self) -> [usize; 2] {
        match (self.kind, &self.shape[..]) {
            (LayerKind::Conv, [out, rest @ ..]) => [rest.iter().product(), *out],
            (_, [d_in, d_out]) => [*d_in, *d_out],
            _ => [0, 0],
        }
    }
}
