//! Cross-entropy whose gradient is computed with it, so that autodiff keeps no copies of the logits.

#[cfg(feature = "flex")]
mod flex;

use burn::tensor::activation::softmax;
use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor};

use crate::{activation_dtype, cast, in_full_precision, linear, on_kind_of, sum_all};

/// `Σ (log Σ exp(logits) - logits[target])`, the outer sum over the rows, in f32.
///
/// # Shapes
/// - logits: `[n, vocab_size]`
/// - targets: `[n]`
/// - output: `[1]`
///
/// Logits that need a gradient have to be finite: negative infinity gives NaN there, a large negative number what you want.
///
/// # Panics
/// If the shapes do not fit, or on Burn's CPU backend (Flex) if a target is not below `vocab_size`.
pub fn cross_entropy(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    assert_eq!(targets.dims()[0], logits.dims()[0], "number of targets, and of rows of logits");
    let logits = cast(logits, DType::F32);
    if !logits.is_tracked() {
        let device = logits.device();
        return on_kind_of(loss(logits.inner(), targets.inner()), &device);
    }
    // Autodiff would keep several copies of the logits; the gradient is known: softmax minus one at the target.
    let (loss, slope) = loss_and_slope(logits.clone().inner(), targets.inner());
    with_gradient(loss, logits, slope.numbers / slope.total)
}

/// [`cross_entropy`] of `logits = hidden W`, whose gradient with respect to `hidden` is computed at once, so that
/// backward needs no logits: `(softmax(logits) - onehot(targets)) Wᵀ`. `W` gets no gradient.
///
/// Computed by hand on plain tensors: a `backward` here would visit every other graph that exists, and each loss that
/// is only read leaves one behind.
///
/// # Shapes
/// - hidden: `[n, hidden_size]`
/// - logits: `[n, vocab_size]`, without a graph
/// - weight: `W`, `[hidden_size, vocab_size]`, without a graph
/// - targets: `[n]`
/// - output: `[1]`
///
/// # Panics
/// If the shapes do not fit, or on Burn's CPU backend (Flex) if a target is not below `vocab_size`.
pub fn cross_entropy_of_frozen(
    hidden: Tensor<2>,
    logits: Tensor<2>,
    weight: Tensor<2>,
    targets: Tensor<1, Int>,
) -> Tensor<1> {
    assert_eq!(targets.dims()[0], logits.dims()[0], "number of targets, and of rows of logits");
    let (loss, slope) = loss_and_slope(cast(logits, DType::F32), targets.inner());
    let to_logits = cast(slope.numbers, activation_dtype(&weight));
    // Divided where there is less to divide.
    let gradient = in_full_precision(|| linear(to_logits, weight.transpose(), None));
    let gradient = cast(gradient, DType::F32) / slope.total;
    with_gradient(loss, hidden, gradient)
}

/// The gradient of the loss with respect to the logits.
struct Slope {
    /// `total` times the gradient, `[n, vocab_size]`.
    numbers: Tensor<2>,
    /// `[n, 1]`
    total: Tensor<2>,
}

/// The loss summed over the rows, `[1]`, of logits in f32 without autodiff.
fn loss(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    #[cfg(feature = "flex")]
    if flex::has_kernel(&logits) {
        return flex::loss(logits, targets);
    }
    Softmax::of(logits, targets.unsqueeze_dim(1)).loss
}

/// The loss summed over the rows, `[1]`, and its gradient, of logits in f32 without a graph.
fn loss_and_slope(logits: Tensor<2>, targets: Tensor<1, Int>) -> (Tensor<1>, Slope) {
    #[cfg(feature = "flex")]
    if flex::has_kernel(&logits) {
        return flex::loss_and_slope(logits, targets);
    }
    let targets = targets.unsqueeze_dim::<2>(1);
    let Softmax { loss, shares, total } = Softmax::of(logits, targets.clone());
    let numbers = shares.scatter(1, targets, total.clone().neg(), IndexingUpdateOp::Add);
    (loss, Slope { numbers, total })
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
    let linear = (cast(x, DType::F32) * cast(gradient, DType::F32)).sum();
    loss + (linear.clone() - linear.detach())
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::testing::{REAL_VOCABULARIES, deviation, drawn_numbers, values, wide};

    /// Rows of logits like N(0, 2.5²), a target for each, and their probabilities and loss in f64.
    struct Case {
        logits: Tensor<2>,
        targets: Tensor<1, Int>,
        probabilities: Vec<f64>,
        target_ids: Vec<usize>,
        loss: f64,
    }

    impl Case {
        fn new(vocab: usize) -> Self {
            let logits = drawn_numbers(4 * vocab, 2.5, vocab as u64);
            let target_ids = vec![5, 0, vocab - 1, 77];
            let (mut probabilities, mut loss) = (vec![], 0.0);
            for (logits, &target) in wide(&logits).chunks(vocab).zip(&target_ids) {
                let sum: f64 = logits.iter().map(|x| x.exp()).sum();
                loss += sum.ln() - logits[target];
                probabilities.extend(logits.iter().map(|x| x.exp() / sum));
            }
            let device = Device::flex();
            let logits = Tensor::from_data(TensorData::new(logits, [4, vocab]), &device);
            let ids: Vec<i64> = target_ids.iter().map(|&id| id as i64).collect();
            let targets = Tensor::from_data(TensorData::new(ids, [4]), &device);
            Self { logits, targets, probabilities, target_ids, loss }
        }

        #[track_caller]
        fn assert_loss(&self, found: Tensor<1>) {
            assert!(deviation(&wide(&values(found)), &[self.loss]) < 1e-6);
        }

        /// Each probability on its own scale.
        #[track_caller]
        fn assert_probabilities(&self, found: Tensor<2>) {
            let [_, vocab] = found.dims();
            for (found, expected) in values(found.clone()).iter().zip(&self.probabilities) {
                // 1.2e-4 with 128,256 tokens if the sum is left to Burn's softmax; the rounding of `logit - max`, up to
                // 1e-6, is in it.
                let ratio = f64::from(*found) / expected;
                assert!((ratio - 1.0).abs() < 3e-6, "{vocab}: {ratio}");
            }
            for row in values(found).chunks(vocab) {
                let sum: f64 = wide(row).iter().sum();
                assert!((sum - 1.0).abs() < 1e-6, "{vocab}: the probabilities sum to {sum}");
            }
        }
    }

    #[test]
    fn composed_probabilities_of_a_real_vocabulary_are_those_in_f64() {
        for vocab in REAL_VOCABULARIES {
            let case = Case::new(vocab);
            let targets = case.targets.clone().unsqueeze_dim(1);
            let Softmax { loss, shares, total } = Softmax::of(case.logits.clone(), targets);
            case.assert_loss(loss);
            case.assert_probabilities(shares / total);
        }
    }

    #[test]
    fn loss_and_gradient_of_a_real_vocabulary_are_those_in_f64() {
        for vocab in REAL_VOCABULARIES {
            let case = Case::new(vocab);
            case.assert_loss(cross_entropy(case.logits.clone(), case.targets.clone()));
            let logits = Tensor::<2>::from_inner(case.logits.clone()).require_grad();
            let loss = cross_entropy(logits.clone(), Tensor::from_inner(case.targets.clone()));
            let gradient = logits.grad(&loss.clone().backward()).unwrap();
            case.assert_loss(loss.inner());
            let mut gradient = wide(&values(gradient));
            let mut expected = case.probabilities.clone();
            for (row, target) in case.target_ids.iter().enumerate() {
                expected[row * vocab + target] -= 1.0;
            }
            assert!(deviation(&gradient, &expected) < 1e-6);
            // All but those of the targets, which are differences, each on its own scale.
            for (row, target) in case.target_ids.iter().enumerate() {
                gradient[row * vocab + target] = case.probabilities[row * vocab + target];
            }
            let numbers = gradient.iter().map(|x| *x as f32).collect::<Vec<_>>();
            case.assert_probabilities(Tensor::from_data(
                TensorData::new(numbers, [4, vocab]),
                &Device::flex(),
            ));
        }
    }

    #[test]
    fn the_logits_of_somebody_else_stay_as_they_are() {
        let case = Case::new(100);
        let before = values(case.logits.clone());
        let (loss, slope) = loss_and_slope(case.logits.clone(), case.targets.clone());
        case.assert_loss(loss);
        assert_ne!(values(slope.numbers), before);
        assert_eq!(values(case.logits), before);
    }

    #[test]
    fn a_small_loss_is_exact_and_what_is_infinite_shows() {
        let device = Device::flex();
        let of = |row: [f32; 3], target: i64| {
            let targets = Tensor::<1, Int>::from_data([target], &device);
            cross_entropy(Tensor::<2>::from_data([row], &device), targets).into_scalar::<f32>()
        };
        assert!((of([10.0, 0.0, -3.0], 0) / 4.765_959e-5 - 1.0).abs() < 2e-3);
        assert_eq!(of([200.0, 0.0, -3.0], 1), 200.0);
        assert!(of([f32::NAN, 0.0, 1.0], 1).is_nan() && of([f32::INFINITY, 0.0, 1.0], 1).is_nan());
        assert_eq!(of([f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY], 1), 0.0);
        assert_eq!(of([f32::NEG_INFINITY, 0.0, 1.0], 0), f32::INFINITY);
    }

    #[test]
    #[should_panic(expected = "number of targets")]
    fn a_target_too_few_is_refused() {
        let device = Device::flex();
        cross_entropy(Tensor::zeros([4, 3], &device), Tensor::from_data([0, 1, 2], &device));
    }

    #[test]
    fn logits_without_a_graph_may_be_on_any_kind_of_device() {
        let plain = Device::flex();
        for device in [plain.clone().autodiff(), plain.clone().autodiff().gradient_checkpointing()] {
            let case = Case::new(100);
            let on_device = Tensor::<2>::from_data(case.logits.to_data(), &device);
            let targets = Tensor::<1, Int>::from_data(case.targets.to_data(), &device);
            let loss = cross_entropy(on_device.clone(), targets.clone());
            case.assert_loss((loss * Tensor::<1>::ones([1], &device)).inner());
            case.assert_loss(cross_entropy(case.logits.clone(), targets));
            case.assert_loss(cross_entropy(on_device, case.targets.clone()).inner());
        }
    }

    #[cfg(feature = "flex")]
    #[test]
    #[should_panic(expected = "the target 3 is no token: there are 3")]
    fn a_target_outside_of_the_vocabulary_is_named() {
        let device = Device::flex();
        cross_entropy(Tensor::zeros([1, 3], &device), Tensor::from_data([3], &device));
    }
}
