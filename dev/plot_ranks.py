"""Plots what each rank holds and what ranks communicate: python dev/plot_ranks.py [dev/notes/ranks.png]

Four ranks with `--chunk-parallel 2`: two chunk-parallel groups of two ranks. Needs matplotlib.
"""
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

TOKENS, FULL, LOCAL, SHARD, STATES = "#ddd3ea", "#4c72b0", "#dd8452", "#55a868", "#c44e52"
LEFT, WIDTH, HEIGHT = [0.25, 5.75], 4.0, 2.55  # of the box of a rank
BOTTOM = [4.3, 0.6]                            # of the boxes of a group
CELL = 2.5 / 16                                # width of a chunk of tokens


def bar(axis, x, y, width, name, color, first=0, share=1):
    """A bar of the model's size, of which the rank holds the fraction `share`, from the fraction `first` on."""
    axis.text(x, y + 0.12, name, fontsize=9, va="center")
    x, width = x + 1.1, width - 1.1
    axis.add_patch(Rectangle((x, y), width, 0.24, facecolor="none", edgecolor="#bbbbbb", linewidth=0.8))
    axis.add_patch(Rectangle((x + first * width, y), share * width, 0.24, facecolor=color, edgecolor="none"))


def draw_rank(axis, rank, x, y):
    cp_rank, dp_rank = rank % 2, rank // 2
    axis.add_patch(Rectangle((x, y), WIDTH, HEIGHT, facecolor="#f7f7f7", edgecolor="#555555"))
    axis.text(x + 0.15, y + HEIGHT - 0.2, f"rank {rank}", fontsize=11, weight="bold", va="center")
    axis.text(x + WIDTH - 0.15, y + HEIGHT - 0.2, f"dp_rank {dp_rank}, cp_rank {cp_rank}", fontsize=9, va="center",
              ha="right")
    for row in range(2):  # a cell is a chunk; filled cells belong to this rank
        top = y + HEIGHT - 0.68 - 0.29 * row
        axis.text(x + 0.15, top + 0.11, f"sequence {2 * dp_rank + row}", fontsize=9, va="center")
        for i in range(16):
            axis.add_patch(Rectangle((x + 1.25 + CELL * i, top), CELL - 0.01, 0.22, edgecolor="#888888", linewidth=0.5,
                                     facecolor=TOKENS if i // 8 == cp_rank else "none"))
    axis.text(x + 1.25, y + HEIGHT - 1.13, "tokens 0 to 511" if cp_rank == 0 else "", fontsize=8, va="center")
    axis.text(x + 1.25 + CELL * 8, y + HEIGHT - 1.13, "tokens 512 to 1023" if cp_rank else "", fontsize=8, va="center")
    bar(axis, x + 0.15, y + 0.96, WIDTH - 0.4, "parameters", FULL)
    bar(axis, x + 0.15, y + 0.56, WIDTH - 0.4, "gradients", LOCAL)
    bar(axis, x + 0.15, y + 0.16, WIDTH - 0.4, "moments", SHARD, rank / 4, 1 / 4)


def arrow(axis, start, end, color, **more):
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="<|-|>", mutation_scale=16, color=color, linewidth=2, **more))


def main(out="dev/notes/ranks.png"):
    figure, axis = plt.subplots(figsize=(10, 7.6), dpi=90)
    for rank in range(4):
        draw_rank(axis, rank, LEFT[rank % 2], BOTTOM[rank // 2])
    for bottom in BOTTOM:  # between the chunk-parallel ranks of a group
        arrow(axis, (LEFT[0] + WIDTH, bottom + 1.75), (LEFT[1], bottom + 1.75), STATES)
        axis.text(5, bottom + 1.92, "all-gather,\nevery layer:", fontsize=8.5, color=STATES, ha="center")
        axis.text(5, bottom + 1.58, "state of\nTimestepNorm\nand CEMA,\nand gradients", fontsize=8.5,
                  color=STATES, ha="center", va="top")
    # among all ranks
    axis.add_patch(Rectangle((0.25, 3.33), 9.5, 0.8, facecolor="#eef5ef", edgecolor="none"))
    axis.text(5, 3.73, "every step, all four ranks:   reduce-scatter of the gradients; each rank updates the "
              "quarter of the parameters\nwhose moments it holds (ZeRO-1); all-gather of the parameters", fontsize=9.5,
              ha="center", va="center", color="#2f6b3c")
    for x in (LEFT[0] + 0.5 * WIDTH, LEFT[1] + 0.5 * WIDTH):
        arrow(axis, (x, 4.08), (x, 4.35), SHARD, shrinkA=0, shrinkB=0)
        arrow(axis, (x, 3.1), (x, 3.38), SHARD, shrinkA=0, shrinkB=0)
    axis.text(5, 7.2, "mpirun -n 4 ./train --chunk-parallel 2 --batch-size 4 --seq-len 1024", fontsize=10.5,
              family="monospace", ha="center", va="center")
    for x, color, text in [(0.25, TOKENS, "chunks of 64 tokens of this rank"),
                           (3.45, FULL, "all, equal on all ranks"), (5.95, LOCAL, "all, from its own tokens"),
                           (8.4, SHARD, "ZeRO-1 shard")]:
        axis.add_patch(Rectangle((x, 0.12), 0.3, 0.22, facecolor=color, edgecolor="#888888", linewidth=0.5))
        axis.text(x + 0.4, 0.23, text, fontsize=9, va="center")
    axis.set(xlim=(0.1, 9.9), ylim=(0, 7.4))
    axis.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    figure.savefig(out)


if __name__ == "__main__":
    if len(sys.argv) > 2 or "-h" in sys.argv or "--help" in sys.argv:
        sys.exit(__doc__)
    main(*sys.argv[1:])
