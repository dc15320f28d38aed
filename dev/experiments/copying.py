"""The experiment of dev/notes/copying.md: when does a model begin to copy, and which part of Megalodon delays it?

    make train
    pip install numpy matplotlib -r dev/requirements-torch.txt
    python3 dev/experiments/context_text.py --train-bytes 60000000      C sources of the Linux kernel, for `text`
    python dev/experiments/copying.py                                   all runs: about forty minutes on two cores
    python dev/plot_copying.py                                          the picture, and the tables of the page

Models are Megalodon, Megalodon with parts replaced by those of a Transformer, and the Llama of dev/bench_llama.py with
as many parameters (MODELS below). All read the same batches. The learning rate is constant after 50 steps of warm-up.

blocks   Blocks of 64 random symbols, of 48 kinds, each block followed by its copy, as in ablation.py, in chunks that
         show the first block. Small models of two layers, 16 x 256 tokens a step. A run ends when the mean loss of 20
         steps is below 3.2 nats, or after 600 steps. The table gets the number of steps, nan if it was not enough.
text     The demo preset, with attention to the whole sequence, on kernel sources: 4 x 512 bytes a step, 800 steps. The
         table gets the mean training loss of each 50 steps. The rows are 3 % of the text, so few bytes are read twice.

What the CSV file already has is not computed again, so the command can be repeated after an interruption. Needs numpy;
the Llama needs PyTorch.
"""
import argparse
import csv
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from ablation import COPIED, COPY, write_copies
from learning import BETA1, BETA2, CLIP, DECAY, EPS, row_starts
from results import load, save

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

MODELS = {
    "Megalodon": [],
    "one hop": ["--two-hop", "off"],
    "standard attention": ["--attention", "standard"],
    "both": ["--two-hop", "off", "--attention", "standard"],
    "Llama": None,
}
COLUMNS = ["experiment", "model", "rate", "seed", "step", "metric", "value"]
TEXT = "build/context/train.txt"
WARMUP, MEAN = 50, 20  # steps
SETUPS = {  # rows and tokens of a batch; steps; options of ./train; vocabulary, width, layers, heads, FFN of the Llama
    "blocks": (16, 256, 600, [*COPY, "--chunk-size", 256], (256, 64, 2, 2, 176)),
    "text": (4, 512, 800, ["--preset", "demo", "--chunk-size", 512], (256, 128, 4, 2, 416)),
}
INITIAL_VALUES = threading.Lock()  # PyTorch's random numbers are those of the process
RATES = {"blocks": [1e-3, 3e-3, 1e-2, 3e-2], "text": [1e-3, 3e-3, 1e-2]}


def copies_from(losses):
    """The number of steps after which a model copies, None if it does not yet."""
    means = [statistics.fmean(losses[i - MEAN:i]) for i in range(MEAN, len(losses) + 1)]
    return next((MEAN + i for i, mean in enumerate(means) if mean < COPIED), None)


def is_done(experiment, losses):
    return experiment == "blocks" and copies_from(losses) is not None


def read_log(path):
    if not os.path.exists(path):
        return []
    with open(path, newline="") as f:  # the last line may not be complete yet
        return [float(row["loss"]) for row in csv.DictReader(f) if row["val_loss"] is not None]


def train_ours(args, experiment, model, rate, seed, data, folder):
    """The training losses of ./train, which is ended once they decide."""
    rows, length, steps, options, _ = SETUPS[experiment]
    log, losses = os.path.join(folder, "log.csv"), []
    command = [args.train, "--threads", 1, "--data", data, *options, *MODELS[model], "--batch-size", rows, "--seq-len",
               length, "--steps", steps, "--lr", rate, "--warmup", WARMUP, "--schedule", "constant", "--lr-init-ratio",
               1 / WARMUP, "--seed", seed, "--val-every", 0, "--sample-every", 0, "--save-every", 0, "--out",
               os.path.join(folder, "run"), "--log", log]
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True)
    while process.poll() is None and not is_done(experiment, losses):
        time.sleep(1)
        losses = read_log(log)
    if process.poll() is None:
        process.kill()
    elif process.returncode != 0:
        sys.exit(f"error: {' '.join(str(word) for word in command)}: {process.stderr.read().strip()}")
    process.wait()
    return read_log(log)


def train_llama(args, experiment, _, rate, seed, data, folder):
    """The training losses of the Llama, in float32 on one thread, with the batches and the AdamW of ./train."""
    import numpy as np
    import torch
    from bench_llama import Llama

    args = argparse.Namespace(seed=seed)
    args.rows, args.length, steps, _, sizes = SETUPS[experiment]
    torch.set_num_threads(1)
    with INITIAL_VALUES:
        torch.manual_seed(seed)
        model = Llama(*sizes, args.length)
    text = torch.from_numpy(np.fromfile(data, np.uint8))
    text = text[:len(text) - len(text) // 10]  # ./train keeps the last tenth for validation
    optimizer = torch.optim.AdamW(model.parameters(), rate, (BETA1, BETA2), EPS, DECAY)
    offsets, losses = torch.arange(args.length + 1), []
    while len(losses) < steps and not is_done(experiment, losses):
        starts = torch.tensor(row_starts(args, len(losses), len(text)))
        rows = text[starts[:, None] + offsets].long()
        loss = model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (1 + len(losses) * (1 - 1 / WARMUP)) / WARMUP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run(args, experiment, model, rate, seed):
    """The rows of the table of one run: pairs (step, metric, value)."""
    with tempfile.TemporaryDirectory() as folder:
        data = TEXT
        if experiment == "blocks":
            data = os.path.join(folder, "copies.txt")
            write_copies(data)
        train = train_llama if model == "Llama" else train_ours
        losses = train(args, experiment, model, rate, seed, data, folder)
    if experiment == "blocks":
        return [(len(losses), "steps_to_copy", copies_from(losses) or math.nan)]
    return [(end, "train_loss", statistics.fmean(losses[end - 50:end])) for end in range(50, len(losses) + 1, 50)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SETUPS), help="experiments (default: %(default)s)")
    parser.add_argument("--models", default=",".join(MODELS), help="(default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="of blocks; text has one (default: %(default)s)")
    parser.add_argument("--train", default="./train", help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread (default: %(default)s)")
    parser.add_argument("--csv", default="dev/notes/copying.csv", help="(default: %(default)s)")
    args = parser.parse_args()
    for name, known in (("only", SETUPS), ("models", MODELS)):
        for word in getattr(args, name).split(","):
            if word not in known:
                parser.error(f"--{name} {word}: it is one of {', '.join(known)}")
    if "text" in args.only.split(",") and not os.path.exists(TEXT):
        sys.exit(f"error: {TEXT}: not found; python3 dev/experiments/context_text.py --train-bytes 60000000 writes it")
    rows = load(args.csv, COLUMNS)
    have = {(row["experiment"], row["model"], row["rate"], row["seed"]) for row in rows}
    wanted = [(experiment, model, rate, seed) for experiment in args.only.split(",")
              for seed in range(1, 2 if experiment == "text" else args.seeds + 1)
              for rate in RATES[experiment] for model in args.models.split(",")
              if (experiment, model, f"{rate:g}", str(seed)) not in have]

    def run_task(task):
        return task, run(args, *task)

    with ThreadPoolExecutor(args.jobs) as pool:
        for (experiment, model, rate, seed), found in pool.map(run_task, wanted):
            rows += [dict(zip(COLUMNS, (experiment, model, f"{rate:g}", str(seed), step, metric, f"{value:.5g}")))
                     for step, metric, value in found]
            save(args.csv, COLUMNS, rows)
            print(f"{experiment}, {model}, rate {rate:g}, seed {seed}: {found[-1][1]} {found[-1][2]:.4g}", flush=True)


if __name__ == "__main__":
    main()
