"""Plots the measurements of dev/bench_context.py: python dev/plot_context.py [--table] [context.csv [context.png]]

Left: tokens/s against the length of the sequence. Right: peak memory. Both axes are logarithmic. Training is solid, a
prompt is dashed. A cross is the last length before a model does not fit, or takes more than a minute. --table prints
the measurements as tables in Markdown instead. The defaults are dev/notes/context.csv and dev/notes/context.png. The
plot needs matplotlib.
"""
import csv
import sys

NAMES = {"megalodon.c": "megalodon.c", "megalodon.c-whole": "megalodon.c, no segments", "llama": "Llama",
         "megalodon-jax": "megalodon-jax", "mamba-2": "Mamba-2"}
COLORS = dict(zip(NAMES, ("tab:red", "tab:orange", "tab:blue", "tab:green", "tab:purple")))
TASKS = {"training": "-", "prompt": "--"}


def read(source):
    """{(model, what): rows by length}, in the order of NAMES and TASKS."""
    with open(source, newline="") as f:
        rows = sorted(csv.DictReader(f), key=lambda r: int(r["length"]))
    series = {(m, w): [r for r in rows if (r["model"], r["what"]) == (m, w)] for m in NAMES for w in TASKS}
    return {key: rows for key, rows in series.items() if rows}


def short(length):
    length = int(length)
    return f"{length >> 20} M" if length >= 1 << 20 else f"{length >> 10} K" if length >= 1 << 10 else str(length)


def cell(row):
    if row is None:
        return ""
    if not row["ms"]:
        return row["note"].split(":")[0].split(", as at ")[0]
    ms, speed = float(row["ms"]), float(row["tokens_per_s"])
    time = f"{ms / 1e3:.3g} s" if ms >= 1e3 else f"{ms:.3g} ms"
    speed = f"{speed / 1e3:.0f} k" if speed >= 1e4 else f"{speed / 1e3:.1f} k"
    memory = f", {float(row['peak_mib']) / 1024:.1f} GiB" if row["peak_mib"] else ""
    mark = " (c)" if "activation checkpointing" in row["note"] else ""
    return f"{time}, {speed}{memory}{mark}"


def print_tables(series):
    lengths = sorted({int(r["length"]) for rows in series.values() for r in rows})
    for what in TASKS:
        models = [m for m, w in series if w == what]
        if not models:
            continue
        print(f"{what}: time, tokens/s, peak memory; (c): with activation checkpointing\n")
        print("| tokens | " + " | ".join(NAMES[m] for m in models) + " |\n|" + "---|" * (len(models) + 1))
        for length in lengths:
            found = {m: r for m in models for r in series[m, what] if int(r["length"]) == length}
            print(f"| {short(length)} | " + " | ".join(cell(found.get(m)) for m in models) + " |")
        print()
    cards = {f"{r['card'] or 'no GPU'}, {r['commit'] or 'unknown commit'}" for rows in series.values() for r in rows}
    print("Cards and commits: " + "; ".join(sorted(cards)))


def spread(labels, gap):
    """Moves labels (y in points, ..) apart, so that neighbours have a distance of `gap` points."""
    labels.sort(key=lambda label: label[0])
    for low, high in zip(labels, labels[1:]):
        high[0] = max(high[0], low[0] + gap)
    return labels


def plot(series, out):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    lengths = sorted({int(r["length"]) for rows in series.values() for r in rows})
    columns = (("tokens_per_s", 1, "tokens/s"), ("peak_mib", 1024, "peak memory, GiB"))
    fig, axes = plt.subplots(1, 2, figsize=(12, 5), dpi=100)
    for ax, (column, unit, title) in zip(axes, columns):
        ends = {}
        for (model, what), rows in series.items():
            points = [(int(r["length"]), float(r[column]) / unit) for r in rows if r["ms"] and r[column]]
            if not points:
                continue
            x, y = zip(*points)
            ax.plot(x, y, TASKS[what], marker="o", markersize=4, color=COLORS[model], linewidth=1.8)
            if not rows[-1]["ms"]:
                ax.plot(x[-1], y[-1], "x", markersize=10, markeredgewidth=2, color=COLORS[model])
            if what == "training" or (model, "training") not in series:
                ends[model] = (x[-1], y[-1])
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
        ax.set_xticks(lengths, [short(n).replace(" ", "") for n in lengths], fontsize=8)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y / 1e3:g} k" if y >= 1e3 else f"{y:g}"))
        ax.set_xlabel("tokens in the sequence")
        ax.set_ylabel(title)
        ax.grid(alpha=0.3)
        fig.canvas.draw()
        # direct labels right of the panel, each at the height of its line's end
        labels = spread([[ax.transData.transform(end)[1], model] for model, end in ends.items()], 16)
        for y, model in labels:
            ax.annotate(NAMES[model], (1, 0), (8, y - ax.bbox.y0 - 4), xycoords="axes fraction",
                        textcoords="offset pixels", color=COLORS[model], fontsize=9, annotation_clip=False)
    styles = [Line2D([], [], color="black", linestyle=style, label=what) for what, style in TASKS.items()]
    styles.append(Line2D([], [], color="black", marker="x", linestyle="", markeredgewidth=2,
                         label="beyond: does not fit, or\nmore than a minute"))
    axes[0].legend(handles=styles, fontsize=8, loc="lower left")
    fig.tight_layout()
    fig.savefig(out)


def main(source="dev/notes/context.csv", out="dev/notes/context.png", table=False):
    series = read(source)
    if table:
        print_tables(series)
    else:
        plot(series, out)


if __name__ == "__main__":
    paths = [a for a in sys.argv[1:] if a != "--table"]
    if len(paths) > 2 or any(p.startswith("-") for p in paths):
        sys.exit(__doc__)
    main(*paths, table="--table" in sys.argv)
