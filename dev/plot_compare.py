"""Plots the result of ./compare: the error of each tensor in data-flow order, so that one sees where it starts.

    ./compare A.safetensors B.safetensors > result.txt
    python dev/plot_compare.py OUT.png result.txt [another.txt ...]

Each result is a series. A red ring marks the first tensor of a result over its tolerance, a cross at the upper edge a
tensor without an error: NaN, missing, or of another shape. Errors of 0 are drawn at the lower edge. Needs matplotlib.
"""

import math
import os
import re
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from outputs import begins_with, check_output

MANY = 60  # above this number of tensors, only the first of each layer is labelled


def read(path):
    """[(name, relative L2 error or NaN, whether it passed)] of the rows of a result."""
    with open(path) as file:
        cells = [line.split() for line in file if re.search(r"  (ok|FAIL)$", line.rstrip())]
    rows = [(c[0], 0.0 if "both" in c else math.nan if c[3] == "-" else float(c[3]), c[-1] == "ok") for c in cells]
    if not rows:
        sys.exit(f"error: {path}: is not a result of ./compare: no line has a name and ends in ok or FAIL")
    return rows


def labelled(names):
    """[(index, label)]: all names, or the first of each layer and of those between layers."""
    if len(names) <= MANY:
        return list(enumerate(names))
    layers = [re.match(r"(\w+\.)?layers\.\d+", name) for name in names]
    parts = [layer[0] if layer else name.split(".")[0] for layer, name in zip(layers, names)]
    return [(i, parts[i] if layers[i] else names[i]) for i in range(len(names)) if i == 0 or parts[i] != parts[i - 1]]


def main(out, *paths):
    check_output(out, paths, "a PNG image", lambda path: begins_with(path, b"\x89PNG"))
    results = [read(path) for path in paths]
    names = list(dict.fromkeys(name for rows in results for name, _, _ in rows))
    place = {name: i for i, name in enumerate(names)}
    errors = [e for rows in results for _, e, _ in rows if e > 0 and math.isfinite(e)]
    low, high = min(errors, default=1e-8) / 3, max(errors, default=1) * 3
    fig, ax = plt.subplots(figsize=(max(7, min(0.27 * len(names) + 2, 14)), 5), dpi=110)
    for path, rows in zip(paths, results):
        heights = [min(max(e, low), high) if e == e else high for _, e, _ in rows]
        series, = ax.plot([place[name] for name, _, _ in rows], heights, "-", linewidth=0.8,
                          label=os.path.splitext(os.path.basename(path))[0])
        for (name, e, _), height in zip(rows, heights):
            ax.plot(place[name], height, "o" if e < math.inf else "x", markersize=4, color=series.get_color())
        first = next((i for i, row in enumerate(rows) if not row[2]), None)
        if first is not None:
            at = place[rows[first][0]], heights[first]
            ax.plot(*at, "o", markersize=11, markerfacecolor="none", color="red")
            ax.annotate(f"first over tolerance:\n{rows[first][0]}", at, (-8, 14), textcoords="offset points",
                        ha="right", fontsize=8, color="red")
    for i in range(1, len(names)):
        if names[i].split(".")[0] != names[i - 1].split(".")[0]:  # from act. to loss to grad.
            ax.axvline(i - 0.5, color="gray", linewidth=0.6, linestyle=":")
    labels = labelled(names)
    ax.set_xticks([i for i, _ in labels], [label for _, label in labels], rotation=90, fontsize=7)
    ax.set_xlim(-0.7, len(names) - 0.3)
    ax.set_yscale("log")
    ax.set_ylim(low / 1.5, high * 3)
    ax.set_ylabel("|A - B| / |A|")
    ax.grid(axis="y", alpha=0.3)
    ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(out)


if __name__ == "__main__":
    if len(sys.argv) < 3 or "-h" in sys.argv or "--help" in sys.argv:
        sys.exit(__doc__)
    main(*sys.argv[1:])
