//! What PEFT calls the tensors of an adapter.

use burn::module::Param;
use burn::tensor::Tensor;

use crate::adapter::{Adapter, LayerKind};

/// PEFT wraps the model twice, in `PeftModel` and in `LoraModel`, and saves the path through both.
const PREFIX: &str = "base_model.model.";

/// The key of the weight that the adapter at `module` adapts.
pub(super) fn base_layer(module: &str) -> String {
    format!("{PREFIX}{module}.base_layer.weight")
}

/// One of the two factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Factor {
    A,
    B,
}

impl Factor {
    /// The key of this factor of the adapter at `module`.
    pub(super) fn key(self, module: &str, kind: LayerKind) -> String {
        let suffix = match (kind, self) {
            (LayerKind::Linear | LayerKind::LoraLinear, Self::A) => "lora_A.weight",
            (LayerKind::Linear | LayerKind::LoraLinear, Self::B) => "lora_B.weight",
            (LayerKind::Embedding, Self::A) => "lora_embedding_A",
            (LayerKind::Embedding, Self::B) => "lora_embedding_B",
        };
        format!("{PREFIX}{module}.{suffix}")
    }

    /// The shape in the file, the transpose of ours: `A` is `[r, d_in]`, `B` is `[d_out, r]`.
    pub(super) fn stored_shape(self, [d_in, d_out]: [usize; 2], r: usize) -> [usize; 2] {
        match self {
            Self::A => [r, d_in],
            Self::B => [d_out, r],
        }
    }

    pub(super) fn of(self, adapter: &Adapter) -> &Param<Tensor<2>> {
        match self {
            Self::A => &adapter.a,
            Self::B => &adapter.b,
        }
    }
}
