"""Compare the speed and memory of a training step with other implementations, on this machine's CPU.

    make build/bench && python dev/bench_peers.py --threads 16

All cases train the enwik8 preset, or a model of equal size, in float32 with AdamW. The other implementations are
megalodon-jax (pip install -r dev/requirements-bench.txt) and a PyTorch Llama with as many parameters (pip install
torch). Each is left out if it is not installed.

- Every case is a separate process, bound to --threads CPUs, one hardware thread per core if there are enough cores.
- Cases take turns, --rounds times, so that all see the same load of the machine.
- A case reports the median time of its steps after two warm-up steps, and its peak resident memory. It also reports
  the resident memory before the model was created, which the interpreter and its libraries use.
- The table shows the median round, and the best one.
- --wheels DIR is a further directory to import packages from, for a machine that has JAX but no network: pip install
  --no-deps --target DIR with the packages of requirements-bench.txt other than jax, jaxlib, numpy and scipy.
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
    """The first `threads` CPUs. Second hardware threads of a core are used only if there are too few cores."""
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
    rotation = torch.polar(torch.ones_like(angles), angles)

    def rotate(x):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * rotation).flatten(-2)

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
    print(f"RESULT {tokens} {peak} nan")  # a C program uses only a MiB or two before the model


def child(name, args):
    """Runs a case in a process of its own: (its results or None, a note or an error message)."""
    command = [sys.executable, __file__, "--case", name]
    options = {key: value for key, value in vars(args).items() if key not in ("case", "rounds")}
    command += [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
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
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPUs of each case")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences per batch")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--steps", type=int, default=7, help="measured steps per case and round")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each case")
    parser.add_argument("--timeout", type=int, default=180, help="time limit of one case in seconds")
    parser.add_argument("--program", default="build/bench", help="the benchmark of megalodon.c")
    parser.add_argument("--wheels", default="", metavar="DIR", help="a further directory to import packages from")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.wheels:
        sys.path.append(os.path.abspath(args.wheels))  # last, so that installed packages take precedence
    cases = {"megalodon.c": lambda *a: run_ours(args.program, *a), "megalodon-jax": run_jax,
             "Llama, PyTorch": run_llama}
    if args.case:
        os.sched_setaffinity(0, cpus(args.threads))
        cases[args.case](args.batch_size, args.seq_len, args.steps, args.threads)
        return
    if not os.path.exists(args.program):
        sys.exit(f"error: {args.program}: not found; run this in the repository's root, after make build/bench")
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
        sys.exit("error: megalodon.c gave no result, so there is nothing to compare with")
    print(f"\n{args.threads} threads, {args.batch_size} x {args.seq_len} tokens, median of {args.rounds} rounds")
    print(f"{'':16} {'tokens/s':>9} {'best':>9} {'ratio':>8} {'peak MiB':>9} {'ratio':>8} {'MiB before model':>17}"
          "   ratio: megalodon.c relative to this row")
    columns = {name: [statistics.median(c) for c in zip(*rounds)] for name, rounds in results.items()}
    speed, peak, _ = columns["megalodon.c"]
    for name, column in columns.items():
        best = max(r[0] for r in results[name])
        print(f"{name:16} {column[0]:9.0f} {best:9.0f} {speed / column[0]:7.2f}x {column[1]:9.0f} "
              f"{peak / column[1]:7.2f}x {column[2]:17.0f}".replace("nan", "  -"))


if __name__ == "__main__":
    main()
