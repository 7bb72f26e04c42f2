//! The loss of a model: cross-entropy of the next token, a bounded number of logits at a time.

use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{Gradients, Int, Tensor};
use burn_peft::{LoraEmbedding, LoraLinear};
use burn_peft_ops::{cross_entropy, cross_entropy_of_frozen, on_kind_of};

use crate::head::{Head, Picked};
use crate::known_gradients::KnownGradients;

/// Bound of the logits that exist at a time, in numbers: 64 MiB of f32.
pub(crate) const CHUNK: usize = 1 << 24;

/// Mean over the positions of `log Σ exp(logits) - logits[target]`.
pub(crate) fn mean_cross_entropy(
    head: Head<'_>,
    vocab_size: usize,
    picked: &Picked,
    targets: &Tensor<1, Int>,
) -> Tensor<1> {
    let (n, rows_per_chunk) = (picked.hidden.dims()[0], (CHUNK / vocab_size).max(1));
    match keeps_no_logits(head, n, vocab_size) {
        true => differentiated(head, picked, targets, rows_per_chunk),
        false => chunked(head, picked, targets, rows_per_chunk),
    }
}

/// Whether the gradients of a trained output layer are computed with the loss of `n` positions: where there is more than one
/// chunk of logits, and they need less memory than all logits. They exist up to three times: added up, multiplied with the
/// parameters, and in `backward`.
pub(crate) fn keeps_no_logits(head: Head<'_>, n: usize, vocab_size: usize) -> bool {
    let (logits, trained) = (n * vocab_size, head.trained_numbers());
    logits > CHUNK && trained > 0 && 3 * trained < logits
}

fn chunked(head: Head<'_>, picked: &Picked, targets: &Tensor<1, Int>, rows_per_chunk: usize) -> Tensor<1> {
    let n = picked.hidden.dims()[0];
    let weight = if picked.hidden.is_tracked() { head.frozen_weight() } else { None };
    let sums = (0..n.max(1)).step_by(rows_per_chunk).map(|start| {
        let rows = rows_per_chunk.min(n - start);
        let picked = picked.narrow(start, rows);
        let targets = targets.clone().narrow(0, start, rows);
        let Some(weight) = weight.clone() else { return cross_entropy(head.logits_of(picked), targets) };
        let hidden = picked.hidden.clone();
        let plain = Picked { hidden: picked.hidden.inner(), rows: picked.rows.inner() };
        cross_entropy_of_frozen(hidden, head.logits_of(plain).inner(), weight, targets)
    });
    Tensor::cat(sums.collect(), 0).sum() / n as f64
}

/// [`chunked`] with a trained output layer, where the gradients of each chunk are computed at once. Otherwise, `backward` would
/// need a number for each logit of all chunks.
fn differentiated(
    head: Head<'_>,
    picked: &Picked,
    targets: &Tensor<1, Int>,
    rows_per_chunk: usize,
) -> Tensor<1> {
    let n = picked.hidden.dims()[0];
    let (mut of_head, mut of_hidden, mut losses) = (HeadGradients::new(head), vec![], vec![]);
    for start in (0..n).step_by(rows_per_chunk) {
        let rows = rows_per_chunk.min(n - start);
        let Picked { hidden, rows: sequences } = picked.narrow(start, rows);
        let is_tracked = hidden.is_tracked();
        let hidden = if is_tracked { hidden.detach().require_grad() } else { hidden };
        let logits = head.logits_of(Picked { hidden: hidden.clone(), rows: sequences });
        let loss = cross_entropy(logits, targets.clone().narrow(0, start, rows)) / n as f64;
        losses.push(loss.clone().inner());
        // The factors of a merged adapter require gradients, but have no part in the logits.
        if loss.is_tracked() {
            let mut gradients = loss.backward();
            of_hidden.extend(hidden.grad_remove(&mut gradients));
            of_head.add(gradients);
        }
    }
    let mut known = of_head.known();
    if !of_hidden.is_empty() {
        known = known.and(picked.hidden.clone(), Tensor::cat(of_hidden, 0));
    }
    known.of_loss(on_kind_of(Tensor::cat(losses, 0).sum(), &picked.hidden.device()))
}

/// The sums of the gradients of an output layer.
enum HeadGradients<'a> {
    Tied(&'a LoraEmbedding, GradientsAccumulator<LoraEmbedding>),
    Own(&'a LoraLinear, GradientsAccumulator<LoraLinear>),
}

impl<'a> HeadGradients<'a> {
    fn new(head: Head<'a>) -> Self {
        match head {
            Head::Tied(embedding) => Self::Tied(embedding, GradientsAccumulator::new()),
            Head::Own(layer) => Self::Own(layer, GradientsAccumulator::new()),
        }
    }

    fn add(&mut self, gradients: Gradients) {
        match self {
            Self::Tied(embedding, sums) => {
                sums.accumulate(embedding, GradientsParams::from_grads(gradients, *embedding));
            }
            Self::Own(layer, sums) => sums.accumulate(layer, GradientsParams::from_grads(gradients, *layer)),
        }
    }

    fn known(self) -> KnownGradients {
        match self {
            Self::Tied(embedding, mut sums) => KnownGradients::default().and_of(embedding, sums.grads()),
            Self::Own(layer, mut sums) => KnownGradients::default().and_of(layer, sums.grads()),
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::module::{Module, ModuleVisitor, Param};
    use burn::tensor::activation::log_softmax;
    use burn::tensor::{Device, TensorData};
    use burn_peft::{LoraConfig, PeftModel, TokenIndices};
    use burn_peft_ops::with_dropout_seed;

    use super::*;
    use crate::batch::{Batch, Collator};
    use crate::config::LlamaConfig;
    use crate::conversation::Example;
    use crate::model::LlamaForCausalLm;
    use crate::testing::{
        REAL_VOCABULARIES, add_drawn_adapter, assert_close, deviation, drawn, drawn_numbers, model, values,
        wide,
    };

    fn batch(device: &Device) -> Batch {
        let examples = [
            Example { input_ids: vec![1, 2, 3, 4], labels: vec![-100, -100, 3, 4] },
            Example { input_ids: vec![5, 6], labels: vec![5, 6] },
        ];
        Collator::new(0).collate(&examples, device).unwrap()
    }

    /// The loss from all logits, with autodiff through everything.
    fn naive(model: &LlamaForCausalLm, batch: &Batch) -> Tensor<1> {
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
        let mut read = Read(loss.backward(), vec![]);
        model.visit(&mut read);
        read.1
    }

    #[test]
    fn the_loss_is_that_of_all_logits_at_the_labelled_positions() {
        for (tied, device) in [(true, Device::default()), (false, Device::default().autodiff())] {
            let model = model(&device, tied);
            let batch = batch(&device);
            let found = model.loss(&batch);
            assert_eq!(found.dims(), [1]);
            assert_close(&values(found), &values(naive(&model, &batch)), 1e-6);
        }
    }

    #[test]
    fn gradients_are_those_of_autodiff_whether_the_head_is_trained_or_not() {
        let device = Device::default().autodiff();
        for tied in [true, false] {
            for adapted in [false, true] {
                let mut model = model(&device, tied);
                if adapted {
                    let config = LoraConfig::new(2).with_target_modules(["q_proj", "down_proj"]);
                    add_drawn_adapter(&mut model, "default", &config);
                }
                assert_eq!(model.head().is_trained(), !adapted);
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
        let device = Device::default().autodiff();
        let mut model = model(&device, true);
        model.untie_lm_head();
        let config = LoraConfig::new(2).with_target_modules(["lm_head"]);
        add_drawn_adapter(&mut model, "default", &config);
        assert!(model.head().is_trained());
        let batch = batch(&device);
        let found = gradients(&model, model.loss(&batch));
        assert_close(&found, &gradients(&model, naive(&model, &batch)), 1e-6);
        assert!(found.iter().any(|gradient| gradient.abs() > 1e-3));
    }

    /// Both ways, from the same seed of dropout.
    #[track_caller]
    fn assert_differentiated_is_chunked(case: &str, model: &LlamaForCausalLm, batch: &Batch) {
        for rows in [1, 2, 5] {
            let of = |f: fn(Head<'_>, &Picked, &Tensor<1, Int>, usize) -> Tensor<1>| {
                let loss = with_dropout_seed(5, || {
                    f(model.head(), &model.labelled(batch), &batch.targets, rows) * 3.0
                });
                (values(loss.clone()), gradients(model, loss))
            };
            let (found, expected) = (of(differentiated), of(chunked));
            let largest = expected.1.iter().fold(0.0, |largest: f32, gradient| largest.max(gradient.abs()));
            assert!(largest > 1e-2, "{case}");
            assert_close(&found.0, &expected.0, 1e-5);
            assert_close(&found.1, &expected.1, 2e-6 * largest);
        }
    }

    #[test]
    fn gradients_that_are_computed_with_the_loss_are_those_of_autodiff() {
        fn on<const N: usize>(modules: [&str; N]) -> LoraConfig {
            LoraConfig::new(2).with_target_modules(modules)
        }
        let head = || on(["lm_head"]);
        let adapted = [
            ("the head alone", false, head()),
            ("the head and below", false, on(["lm_head", "q_proj"])),
            ("dropout", false, head().with_lora_dropout(0.5)),
            ("DoRA", false, head().with_use_dora(true)),
            ("a copy", false, on(["q_proj"]).with_modules_to_save(["lm_head"])),
            (
                "rows of the table",
                true,
                on(["q_proj"]).with_trainable_token_indices(TokenIndices::from([3, 7])),
            ),
        ];
        let plain = Device::default().autodiff();
        for device in [plain.clone(), plain.gradient_checkpointing()] {
            let batch = batch(&device);
            for (case, tied, config) in &adapted {
                let mut model = model(&device, *tied);
                add_drawn_adapter(&mut model, "default", config);
                assert_differentiated_is_chunked(case, &model, &batch);
            }
            for tied in [false, true] {
                assert_differentiated_is_chunked("everything", &model(&device, tied), &batch);
            }
            let mut head_alone = model(&device, false).no_grad();
            head_alone.lm_head = model(&device, false).lm_head;
            assert_differentiated_is_chunked("all of the head alone", &head_alone, &batch);
        }
        // A GPU may lack the type.
        let device = Device::flex().autodiff();
        let mut half = model(&device, false).to_dtype(burn::tensor::FloatDType::BF16).unwrap().0.no_grad();
        add_drawn_adapter(&mut half, "default", &head());
        assert_differentiated_is_chunked("a base in bf16", &half, &batch(&device));
    }

    /// More logits of a real vocabulary than exist at a time: with an adapter, and with one that is merged.
    #[test]
    fn an_adapted_head_with_a_real_vocabulary_keeps_no_logits() {
        let device = Device::default().autodiff();
        let vocab = REAL_VOCABULARIES[0];
        let mut model = drawn(&LlamaConfig::new(vocab, 8, 1).with_heads(2, 1), &device);
        add_drawn_adapter(&mut model, "default", &LoraConfig::new(2).with_target_modules(["lm_head"]));
        let input_ids: Vec<u32> = (0..400).map(|i| i * 1_201 % vocab as u32).collect();
        let labels = input_ids.iter().map(|id| i64::from(*id)).collect();
        let batch = Collator::new(0).collate(&[Example { input_ids, labels }], &device).unwrap();
        assert!(keeps_no_logits(model.head(), batch.num_targets, vocab));
        let loss = model.loss(&batch);
        let expected = chunked(model.head(), &model.labelled(&batch), &batch.targets, 100);
        assert_close(&values(loss.clone()), &values(expected.clone()), 1e-5);
        let (found, expected) = (gradients(&model, loss), gradients(&model, expected));
        let largest = expected.iter().fold(0.0, |largest: f32, gradient| largest.max(gradient.abs()));
        assert_close(&found, &expected, 2e-6 * largest);

        let of_adapter = values(model.loss(&batch));
        model.merge_adapter().unwrap();
        let merged = model.loss(&batch);
        assert!(!merged.is_tracked());
        assert_close(&values(merged), &of_adapter, 1e-4);
    }

    #[test]
    fn chunks_add_up() {
        let device = Device::default().autodiff();
        let model = model(&device, true);
        let hidden = Tensor::<2>::random([5, 16], burn::tensor::Distribution::Normal(0.0, 1.0), &device);
        let targets = Tensor::<1, Int>::from_data([0, 3, 12, 3, 7], &device);
        let picked = Picked { hidden, rows: Tensor::from_data([0, 0, 1, 1, 1], &device) };
        let whole = chunked(model.head(), &picked, &targets, 100);
        for rows in [1, 2, 5] {
            let parts = chunked(model.head(), &picked, &targets, rows);
            assert_close(&values(parts), &values(whole.clone()), 1e-6);
        }
    }

    /// Loss, and gradients of the hidden states and of the output layer's weight, `[d, vocab]`, in f64.
    fn in_f64(hidden: &[f64], weight: &[f64], targets: &[usize]) -> (f64, Vec<f64>, Vec<f64>) {
        let (n, vocab) = (targets.len(), weight.len() / (hidden.len() / targets.len()));
        let d = hidden.len() / n;
        let (mut loss, mut to_hidden, mut to_weight) = (0.0, vec![0.0; n * d], vec![0.0; d * vocab]);
        for (row, hidden) in hidden.chunks(d).enumerate() {
            let mut logits = vec![0.0; vocab];
            for (x, weights) in hidden.iter().zip(weight.chunks(vocab)) {
                logits.iter_mut().zip(weights).for_each(|(logit, w)| *logit += x * w);
            }
            let sum: f64 = logits.iter().map(|x| x.exp()).sum();
            loss += (sum.ln() - logits[targets[row]]) / n as f64;
            let mut gradient: Vec<f64> = logits.iter().map(|x| x.exp() / sum / n as f64).collect();
            gradient[targets[row]] -= 1.0 / n as f64;
            for j in 0..d {
                let weights = &weight[j * vocab..][..vocab];
                to_hidden[row * d + j] = gradient.iter().zip(weights).map(|(g, w)| g * w).sum();
                let into = &mut to_weight[j * vocab..][..vocab];
                into.iter_mut().zip(&gradient).for_each(|(sum, g)| *sum += g * hidden[j]);
            }
        }
        (loss, to_hidden, to_weight)
    }

    #[test]
    fn loss_and_gradients_of_a_real_vocabulary_are_those_in_f64() {
        let device = Device::default().autodiff();
        let (n, d) = (5, 16);
        // Elsewhere, most likely a product adds up a whole vocabulary in one piece: measured on WGPU (SwiftShader), 1.2e-4.
        let tolerance = if device == Device::flex().autodiff() { 2e-6 } else { 2e-4 };
        for vocab in REAL_VOCABULARIES {
            let config = LlamaConfig::new(vocab, d, 0).with_heads(2, 1).with_tie_word_embeddings(false);
            let model = drawn(&config, &device);
            let numbers: Vec<f32> = drawn_numbers(n * d, 3).iter().map(|x| x * 0.6).collect();
            let hidden =
                || Tensor::<2>::from_data(TensorData::new(numbers.clone(), [n, d]), &device).require_grad();
            let targets = [9, vocab - 1, 0, 4_242, 33_333];
            let target_ids = Tensor::<1, Int>::from_data(targets.map(|id| id as i64), &device);
            let rows = Tensor::<1, Int>::zeros([n], &device);
            let weight = wide(&values(model.lm_head.as_ref().unwrap().weight.val()));
            let (loss, to_hidden, to_weight) = in_f64(&wide(&numbers), &weight, &targets);
            assert!(loss > 1.0);
            for frozen in [true, false] {
                let model = if frozen { model.clone().no_grad() } else { model.clone() };
                let hidden = hidden();
                let picked = Picked { hidden: hidden.clone(), rows: rows.clone() };
                let found = chunked(model.head(), &picked, &target_ids, 2);
                // Measured: 1.0e-7 for the loss and 6e-7 for the gradients; 1.1e-5 and 1e-4 without `total`.
                assert!(deviation(&values(found.clone()), &[loss]) < 1e-6, "{vocab} {frozen}");
                let gradients = found.backward();
                let gradient = deviation(&values(hidden.grad(&gradients).unwrap()), &to_hidden);
                assert!(gradient < tolerance, "{vocab} {frozen}: {gradient:e}");
                let of_weight = model.lm_head.as_ref().unwrap().weight.base().grad(&gradients);
                assert_eq!(of_weight.is_none(), frozen);
                if let Some(of_weight) = of_weight {
                    let gradient = deviation(&values(of_weight), &to_weight);
                    assert!(gradient < 2e-6, "{vocab}: {gradient:e}");
                }
                println!("{vocab} {frozen}: {:e} {gradient:e}", deviation(&values(found), &[loss]));
            }
        }
    }

    #[test]
    fn a_quantized_output_layer_has_the_gradient_of_the_numbers_it_stands_for() {
        use burn::tensor::quantization::QuantScheme;
        // A GPU may lack this way to quantize.
        let device = Device::flex().autodiff();
        let mut model = model(&device, false);
        model
            .add_adapter("default", LoraConfig::new(2).with_target_modules(["q_proj", "down_proj"]))
            .unwrap();
        let quantized = |model: &LlamaForCausalLm, packed: bool| {
            let mut model = model.clone();
            let layer = model.lm_head.take().unwrap();
            let weight = layer.weight.val().inner().quantize_dynamic(&QuantScheme::default());
            let weight = if packed { weight } else { weight.dequantize() };
            let weight = Param::from_tensor(Tensor::from_inner(weight)).set_require_grad(false);
            model.lm_head = Some(burn::nn::Linear { weight, bias: None }.into());
            let loss = model.loss(&batch(&device));
            (values(loss.clone()), gradients(&model, loss))
        };
        let ((loss, found), (expected_loss, expected)) = (quantized(&model, true), quantized(&model, false));
        assert_close(&loss, &expected_loss, 1e-4);
        assert_close(&found, &expected, 1e-3);
        assert!(expected.iter().any(|gradient| gradient.abs() > 1e-2));
    }

    #[test]
    fn a_frozen_output_layer_counts_with_whatever_adapter_works_in_it() {
        let device = Device::default().autodiff();
        let mut model = model(&device, false);
        let config = LoraConfig::new(2).with_lora_alpha(6.0).with_target_modules(["lm_head", "q_proj"]);
        add_drawn_adapter(&mut model, "default", &config);
        let batch = batch(&device);
        let bare = values(model.without_adapters().unwrap().loss(&batch));
        let of_hidden = |model: &LlamaForCausalLm, hand: bool| {
            let picked = model.labelled(&batch);
            let hidden = picked.hidden.detach().require_grad();
            let picked = Picked { hidden: hidden.clone(), rows: picked.rows };
            assert!(model.head().frozen_weight().is_some());
            let loss = if hand {
                chunked(model.head(), &picked, &batch.targets, 2)
            } else {
                cross_entropy(model.head().logits_of(picked), batch.targets.clone()) / 3.0
            };
            let gradient = hidden.grad(&loss.clone().backward()).unwrap();
            (values(loss), values(gradient))
        };
        model = model.no_grad();
        let (loss, gradient) = of_hidden(&model, true);
        let (expected_loss, expected) = of_hidden(&model, false);
        assert_close(&loss, &expected_loss, 1e-6);
        assert_close(&gradient, &expected, 1e-6);
        assert!((loss[0] - bare[0]).abs() > 1e-2);
        assert!(gradient.iter().any(|gradient| gradient.abs() > 1e-2));
    }
}
