"""Plots the parts of a training step on a GPU, from the output of `make bench-cuda`.

    python dev/plot_bench.py dev/notes/bench-cuda.txt dev/notes/gpu-step.png

One bar for each step in the file. Its parts, in milliseconds, are grouped by kind. Needs matplotlib.
"""
import re
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KINDS = [  # a part is of the first kind whose pattern its name matches
    ("matrix products", r"^(w[a-z0-9]+|fc\d)( d(inp|weight))?$"),
    ("output and loss", r"^output"),
    ("attention", r"^attention"),
    ("CEMA", r"^CEMA"),
    ("TimestepNorm", r"TimestepNorm"),
    ("other norms, q and k", r"^(RMSNorm|LayerNorm|q, k)"),
    ("silu and gates", r"^(silu|gate)"),
    ("AdamW, gradient norm, zeroing", r"^(AdamW|grad_norm|zero_grad)"),
    ("embedding, other", r"."),
]
COLORS = ["#4c72b0", "#8fb1dd", "#dd8452", "#c44e52", "#55a868", "#a1d4ac", "#8172b3", "#937860", "#bbbbbb"]


def read_steps(path):
    """[(title, {kind: ms})], one entry for each table in the file."""
    steps = []
    for line in open(path):
        title = re.match(r"(?:a )?step of (\d+ x \d+ tokens, \w+(?:\.\w+)?): ([\d.]+) ms", line)
        if title:
            steps.append((f"{title[1]}\n{title[2]} ms", {kind: 0.0 for kind, _ in KINDS}))
        # Indented lines are included in the line above them.
        part = re.match(r"(\S.{0,31}?)\s+([\d.]+)\s+[\d.]+%", line)
        if part and steps and not part[1].startswith("all parts"):
            kind = next(kind for kind, pattern in KINDS if re.search(pattern, part[1]))
            steps[-1][1][kind] += float(part[2]) / 1000
    return steps


def main():
    source, target = sys.argv[1:3]
    steps = read_steps(source)
    if not steps:
        sys.exit(f"error: {source}: contains no table of `make bench-cuda`")
    figure, axes = plt.subplots(len(steps), 1, figsize=(9, 1.3 * len(steps) + 1), squeeze=False)
    for (title, parts), axis in zip(steps, axes[:, 0]):
        left, whole = 0.0, sum(parts.values())
        for (kind, ms), color in zip(parts.items(), COLORS):
            axis.barh(0, ms, left=left, color=color, label=kind)
            if ms > 0.035 * whole:
                axis.text(left + ms / 2, 0, f"{ms:.1f}", ha="center", va="center", fontsize=8, color="white")
            left += ms
        axis.set_yticks([0], [title], fontsize=9)
        axis.set_xlim(0, whole)
        axis.tick_params(axis="x", labelsize=8)
    axes[-1, 0].set_xlabel("ms", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncol=5, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.86))
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main()
