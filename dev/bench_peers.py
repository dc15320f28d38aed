"""Time a training step of ours beside peers on this machine's CPU: the enwik8 preset, float32, AdamW.

    make build/bench && python dev/bench_peers.py --threads 16

Peers: megalodon-jax (pip install -r dev/requirements-bench.txt) and a PyTorch Llama with as many parameters (pip
install torch), each left out if it is not installed. --wheels DIR: packages are also looked for there, for a machine
that has JAX but no network: pip install --no-deps --target DIR for what requirements-bench.txt names besides jax,
jaxlib, numpy, scipy. Every case is a process of its own, held to --threads cores, of which no two are one core's
hardware threads if there are enough; cases take turns, --rounds times, so that all meet the same machine. A case
reports the median of its steps after two for warming up, and the peak of its resident memory, of which the
interpreter and its libraries had some before the model was made. The table has the median round, and the best one.
"""

import argparse
import importlib.metadata
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time

LAYERS, DIM, VOCAB = 6, 384, 256


def resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def report(times, batch, length, before):
    print(f"RESULT {batch * length / statistics.median(times):.1f} {resident():.0f} {before:.0f}")


def cpus(threads):
    """The first `threads` CPUs, taking second hardware threads of a core only when there are no others."""
    def key(cpu):
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as f:
                siblings = [int(x) for part in f.read().split(",") for x in part.split("-")]
        except (OSError, ValueError):
            siblings = [cpu]
        return cpu != min(siblings), cpu
    return set(sorted(os.sched_getaffinity(0), key=key)[:threads])


def cpu_model():
    try:
        with open("/proc/cpuinfo") as f:
            return re.search(r"model name\s*: (.*)", f.read()).group(1)
    except (OSError, AttributeError):
        return platform.processor() or "unknown CPU"


def versions(*names):
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    print("NOTE " + ", ".join(found))


def timed(step, count):
    times = []
    for i in range(count + 2):
        start = time.perf_counter()
        step()
        if i >= 2:
            times.append(time.perf_counter() - start)
    return times


def run_jax(batch, length, steps, _):
    import equinox as eqx
    import jax
    import numpy as np
    import optax
    from megalodon_jax import MegalodonConfig, MegalodonForCausalLM
    jax.config.update("jax_platforms", "cpu")
    versions("megalodon-jax", "jax", "jaxlib", "equinox", "optax")
    jax.block_until_ready(jax.numpy.ones(8) + 1)
    before = resident()
    config = MegalodonConfig(vocab_size=VOCAB, model_dim=DIM, num_layers=LAYERS, num_heads=3, z_dim=192, value_dim=384,
                             ffn_hidden_dim=1024, cema_ndim=8, chunk_size=256, norm_num_groups=32, swiglu=True,
                             output_size=-1)
    model = MegalodonForCausalLM(config, key=jax.random.PRNGKey(0))
    optimizer = optax.adamw(4e-4, b1=0.9, b2=0.95, weight_decay=0.1)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    rng = np.random.default_rng(0)
    tokens = jax.numpy.asarray(rng.integers(0, VOCAB, (batch, length)))

    @eqx.filter_jit(donate="all")
    def update(model, state, tokens):
        loss, grads = eqx.filter_value_and_grad(lambda m: m.compute_loss(tokens, tokens))(model)
        changes, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, changes), state, loss

    holder = [model, state]

    def step():
        holder[0], holder[1], _ = update(holder[0], holder[1], tokens + 0)
        jax.block_until_ready(holder)

    report(timed(step, steps), batch, length, before)


def run_llama(batch, length, steps, threads):
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    versions("torch")
    before = resident()
    heads, hidden = 6, 1088
    angles = torch.outer(torch.arange(length), 10000 ** (-torch.arange(0, DIM // heads, 2) / (DIM // heads)))
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotate(x):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(-2)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
            self.qkv, self.out = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
            self.w1, self.w3 = nn.Linear(DIM, hidden, bias=False), nn.Linear(DIM, hidden, bias=False)
            self.w2 = nn.Linear(hidden, DIM, bias=False)

        def forward(self, x):
            q, k, v = (y.view(batch, length, heads, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
            y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(batch, length, DIM))
            u = self.norm2(x)
            return x + self.w2(F.silu(self.w1(u)) * self.w3(u))

    model = nn.Sequential(nn.Embedding(VOCAB, DIM), *(Block() for _ in range(LAYERS)), nn.RMSNorm(DIM),
                          nn.Linear(DIM, VOCAB, bias=False))
    assert sum(p.numel() for p in model.parameters()) == 11260800  # ours: 11,359,104
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, VOCAB, (batch, length))

    def step():
        loss = F.cross_entropy(model(tokens).view(-1, VOCAB), tokens.view(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    report(timed(step, steps), batch, length, before)


def run_ours(program, batch, length, steps, threads):
    command = [program, "--brief", "--threads", str(threads), "--batch-size", str(batch), "--seq-len", str(length),
               "--repeats", str(max(3, steps))]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tokens = re.search(r"([\d.]+) \([\d.]+\) tokens/s", text).group(1)
    floor = re.search(r"ms: (\d+) % of the step", text).group(1)
    peak = re.search(r"([\d.]+) MiB at peak", text).group(1)
    print(f"NOTE {text.splitlines()[0].split(';')[0]}; {floor} % of the floor")
    print(f"RESULT {tokens} {peak} nan")  # a C program: a MiB or two before the model


def child(name, args):
    """What a case measured, or None, and a note."""
    command = [sys.executable, __file__, "--case", name]
    command += [f"--{key.replace('_', '-')}={value}" for key, value in vars(args).items() if key not in ("case", "rounds")]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
    except subprocess.TimeoutExpired:
        return None, f"no result within {args.timeout} s"
    found = re.search(r"^RESULT (.*)$", result.stdout, re.M)
    if not found:
        return None, "left out: " + (result.stderr.strip().splitlines() or [f"status {result.returncode}"])[-1]
    return [float(x) for x in found.group(1).split()], re.search(r"^NOTE (.*)$", result.stdout, re.M).group(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=int, default=180, help="seconds for one case")
    parser.add_argument("--program", default="build/bench")
    parser.add_argument("--wheels", default="", metavar="DIR", help="where else to look for packages")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.wheels:
        sys.path.append(os.path.abspath(args.wheels))  # last: what is installed comes first
    cases = {"megalodon.c": lambda *a: run_ours(args.program, *a), "megalodon-jax": run_jax, "Llama, PyTorch": run_llama}
    if args.case:
        os.sched_setaffinity(0, cpus(args.threads))
        cases[args.case](args.batch_size, args.seq_len, args.steps, args.threads)
        return
    if not os.path.exists(args.program):
        sys.exit(f"{args.program} is not here: run this in the repository's root, after make build/bench")
    print(f"{cpu_model()}, {len(os.sched_getaffinity(0))} CPUs, Python {platform.python_version()}", flush=True)
    results, failed = {}, set()
    for _ in range(args.rounds):
        for name in cases:
            if name in failed:
                continue
            result, note = child(name, args)
            if result is None:
                failed.add(name)
                print(f"{name}: {note}", flush=True)
            else:
                results.setdefault(name, []).append(result)
                print(f"{name}: {result[0]:.0f} tokens/s, {result[1]:.0f} MiB ({note})", flush=True)
    if "megalodon.c" not in results:
        sys.exit("no result of ours to compare with")
    print(f"\n{args.threads} threads, {args.batch_size} x {args.seq_len} tokens, median of {args.rounds} rounds")
    print(f"{'':16} {'tokens/s':>9} {'best':>9} {'ours is':>8} {'peak MiB':>9} {'ours is':>8} {'before the model':>17}")
    columns = {name: [statistics.median(c) for c in zip(*rounds)] for name, rounds in results.items()}
    speed, peak, _ = columns["megalodon.c"]
    for name, column in columns.items():
        best = max(r[0] for r in results[name])
        print(f"{name:16} {column[0]:9.0f} {best:9.0f} {speed / column[0]:7.2f}x {column[1]:9.0f} "
              f"{peak / column[1]:7.2f}x {column[2]:17.0f}".replace("nan", "  -"))


if __name__ == "__main__":
    main()
