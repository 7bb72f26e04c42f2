//! Cross-entropy of the next token.

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{DType, IndexingUpdateOp, Int, Tensor, activation::softmax},
};
use burn_peft::PeftModel;

use crate::{LlamaForCausalLm, sum::sum_all};

/// Bound of the logits that exist at a time, in numbers: 64 MiB of f32.
const CHUNK: usize = 1 << 24;

/// Mean over the positions of `log Σ exp(logits) - logits[target]`.
pub(crate) fn mean_cross_entropy(
    model: &LlamaForCausalLm,
    picked: Picked,
    targets: Tensor<1, Int>,
) -> Tensor<1> {
    chunked(model, picked, targets, (CHUNK / model.config().vocab_size).max(1))
}

/// Hidden states at some positions of a batch.
#[derive(Clone)]
pub(crate) struct Picked {
    /// `[n, hidden_size]`
    pub(crate) hidden: Tensor<2>,
    /// The sequence that each of them belongs to, `[n]`.
    pub(crate) rows: Tensor<1, Int>,
}

impl Picked {
    fn narrow(&self, start: usize, count: usize) -> Self {
        Self {
            hidden: self.hidden.clone().narrow(0, start, count),
            rows: self.rows.clone().narrow(0, start, count),
        }
    }
}

fn chunked(
    model: &LlamaForCausalLm,
    picked: Picked,
    targets: Tensor<1, Int>,
    rows_per_chunk: usize,
) -> Tensor<1> {
    let n = picked.hidden.dims()[0];
    let weight = if picked.hidden.is_tracked() { frozen_weight(model) } else { None };
    let sums = (0..n.max(1)).step_by(rows_per_chunk).map(|start| {
        let rows = rows_per_chunk.min(n - start);
        let picked = picked.narrow(start, rows);
        let targets = targets.clone().narrow(0, start, rows);
        match &weight {
            Some(weight) => through_frozen_head(model, picked, targets, weight.clone()),
            None => sum_cross_entropy(model.logits_of(picked), targets),
        }
    });
    Tensor::cat(sums.collect(), 0).sum() / n as f64
}

/// The gradient with respect to the hidden states is computed at once, so that backward needs no logits.
///
/// By hand and on plain tensors: a graph and a `backward` of its own would visit every other graph that exists, also
/// those that nobody walks any more, whose number grows with every loss that is only read.
fn through_frozen_head(
    model: &LlamaForCausalLm,
    picked: Picked,
    targets: Tensor<1, Int>,
    weight: Tensor<2>,
) -> Tensor<1> {
    let hidden = picked.hidden.clone();
    let plain = Picked { hidden: picked.hidden.inner(), rows: picked.rows.inner() };
    let logits = to_f32(model.logits_of(plain).inner());
    let targets = targets.inner().unsqueeze_dim::<2>(1);
    let Softmax { loss, shares, total } = Softmax::of(logits, targets.clone());
    // `(softmax - onehot) Wᵀ`, divided where there is less to divide.
    let to_logits = shares.scatter(1, targets, total.clone().neg(), IndexingUpdateOp::Add);
    let gradient = to_f32(cast(to_logits, weight.dtype()).matmul(weight.transpose())) / total;
    with_gradient(loss, hidden, gradient)
}

/// Sum over the rows. Logits `[n, vocab_size]`, targets `[n]`.
fn sum_cross_entropy(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let logits = to_f32(logits);
    let targets = targets.unsqueeze_dim::<2>(1);
    if !logits.is_tracked() {
        return Softmax::of(logits, targets).loss;
    }
    // Autodiff would keep several copies of the logits; the gradient is known: softmax minus one at the target.
    let targets = targets.inner();
    let Softmax { loss, shares, total } = Softmax::of(logits.clone().inner(), targets.clone());
    let minus_total = total.clone().neg();
    let gradient = shares.scatter(1, targets, minus_total, IndexingUpdateOp::Add) / total;
    with_gradient(loss, logits, gradient)
}

/// The softmax of logits, and the loss that it gives.
struct Softmax {
    /// Summed over the rows, `[1]`.
    loss: Tensor<1>,
    /// Proportional to the probabilities, `[n, vocab_size]`.
    shares: Tensor<2>,
    /// The sum of each row of `shares`, nearly 1, `[n, 1]`.
    ///
    /// The softmax of Burn's CPU backend (burn-flex 0.22.1) adds up the exponentials one by one in f32: 2.9e-5 off with
    /// 49,152 of them and 1.1e-4 with 128,256, logits from N(0, 2.5²). `sum_dim` is within 2e-7 there, so what the softmax
    /// gives is divided by its own sum. Once its rows sum to 1, this can go.
    total: Tensor<2>,
}

impl Softmax {
    /// Logits `[n, vocab_size]` in f32, targets `[n, 1]`.
    fn of(logits: Tensor<2>, targets: Tensor<2, Int>) -> Self {
        let shares = softmax(logits.clone(), 1);
        let total = shares.clone().sum_dim(1);
        // The largest probability is `exp(max) / Σ exp(logits)`, which gives `log Σ exp(logits)` without another pass of
        // exponentials. The difference of the logits comes first: it is exact where they are close, and the loss small.
        let largest = shares.clone().max_dim(1) / total.clone();
        let loss = (logits.clone().max_dim(1) - logits.gather(1, targets)) - largest.log();
        Self { loss: sum_all(loss), shares, total }
    }
}

/// A tensor of the value of `loss` whose gradient with respect to `x` is `gradient`; both are given without autodiff.
fn with_gradient(loss: Tensor<1>, x: Tensor<2>, gradient: Tensor<2>) -> Tensor<1> {
    // In f32, because a sum that overflows would turn the zero below into `inf - inf`.
    let linear = (to_f32(x) * to_f32(gradient)).sum();
    loss + (linear.clone() - linear.detach())
}

fn to_f32(x: Tensor<2>) -> Tensor<2> {
    cast(x, DType::F32)
}

fn cast(x: Tensor<2>, dtype: DType) -> Tensor<2> {
    if x.dtype() == dtype { x } else { x.cast(dtype) }
}

/// The weight that the output layer multiplies with, without a graph, `[hidden_size, vocab_size]`; `None` if something in
/// the layer is trained, or if it computes with more than one weight because rows of the batch name their adapters.
fn frozen_weight(model: &LlamaForCausalLm) -> Option<Tensor<2>> {
    if is_head_trained(model) {
        return None;
    }
    match &model.lm_head {
        Some(lm_head) if lm_head.batch_rows().is_some() => None,
        // With whatever adapters work there, merged or not.
        Some(lm_head) => Some(dense(lm_head.weight.val().inner())),
        None => Some(dense(model.model.embed_tokens.weight.base().inner()).transpose()),
    }
}

/// The numbers that a quantized weight stands for.
fn dense(weight: Tensor<2>) -> Tensor<2> {
    if weight.dtype().is_float() { weight } else { weight.dequantize() }
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
        None => return model.model.embed_tokens.trains_tied_output(),
    }
    trained.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Collator, Example, LlamaConfig,
        model::tests::{assert_close, drawn, model, values},
    };
    use burn::tensor::{Device, TensorData, activation::log_softmax};
    use burn_peft::LoraConfig;
    use rand::{Rng, SeedableRng, rngs::StdRng};

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
        let picked = Picked { hidden, rows: Tensor::from_data([0, 0, 1, 1, 1], &device) };
        let whole = chunked(&model, picked.clone(), targets.clone(), 100);
        for rows in [1, 2, 5] {
            let parts = chunked(&model, picked.clone(), targets.clone(), rows);
            assert_close(&values(parts), &values(whole.clone()), 1e-6);
        }
    }

    /// The vocabularies of SmolLM2 and Llama 3.
    const REAL: [usize; 2] = [49_152, 128_256];

    fn drawn_numbers(count: usize, seed: u64) -> Vec<f32> {
        let mut rng = StdRng::seed_from_u64(seed);
        // Irwin-Hall, nearly N(0, 2.5²).
        (0..count).map(|_| 2.5 * ((0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0)).collect()
    }

    fn wide(numbers: &[f32]) -> Vec<f64> {
        numbers.iter().copied().map(f64::from).collect()
    }

    /// Largest difference, relative to the largest expected magnitude.
    fn deviation(found: &[f32], expected: &[f64]) -> f64 {
        assert_eq!(found.len(), expected.len());
        let largest = expected.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
        found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max) / largest
    }

    #[test]
    fn probabilities_of_a_real_vocabulary_are_those_in_f64() {
        for vocab in REAL {
            let logits = drawn_numbers(4 * vocab, vocab as u64);
            let targets = [5, 0, vocab - 1, 77];
            let on_device =
                Tensor::<2>::from_data(TensorData::new(logits.clone(), [4, vocab]), &Device::flex());
            let target_ids = Tensor::from_data([[5], [0], [vocab as i64 - 1], [77]], &Device::flex());
            let Softmax { loss, shares, total } = Softmax::of(on_device.clone(), target_ids);
            let found = values(shares / total);
            let mut expected_loss = 0.0;
            for (row, logits) in wide(&logits).chunks(vocab).enumerate() {
                let sum: f64 = logits.iter().map(|x| x.exp()).sum();
                expected_loss += sum.ln() - logits[targets[row]];
                for (found, logit) in found[row * vocab..][..vocab].iter().zip(logits) {
                    let ratio = f64::from(*found) / (logit.exp() / sum);
                    // 1.2e-4 with 128,256 tokens if the sum is left to the softmax; the rounding of `logit - max`, up
                    // to 1e-6, is in it.
                    assert!((ratio - 1.0).abs() < 3e-6, "{vocab}: {ratio}");
                }
                let of_row: f64 = found[row * vocab..][..vocab].iter().copied().map(f64::from).sum();
                assert!((of_row - 1.0).abs() < 1e-6, "{vocab}: the probabilities sum to {of_row}");
            }
            assert!(deviation(&values(loss), &[expected_loss]) < 1e-6);
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
        let device = Device::flex().autodiff();
        let (n, d) = (5, 16);
        for vocab in REAL {
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
                let found = chunked(&model, picked, target_ids.clone(), 2);
                // Measured: 1.0e-7 for the loss and 6e-7 for the gradients; 1.1e-5 and 1e-4 without `total`.
                assert!(deviation(&values(found.clone()), &[loss]) < 1e-6, "{vocab} {frozen}");
                let gradients = found.backward();
                let gradient = deviation(&values(hidden.grad(&gradients).unwrap()), &to_hidden);
                assert!(gradient < 2e-6, "{vocab} {frozen}: {gradient:e}");
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
    fn a_loss_that_is_only_read_takes_no_longer_the_two_hundredth_time() {
        let device = Device::flex().autodiff();
        let mut model = model(&device, true);
        let config = LoraConfig::new(2).with_target_modules(["q_proj", "v_proj", "down_proj"]);
        model.add_adapter("default", &config).unwrap();
        let batch = batch(&device);
        let ten = || {
            let start = std::time::Instant::now();
            for _ in 0..10 {
                values(model.loss(&batch));
            }
            start.elapsed()
        };
        let times: Vec<_> = (0..20).map(|_| ten()).collect();
        // The fastest of some, because other tests run at the same time. With a `backward` inside the loss, the last ten
        // took more than twenty times as long as the first.
        let fastest = |times: &[std::time::Duration]| times.iter().min().copied().unwrap();
        let first = fastest(&times[..3]).max(std::time::Duration::from_millis(5));
        assert!(fastest(&times[17..]) < 4 * first, "{times:?}");
        assert!(!gradients(&model, model.loss(&batch)).is_empty());
    }

    #[test]
    fn a_quantized_output_layer_has_the_gradient_of_the_numbers_it_stands_for() {
        use burn::tensor::quantization::QuantScheme;
        let device = Device::flex().autodiff();
        let mut model = model(&device, false);
        model
            .add_adapter("default", &LoraConfig::new(2).with_target_modules(["q_proj", "down_proj"]))
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
        let device = Device::flex().autodiff();
        let mut model = model(&device, false);
        let config = LoraConfig::new(2)
            .with_lora_alpha(6.0)
            .with_init_lora_weights(burn_peft::InitLoraWeights::Random)
            .with_target_modules(["lm_head", "q_proj"]);
        model.add_adapter("default", &config).unwrap();
        let batch = batch(&device);
        let bare = values(model.without_adapters().unwrap().loss(&batch));
        let of_hidden = |model: &LlamaForCausalLm, hand: bool| {
            let picked = model.labelled(&batch);
            let hidden = picked.hidden.detach().require_grad();
            let picked = Picked { hidden: hidden.clone(), rows: picked.rows };
            assert!(frozen_weight(model).is_some());
            let loss = match hand {
                true => chunked(model, picked, batch.targets.clone(), 2),
                false => sum_cross_entropy(model.logits_of(picked), batch.targets.clone()) / 3.0,
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
