"""Model the time of a training step of mega1.3B and mega7.1B on 8 to 1024 H200s, and plot it.

    python dev/plot_scaling.py [dev/notes/scaling.png] [--tokens-per-gpu 32768] [--network 25] ...

P GPUs in machines of 8 form groups of K chunk-parallel ranks; the groups are the data-parallel ranks. For each P and
sequence length the script chooses the fastest K that fits into memory, with or without --recompute. For comparison it
models the same K with a serial handover, where each rank waits for the state of the rank before, as in the released
code. dev/notes/parallel.md, section "Scaling model", lists what is modelled and what is left out. The model has been
checked on two GPUs at most. Prints a table and writes the figure. Needs matplotlib.
"""
import argparse
import itertools
import math
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NODE = 8  # GPUs per machine
LENGTHS, GPUS, POWERS = {"32K": 2**15, "128K": 2**17, "1M": 2**20}, [8, 32, 128, 512, 1024], [2**k for k in range(11)]
# Sizes as in megalodon.h; n: parameters; batch: tokens of a step, whatever the number of GPUs; token: us per token of
# the forward and backward pass, measured, see dev/notes/parallel.md.
MODELS = {
    "mega1.3B": SimpleNamespace(layers=24, D=2048, Z=512, E=4096, H=2, F=4864, N=16, C=2048, V=32000, G=64,
                                n=1342832640, batch=2**21, token=16.8),
    "mega7.1B": SimpleNamespace(layers=32, D=4096, Z=1024, E=8192, H=4, F=11264, N=16, C=2048, V=32000, G=64,
                                n=7117381632, batch=2**22, token=74.3),
}
OPTIONS = [  # name, default, unit and origin
    ("fixed", 0.8, "ms per layer, forward and backward, for any number of tokens; measured: dev/notes/parallel.md"),
    ("hbm", 4222, "GB/s of AdamW; measured: dev/notes/bench-cuda.txt"),
    ("nvlink", 360, "GB/s, one direction; data sheet: NVLink 4, 450; assumed: 80 %% of it"),
    ("pcie", 55, "GB/s, one direction; measured: copies from and to pinned memory"),
    ("network", 40, "GB/s per GPU; assumed: 400 Gb/s for each, 80 %%"),
    ("host-memory", 490, "GB/s per machine; data sheet: two sockets of 8 DDR5-4800, 614; assumed: 80 %%"),
    ("host-sum", 32, "GB/s of float32 sums per rank on the host; measured: two threads, messages of 2^18"),
    ("mpi-latency", 3, "us per message between machines; assumed"),
    ("gpu-latency", 20, "us to synchronize GPUs with each other, or a GPU with its host; assumed"),
    ("memory", 141, "GB per GPU; data sheet"),
]
# us of the parts of a mega200M step, all layers, 8 x 2048 tokens, at commit f3d813b (its bench-cuda.txt). again,
# backward: the shares of recomputation and of the backward pass in a step without the update.
BENCH = SimpleNamespace(tokens=16384, layers=12, D=1024, norm=738, norm_back=1695, cema=3209, cema_back=8079,
                        ends=923, scan=403, scan_back=167, again=0.28, backward=0.63)
PARTS = ["computation", "overhead, recomputation", "states between ranks", "gradients, not overlapped",
         "parameters", "update"]
COLORS = ["#4c72b0", "#8fb1dd", "#c44e52", "#dd8452", "#8172b3", "#937860"]  # of PARTS
DASHED = "mega1.3B"  # its lines


# ---- one GPU

def update_time(c, o, P):
    """Gradient norm and AdamW of n/P parameters (34 bytes each), zeroing gradients, rounding received parameters."""
    return (34 * c.n / P + 4 * c.n + (6 * c.n if P > 1 else 0)) / o.hbm


def norm_time(c, us):
    """Seconds per token and layer, from the us of a part of mega200M, proportional to the number of channels."""
    return us * 1e-6 / BENCH.tokens / BENCH.layers / BENCH.D * c.D


def memory(c, P, K, B, local_len, recompute):
    """Bytes: the memory plan of megalodon.cu (within 0.1 % of dev/notes/test-cuda.txt), what CUDA uses, and the states
    of all ranks of the group."""
    R, states = B * local_len, 8 * c.N * c.D
    layer = 8 * c.G + 2 * (5 * c.D + c.Z + 3 * c.E + c.F) + states / 64 + 4 * (c.H + 3)
    kept = layer * (1 if recompute else c.layers) + 2 * c.D * (c.layers + 2) + 8 * c.G
    scratch = 34 * c.G + 2 * max(5 * c.Z + 5 * c.E + c.D, 3 * c.F) + states / 64 + 8 * c.D + 40
    parts = max(4096 * max(2 * c.D, c.E), R * c.D / 8)
    fixed = 2**28 + 2**25 + parts + 2 * c.C * (c.Z + c.E) + c.layers * (28 * c.N * c.D + B * states) + 2**29
    return 10 * c.n + 8 * c.n / P + R * (kept + scratch) + fixed + (K + 2) * B * states


# ---- communication

def gather_time(o, K, size):
    """All-gather of `size` bytes per rank among K ranks: peer copies in a machine, else MPI through host memory."""
    if K == 1:
        return 0
    if K <= NODE:
        return o.gpu_latency + (K - 1) * size / o.nvlink
    rounds = math.ceil(math.log2(K))
    time = o.gpu_latency + rounds * o.mpi_latency
    if o.scan:  # per round one state is received and combined, on the GPU or the host; then two are copied to the GPU
        combine = o.gpu_latency if o.cuda_aware else size / o.host_sum
        return time + rounds * (size / o.network + combine) + (0 if o.cuda_aware else 3 * size / o.pcie)
    if o.cuda_aware:
        return time + (K - 1) * size / o.network
    rate = min(o.network, o.host_memory / NODE / 3)  # received, forwarded, copied to the GPU
    return time + (K - 1) * size / rate + (K + 1) * size / o.pcie


def reduce_or_gather_time(o, P, size, summing):
    """Reduce-scatter of gradients (summing) or all-gather of parameters, `size` bytes in all, among P ranks.

    Over NVLink each GPU reads an eighth from each other GPU of its machine. Between machines, the GPUs with the same
    local rank communicate, all eight at once. Host buffers are accessed 3 times, or 6 times with the sum, which reads
    twice and writes once. The steps do not overlap.
    """
    machines, eighth = P // NODE, size / NODE
    time = o.gpu_latency + (NODE - 1) * eighth / o.nvlink
    if machines == 1:
        return time
    rate = min(o.network, o.host_memory / NODE / (6 if summing else 3), o.host_sum if summing else o.network)
    time += (machines - 1) * (eighth / machines / (o.network if o.cuda_aware else rate) + o.mpi_latency)
    return time if o.cuda_aware else time + (eighth + eighth / machines) / o.pcie


def exposed(c, o, P, backward):
    """Time of the reduce-scatters that remains after the backward pass. A layer's reduce-scatter overlaps with the
    backward passes of the layers below."""
    embed, layer = c.V * c.D, (c.n - 2 * c.V * c.D) / c.layers
    ends = reduce_or_gather_time(o, P, 4 * embed, True)  # of the output, which is ready first
    for l in range(c.layers):
        ends = max(ends, (l + 1) * backward / c.layers) + reduce_or_gather_time(o, P, 4 * layer, True)
    return ends + reduce_or_gather_time(o, P, 4 * embed, True) - backward


def handover(K, levels, message):
    """Time until all K ranks have finished a pass, where each rank waits for the state of the rank before it.

    levels: for each layer, the seconds (before, serial, after). The serial part starts when the state has arrived from
    the rank before, which sends it at the end of its own serial part.
    """
    done = [0.0] * K
    for before, serial, after in levels:
        arrives = 0.0
        for r in range(K):
            end = max(done[r] + before, arrives) + serial
            arrives, done[r] = end + message, end + after
    return max(done)


# ---- a step, table and figure

def step_parts(c, o, P, L, K, recompute, serial=False):
    """Seconds of each of PARTS, or None if it does not fit. serial: a serial handover instead of all-gathers."""
    batch, local_len = o.tokens_per_gpu * P or c.batch, L // K
    B = rows = batch * K // (L * P)
    if rows == 0 or local_len < c.C or K > P:
        return None
    while memory(c, P, K, B, local_len, recompute) > o.memory:
        B //= 2
        if B == 0:
            return None
    times, token, back = rows // B, c.token * 1e-6, BENCH.backward + BENCH.again * recompute
    once = B * local_len  # tokens that a GPU processes at a time
    compute, gathers = rows * local_len * token, 0
    again = compute * BENCH.again * recompute + times * c.layers * o.fixed * (1 + BENCH.again * recompute)
    state, moments, sums = 8 * c.N * c.D * B, 16 * c.G * B, 24 * c.G * B
    if serial and K > 1:
        norm, norm_back = once * norm_time(c, BENCH.norm), once * norm_time(c, BENCH.norm_back)
        first, last = norm + once * norm_time(c, BENCH.cema), norm_back + once * norm_time(c, BENCH.cema_back)
        after = once * token * (1 - BENCH.backward) / c.layers - first
        before = once * token * back / c.layers - last
        message = o.gpu_latency + state / (o.nvlink if K <= NODE else o.network)
        forward = [(0, first, after)] * c.layers + [(0, norm, 0)]
        backward = [(0, norm_back, 0)] + [(before, last, 0)] * c.layers
        waits = handover(K, forward, message) + handover(K, backward, message)
        gathers = times * (waits - sum(sum(level) for level in forward + backward))
    elif K > 1:
        twice = norm_time(c, BENCH.norm + BENCH.ends + BENCH.scan + BENCH.scan_back)
        again += rows * local_len * c.layers * twice
        norms, states = gather_time(o, K, moments) + gather_time(o, K, sums), 2 * gather_time(o, K, state)
        gathers = times * (c.layers * (norms + states) + norms)
    parts = [compute, again, gathers, exposed(c, o, P, once * token * back),
             reduce_or_gather_time(o, P, (2 if o.bf16_parameters else 4) * c.n, False), update_time(c, o, P)]
    return SimpleNamespace(parts=parts, time=sum(parts), K=K, groups=P // K, B=B, times=times, recompute=recompute,
                           tokens=rows * local_len * P, efficiency=compute / sum(parts),
                           memory=memory(c, P, K, B, local_len, recompute))


def best(c, o, P, L):
    """The fastest step over all K, with and without recomputation; None if none fits."""
    steps = [step_parts(c, o, P, L, K, r) for K in POWERS for r in (False, True)]
    s = min((s for s in steps if s), key=lambda s: s.time, default=None)
    if s:
        s.serial = step_parts(c, o, P, L, s.K, s.recompute, serial=True).efficiency
    return s


def with_options(o, **more):
    """A copy of the options with some of them replaced."""
    return SimpleNamespace(**{**vars(o), **more})


def print_table(o):
    print("""K chunk-parallel x data-parallel ranks; B sequences at a time x number of times; r: --recompute.
Efficiency: computation's share of the step. Serial: the same if each rank waits for the state of the rank before.
Fits: the smallest K that fits, without and with --recompute. Largest cost: the largest part beside computation.
model     tokens  GPUs     K x dp      B x times    GB   tokens/s  efficiency  serial  fits     largest cost""")
    for (name, c), (length, L), P in itertools.product(MODELS.items(), LENGTHS.items(), GPUS):
        fits = [next((K for K in POWERS if K * c.C <= L and K <= P and memory(c, P, K, 1, L // K, r) <= o.memory), "-")
                for r in (False, True)]
        s = best(c, o, P, L)
        if s is None:
            print(f"{name:9} {length:>6} {P:5}  does not fit, or fewer sequences than data-parallel ranks")
            continue
        limit = s.parts.index(max(s.parts[1:]), 1)
        print(f"{name:9} {length:>6} {P:5} {s.K:6} x {s.groups:<6} {s.B:4} x {s.times:<3}{'r' * s.recompute:2}"
              f"{s.memory / 1e9:5.0f} {s.tokens / s.time / 1e3:9.0f}k {s.efficiency:10.0%} {s.serial:8.0%}"
              f"  {fits[0]:>3} {fits[1]:>3}  {PARTS[limit]} {s.parts[limit] / s.time:.0%}")


def draw_efficiency(axis, o):
    lengths = zip(LENGTHS.items(), ["#55a868", "#4c72b0", "#c44e52"])
    for (name, c), ((length, L), color) in itertools.product(MODELS.items(), lengths):
        steps = [s for s in (best(c, o, P, L) for P in GPUS) if s]
        axis.plot([s.K * s.groups for s in steps], [100 * s.efficiency for s in steps],
                  "o:" if name == DASHED else "o-", color=color, markersize=4, label=f"{name}, {length} tokens")
    axis.set(xscale="log", ylim=(0, 102), xlabel="GPUs", ylabel="computation's share of a step, %")
    axis.set_title("The same batch on more GPUs: less\ncomputation to overlap communication with", fontsize=10)
    axis.set_xticks(GPUS, GPUS)


def draw_states(axis, o):
    """A sequence of a million tokens on K GPUs, with unlimited memory: the cost of three ways to communicate states."""
    ways = [("all-gather, as modelled", {}, False, "#c44e52"), ("serial handover", {}, True, "#937860"),
            ("scan", {"scan": True}, False, "#55a868")]
    for (name, c), (label, more, serial, color) in itertools.product(MODELS.items(), ways):
        options = [(K, with_options(o, memory=1e18, tokens_per_gpu=2**20 // K, **more)) for K in POWERS[3:10]]
        steps = [step_parts(c, options_of_K, K, 2**20, K, False, serial) for K, options_of_K in options]
        axis.plot([s.K for s in steps], [100 * sum(s.parts[1:3]) / s.parts[0] for s in steps],
                  "o:" if name == DASHED else "o-", color=color, markersize=4, label=f"{name}, {label}")
    axis.set(xscale="log", yscale="log", xlabel="K chunk-parallel ranks, a million tokens",
             ylabel="time added to the computation, %")
    axis.set_title("The all-gather grows with K:\nbeyond 128 a serial handover costs less", fontsize=10)
    axis.set_xticks(POWERS[3:10], POWERS[3:10])
    axis.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])


def draw_parts(axis, o):
    more, ticks = {}, []
    helps = {"as modelled": None, "+ states by a scan": "scan", "+ bf16 parameters": "bf16_parameters",
             "+ CUDA-aware MPI": "cuda_aware"}
    for y, (label, key) in enumerate(helps.items()):
        more.update({key: True} if key else {})
        for i, (length, L) in enumerate(LENGTHS.items()):
            s, left, at = best(MODELS["mega7.1B"], with_options(o, **more), GPUS[-1], L), 0.0, 5 * i + y
            for part, color, name in zip(s.parts, COLORS, PARTS):
                axis.barh(at, part, left=left, color=color, label=name if at == 0 else None)
                left += part
            axis.text(left, at, f" {s.efficiency:.0%}, K = {s.K}", va="center", fontsize=8)
            ticks.append((at, label if key else f"{length} tokens: {label}"))
    axis.set_yticks(*zip(*ticks), fontsize=8)
    axis.set(xlabel="step, seconds", xlim=(0, 1.25 * axis.get_xlim()[1]), ylim=(14, -4))  # room for the legend
    axis.set_title(f"mega7.1B on {GPUS[-1]} GPUs:\nparts of a step and possible improvements", fontsize=10)


def draw(o, out):
    figure, axes = plt.subplots(1, 3, figsize=(13.5, 4.8), dpi=80, layout="constrained", width_ratios=[1, 1, 1.1])
    for axis, panel in zip(axes, (draw_efficiency, draw_states, draw_parts)):
        panel(axis, o)
        axis.minorticks_off()
        axis.grid(alpha=0.3, axis="x" if panel is draw_parts else "both")
        axis.legend(fontsize=7.5, ncol=2 if panel is draw_parts else 1, columnspacing=1)
    figure.savefig(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", default="dev/notes/scaling.png")
    for name, default, text in OPTIONS:
        parser.add_argument("--" + name, type=float, default=default, help=f"{text} (default {default})")
    parser.add_argument("--tokens-per-gpu", type=int, default=0, help="batch size proportional to the number of GPUs")
    parser.add_argument("--scan", action="store_true", help="states in log2 K rounds instead of an all-gather")
    parser.add_argument("--bf16-parameters", action="store_true", help="all-gather of parameters in 16 bits")
    parser.add_argument("--cuda-aware", action="store_true", help="MPI reads GPU memory, sums run on the GPU")
    o = parser.parse_args()
    out = vars(o).pop("out")
    for name, _, unit in OPTIONS:
        scale = {"GB/s": 1e9, "GB": 1e9, "ms": 1e-3, "us": 1e-6}[unit.split(",")[0].split()[0]]
        setattr(o, name.replace("-", "_"), scale * getattr(o, name.replace("-", "_")))
    print_table(o)
    draw(o, out)


if __name__ == "__main__":
    main()
