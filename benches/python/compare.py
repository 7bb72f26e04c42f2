"""Puts training steps and single layers of this project beside those of torch and peft, in turns on the same machine, and
prints a table.

usage: python compare.py [--cases tiny mid ..] [--rounds 5] [--steps 5] [--dtypes f32 bf16] [--history FILE] [--plot FILE]

Each measurement has a process of its own: LLaMAs with random weights, tied embeddings, LoRA of rank 16 with dropout 0.05,
AdamW; `benches/src/training.rs` has the shapes. Torch is called as its users call it: `model(input_ids=..,
labels=..)`, `loss.backward()`, `optimizer.step()`. A layer (`benches/src/layer.rs`) is one adapted linear layer, forward and
backward, 20 times for each step that is asked for. Memory is the peak of resident memory above what was resident before the
first step. "Products alone" are our products with frozen weights, timed by themselves in the same round. `--history` appends
one line of JSON with commit, machine and medians, and names the cases that became slower beside torch. On GPUs,
`../gpu/report.py` compares.
"""
import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
WARM_UP = 2


def status(name):
    """A line of /proc/self/status in KiB."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    return 0


def measure(name, steps, step, parts=None):
    """Prints what steps cost, after a few others; with `parts`, also what this says that their parts took."""
    weights = status("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    seconds = []
    for number in range(WARM_UP + steps):
        start = time.perf_counter()
        value = step()
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    found = {"case": name, "seconds": statistics.median(seconds), "loss": value,
             "peak_mib": (status("VmHWM") - weights) / 1024, "weights_mib": weights / 1024}
    if parts:
        each = [parts() for _ in range(steps)]
        found["parts"] = {part: statistics.median(times[part] for times in each) for part in each[0]}
    print(json.dumps(found))


def torch_layer(sizes, dtype, steps, threads):
    """Measures a layer of torch with peft's adapter in this process."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(sizes["width"], sizes["width"], bias=False)}).to(dtype)
    model = get_peft_model(model, LoraConfig(r=sizes["r"], lora_alpha=2 * sizes["r"], lora_dropout=0.05, target_modules=["layer"]))
    model.train()
    layer = model.base_model.model["layer"]
    x = torch.rand(sizes["n"], sizes["width"], dtype=dtype, requires_grad=True)

    def step():
        total = layer(x).sum()
        total.backward()
        x.grad = None
        model.zero_grad()
        return total.item()
    measure(sizes["name"], steps, step)


def torch_step(shape, dtype, steps, threads, device, with_parts):
    """Measures steps of torch and peft in this process, and what their parts take, each until the device has computed it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary, prefix = shape["vocabulary"], shape["prefix"]
    (heads, heads_of_keys), (sequences, length) = shape["heads"], shape["batch"]
    targets = "all-linear" if shape["is_all_linear"] else ["q_proj", "v_proj"]
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=shape["hidden"], num_hidden_layers=shape["blocks"],
                         intermediate_size=shape["feed_forward"], num_attention_heads=heads, num_key_value_heads=heads_of_keys,
                         tie_word_embeddings=True, max_position_embeddings=2048, attn_implementation="sdpa")
    model = LlamaForCausalLM(config).to({"f32": torch.float32, "bf16": torch.bfloat16}[dtype]).to(device)
    model = get_peft_model(model, LoraConfig(r=shape["rank"], lora_alpha=2 * shape["rank"], lora_dropout=0.05, target_modules=targets,
                                             task_type="CAUSAL_LM"))
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    ids = torch.tensor([[((row if i >= prefix else 0) * 7919 + i * 104729) % vocabulary for i in range(length)]
                        for row in range(sequences)], device=device)
    labels = ids.clone()
    labels[:, : length - shape["labelled"]] = -100

    def step():
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def parts():
        times, found = {}, {}

        def update():
            optimizer.step()
            optimizer.zero_grad()
        for part, compute in (("forward", lambda: found.update(loss=model(input_ids=ids, labels=labels).loss)),
                              ("backward", lambda: found["loss"].backward()), ("update", update)):
            start = time.perf_counter()
            compute()
            if device == "cuda":
                torch.cuda.synchronize()
            times[part] = time.perf_counter() - start
        return times
    measure(shape["name"], steps, step, parts if with_parts else None)


def build():
    """Builds the benchmark and returns its path."""
    command = ["cargo", "bench", "-p", "burn-peft-benches", "--bench", "training_step", "--no-run", "--message-format=json"]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    messages = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return next(m["executable"] for m in messages if m.get("executable") and m["target"]["name"] == "training_step")


def run(command, **environment):
    """The JSON of the last line that a command prints; mimalloc keeps what is freed, unless the environment says otherwise."""
    environment = {"MIMALLOC_PURGE_DELAY": "-1", **os.environ, **environment}
    output = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(output.stdout.splitlines()[-1])


def commit():
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine():
    info = pathlib.Path("/proc/cpuinfo").read_text()
    model = next((line.split(":")[1].strip() for line in info.splitlines() if "model name" in line), platform.machine())
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in info]
    return f"{model}, {' '.join(flags)}"


def versions():
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft"))


def plot(results, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    figure.suptitle("A training step or a layer with LoRA, f32; torch with peft = 1")
    for axis, key, title in zip(axes, ("time", "memory"), ("time", "peak memory above the weights")):
        names = [name for name in results if "f32" in results[name]]
        ratios = [results[name]["f32"][key] for name in names]
        axis.barh(names, ratios, color="#b7410e")
        axis.axvline(1, color="black", linewidth=1)
        for i, ratio in enumerate(ratios):
            is_inside = ratio > 0.15
            axis.text(ratio + (-0.02 if is_inside else 0.02), i, f"{ratio:.2f}", va="center",
                      ha="right" if is_inside else "left", color="white" if is_inside else "black")
        axis.set_xlim(0, max(1.1, *(1.05 * ratio for ratio in ratios)))
        axis.set_title(title, fontsize="medium")
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def warn_if_slower(args, results):
    """Names the cases in which the ratio to torch is a tenth worse than the last time on such a machine."""
    lines = args.history.read_text(encoding="utf-8").splitlines() if args.history.exists() else []
    of_machine = [line for line in map(json.loads, lines) if (line["machine"], line["threads"]) == (machine(), args.threads)]
    for case, of_types in results.items():
        for dtype, now in of_types.items():
            before = next((line for line in reversed(of_machine) if dtype in line["cases"].get(case, {})), None)
            if before and now["time"] > 1.1 * before["cases"][case][dtype]["time"]:
                print(f"slower: {case}, {dtype}: {now['time']:.2f} of torch's time, {before['cases'][case][dtype]['time']:.2f} at {before['commit']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", help="names of shapes and layers; without it, all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtypes", nargs="+", choices=["f32", "bf16"], default=["f32", "bf16"],
                        help="types of the frozen weights, on both sides")
    parser.add_argument("--binary", type=pathlib.Path,
                        help="the benchmark, if it is built already: `training_step-..` in `target/release/deps`")
    parser.add_argument("--history", type=pathlib.Path, help="file to append the medians to")
    parser.add_argument("--plot", type=pathlib.Path, help="PNG to draw the ratios to")
    parser.add_argument("--torch", metavar="SHAPE", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help=argparse.SUPPRESS)
    parser.add_argument("--parts", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device != "cpu" and not args.torch:
        parser.error("on a GPU, ../gpu/report.py compares")
    if args.torch and "batch" not in args.torch:
        return torch_layer(args.torch, args.dtypes[0], args.steps, args.threads)
    if args.torch:
        return torch_step(args.torch, args.dtypes[0], args.steps, args.threads, args.device, args.parts)

    ours, of_commit = args.binary or build(), commit()
    shapes = {shape["name"]: shape for shape in run([ours, "--shapes"])}
    cases = args.cases or [name for name in shapes if not shapes[name].get("is_for_gpus", False)]
    if unknown := set(cases) - set(shapes):
        parser.error(f"there is no case {', '.join(sorted(unknown))}; there are {', '.join(shapes)}")
    torchs = [sys.executable, __file__, "--threads", args.threads]
    settings = {"RAYON_NUM_THREADS": str(args.threads), "BURN_DEVICE": "flex"}
    print(f"{machine()}; {args.threads} threads; {args.rounds} rounds of {args.steps} steps; commit {of_commit}; "
          f"{versions()}\n`python {' '.join(sys.argv)}`\n")
    print("| case | type | ours s | torch s | ratio | ours MiB | torch MiB | ratio | ours / products alone | page faults a step |")
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    results = {}
    for case in cases:
        steps = ["--steps", args.steps * (1 if "batch" in shapes[case] else 20)]
        found = {(who, dtype): [] for dtype in args.dtypes for who in ("ours", "torch")}
        for _ in range(args.rounds):
            for dtype in args.dtypes:
                found["ours", dtype].append(run([ours, "--case", case, "--dtype", dtype, *steps], **settings))
                alone = run([ours, "--case", case, "--dtype", dtype, "--floor"], **settings)
                found["ours", dtype][-1]["floor_seconds"] = alone["floor_seconds"]
                found["torch", dtype].append(run([*torchs, *steps, "--torch", json.dumps(shapes[case]), "--dtypes", dtype]))

        results[case] = {}
        for dtype in args.dtypes:
            def middle(who, key):
                return statistics.median(each[key] for each in found[who, dtype])

            def ratio(key):
                return statistics.median(a[key] / b[key] for a, b in zip(found["ours", dtype], found["torch", dtype]))
            over_floor = statistics.median(each["seconds"] / each["floor_seconds"] for each in found["ours", dtype])
            results[case][dtype] = {"time": ratio("seconds"), "memory": ratio("peak_mib"),
                                    "seconds": middle("ours", "seconds"), "torch_seconds": middle("torch", "seconds"),
                                    "peak_mib": middle("ours", "peak_mib"), "torch_peak_mib": middle("torch", "peak_mib"),
                                    "over_floor": over_floor, "faults_per_step": middle("ours", "faults_per_step")}
            print(f"| {case} | {dtype} | {middle('ours', 'seconds'):.3f} | {middle('torch', 'seconds'):.3f} "
                  f"| {ratio('seconds'):.2f} | {middle('ours', 'peak_mib'):.0f} | {middle('torch', 'peak_mib'):.0f} "
                  f"| {ratio('peak_mib'):.2f} | {results[case][dtype]['over_floor']:.2f} "
                  f"| {middle('ours', 'faults_per_step'):.0f} |", flush=True)
    if args.history:
        warn_if_slower(args, results)
        line = {"date": datetime.date.today().isoformat(), "commit": of_commit, "machine": machine(),
                "threads": args.threads, "versions": versions(), "command": sys.argv[1:], "cases": results}
        with args.history.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
