"""Draws how a training step of the shape `mid` grows with the length of a sequence and with the rank, beside torch and peft.

usage: python growth.py --plot FILE [--steps 2]

One sequence of 64 to 2,048 tokens, a fifth of them labelled, and 4 x 128 tokens with ranks 4 to 256; everything else is as in
compare.py.
"""
import argparse
import json
import os
import pathlib
import sys

import compare

TOKENS = [64, 128, 256, 512, 1024, 2048]
RANKS = [4, 16, 64, 256]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=pathlib.Path, required=True, help="PNG to draw to")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--binary", type=pathlib.Path, help="the benchmark, if it is built already")
    args = parser.parse_args()
    ours = args.binary or compare.build("cpu")
    mid = next(shape for shape in compare.run([ours, "--shapes"]) if shape["name"] == "mid")
    threads = os.cpu_count()

    def both(rank, batch):
        labelled = batch[1] // 5
        options = ["--rank", rank, "--sequences", batch[0], "--tokens", batch[1], "--labelled", labelled]
        found = compare.run([ours, "--case", "mid", "--steps", args.steps, *options], RAYON_NUM_THREADS=str(threads),
                            BURN_DEVICE="flex")
        shape = json.dumps(mid | {"rank": rank, "batch": batch, "labelled": labelled})
        torchs = [sys.executable, compare.__file__, "--threads", threads, "--steps", args.steps, "--torch", shape, "--dtypes", "f32"]
        return found, compare.run(torchs)

    print(f"{compare.machine('cpu')}; {threads} threads; {args.steps} steps; commit {compare.commit()}\n")
    print("| | ours s | torch s | ours MiB | torch MiB |\n|---|--:|--:|--:|--:|")
    rows = {"tokens": [], "rank": []}
    for name, value, rank, batch in [("tokens", n, 16, [1, n]) for n in TOKENS] + [("rank", r, r, [4, 128]) for r in RANKS]:
        found = both(rank, batch)
        rows[name].append((value, found))
        print(f"| {value} {name} | {found[0]['seconds']:.3f} | {found[1]['seconds']:.3f} "
              f"| {found[0]['peak_mib']:.0f} | {found[1]['peak_mib']:.0f} |", flush=True)
    plot(rows, args.plot)


def plot(rows, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6))
    titles = {"tokens": "tokens of one sequence", "rank": "rank, 4 x 128 tokens"}
    for column, (name, title) in enumerate(titles.items()):
        for row, (key, unit) in enumerate([("seconds", "seconds a step"), ("peak_mib", "MiB above the weights")]):
            axis = axes[row][column]
            values = [value for value, _ in rows[name]]
            for side, color, label in [(0, "#b7410e", "burn-peft"), (1, "#4c566a", "torch with peft")]:
                axis.plot(values, [found[side][key] for _, found in rows[name]], "o-", color=color, label=label)
            axis.set_xscale("log", base=2)
            if name == "tokens":
                axis.set_yscale("log")
            else:
                axis.set_ylim(bottom=0)
            axis.set_xticks(values, [str(value) for value in values])
            axis.set_xlabel(title)
            axis.set_ylabel(unit)
            axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.suptitle("A training step of `mid` with LoRA, f32, on a CPU")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
