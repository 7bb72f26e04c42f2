//! Cross-entropy of the next token.

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{DType, IndexingUpdateOp, Int, Tensor, activation::softmax},
};

use crate::LlamaForCausalLm;

/// Bound of the logits that exist at a time, in numbers: 64 MiB of f32.
const CHUNK: usize = 1 << 24;

/// Mean over the rows of `log Σ exp(logits) - logits[target]`. Hidden states `[n, hidden_size]`, targets `[n]`.
pub(crate) fn mean_cross_entropy(
    model: &LlamaForCausalLm,
    hidden: Tensor<2>,
    targets: Tensor<1, Int>,
) -> Tensor<1> {
    chunked(model, hidden, targets, (CHUNK / model.config().vocab_size).max(1))
}

fn chunked(
    model: &LlamaForCausalLm,
    hidden: Tensor<2>,
    targets: Tensor<1, Int>,
    rows_per_chunk: usize,
) -> Tensor<1> {
    let n = hidden.dims()[0];
    let frozen_head = hidden.is_tracked() && !is_head_trained(model);
    let sums = (0..n.max(1)).step_by(rows_per_chunk).map(|start| {
        let rows = rows_per_chunk.min(n - start);
        let hidden = hidden.clone().narrow(0, start, rows);
        let targets = targets.clone().narrow(0, start, rows);
        match frozen_head {
            true => through_frozen_head(model, hidden, targets),
            false => sum_cross_entropy(model.logits(hidden), targets),
        }
    });
    Tensor::cat(sums.collect(), 0).sum() / n as f64
}

/// The gradient with respect to `hidden` is computed at once, so that backward needs neither logits nor weights.
fn through_frozen_head(model: &LlamaForCausalLm, hidden: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let leaf = hidden.clone().detach().require_grad();
    let loss = sum_cross_entropy(model.logits(leaf.clone()), targets);
    let mut gradients = loss.backward();
    match leaf.grad_remove(&mut gradients) {
        Some(gradient) => with_gradient(loss, hidden, gradient),
        None => loss.detach(),
    }
}

/// Sum over the rows. Logits `[n, vocab_size]`, targets `[n]`.
fn sum_cross_entropy(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let logits = to_f32(logits);
    let targets = targets.unsqueeze_dim::<2>(1);
    if !logits.is_tracked() {
        return loss_and_probabilities(logits, targets).0;
    }
    // Autodiff would keep several copies of the logits; the gradient is known: softmax minus one at the target.
    let targets = targets.inner();
    let (loss, probabilities) = loss_and_probabilities(logits.clone().inner(), targets.clone());
    let minus_one = Tensor::full(targets.dims(), -1.0, (&loss.device(), DType::F32));
    let gradient = probabilities.scatter(1, targets, minus_one, IndexingUpdateOp::Add);
    with_gradient(Tensor::from_inner(loss), logits, gradient)
}

/// The summed loss and the softmax. Logits `[n, vocab_size]`, targets `[n, 1]`.
fn loss_and_probabilities(logits: Tensor<2>, targets: Tensor<2, Int>) -> (Tensor<1>, Tensor<2>) {
    // The largest probability is `exp(max) / Σ exp(logits)`, which gives `log Σ exp(logits)` without another pass
    // of exponentials.
    let probabilities = softmax(logits.clone(), 1);
    let log_sum_exp = logits.clone().max_dim(1) - probabilities.clone().max_dim(1).log();
    ((log_sum_exp - logits.gather(1, targets)).sum(), probabilities)
}

/// A tensor of the value of `loss` whose gradient with respect to `x` is `gradient`, given without autodiff.
fn with_gradient(loss: Tensor<1>, x: Tensor<2>, gradient: Tensor<2>) -> Tensor<1> {
    // In f32, because a sum that overflows would turn the zero below into `inf - inf`.
    let linear = (to_f32(x) * to_f32(Tensor::from_inner(gradient))).sum();
    loss.detach() + (linear.clone() - linear.detach())
}

fn to_f32(x: Tensor<2>) -> Tensor<2> {
    if x.dtype() == DType::F32 { x } else { x.cast(DType::F32) }
}

/// Whether a parameter of the output layer requires a gradient.
fn is_head_trained(model: &LlamaForCausalLm) -> bool {
    #[derive(Default)]
    struct Trained(bool);
    impl ModuleVisitor for Trained {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0 |= param.base().is_require_grad();
        }
    }
    let mut trained = Trained::default();
    match &model.lm_head {
        Some(lm_head) => lm_head.visit(&mut trained),
        None => return model.model.embed_tokens.weight.base().is_require_grad(),
    }
    trained.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Collator, Example,
        model::tests::{assert_close, model, values},
    };
    use burn::tensor::{Device, activation::log_softmax};
    use burn_peft::{LoraConfig, PeftModel};

    fn batch(device: &Device) -> crate::Batch {
        let examples = [
            Example { input_ids: vec![1, 2, 3, 4], labels: vec![-100, -100, 3, 4] },
            Example { input_ids: vec![5, 6], labels: vec![5, 6] },
        ];
        Collator::new(0).collate(&examples, device).unwrap()
    }

    /// The loss from all logits, with autodiff through everything.
    fn naive(model: &LlamaForCausalLm, batch: &crate::Batch) -> Tensor<1> {
        let logits = model.forward(batch.input_ids.clone(), Some(batch.attention_mask.clone()));
        let log_probs = log_softmax(logits, 2);
        let at = |b: usize, s: usize, target: usize| {
            log_probs.clone().slice([b..b + 1, s..s + 1, target..target + 1]).reshape([1])
        };
        Tensor::cat(vec![at(0, 1, 3), at(0, 2, 4), at(1, 0, 6)], 0).mean().neg()
    }

    /// Gradients of all trained parameters, in order of visit; empty where there is none.
    fn gradients(model: &LlamaForCausalLm, loss: Tensor<1>) -> Vec<f32> {
        struct Read(burn::tensor::Gradients, Vec<f32>);
        impl ModuleVisitor for Read {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                if let Some(gradient) = param.base().grad(&self.0) {
                    self.1.extend(values(gradient));
                }
            }
        }
        let mut read = Read(loss.backward(), Vec::new());
        model.visit(&mut read);
        read.1
    }

    #[test]
    fn the_loss_is_that_of_all_logits_at_the_labelled_positions() {
        for (tied, device) in [(true, Device::flex()), (false, Device::flex().autodiff())] {
            let model = model(&device, tied);
            let batch = batch(&device);
            let found = model.loss(&batch);
            assert_eq!(found.dims(), [1]);
            assert_close(&values(found), &values(naive(&model, &batch)), 1e-6);
        }
    }

    #[test]
    fn gradients_are_those_of_autodiff_whether_the_head_is_trained_or_not() {
        let device = Device::flex().autodiff();
        for tied in [true, false] {
            for adapted in [false, true] {
                let mut model = model(&device, tied);
                if adapted {
                    let config = LoraConfig::new(2).with_target_modules(["q_proj", "down_proj"]);
                    model.add_adapter("default", &config).unwrap();
                }
                assert_eq!(is_head_trained(&model), !adapted);
                let batch = batch(&device);
                let found = gradients(&model, model.loss(&batch) * 3.0);
                let expected = gradients(&model, naive(&model, &batch) * 3.0);
                assert!(expected.iter().any(|gradient| gradient.abs() > 1e-3));
                assert_close(&found, &expected, 1e-5);
            }
        }
    }

    #[test]
    fn an_adapted_head_is_trained() {
        let device = Device::flex().autodiff();
        let mut model = model(&device, true);
        model.untie_lm_head();
        let config = LoraConfig::new(2).with_target_modules(["lm_head"]);
        model.add_adapter("default", &config).unwrap();
        assert!(is_head_trained(&model));
        let batch = batch(&device);
        let found = gradients(&model, model.loss(&batch));
        assert_close(&found, &gradients(&model, naive(&model, &batch)), 1e-6);
        assert!(found.iter().any(|gradient| gradient.abs() > 1e-3));
    }

    #[test]
    fn chunks_add_up() {
        let device = Device::flex().autodiff();
        let model = model(&device, true);
        let hidden = Tensor::<2>::random([5, 16], burn::tensor::Distribution::Normal(0.0, 1.0), &device);
        let targets = Tensor::<1, Int>::from_data([0, 3, 12, 3, 7], &device);
        let whole = chunked(&model, hidden.clone(), targets.clone(), 100);
        for rows in [1, 2, 5] {
            let parts = chunked(&model, hidden.clone(), targets.clone(), rows);
            assert_close(&values(parts), &values(whole.clone()), 1e-6);
        }
    }
}
