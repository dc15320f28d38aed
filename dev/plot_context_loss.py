"""Plots the measurements of dev/experiments/context.py.

    python dev/plot_context_loss.py [context_loss.csv [context_loss.png]]
    python dev/plot_context_loss.py --table [context_loss.csv]            prints them as Markdown tables instead

Left: the loss against the position in the text, for each variant: mean over texts and seeds, and as a band the smallest
and largest mean of a seed. Dotted: a fresh state every training length. Right: the loss with a carried state minus the
loss of the same model with a fresh state every 2,048 tokens; below 0, a longer context helps. Top: texts of the kind
that the models were trained on. Bottom: the Bible. Vertical lines: the lengths of training. The defaults are
dev/notes/context_loss.csv and dev/notes/context_loss.png. The plot needs matplotlib.
"""
import csv
import sys

BOOK = "bible"
LENGTHS = ["2k", "32k", "512k"]  # of training, in the order of the numbers in the column `every`


def load(path):
    """({(variant, reset, every, text, end): {seed: loss}}, [ends], [lengths])."""
    table = {}
    with open(path, newline="") as f:
        rows = csv.DictReader(f)
        if "variant" not in (rows.fieldnames or []):
            sys.exit(f"error: {path}: is not a table of dev/experiments/context.py")
        for row in rows:
            key = row["variant"], row["reset"], int(row["every"]), row["text"], int(row["end"])
            table.setdefault(key, {})[row["seed"]] = float(row["loss"])
    ends = sorted({key[4] for key in table})
    lengths = sorted({key[2] for key in table if key[1] == "all"})
    return table, ends, lengths


def variants_of(table):
    return list(dict.fromkeys(key[0] for key in table))


def length_of(variant, lengths):
    return lengths[LENGTHS.index(variant.partition("-")[0])]


def texts_of(table, book):
    return sorted({key[3] for key in table if (key[3] == BOOK) == book})


def seed_means(table, variant, reset, every, texts, end):
    """{seed: mean loss over the texts}, for the seeds that have all texts."""
    losses = [table.get((variant, reset, every, text, end), {}) for text in texts]
    seeds = set.intersection(*map(set, losses)) if losses else set()
    return {seed: sum(loss[seed] for loss in losses) / len(losses) for seed in seeds}


def curve(table, variant, reset, every, texts, ends, minus=None):
    """Lists of ends, means, minima and maxima over seeds; of differences to a reading (reset, every) if given."""
    points = []
    for end in ends:
        values = seed_means(table, variant, reset, every, texts, end)
        if minus:
            other = seed_means(table, variant, *minus, texts, end)
            values = {seed: values[seed] - other[seed] for seed in values if seed in other}
        if values:
            v = list(values.values())
            points.append((end, sum(v) / len(v), min(v), max(v)))
    return [list(column) for column in zip(*points)] or [[], [], [], []]


def short(n):
    return f"{n >> 20}M" if n >= 1 << 20 else f"{n >> 10}K" if n >= 1024 else str(n)


def print_table(table, ends, lengths):
    for book in (False, True):
        texts = texts_of(table, book)
        if not texts:
            continue
        print(f"\nNats per byte at positions up to ..., mean of {', '.join(texts)}; ± half the range of the "
              "seeds:\n")
        print("| variant | state | " + " | ".join(short(end) for end in ends) + " |")
        print("|---|---|" + "---|" * len(ends))
        for variant in variants_of(table):
            for reset, every in sorted({key[1:3] for key in table if key[0] == variant}):
                at, mean, low, high = curve(table, variant, reset, every, texts, ends)
                cells = dict(zip(at, (f"{m:.4f} ± {(b - a) / 2:.4f}" for m, a, b in zip(mean, low, high))))
                state = {"none": "carried", "all": f"fresh every {short(every)}"}.get(
                    reset, f"{reset} reset every {short(every)}")
                print(f"| {variant} | {state} | " + " | ".join(cells.get(end, "") for end in ends) + " |")
        print("\nPast the training length, carried minus fresh every training length (positive: the loss rises):\n")
        for variant in variants_of(table):
            own = length_of(variant, lengths)
            at, mean, low, high = curve(table, variant, "none", 0, texts, [e for e in ends if e > own], ("all", own))
            for row in zip(at, mean, low, high):
                print(f"- {variant}, up to {short(row[0])}: {row[1]:+.4f} ({row[2]:+.4f} to {row[3]:+.4f})")


def plot(table, ends, lengths, out):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    books = [book for book in (False, True) if texts_of(table, book)]
    fig, axes = plt.subplots(len(books), 2, figsize=(11, 4 * len(books)), dpi=70, squeeze=False)
    for (left, right), book in zip(axes, books):
        texts = texts_of(table, book)
        for i, variant in enumerate(variants_of(table)):
            color = f"C{i}"
            own = length_of(variant, lengths)
            at, mean, low, high = curve(table, variant, "none", 0, texts, ends)
            left.plot(at, mean, "o-", markersize=3, color=color, label=variant)
            left.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0)
            at, mean, _, _ = curve(table, variant, "all", own, texts, ends)
            left.plot(at, mean, ":", color=color)
            at, mean, low, high = curve(table, variant, "none", 0, texts, ends, ("all", lengths[0]))
            right.plot(at, mean, "o-", markersize=3, color=color, label=variant)
            right.fill_between(at, low, high, color=color, alpha=0.2, linewidth=0)
        left.plot([], [], ":", color="gray", label="fresh state every training length")
        right.axhline(0, color="black", linewidth=0.8)
        what = "the Bible" if book else f"{len(texts)} kernel directories"
        left.set_title(f"loss, {what}", fontsize=10)
        left.set_ylabel("nats/byte")
        right.set_title(f"carried minus fresh every {lengths[0]:,} tokens, {what}", fontsize=10)
        right.set_ylabel("difference, nats/byte")
        for ax in (left, right):
            for length in lengths:
                ax.axvline(length, color="gray", linewidth=0.8, linestyle="--")
            ax.set_xscale("log", base=2)
            ax.set_xticks(ends)
            ax.set_xticklabels([short(end) for end in ends], fontsize=8)
            ax.set_xlabel("position: the range of tokens that ends here")
            ax.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    fig.tight_layout(rect=(0, 0.04, 1, 1))
    fig.legend(handles, labels, loc="lower center", ncol=len(labels), fontsize=9, frameon=False)
    fig.savefig(out)


def main(source="dev/notes/context_loss.csv", out="dev/notes/context_loss.png"):
    plot(*load(source), out)


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if a != "--table"]
    if len(arguments) > 2 or "-h" in arguments or "--help" in arguments:
        sys.exit(__doc__)
    if "--table" in sys.argv:
        print_table(*load(*arguments[:1] or ["dev/notes/context_loss.csv"]))
    else:
        main(*arguments)
