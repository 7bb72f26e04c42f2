//! A real pretrained model, on any machine that has one: the same text, tokens, logits and answers as transformers.
//!
//! `BURN_PEFT_SMOLLM2` names the directory of SmolLM2-135M-Instruct, `BURN_PEFT_SMOLLM2_EXPECTED` a JSON list of
//! `{messages, rendered, input_ids, top10_ids, top10_logits, greedy_ids}` that transformers made with it in f32.
//! Run it with `--release`.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor};
use burn_peft_llama::{GenerateOptions, LlamaForCausalLm, Message, Tokenizer};
use burn_peft_tests::tolerance::REAL_LOGITS;
use serde::Deserialize;

const DIRECTORY: &str = "BURN_PEFT_SMOLLM2";
const EXPECTED: &str = "BURN_PEFT_SMOLLM2_EXPECTED";

#[derive(Deserialize)]
struct Conversation {
    messages: Vec<Message>,
    rendered: String,
    input_ids: Vec<u32>,
    top10_ids: Vec<u32>,
    top10_logits: Vec<f64>,
    greedy_ids: Vec<u32>,
}

/// The model's directory and what is expected of it, if there are any.
fn real_model() -> Option<(PathBuf, Vec<Conversation>)> {
    let [directory, expected] = [DIRECTORY, EXPECTED].map(|name| {
        let path = std::env::var_os(name).map(PathBuf::from);
        if path.is_none() {
            println!("skipped: `{name}` is not set");
        }
        path
    });
    let (directory, expected) = (directory?, expected?);
    let text = std::fs::read(&expected).unwrap_or_else(|error| panic!("`{}`: {error}", expected.display()));
    Some((directory, serde_json::from_slice(&text).unwrap()))
}

fn load(directory: &Path) -> LlamaForCausalLm {
    LlamaForCausalLm::from_pretrained(directory, &Device::default()).unwrap()
}

#[test]
fn text_and_tokens_are_those_of_transformers() {
    let Some((directory, conversations)) = real_model() else { return };
    let tokenizer = Tokenizer::load(&directory).unwrap();
    let template = tokenizer.chat_template().unwrap();
    for conversation in &conversations {
        assert_eq!(template.render(&conversation.messages, true).unwrap(), conversation.rendered);
        assert_eq!(tokenizer.encode_prompt(&conversation.messages).unwrap(), conversation.input_ids);
        assert_eq!(tokenizer.decode(&conversation.input_ids, false).unwrap(), conversation.rendered);
    }
    println!("{} conversations", conversations.len());
}

#[test]
fn logits_of_the_next_token_are_those_of_transformers() {
    let Some((directory, conversations)) = real_model() else { return };
    let model = load(&directory);
    let mut worst = 0.0_f64;
    for conversation in &conversations {
        let ids = Tensor::<1, Int>::from_data(conversation.input_ids.as_slice(), &Device::default());
        let hidden = model.hidden_states(ids.unsqueeze(), None);
        let [_, s, h] = hidden.dims();
        let logits = model.logits(hidden.slice([0..1, s - 1..s]).reshape([1, h]));
        let logits: Vec<f64> = logits.into_data().iter().collect();
        for (&id, &expected) in conversation.top10_ids.iter().zip(&conversation.top10_logits) {
            let difference = (logits[id as usize] - expected).abs();
            assert!(
                difference < REAL_LOGITS,
                "{:?}: token {id}: {} for {expected}",
                conversation.messages,
                logits[id as usize]
            );
            worst = worst.max(difference);
        }
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
        assert_eq!(best, Some(conversation.top10_ids[0] as usize), "{:?}", conversation.messages);
    }
    println!("{} conversations, logits deviate by {worst:.1e}", conversations.len());
}

#[test]
fn greedy_answers_are_those_of_transformers_token_for_token() {
    let Some((directory, conversations)) = real_model() else { return };
    let model = load(&directory);
    let stops = &model.config().eos_token_ids;
    let prompts: Vec<Vec<u32>> = conversations.iter().map(|one| one.input_ids.clone()).collect();
    let expected: Vec<Vec<u32>> = conversations
        .iter()
        .map(|one| one.greedy_ids.iter().copied().take_while(|id| !stops.contains(id)).collect())
        .collect();
    let options = GenerateOptions::new().with_max_new_tokens(24);
    // Prompts of different lengths together, so that padding is part of it.
    let answers: Vec<Vec<u32>> =
        prompts.chunks(10).flat_map(|prompts| model.generate(prompts, &options).unwrap()).collect();
    assert_eq!(answers, expected);
    assert_eq!(model.generate(&prompts[..1], &options).unwrap(), expected[..1]);
    println!("{} answers, {} tokens", answers.len(), answers.iter().map(Vec::len).sum::<usize>());
}
