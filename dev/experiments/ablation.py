"""The experiment of dev/notes/ablation.md: Megalodon with parts replaced, on text and on recall over many chunks.

    make train compare
    python3 dev/experiments/ablation.py                              all of it: about 40 minutes on two cores
    python3 dev/experiments/ablation.py --only recall --seeds 1      a part; the results are added to the CSV file
    python3 dev/experiments/ablation.py --train ./train_cuda --preset enwik8 --batch 16x512 --steps 1500 --only text
    python3 dev/plot_ablation.py                                     the picture, and the tables of the page

Variants are Megalodon, Megalodon with one part replaced, and with all parts replaced (VARIANTS below). All have the same
tensors, the same initial values for a seed, and the same batches.

text     --preset on dev/data/shakespeare.txt: validation loss, gradient norms, tokens/s, peak memory.
recall   A sequence shows a value, one of 16, then a constant filler, then a question mark, whose next token is the value
         again, D chunks after it. The model is small and its chunks have 16 tokens, so for D > 1 attention cannot see
         the value: what crosses chunks is CEMA's state and TimestepNorm's moments. Chance is ln 16 = 2.77 nats.
rate     the text again, for learning rates from 1e-3 to 1e-1, 100 steps, no clipping: which ones still learn?

What the CSV file already has is not computed again, so the command can be repeated after an interruption. Only Python's
standard library is needed.
"""
import argparse
import csv
import json
import math
import os
import random
import re
import statistics
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

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
RATES = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
EOT, FILLER, QUESTION, FIRST_VALUE, VALUES = 0, 1, 2, 3, 16  # tokens of recall
CHUNK, DISTANCES = 16, [1, 2, 4, 8, 16, 32, 64]              # tokens; chunks
RECALL = ["--vocab-size", "19", "--num-layers", "2", "--model-dim", "64", "--z-dim", "32", "--value-dim", "64",
          "--ffn-hidden-dim", "128", "--norm-num-groups", "8", "--chunk-size", str(CHUNK)]
RECALL_LENGTH, RECALL_TEXTS = CHUNK * (max(DISTANCES) + 1), 32


def call(args, *options):
    """Runs ./train and returns its output."""
    command = [args.train, "--threads", str(args.threads), *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"error: {' '.join(command)}: {result.stderr.strip()}")
    return result.stdout


def read_log(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


# ---------------------------------------------------------------- text

def text_run(args, variant, seed, folder):
    rows, length = args.batch.split("x")
    log = os.path.join(folder, "log.csv")
    out = call(args, "--preset", args.preset, *VARIANTS[variant], "--seed", seed, "--steps", args.steps, "--batch-size",
               rows, "--seq-len", length, "--val-every", 0, "--val-batches", 0, "--sample-every", 0, "--save-every", 0,
               "--out", os.path.join(folder, "run"), "--log", log)
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
                   "--val-every", 0, "--sample-every", 0, "--save-every", 0, "--out", os.path.join(folder, f"run-{rate}"),
                   "--log", log]
        subprocess.run([str(word) for word in command], capture_output=True)  # one that diverges ends with an error
        losses = [float(row["loss"]) for row in read_log(log)]
        last = statistics.mean(losses[-10:]) if len(losses) == 100 else math.nan
        found.append((rate, "last_loss", last))
    return found


# ---------------------------------------------------------------- recall

def recall_text(rng, distance):
    """One sequence: episodes of a value, filler, a question and the value again, `distance` (or a random number of)
    chunks after it."""
    tokens = [EOT]
    while len(tokens) < RECALL_LENGTH:
        room = (RECALL_LENGTH - len(tokens) - 1) // CHUNK
        fits = [d for d in DISTANCES if d <= room]
        if not fits:
            break
        d = distance or rng.choice(fits)
        value = FIRST_VALUE + rng.randrange(VALUES)
        tokens += [value] + [FILLER] * (CHUNK * d - 2) + [QUESTION, value]
        if distance:
            break
    return tokens + [FILLER] * (RECALL_LENGTH - len(tokens))


def write_batch(path, texts):
    """A file for --batch: input.tokens and input.targets."""
    B, L = len(texts), len(texts[0]) - 1
    tokens = b"".join(struct.pack(f"<{L}i", *text[:-1]) for text in texts)
    targets = b"".join(struct.pack(f"<{L}i", *text[1:]) for text in texts)
    header = {"input.tokens": {"dtype": "I32", "shape": [B, L], "data_offsets": [0, len(tokens)]},
              "input.targets": {"dtype": "I32", "shape": [B, L], "data_offsets": [len(tokens), 2 * len(tokens)]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + tokens + targets)


def read_rows(path, name, rows, position):
    """tensor[row, position, :] for each row."""
    with open(path, "rb") as f:
        size, = struct.unpack("<Q", f.read(8))
        entry = json.loads(f.read(size))[name]
        _, L, V = entry["shape"]
        for row in range(rows):
            f.seek(8 + size + entry["data_offsets"][0] + 4 * V * (row * L + position))
            yield struct.unpack(f"<{V}f", f.read(4 * V))


def recall_run(args, variant, seed, folder):
    rng = random.Random(1)  # the same texts for all
    data, model = os.path.join(folder, "texts"), os.path.join(folder, "run")
    with open(data, "wb") as f:
        for _ in range(2000):
            f.write(bytes(recall_text(rng, None)))
    call(args, "--preset", "demo", *RECALL, *VARIANTS[variant], "--data", data, "--data-format", "bytes", "--eot", EOT,
         "--seq-len", RECALL_LENGTH, "--batch-size", 4, "--seed", seed, "--steps", args.recall_steps, "--lr", "3e-3",
         "--val-every", 0, "--sample-every", 0, "--save-every", 0, "--out", model)
    found = []
    for distance in DISTANCES:
        texts = [recall_text(rng, distance)[:CHUNK * distance + 2] for _ in range(RECALL_TEXTS)]
        batch, dump = os.path.join(folder, "batch.safetensors"), os.path.join(folder, "dump.safetensors")
        write_batch(batch, texts)
        call(args, "--init", model, "--batch", batch, "--steps", 1, "--lr", 0, "--val-every", 0, "--dump", dump)
        losses, right = [], 0
        for text, logits in zip(texts, read_rows(dump, "act.logits", RECALL_TEXTS, CHUNK * distance)):
            largest = max(logits)
            losses.append(largest + math.log(sum(math.exp(x - largest) for x in logits)) - logits[text[-1]])
            right += logits.index(largest) == text[-1]
        os.remove(dump)
        found += [(distance, "answer_loss", statistics.mean(losses)), (distance, "accuracy", right / RECALL_TEXTS)]
    return found


# ---------------------------------------------------------------- all

EXPERIMENTS = {"text": text_run, "recall": recall_run, "rate": rate_run}


def load(path):
    if not os.path.exists(path):
        return []
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    if rows and list(rows[0]) != COLUMNS:
        sys.exit(f"error: {path}: exists and is not a table of this program; give another name with --csv")
    return rows


def save(path, rows):
    with open(path + ".tmp", "w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(path + ".tmp", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(EXPERIMENTS), help="experiments (default: %(default)s)")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="(default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="of each variant; rate has one (default: %(default)s)")
    parser.add_argument("--train", default="./train", help="(default: %(default)s)")
    parser.add_argument("--preset", default="demo", help="of text and rate (default: %(default)s)")
    parser.add_argument("--batch", default="4x256", help="of text: sequences x tokens (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of text (default: %(default)s)")
    parser.add_argument("--recall-steps", type=int, default=400, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of a run (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--csv", default="dev/notes/ablation.csv", help="(default: %(default)s)")
    args = parser.parse_args()
    for name, known in (("only", EXPERIMENTS), ("variants", VARIANTS)):
        for word in getattr(args, name).split(","):
            if word not in known:
                parser.error(f"--{name} {word}: it is one of {', '.join(known)}")
    rows = load(args.csv)
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
            save(args.csv, rows)
            print(f"{experiment}, {variant}, seed {seed}: "
                  + ", ".join(f"{metric} {value:.4g}" + (f" at {x:g}" if x else "") for x, metric, value in found), flush=True)


if __name__ == "__main__":
    main()
