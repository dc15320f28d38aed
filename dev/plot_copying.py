"""Draws dev/notes/copying.png from dev/notes/copying.csv, and prints the tables of dev/notes/copying.md.

    python dev/experiments/copying.py
    python dev/plot_copying.py

Left: the steps until a model copies, for each learning rate, a point for each seed and a line through their medians;
runs that never did are drawn above the others. Right: the training loss on text at the rate that is best for the model.
Needs matplotlib.
"""

import argparse
import csv
import math
import statistics
import sys

from outputs import begins_with, check_output

PNG = b"\x89PNG\r\n\x1a\n"
COLUMNS = ["experiment", "model", "rate", "seed", "step", "metric", "value"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", default="dev/notes/copying.csv", help="(default: %(default)s)")
    parser.add_argument("--out", default="dev/notes/copying.png", help="(default: %(default)s)")
    args = parser.parse_args()
    check_output(args.out, [args.csv], "a PNG picture", lambda path: begins_with(path, PNG))
    try:
        with open(args.csv, newline="") as f:
            rows = list(csv.DictReader(f))
    except OSError as error:
        sys.exit(f"error: {args.csv}: {error.strerror}")
    if not rows or list(rows[0]) != COLUMNS:
        sys.exit(f"error: {args.csv}: is not a table of dev/experiments/copying.py")
    blocks, text = {}, {}  # model -> {rate: [steps]}, and model -> {rate: [(step, loss)]}
    for row in rows:
        rate, value = float(row["rate"]), float(row["value"])
        if row["experiment"] == "blocks":
            blocks.setdefault(row["model"], {}).setdefault(rate, []).append(value)
        else:
            text.setdefault(row["model"], {}).setdefault(rate, []).append((int(row["step"]), value))
    rates = sorted({rate for of_model in blocks.values() for rate in of_model})
    print("| model | " + " | ".join(f"{rate:g}" for rate in rates) + " |\n|---" + "|---" * len(rates) + "|")
    for model, of_model in blocks.items():
        cells = [", ".join("never" if math.isnan(v) else f"{v:.0f}" for v in of_model.get(rate, [])) for rate in rates]
        print(f"| {model} | " + " | ".join(cells) + " |")
    steps = sorted({step for of_model in text.values() for values in of_model.values() for step, _ in values})[1::2]
    if text:
        print("\n| model | rate | " + " | ".join(map(str, steps)) + " |\n|---|---" + "|---" * len(steps) + "|")
    for model, of_model in text.items():
        for rate, values in of_model.items():
            print(f"| {model} | {rate:g} | " + " | ".join(f"{dict(values)[step]:.3f}" for step in steps) + " |")

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2 if text else 1, figsize=(11 if text else 6, 3.8), dpi=110, squeeze=False)
    left = axes[0][0]
    known = [v for of_model in blocks.values() for values in of_model.values() for v in values if not math.isnan(v)]
    never = 1.12 * max(known)
    for place, (model, of_model) in enumerate(blocks.items()):
        values = {rate: [never if math.isnan(v) else v for v in of_model[rate]] for rate in sorted(of_model)}
        shift = 1.03 ** (place - len(blocks) / 2)  # so that points of different models do not hide each other
        left.plot([rate * shift for rate in values], [statistics.median(v) for v in values.values()], label=model,
                  color=f"C{place}")
        for rate, v in values.items():
            left.plot([rate * shift] * len(v), v, ".", color=f"C{place}")
    if any(math.isnan(v) for of_model in blocks.values() for values in of_model.values() for v in values):
        left.axhline(never, color="gray", linewidth=0.8, linestyle=":")
        left.text(rates[0], never, "never, in the steps of the experiment", va="bottom", fontsize=8, color="gray")
    left.set(xscale="log", xlabel="learning rate", ylabel="steps until it copies", title="Blocks of random symbols")
    if text:
        right = axes[0][1]
        for model, of_model in text.items():
            rate = min(of_model, key=lambda r: of_model[r][-1][1])
            right.plot(*zip(*of_model[rate]), label=f"{model}, rate {rate:g}", color=f"C{list(blocks).index(model)}")
        right.set(xlabel="step", ylabel="training loss, nats", title="Kernel sources")
    for ax in axes[0]:
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(args.out)


if __name__ == "__main__":
    main()
