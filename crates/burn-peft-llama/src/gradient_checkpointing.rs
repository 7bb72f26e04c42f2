//! The loss of a model that keeps the input of each block alone, and computes the block again for its gradients.

use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::Tensor;
use burn_peft::{AdapterStatus, LoraEmbedding, PeftModel};
use burn_peft_ops::{next_dropout_seed, on_kind_of, with_dropout_seed};

use crate::batch::Batch;
use crate::known_gradients::KnownGradients;
use crate::loss::mean_cross_entropy;
use crate::model::{LlamaForCausalLm, embed};
use crate::parameters::is_trained;

/// [`LlamaForCausalLm::loss`]; `None` for a model in which nothing is trained, or an adapter is merged.
pub(crate) fn loss(model: &LlamaForCausalLm, batch: &Batch) -> Option<Tensor<1>> {
    let adapters = model.adapters();
    // `is_trained` also makes parameters that have not been used yet: to freeze a copy of such a one, as below, would freeze
    // it in the model as well. And without their value that is kept ready, which a frozen copy loses, merged adapters compute something else.
    if adapters.iter().any(|adapter| adapter.merged) || !is_trained(model) {
        return None;
    }
    let seed = if has_dropout(&adapters) { next_dropout_seed(&batch.input_ids.device().inner()) } else { 0 };
    Some(seeded(model, batch, seed))
}

/// Whether an active adapter has dropout.
pub(crate) fn has_dropout(adapters: &[AdapterStatus]) -> bool {
    adapters
        .iter()
        .any(|adapter| adapter.active && adapter.config.as_lora().is_some_and(|lora| lora.lora_dropout > 0.0))
}

/// `seed` decides what dropout drops.
fn seeded(model: &LlamaForCausalLm, batch: &Batch, seed: u64) -> Tensor<1> {
    let (llama, count) = (&model.model, model.model.layers.len());
    let stage = |i: usize| seed ^ (i as u64).wrapping_mul(0xd6e8_feb8_6659_fd93);
    let (ids, mask) = model.input_of(batch);
    let below_blocks =
        |embed_tokens: &LoraEmbedding| with_dropout_seed(stage(0), || embed(embed_tokens, ids.clone()));
    // The first block whose input is needed again.
    let reads_trained = is_trained(&llama.embed_tokens);
    let first = if reads_trained { Some(0) } else { llama.layers.iter().position(is_trained) };
    let first = first.unwrap_or(count);

    // Without a graph, but on the kind of device on which adapters have dropout.
    let mut x = below_blocks(&llama.embed_tokens.clone().no_grad());
    let context = llama.context(&x, 0, mask);
    let block = |i: usize, frozen: bool, x: Tensor<3>| {
        let block = &llama.layers[i];
        with_dropout_seed(stage(i + 1), || match frozen {
            true => block.clone().no_grad().forward(x, &context, None),
            false => block.forward(x, &context, None),
        })
    };
    let mut inputs = vec![];
    for i in 0..count {
        if i >= first {
            inputs.push(x.clone());
        }
        x = block(i, true, x);
    }

    let mut gradients = GradientsAccumulator::new();
    if first < count {
        x = x.require_grad();
    }
    let loss = with_dropout_seed(stage(count + 1), || {
        let picked = model.pick(llama.norm.forward(x.clone()), batch);
        mean_cross_entropy(model.head(), model.config().vocab_size, &picked, &batch.targets)
    });
    let mut dy = backward(loss.clone(), Some(&x), model, &mut gradients);
    drop(x);
    for i in (first..count).rev() {
        let Some(x) = inputs.pop() else { break };
        // Below the first, nothing needs a gradient.
        let x = if i == first && !reads_trained { x } else { x.require_grad() };
        let y = block(i, false, x.clone());
        dy = dy.and_then(|dy| backward(along(y, dy), Some(&x), model, &mut gradients));
    }
    if let Some(dy) = dy.filter(|_| reads_trained) {
        backward(along(below_blocks(&llama.embed_tokens), dy), None, model, &mut gradients);
    }
    KnownGradients::default().and_of(model, gradients.grads()).of_loss(loss)
}

/// A number whose gradient with respect to `y` is `dy`.
fn along(y: Tensor<3>, dy: Tensor<3>) -> Tensor<1> {
    let dy = on_kind_of(dy, &y.device());
    (y * dy).sum()
}

/// Adds the gradients of the parameters up, and returns that of `x`, which has no graph.
fn backward(
    y: Tensor<1>,
    x: Option<&Tensor<3>>,
    model: &LlamaForCausalLm,
    gradients: &mut GradientsAccumulator<LlamaForCausalLm>,
) -> Option<Tensor<3>> {
    if !y.is_tracked() {
        return None;
    }
    let mut found = y.backward();
    let dx = x.and_then(|x| x.grad_remove(&mut found));
    gradients.accumulate(model, GradientsParams::from_grads(found, model));
    dx
}

#[cfg(test)]
mod tests {
    use burn::module::{ModuleVisitor, Param};
    use burn::tensor::{Device, FloatDType};
    use burn_peft::{InitLoraWeights, LoraConfig, TokenIndices};

    use super::*;
    use crate::batch::Collator;
    use crate::config::LlamaConfig;
    use crate::conversation::Example;
    use crate::packing::Packing;
    use crate::testing::{add_drawn_adapter, model, values};
    use crate::train::{Trainer, TrainingConfig, evaluate};

    fn examples() -> [Example; 3] {
        [
            Example { input_ids: vec![1, 2, 3, 4], labels: vec![-100, -100, 3, 4] },
            Example { input_ids: vec![1, 2, 6], labels: vec![-100, -100, 6] },
            Example { input_ids: vec![1, 2, 5, 7], labels: vec![-100, -100, 5, 7] },
        ]
    }

    fn batch(device: &Device, packing: Packing) -> Batch {
        Collator::new(0).with_packing(packing).collate(&examples(), device).unwrap()
    }

    /// Loss and gradients of all parameters, in order of visit.
    fn gradients(model: &LlamaForCausalLm, loss: Tensor<1>) -> (Vec<f32>, Vec<Vec<f32>>) {
        struct Read(GradientsParams, Vec<Vec<f32>>);
        impl ModuleVisitor for Read {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                self.1.extend(self.0.get::<D>(param.id).map(values));
            }
        }
        let value = values(loss.clone().inner());
        let mut read = Read(GradientsParams::from_grads(loss.backward(), model), vec![]);
        model.visit(&mut read);
        (value, read.1)
    }

    fn config<const N: usize>(targets: [&str; N]) -> LoraConfig {
        LoraConfig::new(2).with_target_modules(targets).with_init_lora_weights(InitLoraWeights::Random)
    }

    /// What is trained: everything, adapters of several kinds, in all blocks and in one, the ends as well.
    #[test]
    fn loss_and_gradients_are_the_same_to_the_last_bit() {
        let linear = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"];
        let adapters: [Option<LoraConfig>; 6] = [
            None,
            Some(config(linear)),
            Some(config(linear).with_use_dora(true)),
            Some(config(["q_proj"]).with_layers_to_transform([1])),
            Some(config(["embed_tokens", "k_proj"])),
            Some(config(["lm_head"])),
        ];
        for device in [Device::flex().autodiff(), Device::flex().autodiff().gradient_checkpointing()] {
            for (i, adapter) in adapters.iter().enumerate() {
                for packing in [Packing::Padded, Packing::SharedPrefix] {
                    let mut model = model(&device, i != 5);
                    if let Some(adapter) = adapter {
                        model.add_adapter("default", adapter).unwrap();
                    }
                    let batch = batch(&device, packing);
                    let expected = gradients(&model, model.loss(&batch));
                    model.set_gradient_checkpointing(true);
                    let found = gradients(&model, model.loss(&batch));
                    assert!(expected.1.iter().flatten().any(|gradient| gradient.abs() > 1e-3));
                    assert_eq!(found, expected, "{i}, {packing:?}");
                    let evaluated = model.valid().loss(&batch);
                    assert!(!evaluated.is_tracked() && values(evaluated) == expected.0);
                }
            }
        }
    }

    /// The gradient along a direction, against the difference of losses with the same seed.
    #[test]
    fn a_block_drops_the_same_the_second_time() {
        let device = Device::flex().autodiff();
        let mut model = model(&device, true);
        let linear = ["embed_tokens", "q_proj", "v_proj", "o_proj", "up_proj", "down_proj"];
        add_drawn_adapter(&mut model, "default", &config(linear).with_lora_dropout(0.5));
        let batch = batch(&device, Packing::SharedPrefix);
        let loss = |model: &LlamaForCausalLm, seed| seeded(model, &batch, seed);
        let read = |loss: Tensor<1>| f64::from(values(loss.inner())[0]);
        assert_ne!(read(loss(&model, 1)), read(loss(&model, 2)));

        /// Moves parameters along their gradients, and adds up the squares of those.
        struct Step(GradientsParams, f64, f64);
        impl burn::module::ModuleMapper for Step {
            fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                let Some(gradient) = self.0.get::<D>(param.id) else { return param };
                self.2 += gradient.clone().square().sum().into_scalar::<f64>();
                let (id, value, mapper) = param.consume();
                let value = Tensor::from_inner(value.inner() + gradient * self.1).require_grad();
                Param::from_mapped_value(id, value, mapper)
            }
        }
        let moved = |by: f64| {
            let gradients = GradientsParams::from_grads(loss(&model, 1).backward(), &model);
            let mut step = Step(gradients, by, 0.0);
            (model.clone().map(&mut step), step.2)
        };
        let (_, squares) = moved(0.0);
        // So far that the loss changes by this, if the gradient is right.
        let change = 5e-3;
        let [up, down] = [change, -change].map(|change| read(loss(&moved(change / squares).0, 1)));
        assert!(((up - down) / (2.0 * change) - 1.0).abs() < 2e-2, "{up} {down}, squares {squares}");
    }

    /// Frozen weights in 16 bits, a module saved whole, trained tokens under a tied output layer, a model that is new.
    #[test]
    fn what_else_is_trained_gets_the_same_gradients() {
        let device = Device::flex().autodiff();
        let tokens = TokenIndices::from([1, 5]);
        let [saved, tokens] = [
            config(["q_proj"]).with_modules_to_save(["norm"]),
            config(["v_proj"]).with_trainable_token_indices(tokens),
        ];
        let of = |adapter: LoraConfig, dtype| {
            let mut model = model(&device, true).to_dtype(dtype).unwrap().0;
            model.add_adapter("default", adapter).unwrap();
            model
        };
        let mut fresh = LlamaConfig::new(13, 16, 2).with_heads(4, 2).init(&device);
        fresh.set_gradient_checkpointing(true);
        assert_eq!(gradients(&fresh, fresh.loss(&batch(&device, Packing::Padded))).1.len(), 21);
        let models = [
            of(config(["q_proj", "up_proj"]), FloatDType::BF16),
            of(config(["q_proj", "up_proj"]), FloatDType::F16),
            of(saved, FloatDType::F32),
            of(tokens, FloatDType::F32),
            fresh,
        ];
        for (i, mut model) in models.into_iter().enumerate() {
            let batch = batch(&device, Packing::SharedPrefix);
            model.set_gradient_checkpointing(false);
            let expected = gradients(&model, model.loss(&batch));
            model.set_gradient_checkpointing(true);
            assert_eq!(gradients(&model, model.loss(&batch)), expected, "{i}");
        }
    }

    /// One of two, with dropout in the other: as without checkpointing. And all of them, which leaves nothing to train.
    #[test]
    fn merged_adapters_are_computed_without_checkpointing() {
        let device = Device::flex().autodiff();
        let mut model = model(&device, true);
        model.add_adapter("default", config(["q_proj"])).unwrap();
        model.add_adapter("other", config(["q_proj", "v_proj"])).unwrap();
        model.set_adapter(&["default", "other"]).unwrap();
        model.merge_adapters(&["default"]).unwrap();
        let batch = batch(&device, Packing::Padded);
        let expected = gradients(&model, model.loss(&batch));
        model.set_gradient_checkpointing(true);
        assert_eq!(gradients(&model, model.loss(&batch)), expected);
        model.unmerge_adapter().unwrap();
        model.merge_adapter().unwrap();
        assert!(!model.loss(&batch).is_tracked());
    }

    /// Several batches to a step, whose losses are scaled, and dropout.
    #[test]
    fn a_trainer_asks_the_model_for_it() {
        let device = Device::flex().autodiff();
        for enabled in [false, true] {
            let mut model = model(&device, true);
            let adapter = LoraConfig::new(2).with_lora_dropout(0.5).with_target_modules(["q_proj", "v_proj"]);
            model.add_adapter("default", adapter).unwrap();
            // Enough steps to learn whatever is dropped: other tests draw from the same generator.
            let config = TrainingConfig::new()
                .with_batch_size(1)
                .with_grad_accumulation(3)
                .with_max_steps(Some(30))
                .with_learning_rate(1e-2)
                .with_gradient_checkpointing(enabled);
            let loss =
                |model: &LlamaForCausalLm| evaluate(model, &examples(), &Collator::new(0), 3).unwrap().loss;
            let before = loss(&model);
            let mut trainer = Trainer::new(&config, examples(), &Collator::new(0)).unwrap();
            while trainer.step(&mut model).unwrap().is_some() {}
            assert_eq!((model.is_gradient_checkpointing(), trainer.steps()), (enabled, 30));
            let after = loss(&model);
            assert!(after < 0.9 * before, "{before} to {after}");
        }
    }

    #[test]
    fn a_model_without_anything_trained_has_no_graph() {
        let device = Device::default().autodiff();
        let mut model = model(&device, true).no_grad();
        model.set_gradient_checkpointing(true);
        assert!(!model.loss(&batch(&device, Packing::Padded)).is_tracked());
    }
}
