//! The model: embedding, blocks, output layer.

use std::convert::Infallible;

use burn::{
    module::{Module, Param},
    nn::{Embedding, Initializer, Linear},
    tensor::{Bool, Device, Int, Tensor},
};
use burn_peft::{LoraEmbedding, LoraLinear, MergeReport, PeftError, PeftModel};

use crate::{
    Batch, LlamaAttention, LlamaBlock, LlamaConfig, LlamaMlp, RmsNorm,
    attention::{Context, causal_bias},
    cache::KvCache,
    loss::{self, Picked},
    rope::Rope,
};

/// A LLaMA without its output layer.
#[derive(Module, Debug)]
pub struct Llama {
    /// A vector for each token, `[vocab_size, hidden_size]`.
    pub embed_tokens: LoraEmbedding,
    /// The blocks.
    pub layers: Vec<LlamaBlock>,
    /// The norm behind the blocks.
    pub norm: RmsNorm,
    #[module(skip)]
    rope: Rope,
}

/// LLaMA for causal language modelling.
///
/// The paths of its parameters are the names of Hugging Face checkpoints, such as
/// `model.layers.0.self_attn.q_proj.weight`. All projections are [`LoraLinear`]s, so adapters work on activations.
///
/// Forward passes compute no gradients on a plain device; on an autodiff device they build the graph as any Burn
/// module does.
#[derive(Module, Debug)]
pub struct LlamaForCausalLm {
    /// Everything before the output layer.
    pub model: Llama,
    /// The output layer, `hidden_size` to `vocab_size`. `None`: it is the embedding table.
    pub lm_head: Option<LoraLinear>,
    #[module(skip)]
    config: LlamaConfig,
}

/// Where the parameters of a new model come from, by their path.
pub(crate) trait ParameterSource {
    type Error;
    /// A matrix that multiplies from the right. `[d_in, d_out]`
    fn linear(&mut self, path: &str, shape: [usize; 2]) -> Result<Param<Tensor<2>>, Self::Error>;
    /// `[n, d]`
    fn embedding(&mut self, path: &str, shape: [usize; 2]) -> Result<Param<Tensor<2>>, Self::Error>;
    /// `[d]`
    fn norm(&mut self, path: &str, d: usize) -> Result<Param<Tensor<1>>, Self::Error>;
    /// `[d]`
    fn bias(&mut self, path: &str, d: usize) -> Result<Param<Tensor<1>>, Self::Error>;
}

/// Random parameters, made when they are first used.
struct Fresh<'a> {
    device: &'a Device,
    weights: Initializer,
}

impl ParameterSource for Fresh<'_> {
    type Error = Infallible;

    fn linear(&mut self, _path: &str, shape: [usize; 2]) -> Result<Param<Tensor<2>>, Infallible> {
        Ok(self.weights.init(shape, self.device))
    }

    fn embedding(&mut self, _path: &str, shape: [usize; 2]) -> Result<Param<Tensor<2>>, Infallible> {
        Ok(self.weights.init(shape, self.device))
    }

    fn norm(&mut self, _path: &str, d: usize) -> Result<Param<Tensor<1>>, Infallible> {
        Ok(Initializer::Ones.init([d], self.device))
    }

    fn bias(&mut self, _path: &str, d: usize) -> Result<Param<Tensor<1>>, Infallible> {
        Ok(Initializer::Zeros.init([d], self.device))
    }
}

impl LlamaConfig {
    /// A model with random weights: projections and embedding from the normal distribution of standard deviation
    /// [`initializer_range`](Self::initializer_range), norms 1, biases 0. They are drawn when first used; see
    /// [`Device::seed`].
    ///
    /// # Panics
    ///
    /// The forward pass panics if the sizes do not fit: `num_key_value_heads` must divide `num_attention_heads` and
    /// `head_dim` must be even. [`LlamaConfig::load`] checks that.
    pub fn init(&self, device: &Device) -> LlamaForCausalLm {
        let weights = Initializer::Normal { mean: 0.0, std: self.initializer_range };
        let Ok(model) = LlamaForCausalLm::build(self, &mut Fresh { device, weights });
        model
    }
}

impl LlamaForCausalLm {
    pub(crate) fn build<S: ParameterSource>(config: &LlamaConfig, source: &mut S) -> Result<Self, S::Error> {
        let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
        let queries = config.num_attention_heads * config.head_dim;
        let keys = config.num_key_value_heads * config.head_dim;
        let linear = |source: &mut S, path: String, shape, with_bias: bool| {
            let weight = source.linear(&format!("{path}.weight"), shape)?;
            let bias = with_bias.then(|| source.bias(&format!("{path}.bias"), shape[1])).transpose()?;
            Ok(LoraLinear::from(Linear { weight, bias }))
        };
        let norm = |source: &mut S, path: &str| {
            let weight = source.norm(&format!("{path}.weight"), hidden)?;
            Ok(RmsNorm::new(weight, config.rms_norm_eps))
        };

        let weight = source.embedding("model.embed_tokens.weight", [config.vocab_size, hidden])?;
        let mut embed_tokens = LoraEmbedding::from(Embedding { weight });
        embed_tokens.set_tied_output(config.tie_word_embeddings);
        let mut layers = Vec::new();
        for i in 0..config.num_hidden_layers {
            let path = format!("model.layers.{i}");
            let attention = |source: &mut S, name: &str, shape| {
                linear(source, format!("{path}.self_attn.{name}"), shape, config.attention_bias)
            };
            let mlp = |source: &mut S, name: &str, shape| {
                linear(source, format!("{path}.mlp.{name}"), shape, config.mlp_bias)
            };
            let projections = [
                attention(source, "q_proj", [hidden, queries])?,
                attention(source, "k_proj", [hidden, keys])?,
                attention(source, "v_proj", [hidden, keys])?,
                attention(source, "o_proj", [queries, hidden])?,
            ];
            layers.push(LlamaBlock {
                self_attn: LlamaAttention::new(projections, config.num_key_value_heads, config.head_dim),
                mlp: LlamaMlp {
                    gate_proj: mlp(source, "gate_proj", [hidden, ffn])?,
                    up_proj: mlp(source, "up_proj", [hidden, ffn])?,
                    down_proj: mlp(source, "down_proj", [ffn, hidden])?,
                },
                input_layernorm: norm(source, &format!("{path}.input_layernorm"))?,
                post_attention_layernorm: norm(source, &format!("{path}.post_attention_layernorm"))?,
            });
        }
        let norm = norm(source, "model.norm")?;
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(linear(source, "lm_head".to_owned(), [hidden, config.vocab_size], false)?),
        };
        let model = Llama { embed_tokens, layers, norm, rope: Rope::new(config) };
        Ok(Self { model, lm_head, config: config.clone() })
    }

    /// The hyperparameters.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Changes hyperparameters that the weights do not depend on, such as
    /// [`eos_token_ids`](LlamaConfig::eos_token_ids); [`save_pretrained`](Self::save_pretrained) writes them.
    pub fn config_mut(&mut self) -> &mut LlamaConfig {
        &mut self.config
    }

    /// The logits of the next token at every position.
    ///
    /// `attention_mask` is `true` at tokens and `false` at padding, which may stand on either side: tokens never see
    /// it. Positions count from the start of the padded sequence, as in transformers; because rotary embeddings
    /// depend on distances alone, padding on the left changes nothing. The logits at padding are meaningless.
    ///
    /// For the loss, [`loss`](Self::loss) is cheaper: it computes logits only where a label is.
    ///
    /// # Shapes
    ///
    /// - input_ids: `[b, s]`
    /// - attention_mask: `[b, s]`
    /// - output: `[b, s, vocab_size]`
    ///
    /// # Panics
    ///
    /// If the shapes differ or a token id is not below `vocab_size`.
    pub fn forward(&self, input_ids: Tensor<2, Int>, attention_mask: Option<Tensor<2, Bool>>) -> Tensor<3> {
        self.logits(self.hidden_states(input_ids, attention_mask))
    }

    /// What the output layer reads: the residual stream behind the last block, normalised.
    ///
    /// # Shapes
    ///
    /// - input_ids: `[b, s]`
    /// - attention_mask: `[b, s]`, as for [`forward`](Self::forward)
    /// - output: `[b, s, hidden_size]`
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward).
    pub fn hidden_states(
        &self,
        input_ids: Tensor<2, Int>,
        attention_mask: Option<Tensor<2, Bool>>,
    ) -> Tensor<3> {
        let s = input_ids.dims()[1];
        let bias = causal_bias(attention_mask, s, &input_ids.device());
        self.model.forward(input_ids, bias, None)
    }

    /// Applies the output layer, tied or not.
    ///
    /// # Shapes
    ///
    /// - hidden: `[.., hidden_size]`
    /// - output: `[.., vocab_size]`
    ///
    /// # Panics
    ///
    /// If the last axis is not `hidden_size`, and if rows of a batch name adapters of the output layer
    /// ([`for_rows`](burn_peft::PeftModel::for_rows)) and the first axis is not that batch.
    pub fn logits<const D: usize>(&self, hidden: Tensor<D>) -> Tensor<D> {
        match &self.lm_head {
            Some(lm_head) => lm_head.forward(hidden),
            // The table below the embedding's adapters, as in PEFT, with the tokens that are trained at both ends.
            None => {
                let mut shape = hidden.dims();
                let [vocab_size, d] = self.model.embed_tokens.weight.base().dims();
                let n: usize = shape[..D - 1].iter().product();
                shape[D - 1] = vocab_size;
                self.model.embed_tokens.tied_output(hidden.reshape([n, d])).reshape(shape)
            }
        }
    }

    /// The hidden states at the labelled positions of `batch`.
    pub(crate) fn labelled(&self, batch: &Batch) -> Picked {
        let hidden = self.hidden_states(batch.input_ids.clone(), Some(batch.attention_mask.clone()));
        let [b, s, d] = hidden.dims();
        Picked {
            hidden: hidden.reshape([b * s, d]).select(0, batch.positions.clone()),
            rows: batch.positions.clone().div_scalar(s as i64),
        }
    }

    /// Applies the output layer to hidden states that were picked from a batch. `[n, vocab_size]`
    pub(crate) fn logits_of(&self, picked: Picked) -> Tensor<2> {
        match &self.lm_head {
            Some(lm_head) => lm_head.forward_rows(picked.hidden, &picked.rows),
            None => self.logits(picked.hidden),
        }
    }

    /// Mean cross-entropy at the labelled positions, `mean(log Σ exp(logits) - logits[target])`, in nats.
    ///
    /// Logits are computed at `batch.positions` only, a bounded number of rows at a time. If nothing in the output
    /// layer is trained, which is so with LoRA, none of them outlives the call.
    ///
    /// `backward` of the result needs something that is trained: on a model that is frozen, or whose adapters are merged
    /// or inactive, there is no graph and Burn panics. To read losses without training, call
    /// [`valid`](Module::valid) first, as [`evaluate`](crate::evaluate) does: Burn keeps the graph of every loss of a
    /// training model until some `backward` finds it out of use.
    ///
    /// # Shapes
    ///
    /// - output: `[1]`
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward), if a position or target is out of range, and if the batch has no label.
    /// [`Collator::collate`](crate::Collator::collate) makes no such batch.
    pub fn loss(&self, batch: &Batch) -> Tensor<1> {
        loss::mean_cross_entropy(self, self.labelled(batch), batch.targets.clone())
    }

    /// Gives the output layer a weight of its own, a copy of the embedding table, if it has none. Adapting or
    /// training the output layer then leaves the embedding alone.
    pub fn untie_lm_head(&mut self) {
        if self.lm_head.is_some() {
            return;
        }
        let embedding = &self.model.embed_tokens.weight;
        let table = embedding.base();
        let trained = table.is_require_grad();
        let [vocab, hidden] = table.dims();
        // Multiplying by one writes the copy in the new order.
        let table = table.detach().set_require_grad(false);
        let weight = (table.transpose() * 1.0).reshape([hidden, vocab]);
        let weight = Param::from_tensor(weight).set_require_grad(trained);
        self.lm_head = Some(Linear { weight, bias: None }.into());
        self.config.tie_word_embeddings = false;
        self.model.embed_tokens.set_tied_output(false);
    }

    /// Folds the active adapters into the weights and removes every adapter, as
    /// [`PeftModel::merge_and_unload`](burn_peft::PeftModel::merge_and_unload) does with any model.
    ///
    /// If an adapter changes the embedding and the output layer is tied to it, the output layer first gets a weight of its
    /// own ([`untie_lm_head`](Self::untie_lm_head)): it reads the table below the adapter, before and after. So the merged
    /// model computes what the adapted one does, also after [`save_pretrained`](Self::save_pretrained) and loading. PEFT
    /// does so for `modules_to_save`; there an adapter of low rank on the embedding changes the output layer too.
    ///
    /// # Errors
    ///
    /// As of the method for any model; the model stays as it was.
    pub fn merge_and_unload(&mut self) -> Result<MergeReport, PeftError> {
        match PeftModel::merge_and_unload(self) {
            Err(PeftError::TiedOutput { .. }) => {
                let mut untied = self.clone();
                untied.untie_lm_head();
                let report = PeftModel::merge_and_unload(&mut untied)?;
                *self = untied;
                Ok(report)
            }
            merged => merged,
        }
    }
}

impl Llama {
    /// The normalised residual stream. `[b, s]`, bias `[b or 1, 1, 1, s, t]`, to `[b, s, hidden_size]`.
    pub(crate) fn forward(
        &self,
        input_ids: Tensor<2, Int>,
        bias: Option<Tensor<5>>,
        mut cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let (s, device) = (input_ids.dims()[1], input_ids.device());
        let mut x = self.embed_tokens.forward(input_ids);
        let start = cache.as_ref().map_or(0, |cache| cache.length());
        let tables = self.rope.tables(start..start + s, &device, x.dtype());
        let context = Context { tables, bias };
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(x, &context, cache.as_mut().map(|cache| &mut cache.layers[i]));
        }
        self.norm.forward(x)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use burn::module::{ModuleVisitor, list_param_ids};
    use burn::tensor::TensorData;
    use rand::{Rng, SeedableRng, rngs::StdRng};

    pub(crate) fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.into_data().iter::<f32>().collect()
    }

    #[track_caller]
    pub(crate) fn assert_close(found: &[f32], expected: &[f32], tolerance: f32) {
        assert_eq!(found.len(), expected.len());
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert!((found - expected).abs() <= tolerance, "{i}: {found} {expected}");
        }
    }

    /// Parameters from a generator of its own: the device's is shared with tests that run at the same time.
    struct Drawn<'a> {
        device: &'a Device,
        rng: StdRng,
    }

    impl Drawn<'_> {
        /// Uniform numbers around `middle`, large enough for logits to differ.
        fn draw<const D: usize>(&mut self, shape: [usize; D], middle: f32, width: f32) -> Param<Tensor<D>> {
            let count = shape.iter().product();
            let values: Vec<f32> =
                (0..count).map(|_| middle + width * (self.rng.random::<f32>() - 0.5)).collect();
            Param::from_data(TensorData::new(values, shape), self.device)
        }
    }

    impl ParameterSource for Drawn<'_> {
        type Error = Infallible;

        fn linear(&mut self, _path: &str, shape: [usize; 2]) -> Result<Param<Tensor<2>>, Infallible> {
            Ok(self.draw(shape, 0.0, 1.4))
        }

        fn embedding(&mut self, _path: &str, shape: [usize; 2]) -> Result<Param<Tensor<2>>, Infallible> {
            Ok(self.draw(shape, 0.0, 1.4))
        }

        fn norm(&mut self, _path: &str, d: usize) -> Result<Param<Tensor<1>>, Infallible> {
            Ok(self.draw([d], 1.0, 0.4))
        }

        fn bias(&mut self, _path: &str, d: usize) -> Result<Param<Tensor<1>>, Infallible> {
            Ok(self.draw([d], 0.0, 0.4))
        }
    }

    /// Always the same model.
    pub(crate) fn model(device: &Device, tied: bool) -> LlamaForCausalLm {
        let config = LlamaConfig::new(13, 16, 2).with_heads(4, 2).with_intermediate_size(24);
        drawn(&config.with_tie_word_embeddings(tied), device)
    }

    /// Always the same model for a configuration.
    pub(crate) fn drawn(config: &LlamaConfig, device: &Device) -> LlamaForCausalLm {
        let Ok(model) =
            LlamaForCausalLm::build(config, &mut Drawn { device, rng: StdRng::seed_from_u64(17) });
        model
    }

    fn mask<const S: usize>(rows: [[bool; S]; 2]) -> Option<Tensor<2, Bool>> {
        Some(Tensor::from_data(rows, &Device::flex()))
    }

    fn ids<const B: usize, const S: usize>(rows: [[i64; S]; B]) -> Tensor<2, Int> {
        Tensor::from_data(rows, &Device::flex())
    }

    #[test]
    fn a_later_token_changes_nothing_before_it() {
        let model = model(&Device::flex(), false);
        let a = model.forward(ids([[1, 2, 3, 4, 5]]), None);
        let b = model.forward(ids([[1, 2, 3, 9, 5]]), None);
        assert_eq!(a.dims(), [1, 5, 13]);
        assert_close(&values(a.clone().narrow(1, 0, 3)), &values(b.clone().narrow(1, 0, 3)), 1e-6);
        let changed = values((a - b).narrow(1, 3, 2).abs().max_dim(2));
        assert!(changed.iter().all(|&change| change > 0.05), "{changed:?}");
    }

    #[test]
    fn padding_on_either_side_changes_no_token() {
        let model = model(&Device::flex(), true);
        let alone = values(model.forward(ids([[7, 3, 5]]), None));
        let right = mask([[true; 5], [true, true, true, false, false]]);
        let left = mask([[true; 5], [false, false, true, true, true]]);
        let right = model.forward(ids([[1, 2, 3, 4, 5], [7, 3, 5, 0, 0]]), right);
        let left = model.forward(ids([[1, 2, 3, 4, 5], [0, 0, 7, 3, 5]]), left);
        assert!(values(right.clone()).iter().chain(&values(left.clone())).all(|x| x.is_finite()));
        assert_close(&values(right.clone().narrow(0, 1, 1).narrow(1, 0, 3)), &alone, 1e-5);
        assert_close(&values(left.clone().narrow(0, 1, 1).narrow(1, 2, 3)), &alone, 1e-5);
        assert_close(&values(right.narrow(0, 0, 1)), &values(left.narrow(0, 0, 1)), 1e-5);
    }

    #[test]
    fn the_mask_matters() {
        let model = model(&Device::flex(), true);
        let input = ids([[1, 2, 3], [1, 2, 3]]);
        let logits = model.forward(input, mask([[true, true, true], [false, true, true]]));
        let change = (logits.clone().narrow(0, 0, 1) - logits.narrow(0, 1, 1)).narrow(1, 2, 1).abs().max();
        assert!(change.into_scalar::<f32>() > 0.05);
    }

    #[test]
    fn untying_copies_the_table_and_keeps_the_logits() {
        let mut model = model(&Device::flex(), true);
        let before = values(model.forward(ids([[1, 2, 3]]), None));
        let parameters = list_param_ids(&model).len();
        model.untie_lm_head();
        assert_close(&values(model.forward(ids([[1, 2, 3]]), None)), &before, 1e-6);
        assert_eq!(list_param_ids(&model).len(), parameters + 1);
        assert!(!model.config().tie_word_embeddings);
        model.untie_lm_head();
        assert_eq!(list_param_ids(&model).len(), parameters + 1);
    }

    #[test]
    fn parameter_paths_are_the_names_of_hugging_face() {
        #[derive(Default)]
        struct Paths(Vec<String>, Vec<String>);
        impl ModuleVisitor for Paths {
            fn enter_module(&mut self, name: &str, _container: &str) {
                self.0.push(name.to_owned());
            }
            fn exit_module(&mut self, _name: &str, _container: &str) {
                self.0.pop();
            }
            fn visit_float<const D: usize>(&mut self, _param: &Param<Tensor<D>>) {
                self.1.push(self.0.join("."));
            }
        }
        let mut paths = Paths::default();
        model(&Device::flex(), false).visit(&mut paths);
        let of_layer = paths.1.iter().filter_map(|path| path.strip_prefix("model.layers.1."));
        let mut of_layer: Vec<_> = of_layer.collect();
        of_layer.sort_unstable();
        let expected = [
            "input_layernorm.weight",
            "mlp.down_proj.weight",
            "mlp.gate_proj.weight",
            "mlp.up_proj.weight",
            "post_attention_layernorm.weight",
            "self_attn.k_proj.weight",
            "self_attn.o_proj.weight",
            "self_attn.q_proj.weight",
            "self_attn.v_proj.weight",
        ];
        assert_eq!(of_layer, expected);
        let outer: Vec<_> = paths.1.iter().filter(|path| !path.contains("layers")).collect();
        assert_eq!(outer, ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]);
    }
}
