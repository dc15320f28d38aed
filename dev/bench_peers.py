"""Time a training step of ours beside peers on this machine's CPU: the enwik8 preset, float32, AdamW.

    make build/bench && python dev/bench_peers.py --threads 16

Peers: megalodon-jax (pip install -r dev/requirements-jax.txt optax) and a PyTorch Llama with as many parameters
(pip install torch), each left out if it is not installed. Every case is a process of its own, held to the first
--threads cores; cases take turns, --rounds times, so that all meet the same machine. A case reports the median of its
steps after two for warming up, and the peak of its resident memory. The table has each one's best round.
"""

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import time

LAYERS, DIM, VOCAB = 6, 384, 256


def report(times, batch, length):
    tokens = batch * length / statistics.median(times)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"RESULT {tokens:.1f} {peak:.0f}")


def timed(step, count):
    times = []
    for i in range(count + 2):
        start = time.perf_counter()
        step()
        if i >= 2:
            times.append(time.perf_counter() - start)
    return times


def run_jax(batch, length, steps, threads):
    import equinox as eqx
    import jax
    import numpy as np
    import optax
    from megalodon_jax import MegalodonConfig, MegalodonForCausalLM
    jax.config.update("jax_platforms", "cpu")
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
        holder[0], holder[1], loss = update(holder[0], holder[1], tokens + 0)
        loss.block_until_ready()

    report(timed(step, steps), batch, length)


def run_llama(batch, length, steps, threads):
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
    torch.set_num_threads(threads)
    torch.manual_seed(0)
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
    print("parameters", sum(p.numel() for p in model.parameters()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, VOCAB, (batch, length))

    def step():
        loss = F.cross_entropy(model(tokens).view(-1, VOCAB), tokens.view(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    report(timed(step, steps), batch, length)


def run_ours(program, batch, length, steps, threads):
    command = [program, "--brief", "--threads", str(threads), "--batch-size", str(batch), "--seq-len", str(length),
               "--repeats", str(max(3, steps))]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tokens, floor = re.search(r"([\d.]+) tokens/s, (\d+) % of the floor", text).groups()
    peak = re.search(r"([\d.]+) MiB at peak", text).group(1)
    print(text.splitlines()[1])
    print(f"RESULT {tokens} {peak} {floor}")


def child(name, args):
    command = [sys.executable, __file__, "--case", name] + [f"--{key.replace('_', '-')}={value}" for key, value in
                                                           vars(args).items() if key not in ("case", "rounds")]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
    except subprocess.TimeoutExpired:
        return None, f"no result within {args.timeout} s"
    found = re.search(r"^RESULT (.*)$", result.stdout, re.M)
    if not found:
        return None, (result.stderr.strip().splitlines() or ["failed"])[-1]
    return [float(x) for x in found.group(1).split()], result.stdout.splitlines()[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=int, default=120, help="seconds for one case")
    parser.add_argument("--program", default="build/bench")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:args.threads]))
        run = {"megalodon.c": lambda *a: run_ours(args.program, *a), "megalodon-jax": run_jax, "Llama, PyTorch": run_llama}
        run[args.case](args.batch_size, args.seq_len, args.steps, args.threads)
        return
    cases = ("megalodon.c", "megalodon-jax", "Llama, PyTorch")
    best, failed = {}, {}
    for _ in range(args.rounds):
        for name in cases:
            if name in failed:
                continue
            result, note = child(name, args)
            if result is None:
                failed[name] = note
                print(f"{name}: {note}", flush=True)
            else:
                print(f"{name}: {result[0]:.0f} tokens/s, {result[1]:.0f} MiB ({note})", flush=True)
                best[name] = max(best.get(name, result), result)
    print(f"\n{args.threads} threads, {args.batch_size} x {args.seq_len} tokens, best of {args.rounds} rounds")
    print(f"{'':16} {'tokens/s':>9} {'ours is':>8} {'peak MiB':>9}")
    for name, result in best.items():
        print(f"{name:16} {result[0]:9.0f} {best[cases[0]][0] / result[0]:7.2f}x {result[1]:9.0f}")


if __name__ == "__main__":
    main()
