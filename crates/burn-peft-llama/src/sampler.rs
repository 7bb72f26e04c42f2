//! From logits to the next token.

use burn::tensor::{DType, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::error::LlamaError;

/// How the next token is chosen.
#[non_exhaustive]
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub enum Sampling {
    /// The most probable one.
    #[default]
    Greedy,
    /// Drawn at random from `softmax(logits / temperature)`, cut to the most probable tokens: the `top_k` first, and
    /// of them as many as it takes to reach the probability `top_p`.
    TopP {
        /// Positive; below 1 favours the probable tokens.
        temperature: f64,
        /// Above 0, up to 1. 1 cuts nothing.
        top_p: f64,
        /// `None` cuts nothing.
        top_k: Option<usize>,
        /// The same seed gives the same continuation of the same batch.
        seed: u64,
    },
}

/// Chooses tokens; owns the random numbers of one generation.
pub(crate) struct Sampler {
    sampling: Sampling,
    rng: StdRng,
}

impl Sampler {
    pub(crate) fn new(sampling: &Sampling) -> Result<Self, LlamaError> {
        let refuse = |option, expected, found| Err(LlamaError::InvalidOption { option, expected, found });
        let mut first = 0;
        if let Sampling::TopP { temperature, top_p, top_k, seed } = *sampling {
            if !(temperature > 0.0 && temperature.is_finite()) {
                return refuse("temperature", "a positive number", temperature.to_string());
            }
            if !(top_p > 0.0 && top_p <= 1.0) {
                return refuse("top_p", "a number above 0 and up to 1", top_p.to_string());
            }
            if top_k == Some(0) {
                return refuse("top_k", "at least 1", "0".to_string());
            }
            first = seed;
        }
        Ok(Self { sampling: sampling.clone(), rng: StdRng::seed_from_u64(first) })
    }

    /// The next token of each row. `[b, vocab_size]`
    pub(crate) fn next(&mut self, logits: Tensor<2>) -> Result<Vec<u32>, LlamaError> {
        let read = |source| LlamaError::DeviceRead { source: Box::new(source) };
        let Sampling::TopP { temperature, top_p, top_k, .. } = self.sampling else {
            return logits.argmax(1).try_into_vec_as::<u32>().map_err(read);
        };
        let vocab = logits.dims()[1];
        let logits = logits.cast(DType::F32).try_into_vec_as::<f32>().map_err(read)?;
        Ok(logits
            .chunks(vocab)
            .map(|row| sample(row, temperature, top_p, top_k, self.rng.random()))
            .collect())
    }
}

/// The token at `point`, between 0 and 1, of the cumulated probability of the tokens that are left.
fn sample(logits: &[f32], temperature: f64, top_p: f64, top_k: Option<usize>, point: f64) -> u32 {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let by_logit = |&a: &u32, &b: &u32| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b));
    let k = top_k.unwrap_or(order.len());
    if k < order.len() {
        order.select_nth_unstable_by(k, by_logit);
        order.truncate(k);
    }
    order.sort_unstable_by(by_logit);

    let largest = order.first().map_or(0.0, |&id| f64::from(logits[id as usize]));
    let weight = |&id: &u32| ((f64::from(logits[id as usize]) - largest) / temperature).exp();
    let weights: Vec<f64> = order.iter().map(weight).collect();
    let enough = top_p * weights.iter().sum::<f64>();
    let mut sum = 0.0;
    let kept = weights.iter().position(|weight| {
        sum += weight;
        sum >= enough
    });
    let kept = kept.map_or(order.len(), |last| last + 1);

    let mut left = point * weights[..kept].iter().sum::<f64>();
    let drawn = weights[..kept].iter().position(|weight| {
        left -= weight;
        left < 0.0
    });
    order.get(drawn.unwrap_or(kept.saturating_sub(1))).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    // Probabilities 0.1, 0.4, 0.3, 0.2.
    fn logits() -> Vec<f32> {
        [0.1_f32, 0.4, 0.3, 0.2].map(f32::ln).to_vec()
    }

    fn frequencies(temperature: f64, top_p: f64, top_k: Option<usize>) -> [f64; 4] {
        let mut counts = [0.0; 4];
        for i in 0..1000 {
            counts[sample(&logits(), temperature, top_p, top_k, (i as f64 + 0.5) / 1000.0) as usize] += 1e-3;
        }
        counts
    }

    fn assert_close(found: [f64; 4], expected: [f64; 4]) {
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 2e-3), "{found:?} {expected:?}");
    }

    #[test]
    fn tokens_are_drawn_by_their_probability_after_the_cuts() {
        assert_close(frequencies(1.0, 1.0, None), [0.1, 0.4, 0.3, 0.2]);
        assert_close(frequencies(1.0, 1.0, Some(2)), [0.0, 4.0 / 7.0, 3.0 / 7.0, 0.0]);
        // 0.4 + 0.3 reaches 0.65 but not 0.75, which takes the third as well.
        assert_close(frequencies(1.0, 0.65, None), [0.0, 4.0 / 7.0, 3.0 / 7.0, 0.0]);
        assert_close(frequencies(1.0, 0.75, None), [0.0, 4.0 / 9.0, 3.0 / 9.0, 2.0 / 9.0]);
        assert_close(frequencies(1.0, 1e-9, None), [0.0, 1.0, 0.0, 0.0]);
        // p^2, normalised.
        assert_close(frequencies(0.5, 1.0, None), [1.0 / 30.0, 16.0 / 30.0, 9.0 / 30.0, 4.0 / 30.0]);
    }

    #[test]
    fn the_seed_decides_and_greedy_takes_the_largest() {
        let row = Tensor::<1>::from_data(logits().as_slice(), &Device::default()).unsqueeze::<2>();
        let rows = row.repeat_dim(0, 64);
        let draw = |seed| {
            let sampling = Sampling::TopP { temperature: 1.0, top_p: 1.0, top_k: None, seed };
            Sampler::new(&sampling).unwrap().next(rows.clone()).unwrap()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        assert_eq!(Sampler::new(&Sampling::Greedy).unwrap().next(rows.clone()).unwrap(), [1; 64]);
    }

    #[test]
    fn senseless_options_are_named() {
        let error = |temperature, top_p, top_k| {
            Sampler::new(&Sampling::TopP { temperature, top_p, top_k, seed: 0 }).err().unwrap().to_string()
        };
        assert_eq!(error(0.0, 1.0, None), "`temperature`: expected a positive number, found 0");
        assert_eq!(error(1.0, 1.5, None), "`top_p`: expected a number above 0 and up to 1, found 1.5");
        assert_eq!(error(1.0, f64::NAN, None), "`top_p`: expected a number above 0 and up to 1, found NaN");
        assert_eq!(error(1.0, 1.0, Some(0)), "`top_k`: expected at least 1, found 0");
    }
}
