//! The model: embedding, blocks, output layer.

use burn::module::{Module, Param};
use burn::nn::{Embedding, Initializer, Linear};
use burn::tensor::{Bool, Device, Int, Tensor};
use burn_peft::{LoraEmbedding, LoraLinear, MergeReport, PeftError, PeftModel};
use burn_peft_ops::{CausalMask, activation_dtype, cast};

use crate::attention::Context;
use crate::batch::{Batch, PaddingSide};
use crate::block::LlamaBlock;
use crate::cache::KvCache;
use crate::config::LlamaConfig;
use crate::gradient_checkpointing;
use crate::head::{Head, Picked};
use crate::loss::mean_cross_entropy;
use crate::norm::RmsNorm;
use crate::packing::PackedBatch;
use crate::rope::Rope;
use crate::source::{Fresh, Kind, Source};

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
    #[module(skip)]
    is_gradient_checkpointing: bool,
}

impl LlamaConfig {
    /// A model with random weights: projections and embedding from the normal distribution of standard deviation
    /// [`initializer_range`](Self::initializer_range), norms 1, biases 0. They are drawn when first used; see
    /// [`Device::seed`].
    ///
    /// # Panics
    /// The forward pass panics if the sizes do not fit: `num_key_value_heads` must divide `num_attention_heads` and
    /// `head_dim` must be even. [`LlamaConfig::load`] checks that.
    pub fn init(&self, device: &Device) -> LlamaForCausalLm {
        let weights = Initializer::Normal { mean: 0.0, std: self.initializer_range };
        let Ok(model) = LlamaForCausalLm::build(self, &mut Fresh { device, weights });
        model
    }
}

impl LlamaForCausalLm {
    pub(crate) fn build<S: Source>(config: &LlamaConfig, from: &mut S) -> Result<Self, S::Error> {
        let model = Llama::build(config, from, "model")?;
        let shape = [config.hidden_size, config.vocab_size];
        let lm_head =
            if config.tie_word_embeddings { None } else { Some(from.layer("lm_head", shape, false)?) };
        Ok(Self { model, lm_head, config: config.clone(), is_gradient_checkpointing: false })
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
    /// - input_ids: `[b, s]`
    /// - attention_mask: `[b, s]`
    /// - output: `[b, s, vocab_size]`
    ///
    /// # Panics
    /// If the shapes differ or a token id is not below `vocab_size`.
    pub fn forward(&self, input_ids: Tensor<2, Int>, attention_mask: Option<Tensor<2, Bool>>) -> Tensor<3> {
        self.logits(self.hidden_states(input_ids, attention_mask))
    }

    /// What the output layer reads: the residual stream behind the last block, normalised.
    ///
    /// # Shapes
    /// - input_ids: `[b, s]`
    /// - attention_mask: `[b, s]`, as for [`forward`](Self::forward)
    /// - output: `[b, s, hidden_size]`
    ///
    /// # Panics
    /// As [`forward`](Self::forward).
    pub fn hidden_states(
        &self,
        input_ids: Tensor<2, Int>,
        attention_mask: Option<Tensor<2, Bool>>,
    ) -> Tensor<3> {
        let s = input_ids.dims()[1];
        let mask = CausalMask::new(s, s);
        let mask = match attention_mask {
            Some(tokens) => mask.with_tokens(tokens),
            None => mask,
        };
        self.model.forward(input_ids, mask, None)
    }

    /// Applies the output layer, tied or not.
    ///
    /// # Shapes
    /// - hidden: `[.., hidden_size]`
    /// - output: `[.., vocab_size]`
    ///
    /// # Panics
    /// If the last axis is not `hidden_size`, and if rows of a batch name adapters of the output layer
    /// ([`for_rows`](burn_peft::PeftModel::for_rows)) and the first axis is not that batch.
    pub fn logits<const D: usize>(&self, hidden: Tensor<D>) -> Tensor<D> {
        self.head().logits(hidden)
    }

    /// The output layer.
    pub(crate) fn head(&self) -> Head<'_> {
        match &self.lm_head {
            Some(lm_head) => Head::Own(lm_head),
            None => Head::Tied(&self.model.embed_tokens),
        }
    }

    /// The hidden states at the labelled positions of `batch`.
    pub(crate) fn labelled(&self, batch: &Batch) -> Picked {
        let (ids, mask) = self.input_of(batch);
        self.pick(self.model.forward(ids, mask, None), batch)
    }

    /// The tokens that are computed for a batch, and which of them see which.
    pub(crate) fn input_of(&self, batch: &Batch) -> (Tensor<2, Int>, CausalMask) {
        if let Some(packed) = self.packed(batch) {
            return (packed.input_ids.clone(), CausalMask::of_tree(packed.tree.clone()));
        }
        let [_, s] = batch.shape();
        let mask = CausalMask::new(s, s);
        let mask = match batch.padding_side {
            PaddingSide::Right => mask,
            PaddingSide::Left => mask.with_tokens(batch.attention_mask.clone()),
        };
        (batch.input_ids.clone(), mask)
    }

    /// The hidden states at the labelled positions, of those of [`input_of`](Self::input_of).
    pub(crate) fn pick(&self, hidden: Tensor<3>, batch: &Batch) -> Picked {
        let [_, s] = batch.shape();
        let positions = self.packed(batch).map_or(&batch.positions, |packed| &packed.positions);
        let hidden: Tensor<2> = hidden.flatten(0, 1);
        Picked {
            hidden: hidden.select(0, positions.clone()),
            rows: batch.positions.clone().div_scalar(s as i64),
        }
    }

    /// The batch in one row, unless adapters of rows need the rows.
    fn packed<'a>(&self, batch: &'a Batch) -> Option<&'a PackedBatch> {
        batch.packed.as_ref().filter(|_| self.batch_rows().is_none())
    }

    /// Mean cross-entropy at the labelled positions, `mean(log Σ exp(logits) - logits[target])`, in nats.
    ///
    /// Logits are computed at `batch.positions` only, at most 2²⁴ (64 MiB) at a time. If nothing in the output layer is
    /// trained, which is so with LoRA as a rule, none of them outlives the call. Nor does any if there are more than
    /// 2²⁴ of them and less than a third as many numbers are trained in the output layer: the gradients of the layer
    /// are computed with the loss then, by a `backward` for each part. Otherwise, a trained output layer keeps a number for each logit until `backward`.
    ///
    /// `backward` of the result needs something that is trained: on a model that is frozen, or whose adapters are merged
    /// or inactive, there is no graph and Burn panics. To read losses without training, call
    /// [`valid`](Module::valid) first, as [`evaluate`](crate::evaluate) does: Burn keeps the graph of every loss of a
    /// training model until some `backward` finds it out of use.
    ///
    /// # Shapes
    /// - output: `[1]`
    ///
    /// # Panics
    /// As [`forward`](Self::forward), if a position or target is out of range, and if the batch has no label.
    /// [`Collator::collate`](crate::Collator::collate) makes no such batch.
    pub fn loss(&self, batch: &Batch) -> Tensor<1> {
        if self.is_gradient_checkpointing
            && let Some(loss) = gradient_checkpointing::loss(self, batch)
        {
            return loss;
        }
        mean_cross_entropy(self.head(), self.config.vocab_size, &self.labelled(batch), &batch.targets)
    }

    /// Lets [`loss`](Self::loss) keep the input of each block alone, and compute everything else of a block again when its
    /// gradients are needed (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"): less memory, and up to 1.5
    /// times the time. Off by default. transformers has `gradient_checkpointing_enable`. It works with any device and loop;
    /// Burn's `Device::gradient_checkpointing` computes single operations again.
    ///
    /// `loss` computes the gradients as well, which [`valid`](Module::valid) models do not need, and `backward` of what it
    /// returns hands out a copy of them. If the loss is not scaled before `backward` and there is no dropout, they are
    /// those of before to the last bit, on devices whose sums are. With dropout, the masks differ. A model with merged
    /// adapters computes as before.
    ///
    /// It is a setting of this value, and in no file. [`TrainingConfig`](crate::TrainingConfig) has an option for it that
    /// checkpoints record.
    pub fn set_gradient_checkpointing(&mut self, enabled: bool) {
        self.is_gradient_checkpointing = enabled;
    }

    /// Whether [`set_gradient_checkpointing`](Self::set_gradient_checkpointing) is on.
    pub fn is_gradient_checkpointing(&self) -> bool {
        self.is_gradient_checkpointing
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
    fn build<S: Source>(config: &LlamaConfig, from: &mut S, path: &str) -> Result<Self, S::Error> {
        let shape = [config.vocab_size, config.hidden_size];
        let weight = from.parameter(&format!("{path}.embed_tokens.weight"), shape, Kind::Embedding)?;
        let mut embed_tokens = LoraEmbedding::from(Embedding { weight });
        embed_tokens.set_tied_output(config.tie_word_embeddings);
        let layer = |i| LlamaBlock::build(config, from, &format!("{path}.layers.{i}"));
        let layers = (0..config.num_hidden_layers).map(layer).collect::<Result<_, _>>()?;
        let norm = RmsNorm::build(config, from, &format!("{path}.norm"))?;
        Ok(Self { embed_tokens, layers, norm, rope: Rope::new(&config.rope, config.head_dim) })
    }

    /// The normalised residual stream, `[b, s]` to `[b, s, hidden_size]`.
    pub(crate) fn forward(
        &self,
        input_ids: Tensor<2, Int>,
        mask: CausalMask,
        mut cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let mut x = embed(&self.embed_tokens, input_ids);
        let start = cache.as_ref().map_or(0, |cache| cache.length());
        let context = self.context(&x, start, mask);
        for (i, layer) in self.layers.iter().enumerate() {
            x = layer.forward(x, &context, cache.as_mut().map(|cache| &mut cache.layers[i]));
        }
        self.norm.forward(x)
    }

    /// What all blocks read beside their input `x`, whose first token is at the position `start`.
    pub(crate) fn context(&self, x: &Tensor<3>, start: usize, mask: CausalMask) -> Context {
        let ([_, s, _], device) = (x.dims(), x.device());
        let tables = match mask.tree() {
            Some(tree) => self.rope.tables(0..tree.longest(), &device, x.dtype()).of(tree.position_ids()),
            None => self.rope.tables(start..start + s, &device, x.dtype()),
        };
        Context { tables, mask }
    }
}

/// What the first block reads, `[b, s]` to `[b, s, hidden_size]`.
pub(crate) fn embed(tokens: &LoraEmbedding, input_ids: Tensor<2, Int>) -> Tensor<3> {
    let x = tokens.forward(input_ids);
    let dtype = activation_dtype(&x);
    cast(x, dtype)
}

#[cfg(test)]
mod tests {
    use burn::module::{ModuleVisitor, list_param_ids};

    use super::*;
    use crate::testing::{assert_close, model, values};

    fn mask<const S: usize>(rows: [[bool; S]; 2]) -> Option<Tensor<2, Bool>> {
        Some(Tensor::from_data(rows, &Device::default()))
    }

    fn ids<const B: usize, const S: usize>(rows: [[i64; S]; B]) -> Tensor<2, Int> {
        Tensor::from_data(rows, &Device::default())
    }

    #[test]
    fn a_later_token_changes_nothing_before_it() {
        let model = model(&Device::default(), false);
        let a = model.forward(ids([[1, 2, 3, 4, 5]]), None);
        let b = model.forward(ids([[1, 2, 3, 9, 5]]), None);
        assert_eq!(a.dims(), [1, 5, 13]);
        assert_close(&values(a.clone().narrow(1, 0, 3)), &values(b.clone().narrow(1, 0, 3)), 1e-6);
        let changed = values((a - b).narrow(1, 3, 2).abs().max_dim(2));
        assert!(changed.iter().all(|&change| change > 0.05), "{changed:?}");
    }

    #[test]
    fn padding_on_either_side_changes_no_token() {
        let model = model(&Device::default(), true);
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
        let model = model(&Device::default(), true);
        let input = ids([[1, 2, 3], [1, 2, 3]]);
        let logits = model.forward(input, mask([[true, true, true], [false, true, true]]));
        let change = (logits.clone().narrow(0, 0, 1) - logits.narrow(0, 1, 1)).narrow(1, 2, 1).abs().max();
        assert!(change.into_scalar::<f32>() > 0.05);
    }

    #[test]
    fn untying_copies_the_table_and_keeps_the_logits() {
        let mut model = model(&Device::default(), true);
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
                self.0.push(name.to_string());
            }
            fn exit_module(&mut self, _name: &str, _container: &str) {
                self.0.pop();
            }
            fn visit_float<const D: usize>(&mut self, _param: &Param<Tensor<D>>) {
                self.1.push(self.0.join("."));
            }
        }
        let mut paths = Paths::default();
        model(&Device::default(), false).visit(&mut paths);
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
