//! Continuing prompts.

use std::ops::ControlFlow;

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use burn_peft::PeftModel;
use burn_peft_ops::CausalMask;

use crate::cache::KvCache;
use crate::error::LlamaError;
use crate::model::LlamaForCausalLm;
use crate::sampler::{Sampler, Sampling};

/// How [`LlamaForCausalLm::generate`] continues prompts.
///
/// ```
/// use burn_peft_llama::{GenerateOptions, Sampling};
///
/// let sampling = Sampling::TopP { temperature: 0.7, top_p: 0.9, top_k: None, seed: 1 };
/// let options = GenerateOptions::new().with_max_new_tokens(32).with_sampling(sampling);
/// assert!(options.stop_token_ids.is_empty());
/// ```
#[non_exhaustive]
#[derive(Config, Debug, PartialEq)]
pub struct GenerateOptions {
    /// Largest number of tokens that are added to a prompt. Default: 128.
    #[config(default = 128)]
    pub max_new_tokens: usize,
    /// Tokens that end a continuation, beside the model's own
    /// [`eos_token_ids`](crate::LlamaConfig::eos_token_ids). Default: none.
    #[config(default = "vec![]")]
    pub stop_token_ids: Vec<u32>,
    /// How the next token is chosen. Default: the most probable one.
    #[config(default = "Sampling::Greedy")]
    pub sampling: Sampling,
}

/// A sequence that is not finished.
#[derive(Clone, Copy)]
struct Row {
    /// Its place in the result.
    prompt: usize,
    /// Number of padding positions before it.
    padding: usize,
}

impl LlamaForCausalLm {
    /// Continues each prompt until a stop token or `options.max_new_tokens`, and returns the new tokens without the
    /// stop token.
    ///
    /// The prompts are run together, padded on the left, and every token is computed once. The adapters that are
    /// active take part, dropout does not, and no graph is built on an autodiff device. With many or long prompts,
    /// call it for some at a time: memory grows with their number times the longest. It grows with the answers as they
    /// are written, so a large `options.max_new_tokens` costs nothing by itself.
    ///
    /// # Errors
    /// - [`LlamaError::EmptyPrompt`] for a prompt without tokens,
    /// - [`LlamaError::TokenOutOfRange`] for a token id that the model does not have,
    /// - [`LlamaError::BatchRows`] if rows of a batch name their adapters
    ///   ([`for_rows`](PeftModel::for_rows)) and there are not as many prompts,
    /// - [`LlamaError::InvalidOption`] for a temperature, `top_p` or `top_k` that makes no sense,
    /// - [`LlamaError::DeviceRead`] if the device fails.
    pub fn generate(
        &self,
        prompts: &[Vec<u32>],
        options: &GenerateOptions,
    ) -> Result<Vec<Vec<u32>>, LlamaError> {
        self.generate_with(prompts, options, |_, _| ControlFlow::Continue(()))
    }

    /// As [`generate`](Self::generate), and tells each token as soon as it is there, with the number of its prompt: to show
    /// an answer while it is written, or to end it with [`ControlFlow::Break`], which ends all of them.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn generate_with(
        &self,
        prompts: &[Vec<u32>],
        options: &GenerateOptions,
        mut on_token: impl FnMut(usize, u32) -> ControlFlow<()>,
    ) -> Result<Vec<Vec<u32>>, LlamaError> {
        self.check(prompts)?;
        let batch_rows = self.batch_rows();
        if let Some(rows) = batch_rows.filter(|&rows| rows != prompts.len()) {
            return Err(LlamaError::BatchRows { rows, prompts: prompts.len() });
        }
        let mut sampler = Sampler::new(&options.sampling)?;
        let mut outputs = vec![vec![]; prompts.len()];
        if prompts.is_empty() || options.max_new_tokens == 0 {
            return Ok(outputs);
        }
        let mut model = self.valid();
        let is_mixed = batch_rows.is_some();
        let device = model.model.embed_tokens.weight.base().device();
        let is_stop =
            |id: &u32| self.config().eos_token_ids.contains(id) || options.stop_token_ids.contains(id);

        let s = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let mut cache = KvCache::new(model.model.layers.len(), s.saturating_add(options.max_new_tokens - 1));
        let mut rows: Vec<Row> =
            prompts.iter().enumerate().map(|(prompt, ids)| Row { prompt, padding: s - ids.len() }).collect();

        let (mut ids, mut mask) = left_padded(prompts, s, &device);
        for step in 0..options.max_new_tokens {
            let hidden = model.model.forward(ids, mask, Some(&mut cache));
            let [b, s, d] = hidden.dims();
            let last = hidden.narrow(1, s - 1, 1).reshape([b, d]);
            let next = sampler.next(model.logits(last))?;

            let mut going = vec![];
            for (i, (row, id)) in rows.iter().zip(&next).enumerate() {
                if !is_stop(id) {
                    outputs[row.prompt].push(*id);
                    going.push(i);
                    if on_token(row.prompt, *id).is_break() {
                        return Ok(outputs);
                    }
                }
            }
            if going.is_empty() || step + 1 == options.max_new_tokens {
                break;
            }
            // What is finished is computed no further.
            if going.len() < rows.len() {
                let kept = going.iter().map(|&i| i as i64).collect();
                cache.keep(&ints(kept, &device));
                if is_mixed {
                    model = model.select_rows(&going)?;
                }
                rows = going.iter().map(|&i| rows[i]).collect();
            }
            let next = going.iter().map(|&i| i64::from(next[i])).collect();
            ids = ints(next, &device).unsqueeze_dim(1);
            mask = mask_of_next(&rows, cache.length() + 1, &device);
        }
        Ok(outputs)
    }

    fn check(&self, prompts: &[Vec<u32>]) -> Result<(), LlamaError> {
        let vocab_size = self.config().vocab_size;
        for (index, prompt) in prompts.iter().enumerate() {
            if prompt.is_empty() {
                return Err(LlamaError::EmptyPrompt { index });
            }
            if let Some(&id) = prompt.iter().find(|&&id| id as usize >= vocab_size) {
                return Err(LlamaError::TokenOutOfRange { index, id, vocab_size });
            }
        }
        Ok(())
    }
}

fn ints(values: Vec<i64>, device: &Device) -> Tensor<1, Int> {
    let n = values.len();
    Tensor::from_data(TensorData::new(values, [n]), device)
}

/// Ids `[b, s]` and what they see.
fn left_padded(prompts: &[Vec<u32>], s: usize, device: &Device) -> (Tensor<2, Int>, CausalMask) {
    let b = prompts.len();
    let (mut ids, mut tokens) = (vec![0_i64; b * s], vec![false; b * s]);
    for (row, prompt) in prompts.iter().enumerate() {
        let start = (row + 1) * s - prompt.len();
        for (i, &id) in prompt.iter().enumerate() {
            ids[start + i] = i64::from(id);
            tokens[start + i] = true;
        }
    }
    let ids = Tensor::from_data(TensorData::new(ids, [b, s]), device);
    (ids, mask_of(CausalMask::new(s, s), tokens, [b, s], device))
}

/// What one new position of each row sees, `t` positions with itself.
fn mask_of_next(rows: &[Row], t: usize, device: &Device) -> CausalMask {
    let tokens = rows.iter().flat_map(|row| (0..t).map(|i| i >= row.padding)).collect();
    mask_of(CausalMask::new(1, t), tokens, [rows.len(), t], device)
}

/// The mask with padding, if there is any.
fn mask_of(mask: CausalMask, tokens: Vec<bool>, shape: [usize; 2], device: &Device) -> CausalMask {
    if !tokens.contains(&false) {
        return mask;
    }
    mask.with_tokens(Tensor::<2, Bool>::from_data(TensorData::new(tokens, shape), device))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{model, values};

    fn greedy(max_new_tokens: usize) -> GenerateOptions {
        GenerateOptions::new().with_max_new_tokens(max_new_tokens)
    }

    /// Every token from a pass over the whole sequence, without cache, padding or batch.
    fn reference(model: &LlamaForCausalLm, prompt: &[u32], count: usize) -> Vec<u32> {
        let mut ids: Vec<i64> = prompt.iter().map(|&id| i64::from(id)).collect();
        for _ in 0..count {
            let s = ids.len();
            let input = ints(ids.clone(), &Device::default()).reshape([1, s]);
            let logits = model.forward(input, None).narrow(1, s - 1, 1);
            ids.push(logits.argmax(2).into_scalar::<i64>());
        }
        ids[prompt.len()..].iter().map(|&id| id as u32).collect()
    }

    fn prompts() -> Vec<Vec<u32>> {
        vec![vec![3, 1, 4, 1, 5], vec![9], vec![12, 6, 5]]
    }

    /// A model that no token stops by itself.
    fn endless(device: &Device) -> LlamaForCausalLm {
        let mut model = model(device, false);
        model.config_mut().eos_token_ids.clear();
        model
    }

    #[test]
    fn the_cache_and_left_padding_change_no_token() {
        let model = endless(&Device::default());
        let found = model.generate(&prompts(), &greedy(8)).unwrap();
        let expected: Vec<_> = prompts().iter().map(|prompt| reference(&model, prompt, 8)).collect();
        assert_eq!(found, expected);
        let distinct: std::collections::BTreeSet<_> = expected.concat().into_iter().collect();
        assert!(distinct.len() > 4, "{expected:?}");
    }

    #[test]
    fn each_row_stops_at_its_own_stop_token_and_the_others_go_on() {
        let mut model = endless(&Device::default());
        let free = model.generate(&prompts(), &greedy(8)).unwrap();
        let (of_config, of_options) = (free[0][2], free[1][3]);
        model.config_mut().eos_token_ids.push(of_config);
        let options = greedy(8).with_stop_token_ids(vec![of_options]);
        let found = model.generate(&prompts(), &options).unwrap();
        let expected: Vec<Vec<u32>> = free
            .iter()
            .map(|ids| ids.iter().copied().take_while(|id| ![of_config, of_options].contains(id)).collect())
            .collect();
        assert_eq!(found, expected);
        assert!(expected[0].len() <= 2 && expected[1].len() <= 3);
        assert!(expected.iter().any(|ids| ids.len() != expected[0].len()), "{expected:?}");
    }

    #[test]
    fn tokens_are_told_as_they_come_until_somebody_ends_it() {
        let model = endless(&Device::default());
        let mut told = vec![vec![]; 3];
        let found = model.generate_with(&prompts(), &greedy(5), |prompt, id| {
            told[prompt].push(id);
            ControlFlow::Continue(())
        });
        assert_eq!(found.unwrap(), told);
        assert_eq!(told, model.generate(&prompts(), &greedy(5)).unwrap());
        let mut count = 0;
        let found = model.generate_with(&prompts(), &greedy(5), |_, _| {
            count += 1;
            if count == 4 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_eq!(found.unwrap(), [&told[0][..2], &told[1][..1], &told[2][..1]]);
    }

    #[test]
    fn an_autodiff_model_and_its_adapter_generate_without_a_graph() {
        use burn_peft::{LoraConfig, PeftModel};
        let device = Device::default().autodiff();
        let mut model = endless(&device);
        let bare = model.generate(&prompts(), &greedy(6)).unwrap();
        assert_eq!(bare, endless(&Device::default()).generate(&prompts(), &greedy(6)).unwrap());
        let config = LoraConfig::new(2).with_lora_alpha(8.0).with_target_modules(["v_proj", "up_proj"]);
        model.add_adapter("default", &config).unwrap();
        struct Fill;
        impl burn::module::ModuleMapper for Fill {
            fn map_float<const D: usize>(
                &mut self,
                param: burn::module::Param<Tensor<D>>,
            ) -> burn::module::Param<Tensor<D>> {
                let trained = param.is_require_grad();
                param.map(|tensor| {
                    if trained { tensor.random_like(burn::tensor::Distribution::Default) } else { tensor }
                })
            }
        }
        model = model.map(&mut Fill);
        let adapted = model.generate(&prompts(), &greedy(6)).unwrap();
        assert_ne!(adapted, bare);
        model.merge_and_unload().unwrap();
        assert_eq!(adapted, model.generate(&prompts(), &greedy(6)).unwrap());
    }

    #[test]
    fn an_early_end_needs_little_whatever_the_maximum() {
        let model = endless(&Device::default());
        let free = model.generate(&prompts(), &greedy(8)).unwrap();
        let stop = free[0][4];
        let options = greedy(usize::MAX).with_stop_token_ids(vec![stop]);
        let found = model.generate(&prompts()[..1], &options).unwrap();
        let expected: Vec<u32> = free[0].iter().copied().take_while(|id| *id != stop).collect();
        assert_eq!(found, [expected]);

        let mut count = 0;
        let found = model.generate_with(&prompts(), &greedy(usize::MAX), |_, _| {
            count += 1;
            if count == 12 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_eq!(found.unwrap(), [&free[0][..4], &free[1][..4], &free[2][..4]]);
    }

    /// The most probable tokens behind a prompt of 3, and all the logits.
    fn continued(model: &LlamaForCausalLm, mut cache: KvCache, count: usize) -> (Vec<i64>, Vec<f32>) {
        let device = Device::default();
        let mut ids = ints(vec![3, 1, 4], &device).reshape([1, 3]);
        let mut mask = CausalMask::new(3, 3);
        let (mut tokens, mut all) = (vec![], vec![]);
        for _ in 0..count {
            let hidden = model.model.forward(ids, mask, Some(&mut cache));
            let [b, s, d] = hidden.dims();
            let logits = model.logits(hidden.narrow(1, s - 1, 1).reshape([b, d]));
            let token = logits.clone().argmax(1).into_scalar::<i64>();
            ids = ints(vec![token], &device).reshape([1, 1]);
            mask = CausalMask::new(1, cache.length() + 1);
            tokens.push(token);
            all.extend(values(logits));
        }
        (tokens, all)
    }

    #[test]
    fn a_cache_that_grows_changes_no_bit() {
        let model = endless(&Device::default());
        let layers = model.model.layers.len();
        // One has room for 4 positions, then 8, 16, 32 and 64; the other for 64 from the start.
        let grown = continued(&model, KvCache::with_headroom(layers, 1, usize::MAX), 50);
        let large = continued(&model, KvCache::with_headroom(layers, 61, 64), 50);
        assert_eq!(grown, large);
        let tokens: Vec<u32> = grown.0.iter().map(|&id| id as u32).collect();
        assert_eq!(tokens, model.generate(&[vec![3, 1, 4]], &greedy(50)).unwrap()[0]);
    }

    #[test]
    fn limits_and_senseless_prompts() {
        let model = endless(&Device::default());
        assert_eq!(model.generate(&prompts(), &greedy(0)).unwrap(), vec![Vec::<u32>::new(); 3]);
        assert_eq!(model.generate(&[], &greedy(4)).unwrap(), Vec::<Vec<u32>>::new());
        assert_eq!(model.generate(&prompts(), &greedy(1)).unwrap()[2].len(), 1);
        let error = |prompt: &[u32]| model.generate(&[vec![1], prompt.to_vec()], &greedy(1)).unwrap_err();
        assert_eq!(error(&[]).to_string(), "prompt 1: expected at least one token, found none");
        assert!(error(&[2, 13]).to_string().starts_with("prompt 1: expected token ids below 13, found 13"));
        let sampling = Sampling::TopP { temperature: -1.0, top_p: 1.0, top_k: None, seed: 0 };
        let options = greedy(1).with_sampling(sampling);
        assert!(matches!(model.generate(&prompts(), &options), Err(LlamaError::InvalidOption { .. })));
    }
}
