"""Reads in Python what this project writes in Rust: a base model in transformers, an adapter in peft.

usage: python tests/check_in_python.py --base DIR [--adapter DIR] [--expected JSON]
       python tests/check_in_python.py --base DIR --adapter DIR --predictions CSV [--system TEXT] [--out CSV]
needs: pip install -r tests/fixtures/requirements.txt

--expected compares logits: {"input_ids": [[..]], "attention_mask": [[..]], "logits": [[[..]]]}, the logits of all
positions; those of padding do not count. Such a file for any base and adapter comes from
    BURN_PEFT_EXPORT=DIR BURN_PEFT_EXPORT_BASE=BASE BURN_PEFT_EXPORT_ADAPTER=ADAPTER \\
        cargo test -p burn-peft-tests export_any_adapter_for_python
as DIR/expected.json.
--predictions compares answers of the Pokémon experiment: a CSV with the columns species, truth and answer, of which
the rows of one arm and one seed are taken. The same questions are answered greedily here, and the numbers of exact
answers must agree within one species.

Prints one line for each check and exits with 1 if any of them failed.
"""

import argparse, csv, json, pathlib, re, sys

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

LOGIT_TOLERANCE = 1e-4
MAX_ANSWER_TOKENS = 12
SYSTEM = "You are a Pokémon expert. Answer with the type or types of the given Pokémon, separated by a slash, and nothing else."
TYPES = ("normal fire water electric grass ice fighting poison ground flying psychic bug rock ghost dragon dark steel "
         "fairy").split()

failures = 0


def check(passed, text):
    global failures
    failures += not passed
    print("OK    " if passed else "NOT OK", text)


def load_base(directory):
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager",
                                                       output_loading_info=True)
    for kind in ["missing_keys", "unexpected_keys", "mismatched_keys"]:
        check(not info[kind], f"base, {kind}: {sorted(info[kind]) or 'none'}")
    return model.eval()


def load_adapter(base, directory):
    directory = pathlib.Path(directory)
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}
        check(file.metadata() == {"format": "pt"}, f"adapter, metadata: {file.metadata()}")
    model = PeftModel.from_pretrained(base, directory)
    # What peft would write for the model that it has just built is what it expected to read.
    expected = get_peft_model_state_dict(model)
    # The whole table of an adapted embedding is written beside the adapter and may be absent.
    optional = {key for key in expected if ".base_layer." in key}
    missing, unexpected = sorted(expected.keys() - optional - stored.keys()), sorted(stored.keys() - expected.keys())
    check(not missing, f"adapter, missing keys: {missing or 'none'}")
    check(not unexpected, f"adapter, unexpected keys: {unexpected or 'none'}")
    common = stored.keys() & expected.keys()
    changed = [key for key in sorted(common) if not torch.equal(stored[key], expected[key].cpu())]
    check(common and not changed, f"adapter, {len(common)} tensors arrived, changed on the way: {changed or 'none'}")

    result = base_load_result(model, directory)
    check(not result.missing_keys, f"adapter, missing keys by load_adapter: {result.missing_keys or 'none'}")
    check(not result.unexpected_keys, f"adapter, unexpected keys by load_adapter: {result.unexpected_keys or 'none'}")
    return model.eval()


def base_load_result(model, directory):
    """peft's own account of a load, under a second name that is removed again."""
    result = model.load_adapter(directory, adapter_name="second")
    model.delete_adapter("second")
    model.set_adapter("default")
    return result


def check_logits(model, path):
    expected = json.loads(pathlib.Path(path).read_text())
    ids, mask = torch.tensor(expected["input_ids"]), torch.tensor(expected["attention_mask"]).long()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    there = torch.tensor(expected["logits"])
    if there.shape != logits.shape:
        return check(False, f"logits: expected shape {list(logits.shape)}, found {list(there.shape)}")
    real = mask.bool()
    difference = (logits[real] - there[real]).abs().max().item()
    check(difference < LOGIT_TOLERANCE, f"logits of {real.sum()} positions, largest difference {difference:.1e}")


def types_named(text):
    return {word for word in re.findall(r"[^\W\d_]+", text.lower()) if word in TYPES}


def check_predictions(model, tokenizer, path, arm, seed, system, out):
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("arm", arm) == arm and row.get("seed", seed) == seed]
    answers = []
    for start in range(0, len(rows), 16):
        chats = [[{"role": "system", "content": system}, {"role": "user", "content": row["species"]}]
                 for row in rows[start:start + 16]]
        texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        batch = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                                    do_sample=False, max_new_tokens=MAX_ANSWER_TOKENS)
        new = output[:, batch["input_ids"].shape[1]:]
        answers += [answer.strip() for answer in tokenizer.batch_decode(new, skip_special_tokens=True)]

    exact = {"here": 0, "there": 0}
    for row, answer in zip(rows, answers):
        truth = types_named(row["truth"])
        exact["here"] += types_named(answer) == truth
        exact["there"] += types_named(row["answer"]) == truth
    same = sum(row["answer"] == answer for row, answer in zip(rows, answers))
    check(rows and abs(exact["here"] - exact["there"]) <= 1,
          f"exact answers of {len(rows)}: {exact['here']} in Python, {exact['there']} in the file")
    print(f"       the same text for {same} of {len(rows)} species")
    if out:
        with open(out, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["species", "truth", "answer", "answer_in_python"])
            writer.writerows([row["species"], row["truth"], row["answer"], answer] for row, answer in zip(rows, answers))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="directory of the base model")
    parser.add_argument("--adapter", help="directory of the adapter")
    parser.add_argument("--expected", help="JSON with logits to compare")
    parser.add_argument("--predictions", help="CSV with answers to compare")
    parser.add_argument("--arm", default="lora", help="rows of the CSV to compare")
    parser.add_argument("--seed", default="0", help="rows of the CSV to compare")
    parser.add_argument("--system", default=SYSTEM, help="system text of the prompts")
    parser.add_argument("--out", help="CSV to write the answers to")
    arguments = parser.parse_args()

    model = load_base(arguments.base)
    if arguments.adapter:
        model = load_adapter(model, arguments.adapter)
    if arguments.expected:
        check_logits(model, arguments.expected)
    if arguments.predictions:
        tokenizer = AutoTokenizer.from_pretrained(arguments.base)
        check_predictions(model, tokenizer, arguments.predictions, arguments.arm, arguments.seed, arguments.system,
                          arguments.out)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
