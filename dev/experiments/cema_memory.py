"""The experiment of dev/notes/cema-memory.md: what CEMA's channels remember, before and after training.

    python3 dev/experiments/cema_memory.py      trains six small models: about ten minutes on two idle cores

Trains the demo preset on dev/data/shakespeare.txt with complex and with real CEMA (--cema real), a run for each seed;
runs that are in build/cema_memory already are not repeated. From their checkpoints it computes the impulse response of
every channel, k_t = Re sum_n g_n p_n q_n^t, and its spectrum, |sum_t k_t e^(-2 pi i f t)|^2. Writes a row for each
channel to the CSV file, draws the picture, and prints the table of the page. Needs numpy, safetensors and matplotlib.
"""
import argparse
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from safetensors import safe_open

from results import load, run_program, save
from outputs import begins_with, check_output
from plot_cema import impulse_response

KINDS = ["complex", "real"]
COLUMNS = ["cema", "seed", "step", "layer", "channel", "half", "most", "peak", "zero"]
LAYERS = 4
SHOWN_LAGS = 32
FOLDER = "build/cema_memory"
PNG = b"\x89PNG\r\n\x1a\n"


def train(args, task):
    """Trains, if that has not been done."""
    kind, seed, steps = task
    out = os.path.join(FOLDER, f"{kind}-{seed}-{steps}")
    if os.path.exists(model_file(*task)):
        return
    os.makedirs(FOLDER, exist_ok=True)
    printed = run_program(["./train", "--threads", 1, "--preset", "demo", "--cema", kind, "--seed", seed, "--steps",
                           steps, "--val-every", steps, "--val-batches", 0, "--sample-every", 0, "--save-every", 0,
                           "--out", out, "--overwrite"])
    with open(out + ".txt", "w") as log:
        log.write(printed)


def model_file(kind, seed, steps):
    return os.path.join(FOLDER, f"{kind}-{seed}-{steps}", f"step-{steps:08d}", "model.safetensors")


def validation_loss(kind, seed, steps):
    with open(os.path.join(FOLDER, f"{kind}-{seed}-{steps}.txt"), errors="replace") as log:
        return float(re.findall(r"val loss ([\d.]+)", log.read())[-1])


def kernels(task):
    """k (layers * D, lags) of a checkpoint."""
    model = safe_open(model_file(*task), "np")
    return np.concatenate([impulse_response(model, layer) for layer in range(LAYERS)])


def spectra(k):
    """|K|^2 (channels, frequencies) at the frequencies 0, 1/1024, ..., 1/2 cycles per token."""
    return np.abs(np.fft.rfft(k, 1024)) ** 2


def moved(args, kind, name):
    """How far training moved a parameter: standard deviation of its initial values, and of their changes."""
    initial, changes = [], []
    for seed in range(1, args.seeds + 1):
        before, after = (safe_open(model_file(kind, seed, steps), "np") for steps in (0, args.steps))
        for layer in range(LAYERS):
            values = before.get_tensor(f"layers.{layer}.mega.cema.{name}")
            initial.append(values.ravel())
            changes.append((after.get_tensor(f"layers.{layer}.mega.cema.{name}") - values).ravel())
    return np.std(np.concatenate(initial)), np.std(np.concatenate(changes))


def describe(task):
    """Rows of the CSV file. half, most: tokens that hold 50 % and 99 % of the energy of k. peak: frequency of the
    largest |K|. zero: |K(0)|^2, divided by the largest."""
    k = kernels(task)
    energy = np.cumsum(k**2, 1) / (k**2).sum(1, keepdims=True)
    half, most = ((energy < share).sum(1) + 1 for share in (0.5, 0.99))
    power = spectra(k)
    peak, zero = power.argmax(1) / 1024, power[:, 0] / power.max(1)
    D = len(k) // LAYERS
    return [dict(zip(COLUMNS, (*task, c // D, c % D, half[c], most[c], f"{peak[c]:.5g}", f"{zero[c]:.4g}")))
            for c in range(len(k))]


def column(rows, kind, seed, steps, name):
    return np.array([float(row[name]) for row in rows
                     if (row["cema"], int(row["seed"]), int(row["step"])) == (kind, seed, steps)])


def print_tables(args, rows):
    """Means over the seeds of what all channels of a model have."""
    seeds = range(1, args.seeds + 1)
    print("| CEMA | steps | 50 % of the energy, median | 99 %, median | 99 %, 90th percentile | 99 %, longest | "
          "low-pass, % | band-pass, % | high-pass, % | validation loss |")
    print("|---" * 10 + "|")
    for kind in KINDS:
        for steps in (0, args.steps):
            cells = []
            for seed in seeds:
                half, most, peak, zero = (column(rows, kind, seed, steps, name) for name in COLUMNS[5:])
                passes = zero < 0.5  # less than half of the largest power at frequency 0
                cells.append([np.median(half), np.median(most), np.quantile(most, 0.9), most.max(),
                              100 * (~passes).mean(), 100 * (passes & (peak < 0.5)).mean(),
                              100 * (passes & (peak == 0.5)).mean()])
            losses = ", ".join(f"{validation_loss(kind, seed, steps):.3f}" for seed in seeds if steps)
            print(f"| {kind} | {steps} | " + " | ".join(f"{v:.1f}" for v in np.mean(cells, 0)) + f" | {losses} |")
    for kind in KINDS:
        before, after = ({name: np.concatenate([column(rows, kind, seed, steps, name) for seed in seeds])
                          for name in COLUMNS[5:]} for steps in (0, args.steps))
        peaks = after["peak"][(after["zero"] < 0.5) & (after["peak"] < 0.5)]
        quartiles = ", ".join(f"{v:.3f}" for v in np.quantile(peaks, [0.25, 0.5, 0.75]))
        print(f"{kind}: correlation of the lengths (99 %) before and after training "
              f"{np.corrcoef(before['most'], after['most'])[0, 1]:.2f}; of the channels that were not low-pass "
              f"{100 * (after['zero'][before['zero'] < 0.5] < 0.5).mean():.0f} % still are not; quartiles of the "
              f"band-pass peaks, cycles per token: {quartiles}")
        for name in ("alpha", "delta", "theta", "gamma"):
            print("{}: {} had a standard deviation of {:.2f}, and its changes have {:.2f}".format(
                kind, name, *moved(args, kind, name)))


def draw(args, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, 3, figsize=(13, 7.4), dpi=110)
    shown = [("complex", 0, "complex, initial values"), ("complex", args.steps, f"complex, {args.steps} steps"),
             ("real", args.steps, f"real, {args.steps} steps")]
    for ax, (kind, steps, title) in zip(axes[0], shown):
        k = kernels((kind, 1, steps))
        centers = (k**2 * np.arange(k.shape[1])).sum(1) / (k**2).sum(1)  # of the energy: sorts more finely than a count
        largest = np.take_along_axis(k, np.abs(k).argmax(1)[:, None], 1)
        image = (k / largest)[np.argsort(centers)]
        ax.imshow(image[:, :SHOWN_LAGS], aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest",
                  extent=(-0.5, SHOWN_LAGS - 0.5, len(k), 0))
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("lag t, tokens")
        ax.set_ylabel("channels of all layers, sorted")
    lengths, curves, power = axes[1]
    for kind, color in (("complex", "#2b6cb0"), ("real", "#b0246a")):
        for steps, style in ((0, ":"), (args.steps, "-")):
            for seed in range(1, args.seeds + 1):
                most = np.sort([row["most"] for row in describe((kind, seed, steps))])
                lengths.plot(np.linspace(0, 100, len(most)), most, style, color=color, linewidth=1,
                             label=f"{kind}, {steps} steps" if seed == 1 else None)
    lengths.set_xlabel("channels, %")
    lengths.set_ylabel("tokens with 99 % of the energy of k")
    lengths.legend(fontsize=7)
    k = kernels(("complex", 1, args.steps))
    order = np.argsort([row["most"] for row in describe(("complex", 1, args.steps))], kind="stable")
    for share in (0.5, 0.9, 0.99, 1):
        c = order[int(share * (len(order) - 1))]
        label = f"layer {c // (len(k) // LAYERS)}, channel {c % (len(k) // LAYERS)}"
        curves.plot(k[c, :SHOWN_LAGS] / np.abs(k[c]).max(), ".-", markersize=3, linewidth=1, label=label)
        of_channel = spectra(k[c:c + 1])[0]
        power.plot(np.linspace(0, 0.5, len(of_channel)), of_channel / of_channel.max(), linewidth=1, label=label)
    curves.set_xlabel("lag t, tokens")
    curves.set_ylabel("k, divided by max |k|")
    curves.legend(fontsize=7)
    power.set_xlabel("frequency, cycles per token")
    power.set_ylabel("|K|^2, divided by its maximum")
    for ax in axes[1]:
        ax.grid(alpha=0.3)
    fig.tight_layout()
    fig.savefig(path, format="png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="of each kind (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="of training (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread (default: %(default)s)")
    parser.add_argument("--csv", default="dev/notes/cema-memory.csv", help="(default: %(default)s)")
    parser.add_argument("--out", default="dev/notes/cema-memory.png", help="(default: %(default)s)")
    args = parser.parse_args()
    load(args.csv, COLUMNS)
    check_output(args.out, [args.csv], "a PNG picture", lambda path: begins_with(path, PNG))
    tasks = [(kind, seed, steps) for seed in range(1, args.seeds + 1) for steps in (0, args.steps) for kind in KINDS]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda task: train(args, task), tasks))
    rows = [row for task in tasks for row in describe(task)]
    save(args.csv, COLUMNS, rows)
    print_tables(args, rows)
    draw(args, args.out)


if __name__ == "__main__":
    main()
