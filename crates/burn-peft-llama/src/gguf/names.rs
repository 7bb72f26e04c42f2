//! The names of modules in GGUF files, and their shapes.

use crate::config::LlamaConfig;

/// The module's name in a GGUF file; `None` for a module that llama.cpp does not have.
pub(super) fn module(name: &str) -> Option<String> {
    let of_model = match name {
        "model.embed_tokens" => "token_embd",
        "model.norm" => "output_norm",
        "lm_head" => "output",
        _ => {
            let (layer, of_layer) = name.strip_prefix("model.layers.")?.split_once('.')?;
            let layer: usize = layer.parse().ok()?;
            let of_layer = match of_layer {
                "input_layernorm" => "attn_norm",
                "self_attn.q_proj" => "attn_q",
                "self_attn.k_proj" => "attn_k",
                "self_attn.v_proj" => "attn_v",
                "self_attn.o_proj" => "attn_output",
                "post_attention_layernorm" => "ffn_norm",
                "mlp.gate_proj" => "ffn_gate",
                "mlp.up_proj" => "ffn_up",
                "mlp.down_proj" => "ffn_down",
                _ => return None,
            };
            return Some(format!("blk.{layer}.{of_layer}"));
        }
    };
    Some(of_model.to_string())
}

/// The parameter's name in a GGUF file, with its `weight` or `bias`.
pub(super) fn parameter(name: &str) -> Option<String> {
    let (of, end) = name.rsplit_once('.')?;
    Some(format!("{}.{end}", module(of)?))
}

/// Inputs and outputs of a linear layer, entries and width of an embedding; `None` for a module that the model does not
/// have, and for norms.
pub(super) fn dims(config: &LlamaConfig, name: &str) -> Option<[usize; 2]> {
    let LlamaConfig { vocab_size, hidden_size, intermediate_size, head_dim, .. } = *config;
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    if let Some((layer, _)) = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'))
        && layer.parse().is_ok_and(|layer: usize| layer >= config.num_hidden_layers)
    {
        return None;
    }
    match module(name)?.rsplit('.').next()? {
        "token_embd" => Some([vocab_size, hidden_size]),
        "output" => Some([hidden_size, vocab_size]),
        "attn_q" => Some([hidden_size, heads * head_dim]),
        "attn_k" | "attn_v" => Some([hidden_size, kv_heads * head_dim]),
        "attn_output" => Some([heads * head_dim, hidden_size]),
        "ffn_gate" | "ffn_up" => Some([hidden_size, intermediate_size]),
        "ffn_down" => Some([intermediate_size, hidden_size]),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::parameters::parameters;

    #[test]
    fn every_parameter_has_a_name_of_its_own_and_matrices_their_sizes() {
        let config = LlamaConfig { attention_bias: true, mlp_bias: true, ..LlamaConfig::new(11, 32, 2) };
        let config = LlamaConfig { head_dim: 10, ..config.with_heads(4, 2) };
        let mut names = std::collections::BTreeSet::new();
        for found in parameters(&config.init(&Device::default())) {
            let name = parameter(&found.name).unwrap();
            assert!(names.insert(name.clone()), "{name}");
            if let [rows, columns] = found.shape[..] {
                let is_embedding = found.name == "model.embed_tokens.weight";
                let expected = if is_embedding { [rows, columns] } else { [columns, rows] };
                assert_eq!(dims(&config, found.name.trim_end_matches(".weight")), Some(expected), "{name}");
            }
        }
        assert!(
            names.contains("blk.1.attn_output.bias") && names.contains("output_norm.weight"),
            "{names:?}"
        );
        assert_eq!(module("model.layers.0.mlp.gate"), None);
        assert_eq!(dims(&config, "model.layers.2.mlp.up_proj"), None);
        assert_eq!(dims(&config, "model.norm"), None);
    }
}
