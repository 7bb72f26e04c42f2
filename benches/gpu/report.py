"""What this project does on a GPU, as one page of Markdown: how exact the device is, the test suite on it, and training steps of
Llama-3.2-1B's shape beside torch and peft.

usage: python report.py --device cuda [--suite BINARY] [--training-step BINARY] [--cases llama-1b ..] [--rounds 3]

Without binaries it builds them. The comparison needs torch and peft (`../python/requirements.txt`), and an NVIDIA GPU for the
memory. On other devices, the steps of this project are timed alone.
"""
import argparse
import importlib.util
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


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


def time_alone(binary, args):
    """Prints what steps take, without anything beside them."""
    environment = {**os.environ, "BURN_DEVICE": args.device}

    def measured(*words):
        command = [str(binary), *words]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)
    shapes = {shape["name"]: shape for shape in measured("--shapes")}
    print("| case | type | seconds | tokens/s | loss |\n|---|---|--:|--:|--:|")
    for case in args.cases:
        rounds = [measured("--case", case, "--dtype", args.dtype, "--steps", str(args.steps)) for _ in range(args.rounds)]
        seconds = statistics.median(each["seconds"] for each in rounds)
        sequences, length = shapes[case]["batch"]
        print(f"| {case} | {args.dtype} | {seconds:.3f} | {sequences * length / seconds:.0f} | {rounds[-1]['loss']:.4f} |", flush=True)


def beside_torch(steps, args):
    """Prints what steps cost, beside torch and peft."""
    compare = [sys.executable, ROOT / "benches/python/compare.py", "--device", args.device, "--binary", steps, "--dtypes", args.dtype,
               "--rounds", str(args.rounds), "--steps", str(args.steps), "--cases", *args.cases]
    subprocess.run(compare, check=True)


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

    print(f"# {args.device}\n\n## What it computes\n```text")
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
    for name in sorted(set(re.findall(r"^test (\S+) \.\.\. FAILED$", said, re.MULTILINE))):
        print(f"- `{name}`")

    print("\n## Training steps", flush=True)
    steps = args.training_step or build("burn-peft-benches", "--bench", "training_step", args.device)
    if args.device == "cuda":
        beside_torch(steps, args)
    else:
        time_alone(steps, args)
    if end != 0:
        sys.exit("The suite did not pass.")


if __name__ == "__main__":
    main()
