//! AdamW whose state can be loaded again.

use burn::optim::LearningRate;
use burn::optim::{AdamW, AdamWState, Optimizer};
use burn::tensor::{Device, Tensor};

/// Burn's AdamW. It takes up moments of any type: Burn loads the state of an optimizer in the device's own type, whatever
/// type it was saved in.
#[derive(Clone)]
pub(super) struct LoadableAdamW(pub(super) AdamW);

impl Optimizer for LoadableAdamW {
    type State<const D: usize> = AdamWState<D>;

    fn step<const D: usize>(
        &self,
        lr: LearningRate,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<AdamWState<D>>,
    ) -> (Tensor<D>, Option<AdamWState<D>>) {
        let state = state.map(|mut state| {
            let moments = &mut state.momentum;
            moments.moment_1 = moments.moment_1.clone().cast(grad.dtype());
            moments.moment_2 = moments.moment_2.clone().cast(grad.dtype());
            state
        });
        self.0.step(lr, tensor, grad, state)
    }

    fn to_device<const D: usize>(state: AdamWState<D>, device: &Device) -> AdamWState<D> {
        AdamW::to_device(state, device)
    }
}
