//! Embeddings.

use burn::module::ModuleVisitor;
use burn::nn::Embedding;
use burn::tensor::{Int, Tensor};
use burn_peft_ops::linear;

use crate::adapter::Adapters;
use crate::layers::transparent::transparent_layer;
use crate::seam::Mark;

/// `nn::Embedding` whose adapters work on the rows that are looked up:
///
/// `y = W[ids] + Σ scaling * A[ids] B`, summed over the active adapters.
///
/// It never builds the dense table `A B`, as large as the vocabulary times the width. On a plain `nn::Embedding` every
/// forward pass builds it. Like [`LoraLinear`](crate::LoraLinear), the wrapper adds nothing to parameter paths, converts by
/// [`From`] in both directions and dereferences to the plain layer.
///
/// # Example
/// ```
/// use burn::nn::EmbeddingConfig;
/// use burn::tensor::{Device, Tensor};
/// use burn_peft::LoraEmbedding;
///
/// let device = Device::default();
/// let layer = LoraEmbedding::from(EmbeddingConfig::new(10, 4).init(&device));
/// let ids = Tensor::from_data([[1, 5, 9]], &device);
/// assert_eq!(layer.forward(ids).dims(), [1, 3, 4]);
/// ```
#[derive(Clone, Debug)]
pub struct LoraEmbedding {
    layer: Embedding,
    has_tied_output: bool,
}

impl LoraEmbedding {
    fn new(layer: Embedding) -> Self {
        Self { layer, has_tied_output: false }
    }

    fn announce<V: ModuleVisitor>(&self, visitor: &mut V) {
        Mark::ActivationSpace.announce(visitor);
        if self.has_tied_output {
            Mark::TiedTable.announce(visitor);
        }
    }

    /// Says whether the model's output layer reads the table of this embedding (`tie_word_embeddings`), through
    /// [`tied_output`](Self::tied_output). Default false.
    ///
    /// If it does, trained tokens act in the output layer too, and
    /// [`merge_and_unload`](crate::PeftModel::merge_and_unload) refuses to merge any other adapter into the table, which
    /// would change the output layer.
    pub fn set_tied_output(&mut self, has_tied_output: bool) {
        self.has_tied_output = has_tied_output;
    }

    /// Whether the model's output layer reads the table of this embedding.
    pub fn has_tied_output(&self) -> bool {
        self.has_tied_output
    }

    /// Looks up `ids` and adds the updates of the active adapters.
    ///
    /// # Shapes
    /// - ids: `[batch_size, sequence]`
    /// - output: `[batch_size, sequence, d_model]`
    ///
    /// # Panics
    /// If rows of the batch have adapters of their own ([`for_rows`](crate::PeftModel::for_rows)) and the batch has another
    /// number of rows.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let Some(adapters) = Adapters::of(&self.layer.weight) else {
            return self.layer.forward(ids);
        };
        adapters.embedding(&self.layer.weight, ids)
    }

    /// `x Wᵀ`: the logits of an output layer that is tied to this embedding ([`set_tied_output`](Self::set_tied_output)).
    /// `W` is the table without adapters, but with their trained tokens, as in PEFT.
    ///
    /// # Shapes
    /// - x: `[n, d_model]`
    /// - output: `[n, n_embedding]`
    pub fn tied_output(&self, x: Tensor<2>) -> Tensor<2> {
        match Adapters::of(&self.layer.weight) {
            Some(adapters) => adapters.tied(&self.layer.weight, x),
            None => linear(x, self.layer.weight.base().transpose(), None),
        }
    }

    /// Whether [`tied_output`](Self::tied_output) depends on a trained parameter, or on more than the table.
    pub fn trains_tied_output(&self) -> bool {
        let adapters = Adapters::of(&self.layer.weight);
        self.layer.weight.base().is_require_grad() || adapters.is_some_and(Adapters::trains_tied_output)
    }
}

transparent_layer! {
    LoraEmbedding, Embedding,
    /// The plain layer; adapters stay attached and work through the weight.
}

#[cfg(test)]
mod tests {
    use burn::module::Module;
    use burn::nn::EmbeddingConfig;
    use burn::tensor::module::embedding;
    use burn::tensor::{Device, Tolerance};

    use super::*;
    use crate::testing::with_fixed_numbers;
    use crate::{LoraConfig, PeftModel};

    #[derive(Module, Debug)]
    struct Model {
        embed: LoraEmbedding,
    }

    fn model(device: &Device) -> Model {
        let mut model = Model { embed: EmbeddingConfig::new(9, 4).init(device).into() };
        let config = LoraConfig::new(2).with_lora_alpha(6.0).with_target_modules(["embed"]);
        model.add_adapter("default", &config).unwrap();
        with_fixed_numbers(model)
    }

    #[test]
    fn looking_up_factors_equals_looking_up_the_dense_table() {
        let device = Device::default();
        let model = model(&device);
        let ids = Tensor::<2, Int>::from_data([[0, 8, 3], [3, 3, 1]], &device);
        let looked_up = model.embed.forward(ids.clone());
        let plain: Embedding = model.embed.clone().into();
        let dense = plain.forward(ids.clone());
        looked_up.clone().into_data().assert_approx_eq::<f32>(&dense.into_data(), Tolerance::absolute(1e-6));
        let bare = embedding(plain.weight.base(), ids);
        let moved: f32 = (bare - looked_up).abs().max().into_scalar();
        assert!(moved > 0.1, "the adapter moved the output by {moved} only");
    }

    #[test]
    fn only_looked_up_rows_of_a_get_gradients() {
        let device = Device::default().autodiff();
        let model = model(&device);
        let ids = Tensor::<2, Int>::from_data([[0, 8, 3]], &device);
        let grads = model.embed.forward(ids).powi_scalar(2).sum().backward();
        let adapter = &Adapters::of(&model.embed.weight).unwrap().list[0];
        let a = adapter.updates[0]["a"].val().grad(&grads).unwrap();
        let rows: Vec<f32> = a.abs().sum_dim(1).into_data().try_to_vec().unwrap();
        let touched: Vec<usize> = (0..9).filter(|row| rows[*row] > 0.0).collect();
        assert_eq!(touched, [0, 3, 8]);
        assert!(model.embed.weight.base().grad(&grads).is_none());
    }

    #[test]
    fn display_names_the_adapters() {
        let text = model(&Device::default()).to_string();
        assert!(text.contains("default (r 2)"), "{text}");
    }
}
