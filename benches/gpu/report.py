"""What this project does on a GPU, as one page of Markdown: how exact the device is, the test suite on it, and training steps of
Llama-3.2-1B's shape beside torch and peft.

usage: python report.py --device cuda [--suite BINARY] [--training-step BINARY] [--cases llama-1b ..] [--rounds 3]

Without binaries it builds them. The comparison needs torch and peft (`../python/requirements.txt`) and an NVIDIA GPU. On other
devices, the steps of this project are timed alone. `../../benches/src/training.rs` has the shapes of all cases.
"""
import argparse
import importlib.util
import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import sys
import threading

ROOT = pathlib.Path(__file__).parents[2]
sys.path.append(str(ROOT / "benches/python"))
import compare  # noqa: E402, which is not a package


def build(package, kind, name, device):
    command = ["cargo", "test" if kind == "--test" else "bench", "-p", package, kind, name, "--no-run", "--features", device,
               *(["--release"] if kind == "--test" else []), "--message-format=json"]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    messages = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return next(m["executable"] for m in messages if m.get("executable") and m["target"]["name"] == name)


def test(suite, device, limit, *words):
    """The output of tests, and how they ended: 0 if all passed, `None` if the time was over."""
    environment = {**os.environ, "BURN_DEVICE": device}
    process = subprocess.Popen([suite.resolve(), *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
                               cwd=ROOT / "tests")
    try:
        return process.communicate(timeout=limit)[0], process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0], None


def nvidia_smi(query):
    """What it says about the GPU that programs take here."""
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    command = ["nvidia-smi", f"--id={card}", f"--query-gpu={query}", "--format=csv,noheader"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


class GpuMemory:
    """The most memory of the GPU that is used while this runs, in MiB, above what was used before; NaN if that is not known."""

    def __init__(self):
        self.before = self.peak = self.used()
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self.watch)

    @staticmethod
    def used():
        try:
            return float(nvidia_smi("memory.used").split()[0])
        except (ValueError, IndexError, subprocess.CalledProcessError):
            return math.nan

    def watch(self):
        while not self.is_over.wait(0.1):
            used = self.used()
            self.peak = used if math.isnan(used) else max(used, self.peak)
            if math.isnan(used):
                return

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.is_over.set()
        self.thread.join()


def steps_of_both(binary, shapes, args):
    """Prints what training steps cost, in turns with torch's on an NVIDIA GPU; returns whether all of them ran."""
    def with_memory(run):
        if args.device != "cuda":
            found = run()
            return found | {"memory": found["device_mib"]}
        with GpuMemory() as memory:
            found = run()
        return found | {"memory": memory.peak - memory.before}
    options = ["--steps", args.steps, "--parts"]
    ours = [binary, "--dtype", args.dtype, *options]
    torch = [sys.executable, compare.__file__, "--device", "cuda", "--dtypes", args.dtype, *options]
    print(f"Medians of {args.rounds} rounds of {args.steps} steps, a process for each round. The parts are timed in steps of their own,\n"
          "each until the device has computed it. Our forward part has the gradient of the logits in it, and with a frozen output layer\n"
          "also the product that leads it back to the hidden states, which torch has in its backward part. "
          + ("Memory is the most that `nvidia-smi` says is in use, above what was in use before, weights included." if args.device == "cuda" else
             "Memory is what Burn's pools hold, weights included.") + "\n")
    failed = {}
    print("| case | type | by | a step, s | tokens/s | forward, s | backward, s | update, s | memory, MiB | loss |")
    print("|---|---|---|--:|--:|--:|--:|--:|--:|--:|", flush=True)
    for case in args.cases:
        found = {"burn-peft": []} | ({"torch": []} if args.device == "cuda" else {})
        run = {"burn-peft": lambda: compare.run([*ours, "--case", case], BURN_DEVICE=args.device),
               "torch": lambda: compare.run([*torch, "--torch", json.dumps(shapes[case])])}
        for _ in range(args.rounds):
            for who, rounds in found.items():
                try:
                    rounds.append(with_memory(run[who]))
                except subprocess.CalledProcessError as error:
                    # Of this library's benchmark, the cause is what it printed last; that of torch is on standard error.
                    failed[case, who] = error.stdout.strip()[-500:] or f"it ended with code {error.returncode}"
        sequences, length = shapes[case]["batch"]
        for who, rounds in found.items():
            if not rounds:
                continue
            seconds = statistics.median(each["seconds"] for each in rounds)
            parts = [statistics.median(each["parts"][part] for each in rounds) for part in ("forward", "backward", "update")]
            memory = statistics.median(each["memory"] for each in rounds)
            print(f"| {case} | {args.dtype} | {who} | {seconds:.3f} | {sequences * length / seconds:.0f} "
                  f"| {' | '.join(f'{part:.3f}' for part in parts)} | {memory:.0f} | {rounds[-1]['loss']:.4f} |", flush=True)
    for (case, who), cause in failed.items():
        print(f"\n`{case}` failed with {who}:\n```text\n{cause}\n```")
    return not failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", required=True, choices=["cuda", "vulkan", "wgpu", "metal", "rocm"])
    parser.add_argument("--suite", type=pathlib.Path, help="the test suite, if it is built already")
    parser.add_argument("--training-step", type=pathlib.Path, help="the benchmark, if it is built already")
    parser.add_argument("--cases", nargs="+", default=["llama-1b", "llama-1b-all-labelled"])
    parser.add_argument("--dtype", choices=["f32", "f16", "bf16"],
                        help="type of the frozen weights; without it, bf16 on CUDA and ROCm, f32 elsewhere")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--limit", type=int, default=1800, help="seconds that the suite may take")
    parser.add_argument("--output", type=pathlib.Path, help="file for all that the suite says")
    args = parser.parse_args()
    args.dtype = args.dtype or ("bf16" if args.device in ("cuda", "rocm") else "f32")
    if args.device == "cuda":
        if args.dtype == "f16":
            parser.error("the comparison with torch is in f32 and bf16")
        missing = [name for name in ("torch", "transformers", "peft") if not importlib.util.find_spec(name)]
        if missing:
            parser.error(f"the comparison needs {', '.join(missing)}: pip install -r benches/python/requirements.txt")
    suite = args.suite or pathlib.Path(build("burn-peft-tests", "--test", "suite", args.device))
    steps = (args.training_step or pathlib.Path(build("burn-peft-benches", "--bench", "training_step", args.device))).resolve()
    shapes = {shape["name"]: shape for shape in compare.run([steps, "--shapes"]) if "batch" in shape}
    if unknown := set(args.cases) - set(shapes):
        parser.error(f"there is no case {', '.join(sorted(unknown))}; there are {', '.join(shapes)}")

    print(f"# {args.device}\n\nCommit {compare.commit()}"
          + (f"; {nvidia_smi('name,driver_version')}; {compare.versions()}" if args.device == "cuda" else "")
          + f"\n`python {' '.join(sys.argv)}`\n\n## What it computes\n```text")
    checked, end = test(suite, args.device, args.limit, "device::", "--nocapture")
    print("\n".join(line for line in checked.splitlines() if line.strip() and not line.startswith(("test result", "running"))))
    print("```")
    if end != 0 or "test result: ok. 1 passed" not in checked:
        sys.exit(f"Stopped after {args.limit} s." if end is None else "The device did not pass; nothing else was run on it.")
    print("\n## The suite", flush=True)
    said, end = test(suite, args.device, args.limit)
    if args.output:
        args.output.write_text(said, encoding="utf-8")
    # Of tests that run at the same time, what one says may stand between the name and the result of another.
    passed, failed = (len(re.findall(rf"\.\.\. {word}$", said, re.MULTILINE)) for word in ("ok", "FAILED"))
    how = {0: "", 101: "", None: f"; stopped after {args.limit} s"}.get(end, f"; the suite broke off with code {end}")
    print(f"{passed} passed, {failed} failed{how}.\n")
    for name in sorted(set(re.findall(r"^test (\S+)(?: - should panic)? \.\.\. FAILED$", said, re.MULTILINE))):
        print(f"- `{name}`")

    print("\n## Training steps", flush=True)
    has_steps = steps_of_both(steps, shapes, args)
    if end != 0 or not has_steps:
        sys.exit("The suite did not pass." if end != 0 else "A case failed.")


if __name__ == "__main__":
    main()
