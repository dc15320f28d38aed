"""Draws dev/notes/ablation.png from dev/notes/ablation.csv, and prints the tables of dev/notes/ablation.md.

    python3 dev/experiments/ablation.py
    python dev/plot_ablation.py
    python dev/plot_ablation.py --csv dev/notes/ablation_enwik8.csv --out dev/notes/ablation_enwik8.png

Drawn is what the table has: the validation loss of each variant, a point for each seed; the loss after 100 steps for
each learning rate; the steps until a model copies, and the loss where it has to count, a point for each seed. Needs
matplotlib.
"""

import argparse
import csv
import math
import statistics
import sys

from outputs import begins_with, check_output

PNG = b"\x89PNG\r\n\x1a\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", default="dev/notes/ablation.csv", help="(default: %(default)s)")
    parser.add_argument("--out", default="dev/notes/ablation.png", help="(default: %(default)s)")
    args = parser.parse_args()
    check_output(args.out, [args.csv], "a PNG picture", lambda path: begins_with(path, PNG))
    try:
        with open(args.csv, newline="") as f:
            rows = list(csv.DictReader(f))
    except OSError as error:
        sys.exit(f"error: {args.csv}: {error.strerror}")
    if not rows or list(rows[0]) != ["experiment", "variant", "seed", "x", "metric", "value"]:
        sys.exit(f"error: {args.csv}: is not a table of dev/experiments/ablation.py")
    found = {}  # (experiment, metric) -> {variant: [(x, value)]}
    for row in rows:
        of_metric = found.setdefault((row["experiment"], row["metric"]), {})
        of_metric.setdefault(row["variant"], []).append((float(row["x"]), float(row["value"])))
    losses = found.get(("text", "val_loss"), {})
    losses = {variant: [value for _, value in values] for variant, values in losses.items()}
    if losses:
        print("| variant | validation loss, mean | each seed | largest gradient norm, mean |\n|---|---|---|---|")
    for variant, values in losses.items():
        largest = statistics.mean(value for _, value in found[("text", "grad_norm_max")][variant])
        each = ", ".join(f"{value:.3f}" for value in values)
        print(f"| {variant} | {statistics.mean(values):.3f} | {each} | {largest:.1f} |")
    rates = found.get(("rate", "last_loss"), {})
    if rates:
        columns = [x for x, _ in next(iter(rates.values()))]
        print("| variant | " + " | ".join(f"{x:g}" for x in columns) + " |")
        print("|---" * (len(columns) + 1) + "|")
    for variant, values in rates.items():
        print(f"| {variant} | " + " | ".join("not finite" if math.isnan(v) else f"{v:.2f}" for _, v in values) + " |")

    copies = found.get(("copy", "steps_to_copy"), {})
    if copies:
        chunks = sorted({x for values in copies.values() for x, _ in values}, reverse=True)
        print("| variant | " + " | ".join(f"chunks of {x:g}: steps, each seed | last loss" for x in chunks) + " |")
        print("|---" * (2 * len(chunks) + 1) + "|")
    for variant, values in copies.items():
        cells = []
        for chunk in chunks:
            steps = ["never" if math.isnan(step) else f"{step:.0f}" for x, step in values if x == chunk]
            last = statistics.mean(loss for x, loss in found[("copy", "last_loss")][variant] if x == chunk)
            cells += [", ".join(steps), f"{last:.2f}"]
        print(f"| {variant} | " + " | ".join(cells) + " |")
    steps = {variant: [step for x, step in values if x == max(chunks)] for variant, values in copies.items()}

    counts = found.get(("counts", "loss"), {})
    counts = {variant: [value for _, value in values] for variant, values in counts.items()}
    best = {name: found[("counts", metric)]["Megalodon"][0][1] for name, metric in
            (("with all symbols so far", "best_loss"), ("with those of the chunk", "best_loss_of_chunk")) if counts}
    if counts:
        print("| variant | loss, mean | each seed |\n|---|---|---|")
    for variant, values in counts.items():
        print(f"| {variant} | {statistics.mean(values):.3f} | {', '.join(f'{value:.3f}' for value in values)} |")
    for name, value in best.items():
        print(f"| the best possible {name} | {value:.3f} | |")

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = {"text": losses, "copy": steps, "counts": counts}  # of panels with a point a seed
    labels = {"text": "validation loss, nats", "copy": "steps until it copies",
              "counts": "loss where it has to count, nats"}
    panels = [name for name in ("text", "rate", "copy", "counts") if (rates if name == "rate" else points[name])]
    columns = min(len(panels), 2)
    size = -(-len(panels) // columns), columns
    fig, axes = plt.subplots(*size, figsize=(5.5 * size[1], 3.6 * size[0]), dpi=110, squeeze=False)
    for ax in axes.flat[len(panels):]:
        ax.axis("off")
    for panel, ax in zip(panels, axes.flat):
        ax.grid(alpha=0.3)
        if panel != "rate":
            for place, values in enumerate(points[panel].values()):
                ax.plot(values, [place] * len(values), "o", markersize=5, alpha=0.7)
                ax.plot(statistics.mean(values), place, "k|", markersize=14)
            ax.set_yticks(range(len(points[panel])), list(points[panel]))
            ax.invert_yaxis()
            ax.set_xlabel(labels[panel] + "; a point a seed, a line the mean")
            for place, (name, value) in enumerate(best.items() if panel == "counts" else ()):
                ax.axvline(value, color="gray", linestyle=("--", ":")[place], label="best " + name)
                ax.legend(fontsize=7)
        else:
            for name, values in rates.items():
                ax.plot(*zip(*values), "o-", markersize=4, linewidth=1, label=name)
            least = min(value for values in rates.values() for _, value in values)
            ax.set_ylim(0.97 * least, 1.6 * least)  # a model that is lost is above
            ax.set_xscale("log")
            ax.set_xlabel("learning rate")
            ax.set_ylabel("loss of steps 91 to 100, nats")
            ax.legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(args.out, format="png")


if __name__ == "__main__":
    main()
