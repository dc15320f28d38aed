"""Time a training step of megalodon.c beside one of a Llama with as many parameters, on one GPU, taking turns.

    make build/gpu/bench_cuda
    python dev/bench_llama.py --preset mega200M --batch-size 8 --seq-len 2048
    python dev/bench_llama.py --preset enwik8 --batch-size 64 --seq-len 512 --cuda-graph

The Llama is PyTorch's: bfloat16 autocast, torch.compile, FlashAttention, fused AdamW, clipping of the gradient's norm.
Both read random tokens; megalodon.c is build/gpu/bench_cuda, whose step has the same parts. Printed are medians, tokens/s,
peak memory, and the ratio of the speeds. With --cuda-graph the Llama's step is one CUDA graph, which helps small models.
"""

import argparse
import re
import statistics
import subprocess
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

# dim, layers, heads, hidden: as many parameters as the preset of megalodon.c, within 1 %.
SIZES = {
    "demo": (256, 128, 4, 2, 416),
    "enwik8": (256, 384, 6, 6, 1104),
    "mega200M": (32000, 1024, 12, 16, 2816),
    "mega1.3B": (32000, 2048, 24, 16, 5504),
}


def rotate(x, cos, sin):
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(dim, 1e-5), nn.RMSNorm(dim, 1e-5)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x, cos, sin):
        B, L, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.out(o.transpose(1, 2).reshape(B, L, D))
        u = self.norm2(x)
        return x + self.w2(F.silu(self.w1(u)) * self.w3(u))


class Llama(nn.Module):
    def __init__(self, vocab, dim, layers, heads, hidden, length):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(vocab, dim), nn.RMSNorm(dim, 1e-5)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden) for _ in range(layers))
        self.output = nn.Linear(dim, vocab, bias=False)
        width = dim // heads
        angles = torch.outer(torch.arange(length), 10000 ** (-torch.arange(0, width, 2) / width))
        self.register_buffer("cos", angles.cos()), self.register_buffer("sin", angles.sin())
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.output(self.norm(x)).flatten(0, 1).float(), targets.flatten())


def llama_step(args):
    """A function that does one step of the Llama, and the number of parameters."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    vocab = SIZES[args.preset][0]
    model = Llama(*SIZES[args.preset], args.seq_len).cuda()
    tokens = torch.randint(0, vocab, (args.batch_size, args.seq_len + 1), device="cuda")
    compiled = torch.compile(model, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, (0.9, 0.95), fused=True, capturable=args.cuda_graph)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not args.cuda_graph)

    parameters = sum(p.numel() for p in model.parameters())
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(4):
            step()
    torch.cuda.current_stream().wait_stream(side)
    if not args.cuda_graph:
        return step, parameters
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay, parameters


def time_llama(step, repeats):
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def time_ours(args):
    """Milliseconds of a step, GiB of memory, and the share of the floor, as bench_cuda prints them."""
    out = subprocess.run([args.bench, "--preset", args.preset, "--batch-size", str(args.batch_size), "--seq-len",
                          str(args.seq_len), "--repeats", str(args.repeats), "--brief"], check=True,
                         capture_output=True, text=True).stdout
    return tuple(float(re.search(pattern, out)[1]) for pattern in
                 (r": ([\d.]+) ms,", r"([\d.]+) GiB taken", r": ([\d.]+) % of the step"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mega200M", choices=SIZES)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--repeats", type=int, default=10, help="steps of which the median is taken")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each model")
    parser.add_argument("--cuda-graph", action="store_true", help="the Llama's step is one CUDA graph")
    parser.add_argument("--bench", default="build/gpu/bench_cuda", help="the benchmark program of megalodon.c")
    args = parser.parse_args()
    step, parameters = llama_step(args)
    tokens = args.batch_size * args.seq_len
    llama, ours = [], []
    for _ in range(args.rounds):
        llama.append(time_llama(step, args.repeats))
        ours.append(time_ours(args))
    theirs, (mine, memory, share) = min(llama), min(ours)
    print(f"{torch.cuda.get_device_name()}, {args.preset}, {args.batch_size} x {args.seq_len} tokens, times of all rounds: "
          f"Llama {', '.join(f'{x:.2f}' for x in llama)} ms; megalodon.c {', '.join(f'{x[0]:.2f}' for x in ours)} ms")
    print(f"Llama, {parameters / 1e6:.1f} M parameters: {tokens / theirs:.0f} thousand tokens/s, "
          f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    print(f"megalodon.c: {tokens / mine:.0f} thousand tokens/s, {memory:.2f} GiB, {share:.0f} % of the floor's rate")
    print(f"megalodon.c / Llama: {theirs / mine:.2f}")


if __name__ == "__main__":
    main()
