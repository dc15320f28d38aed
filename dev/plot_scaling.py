"""How far many GPUs go, on paper: the time of a training step of mega1.3B and mega7.1B on 8 to 1024 H200s.

    python dev/plot_scaling.py [dev/notes/scaling.png] [--tokens-per-gpu 32768] [--network 25] ...

P GPUs in machines of 8 and in groups of K. A group has a sequence at a time, each of its GPUs a piece; the groups have
different sequences. For every P and length the fastest K is taken that fits into memory, with or without --recompute.
Next to it, the same split where pieces wait for the state of the one before, as in the released code. What the model
knows and what it leaves out: dev/notes/parallel.md, "How far it goes". Two GPUs are the most that have checked it.
Prints a table, draws the picture. Needs matplotlib.
"""
import argparse
import itertools
import math
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = 8  # GPUs of a machine
LENGTHS, GPUS, POWERS = {"32K": 2**15, "128K": 2**17, "1M": 2**20}, [8, 32, 128, 512, 1024], [2**k for k in range(11)]
# As in megalodon.h. batch: tokens of a step, however many GPUs. token: us of forward and backward, measured: parallel.md
MODELS = {
    "mega1.3B": SimpleNamespace(layers=24, D=2048, Z=512, E=4096, H=2, F=4864, N=16, C=2048, V=32000, G=64,
                                n=1342832640, batch=2**21, token=16.8),
    "mega7.1B": SimpleNamespace(layers=32, D=4096, Z=1024, E=8192, H=4, F=11264, N=16, C=2048, V=32000, G=64,
                                n=7117381632, batch=2**22, token=74.3),
}
OPTIONS = [  # name, default, unit and where it is from
    ("fixed", 0.8, "ms a layer, forward and backward, however few tokens; measured: dev/notes/parallel.md"),
    ("hbm", 4222, "GB/s of AdamW; measured: dev/notes/bench-cuda.txt"),
    ("nvlink", 360, "GB/s, one direction; data sheet: NVLink 4, 450; assumed: 80 %% of it"),
    ("pcie", 55, "GB/s, one direction; measured: copies from and to pinned memory, either way"),
    ("network", 40, "GB/s a GPU; assumed: 400 Gb/s for each, 80 %%"),
    ("host-memory", 490, "GB/s a machine; data sheet: two sockets of 8 DDR5-4800, 614; assumed: 80 %%"),
    ("host-sum", 32, "GB/s of float32 that a process adds up; measured: two threads, messages of 2^18"),
    ("mpi-latency", 3, "us a message between machines; assumed"),
    ("gpu-latency", 20, "us until processes' GPUs, or a GPU and its host, have waited for each other; assumed"),
    ("memory", 141, "GB of a GPU; data sheet"),
]
# us of mega200M's parts at commit f3d813b (bench-cuda.txt then), 8 x 2048 tokens, all layers, and shares of its step without update
BENCH = SimpleNamespace(tokens=16384, layers=12, D=1024, norm=738, norm_back=1695, cema=3209, cema_back=8079,
                        ends=923, scan=403, scan_back=167, again=0.28, backward=0.63)
PARTS = ["computation", "small, or done again", "states between pieces", "gradients, not hidden",
         "parameters back", "update"]
COLORS = ["#4c72b0", "#8fb1dd", "#c44e52", "#dd8452", "#8172b3", "#937860"]  # of these
DASHED = "mega1.3B"


# ---- one GPU

def update_time(c, o, P):
    """Norm and AdamW of n/P parameters, 34 bytes each; zeroing all gradients; rounding what others have updated."""
    return (34 * c.n / P + 4 * c.n + (6 * c.n if P > 1 else 0)) / o.hbm


def norm_time(c, us):  # a token's, in one layer, from that of mega200M, by the channels
    return us * 1e-6 / BENCH.tokens / BENCH.layers / BENCH.D * c.D


def memory(c, P, K, B, piece, recompute):
    """Bytes, as megalodon.cu plans them (0.1 % beside dev/notes/test-cuda.txt), CUDA's own and all pieces' states."""
    R, states = B * piece, 8 * c.N * c.D
    layer = 8 * c.G + 2 * (5 * c.D + c.Z + 3 * c.E + c.F) + states / 64 + 4 * (c.H + 3)
    kept = layer * (1 if recompute else c.layers) + 2 * c.D * (c.layers + 2) + 8 * c.G
    scratch = 34 * c.G + 2 * max(5 * c.Z + 5 * c.E + c.D, 3 * c.F) + states / 64 + 8 * c.D + 40
    parts = max(4096 * max(2 * c.D, c.E), R * c.D / 8)
    fixed = 2**28 + 2**25 + parts + 2 * c.C * (c.Z + c.E) + c.layers * (28 * c.N * c.D + B * states) + 2**29
    return 10 * c.n + 8 * c.n / P + R * (kept + scratch) + fixed + (K + 2) * B * states


# ---- what crosses

def gather_time(o, K, size):
    """Everybody in a group gets `size` bytes of everybody. A machine's peer copies, or MPI with buffers of the host."""
    if K == 1:
        return 0
    if K <= HERE:
        return o.gpu_latency + (K - 1) * size / o.nvlink
    rounds = math.ceil(math.log2(K))
    time = o.gpu_latency + rounds * o.mpi_latency
    if o.scan:  # each round one state comes and is combined, by the GPU or by the host; in the end two go up
        combine = o.gpu_latency if o.cuda_aware else size / o.host_sum
        return time + rounds * (size / o.network + combine) + (0 if o.cuda_aware else 3 * size / o.pcie)
    if o.cuda_aware:
        return time + (K - 1) * size / o.network
    rate = min(o.network, o.host_memory / HERE / 3)  # received, sent on, fetched by the GPU
    return time + (K - 1) * size / rate + (K + 1) * size / o.pcie


def whole_time(o, P, size, summing):
    """`size` bytes: gradients to their owners, or what owners have updated to all. Over NVLink an eighth from each of
    the machine's others, and between machines the GPUs with the same eighth, all eight at once. Host buffers are
    written, read and, for the sum, read twice and written: 6 or 3 times. Nothing runs beside anything else here."""
    machines, eighth = P // HERE, size / HERE
    time = o.gpu_latency + (HERE - 1) * eighth / o.nvlink
    if machines == 1:
        return time
    rate = min(o.network, o.host_memory / HERE / (6 if summing else 3), o.host_sum if summing else o.network)
    time += (machines - 1) * (eighth / machines / (o.network if o.cuda_aware else rate) + o.mpi_latency)
    return time if o.cuda_aware else time + (eighth + eighth / machines) / o.pcie


def exposed(c, o, P, backward):
    """Layers' gradients are summed beside the backward passes of the next ones: what is left when these are done."""
    embed, layer = c.V * c.D, (c.n - 2 * c.V * c.D) / c.layers
    ends = whole_time(o, P, 4 * embed, True)  # the output's, known first
    for l in range(c.layers):
        ends = max(ends, (l + 1) * backward / c.layers) + whole_time(o, P, 4 * layer, True)
    return ends + whole_time(o, P, 4 * embed, True) - backward


def handover(K, levels, message):
    """Time until all of K pieces are through. levels: (before, serial, behind) of one; the serial part waits for the
    state of the piece before, which that sends when its own serial part is done."""
    done = [0.0] * K
    for before, serial, behind in levels:
        arrives = 0.0
        for r in range(K):
            end = max(done[r] + before, arrives) + serial
            arrives, done[r] = end + message, end + behind
    return max(done)


# ---- a step, table and picture

def step_parts(c, o, P, L, K, recompute, serial=False):
    """Seconds of each of PARTS, or None where it does not fit. With serial, waiting takes the place of gathers."""
    batch, piece = o.tokens_per_gpu * P or c.batch, L // K
    B = rows = batch * K // (L * P)
    if rows == 0 or piece < c.C or K > P:
        return None
    while memory(c, P, K, B, piece, recompute) > o.memory:
        B //= 2
        if B == 0:
            return None
    times, token, back = rows // B, c.token * 1e-6, BENCH.backward + BENCH.again * recompute
    once = B * piece  # tokens that a GPU has at a time
    compute, gathers = rows * piece * token, 0
    again = compute * BENCH.again * recompute + times * c.layers * o.fixed * (1 + BENCH.again * recompute)
    state, moments, sums = 8 * c.N * c.D * B, 16 * c.G * B, 24 * c.G * B
    if serial and K > 1:
        norm, norm_back = once * norm_time(c, BENCH.norm), once * norm_time(c, BENCH.norm_back)
        first, last = norm + once * norm_time(c, BENCH.cema), norm_back + once * norm_time(c, BENCH.cema_back)
        behind = once * token * (1 - BENCH.backward) / c.layers - first
        before = once * token * back / c.layers - last
        message = o.gpu_latency + state / (o.nvlink if K <= HERE else o.network)
        forward = [(0, first, behind)] * c.layers + [(0, norm, 0)]
        backward = [(0, norm_back, 0)] + [(before, last, 0)] * c.layers
        waits = handover(K, forward, message) + handover(K, backward, message)
        gathers = times * (waits - sum(sum(level) for level in forward + backward))
    elif K > 1:
        twice = norm_time(c, BENCH.norm + BENCH.ends + BENCH.scan + BENCH.scan_back)
        again += rows * piece * c.layers * twice
        norms, states = gather_time(o, K, moments) + gather_time(o, K, sums), 2 * gather_time(o, K, state)
        gathers = times * (c.layers * (norms + states) + norms)
    parts = [compute, again, gathers, exposed(c, o, P, once * token * back),
             whole_time(o, P, (2 if o.bf16_parameters else 4) * c.n, False), update_time(c, o, P)]
    return SimpleNamespace(parts=parts, time=sum(parts), K=K, groups=P // K, B=B, times=times, recompute=recompute,
                           tokens=rows * piece * P, efficiency=compute / sum(parts),
                           memory=memory(c, P, K, B, piece, recompute))


def best(c, o, P, L):
    steps = [step_parts(c, o, P, L, K, r) for K in POWERS for r in (False, True)]
    s = min((s for s in steps if s), key=lambda s: s.time, default=None)
    if s:
        s.serial = step_parts(c, o, P, L, s.K, s.recompute, serial=True).efficiency
    return s


def but(o, **more):
    return SimpleNamespace(**{**vars(o), **more})


def print_table(o):
    print("""K pieces x groups; B sequences at a time x how often, r: --recompute. Efficiency: computation's part of it.
Serial: the same where pieces wait for the one before. Fits: from which K, without and with --recompute.
model     tokens  GPUs     K x groups  B x times    GB   tokens/s  efficiency  serial  fits     most lost by""")
    for (name, c), (length, L), P in itertools.product(MODELS.items(), LENGTHS.items(), GPUS):
        fits = [next((K for K in POWERS if K * c.C <= L and K <= P and memory(c, P, K, 1, L // K, r) <= o.memory), "-")
                for r in (False, True)]
        s = best(c, o, P, L)
        if s is None:
            print(f"{name:9} {length:>6} {P:5}  does not fit, or fewer sequences than groups")
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
    axis.set_title("More GPUs for the same batch:\nless and less to hide the exchange behind", fontsize=10)
    axis.set_xticks(GPUS, GPUS)


def draw_states(axis, o):
    """A sequence of a million tokens on K GPUs, whether it fits or not: its pieces know each other's states in time."""
    ways = [("gathered, as modelled", {}, False, "#c44e52"), ("handed over serially", {}, True, "#937860"),
            ("by a scan", {"scan": True}, False, "#55a868")]
    for (name, c), (label, more, serial, color) in itertools.product(MODELS.items(), ways):
        steps = [step_parts(c, but(o, memory=1e18, tokens_per_gpu=2**20 // K, **more), K, 2**20, K, False, serial)
                 for K in POWERS[3:10]]
        axis.plot([s.K for s in steps], [100 * sum(s.parts[1:3]) / s.parts[0] for s in steps],
                  "o:" if name == DASHED else "o-", color=color, markersize=4, label=f"{name}, {label}")
    axis.set(xscale="log", yscale="log", xlabel="pieces K of a million tokens", ylabel="added to the computation, %")
    axis.set_title("The more pieces, the more a GPU gathers:\nbeyond 128, waiting in turn costs less", fontsize=10)
    axis.set_xticks(POWERS[3:10], POWERS[3:10])
    axis.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])


def draw_parts(axis, o):
    more, ticks = {}, []
    helps = {"as modelled": None, "+ states by a scan": "scan", "+ bf16 parameters back": "bf16_parameters",
             "+ CUDA-aware MPI": "cuda_aware"}
    for y, (label, key) in enumerate(helps.items()):
        more.update({key: True} if key else {})
        for i, (length, L) in enumerate(LENGTHS.items()):
            s, left, at = best(MODELS["mega7.1B"], but(o, **more), GPUS[-1], L), 0.0, 5 * i + y
            for part, color, name in zip(s.parts, COLORS, PARTS):
                axis.barh(at, part, left=left, color=color, label=name if at == 0 else None)
                left += part
            axis.text(left, at, f" {s.efficiency:.0%}, K = {s.K}", va="center", fontsize=8)
            ticks.append((at, label if key else f"{length} tokens: {label}"))
    axis.set_yticks(*zip(*ticks), fontsize=8)
    axis.set(xlabel="seconds of a step", xlim=(0, 1.25 * axis.get_xlim()[1]), ylim=(14, -4))  # room for the legend
    axis.set_title(f"mega7.1B on {GPUS[-1]} GPUs:\nwhat limits, and what would help", fontsize=10)


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
    parser.add_argument("--tokens-per-gpu", type=int, default=0, help="a batch that grows with the GPUs")
    parser.add_argument("--scan", action="store_true", help="states in log2 K rounds instead of an all-gather")
    parser.add_argument("--bf16-parameters", action="store_true", help="parameters come back in 16 bits")
    parser.add_argument("--cuda-aware", action="store_true", help="MPI reads and sums GPU memory, no host buffers")
    o = parser.parse_args()
    out = vars(o).pop("out")
    for name, _, unit in OPTIONS:
        scale = {"GB/s": 1e9, "GB": 1e9, "ms": 1e-3, "us": 1e-6}[unit.split(",")[0].split()[0]]
        setattr(o, name.replace("-", "_"), scale * getattr(o, name.replace("-", "_")))
    print_table(o)
    draw(o, out)


if __name__ == "__main__":
    main()
