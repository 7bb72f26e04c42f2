//! Cross-entropy whose gradient is computed with it, so that autodiff keeps no copies of the logits.

use burn::tensor::activation::softmax;
use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor};
use burn_peft::linear;

use super::cast;
use super::sum::sum_all;

/// `Σ (log Σ exp(logits) - logits[target])`, the outer sum over the rows, in f32.
///
/// # Shapes
/// - logits: `[n, vocab_size]`
/// - targets: `[n]`
/// - output: `[1]`
pub(crate) fn cross_entropy(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let logits = cast(logits, DType::F32);
    let targets = targets.unsqueeze_dim::<2>(1);
    if !logits.is_tracked() {
        return Softmax::of(logits, targets).loss;
    }
    // Autodiff would keep several copies of the logits; the gradient is known: softmax minus one at the target.
    let targets = targets.inner();
    let softmax = Softmax::of(logits.clone().inner(), targets.clone());
    let (loss, total) = (softmax.loss.clone(), softmax.total.clone());
    with_gradient(loss, logits, softmax.gradient(targets) / total)
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
pub(crate) fn cross_entropy_of_frozen(
    hidden: Tensor<2>,
    logits: Tensor<2>,
    weight: Tensor<2>,
    targets: Tensor<1, Int>,
) -> Tensor<1> {
    let targets = targets.inner().unsqueeze_dim::<2>(1);
    let softmax = Softmax::of(cast(logits, DType::F32), targets.clone());
    let (loss, total) = (softmax.loss.clone(), softmax.total.clone());
    // Divided where there is less to divide.
    let to_logits = cast(softmax.gradient(targets), weight.dtype());
    let gradient = cast(linear(to_logits, weight.transpose(), None), DType::F32) / total;
    with_gradient(loss, hidden, gradient)
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

    /// `total` times the gradient of the loss with respect to the logits. Targets `[n, 1]`.
    fn gradient(self, targets: Tensor<2, Int>) -> Tensor<2> {
        self.shares.scatter(1, targets, self.total.neg(), IndexingUpdateOp::Add)
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

    #[test]
    fn probabilities_of_a_real_vocabulary_are_those_in_f64() {
        for vocab in REAL_VOCABULARIES {
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
}
