"""Plots the two passes of training in segments: python dev/plot_segments.py [dev/notes/segments.png]

A sequence of four segments, as plumbing/segments.c processes it. Needs matplotlib.
"""
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

FORWARD, TRAIN, STATE, GRADIENT = "#ddd3ea", "#4c72b0", "#55a868", "#c44e52"
LEFT, STEP, WIDTH = 1.75, 2.1, 1.5  # of the box of a segment


def arrow(axis, start, end, color, **more):
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=color, linewidth=2,
                                   shrinkA=0, shrinkB=0, **more))


def box(axis, segment, y, height, color, text, text_color="black"):
    x = LEFT + STEP * segment
    axis.add_patch(Rectangle((x, y), WIDTH, height, facecolor=color, edgecolor="#555555", linewidth=0.8))
    axis.text(x + WIDTH / 2, y + height / 2, text, fontsize=9.5, ha="center", va="center", color=text_color)


def main(out="dev/notes/segments.png"):
    figure, axis = plt.subplots(figsize=(10, 4.3), dpi=90)
    for i in range(4):
        x = LEFT + STEP * i
        axis.text(x + WIDTH / 2, 4.6, f"segment {i}", fontsize=10.5, ha="center", weight="bold")
        if i < 3:
            box(axis, i, 3.6, 0.6, FORWARD, "forward")
            arrow(axis, (x + WIDTH, 3.9), (x + STEP, 3.9), STATE)
        else:
            axis.text(x + WIDTH / 2, 3.9, "not needed", fontsize=9.5, ha="center", va="center", color="#777777")
        axis.text(x - 0.3, 4.05, f"state {i}", fontsize=9, ha="center", color=STATE)
        arrow(axis, (x - 0.3, 3.8), (x - 0.3, 2.1), STATE, linestyle=":")  # kept, and read in pass 2
        arrow(axis, (x - 0.3, 2.1), (x, 2.1), STATE)
        box(axis, i, 0.9, 1.4, TRAIN, "forward,\nloss,\nbackward", "white")
        if i > 0:
            arrow(axis, (x, 1.15), (x - STEP + WIDTH, 1.15), GRADIENT)
            axis.text(x - 0.3, 0.78, f"dL/dstate {i}", fontsize=9, ha="center", va="center", color=GRADIENT)
    axis.text(0.1, 3.9, "pass 1:\nfirst to last", fontsize=10, va="center")
    axis.text(0.1, 1.6, "pass 2:\nlast to first", fontsize=10, va="center")
    axis.text(0.1, 0.2, "Activations exist for one segment at a time, in pass 2. States wait in main memory. The gradient "
              "equals that of the whole sequence.", fontsize=10, va="center")
    axis.set(xlim=(0, 10), ylim=(0, 5))
    axis.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    figure.savefig(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
