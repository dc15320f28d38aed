"""Plots the measurements of dev/bench_length.py: python dev/plot_length.py [length.csv [length.png]]

Left: the time per token of decoding and training against the number of tokens. Right: the peak memory of training. The
defaults are dev/notes/length.csv and dev/notes/length.png. Needs matplotlib.
"""
import csv
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(source="dev/notes/length.csv", out="dev/notes/length.png"):
    series = {}
    with open(source, newline="") as f:
        for row in csv.DictReader(f):
            series.setdefault(row["series"], []).append(row)
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), dpi=110)
    for name, rows in series.items():
        tokens = [int(r["tokens"]) for r in rows]
        if name in ("decoding", "training"):
            left.plot(tokens, [float(r["ms_per_token"]) for r in rows], "o-", markersize=4, label=name)
        else:
            mib = [float(r["peak_mib"]) for r in rows]
            slope = (mib[-1] - mib[0]) * 2**20 / max(tokens[-1] - tokens[0], 1)
            label = "--recompute" if "recompute" in name else "all activations kept"
            right.plot(tokens, mib, "o-", markersize=4, label=f"{label}: {slope / 1024:.1f} KiB/token")
    left.set_xscale("log", base=2)
    left.set_ylim(bottom=0)
    left.set_xlabel("tokens read before (decoding), or per sequence (training)")
    left.set_ylabel("ms/token")
    right.set_xlim(left=0)
    right.set_ylim(bottom=0)
    right.set_xlabel("tokens per sequence")
    right.set_ylabel("peak memory of training, MiB")
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(out)


if __name__ == "__main__":
    if len(sys.argv) > 3 or "-h" in sys.argv or "--help" in sys.argv:
        sys.exit(__doc__)
    main(*sys.argv[1:])
