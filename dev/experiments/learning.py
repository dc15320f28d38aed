"""The experiment of dev/notes/learning.md: does megalodon.c learn as well as it should?

    make train && make cuda
    python3 dev/experiments/learning.py same            all curves; dev/notes/learning_same.csv
    python3 dev/experiments/learning.py same --only cpu,jax --preset demo --batch 4x256 --steps 100 \\
        --csv build/learning/demo.csv                   a trial on two cores, two minutes
    python3 dev/experiments/context_text.py --train-bytes 220000000
    python3 dev/experiments/learning.py time            both models; dev/notes/learning_time.csv
    python3 dev/experiments/learning.py time --seconds 60 --rates 5e-4,1e-3,2e-3 --csv build/learning/rates.csv
    python3 dev/plot_learning.py                        the pictures, and the tables of the page

same     One model, the same initial values and the same batches in several programs. The table gets the training loss
         of every step and the validation loss after the last one. Curves:
             cpu       ./train, float32
             gpu       ./train_cuda_fp32, float32
             bf16      ./train_cuda, bfloat16
             jax       megalodon-jax, float32 (pip install -r dev/requirements-bench.txt), on a GPU if JAX has one
             llama     the Llama of dev/bench_llama.py with as many parameters and other initial values: bfloat16
                       autocast on a GPU, float32 on a CPU
         The learning rate is constant, after --warmup steps from a twentieth of it. With a smaller start the first
         updates are as small as the spacing of float32 numbers, and every order of operations rounds them differently.
time     The architecture of --preset with a vocabulary of 256 bytes beside the Llama of equal size, for equal time:
         --seconds of training each, in bfloat16 on a GPU, on the same rows of the same text. The validation loss on the
         same held-out windows is measured --validations times, beside the mean training loss of each 100 steps.
         Validation, the start and the compilation of the Llama do not count as training. 30 steps are timed first; that
         gives the number of steps, so that warm-up and cosine decay fit into the time. Curves: megalodon (./train_cuda)
         and llama, once for each of --rates.

AdamW with beta 0.9 and 0.95, epsilon 1e-8 and weight decay 0.1 of every parameter, gradients clipped to norm 1. Batches
are drawn as ./train draws them, which is checked against a dump of ./train before every curve in Python.

What the CSV file already has is not computed again, whatever the settings, so trials need another --csv. A curve that
was interrupted is computed again. Several commands may add curves to one file at the same time. If a curve fails, the
next one follows. Needs numpy; llama needs PyTorch.
"""
import argparse
import contextlib
import csv
import fcntl
import glob
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback

import numpy as np

from results import load, save

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

FOLDER = "build/learning"
PLAYS = "dev/data/shakespeare.txt"
CONTEXT = "build/context"
COLUMNS = ["experiment", "curve", "rate", "step", "tokens", "seconds", "metric", "value"]
CURVES = {"same": ["cpu", "gpu", "bf16", "jax", "llama"], "time": ["megalodon", "llama"]}
PROGRAMS = {"cpu": "./train", "gpu": "./train_cuda_fp32", "bf16": "./train_cuda", "megalodon": "./train_cuda"}
BETA1, BETA2, EPS, DECAY, CLIP = 0.9, 0.95, 1e-8, 0.1, 1.0
INIT_RATIO, END_RATIO = 0.05, 0.1  # of the first and the last learning rate, relative to the peak
MEASURED, SETTLING = 30, 10        # steps that are timed, and steps of these that do not count
MEAN_STEPS = 100                   # steps whose training losses are averaged, of time
POLL = 15                          # seconds between two readings of a log
STREAM_DATA = 1000                 # in megalodon.h


class Failed(Exception):
    """A curve cannot be computed. The message says what to do."""


# ---------------------------------------------------------------- the table

def key_of(row):
    return row["experiment"], row["curve"], row["rate"]


@contextlib.contextmanager
def locked(path):
    """Other processes that read or write the table wait."""
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def has(args, key):
    """Whether the table has the whole curve: its last row is the duration of the command."""
    with locked(args.csv):
        return any(key_of(row) == key and row["metric"] == "wall_seconds" for row in load(args.csv, COLUMNS))


def add(args, key, found):
    """Replaces the rows of a curve in the table."""
    with locked(args.csv):
        rows = [row for row in load(args.csv, COLUMNS) if key_of(row) != key]
        for step, tokens, seconds, metric, value in found:
            values = (*key, step, tokens, f"{seconds:.2f}", metric, f"{value:.9g}")
            rows.append(dict(zip(COLUMNS, values)))
        save(args.csv, COLUMNS, rows)


def thinned(args, found, steps):
    """Of `time`, replaces the training losses by the mean of each 100 steps, counted from the last one."""
    if args.experiment == "same":
        return found
    groups = {}
    for row in found:
        group = (steps - row[0]) // MEAN_STEPS if row[3] == "train_loss" else (row[0], row[3])
        groups.setdefault(group, []).append(row)
    return [(*rows[-1][:4], statistics.fmean(row[4] for row in rows)) for rows in groups.values()]


# ---------------------------------------------------------------- batches, as plumbing/data.c draws them

def philox(seed, stream, step, layer, element):
    """Philox4x32-10, as megalodon_philox in megalodon.h."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = stream, step, layer, element
    k0, k1 = seed & mask, seed >> 32
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & mask, (a >> 32) ^ c3 ^ k1, a & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def row_starts(args, step, count):
    """The positions in a text of `count` bytes at which the rows of a step start; the first step is 0."""
    starts = []
    for row in range(args.rows):
        low, high, _, _ = philox(args.seed, STREAM_DATA, step, 0, row)
        starts.append((high << 32 | low) * (count - args.length) >> 64)
    return starts


def rows_at(text, starts, length):
    """Inputs and targets (rows, length) of the rows that start there."""
    rows = np.stack([text[start:start + length + 1] for start in starts]).astype(np.int32)
    return rows[:, :-1], rows[:, 1:]


def batch_of(args, text, step):
    return rows_at(text, row_starts(args, step, len(text)), args.length)


def windows_of(args, text):
    """(inputs, targets) of batches of all consecutive windows. The last batch may have fewer rows."""
    starts = list(range(0, len(text) - args.length, args.length))
    for i in range(0, len(starts), args.rows):
        yield rows_at(text, starts[i:i + args.rows], args.length)


def texts(args):
    """The training and the validation text. Without --val-data the last tenth is for validation, as in ./train."""
    whole = np.fromfile(args.data, np.uint8)
    if args.val_data:
        return whole, np.fromfile(args.val_data, np.uint8)
    return whole[:len(whole) - len(whole) // 10], whole[len(whole) - len(whole) // 10:]


def tensor_of(path, name):
    """An int32 tensor of a safetensors file."""
    with open(path, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        entry = json.loads(f.read(size))[name]
        first, end = entry["data_offsets"]
        f.seek(8 + size + first)
        return np.frombuffer(f.read(end - first), np.int32 if entry["dtype"] == "I32" else np.int64).reshape(
            entry["shape"])


def check_batches(args):
    """Compares the batches of several steps with those that ./train dumps, on a model of one small layer."""
    text, _ = texts(args)
    dump = os.path.join(FOLDER, f"batches-{os.getpid()}.safetensors")
    for steps in (1, 2, 5):
        call(["./train", "--preset", "demo", "--num-layers", 1, "--seed", args.seed, *data_options(args), "--val-every",
              0, "--steps", steps, "--dump", dump])
        want = tensor_of(dump, "input.tokens"), tensor_of(dump, "input.targets")
        os.remove(dump)
        if not all(np.array_equal(x, y) for x, y in zip(batch_of(args, text, steps - 1), want)):
            raise Failed(f"the batch of step {steps} differs from that of ./train: row_starts() here and "
                         "reader_step() in plumbing/data.c must agree")
    print("batches of steps 1, 2 and 5 are those of ./train", flush=True)


def learning_rate(args, step, steps):
    """That of the step, counted from 0, as learning_rate() in train.c."""
    if step < args.warmup:
        return args.lr * (INIT_RATIO + step * (1 - INIT_RATIO) / args.warmup)
    if args.schedule == "constant":
        return args.lr
    done = (step - args.warmup) / (steps - args.warmup)
    return args.lr * (END_RATIO + (1 - END_RATIO) * (1 + math.cos(math.pi * done)) / 2)


# ---------------------------------------------------------------- our programs

def call(command):
    """Runs a command that is expected to succeed."""
    command = [str(word) for word in command]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode != 0:
        raise Failed(f"{' '.join(command)}: status {result.returncode}: {result.stderr.strip()}")


def data_options(args):
    return ["--data", args.data, *(["--val-data", args.val_data] if args.val_data else []), "--batch-size", args.rows,
            "--seq-len", args.length]


def rows_of_log(args, path):
    """The rows of the table that a log of ./train gives. `seconds` counts training only."""
    found, seconds = [], 0.0
    if not os.path.exists(path):
        return found
    with open(path, newline="") as f:
        for row in csv.DictReader(f):
            if row["val_loss"] is None:  # a line that is not complete yet
                break
            step, seconds = int(row["step"]), seconds + float(row["ms"]) / 1e3
            at = step, step * args.rows * args.length, seconds
            found.append((*at, "train_loss", float(row["loss"])))
            if row["val_loss"]:
                found.append((*at, "val_loss", float(row["val_loss"])))
    return found


def train_ours(args, key, program, model, steps, val_every):
    """Runs one of our programs. Its results are added to the table while it runs. Returns them."""
    name = os.path.join(FOLDER, "-".join((*key, str(os.getpid()))))
    log, run = name + "-log.csv", name + "-run"
    command = [program, *model, *data_options(args), "--seed", args.seed, "--steps", steps, "--lr", args.lr, "--warmup",
               args.warmup, "--schedule", args.schedule, "--lr-init-ratio", INIT_RATIO, "--lr-end-ratio", END_RATIO,
               "--beta1", BETA1, "--beta2", BETA2, "--eps", EPS, "--weight-decay", DECAY, "--grad-clip", CLIP,
               "--val-every", val_every, "--val-batches", 0, "--sample-every", 0, "--save-every", 0,
               "--print-every", 50, "--threads", args.threads, "--out", run, "--overwrite", "--log", log]
    command = [str(word) for word in command]
    print(" ".join(command), flush=True)
    found = []
    with open(name + ".txt", "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            while process.returncode is None:
                try:
                    process.wait(POLL)
                except subprocess.TimeoutExpired:
                    pass
                found = thinned(args, rows_of_log(args, log), steps)
                add(args, key, found)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    shutil.rmtree(run, ignore_errors=True)
    if process.returncode != 0:
        with open(name + ".txt", errors="replace") as f:
            last = f.read().strip().splitlines()[-1:]
        raise Failed(f"status {process.returncode}, output in {name}.txt: {''.join(last)}")
    return found


def initial_values(args):
    """The model file of the initial values of --preset and --seed, written by ./train."""
    path = os.path.join(FOLDER, f"init-{args.preset}-{args.seed}.safetensors")
    run = os.path.join(FOLDER, f"init-{os.getpid()}")
    call(["./train", "--preset", args.preset, "--vocab-size", 256, "--seed", args.seed, "--data", args.data,
          "--steps", 0, "--val-every", 0, "--out", run, "--overwrite"])
    os.replace(os.path.join(run, "step-00000000", "model.safetensors"), path)
    shutil.rmtree(run)
    return path


def same_ours(args, key):
    return train_ours(args, key, PROGRAMS[key[1]], ["--init", initial_values(args)], args.steps, args.steps)


def time_ours(args, key):
    model = ["--preset", args.preset, "--vocab-size", 256]
    log, run = (os.path.join(FOLDER, f"speed-{os.getpid()}{end}") for end in (".csv", ""))
    call([PROGRAMS["megalodon"], *model, *data_options(args), "--steps", MEASURED, "--val-every", 0, "--out", run,
          "--overwrite", "--log", log])
    shutil.rmtree(run)
    with open(log, newline="") as f:
        step_s = statistics.median(float(row["ms"]) / 1e3 for row in list(csv.DictReader(f))[SETTLING:])
    steps, val_every = plan(args, step_s, key)
    return train_ours(args, key, PROGRAMS["megalodon"], model, steps, val_every)


def plan(args, step_s, key):
    """The number of steps, and of steps between validations. Sets args.warmup."""
    steps = max(int(args.seconds / step_s), args.validations)
    args.warmup = min(args.max_warmup, steps // 10)
    tokens = steps * args.rows * args.length
    print(f"{' '.join(key)}: {1e3 * step_s:.2f} ms a step, so {steps} steps, {args.warmup} of them warm-up; "
          f"{tokens / 1e6:.1f} M tokens, {tokens / os.path.getsize(args.data):.2f} of the text", flush=True)
    return steps, -(-steps // args.validations)


# ---------------------------------------------------------------- megalodon-jax

def same_jax(args, key):
    if args.wheels:
        sys.path.append(os.path.abspath(args.wheels))  # last, so that installed packages take precedence
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave memory for other programs
    try:
        import equinox as eqx
        import jax
        import jax.numpy as jnp
        import optax
        from jax_bridge import from_released, read_checkpoint, to_released
    except ImportError as error:
        raise Failed(f"{error}: pip install -r dev/requirements-bench.txt, or --wheels DIR") from None
    if args.jax_platform:
        jax.config.update("jax_platforms", args.jax_platform)
    jax.config.update("jax_default_matmul_precision", "highest")  # float32, not TF32
    check_batches(args)
    text, val = texts(args)
    config, tensors = read_checkpoint(initial_values(args))
    model = from_released(config, tensors)
    leaves = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    if sum(leaf.size for leaf in leaves) != sum(value.size for value in to_released(model).values()):
        raise Failed("the model has arrays that ./train does not train")

    def rate(count):
        warm = args.lr * (INIT_RATIO + count * (1 - INIT_RATIO) / max(args.warmup, 1))
        return jnp.where(count < args.warmup, warm, args.lr)

    optimizer = optax.adamw(rate, BETA1, BETA2, EPS, weight_decay=DECAY)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    def loss_of_rows(model, inputs, targets):
        logits, _ = model(inputs)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
        return -picked[..., 0].mean(axis=1)

    @eqx.filter_jit(donate="all-except-first")
    def update(batch, model, state):
        loss, grads = eqx.filter_value_and_grad(lambda m: loss_of_rows(m, *batch).mean())(model)
        scale = jnp.minimum(1, CLIP / (optax.global_norm(grads) + 1e-6))
        grads = jax.tree.map(lambda g: g * scale, grads)
        changes, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, changes), state, loss

    evaluate = eqx.filter_jit(loss_of_rows)
    found, start = [], time.perf_counter()
    for step in range(args.steps):
        batch = tuple(jnp.asarray(x) for x in batch_of(args, text, step))
        model, state, loss = update(batch, model, state)
        found.append(((step + 1), (step + 1) * args.rows * args.length, time.perf_counter() - start, "train_loss",
                      float(loss)))
        if step == 0:
            print(f"jax on {jax.devices()[0].device_kind}: step 1 after {found[-1][2]:.1f} s", flush=True)
        if step % 50 == 49:
            add(args, key, found)
    losses = []
    for inputs, targets in windows_of(args, val):
        missing = ((0, args.rows - len(inputs)), (0, 0))  # every batch has the same shape, which is compiled once
        rows = evaluate(model, np.pad(inputs, missing), np.pad(targets, missing))
        losses += list(np.asarray(rows, dtype=np.float64)[:len(inputs)])
    return found + [(*found[-1][:3], "val_loss", statistics.fmean(losses))]


# ---------------------------------------------------------------- the Llama

def llama_parts(args):
    """Functions: begin(number of steps), step(step, learning rate) -> loss, validate() -> loss, synchronize()."""
    try:
        import torch
        from bench_llama import SIZES, Llama
    except ImportError as error:
        raise Failed(f"{error}: pip install torch") from None
    if args.preset not in SIZES:
        raise Failed(f"--preset {args.preset}: dev/bench_llama.py has a Llama of the size of {', '.join(SIZES)}")
    check_batches(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = Llama(256, *SIZES[args.preset][1:], args.length).to(device)
    compiled = torch.compile(model, dynamic=False) if args.experiment == "time" and device == "cuda" else model
    text, val = (torch.from_numpy(x).to(device) for x in texts(args))
    offsets = torch.arange(args.length + 1, device=device)
    windows = torch.arange(0, len(val) - args.length, args.length, device=device)
    print(f"Llama: {sum(p.numel() for p in model.parameters())} parameters, torch {torch.__version__}, "
          f"{torch.cuda.get_device_name() if device == 'cuda' else device}", flush=True)
    now = {}  # the optimizer, and where the rows of all steps start

    def begin(steps):
        now["optimizer"] = torch.optim.AdamW(model.parameters(), args.lr, (BETA1, BETA2), EPS, DECAY, fused=True)
        now["starts"] = torch.tensor([row_starts(args, k, len(text)) for k in range(steps)], device=device)

    def loss_of(source, starts):
        rows = source[starts[:, None] + offsets].long()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return compiled(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())

    def step(k, rate):
        loss = loss_of(text, now["starts"][k])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in now["optimizer"].param_groups:
            group["lr"] = rate
        now["optimizer"].step()
        now["optimizer"].zero_grad(set_to_none=True)
        return loss.detach()

    @torch.no_grad()
    def validate():
        batches = windows.split(args.rows)
        return sum(loss_of(val, starts).item() * len(starts) for starts in batches) / len(windows)

    return begin, step, validate, (torch.cuda.synchronize if device == "cuda" else lambda: None)


def train_llama(args, key, parts, steps, val_every):
    """Trains. `seconds` counts training only: it stands still during validation."""
    begin, step, validate, synchronize = parts
    begin(steps)
    found, losses, seconds, start = [], [], 0.0, time.perf_counter()
    for k in range(steps):
        losses.append(step(k, learning_rate(args, k, steps)))  # not read here, since that waits for the GPU
        last = k + 1 == steps
        if last or (k + 1) % val_every == 0 or (k + 1) % 100 == 0:
            synchronize()
            now = time.perf_counter()
            before, seconds = seconds, seconds + now - start
            for i, loss in enumerate(losses, 1):
                at = k + 1 - len(losses) + i
                passed = before + (seconds - before) * i / len(losses)
                found.append((at, at * args.rows * args.length, passed, "train_loss", loss.item()))
            if last or (k + 1) % val_every == 0:
                found.append((k + 1, (k + 1) * args.rows * args.length, seconds, "val_loss", validate()))
                add(args, key, thinned(args, found, steps))
            losses, start = [], time.perf_counter()
    return thinned(args, found, steps)


def same_llama(args, key):
    return train_llama(args, key, llama_parts(args), args.steps, args.steps)


def time_llama(args, key):
    parts = begin, step, validate, synchronize = llama_parts(args)
    start, times = time.perf_counter(), []
    begin(MEASURED)
    validate()  # compiles the forward pass
    for k in range(SETTLING):
        step(k, 0.0)  # compiles the others; a rate of 0 leaves the parameters as they are
    synchronize()
    print(f"Llama: compiled in {time.perf_counter() - start:.1f} s", flush=True)
    for k in range(MEASURED):
        start = time.perf_counter()
        step(k, 0.0)
        synchronize()
        times.append(time.perf_counter() - start)
    steps, val_every = plan(args, statistics.median(times), key)
    return train_llama(args, key, parts, steps, val_every)


# ---------------------------------------------------------------- all

RUNS = {("same", "cpu"): same_ours, ("same", "gpu"): same_ours, ("same", "bf16"): same_ours, ("same", "jax"): same_jax,
        ("same", "llama"): same_llama, ("time", "megalodon"): time_ours, ("time", "llama"): time_llama}


def held_out(args):
    """The validation text of `time`, as long a piece of each held-out kernel directory. Returns its path."""
    found = [path for path in sorted(glob.glob(os.path.join(CONTEXT, "held-out", "*.txt"))) if "bible" not in path]
    if not found:
        sys.exit(f"error: {CONTEXT}/held-out: has no texts; python3 dev/experiments/context_text.py fetches them, or "
                 "name texts with --data and --val-data")
    size = args.val_windows // len(found) * args.length
    path = os.path.join(FOLDER, f"val-{len(found) * size}.txt")
    with open(path, "wb") as output:
        for name in found:
            with open(name, "rb") as f:
                output.write(f.read(size))
        output.write(b"\n")  # the target of the last byte
    return path


def check_files(parser, args):
    """Ends the program with an error if something is missing that a wanted curve needs."""
    if not os.path.exists(args.data):
        remedy = "" if args.data != os.path.join(CONTEXT, "train.txt") else \
            "; python3 dev/experiments/context_text.py --train-bytes 220000000 fetches it"
        sys.exit(f"error: {args.data}: not found; run this in the repository's root{remedy}")
    needed = {PROGRAMS[curve]: curve for curve in args.curves if curve in PROGRAMS} | {"./train": "the batches"}
    for program, curve in needed.items():
        if not os.path.exists(program):
            sys.exit(f"error: {program}, which {curve} needs: not found; run this in the repository's root after make "
                     f"{'cuda' if 'cuda' in program else 'train'}, or leave the curve out with --only")
    if args.experiment == "time" and not args.val_data:
        args.val_data = held_out(args)
    if args.val_data and not os.path.exists(args.val_data):
        sys.exit(f"error: --val-data {args.val_data}: not found")
    windows = (os.path.getsize(args.val_data) - 1) // args.length if args.experiment == "time" else 0
    if windows % args.rows:
        parser.error(f"{args.val_data}: the number of its windows is not a multiple of the {args.rows} rows of a "
                     "batch; see --val-windows")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=CURVES)
    parser.add_argument("--only", help="curves (default: all)")
    parser.add_argument("--preset", help="(default: enwik8; time: mega200M)")
    parser.add_argument("--batch", help="sequences x tokens (default: 16x512; time: 8x2048)")
    parser.add_argument("--steps", type=int, default=500, help="of same (default: %(default)s)")
    parser.add_argument("--rates", help="peak learning rates (default: 4e-4; time: 1e-3)")
    parser.add_argument("--warmup", type=int, help="steps (default: 20; time: 200, or a tenth of the steps if fewer)")
    parser.add_argument("--seconds", type=float, default=540, help="of training, of time (default: %(default)s)")
    parser.add_argument("--validations", type=int, default=18, help="of time (default: %(default)s)")
    parser.add_argument("--val-windows", type=int, default=384, help="of time (default: %(default)s)")
    parser.add_argument("--data", help=f"training text (default: {PLAYS}; time: {CONTEXT}/train.txt)")
    parser.add_argument("--val-data", help="validation text (default: the last tenth of --data; time: held-out texts)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of our programs; 0: one per core")
    parser.add_argument("--jax-platform", choices=["cpu", "cuda"], help="(default: JAX's choice)")
    parser.add_argument("--wheels", metavar="DIR", help="a further directory to import JAX's packages from")
    parser.add_argument("--csv", help="(default: dev/notes/learning_same.csv, dev/notes/learning_time.csv)")
    args = parser.parse_args()
    same = args.experiment == "same"
    args.curves = args.only.split(",") if args.only else CURVES[args.experiment]
    for curve in args.curves:
        if curve not in CURVES[args.experiment]:
            parser.error(f"--only {curve}: the curves of {args.experiment} are {', '.join(CURVES[args.experiment])}")
    args.preset = args.preset or ("enwik8" if same else "mega200M")
    args.batch = args.batch or ("16x512" if same else "8x2048")
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", args.batch):
        parser.error(f"--batch {args.batch}: sequences x tokens, such as 16x512")
    args.rows, args.length = (int(n) for n in args.batch.split("x"))
    args.rates = (args.rates or ("4e-4" if same else "1e-3")).split(",")
    args.schedule = "constant" if same else "cosine"
    args.max_warmup = args.warmup if args.warmup is not None else 20 if same else 200
    args.data = args.data or (PLAYS if same else os.path.join(CONTEXT, "train.txt"))
    args.csv = args.csv or f"dev/notes/learning_{args.experiment}.csv"
    os.makedirs(FOLDER, exist_ok=True)
    if not os.path.isdir(os.path.dirname(args.csv) or "."):
        sys.exit(f"error: --csv {args.csv}: its folder does not exist; run this in the repository's root")
    check_files(parser, args)
    return args


def in_processes(curves):
    """Computes each curve in a process of its own, since the libraries of PyTorch and JAX may exclude each other."""
    failed = 0
    for curve in curves:
        child = subprocess.Popen([sys.executable, *sys.argv, "--only", curve])
        try:
            failed += child.wait() != 0
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
    return failed


def in_this_process(args, curve):
    failed = 0
    for rate in args.rates:
        key = args.experiment, curve, f"{float(rate):g}"
        if has(args, key):
            print(f"{' '.join(key)}: {args.csv} has it", flush=True)
            continue
        args.lr, args.warmup = float(rate), args.max_warmup
        start = time.perf_counter()
        try:
            found = RUNS[args.experiment, curve](args, key)
        except Failed as error:
            failed += 1
            print(f"error: {' '.join(key)}: {error}", file=sys.stderr, flush=True)
            continue
        except Exception:  # of PyTorch or JAX: the other rates are still to be computed
            failed += 1
            print(f"error: {' '.join(key)}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            continue
        wall = time.perf_counter() - start
        add(args, key, found + [(*found[-1][:3], "wall_seconds", wall)])
        last = {metric: value for _, _, _, metric, value in found}
        print(f"{' '.join(key)}: {found[-1][0]} steps, {found[-1][2]:.1f} s of training, {wall:.1f} s in all; training "
              f"loss {last['train_loss']:.4f}, validation loss {last['val_loss']:.4f} nats, "
              f"{last['val_loss'] / math.log(2):.4f} bits per byte", flush=True)
    return failed


def main():
    args = parse()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that our program ends, too
    several = len(args.curves) > 1
    sys.exit((in_processes(args.curves) if several else in_this_process(args, args.curves[0])) > 0)


if __name__ == "__main__":
    main()
