//! Answers of a LLaMA, with adapters or without: `cargo run --release --example generate -- --help`.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]
#![allow(unreachable_pub, reason = "a program has no public interface, its modules have")]

mod cli;
mod logits;
mod speaker;
#[cfg(test)]
mod tests;

use std::io::{BufRead, IsTerminal, Write};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use burn_peft::{LoadOptions, PeftModel};
use burn_peft_examples::{allocator, failure, model};
use burn_peft_llama::{LlamaForCausalLm, Message, Tokenizer};
use clap::Parser;

use crate::cli::Args;
use crate::speaker::Speaker;

/// Composed tensor operations allocate and free large buffers all the time; the system allocator maps and unmaps them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    allocator::keep_freed_memory();
    let (mut input, mut output) = (std::io::stdin().lock(), std::io::stdout().lock());
    failure::exit_code(run(&Args::parse(), &mut input, &mut output).map(|_| ExitCode::SUCCESS))
}

/// Answers the prompt, or each line of `input` as the next turn of a conversation.
fn run(args: &Args, input: &mut impl BufRead, output: &mut impl Write) -> Result<()> {
    let device = args.device.open("generate", args.dtype)?;
    let directory = model::directory(&args.model, "")?;
    let mut tokenizer = Tokenizer::load(&directory)?;
    if let Some(date) = &args.date {
        tokenizer = tokenizer.with_date(date)?;
    }
    let mut model = LlamaForCausalLm::from_pretrained_as(&directory, &device, args.dtype.into())?;
    load_adapters(args, &mut model)?;

    let is_chat = !args.raw && tokenizer.chat_template().is_some();
    if args.system.is_some() && !is_chat {
        bail!(
            "this model has no chat template, so `--system` has no place\nhint: put the text before the prompt"
        );
    }
    if let Some(note) = args.note(model.config().max_position_embeddings) {
        eprintln!("{note}");
    }
    let mut speaker = Speaker::new(&model, &tokenizer, args.options(), output);
    let mut turns: Vec<Message> = args.system.iter().map(Message::system).collect();
    if let Some(prompt) = &args.prompt {
        turns.push(Message::user(prompt));
        let ids = if is_chat {
            tokenizer.encode_prompt(&turns)?
        } else {
            tokenizer.encode_with_special_tokens(prompt)?
        };
        if let Some(path) = &args.logits {
            logits::write(&model, &ids, path)?;
        }
        speaker.answer(ids)?;
    } else {
        let is_terminal = std::io::stdin().is_terminal();
        let mut line = String::new();
        loop {
            if is_terminal {
                eprint!("> ");
            }
            line.clear();
            if input.read_line(&mut line).context("the next turn cannot be read")? == 0 {
                break;
            }
            let text = line.trim();
            if text.is_empty() {
                continue;
            }
            if !is_chat {
                speaker.answer(tokenizer.encode_with_special_tokens(text)?)?;
                continue;
            }
            turns.push(Message::user(text));
            let answer = speaker.answer(tokenizer.encode_prompt(&turns)?)?;
            turns.push(Message::assistant(answer));
        }
    }
    eprintln!("{}", speaker.speed());
    Ok(())
}

/// Loads the adapters and makes all of them active, each with its weight.
fn load_adapters(args: &Args, model: &mut LlamaForCausalLm) -> Result<()> {
    let weights = args.weights()?;
    let names: Vec<String> = (1..=args.adapter.len()).map(|number| format!("adapter-{number}")).collect();
    for ((adapter, name), weight) in args.adapter.iter().zip(&names).zip(weights) {
        let path = model::directory_of_adapter(adapter)?;
        model::adapting(model, |model| model.load_adapter_with(name, &path, &LoadOptions::new()))?;
        model.set_scale(name, weight)?;
    }
    if !names.is_empty() {
        model.set_adapter(&names.iter().map(String::as_str).collect::<Vec<_>>())?;
    }
    Ok(())
}
