"""The experiment of dev/notes/ablation.md: Megalodon with parts replaced.

    python3 dev/experiments/ablation.py                     small models: an hour and a half on two cores
    python3 dev/experiments/ablation.py --only text --train ./train_cuda --preset enwik8 --batch 16x512 \\
        --steps 600 --csv dev/notes/ablation_enwik8.csv     a larger one, on a GPU
    python3 dev/plot_ablation.py                            the picture, and the tables of the page

Variants are Megalodon, Megalodon with one part replaced, and with all parts replaced (VARIANTS below). All have the
same tensors, the same initial values for a seed, and the same batches.

text     --preset on dev/data/shakespeare.txt: validation loss, gradient norms, tokens/s, peak memory.
rate     100 steps of --preset on the same text, for learning rates from 3e-3 to 3, constant after 10 steps of
         warm-up, no clipping: which ones still learn?
copy     A small model on blocks of 64 random symbols, of 48 kinds, each block followed by its copy: after how many
         steps does it copy? In chunks of 256 tokens attention sees the first block. In chunks of 32 it cannot: only
         CEMA's state and TimestepNorm's moments come from there.
counts   The same model in chunks of 32 on documents of 1,024 symbols, each symbol drawn at random with probabilities
         that are the document's own. Who counts the symbols predicts best, and the more of them the better, so the loss
         tells what is remembered from earlier chunks. The best possible loss is computed, too, with all symbols so far
         and with those of the current chunk only.

What the CSV file already has is not computed again, so the command can be repeated after an interruption. Only Python's
standard library is needed.
"""
import argparse
import csv
import math
import os
import random
import re
import statistics
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor

from results import load, run_program, save

VARIANTS = {
    "Megalodon": [],
    "real CEMA": ["--cema", "real"],
    "no CEMA": ["--cema", "none"],
    "LayerNorm": ["--timestep-norm", "layer"],
    "standard attention": ["--attention", "standard"],
    "one hop": ["--two-hop", "off"],
    "all replaced": ["--cema", "none", "--timestep-norm", "layer", "--attention", "standard", "--two-hop", "off"],
}
COLUMNS = ["experiment", "variant", "seed", "x", "metric", "value"]
RATES = [3e-3, 1e-2, 3e-2, 1e-1, 0.3, 1, 3]
BLOCK, SYMBOLS, COPIES = 64, 48, 20000  # tokens of a block, kinds of symbols, blocks
CHUNKS = [256, 32]                      # of copy: with the first block in sight, and without
SMALL = ["--num-layers", 2, "--model-dim", 64, "--z-dim", 32, "--value-dim", 64, "--ffn-hidden-dim", 128,
         "--norm-num-groups", 8, "--lr", 3e-3, "--warmup", 50]
COPY = [*SMALL, "--batch-size", 16, "--seq-len", 256, "--steps", 700]
KINDS, CONCENTRATION, LENGTH = 16, 0.5, 1023  # of counts: kinds of symbols, Dirichlet parameter, symbols of a document
DOCUMENTS, TESTED, CHUNK = 3000, 32, 32       # documents for training and for the loss, tokens of a chunk
COUNTS = ["--chunk-size", CHUNK, "--batch-size", 4, "--seq-len", LENGTH + 1, "--steps", 600]
COPIED = 3.2  # nats: chance is ln 48 = 3.87, and half of that if every second block is known


def call(args, *options):
    """Runs ./train and returns its output."""
    return run_program([args.train, "--threads", args.threads, *options])


def read_log(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


# ---------------------------------------------------------------- text

def text_run(args, variant, seed, folder):
    rows, length = args.batch.split("x")
    log = os.path.join(folder, "log.csv")
    out = call(args, "--preset", args.preset, *VARIANTS[variant], "--seed", seed, "--steps", args.steps, "--batch-size",
               rows, "--seq-len", length, "--val-every", args.steps, "--val-batches", 0, "--sample-every", 0,
               "--save-every", 0, "--out", os.path.join(folder, "run"), "--log", log)
    steps = read_log(log)
    norms = [float(row["grad_norm"]) for row in steps]
    return [(0, "val_loss", float(re.search(r"val loss ([\d.]+)", out)[1])),
            (0, "grad_norm_median", statistics.median(norms)), (0, "grad_norm_max", max(norms)),
            (0, "tokens_per_s", statistics.median(float(row["tokens_per_s"]) for row in steps)),
            (0, "memory_mib", float(re.search(r"peak memory (\d+) MiB", out)[1]))]


def rate_run(args, variant, seed, folder):
    found = []
    for rate in RATES:
        log = os.path.join(folder, f"log-{rate}.csv")
        command = [args.train, "--threads", args.threads, "--preset", args.preset, *VARIANTS[variant], "--seed", seed,
                   "--steps", 100, "--lr", rate, "--schedule", "constant", "--warmup", 10, "--grad-clip", 0,
                   "--val-every", 0, "--sample-every", 0, "--save-every", 0, "--out",
                   os.path.join(folder, f"run-{rate}"), "--log", log]
        subprocess.run([str(word) for word in command], capture_output=True)  # one that diverges ends with an error
        losses = [float(row["loss"]) for row in read_log(log)]
        last = statistics.mean(losses[-10:]) if len(losses) == 100 else math.nan
        found.append((rate, "last_loss", last))
    return found


# ---------------------------------------------------------------- copy

def write_copies(path):
    generator = random.Random(1)
    with open(path, "wb") as f:
        for _ in range(COPIES):
            block = bytes(ord("0") + generator.randrange(SYMBOLS) for _ in range(BLOCK))
            f.write(block + block)


def copy_run(args, variant, seed, folder):
    found, text = [], os.path.join(folder, "copies.txt")
    write_copies(text)
    for chunk in CHUNKS:
        log = os.path.join(folder, f"log-{chunk}.csv")
        call(args, "--data", text, *COPY, "--chunk-size", chunk, *VARIANTS[variant], "--seed", seed, "--val-every", 0,
             "--sample-every", 0, "--save-every", 0, "--out", os.path.join(folder, f"run-{chunk}"), "--log", log)
        losses = [float(row["loss"]) for row in read_log(log)]
        means = [statistics.mean(losses[step - 20:step]) for step in range(20, len(losses) + 1)]
        step = next((20 + i for i, mean in enumerate(means) if mean < COPIED), math.nan)
        found += [(chunk, "steps_to_copy", step), (chunk, "last_loss", means[-1])]
    return found


# ---------------------------------------------------------------- counts

def documents(generator, count):
    """Documents of LENGTH symbols, each with its own probabilities, from a Dirichlet distribution."""
    for _ in range(count):
        weights = [generator.gammavariate(CONCENTRATION, 1) for _ in range(KINDS)]
        yield bytes(generator.choices(range(ord("A"), ord("A") + KINDS), weights, k=LENGTH))


def best_loss(texts, window):
    """The mean loss of the second half of the documents for who knows how they are made and counts the symbols since
    the start of a chunk of `window` tokens. The first token of a document is a newline."""
    losses = []
    for text in texts:
        counts = dict.fromkeys(range(ord("A"), ord("A") + KINDS), 0)
        for i, symbol in enumerate(text):
            seen = sum(counts.values())
            if i >= LENGTH // 2:
                losses.append(-math.log((counts[symbol] + CONCENTRATION) / (seen + KINDS * CONCENTRATION)))
            if (i + 1) % window == 0:  # this symbol is the first token of a chunk: the newline comes before all
                counts = dict.fromkeys(counts, 0)
            counts[symbol] += 1
    return statistics.mean(losses)


def counts_run(args, variant, seed, folder):
    generator, data, model = random.Random(1), os.path.join(folder, "data"), os.path.join(folder, "run")
    tested = list(documents(generator, TESTED))
    with open(data, "wb") as f:
        f.write(b"".join(b"\n" + text for text in documents(generator, DOCUMENTS)))
    call(args, "--data", data, "--eot", ord("\n"), *SMALL, *COUNTS, *VARIANTS[variant], "--seed", seed, "--val-every",
         0, "--sample-every", 0, "--save-every", 0, "--out", model)
    program = os.path.join(os.path.dirname(args.train), "sample")
    losses, path = [], os.path.join(folder, "text")
    for text in tested:
        with open(path, "wb") as f:
            f.write(text)
        out = run_program([program, "--model", model, "--threads", args.threads, "--bos", ord("\n"), "--score", path])
        losses.append(math.log(2) * float(re.search(r"512 \.\. 1023 +512 +([\d.]+)", out)[1]))
    return [(0, "loss", statistics.mean(losses)), (0, "best_loss", best_loss(tested, LENGTH)),
            (0, "best_loss_of_chunk", best_loss(tested, CHUNK))]


# ---------------------------------------------------------------- all

EXPERIMENTS = {"text": text_run, "rate": rate_run, "copy": copy_run, "counts": counts_run}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(EXPERIMENTS), help="experiments (default: %(default)s)")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="(default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="of each variant; rate has one (default: %(default)s)")
    parser.add_argument("--train", default="./train", help="(default: %(default)s)")
    parser.add_argument("--preset", default="demo", help="of text and rate (default: %(default)s)")
    parser.add_argument("--batch", default="4x256", help="of text: sequences x tokens (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of text (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of a run (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--csv", default="dev/notes/ablation.csv", help="(default: %(default)s)")
    args = parser.parse_args()
    for name, known in (("only", EXPERIMENTS), ("variants", VARIANTS)):
        for word in getattr(args, name).split(","):
            if word not in known:
                parser.error(f"--{name} {word}: it is one of {', '.join(known)}")
    rows = load(args.csv, COLUMNS)
    have = {(row["experiment"], row["variant"], int(row["seed"])) for row in rows}
    wanted = [(experiment, variant, seed) for experiment in args.only.split(",")
              for seed in range(1, 2 if experiment == "rate" else args.seeds + 1)
              for variant in args.variants.split(",") if (experiment, variant, seed) not in have]

    def run(task):
        experiment, variant, seed = task
        with tempfile.TemporaryDirectory() as folder:
            return task, EXPERIMENTS[experiment](args, variant, seed, folder)

    with ThreadPoolExecutor(args.jobs) as pool:
        for (experiment, variant, seed), found in pool.map(run, wanted):
            rows += [dict(zip(COLUMNS, (experiment, variant, seed, x, metric, f"{value:.6g}")))
                     for x, metric, value in found]
            save(args.csv, COLUMNS, rows)
            text = ", ".join(f"{metric} {value:.4g}" + (f" at {x:g}" if x else "") for x, metric, value in found)
            print(f"{experiment}, {variant}, seed {seed}: {text}", flush=True)


if __name__ == "__main__":
    main()
