"""Draws dev/notes/copying.png from dev/notes/copying.csv, and prints the tables of dev/notes/copying.md.

    python dev/experiments/copying.py
    python dev/plot_copying.py

The picture has the steps until a model copies, for each learning rate, a point for each seed and a line through their
medians. Runs that never did are drawn above the others. Needs matplotlib.
"""

import argparse
import csv
import math
import statistics
import sys

from outputs import begins_with, check_output

PNG = b"\x89PNG\r\n\x1a\n"
COLUMNS = ["model", "rate", "seed", "steps"]


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
    found = {}  # model -> {rate: [steps]}
    for row in rows:
        found.setdefault(row["model"], {}).setdefault(float(row["rate"]), []).append(float(row["steps"]))
    rates = sorted({rate for of_model in found.values() for rate in of_model})
    print("| model | " + " | ".join(f"{rate:g}" for rate in rates) + " |\n|---" + "|---" * len(rates) + "|")
    for model, of_model in found.items():
        cells = [", ".join("never" if math.isnan(v) else f"{v:.0f}" for v in of_model.get(rate, [])) for rate in rates]
        print(f"| {model} | " + " | ".join(cells) + " |")

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6.5, 4), dpi=110)
    ax.grid(alpha=0.3)
    every = [steps for of_model in found.values() for values in of_model.values() for steps in values]
    never = 1.12 * max(steps for steps in every if not math.isnan(steps))
    if any(math.isnan(steps) for steps in every):
        ax.axhline(never, color="gray", linewidth=0.8, linestyle=":")
        ax.text(rates[0], never, "never", va="bottom", fontsize=8, color="gray")
    for place, (model, of_model) in enumerate(found.items()):
        shift = 1.04 ** (place - len(found) / 2)  # so that points of different models do not hide each other
        values = {rate * shift: [never if math.isnan(v) else v for v in of_model[rate]] for rate in sorted(of_model)}
        ax.plot(list(values), [statistics.median(v) for v in values.values()], label=model, color=f"C{place}")
        for x, steps in values.items():
            ax.plot([x] * len(steps), steps, ".", color=f"C{place}")
    ax.set(xscale="log", xlabel="learning rate", ylabel="steps until it copies", ylim=(0, None))
    ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(args.out, format="png")


if __name__ == "__main__":
    main()
