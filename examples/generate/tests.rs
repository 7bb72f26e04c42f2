//! Answers of the base of the experiment.

use std::fs;

use burn::tensor::Device;
use burn_peft::{InitLoraWeights, LoraConfig};
use safetensors::SafeTensors;

use super::*;

/// The base of the experiment, from the directory that examples are tested in.
const BASE: &str = "pokemon/base";

fn answer(more: &[&str], input: &str) -> Result<String> {
    let args = ["generate", "--model", BASE, "--max-new-tokens", "12"];
    let args = Args::try_parse_from(args.iter().chain(more)).unwrap();
    let mut output = vec![];
    run(&args, &mut input.as_bytes(), &mut output)?;
    Ok(String::from_utf8(output)?)
}

#[test]
fn a_prompt_is_answered_and_a_conversation_goes_on() {
    let one = answer(&["--prompt", "Which generation is Squirtle from?"], "").unwrap();
    assert!(!one.trim().is_empty() && one.ends_with('\n'), "{one:?}");
    let turns = "Which generation is Squirtle from?\n\nAnd Oddish?\n";
    let chat = answer(&[], turns).unwrap();
    assert!(chat.starts_with(&one) && chat.lines().count() > one.lines().count(), "{chat:?}");
    let raw = answer(&["--raw", "--prompt", "Squirtle is"], "").unwrap();
    assert_ne!(raw, one);
}

#[test]
fn sampling_follows_its_seed() {
    let drawn = |seed: &str| {
        answer(&["--prompt", "Squirtle", "--temperature", "3", "--top-k", "50", "--seed", seed], "").unwrap()
    };
    assert_eq!(drawn("1"), drawn("1"));
    assert_ne!(drawn("1"), drawn("2"));
    let words = ["generate", "--model", BASE, "--temp", "1", "--max-tokens", "3", "--adapter-path", "a"];
    let args = Args::try_parse_from(words).unwrap();
    assert_eq!((args.temperature, args.max_new_tokens, args.adapter), (1.0, 3, vec!["a".to_string()]));
    // Without a temperature nothing is drawn.
    for (option, value) in [("--top-k", "50"), ("--top-p", "0.5"), ("--seed", "1")] {
        let args = ["generate", "--model", BASE, option, value];
        let text = Args::try_parse_from(args).unwrap_err().to_string();
        assert!(text.contains("--temperature"), "{text}");
    }
}

#[test]
fn adapters_are_summed_with_their_weights_and_logits_are_written() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = LlamaForCausalLm::from_pretrained(BASE, &Device::flex()).unwrap();
    let config = LoraConfig::new(4)
        .with_lora_alpha(40.0)
        .with_init_lora_weights(InitLoraWeights::Random)
        .with_target_modules(["q_proj", "down_proj"]);
    model.add_adapter("one", &config).unwrap();
    model.save_adapter("one", dir.path().join("one")).unwrap();
    // The base ties its output layer to the embedding.
    model.delete_adapter("one").unwrap();
    model.untie_lm_head();
    model.add_adapter("head", config.with_target_modules(["lm_head"])).unwrap();
    model.save_adapter("head", dir.path().join("head")).unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let logits = |name: &str, adapter: &str, weights: &str| {
        let mut more = vec!["--prompt", "Squirtle", "--raw"];
        let file = path(name);
        more.extend(["--logits", &file]);
        if !adapter.is_empty() {
            more.extend(["--adapter", adapter, "--weights", weights]);
        }
        answer(&more, "").unwrap();
        let bytes = fs::read(&file).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let (logits, ids) = (tensors.tensor("logits").unwrap(), tensors.tensor("input_ids").unwrap());
        assert_eq!(logits.shape(), [ids.shape()[0], 2048]);
        logits.data().chunks(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect::<Vec<_>>()
    };
    let furthest = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let one = path("one");
    let base = logits("base", "", "");
    let whole = logits("whole", &one, "1");
    assert!(furthest(&base, &logits("of-head", &path("head"), "1")) > 0.1);
    let halves = logits("halves", &format!("{one},{one}"), "0.25,0.75");
    assert!(furthest(&base, &whole) > 0.1);
    assert!(furthest(&whole, &halves) < 1e-3);
    assert!(furthest(&base, &logits("none", &one, "0")) < 1e-4);
}

/// The base of the experiment, and answers of up to `max_new_tokens` tokens.
fn with_speaker(max_new_tokens: &str, test: impl FnOnce(&Tokenizer, Speaker<'_, Vec<u8>>)) {
    let model = LlamaForCausalLm::from_pretrained(BASE, &Device::flex()).unwrap();
    let tokenizer = Tokenizer::load(BASE).unwrap();
    let args = ["generate", "--model", BASE, "--max-new-tokens", max_new_tokens];
    let options = Args::try_parse_from(args).unwrap().options();
    test(&tokenizer, Speaker::new(&model, &tokenizer, options, vec![]));
}

#[test]
fn more_tokens_than_the_model_was_made_for_are_told_once() {
    with_speaker("1", |_, mut speaker| {
        assert_eq!(speaker.note("this prompt has", 512), None);
        let note = speaker.note("this prompt has", 513).unwrap();
        assert_eq!(note, "note: the model was made for up to 512 tokens, and this prompt has 513");
        assert_eq!(speaker.note("this prompt and its answer have", 600), None);
    });
    // An answer within the length leaves the note for later, and a prompt over it takes it.
    with_speaker("1", |tokenizer, mut speaker| {
        let ids = tokenizer.encode_prompt(&[Message::user("Squirtle")]).unwrap();
        speaker.answer(ids.clone()).unwrap();
        assert!(speaker.note("this prompt has", 513).is_some());
    });
    with_speaker("1", |tokenizer, mut speaker| {
        let ids = tokenizer.encode_prompt(&[Message::user("Squirtle")]).unwrap();
        speaker.answer(ids.iter().copied().cycle().take(513).collect()).unwrap();
        assert_eq!(speaker.note("this prompt has", 514), None);
    });
    let args =
        |most: &str| Args::try_parse_from(["generate", "--model", BASE, "--max-tokens", most]).unwrap();
    assert_eq!(args("512").note(512), None);
    let note = args("600").note(512).unwrap();
    assert_eq!(note, "note: `--max-new-tokens 600`: the model was made for up to 512 tokens");
}

#[test]
fn a_rate_is_told_where_there_is_one() {
    let prompt = [Message::user("Which generation is Squirtle from?")];
    with_speaker("1", |tokenizer, mut speaker| {
        assert_eq!(speaker.speed(), "prompt: 0 tokens; answer: 0 tokens");
        let ids = tokenizer.encode_prompt(&prompt).unwrap();
        for answer in ["answer: 1 token", "answer: 2 tokens"] {
            speaker.answer(ids.clone()).unwrap();
            let speed = speaker.speed();
            assert!(speed.contains(" tokens/s; ") && speed.ends_with(answer), "{speed}");
        }
    });
    with_speaker("4", |tokenizer, mut speaker| {
        speaker.answer(tokenizer.encode_with_special_tokens("Squirtle is").unwrap()).unwrap();
        let speed = speaker.speed();
        assert!(speed.contains("; answer: 4 tokens, ") && speed.ends_with(" tokens/s"), "{speed}");
    });
}

#[test]
fn bad_inputs_are_told_with_the_way_out() {
    let error = |more: &[&str]| failure::text(&answer(more, "").unwrap_err());
    let missing = error(&["--adapter", "nowhere", "--prompt", "a"]);
    assert!(missing.contains("nowhere") && missing.contains("hint:"), "{missing}");
    let weights = error(&["--adapter", "a,b", "--weights", "1", "--prompt", "a"]);
    assert!(weights.contains("as many `--weights` as adapters, 2, found 1"), "{weights}");
    let date = error(&["--date", "x", "--prompt", "a"]);
    assert!(date.contains("invalid date `x`"), "{date}");
}
