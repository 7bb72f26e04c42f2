"""Reads in Python what this project writes in Rust: a base model in transformers, an adapter in peft.

usage: python tests/check_in_python.py --export DIR
       python tests/check_in_python.py --base DIR [--adapter DIR] [--expected JSON|SAFETENSORS]
       python tests/check_in_python.py --base DIR --adapter DIR --predictions CSV [--system TEXT] [--out CSV]
needs: pip install -r tests/fixtures/requirements.txt

--export is what these tests write, every case of the fixtures and adapters that were never in Python; its directories
CASE/base, CASE/adapter and CASE/expected.json are checked one after the other, as with the three options below:
    BURN_PEFT_EXPORT=DIR cargo test -p burn-peft-tests export_for_python
--base is a model of transformers, or, if there is no config.json, the weights of tests/fixtures/toy.py.
--adapter is laid out as peft saves adapters: the adapter `default` in the directory itself, others in directories of
their names. Every tensor that peft expects must be there, and no other one.
--expected compares logits, of all positions; those of padding do not count.
{"input_ids": [[..]], "attention_mask": [[..]], "logits": [[[..]]]} as JSON or as safetensors, or the same with several
batches, which have the prefixes `right.` and `left.`, and any of
    logits                  the first adapter
    base.logits             no adapter
    NAME.logits             the adapter of that name
    both.logits             all adapters at once
    mixed.logits            the adapter of each row that --rows or a JSON's `adapter_names` names, `__base__` for none
    merged.logits, NAME.merged.logits, both.merged.logits
                            the same once merged
Without a prefix they are about the batch without one, or else the one of `right.`; the toy has `output` for `logits`, and
a BERT has `embeddings`, the means over the tokens of a sentence, scaled to length 1.
Other tensors are ignored, so the fixtures can be compared with themselves. Such a JSON for any base and adapter comes from
    BURN_PEFT_EXPORT=DIR BURN_PEFT_EXPORT_BASE=BASE BURN_PEFT_EXPORT_ADAPTER=ADAPTER \\
        cargo test -p burn-peft-tests export_any_adapter_for_python
as DIR/expected.json.
--predictions compares answers of the Pokémon experiment: a CSV with the columns species, truth and answer, of which
the rows of one arm and one seed are taken. The same questions are answered greedily here, and the numbers of exact
answers must agree within one species.

Prints one line for each check and exits with 1 if any of them failed.
"""

import argparse, copy, csv, json, pathlib, re, sys

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

# Of the largest magnitude among the logits.
LOGIT_TOLERANCE = 1e-5
SIDES = ["right.", "left."]
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
    directory = pathlib.Path(directory)
    if not (directory / "config.json").exists():
        return load_toy(directory)
    kind = AutoModel if AutoConfig.from_pretrained(directory).model_type == "bert" else AutoModelForCausalLM
    model, info = kind.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager",
                                                       output_loading_info=True)
    for kind in ["missing_keys", "unexpected_keys", "mismatched_keys"]:
        check(not info[kind], f"base, {kind}: {sorted(info[kind]) or 'none'}")
    return model.eval()


def load_toy(directory):
    sys.path.insert(0, str(pathlib.Path(__file__).parent / "fixtures"))
    from toy import Toy

    model = Toy()
    info = model.load_state_dict(load_file(directory / "model.safetensors"), strict=False)
    check(not info.missing_keys, f"base, missing_keys: {info.missing_keys or 'none'}")
    check(not info.unexpected_keys, f"base, unexpected_keys: {info.unexpected_keys or 'none'}")
    return model.eval()


def load_adapters(base, root):
    root = pathlib.Path(root)
    directories = {"default": root} | {path.name: path for path in sorted(root.iterdir())}
    directories = {name: path for name, path in directories.items() if (path / "adapter_config.json").is_file()}
    check(directories, f"adapters: {', '.join(directories) or 'none'}")
    model = None
    for name, directory in directories.items():
        try:
            if model is None:
                model = PeftModel.from_pretrained(base, directory, adapter_name=name)
            else:
                model.load_adapter(directory, adapter_name=name)
        except (KeyError, RuntimeError, ValueError) as error:
            check(False, f"{name}, peft cannot read it: {error!r}")
            sys.exit(1)
        check_adapter(model, name, directory)
    return (model or base).eval()


def check_adapter(model, name, directory):
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}
        check(file.metadata() == {"format": "pt"}, f"{name}, metadata: {file.metadata()}")
    # What peft would write for the model that it has just built is what it expected to read.
    expected = get_peft_model_state_dict(model, adapter_name=name)
    # The whole table of an adapted embedding is written beside the adapter and may be absent; a trained bias may not.
    optional = {key for key in expected if key.endswith(".base_layer.weight")}
    missing, unexpected = sorted(expected.keys() - optional - stored.keys()), sorted(stored.keys() - expected.keys())
    check(not missing, f"{name}, missing keys: {missing or 'none'}")
    check(not unexpected, f"{name}, unexpected keys: {unexpected or 'none'}")
    common = stored.keys() & expected.keys()
    changed = [key for key in sorted(common) if not torch.equal(stored[key].to(expected[key]), expected[key])]
    check(common and not changed, f"{name}, {len(common)} tensors arrived, changed on the way: {changed or 'none'}")

    # peft's own account of a load: of the same tensors once more, as it gives none the first time.
    result = model.load_adapter(directory, adapter_name=name)
    check(not result.missing_keys, f"{name}, missing keys by load_adapter: {result.missing_keys or 'none'}")
    check(not result.unexpected_keys, f"{name}, unexpected keys by load_adapter: {result.unexpected_keys or 'none'}")


def check_outputs(model, expected, rows, of_base):
    """Compares what is about the base alone, which must be asked for before an adapter changes it, or all the rest."""
    batches = {side: {name: expected[f"{side}{name}"].long() for name in ["input_ids", "attention_mask"]
                      if f"{side}{name}" in expected} for side in ["", *SIDES]}
    compared = 0
    for name, there in sorted(expected.items()):
        side = next((side for side in SIDES if name.startswith(side)), "")
        *label, kind = name.removeprefix(side).split(".")
        merged = label[-1:] == ["merged"]
        label = ".".join(label[:-1] if merged else label)
        if kind not in ("logits", "output", "embeddings") or (label == "base") != of_base:
            continue
        batch = batches[side] or batches["right."]
        here = output_of(model, batch, label, merged, rows)
        if here is not None:
            compared += 1
            compare(name, here, there, batch.get("attention_mask"))
    if not of_base:
        check(compared, f"outputs compared: {compared}")


def output_of(model, batch, label, merged, rows):
    """The output that a label of the file stands for, or nothing if it stands for none of this model."""
    if not isinstance(model, PeftModel):
        return outputs(model, batch) if label in ("", "base") and not merged else None
    if label == "mixed":
        check(rows, f"adapters of the rows, from --rows: {rows or 'none'}")
        return outputs(model, batch, rows) if rows else None
    adapters = list(model.peft_config)
    active = {"": adapters[:1], "both": adapters}.get(label, [label])
    if not set(active) <= set(adapters):
        return None
    if len(active) == 1:
        model.set_adapter(active[0])
    else:
        model.base_model.set_adapter(active)
    return outputs(copy.deepcopy(model).merge_and_unload(safe_merge=True) if merged else model, batch)


def outputs(model, batch, rows=None):
    """Logits, embeddings, or the output of the toy; `rows` has the adapter of each row."""
    extra = {} if rows is None else {"adapter_names": rows}
    with torch.no_grad():
        if "attention_mask" not in batch:
            return model(batch["input_ids"], **extra)
        if model.config.model_type == "bert":
            hidden, mask = model(**batch, **extra).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
            return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return model(**batch, position_ids=positions, **extra).logits


def compare(name, here, there, mask):
    if there.shape != here.shape:
        return check(False, f"{name}: expected shape {list(here.shape)}, found {list(there.shape)}")
    real = torch.ones(here.shape[:1], dtype=bool) if mask is None or here.dim() < 3 else mask.bool()
    difference = ((here[real] - there[real]).abs().max() / here[real].abs().max()).item()
    check(difference < LOGIT_TOLERANCE, f"{name} of {real.sum()} positions, largest difference {difference:.1e} of the largest")


def read_expected(path):
    """The tensors of a file, and the adapters of the rows of a mixed batch, if the file names them."""
    if pathlib.Path(path).suffix == ".safetensors":
        return load_file(path), None
    entries = json.loads(pathlib.Path(path).read_text())
    rows = entries.pop("adapter_names", None)
    return {name: torch.tensor(value) for name, value in entries.items()}, rows


def check_all(base, adapter=None, expected=None, rows=None):
    """The model, with the adapters if there are any."""
    model = load_base(base)
    expected, named = read_expected(expected) if expected else ({}, None)
    rows = rows or named
    if expected:
        check_outputs(model, expected, rows, of_base=True)
    if adapter:
        model = load_adapters(model, adapter)
    if expected:
        check_outputs(model, expected, rows, of_base=False)
    return model


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
    parser.add_argument("--export", help="directory of directories, each with a base, an adapter and logits")
    parser.add_argument("--base", help="directory of the base model")
    parser.add_argument("--adapter", help="directory of the adapter, or of several")
    parser.add_argument("--expected", help="JSON or safetensors with logits to compare")
    parser.add_argument("--rows", type=lambda text: text.split(","), help="adapters of the rows of mixed.logits: a,__base__,b")
    parser.add_argument("--predictions", help="CSV with answers to compare")
    parser.add_argument("--arm", default="lora", help="rows of the CSV to compare")
    parser.add_argument("--seed", default="0", help="rows of the CSV to compare")
    parser.add_argument("--system", default=SYSTEM, help="system text of the prompts")
    parser.add_argument("--out", help="CSV to write the answers to")
    arguments = parser.parse_args()

    if bool(arguments.export) == bool(arguments.base):
        parser.error("expected either --export or --base")
    if arguments.export:
        cases = sorted(path.parent for path in pathlib.Path(arguments.export).glob("*/expected.json"))
        for case in cases:
            print(f"== {case.name}")
            check_all(case / "base", case / "adapter", case / "expected.json")
        check(cases, f"cases: {len(cases)}")
        sys.exit(failures > 0)
    model = check_all(arguments.base, arguments.adapter, arguments.expected, arguments.rows)
    if arguments.predictions:
        tokenizer = AutoTokenizer.from_pretrained(arguments.base)
        check_predictions(model, tokenizer, arguments.predictions, arguments.arm, arguments.seed, arguments.system,
                          arguments.out)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
