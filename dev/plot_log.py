"""Plots the losses of one or more logs of ./train --log.

    python dev/plot_log.py build/log.png run.csv
    python dev/plot_log.py build/log.png slow.csv fast.csv --label "lr 3e-4" --label "lr 3e-3"

Lines are the training loss, a running mean over --mean steps. Points, where the log has them, are the validation loss,
and the smallest is written beside its point. The axis includes the lower nine tenths of all values, so that large
losses, of the first steps for example, do not hide the others. Losses that are not finite are left out. Needs
matplotlib.
"""

import argparse
import csv
import math
import sys

from outputs import begins_with, check_output

HEADER = "step,loss,grad_norm,lr,ms,tokens_per_s,val_loss"
PNG = b"\x89PNG\r\n\x1a\n"


def read_log(path):
    """The steps and training losses, and the steps and validation losses, that are finite."""
    train, val = [], []
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as f:
            if f.readline().strip() != HEADER:
                sys.exit(f"error: {path}: is no log of ./train: the first line is not {HEADER}")
            for number, row in enumerate(csv.reader(f), 2):
                try:
                    step, loss, val_loss = int(row[0]), float(row[1]), float(row[6] or "nan")
                except (ValueError, IndexError):
                    sys.exit(f"error: {path}: line {number} is no row of a log: {','.join(row)[:80]}")
                train += [(step, loss)] if math.isfinite(loss) else []
                val += [(step, val_loss)] if math.isfinite(val_loss) else []
    except OSError as e:
        sys.exit(f"error: {path}: {e.strerror}")
    if not train:
        sys.exit(f"error: {path}: has no step with a finite loss")
    return train, val


def running_mean(train, window):
    losses = [loss for _, loss in train]
    return [sum(losses[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(losses))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT.png")
    parser.add_argument("logs", nargs="+", metavar="LOG.csv")
    parser.add_argument("--label", action="append", default=[], help="name of a log in the picture, in order")
    parser.add_argument("--mean", type=int, default=20, metavar="N", help="steps of the running mean (20)")
    args = parser.parse_args()
    if args.mean < 1:
        sys.exit(f"error: --mean {args.mean}: it is 1 or more")
    if len(args.label) not in (0, len(args.logs)):
        sys.exit(f"error: --label: {len(args.label)} labels for {len(args.logs)} logs")
    check_output(args.out, args.logs, "a PNG picture", lambda path: begins_with(path, PNG))
    logs = [read_log(path) for path in args.logs]

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4), dpi=110)
    values = []
    for label, (train, val) in zip(args.label or args.logs, logs):
        mean = running_mean(train, args.mean)
        (line,) = ax.plot([step for step, _ in train], mean, linewidth=1, label=f"{label}: training")
        values += mean + [loss for _, loss in val]
        if val:
            best = min(val, key=lambda v: v[1])
            ax.plot(*zip(*val), "o", markersize=4, color=line.get_color(), label=f"{label}: validation")
            ax.annotate(f"{best[1]:.3f}", best, textcoords="offset points", xytext=(0, -11), ha="center", fontsize=8)
    values.sort()
    low, high = values[0], values[len(values) * 9 // 10]
    margin = 0.05 * (high - low) or 0.1
    ax.set_ylim(low - margin, high + margin)
    ax.set_xlabel("step")
    ax.set_ylabel(f"loss, nats; training: mean of {args.mean}")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(args.out, format="png")


if __name__ == "__main__":
    main()
