//! Whether other programs load an adapter: by what the sources of peft 0.21.2, vLLM 0.33.0 and llama.cpp at 0c1e57098
//! say.

use std::collections::BTreeSet;

use burn_peft::{AdapterDirectory, Bias, StoredTensor, TensorRole};
use burn_peft_llama::gguf_obstacles;

use crate::numbers::count;

/// The modules of LLaMA and Qwen2 that vLLM adapts.
const LINEAR: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
/// Those that it adapts in LLaMA.
const TABLES: [&str; 2] = ["embed_tokens", "lm_head"];
/// `--max-lora-rank` of vLLM may be one of these, and is 16 where it is not given.
const VLLM_RANKS: [usize; 9] = [1, 8, 16, 32, 64, 128, 256, 320, 512];
const VLLM_DEFAULT_RANK: usize = 16;

/// A line for each program. Of an adapter that this library refuses, nothing is known. `broken` are the keys of tensors
/// with infinities or NaNs.
pub fn lines(adapter: &AdapterDirectory, is_usable: bool, broken: &[String]) -> String {
    let unknown = || "not known: see above for what this library does not read".to_string();
    let [peft, vllm, llama_cpp] = if is_usable {
        [peft(), vllm(adapter, broken), llama_cpp(adapter, broken)]
    } else {
        [unknown(), unknown(), unknown()]
    };
    format!("\nloads in\n  peft       {peft}\n  vLLM       {vllm}\n  llama.cpp  {llama_cpp}\n")
}

fn peft() -> String {
    "yes".into()
}

fn vllm(adapter: &AdapterDirectory, broken: &[String]) -> String {
    let mut reasons: Vec<String> = vec![];
    let Some(config) = adapter.config().as_lora() else {
        return "no: vLLM loads LoRA only".into();
    };
    if config.use_dora {
        reasons.push("it has no DoRA".into());
    }
    let saved = &config.targeting.modules_to_save;
    if !saved.is_empty() {
        reasons.push(format!("`modules_to_save` is {}, and it has updates only", saved.join(", ")));
    }
    if config.bias != Bias::None {
        reasons.push(format!("`bias` is \"{}\", and it has no trained biases", config.bias.as_str()));
    }
    if config.lora_bias {
        reasons.push("it has no `lora_bias`".into());
    }
    if config.trainable_token_indices.is_some() {
        reasons.push("it has no trained tokens".into());
    }
    // It passes over those with `base_layer` in their key, and stops at others without `lora_`.
    let mut of_base = adapter.tensors().iter().filter(|tensor| tensor.role == TensorRole::BaseLayer);
    if let Some(tensor) =
        of_base.find(|tensor| !["lora_", "base_layer"].iter().any(|part| tensor.key.contains(part)))
    {
        reasons.push(format!("`{}` is a weight of the base, and it has updates only", tensor.key));
    }
    let init = config.init_lora_weights.to_string();
    if ["pissa", "olora", "loftq", "corda"].iter().any(|name| init.to_lowercase().starts_with(name)) {
        reasons.push(format!(
            "`init_lora_weights` is \"{init}\", which says that the base was changed; load and save the adapter here or \
             convert it in peft, and it is plain LoRA"
        ));
    }
    let names: Vec<&str> = adapter.modules().iter().map(|module| last(&module.name)).collect();
    let rank = config.rank_pattern.iter().map(|(_, r)| *r).fold(config.r, usize::max);
    let option = VLLM_RANKS.into_iter().find(|largest| *largest >= rank);
    if option.is_none() {
        reasons.push(format!(
            "the rank is {rank}, and its largest is 512: `convert_to_lora` makes a smaller one"
        ));
    }
    if !reasons.is_empty() {
        // Nothing that cannot be merged is to be merged.
        let out = if config.lora_bias || !broken.is_empty() {
            ""
        } else {
            "; merge it with `adapter merge`, and vLLM loads the merged model"
        };
        return format!("no, because {}{out}", reasons.join("; "));
    }
    let mut conditions = vec![];
    if let Some(option) = option.filter(|_| rank > VLLM_DEFAULT_RANK) {
        conditions.push(format!(
            "with `--max-lora-rank {option}`: the rank is {rank}, and the default allows {VLLM_DEFAULT_RANK}"
        ));
    }
    if names.iter().any(|name| TABLES.contains(name)) {
        conditions.push("on a LLaMA: on a Qwen2 it has no update of `embed_tokens` and `lm_head`".into());
    }
    let other = names.iter().find(|name| !is_of_llama(name));
    if let Some(other) = other {
        conditions.push(format!("if it has the model, and `{other}` is a linear layer there"));
    }
    said("yes", &conditions)
}

fn llama_cpp(adapter: &AdapterDirectory, broken: &[String]) -> String {
    let more = |number: usize, noun: &str| match number {
        1 => String::new(),
        n => format!(" ({} more like it)", count(n - 1, noun)),
    };
    // `export` writes the factors, and compares weights of the base. The others it refuses whatever is in them.
    let is_factor =
        |key: &String| adapter.modules().iter().any(|module| [&module.a, &module.b].contains(&key));
    let is_used = |tensor: &&StoredTensor| tensor.role == TensorRole::BaseLayer || is_factor(&tensor.key);
    let used = adapter.tensors().iter().filter(is_used);
    let refused: Vec<&String> = used.map(|tensor| &tensor.key).filter(|key| broken.contains(key)).collect();
    if let Some(first) = refused.first() {
        let more = more(refused.len(), "tensor");
        return format!(
            "no, because a value of `{first}` is infinite or not a number{more}, which `adapter export` refuses; take \
             another adapter, such as an earlier checkpoint"
        );
    }
    let obstacles = gguf_obstacles(adapter);
    if let Some(first) = obstacles.first() {
        let more = more(obstacles.len(), "reason");
        let out = if !broken.is_empty() {
            "it cannot be merged either, as it has infinities or NaNs"
        } else if adapter.modules().iter().all(|module| is_of_llama(&module.name)) {
            "merge it: `adapter export --merged` makes a GGUF file of the merged model"
        } else {
            "`adapter export` writes adapters and models of LLaMA and Qwen2 only"
        };
        return format!("no, because {first}{more}; {out}");
    }
    // Other models have modules of these names, too.
    let mut conditions =
        vec!["on a LLaMA or Qwen2".to_string(), "as a GGUF file, which `adapter export` makes".to_string()];
    if adapter.modules().iter().any(|module| TABLES.iter().any(|table| module.name.ends_with(table))) {
        conditions.push("if the base has a table for each of `embed_tokens` and `lm_head`".into());
    }
    let of_base = adapter.tensors().iter().filter(|tensor| tensor.role == TensorRole::BaseLayer);
    let repeated: BTreeSet<String> = of_base.map(|tensor| format!("`{}`", last(&tensor.module))).collect();
    let repeated: Vec<String> = repeated.into_iter().collect();
    match &repeated[..] {
        [] => {}
        [one] => conditions.push(format!("if {one} in it is the base's")),
        several => conditions.push(format!("if {} in it are the base's", several.join(" and "))),
    }
    said("yes", &conditions)
}

/// Whether a module has the name of one of LLaMA's.
fn is_of_llama(module: &str) -> bool {
    let name = last(module);
    LINEAR.iter().chain(&TABLES).any(|known| *known == name)
}

/// The name of a module in the module that it is in.
fn last(module: &str) -> &str {
    module.rsplit('.').next().unwrap_or(module)
}

fn said(verdict: &str, conditions: &[String]) -> String {
    let told = conditions.iter().map(|condition| format!(", {condition}"));
    verdict.to_string() + &told.collect::<String>()
}
