//! What adapters belong to: the parameters of layers.

use burn::tensor::Tensor;

/// What kind of layer a parameter belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layer {
    Linear,
    Embedding,
    /// A convolution of one, two or three dimensions.
    Conv,
    /// Anything else: its parameters can be copied and trained, and that is all.
    Other,
}

/// Where the adapters of a layer work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Space {
    /// On the weight, as a parameter: all that a plain layer allows.
    Weight,
    /// On the layer's input and output: `LoraLinear`, `LoraEmbedding`.
    Activations,
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
    pub(crate) layer: Layer,
    pub(crate) space: Space,
    pub(crate) shape: Vec<usize>,
}

impl Site {
    /// Whether it is the weight of a layer that can be adapted.
    pub(crate) fn is_adaptable(&self) -> bool {
        self.layer != Layer::Other && self.parameter == "weight"
    }

    /// The parameter's name in files, its module's name included.
    pub(crate) fn full_name(&self) -> String {
        format!("{}.{}", self.name, self.parameter)
    }

    pub(crate) fn elements(&self) -> usize {
        product(&self.shape)
    }

    /// The matrix `[d_in, d_out]` as which methods see the parameter: a convolution's weight `[out, in, kernel..]` maps
    /// from `in * kernel..` to `out`, and what belongs to no layer is one row.
    pub(crate) fn dims(&self) -> [usize; 2] {
        match (self.layer, &self.shape[..]) {
            (Layer::Conv, [out, rest @ ..]) if self.is_adaptable() => [product(rest), *out],
            (Layer::Linear | Layer::Embedding, [d_in, d_out]) => [*d_in, *d_out],
            _ => [1, self.elements()],
        }
    }

    /// Whether the parameter's own axes are those of [`dims`](Self::dims) the other way round.
    fn is_turned(&self) -> bool {
        self.layer == Layer::Conv && self.is_adaptable()
    }

    /// The parameter as a matrix of [`dims`](Self::dims).
    pub(crate) fn to_matrix<const D: usize>(&self, parameter: Tensor<D>) -> Tensor<2> {
        let [d_in, d_out] = self.dims();
        if self.is_turned() {
            parameter.reshape([d_out, d_in]).transpose()
        } else {
            parameter.reshape([d_in, d_out])
        }
    }

    /// The inverse of [`to_matrix`](Self::to_matrix).
    pub(crate) fn to_parameter<const D: usize>(&self, matrix: Tensor<2>, shape: [usize; D]) -> Tensor<D> {
        if self.is_turned() { matrix.transpose().reshape(shape) } else { matrix.reshape(shape) }
    }

    /// The shape in files, PyTorch's, and whether its matrix is the transpose of [`dims`](Self::dims): Burn keeps the weight
    /// of a linear layer as `[d_in, d_out]`, PyTorch as `[d_out, d_in]`.
    pub(crate) fn stored(&self) -> (Vec<usize>, bool) {
        let mut shape = self.shape.clone();
        let is_linear = self.layer == Layer::Linear && self.is_adaptable();
        if is_linear {
            shape.reverse();
        }
        (shape, is_linear || self.is_turned())
    }
}

/// The number of elements of a shape, which a file may have made up: at most the greatest number there is.
pub(crate) fn product(shape: &[usize]) -> usize {
    shape.iter().fold(1, |product: usize, &size| product.saturating_mul(size))
}
