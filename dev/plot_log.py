"""Plots the losses of one or more training logs: python dev/plot_log.py OUT.png LOG.csv [LOG.csv ...]

The training loss is a running mean over 20 steps; the validation loss is shown as points. Needs matplotlib.
"""
import csv
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(out, *logs):
    fig, ax = plt.subplots(figsize=(7, 4), dpi=110)
    for path in logs:
        with open(path, newline="") as f:
            rows = list(csv.DictReader(f))
        steps = [int(r["step"]) for r in rows]
        loss = [float(r["loss"]) for r in rows]
        mean = [sum(loss[max(0, i - 19) : i + 1]) / len(loss[max(0, i - 19) : i + 1]) for i in range(len(loss))]
        val = [(int(r["step"]), float(r["val_loss"])) for r in rows if r["val_loss"]]
        (line,) = ax.plot(steps, mean, linewidth=1, label=f"{path}: training, mean of 20")
        ax.plot(*zip(*val), "o", markersize=4, color=line.get_color(), label="validation")
        best = min(val, key=lambda v: v[1])
        ax.annotate(f"{best[1]:.3f}", best, textcoords="offset points", xytext=(0, 8), ha="center")
    ax.set_xlabel("step")
    ax.set_ylabel("loss, nats")
    ax.set_ylim(top=3.5)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(out)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
