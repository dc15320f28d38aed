"""Measure time and memory on one long sequence beside other models of equal size, on one GPU: training, and a prompt.

    make cuda build/gpu/bench_cuda
    pip install -r dev/requirements-context.txt
    for n in 4096 32768 131072 524288 1048576 2097152 16777216; do python dev/bench_context.py --length $n; done
    python dev/plot_context.py && python dev/plot_context.py --table

A call appends a row to --csv for each model and task that has none at this length. dev/notes/context.md describes the
models, and what the rows say.

- Every case is a process of its own, one at a time on the GPU. A case that fails, does not fit into the GPU's memory or
  exceeds --timeout becomes a row with a note. The next process imports its packages meanwhile, and then waits.
- A time is the mean of steps that are queued one after another, after compilation and one more step. A first step of
  more than 20 s is the result itself.
- Training is tried again with activation checkpointing if it does not fit.
- Shorter lengths in the CSV predict time and memory. What would take more than 90 s a step (not megalodon.c), or would
  not fit, is not tried; its note gives the prediction.
- No case starts --budget seconds after the first one; the next call continues. Delete a row to measure it again.
"""

import argparse
import csv
import math
import os
import random
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import time

from outputs import begins_with, check_output

FIELDS = ["model", "what", "length", "ms", "tokens_per_s", "peak_mib", "note", "card", "commit"]
LONGEST_STEP = 60  # seconds, of other models
LONG_STEP = 20     # seconds; a step that takes longer is not repeated
LOSS_ROWS = 8192   # tokens whose logits exist at a time
PASS = 16384       # tokens that megalodon.c reads of a prompt at a time, as ./sample_cuda does
PROMPT_ROWS = 65536  # tokens in a linear layer of Llama at a time, while it reads a prompt
CHECKPOINTING = "activation checkpointing"
# Sizes of each model: about 220 million parameters beside the preset mega200M; small beside demo, for a CPU.
SIZES = {
    "mega200M": {
        "vocab": 32000, "dim": 1024,
        "llama": {"layers": 12, "heads": 16, "hidden": 2816},
        "megalodon-jax": {"num_layers": 12, "num_heads": 1, "z_dim": 256, "value_dim": 2048, "ffn_hidden_dim": 2560,
                          "cema_ndim": 16, "chunk_size": 2048, "norm_num_groups": 32, "swiglu": False},
        "mamba-2": {"num_hidden_layers": 24, "state_size": 128},
    },
    "demo": {
        "vocab": 256, "dim": 128,
        "llama": {"layers": 4, "heads": 4, "hidden": 384},
        "megalodon-jax": {"num_layers": 4, "num_heads": 1, "z_dim": 64, "value_dim": 256, "ffn_hidden_dim": 256,
                          "cema_ndim": 8, "chunk_size": 64, "norm_num_groups": 16, "swiglu": True},
        "mamba-2": {"num_hidden_layers": 2, "state_size": 16},
    },
}


# ----------------------------------------------------------------------------
# in the process of a case: other models

def wait_for_turn():
    """Returns when the parent process says that the GPU is free."""
    if not sys.stdin.readline():
        sys.exit("the parent process has ended")


def measure(step, synchronize):
    """(seconds of a step, number of steps measured)."""
    def timed(count):
        start = time.perf_counter()
        for _ in range(count):
            step()
        synchronize()
        return (time.perf_counter() - start) / count

    first = timed(1)
    if first > LONG_STEP:
        return first, 1
    count = max(1, min(10, int(6 / first)))
    return timed(count), count


def report(measured, peak_bytes, parameters, *notes):
    seconds, count = measured
    print(f"RESULT {seconds * 1e3:.6g} {peak_bytes / 2**20:.0f}")
    texts = [f"{parameters / 1e6:.1f}M parameters", *notes, "one step" if count == 1 else ""]
    print("NOTE " + "; ".join(text for text in texts if text))


def torch_device():
    import torch
    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_synchronize():
    import torch
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def torch_peak():
    import torch
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else math.nan


def linear_cross_entropy():
    """A function (x (L,D), weight (V,D), targets (L)) -> mean cross-entropy of x weightᵀ.

    The forward pass also computes both gradients, for LOSS_ROWS tokens at a time: the logits of all tokens never exist.
    """
    import torch

    @torch.compile(dynamic=False)
    def of_rows(x, weight, targets, scale):
        logits = (x @ weight.T).float()
        log_sum = logits.logsumexp(-1, keepdim=True)
        loss = (log_sum.squeeze(-1) - logits.gather(-1, targets[:, None]).squeeze(-1)).sum() * scale
        one_hot = torch.arange(weight.shape[0], device=x.device) == targets[:, None]
        return loss, (((logits - log_sum).exp() - one_hot) * scale).to(x.dtype)

    class LinearCrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, targets):
            half, loss = weight.to(x.dtype), 0
            scale = torch.tensor(1 / len(x), device=x.device)  # a tensor: torch.compile would specialize for a number
            dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
            for start in range(0, len(x), LOSS_ROWS):
                rows = slice(start, start + LOSS_ROWS)
                some, dlogits = of_rows(x[rows], half, targets[rows], scale)
                loss = loss + some
                dx[rows] = dlogits @ half
                dweight += dlogits.T @ x[rows]
            ctx.save_for_backward(dx, dweight)
            return loss

        @staticmethod
        def backward(ctx, dloss):
            dx, dweight = ctx.saved_tensors
            return dx.mul_(dloss), dweight.mul_(dloss), None

    return LinearCrossEntropy.apply


def measure_torch_training(model, loss_of):
    """Steps with bfloat16 autocast, clipping of the gradient's norm, and AdamW."""
    import torch
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    losses = []

    def step():
        with torch.autocast(torch_device(), torch.bfloat16):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    measured = measure(step, torch_synchronize)
    return measured, "" if math.isfinite(losses[-1].item()) else "the loss is not finite"


def choose_attention(heads, head_dim, length, training):
    """Enables the faster of SDPA's backends flash and cudnn, and returns its name."""
    import torch
    if torch_device() == "cpu":
        return "math"

    def enable(name):
        torch.backends.cuda.enable_math_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_flash_sdp(name == "flash")
        torch.backends.cuda.enable_cudnn_sdp(name == "cudnn")

    def seconds(name, length):
        enable(name)
        try:
            q, k, v = (torch.randn(1, length, heads, head_dim, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
                       .requires_grad_(training) for _ in range(3))

            def call():
                y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                if training:
                    y.backward(y.detach())

            call()
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            return time.perf_counter() - start
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return math.inf

    short = min(length, 32768)
    name = min(("flash", "cudnn"), key=lambda name: seconds(name, short))
    if name == "cudnn" and length > short and seconds(name, length) == math.inf:
        name = "flash"
    enable(name)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return name


def run_llama(what, length, size, checkpointing):
    import torch
    import torch._inductor.compile_fx  # torch.compile imports it late
    import torch.nn as nn
    import torch.nn.functional as F
    from torch.utils.checkpoint import checkpoint
    wait_for_turn()
    torch.manual_seed(0)
    vocab, dim, heads, hidden = size["vocab"], size["dim"], size["llama"]["heads"], size["llama"]["hidden"]
    device, half, training = torch_device(), torch.bfloat16, what == "training"
    backend = choose_attention(heads, dim // heads, length, training)
    torch.set_float32_matmul_precision("high")

    def rotate(x, cos, sin):
        a, b = x.float().chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

    class RMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(dim))

        def forward(self, x):
            return F.rms_norm(x.float(), (dim,), self.weight.float(), 1e-5).to(half)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = RMSNorm(), RMSNorm()
            self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
            self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
            self.w2 = nn.Linear(hidden, dim, bias=False)

        def project(self, x, cos, sin):  # q, k, v (L,heads,dim/heads)
            q, k, v = self.qkv(self.norm1(x)).view(len(x), 3, heads, -1).unbind(1)
            return rotate(q, cos, sin), rotate(k, cos, sin), v

        def finish(self, x, o):
            x = x + self.out(o.reshape(len(x), dim))
            u = self.norm2(x)
            return x + self.w2(F.silu(self.w1(u)) * self.w3(u))

        def forward(self, x, cos, sin):
            return self.finish(x, attention(*self.project(x, cos, sin)))

    def attention(q, k, v):
        q, k, v = (y.transpose(0, 1)[None] for y in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)

    with torch.device(device):
        embedding, blocks = nn.Embedding(vocab, dim), nn.ModuleList(Block() for _ in range(size["llama"]["layers"]))
        norm, output = RMSNorm(), nn.Linear(dim, vocab, bias=False)
        model = nn.ModuleList([embedding, blocks, norm, output])
        tokens = torch.randint(0, vocab, (length + 1,))
        angles = torch.outer(torch.arange(length), 10000 ** (-torch.arange(0, dim // heads, 2) / (dim // heads)))
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.02)
    parameters = sum(p.numel() for p in model.parameters())
    tokens, targets = tokens[:-1], tokens[1:]
    compiled = lambda function: torch.compile(function, dynamic=False)  # once: all layers have the same code
    name = "" if backend == "math" else f"attention by {backend}"

    if training:
        block, final, loss_of = compiled(Block.forward), compiled(RMSNorm.forward), linear_cross_entropy()
        with torch.autocast(device, half):  # compiles
            x = torch.randn(length, dim, dtype=half, device=device, requires_grad=True)
            block(blocks[0], x, cos, sin).sum().backward()
            loss_of(final(norm, x)[:LOSS_ROWS], output.weight, targets[:LOSS_ROWS]).backward()
        del x
        for p in model.parameters():
            p.grad = None

        def loss():
            x = embedding(tokens).to(half)
            for b in blocks:
                x = checkpoint(block, b, x, cos, sin, use_reentrant=False) if checkpointing else block(b, x, cos, sin)
            return loss_of(final(norm, x), output.weight, targets)

        measured, problem = measure_torch_training(model, loss)
        report(measured, torch_peak(), parameters, name, CHECKPOINTING if checkpointing else "", problem)
        return

    model.to(half)
    project, finish = compiled(Block.project), compiled(Block.finish)
    keys, values = (torch.empty(len(blocks), length, heads, dim // heads, dtype=half, device=device) for _ in "kv")
    parts = [slice(start, start + PROMPT_ROWS) for start in range(0, length, PROMPT_ROWS)]

    @torch.no_grad()
    def read(parts):
        n = min(parts[-1].stop, length)
        x, q = embedding(tokens[:n]), torch.empty_like(keys[0, :n])
        for b, k, v in zip(blocks, keys, values):
            for p in parts:
                q[p], k[p], v[p] = project(b, x[p], cos[p], sin[p])
            o = attention(q, k[:n], v[:n]).contiguous()
            for p in parts:
                x[p] = finish(b, x[p], o[p])
        return output(norm(x[-1:]))

    read(parts[:1])  # compiles
    report(measure(lambda: read(parts), torch_synchronize), torch_peak(), parameters, name)


def run_mamba2(what, length, size, checkpointing):
    """Mamba-2 of flash-linear-attention."""
    import importlib.machinery
    import types
    import torch
    # mamba_ssm's Triton kernels, without its __init__.py, which imports compiled extensions of Mamba-1
    spec = importlib.machinery.PathFinder.find_spec("mamba_ssm")
    if spec is None:
        raise ImportError("No module named 'mamba_ssm'")
    package = sys.modules["mamba_ssm"] = types.ModuleType("mamba_ssm")
    package.__path__ = list(spec.submodule_search_locations)
    import fla.layers.mamba2
    from fla.models.mamba2 import Mamba2Config, Mamba2ForCausalLM
    scan = fla.layers.mamba2.mamba_chunk_scan_combined

    def dense_scan(x, dt, A, B, C, **options):
        return scan(x.contiguous(), dt.contiguous(), A, B.contiguous(), C.contiguous(), **options)

    # The kernels' offsets have 32 bits. Views of wider arrays exceed them at half the length that copies allow.
    if length * 5 * size["dim"] >= 2**31:
        fla.layers.mamba2.mamba_chunk_scan_combined = dense_scan
    wait_for_turn()
    torch.manual_seed(0)
    device = torch_device()
    torch.set_float32_matmul_precision("high")
    config = Mamba2Config(vocab_size=size["vocab"], hidden_size=size["dim"], fuse_cross_entropy=False,
                          **size["mamba-2"])
    with torch.device(device):
        model = Mamba2ForCausalLM(config)
        tokens = torch.randint(0, size["vocab"], (length + 1,))
    parameters = sum(p.numel() for p in model.parameters())
    tokens, targets = tokens[:-1][None], tokens[1:]

    if what == "training":
        loss_of = linear_cross_entropy()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        for module in model.modules():  # the layer's path without the convolution of the package causal_conv1d
            if type(module).__name__ == "Mamba2":
                module.training = False

        def loss(n=length):
            x = model.base_model(input_ids=tokens[:, :n], use_cache=False)[0][0]
            return loss_of(x.to(torch.bfloat16), model.lm_head.weight, targets[:n])

        with torch.autocast(device, torch.bfloat16):  # compiles, tunes
            loss(min(length, LOSS_ROWS)).backward()
        model.zero_grad(set_to_none=True)
        measured, problem = measure_torch_training(model, loss)
        report(measured, torch_peak(), parameters, CHECKPOINTING if checkpointing else "", problem)
        return

    model.to(torch.bfloat16).eval()

    @torch.no_grad()
    def read(n=length):
        return model(input_ids=tokens[:, :n], use_cache=True, logits_to_keep=1)

    read(min(length, LOSS_ROWS))
    report(measure(read, torch_synchronize), torch_peak(), parameters)


def run_jax(what, length, size, checkpointing):
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from megalodon_jax import MegalodonConfig, MegalodonForCausalLM
    wait_for_turn()
    training = what == "training"
    config = MegalodonConfig(vocab_size=size["vocab"], model_dim=size["dim"], output_size=-1,
                             param_dtype=jnp.float32 if training else jnp.bfloat16, compute_dtype=jnp.bfloat16,
                             use_checkpoint=checkpointing, **size["megalodon-jax"])
    random_numbers = np.random.default_rng(0)

    def values(p):
        return jnp.asarray(0.02 * random_numbers.standard_normal(p.shape, dtype=np.float32), p.dtype)

    # its own initialization takes a minute to compile
    model = eqx.filter_eval_shape(MegalodonForCausalLM, config, key=jax.random.PRNGKey(0))
    model = jax.tree.map(lambda p: values(p) if isinstance(p, jax.ShapeDtypeStruct) else p, model)
    tokens = jnp.asarray(random_numbers.integers(0, size["vocab"], (1, length), dtype=np.int32))
    parameters = sum(p.size for p in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))

    if training:
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(4e-4, b1=0.9, b2=0.95, weight_decay=0.1))

        @eqx.filter_jit(donate="all-except-first")
        def update(tokens, model, state):
            def loss_of(model):  # checkpointing needs deterministic=False; no dropout is set
                return model.compute_loss(tokens, tokens, deterministic=not checkpointing,
                                          loss_chunk_size=LOSS_ROWS if length > LOSS_ROWS else None)
            loss, grads = eqx.filter_value_and_grad(loss_of)(model)
            changes, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
            return eqx.apply_updates(model, changes), state, loss

        holder = [model, optimizer.init(eqx.filter(model, eqx.is_inexact_array)), None]
        del model
        program = update.lower(tokens, holder[0], holder[1]).compile()

        def step():
            holder[:] = program(tokens, holder[0], holder[1])
    else:
        @eqx.filter_jit
        def read(model, tokens):
            hidden, cache = model.model(tokens, return_cache=True)
            return model._project_logits(hidden[:, -1:]), cache

        holder = [None]
        program = read.lower(model, tokens).compile()

        def step():
            holder[0] = None  # of a GPU's memory, one cache only
            holder[0] = program(model, tokens)

    measured = measure(step, lambda: jax.block_until_ready(holder))
    finite = not training or math.isfinite(float(holder[2]))
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", math.nan)
    report(measured, peak, parameters, CHECKPOINTING if checkpointing else "",
           "" if finite else "the loss is not finite")


# Models that run in a process of this program; the others are programs of this repository.
PEERS = {
    "llama": run_llama,
    "megalodon-jax": run_jax,
    "mamba-2": run_mamba2,
}
OURS = ("megalodon.c", "megalodon.c-whole")


# ----------------------------------------------------------------------------
# a case, seen from the parent process

def write_batch(path, length, vocab):
    """Writes random tokens and their targets, one sequence, as the tensors that ./train --batch reads."""
    low, high = random.Random(1).randbytes(length + 1), random.Random(2).randbytes(length + 1)
    high = high.translate(bytes(i % (vocab // 256) for i in range(256)))  # vocab is a multiple of 256
    header = "".join(f'"input.{name}":{{"dtype":"I32","shape":[1,{length}],"data_offsets":[{i * 4 * length},'
                     f'{(i + 1) * 4 * length}]}},' for i, name in enumerate(("tokens", "targets")))
    header = "{" + header[:-1] + "}"
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(header)) + header.encode())
        for first in (0, 1):
            values = bytearray(4 * length)
            values[0::4], values[1::4] = low[first:first + length], high[first:first + length]
            f.write(values)


def last_line(text):
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else ""


def failure(stderr, status):
    """The note for a process that gave no result."""
    needs = re.search(r"need ([\d.]+) MiB or more", stderr)
    if needs:
        return f"does not fit: needs {float(needs.group(1)) / 1024:.1f} GiB or more"
    if re.search(r"out of memory|OutOfMemory|RESOURCE_EXHAUSTED", stderr, re.I):
        return "does not fit: out of memory"
    errors = [line for line in stderr.splitlines() if re.match(r"\S*(Error|Exception)\b|error: ", line)]
    return "failed: " + (errors[-1].strip()[:200] if errors else last_line(stderr) or f"status {status}")


class Case:
    def __init__(self, args, model, what, checkpointing=False, expected=0.0):
        self.args, self.model, self.what, self.checkpointing = args, model, what, checkpointing
        self.expected = expected  # seconds of a step
        self.process = None

    def prepare(self):
        """Starts the process of a peer, which imports its packages and waits."""
        if self.model in OURS or self.process:
            return
        command = [sys.executable, os.path.abspath(__file__), "--case", self.model, "--what", self.what,
                   "--length", str(self.args.length), "--preset", self.args.preset]
        env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "EQX_ON_ERROR": "nan", "TRITON_CACHE_AUTOTUNING": "1",
               "TOKENIZERS_PARALLELISM": "false", **os.environ}
        self.process = subprocess.Popen(command + ["--checkpointing"] * self.checkpointing, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
                                        env=env)

    def cancel(self):
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.communicate()

    def can_checkpoint(self):
        return self.model in PEERS and self.what == "training" and not self.checkpointing

    def run(self, folder):
        """(ms, peak MiB, note); ms is None if there is no result."""
        return self.run_ours(folder) if self.model in OURS else self.run_peer()

    def run_peer(self):
        self.prepare()
        try:
            out, err = self.process.communicate("go\n", timeout=self.args.timeout)
        except subprocess.TimeoutExpired:
            self.cancel()
            return None, None, f"failed: no result within {self.args.timeout} s, with compilation"
        found = re.search(r"^RESULT (\S+) (\S+)$", out, re.M)
        if not found:
            return None, None, failure(err, self.process.returncode)
        return float(found.group(1)), float(found.group(2)), re.search(r"^NOTE (.*)$", out, re.M).group(1)

    def run_ours(self, folder):
        args, long = self.args, self.expected > LONG_STEP
        steps = 1 if long else max(1, min(10, int(6 / self.expected)))
        if self.what == "prompt":
            command = [args.bench, "--read", str(args.length), "--preset", args.preset, "--repeats", str(steps),
                       "--seq-len", str(PASS)]
            note = f"in passes of {PASS} tokens"
        else:
            batch, log = os.path.join(folder, "batch.safetensors"), os.path.join(folder, "log.csv")
            if not os.path.exists(batch):
                write_batch(batch, args.length, SIZES[args.preset]["vocab"])
            command = [args.train, "--preset", args.preset, "--batch", batch, "--lr", "4e-4", "--val-every", "0",
                       "--steps", str(steps if long else steps + 1), "--log", log]
            note = ""
            if self.model == "megalodon.c" and args.length > args.segment_len:
                command += ["--segment-len", str(args.segment_len)]
                note = f"segments of {args.segment_len} tokens"
        if long:
            note += ("; " if note else "") + "one step"
        limit = max(args.timeout, 60 + 3 * self.expected * (steps + 1))
        try:
            result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=limit)
        except subprocess.TimeoutExpired:
            return None, None, f"failed: no result within {limit:.0f} s"
        except OSError as error:
            return None, None, f"failed: {error}"
        if result.returncode:
            return None, None, failure(result.stderr, result.returncode)
        peak = float(re.search(r"peak memory (\d+) MiB", result.stdout).group(1))
        if self.what == "prompt":
            return float(re.search(r": ([\d.]+) ms, ", result.stdout).group(1)), peak, note
        with open(log, newline="") as f:
            rows = list(csv.DictReader(f))
        if not math.isfinite(float(rows[-1]["loss"])):
            note += ("; " if note else "") + "the loss is not finite"
        return statistics.mean(float(row["ms"]) for row in (rows if long else rows[1:])), peak, note


# ----------------------------------------------------------------------------
# predictions from shorter lengths

def predict_seconds(rows, length):
    """Of a step: a L + b L², through the two longest measured rows; proportional to L if there is one."""
    points = [(row["length"], row["ms"] / 1e3) for row in rows][-2:]
    (n1, t1), (n2, t2) = points[0], points[-1]
    b = max(0.0, (t2 / n2 - t1 / n1) / (n2 - n1)) if n1 < n2 else 0.0
    a = t2 / n2 - b * n2
    return t2 * (length / n2)**2 if a < 0 else a * length + b * length**2


def predict_mib(rows, length):
    """Peak memory: linear, through the two longest measured rows; 0 if there are not two."""
    points = [(row["length"], row["peak_mib"]) for row in rows if math.isfinite(row["peak_mib"])][-2:]
    if len(points) < 2:
        return 0.0
    (n1, m1), (n2, m2) = points
    return m2 + (m2 - m1) / (n2 - n1) * (length - n2)


def plan(args, rows, model, what, memory):
    """(a Case, None), or (None, the note for a case that need not be tried). memory: MiB of the GPU."""
    before = sorted((r for r in rows if r["model"] == model and r["what"] == what and r["length"] < args.length),
                    key=lambda r: r["length"])
    measured = [r for r in before if r["ms"]]
    ours = model in OURS
    expected = predict_seconds(measured, args.length) if measured else args.length / 200e3 if ours else 0.0
    if before and not before[-1]["ms"] and not args.all:
        reason = before[-1]["note"].split(":")[0].split(", as at ")[0]
        return None, f"{reason}, as at {before[-1]['length']} tokens"
    if ours or not measured or args.all:
        return Case(args, model, what, expected=max(expected, 1e-3)), None
    if expected > 1.5 * LONGEST_STEP:  # predictions are not exact
        return None, f"more than a minute: about {expected:.0f} s, extrapolated from {measured[-1]['length']} tokens"
    checkpointing = CHECKPOINTING in measured[-1]["note"]
    mode = [r for r in measured if (CHECKPOINTING in r["note"]) == checkpointing]
    mib = predict_mib(mode, args.length)
    if mib > 1.1 * memory and what == "training" and not checkpointing:
        checkpointing = True
    elif mib > 1.1 * memory:
        return None, f"does not fit: about {mib / 1024:.0f} GiB, extrapolated from {measured[-1]['length']} tokens"
    return Case(args, model, what, checkpointing, expected), None


# ----------------------------------------------------------------------------
# the table

def query_gpu(field):
    try:
        command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


def commit():
    try:
        command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def read_rows(path):
    if not os.path.exists(path):
        return []
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    for row in rows:
        row["length"] = int(row["length"])
        for key in ("ms", "tokens_per_s", "peak_mib"):
            row[key] = float(row[key]) if row[key] else None if key == "ms" else math.nan
    return rows


def append_row(path, row):
    new = not os.path.exists(path) or os.path.getsize(path) == 0
    with open(path, "a", newline="") as f:
        writer = csv.DictWriter(f, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, required=True, help="tokens of the sequence")
    parser.add_argument("--models", default="megalodon.c,megalodon.c-whole,llama,megalodon-jax,mamba-2",
                        help="megalodon.c-whole: without segments")
    parser.add_argument("--what", default="prompt,training", help="prompt, training")
    parser.add_argument("--preset", default="mega200M", choices=SIZES, help="demo: small models, to try this program")
    parser.add_argument("--segment-len", type=int, default=16384, help="of megalodon.c, for longer sequences")
    parser.add_argument("--csv", default="dev/notes/context.csv")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="S", help="no case starts after S seconds")
    parser.add_argument("--timeout", type=int, default=180, help="seconds of a case")
    parser.add_argument("--all", action="store_true", help="try every case, whatever shorter lengths predict")
    parser.add_argument("--train", default="./train_cuda")
    parser.add_argument("--bench", default="build/gpu/bench_cuda")
    parser.add_argument("--commit", default=commit(), help="of megalodon.c")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        PEERS[args.case](args.what, args.length, SIZES[args.preset], args.checkpointing)
        return
    models, tasks = args.models.split(","), args.what.split(",")
    for name in models:
        if name not in OURS and name not in PEERS:
            parser.error(f"--models: {name} is none of {', '.join((*OURS, *PEERS))}")
    for task in tasks:
        if task not in ("prompt", "training"):
            parser.error(f"--what: {task} is neither prompt nor training")
    check_output(args.csv, [], "a table of this program", lambda path: begins_with(path, b"model,what,length,"))

    rows, card = read_rows(args.csv), query_gpu("name")
    memory = float(query_gpu("memory.total") or "inf")
    begin = time.monotonic()

    def add(model, what, ms, peak, note):
        row = {"model": model, "what": what, "length": args.length, "ms": f"{ms:.6g}" if ms else "",
               "tokens_per_s": f"{args.length / ms * 1e3:.6g}" if ms else "",
               "peak_mib": f"{peak:.0f}" if ms and math.isfinite(peak) else "", "note": note, "card": card,
               "commit": args.commit}
        append_row(args.csv, row)
        result = f"{ms:.1f} ms, {row['tokens_per_s']} tokens/s, {row['peak_mib'] or '?'} MiB; " if ms else ""
        print(f"{time.monotonic() - begin:5.0f} s  {model}, {what}, {args.length} tokens: {result}{note}", flush=True)

    cases = []
    for model in models:
        for what in tasks:
            if any((r["model"], r["what"], r["length"]) == (model, what, args.length) for r in rows):
                continue
            if model == "megalodon.c-whole" and (what == "prompt" or args.length <= args.segment_len):
                continue  # the same as megalodon.c
            case, note = plan(args, rows, model, what, memory)
            if case:
                cases.append(case)
            else:
                add(model, what, None, None, note)

    with tempfile.TemporaryDirectory() as folder:
        try:
            for i, case in enumerate(cases):
                if time.monotonic() - begin > args.budget:
                    print(f"--budget: {len(cases) - i} cases are left for the next call", flush=True)
                    break
                case.prepare()
                if i + 1 < len(cases):
                    cases[i + 1].prepare()
                result = case.run(folder)
                if result[2].startswith("does not fit") and case.can_checkpoint():
                    result = Case(args, case.model, case.what, True).run(folder)
                add(case.model, case.what, *result)
        finally:
            for case in cases:
                case.cancel()


if __name__ == "__main__":
    main()
