"""Reads in Python the GGUF files that this project writes in Rust, and runs them in llama.cpp.

usage: python tests/check_gguf_in_python.py --model DIR [--gguf FILE] [--adapter DIR [--lora FILE] [--merged FILE]]
needs: pip install -r tests/fixtures/requirements.txt gguf, and llama-cpp-python for what runs in llama.cpp

--model is the base in Hugging Face's layout, --adapter an adapter of it in peft's. --gguf is the base, --lora the adapter and
--merged the model with the adapter merged, as `--example adapter -- export` writes them.

- Every key has a name that `gguf` knows, and every tensor a name of the architecture.
- Every tensor has the numbers of the base, or of the model that peft merges, once the rows of queries and keys are in Hugging
  Face's order again. The update of every pair of `lora_a` and `lora_b` is that of peft.
- The attention scores of the first block, with queries and keys of the file turned as llama.cpp turns them, are those of
  transformers.
- With llama-cpp-python: tokens of some texts are those of transformers, and logits in llama.cpp, with --lora and without, are
  those of transformers with peft and without. Greedy answers are compared as well.

Prints one line for each check and exits with 1 if any of them failed.
"""

import argparse, json, pathlib, re, sys

import gguf
import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ["Hello world, it's 1234 o'clock.", "a\n\n  b\tc", "naïve café — 日本語 🙂", "def f(x):\n    return x ** 2\n", "  two spaces  "]
PROMPT = "The capital of France is"
# Of the largest magnitude among the logits. llama.cpp multiplies f16 weights by activations in f16.
LOGIT_TOLERANCE = {"F32": 1e-4, "F16": 1e-2}

failures = 0


def check(passed, text):
    global failures
    failures += not passed
    print("OK    " if passed else "NOT OK", text)


class File:
    def __init__(self, path):
        self.reader = gguf.GGUFReader(path)
        self.fields = {key: field.contents() for key, field in self.reader.fields.items() if not key.startswith("GGUF.")}
        self.tensors = {tensor.name: np.array(tensor.data).astype(np.float32) for tensor in self.reader.tensors}
        self.types = {tensor.name: tensor.tensor_type.name for tensor in self.reader.tensors}
        self.arch = self.fields["general.architecture"]

    def check_keys(self):
        known = set()

        def collect(table):
            for name, value in vars(table).items():
                if isinstance(value, str) and not name.startswith("_"):
                    known.add(value.replace("{arch}", self.arch))
                elif isinstance(value, type):
                    collect(value)

        collect(gguf.Keys)
        unknown = sorted(set(self.fields) - known)
        check(not unknown, f"keys that gguf does not know: {unknown or 'none'} of {len(self.fields)}")

    def matrix_type(self):
        return next(kind for name, kind in self.types.items() if self.tensors[name].ndim == 2)


def undo(file, name, values, config):
    """Rows of queries and keys in Hugging Face's order."""
    if file.arch != "llama" or not (match := re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)(\.lora_b)?", name)):
        return values
    heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
    return values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def name_map(file, config):
    """Names in Hugging Face's files by those in GGUF files, as gguf's table has them."""
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == file.arch)
    return gguf.get_tensor_name_map(arch, config.num_hidden_layers)


def check_model(path, model, what, exact):
    file, config = File(path), model.config
    file.check_keys()
    names, state = name_map(file, config), model.state_dict()
    expected = {names.get_name(name, try_suffixes=(".weight", ".bias")): value.float().numpy() for name, value in state.items()
                if not (config.tie_word_embeddings and name == "lm_head.weight")}
    extra = set(file.tensors) - set(expected) - {"rope_freqs.weight"}
    missing = set(expected) - set(file.tensors)
    check(not extra and not missing, f"{what}: {len(file.tensors)} tensors, extra {sorted(extra)}, missing {sorted(missing)}")
    worst = 0.0
    for name, values in expected.items():
        found = undo(file, name, file.tensors[name], config)
        if exact:
            rounded = values.astype(np.float16).astype(np.float32) if file.types[name] == "F16" else values
            worst = max(worst, 0.0 if np.array_equal(found, rounded) else 1.0)
        else:
            worst = max(worst, float(np.abs(found - values).max() / max(np.abs(values).max(), 1e-30)))
    check(worst <= (0 if exact else 1e-3), f"{what}: numbers {'equal' if exact else f'within {worst:.1e} of the largest'}")
    check_scores(file, model, what)
    return file


def check_scores(file, model, what):
    """Attention scores of the first block, before the mask."""
    config, block = model.config, model.model.layers[0]
    ids = torch.arange(3, 3 + 24).unsqueeze(0) % config.vocab_size
    with torch.no_grad():
        hidden = model.model.embed_tokens(ids)
        cos, sin = model.model.rotary_emb(hidden, torch.arange(ids.shape[1]).unsqueeze(0))
        x = block.input_layernorm(hidden)
        d = block.self_attn.head_dim

        def split(rows):
            return rows.view(1, ids.shape[1], -1, d).transpose(1, 2)

        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
        q, k = apply_rotary_pos_emb(split(block.self_attn.q_proj(x)), split(block.self_attn.k_proj(x)), cos, sin)
        expected = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3)).numpy()

    factors = file.tensors.get("rope_freqs.weight", np.ones(d // 2))
    base = file.fields[f"{file.arch}.rope.freq_base"]
    angles = np.arange(ids.shape[1])[:, None] * (base ** (-np.arange(0, d, 2) / d) / factors)

    def turned(letter):
        rows = x[0].numpy() @ file.tensors[f"blk.0.attn_{letter}.weight"].T
        rows = rows + file.tensors.get(f"blk.0.attn_{letter}.bias", 0)
        heads = rows.reshape(ids.shape[1], -1, d).swapaxes(0, 1)
        pairs = (slice(0, None, 2), slice(1, None, 2)) if file.arch == "llama" else (slice(0, d // 2), slice(d // 2, None))
        a, b = heads[..., pairs[0]], heads[..., pairs[1]]
        out = np.empty_like(heads)
        out[..., pairs[0]] = a * np.cos(angles) - b * np.sin(angles)
        out[..., pairs[1]] = a * np.sin(angles) + b * np.cos(angles)
        return out

    q, k = turned("q"), turned("k")
    found = q @ np.repeat(k, q.shape[0] // k.shape[0], 0).swapaxes(1, 2)
    error = np.abs(found - expected[0]).max() / np.abs(expected).max()
    check(error < (2e-3 if file.matrix_type() == "F16" else 1e-5), f"{what}: attention scores within {error:.1e}")


def check_lora(path, adapted):
    file, config = File(path), adapted.config
    file.check_keys()
    for key, value in {"general.type": "adapter", "adapter.type": "lora"}.items():
        check(file.fields.get(key) == value, f"lora: {key} is {file.fields.get(key)}")
    names, alpha = name_map(file, config), file.fields["adapter.lora.alpha"]
    seen, worst = set(), 0.0
    for module_name, module in adapted.base_model.model.named_modules():
        if not hasattr(module, "get_delta_weight") or not getattr(module, "lora_A", None) and not getattr(module, "lora_embedding_A", None):
            continue
        name = names.get_name(module_name) + ".weight"
        a, b = file.tensors[f"{name}.lora_a"], undo(file, f"{name}.lora_b", file.tensors[f"{name}.lora_b"], config)
        seen |= {f"{name}.lora_a", f"{name}.lora_b"}
        delta = alpha / b.shape[1] * (a @ b.T if name == "token_embd.weight" else b @ a)
        expected = module.get_delta_weight("default").detach().float().numpy()
        worst = max(worst, float(np.abs(delta - expected).max() / max(np.abs(expected).max(), 1e-30)))
    check(seen == set(file.tensors) and bool(seen), f"lora: {len(seen) // 2} updates of {len(file.tensors) // 2}")
    tolerance = 2e-3 if file.matrix_type() == "F16" else 1e-5
    check(worst < tolerance, f"lora: updates within {worst:.1e} of the largest")


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def greedy(step, ids, count):
    ids = list(ids)
    for _ in range(count):
        ids.append(int(step(ids)[-1].argmax()))
    return ids


def check_running(path, lora, model, tokenizer, what):
    try:
        import llama_cpp
    except ImportError:
        print("      ", f"{what}: llama-cpp-python is not installed, so nothing runs in llama.cpp")
        return
    options = {"n_ctx": 128, "n_batch": 128, "logits_all": True, "verbose": False, "n_threads": 2,
               "type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}  # by default the cache is f16
    runs = llama_cpp.Llama(str(path), **options, **({"lora_path": str(lora)} if lora else {}))

    def step(ids):
        runs.reset()
        runs.eval(ids)
        return np.array(runs.scores[: len(ids)])

    if tokenizer is not None and lora is None:
        for text in TEXTS:
            expected = tokenizer(text, add_special_tokens=True)["input_ids"]
            found = runs.tokenize(text.encode(), add_bos=True, special=True)
            check(found == expected, f"{what}: tokens of {text!r}" + ("" if found == expected else f": {found} {expected}"))
        special = tokenizer.eos_token + "a" + tokenizer.eos_token
        expected = tokenizer(special, add_special_tokens=False)["input_ids"]
        check(runs.tokenize(special.encode(), add_bos=False, special=True) == expected, f"{what}: tokens of {special!r}")
    if tokenizer is not None and model.config.vocab_size > 1000:
        ids = tokenizer(PROMPT)["input_ids"]
    else:
        ids = [1, 17, 5, 63, 2, 40, 41, 8, 33, 77, 12, 90]
    expected, found = logits_of(model, ids), step(ids)
    largest = np.abs(expected).max()
    error = np.abs(found - expected).max() / largest
    tolerance = LOGIT_TOLERANCE[File(path).matrix_type()]
    check(error < tolerance, f"{what}: logits in llama.cpp within {error:.1e} of the largest, {largest:.1f}")
    there, here = greedy(step, ids, 16), greedy(lambda ids: logits_of(model, ids), ids, 16)
    check(there == here, f"{what}: greedy tokens in llama.cpp: {there[len(ids):]}" + ("" if there == here else f", here {here[len(ids):]}"))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ["model", "gguf", "adapter", "lora", "merged"]:
        parser.add_argument(f"--{option}", type=pathlib.Path, required=option == "model")
    args = parser.parse_args()
    load = lambda: AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager").eval()
    has_tokenizer = (args.model / "tokenizer.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(args.model) if has_tokenizer else None
    base = None
    if args.gguf:
        model = load()
        check_model(args.gguf, model, "base", exact=True)
        base = check_running(args.gguf, None, model, tokenizer, "base")
    if args.adapter:
        adapted = PeftModel.from_pretrained(load(), args.adapter).eval()
        if args.lora:
            check_lora(args.lora, adapted)
            if args.gguf:
                found = check_running(args.gguf, args.lora, adapted, tokenizer, "lora")
                if found is not None and base is not None:
                    check(np.abs(found - base).max() > 1e-2 * np.abs(base).max(), "lora: the adapter changes the logits")
        if args.merged:
            merged = adapted.merge_and_unload()
            check_model(args.merged, merged, "merged", exact=False)
            check_running(args.merged, None, merged, tokenizer, "merged")
    sys.exit(failures > 0)


main()
