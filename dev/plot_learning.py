"""Draws the pictures of dev/notes/learning.md from the tables of dev/experiments/learning.py, and prints its tables.

    python dev/plot_learning.py                     those of dev/notes that exist
    python dev/plot_learning.py FILE.csv --out build/learning/picture.png

For `same`: the training loss of every step, and how far each curve is from that of ./train (or from the first curve).
For `time`: the training and the validation loss over the time of training. Needs matplotlib.
"""

import argparse
import csv
import math
import os
import sys

from outputs import begins_with, check_output

PNG = b"\x89PNG\r\n\x1a\n"
COLUMNS = ["experiment", "curve", "rate", "step", "tokens", "seconds", "metric", "value"]
TABLES = ["dev/notes/learning_same.csv", "dev/notes/learning_time.csv"]
NAMES = {"cpu": "./train, float32", "gpu": "./train_cuda_fp32", "bf16": "./train_cuda, bfloat16",
         "jax": "megalodon-jax, float32", "megalodon": "Megalodon, ./train_cuda", "llama": "Llama, PyTorch"}
COLOURS = {"cpu": "C0", "gpu": "C2", "bf16": "C1", "jax": "C4", "llama": "C3", "megalodon": "C0"}


def read_table(path):
    """(experiment, {(curve, rate): {metric: [(step, tokens, seconds, value)]}})."""
    try:
        with open(path, newline="") as f:
            rows = list(csv.DictReader(f))
    except OSError as error:
        sys.exit(f"error: {path}: {error.strerror}")
    if not rows or list(rows[0]) != COLUMNS:
        sys.exit(f"error: {path}: is not a table of dev/experiments/learning.py, or has no rows")
    found = {}
    for row in rows:
        of_curve = found.setdefault((row["curve"], row["rate"]), {})
        point = int(row["step"]), int(row["tokens"]), float(row["seconds"]), float(row["value"])
        of_curve.setdefault(row["metric"], []).append(point)
    experiments = {row["experiment"] for row in rows}
    if len(experiments) > 1:
        sys.exit(f"error: {path}: has rows of {' and '.join(sorted(experiments))}; use one file for each")
    order = list(NAMES)
    return experiments.pop(), dict(sorted(found.items(), key=lambda item: (order.index(item[0][0]), float(item[0][1]))))


def label_of(curves, key):
    """The curve's name, with its learning rate if there are several."""
    curve, rate = key
    several = sum(other == curve for other, _ in curves) > 1
    return NAMES[curve] + (f", rate {rate}" if several else "")


def differences(values, reference):
    """[(step, loss - reference loss)] of the steps that both have."""
    known = {step: loss for step, _, _, loss in reference}
    return [(step, loss - known[step]) for step, _, _, loss in values if step in known]


def same_model(curves):
    """The curves of the same model. The first one is the reference."""
    return [key for key in curves if key[0] != "llama" and "train_loss" in curves[key]]


def print_same(curves):
    compared = same_model(curves)
    if compared:
        reference = curves[compared[0]]["train_loss"]
        steps = [s for s in (1, 10, 50, 100, 200, 300, 400, 500, 1000, 1500, 2000) if s <= reference[-1][0]]
        print(f"Largest difference of the training loss from {label_of(curves, compared[0])}, up to a step, nats:\n")
        print("| curve | " + " | ".join(map(str, steps)) + " |\n|---" + "|---" * len(steps) + "|")
        for key in compared[1:]:
            found = differences(curves[key]["train_loss"], reference)
            cells = []
            for last in steps:
                known = [abs(d) for step, d in found if step <= last]
                cells.append(f"{max(known):.1e}" if len(known) == last else "")
            print(f"| {label_of(curves, key)} | " + " | ".join(cells) + " |")
        print()
    print("| curve | steps | last training loss | validation loss | bits per byte | seconds of training |")
    print("|---|---|---|---|---|---|")
    for key, metrics in curves.items():
        step, _, seconds, loss = metrics["train_loss"][-1]
        val = metrics["val_loss"][-1][3] if "val_loss" in metrics else math.nan
        print(f"| {label_of(curves, key)} | {step} | {loss:.6f} | {val:.6f} | {val / math.log(2):.4f} | "
              f"{seconds:.0f} |")


def print_time(curves):
    print("| model | learning rate | steps | M tokens | seconds | ms a step | training loss, last 100 steps | "
          "validation loss | bits per byte |\n|---|---|---|---|---|---|---|---|---|")
    for (curve, rate), metrics in curves.items():
        step, tokens, seconds, loss = metrics["train_loss"][-1]
        val = metrics["val_loss"][-1][3] if "val_loss" in metrics else math.nan
        print(f"| {NAMES[curve]} | {rate} | {step} | {tokens / 1e6:.1f} | {seconds:.0f} | {1e3 * seconds / step:.1f} | "
              f"{loss:.4f} | {val:.4f} | {val / math.log(2):.4f} |")


def draw_same(axes, curves):
    loss, difference = axes
    for key, metrics in curves.items():
        steps, losses = zip(*[(step, value) for step, _, _, value in metrics["train_loss"]])
        style = "--" if key[0] in ("jax", "gpu") else "-"  # curves that lie on each other stay visible
        loss.plot(steps, losses, style, color=COLOURS[key[0]], linewidth=1, label=label_of(curves, key))
    loss.set_xscale("log")
    loss.set_ylabel("training loss, nats")
    compared = same_model(curves)
    for key in compared[1:]:
        found = differences(curves[key]["train_loss"], curves[compared[0]]["train_loss"])
        difference.plot([step for step, _ in found], [abs(d) or math.nan for _, d in found], ".", markersize=3,
                        color=COLOURS[key[0]], label=label_of(curves, key))
    difference.set_yscale("log")
    if compared:
        difference.set_ylabel(f"|training loss − that of {label_of(curves, compared[0])}|, nats")
    for ax in axes:
        ax.set_xlabel("step")


def draw_time(axes, curves):
    rates = sorted({float(rate) for _, rate in curves})
    for key, metrics in curves.items():
        rank = rates.index(float(key[1]))
        style = dict(marker=".ox^sd"[rank % 6], markersize=4, linewidth=1, color=COLOURS[key[0]], alpha=0.8,
                     linestyle=("-", "--", ":", "-.")[rank % 4], label=label_of(curves, key))
        for ax, metric in zip(axes, ("train_loss", "val_loss")):
            points = metrics.get(metric, [])
            ax.plot([seconds for _, _, seconds, _ in points], [loss / math.log(2) for *_, loss in points], **style)
    axes[0].set_ylabel("training loss, bits per byte")
    axes[1].set_ylabel("validation loss, bits per byte")
    for ax in axes:
        ax.set_xlabel("seconds of training")
        ax.set_yscale("log")


def draw(path, out):
    """Prints the tables, then draws the picture, so that the tables need no matplotlib."""
    experiment, curves = read_table(path)
    print(f"{path}:\n")
    {"same": print_same, "time": print_time}[experiment](curves)
    print(flush=True)

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    fig, axes = plt.subplots(1, 2, figsize=(11, 4), dpi=110)
    {"same": draw_same, "time": draw_time}[experiment](axes, curves)
    for ax in axes:
        ax.grid(alpha=0.3, which="both")
        if experiment == "time":  # bits per byte, not powers of ten
            ax.yaxis.set_major_formatter(ScalarFormatter())
            ax.yaxis.set_minor_formatter(ScalarFormatter())
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(out, format="png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="FILE.csv", help=f"(default: {', '.join(TABLES)})")
    parser.add_argument("--out", help="picture of one table (default: beside it, with the ending .png)")
    args = parser.parse_args()
    tables = args.tables or [path for path in TABLES if os.path.exists(path)]
    if not tables:
        sys.exit(f"error: neither {' nor '.join(TABLES)} exists; dev/experiments/learning.py writes them")
    if args.out and len(tables) != 1:
        parser.error(f"--out {args.out}: is the picture of one table; name its file")
    for path in tables:
        out = args.out or os.path.splitext(path)[0] + ".png"
        check_output(out, tables, "a PNG picture", lambda path: begins_with(path, PNG))
        draw(path, out)


if __name__ == "__main__":
    main()
