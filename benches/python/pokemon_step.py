"""Times training steps of the Pokémon experiment's LoRA arm in torch and peft: the figure to put beside the seconds per
step that `cargo run --release --example pokemon -- --model DIR --arms lora` prints.

usage: python pokemon_step.py MODEL_DIR [--steps 10] [--batch-size 16] [--rank 16] [--dtype f32|bf16] [--threads 2]
       [--save DIR]

Same work as the example: the bare name as the user's turn, the system text of the experiment, loss on the answer and its
end token alone, left padding, every linear layer but the output layer adapted, AdamW, clipping at 1.
"""
import argparse
import csv
import pathlib
import random
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA = pathlib.Path(__file__).parents[2] / "examples/pokemon/data/species.csv"


def examples(tokenizer, system):
    """Token ids and labels of every species' conversation; the prompt is masked with -100."""
    with open(DATA, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            prompt = [{"role": "system", "content": system}, {"role": "user", "content": row["name"]}]
            answer = "/".join(kind for kind in (row["primary"], row["secondary"]) if kind)
            start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            text = start + answer + tokenizer.eos_token
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            masked = len(tokenizer(start, add_special_tokens=False)["input_ids"])
            yield ids, [-100] * masked + ids[masked:]


def batch(rows, pad):
    length = max(len(ids) for ids, _ in rows)
    left = [length - len(ids) for ids, _ in rows]
    return {
        "input_ids": torch.tensor([[pad] * n + ids for n, (ids, _) in zip(left, rows)]),
        "attention_mask": torch.tensor([[0] * n + [1] * len(ids) for n, (ids, _) in zip(left, rows)]),
        "labels": torch.tensor([[-100] * n + labels for n, (_, labels) in zip(left, rows)]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--system", default="You are a Pokémon expert. Answer with the type or types of the given "
                        "Pokémon, separated by a slash, and nothing else. The types are: Normal, Fire, Water, Electric, "
                        "Grass, Ice, Fighting, Poison, Ground, Flying, Psychic, Bug, Rock, Ghost, Dragon, Dark, Steel, Fairy.")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", metavar="DIR", help="keep the adapter, to be evaluated with `pokemon --adapter DIR`")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, lora_dropout=args.dropout,
                        target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-4, weight_decay=0.0)

    rows = list(examples(tokenizer, args.system))
    random.Random(0).shuffle(rows)
    seconds = []
    for step in range(args.steps):
        inputs = batch(rows[step * args.batch_size:(step + 1) * args.batch_size], tokenizer.pad_token_id)
        start = time.perf_counter()
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        print(f"step {step + 1}: loss {loss.item():.4f}, {seconds[-1]:.2f} s", flush=True)
    print(f"median {statistics.median(seconds[1:] or seconds):.2f} s a step, {args.dtype}, {list(inputs['input_ids'].shape)} tokens")
    if args.save:
        model.save_pretrained(args.save)


if __name__ == "__main__":
    main()
