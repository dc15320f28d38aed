"""The experiment of dev/notes/timestep-norm-long.md: TimestepNorm sees no later token, and stays exact.

    python3 dev/experiments/timestep_norm_long.py      a few minutes

Builds and runs dev/experiments/timestep_norm_long.c, which has the methods and what is measured. Its output is the CSV
file. Draws the picture, and prints the tables of the page. Needs matplotlib.
"""
import argparse
import csv
import math
import os
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from outputs import begins_with, check_output

PROGRAM = "build/timestep_norm_long"
COLUMNS = "experiment,level,seed,method,token,mean,variance,error,not_finite"
METHODS = {"megalodon.c": "#2b6cb0", "LayerNorm": "#2f855a", "sums in double": "#9aa7b8", "update in float": "#dd8a1c",
           "sums in float": "#b0246a"}
SHOWN = [1000, 100000, 10000000]  # tokens of the printed table
PNG = b"\x89PNG\r\n\x1a\n"


def measure(args):
    subprocess.run(["make", "-s", PROGRAM], check=True)
    with open(args.csv + ".tmp", "w") as f:
        subprocess.run([PROGRAM, *map(str, range(1, args.seeds + 1))], stdout=f, check=True)
    os.replace(args.csv + ".tmp", args.csv)


def print_tables(rows):
    print("| method | changes before | at the token | after |\n|---|---|---|---|")
    causal = [row for row in rows if row["experiment"] == "causality"]
    changed = 33  # CHANGED + 1
    for method in ("megalodon.c", "LayerNorm", "all tokens"):
        of_method = [(int(row["token"]), float(row["error"])) for row in causal if row["method"] == method]
        parts = [max(e for t, e in of_method if t < changed), max(e for t, e in of_method if t == changed),
                 max(e for t, e in of_method if t > changed)]
        print(f"| {method} | " + " | ".join(f"{part:.2g}" for part in parts) + " |")
    for level in ("0", "100", "1000"):
        print(f"\n| level {level} | " + " | ".join(f"{n:,} tokens" for n in SHOWN) + " | not finite | first by token |")
        print("|---" * (len(SHOWN) + 3) + "|")
        for method in METHODS:
            found = [row for row in rows if row["experiment"] == "long" and row["level"] == level
                     and row["method"] == method]
            errors = [max((float(row["error"]) for row in found if int(row["token"]) == n), default=math.nan)
                      for n in SHOWN]
            bad = [row for row in found if int(row["not_finite"])]
            seeds = len({row["seed"] for row in found})
            share = sum(int(row["not_finite"]) for row in bad) / (8 * 1e7 * seeds)
            first = min((int(row["token"]) for row in bad), default=0)
            print(f"| {method} | " + " | ".join(f"{e:.1e}" for e in errors) + f" | {100 * share:.1f} % | {first} |")


def draw(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = min(row["seed"] for row in rows)
    rows = [row for row in rows if row["seed"] == first]
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 3.8), dpi=110)
    for method, color, label in (("all tokens", "#b0246a", "norm over all 64 tokens"),
                                 ("megalodon.c", METHODS["megalodon.c"], "TimestepNorm (megalodon.c)"),
                                 ("LayerNorm", METHODS["LayerNorm"], "LayerNorm")):
        points = [(int(row["token"]), float(row["error"])) for row in rows
                  if row["experiment"] == "causality" and row["method"] == method]
        left.plot(*zip(*points), ".-", markersize=4, linewidth=1, color=color, label=label)
    left.axvline(33, color="#1c2733", linewidth=0.8, linestyle=":")
    left.set_yscale("symlog", linthresh=1e-2)
    left.set_ylim(0, 6)
    left.set_xlabel("token; token 33 is changed")
    left.set_ylabel("largest change of an output")
    left.legend(fontsize=7, loc="upper left")

    long_rows = [row for row in rows if row["experiment"] == "long" and row["level"] == "1000"]
    of = lambda method, column: [float(row[column]) for row in long_rows if row["method"] == method]
    tokens = of("exact", "token")
    middle.plot(tokens, of("exact", "mean"), color="#1c2733", linewidth=4, alpha=0.25, label="exact")
    for method in ("megalodon.c", "update in float", "sums in float"):
        middle.plot(tokens, of(method, "mean"), color=METHODS[method], linewidth=1.2, label=method)
    middle.set_xscale("log")
    middle.set_ylim(998.5, 1001.5)
    middle.set_xlabel("tokens")
    middle.set_ylabel("running mean")
    middle.ticklabel_format(axis="y", useOffset=False)
    middle.legend(fontsize=7, loc="lower left")

    for method, color in METHODS.items():
        right.plot(tokens, of(method, "error"), ".-", markersize=3, linewidth=1.2, color=color, label=method)
        bad = [n for n, count in zip(tokens, of(method, "not_finite")) if count]
        right.plot(bad, [30] * len(bad), "x", markersize=5, color=color)
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_ylim(1e-8, 100)
    right.set_xlabel("tokens; x: some outputs are NaN")
    right.set_ylabel("RMS error of the outputs")
    right.legend(fontsize=7, loc="center right", bbox_to_anchor=(1, 0.42))
    for ax in (left, middle, right):
        ax.grid(alpha=0.3)
    fig.tight_layout()
    fig.savefig(path, format="png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="of the input (default: %(default)s)")
    parser.add_argument("--csv", default="dev/notes/timestep-norm-long.csv", help="(default: %(default)s)")
    parser.add_argument("--out", default="dev/notes/timestep-norm-long.png", help="(default: %(default)s)")
    parser.add_argument("--draw", action="store_true", help="only draw and print what the CSV file has")
    args = parser.parse_args()
    is_table = lambda path: begins_with(path, COLUMNS.encode())
    check_output(args.csv, [], "a table of this program", is_table, args.csv + ".tmp")
    check_output(args.out, [args.csv], "a PNG picture", lambda path: begins_with(path, PNG))
    if not args.draw:
        measure(args)
    with open(args.csv, newline="") as f:
        rows = list(csv.DictReader(f))
    print_tables(rows)
    draw(rows, args.out)


if __name__ == "__main__":
    main()
