//! What the tests of several files need.

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Tensor, TensorData};

/// The model with numbers in [-0.6, 0.6] in all of its parameters, adapters' included, that are always the same. The generator of
/// a device is shared with tests that run at the same time.
pub(crate) fn with_fixed_numbers<M: Module>(model: M) -> M {
    struct Fixer(f64);

    impl ModuleMapper for Fixer {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            self.0 += 1.0;
            let start = self.0;
            param.map(|tensor| {
                let number = |i: usize| (0.6 * (start + (i * i) as f64).sin()) as f32;
                let numbers: Vec<f32> = (0..tensor.shape().num_elements()).map(number).collect();
                let fixed = Tensor::from_data(TensorData::new(numbers, tensor.shape()), &tensor.device());
                fixed.set_require_grad(tensor.is_require_grad())
            })
        }
    }

    model.map(&mut Fixer(0.0))
}
