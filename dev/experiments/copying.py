"""The experiment of dev/notes/copying.md: when does a model begin to copy, and which part of Megalodon delays it?

    make train
    pip install "torch>=2.4" numpy matplotlib
    python dev/experiments/copying.py           about half an hour on two cores
    python dev/plot_copying.py                  the picture, and the table of the page

Models are Megalodon, Megalodon with parts replaced by those of a Transformer, and the Llama of dev/bench_llama.py with
about as many parameters (MODELS below). The text is that of `copy` in ablation.py: blocks of 64 random symbols, of 48
kinds, each block followed by its copy, in chunks that show the first block. All models have two layers of width 64 and
read the same batches of 16 x 256 tokens, at a constant learning rate after 50 steps of warm-up. A run ends when the
mean loss of 20 steps is below 3.2 nats, or after 600 steps. The table gets the number of steps, nan if 600 were not
enough.

What the CSV file already has is not computed again, so the command can be repeated after an interruption.
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
RATES = {1e-3: 1, 3e-3: 3, 1e-2: 3, 3e-2: 1}  # rate: number of seeds
ROWS, LENGTH, STEPS, WARMUP, MEAN = 16, 256, 600, 50, 20
LLAMA = 256, 64, 2, 2, 176  # vocabulary, width, layers, heads, width of the FFN
COLUMNS = ["model", "rate", "seed", "steps"]
INITIAL_VALUES = threading.Lock()  # PyTorch's random numbers are those of the process


def copies_from(losses):
    """The number of steps after which a model copies, None if it does not yet."""
    means = [statistics.fmean(losses[i - MEAN:i]) for i in range(MEAN, len(losses) + 1)]
    return next((MEAN + i for i, mean in enumerate(means) if mean < COPIED), None)


def read_log(path):
    if not os.path.exists(path):
        return []
    with open(path, newline="") as f:  # the last line may not be complete yet
        return [float(row["loss"]) for row in csv.DictReader(f) if row["val_loss"] is not None]


def train_ours(args, model, rate, seed, data, folder):
    """The training losses of ./train, which is ended once the model copies."""
    log, losses = os.path.join(folder, "log.csv"), []
    command = [args.train, "--threads", 1, "--data", data, *COPY, "--chunk-size", LENGTH, *MODELS[model],
               "--batch-size", ROWS, "--seq-len", LENGTH, "--steps", STEPS, "--seed", seed, "--lr", rate, "--warmup",
               WARMUP, "--schedule", "constant", "--lr-init-ratio", 1 / WARMUP, "--val-every", 0, "--sample-every", 0,
               "--save-every", 0, "--out", os.path.join(folder, "run"), "--log", log]
    command = [str(word) for word in command]
    with open(os.path.join(folder, "errors"), "w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None and copies_from(losses) is None:
            time.sleep(1)
            losses = read_log(log)
        if process.poll() is None:
            process.kill()
            process.wait()
        elif process.returncode != 0:
            errors.seek(0)
            sys.exit(f"error: {' '.join(command)}: {errors.read().strip()}")
    return read_log(log)


def train_llama(rate, seed, data):
    """The training losses of the Llama, in float32 on one thread, with the batches and the AdamW of ./train."""
    import numpy as np
    import torch
    from bench_llama import Llama

    torch.set_num_threads(1)
    with INITIAL_VALUES:
        torch.manual_seed(seed)
        model = Llama(*LLAMA, LENGTH)
    text = torch.from_numpy(np.fromfile(data, np.uint8))
    text = text[:len(text) - len(text) // 10]  # ./train keeps the last tenth for validation
    batches = argparse.Namespace(seed=seed, rows=ROWS, length=LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), rate, (BETA1, BETA2), EPS, DECAY)
    offsets, losses = torch.arange(LENGTH + 1), []
    while len(losses) < STEPS and copies_from(losses) is None:
        rows = text[torch.tensor(row_starts(batches, len(losses), len(text)))[:, None] + offsets].long()
        loss = model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (1 + len(losses) * (1 - 1 / WARMUP)) / WARMUP)  # as ./train
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def steps_to_copy(args, model, rate, seed):
    with tempfile.TemporaryDirectory() as folder:
        data = os.path.join(folder, "copies.txt")
        write_copies(data)
        losses = (train_llama(rate, seed, data) if model == "Llama" else
                  train_ours(args, model, rate, seed, data, folder))
    return copies_from(losses) or math.nan


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="(default: all)")
    parser.add_argument("--train", default="./train", help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread (default: %(default)s)")
    parser.add_argument("--csv", default="dev/notes/copying.csv", help="(default: %(default)s)")
    args = parser.parse_args()
    for word in args.models.split(","):
        if word not in MODELS:
            parser.error(f"--models {word}: it is one of {', '.join(MODELS)}")
    rows = load(args.csv, COLUMNS)
    have = {(row["model"], row["rate"], row["seed"]) for row in rows}
    wanted = [(model, rate, seed) for rate, seeds in RATES.items() for seed in range(1, seeds + 1)
              for model in args.models.split(",") if (model, f"{rate:g}", str(seed)) not in have]
    with ThreadPoolExecutor(args.jobs) as pool:
        for (model, rate, seed), steps in zip(wanted, pool.map(lambda task: steps_to_copy(args, *task), wanted)):
            rows.append(dict(zip(COLUMNS, (model, f"{rate:g}", str(seed), f"{steps:g}"))))
            save(args.csv, COLUMNS, rows)
            print(f"{model}, rate {rate:g}, seed {seed}: {steps:g} steps", flush=True)


if __name__ == "__main__":
    main()
