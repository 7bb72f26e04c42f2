//! Training: sentences of one label come together, those of others go apart.

use anyhow::Result;
use burn::module::Module;
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::activation::log_softmax;
use burn::tensor::{Int, Tensor, TensorData};
use burn_peft_examples::progress::Progress;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use tokenizers::Tokenizer;

use crate::cli::Args;
use crate::data::Sentences;
use crate::encoder::Encoder;
use crate::text;

/// By what similarities are divided. The smaller it is, the more the closest sentences count.
const TEMPERATURE: f64 = 0.1;

/// The supervised contrastive loss of a batch of unit vectors, `[1]`: for each sentence, the mean of
/// `-log softmax(similarity / TEMPERATURE)` over the others of its label, where the softmax is over all others.
pub fn loss(embeddings: Tensor<2>, labels: Tensor<1, Int>) -> Tensor<1> {
    let itself = Tensor::eye(labels.dims()[0], &embeddings.device());
    let same = labels.clone().unsqueeze_dim::<2>(0).equal(labels.unsqueeze_dim(1)).float() - itself.clone();
    let similarity = embeddings.clone().matmul(embeddings.transpose()).div_scalar(TEMPERATURE);
    let log_probability = log_softmax(similarity - itself * 1e9, 1);
    -((log_probability * same.clone()).sum_dim(1) / same.sum_dim(1).clamp_min(1.0)).mean()
}

/// Trains what is trainable in the encoder.
pub fn train(
    mut encoder: Encoder,
    tokenizer: &Tokenizer,
    sentences: &Sentences,
    args: &Args,
) -> Result<Encoder> {
    let device = encoder.devices()[0].clone();
    let mut optimizer = AdamWConfig::new().with_weight_decay(0.0).with_epsilon(1e-8).init();
    let mut random = StdRng::seed_from_u64(args.seed);
    let mut places: Vec<usize> = (0..sentences.texts.len()).collect();
    let steps = places.len().div_ceil(args.batch_size);
    let progress = Progress::new("training", steps * args.epochs);
    let mut means = vec![];
    for epoch in 0..args.epochs {
        places.shuffle(&mut random);
        let mut sum = 0.0;
        for (step, places) in places.chunks(args.batch_size).enumerate() {
            let (texts, labels) = sentences.at(places);
            let batch = text::batch(tokenizer, &texts, &device)?;
            let labels: Vec<i64> = labels.iter().map(|&label| label as i64).collect();
            let labels = Tensor::from_data(TensorData::new(labels, [places.len()]), &device);

            let loss = loss(encoder.embed(batch.ids, batch.mask), labels);
            let number = loss.clone().into_scalar::<f32>();
            let gradients = GradientsParams::from_grads(loss.backward(), &encoder);
            encoder = optimizer.step(args.learning_rate, encoder, gradients);

            sum += f64::from(number);
            progress.report(epoch * steps + step + 1, &format!("loss {number:.3}"));
        }
        means.push(sum / steps as f64);
    }
    progress.finish();
    let means: Vec<String> = means.iter().map(|mean| format!("{mean:.2}")).collect();
    println!("loss      {}", means.join(", "));
    Ok(encoder)
}

/// How well embeddings tell labels apart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Separation {
    /// The share of sentences whose closest other sentence has their label.
    pub nearest: f64,
    /// The mean cosine of two sentences of one label.
    pub same: f64,
    /// The mean cosine of two sentences of different labels.
    pub other: f64,
}

impl Separation {
    /// Of unit vectors, `[sentences, width]`, with their labels.
    pub fn of(embeddings: Tensor<2>, labels: &[usize]) -> Self {
        let n = labels.len();
        let cosines: Vec<f32> =
            embeddings.clone().matmul(embeddings.transpose()).into_data().iter().collect();
        let (mut right, mut same, mut other) = (0, vec![], vec![]);
        for i in 0..n {
            let others = (0..n).filter(|&j| j != i).map(|j| (cosines[i * n + j], labels[i] == labels[j]));
            right +=
                usize::from(others.clone().max_by(|a, b| a.0.total_cmp(&b.0)).is_some_and(|best| best.1));
            for (cosine, is_same) in others {
                if is_same { &mut same } else { &mut other }.push(f64::from(cosine));
            }
        }
        let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len() as f64;
        Self { nearest: right as f64 / n as f64, same: mean(same), other: mean(other) }
    }
}

impl std::fmt::Display for Separation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { nearest, same, other } = self;
        write!(
            f,
            "closest sentence has the same label: {:.1} %; mean cosine {same:.2} within labels, {other:.2} across",
            100.0 * nearest
        )
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn the_loss_is_that_of_the_formula() {
        let device = Device::flex();
        // Cosines: 0.6 of the first two, 0 and 0.8 with the third.
        let embeddings = Tensor::from_data([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], &device);
        let found = loss(embeddings, Tensor::from_data([0, 0, 1], &device)).into_scalar::<f32>();
        let of = |hit: f64, miss: f64| -(hit.exp() / (hit.exp() + miss.exp())).ln();
        let expected = (of(6.0, 0.0) + of(6.0, 8.0)) / 3.0;
        assert!((f64::from(found) - expected).abs() < 1e-6, "{found} {expected}");
    }

    #[test]
    fn separation_counts_neighbours_and_averages_cosines() {
        let embeddings = Tensor::from_data([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], &Device::flex());
        let found = Separation::of(embeddings, &[0, 0, 1]);
        assert!((found.nearest - 1.0 / 3.0).abs() < 1e-6, "{found}");
        assert!((found.same - 0.6).abs() < 1e-6 && (found.other - 0.4).abs() < 1e-6, "{found}");
    }
}
