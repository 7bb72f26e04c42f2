//! A loss whose gradients were computed with it.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Tensor};
use burn_peft_ops::{cast, on_kind_of};

/// Gradients of a loss that are known before its `backward`, as one number: `Σ x * gradient`, over all `x` that have one.
#[derive(Default)]
pub(crate) struct KnownGradients {
    sum: Option<Tensor<1>>,
}

impl KnownGradients {
    /// These, and `gradient` with respect to `x`. The gradient has no graph.
    pub(crate) fn and<const D: usize>(self, x: Tensor<D>, gradient: Tensor<D>) -> Self {
        let gradient = on_kind_of(gradient, &x.device());
        // Not in 16 bits, because a sum that overflows would turn the zero in `of_loss` into `inf - inf`.
        let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let of_x = cast((cast(x, wide) * cast(gradient, wide)).sum(), DType::F32);
        let sum = match self.sum {
            Some(sum) => sum + of_x,
            None => of_x,
        };
        Self { sum: Some(sum) }
    }

    /// These, and those with respect to the parameters of a module.
    pub(crate) fn and_of<M: Module>(self, module: &M, gradients: GradientsParams) -> Self {
        struct Visitor {
            gradients: GradientsParams,
            known: KnownGradients,
        }
        impl ModuleVisitor for Visitor {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                if let Some(gradient) = self.gradients.remove::<D>(param.id) {
                    self.known = std::mem::take(&mut self.known).and(param.base(), gradient);
                }
            }
        }
        let mut visitor = Visitor { gradients, known: self };
        module.visit(&mut visitor);
        visitor.known
    }

    /// A tensor of the value of `loss`, whose own graph ends here, with these gradients.
    pub(crate) fn of_loss(self, loss: Tensor<1>) -> Tensor<1> {
        let loss = loss.detach();
        match self.sum {
            Some(sum) => loss + (sum.clone() - sum.detach()),
            None => loss,
        }
    }
}
