"""The experiment of dev/notes/attention-scores.md: what the norm of z does to attention while a model is trained.

    python3 dev/experiments/attention_scores.py    trains eight small models: about twenty minutes on two cores

Trains the demo preset on dev/data/shakespeare.txt with normalized and with standard attention (--attention standard) at
two learning rates, constant after 10 steps of warm-up, without clipping, as in dev/experiments/ablation.py. At steps 0,
10, 30, 100 and 300 it computes the attention scores of held-out text with dev/megalodon.py. For each layer the CSV file
gets:

    z             root mean square of z, before the norm
    score         largest score of a query and a key
    entropy       of a query's probabilities, divided by its largest value, log(number of keys); mean
    saturated     share of the queries whose largest probability is above 0.99
    own           probability of the query's own token; mean

The last three are those of the queries in the second half of each chunk, which see at least 33 keys. A row of
layer -1 has the loss of the held-out text. What the CSV file already has is not computed again. Draws the picture, and
prints the tables of the page. Needs PyTorch and matplotlib.
"""
import argparse
import math
import os
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor

import torch

from results import load, run_program, save
from megalodon import (State, cema_convolution, linear_forward, megalodon_forward, model_file, output_loss,
                       output_weight, read_model, rope_forward, rope_table)
from outputs import begins_with, check_output

KINDS = ["normalized", "standard"]
METRICS = ["z", "score", "entropy", "saturated", "own"]
STEPS = [0, 10, 30, 100, 300]
COLUMNS = ["attention", "rate", "seed", "step", "layer", "metric", "value"]
PNG = b"\x89PNG\r\n\x1a\n"
ROWS, LENGTH = 8, 256  # of the held-out text


def held_out_text():
    """tokens, targets (ROWS,LENGTH): windows that are spread over the last tenth of the text."""
    with open("dev/data/shakespeare.txt", "rb") as f:
        text = f.read()
    begin = len(text) * 9 // 10 + 1
    starts = [begin + row * ((len(text) - begin) // ROWS) for row in range(ROWS)]
    windows = torch.tensor([list(text[start:start + LENGTH + 1]) for start in starts])
    return windows[:, :-1], windows[:, 1:]


def measure(path, tokens, targets):
    """[(layer, metric, value)] of a checkpoint."""
    config, params = read_model(path, torch.float32)
    acts, H, C = {}, config.num_heads, config.chunk_size
    with torch.no_grad():
        final = megalodon_forward(config, params, tokens, State(config, ROWS, torch.float32), acts, cema_convolution)
        loss = output_loss(final, output_weight(config, params), targets)[1].item()
    found = [(-1, "loss", loss)]
    table = rope_table(C, config.z_dim // H, config.rope_base or 10000.0, torch.float32)
    later = torch.ones(C, C, dtype=torch.bool).triu(1)
    keys = torch.arange(1, C + 1.0)  # that each query sees
    for layer in range(config.num_layers):
        act = lambda name: acts[f"act.layers.{layer}.mega.{name}"]
        w = lambda name: params[f"layers.{layer}.mega.{name}"]
        z = linear_forward(act("rmsnorm"), w("wz.weight"), w("wz.bias"))
        # (chunks,H,C,dz)
        q, k = (rope_forward(act(name), table, 0, H).reshape(-1, C, H, config.z_dim // H).transpose(1, 2)
                for name in "qk")
        scores = q @ k.transpose(2, 3)
        P = torch.softmax(scores.masked_fill(later, -math.inf), -1)
        entropy = -(P * torch.log(P.clamp(min=1e-30))).sum(-1)[..., C // 2:] / torch.log(keys[C // 2:])
        largest = P.max(-1).values[..., C // 2:]
        found += [(layer, "z", z.square().mean().sqrt().item()),
                  (layer, "score", scores.masked_fill(later, -math.inf).max().item()),
                  (layer, "entropy", entropy.mean().item()),
                  (layer, "saturated", (largest > 0.99).float().mean().item()),
                  (layer, "own", P.diagonal(dim1=-2, dim2=-1)[..., C // 2:].mean().item())]
    return found


def train_run(kind, rate, seed, folder):
    """Trains from one step of STEPS to the next, and measures each checkpoint. Returns rows of the CSV file."""
    tokens, targets = held_out_text()
    rows = []
    for step in STEPS:
        if step == 0:
            command = ["./train", "--preset", "demo", "--attention", kind, "--seed", seed, "--lr", rate, "--schedule",
                       "constant", "--warmup", 10, "--grad-clip", 0, "--val-every", 0, "--sample-every", 0,
                       "--save-every", 0, "--out", folder, "--overwrite"]
        else:
            command = ["./train", "--resume", folder]
        run_program(command + ["--steps", step, "--threads", 1])
        found = measure(model_file(folder), tokens, targets)
        rows += [dict(zip(COLUMNS, (kind, f"{rate:g}", seed, step, layer, metric, f"{value:.6g}")))
                 for layer, metric, value in found]
        print(f"{kind}, rate {rate:g}, seed {seed}, step {step}: loss {found[0][2]:.3f}", flush=True)
    return rows


def means(rows):
    """{(metric, attention, rate, step, layer): mean over the seeds}"""
    values = {}
    for row in rows:
        key = row["metric"], row["attention"], row["rate"], int(row["step"]), int(row["layer"])
        values.setdefault(key, []).append(float(row["value"]))
    return {key: statistics.mean(of_key) for key, of_key in values.items()}


def print_tables(mean, rates):
    """Means over the layers, of score the largest layer's."""
    layers = range(1 + max(key[4] for key in mean))
    for rate in rates:
        print(f"| rate {rate}, attention | step | loss | z | largest score | entropy | saturated, % | own, % |")
        print("|---" * 8 + "|")
        for kind in KINDS:
            for step in STEPS:
                z, score, entropy, saturated, own = ([mean[metric, kind, rate, step, layer] for layer in layers]
                                                     for metric in METRICS)
                z, entropy, saturated, own = map(statistics.mean, (z, entropy, saturated, own))
                print(f"| {kind} | {step} | {mean['loss', kind, rate, step, -1]:.2f} | {z:.1f} | {max(score):.1f} | "
                      f"{entropy:.3f} | {100 * saturated:.1f} | {100 * own:.0f} |")
        print()


def draw(mean, rates, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = range(1 + max(key[4] for key in mean))
    shown = [("score", "largest score"), ("entropy", "entropy, of its largest value"), ("saturated", "share saturated")]
    fig, axes = plt.subplots(len(rates), 3, figsize=(13, 3.5 * len(rates)), dpi=110, squeeze=False)
    for rate, row in zip(rates, axes):
        for ax, (metric, label) in zip(row, shown):
            for kind, colors in (("normalized", plt.cm.Blues), ("standard", plt.cm.Reds)):
                for layer in layers:
                    values = [mean[metric, kind, rate, step, layer] for step in STEPS]
                    ax.plot(STEPS, values, ".-", linewidth=1.2, color=colors(0.4 + 0.6 * layer / max(layers)),
                            label=f"{kind}, layer {layer}")
            ax.set_xscale("symlog", linthresh=10)
            ax.set_xticks(STEPS, STEPS)
            ax.set_xlabel("step")
            ax.set_ylabel(f"{label}; rate {rate}")
            ax.grid(alpha=0.3)
            if metric == "score":
                ax.set_yscale("log")
    axes[0][0].legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(path, format="png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="of each variant (default: %(default)s)")
    parser.add_argument("--rates", default="0.003,0.03", help="learning rates (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread (default: %(default)s)")
    parser.add_argument("--csv", default="dev/notes/attention-scores.csv", help="(default: %(default)s)")
    parser.add_argument("--out", default="dev/notes/attention-scores.png", help="(default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = load(args.csv, COLUMNS)
    check_output(args.out, [args.csv], "a PNG picture", lambda path: begins_with(path, PNG))
    have = {(row["attention"], float(row["rate"]), int(row["seed"])) for row in rows}
    wanted = [(kind, float(rate), seed) for seed in range(1, args.seeds + 1) for rate in args.rates.split(",")
              for kind in KINDS if (kind, float(rate), seed) not in have]

    def run(task):
        with tempfile.TemporaryDirectory() as folder:
            return train_run(*task, os.path.join(folder, "run"))

    with ThreadPoolExecutor(args.jobs) as pool:
        for found in pool.map(run, wanted):
            rows += found
            save(args.csv, COLUMNS, rows)
    rates = sorted({row["rate"] for row in rows}, key=float)
    mean = means(rows)
    print_tables(mean, rates)
    draw(mean, rates, args.out)


if __name__ == "__main__":
    main()
