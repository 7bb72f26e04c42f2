"""Tokens per second of transformers' `generate`, on what `cargo bench --bench generation` measures: a model of SmolLM2-135M's
shape with random weights, prompts of 103 tokens, 64 more, greedily. Prints a line of JSON for each batch and type.

usage: python answers.py [--batches 1 8] [--dtypes f32 bf16] [--rounds 3]
"""
import argparse
import json
import os
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

PROMPT, ANSWER = 103, 64


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", choices=["f32", "bf16"], default=["f32", "bf16"])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=49152, hidden_size=576, num_hidden_layers=30, intermediate_size=1536,
                         num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
                         max_position_embeddings=2048, eos_token_id=None, pad_token_id=0)
    for dtype in args.dtypes:
        model = LlamaForCausalLM(config).to({"f32": torch.float32, "bf16": torch.bfloat16}[dtype]).eval()
        for batch in args.batches:
            ids = torch.tensor([[(row * 7919 + i * 104729) % 49152 for i in range(PROMPT)] for row in range(batch)])
            model.generate(ids, max_new_tokens=2, do_sample=False)
            seconds = []
            for _ in range(args.rounds):
                start = time.perf_counter()
                output = model.generate(ids, max_new_tokens=ANSWER, do_sample=False)
                seconds.append(time.perf_counter() - start)
            assert output.shape[1] == PROMPT + ANSWER
            print(json.dumps({"case": f"generate-{batch}", "dtype": dtype, "seconds": statistics.median(seconds),
                              "tokens_per_second": batch * ANSWER / statistics.median(seconds)}), flush=True)


if __name__ == "__main__":
    main()
