"""The experiment of dev/notes/context_loss.md: models trained on sequences of 2 K, 32 K and 512 K tokens, and their
loss by position in long texts.

    python3 dev/experiments/context_text.py
    make train_cuda build/gpu/position_loss
    python3 dev/experiments/context.py                                   all of it
    python3 dev/experiments/context.py --only 2k,512k --seeds 1          a part; the results are added to the CSV file
    python3 dev/experiments/context.py --diagnose --only 2k --seeds 1    which part of the state the loss depends on
    python3 dev/plot_context_loss.py

Every variant is trained on the same number of tokens a step and in all. Variants:
    2k, 32k, 512k           sequences of 2,048, 32,768 and 524,288 tokens, each from a fresh state, with exact gradients
    2k-carry                sequences that continue from the state of the step before (--carry-state), whose gradients
                            stop at the start of the sequence
    2k-slow, 512k-slow      like 2k and 512k, but the time constants of CEMA's modes are spread evenly over a
                            logarithmic scale from 4 to 2^18 tokens at the start; the released initial values have 4
Each model is then evaluated on every text in build/context/held-out: with the state carried from the first token to the
last, and with a fresh state every 2,048, 32,768 and 524,288 tokens. With --diagnose only TimestepNorm's moments, or
only CEMA's state, are reset every 2,048 tokens and every training length.

What the CSV file already has is not computed again, whatever the settings, so trials need another --csv. Trained models
are kept in build/context/models, in a folder for each --lr and --steps. So the command can be repeated after an
interruption. Only Python's standard library is needed.
"""
import argparse
import csv
import glob
import json
import math
import os
import re
import shutil
import struct
import sys
import time

from results import load, run_program, save

FOLDER = "build/context"
STEP_TOKENS = 524288
LENGTHS = {"2k": 2048, "32k": 32768, "512k": 524288}
VARIANTS = ["2k", "32k", "512k", "2k-carry", "2k-slow", "512k-slow"]
DEFAULT = "2k,32k,512k,2k-carry"
MODEL = ["--preset", "enwik8"]
COLUMNS = ["variant", "seed", "text", "reset", "every", "start", "end", "loss", "tokens"]
FASTEST, SLOWEST = 4, 1 << 18  # time constants of the slow variants, tokens


# ---------------------------------------------------------------- model files

def tensors(path):
    """(the file's bytes, {name: (first byte, number of elements, shape)}) of a safetensors file in float32."""
    with open(path, "rb") as f:
        data = bytearray(f.read())
    size = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8:8 + size])
    header.pop("__metadata__", None)
    return data, {name: (8 + size + t["data_offsets"][0], math.prod(t["shape"]), t["shape"])
                  for name, t in header.items()}


def read(data, tensor):
    return list(struct.unpack_from(f"<{tensor[1]}f", data, tensor[0]))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def logit(p):
    return math.log(p / (1 - p))


def slow_down(path):
    """Spreads CEMA's time constants. All N modes of a channel get the same one, T: 1 - |q| = p sigmoid(delta) = 1/T.

    Mode n = 1..N rotates by n quarter turns in T tokens, so a channel resolves its last T tokens as N terms of a
    Fourier series do.
    """
    data, table = tensors(path)
    for name, alpha in table.items():
        if not name.endswith("mega.cema.alpha"):
            continue
        delta, theta = (read(data, table[name[:-len("alpha")] + other]) for other in ("delta", "theta"))
        D, N = alpha[2][0], alpha[2][1]
        values = [0.0] * (D * N)
        for d in range(D):
            position = (d + 0.5) * 0.6180339887498949 % 1  # evenly spread, and neighbouring channels differ
            T = FASTEST * (SLOWEST / FASTEST) ** position
            theta[d] = logit(min(N / (4 * T), 0.5))
            for n in range(N):
                values[d * N + n] = logit(min(1 / (T * sigmoid(delta[d * N + n])), 0.99))
        struct.pack_into(f"<{D * N}f", data, alpha[0], *values)
        struct.pack_into(f"<{D}f", data, table[name[:-len("alpha")] + "theta"][0], *theta)
    with open(path, "wb") as f:
        f.write(data)


def print_time_constants(path):
    """The time constants 1 / (1 - |q|) of all modes of all layers, in tokens."""
    data, table = tensors(path)
    values = []
    for name in table:
        if name.endswith("mega.cema.alpha"):
            delta = read(data, table[name[:-len("alpha")] + "delta"])
            values += [1 / (sigmoid(a) * sigmoid(b)) for a, b in zip(read(data, table[name]), delta)]
    values.sort()
    at = lambda share: values[min(int(share * len(values)), len(values) - 1)]
    print(f"    time constants of CEMA: median {at(0.5):.1f} tokens, 99 % below {at(0.99):.1f}, largest {at(1):.1f}",
          flush=True)


def model_file(run, steps):
    return os.path.join(run, f"step-{steps:08d}", "model.safetensors")


# ---------------------------------------------------------------- training

def initial_model(args, seed):
    """The model file with spread time constants."""
    run = os.path.join(args.models, f"slow-init-{seed}")
    path = run + ".safetensors"
    run_program([args.train, *args.model, "--steps", "0", "--val-every", "0", "--seed", str(seed), "--data", args.data,
                 "--out", run, "--overwrite"])
    shutil.copyfile(model_file(run, 0), path)
    shutil.rmtree(run)
    slow_down(path)
    return path


def train(args, variant, seed):
    """The run's directory."""
    run = os.path.join(args.models, f"{variant}-{seed}")
    if os.path.exists(model_file(run, args.steps)):
        print(f"{variant}, seed {seed}: {run} is already trained", flush=True)
        return run
    os.makedirs(args.models, exist_ok=True)
    name, _, kind = variant.partition("-")
    length, step_tokens, batch_tokens = (n // args.shrink for n in (LENGTHS[name], STEP_TOKENS, args.batch_tokens))
    rows = max(batch_tokens // length, 1)
    command = [args.train, *(["--init", initial_model(args, seed)] if kind == "slow" else args.model),
               "--data", args.data, "--seq-len", str(length), "--batch-size", str(rows),
               "--grad-accum", str(step_tokens // (rows * length)), "--steps", str(args.steps),
               "--warmup", str(args.warmup), "--lr", str(args.lr), "--seed", str(seed), "--val-every", "0",
               "--save-every", "0", "--print-every", "20", "--out", run, "--overwrite",
               "--log", run + ".csv"]
    if length > batch_tokens:
        command += ["--segment-len", str(batch_tokens)]
    if kind == "carry":
        command += ["--carry-state"]
    print(f"{variant}, seed {seed}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    lines = [line for line in run_program(command).splitlines() if re.match("step +[0-9]+/|done ", line)]
    print(*("    " + line for line in lines[-4:]), f"    trained in {time.monotonic() - start:.1f} s", sep="\n",
          flush=True)
    return run


# ---------------------------------------------------------------- evaluation

def readings(args, variant):
    """{reset: [every, ..]}: which part of the state is reset, and after how many tokens."""
    lengths = [n // args.shrink for n in LENGTHS.values()]
    if not args.diagnose:
        return {"all": lengths}
    own = sorted({lengths[0], LENGTHS[variant.partition("-")[0]] // args.shrink})
    return {"norm": own, "cema": own}


def evaluate(args, variant, seed, run, wanted):
    options = {"all": "--fresh", "norm": "--reset-norm", "cema": "--reset-cema"}
    command = [args.position_loss, "--model", model_file(run, args.steps), "--data", ",".join(args.texts),
               "--tokens", str(args.tokens)]
    for reset, every in wanted.items():
        command += [options[reset], ",".join(str(n) for n in every)]
    start = time.monotonic()
    rows = list(csv.DictReader(run_program(command).splitlines()))
    for row in rows:
        row.update(variant=variant, seed=seed, text=os.path.splitext(row["text"])[0])
    print(f"    evaluated in {time.monotonic() - start:.1f} s", flush=True)
    return [row for row in rows if not (args.diagnose and row["reset"] == "none")]


def run_one(args, variant, seed):
    wanted = readings(args, variant)
    rows = load(args.csv, COLUMNS)
    have = {(row["reset"], int(row["every"])) for row in rows if (row["variant"], row["seed"]) == (variant, str(seed))}
    if all((reset, every) in have for reset in wanted for every in wanted[reset]):
        print(f"{variant}, seed {seed}: {args.csv} has it", flush=True)
        return
    run = train(args, variant, seed)
    print_time_constants(model_file(run, args.steps))
    save(args.csv, COLUMNS, rows + evaluate(args, variant, seed, run, wanted))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=DEFAULT, help=f"variants ({DEFAULT}), of {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch-tokens", type=int, default=65536, help="tokens of a batch or segment, for the memory")
    parser.add_argument("--tokens", type=int, default=1 << 20, help="tokens to read of each held-out text")
    parser.add_argument("--csv", default="dev/notes/context_loss.csv")
    parser.add_argument("--diagnose", action="store_true", help="reset parts of the state only")
    parser.add_argument("--cpu", action="store_true", help="use ./train and build/position_loss")
    parser.add_argument("--model", default=" ".join(MODEL), help="options of ./train that describe the model")
    parser.add_argument("--shrink", type=int, default=1, help="divide all lengths of training, for a trial on a CPU")
    args = parser.parse_args()
    args.model = args.model.split()
    args.models = os.path.join(FOLDER, "models", f"lr{args.lr:g}-steps{args.steps}")
    args.train, args.position_loss = ("./train", "build/position_loss") if args.cpu else (
        "./train_cuda", "build/gpu/position_loss")
    args.data = os.path.join(FOLDER, "train.txt")
    args.texts = sorted(glob.glob(os.path.join(FOLDER, "held-out", "*.txt")))
    variants, seeds = args.only.split(","), [int(seed) for seed in args.seeds.split(",")]
    for variant in variants:
        if variant not in VARIANTS:
            parser.error(f"--only {variant}: the variants are {', '.join(VARIANTS)}")
    for program in (args.train, args.position_loss):
        if not os.path.exists(program):
            sys.exit(f"error: {program}: not found; run this in the repository's root, after make {program}")
    if not os.path.exists(args.data) or not args.texts:
        sys.exit(f"error: {FOLDER}: has no texts; python3 dev/experiments/context_text.py fetches them")
    start = time.monotonic()
    for seed in seeds:
        for variant in variants:
            run_one(args, variant, seed)
    print(f"done in {time.monotonic() - start:.1f} s: {args.csv}")


if __name__ == "__main__":
    main()
