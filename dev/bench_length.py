"""Does the time of a token depend on how many there are, and what does a token of training cost in memory?

    make all build/bench && python dev/bench_length.py --csv dev/notes/length.csv && python dev/plot_length.py

Three series, each from 4096 tokens on, four times as many at a time:
- decoding: whole chunks, token by token, after so many tokens have been read (build/bench --furthest);
- training: steps of one sequence of so many tokens, --recompute, on dev/data/demo.txt repeated (./train);
- memory: the same with --memory-layers layers, with and without --recompute; twice as many tokens at a time.
Times are medians, and in brackets the best, which tells more on a busy machine. What this machine has no memory for is
left out, and said. Only the standard library is needed. Takes about a quarter of an hour on two idle cores.
"""

import argparse
import csv
import os
import re
import statistics
import subprocess
import sys
import tempfile

from outputs import begins_with, check_output


def available():
    """MiB that a program could get now; infinite where /proc does not say."""
    try:
        with open("/proc/meminfo") as f:
            return int(re.search(r"MemAvailable: *(\d+) kB", f.read()).group(1)) / 1024
    except OSError:
        return float("inf")


def lengths(furthest, factor):
    length = 4096
    while length <= furthest:
        yield length
        length *= factor


def decode(args):
    command = ["build/bench", "--preset", args.preset, "--furthest", str(args.furthest), "--repeats", str(args.chunks),
               "--threads", str(args.threads)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    print(text, end="", flush=True)
    for tokens, ms, best in re.findall(r"after (\d+) tokens, .*: ([\d.]+) \(([\d.]+)\)", text):
        yield {"series": "decoding", "tokens": int(tokens), "ms_per_token": ms, "best_ms": best}


def train(args, folder, length, steps, extra):
    """A row with the median step after the first, planned and used MiB; or the reason why there is none."""
    log = os.path.join(folder, "log.csv")
    command = ["./train", "--preset", args.preset, "--data", os.path.join(folder, "text"), "--batch-size", "1",
               "--seq-len", str(length), "--steps", str(steps), "--val-every", "0", "--threads", str(args.threads),
               "--out", os.path.join(folder, "run"), "--overwrite", "--log", log, *extra]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode:
        return None, (result.stderr.strip().splitlines() or [f"status {result.returncode}"])[-1]
    with open(log, newline="") as f:
        times = [float(row["ms"]) for row in csv.DictReader(f)][1 if steps > 1 else 0:]
    planned = re.search(r"^memory +([\d.]+) MiB", result.stdout, re.M).group(1)
    used = re.search(r"peak memory (\d+) MiB", result.stdout).group(1)
    return {"tokens": length, "ms_per_token": f"{statistics.median(times) / length:.6f}",
            "best_ms": f"{min(times) / length:.6f}", "planned_mib": planned, "peak_mib": used}, None


def series(args, folder, name, all_lengths, steps_of, extra):
    """Trains at one length after another, until one does not fit."""
    planned = 0.0  # MiB a token, by the length before
    for length in all_lengths:
        if planned * length > available():
            print(f"{name}, {length} tokens: left out: about {planned * length:.0f} MiB are needed, {available():.0f} "
                  f"are free", flush=True)
            return
        row, why = train(args, folder, length, steps_of(length), extra)
        if row is None:
            print(f"{name}, {length} tokens: left out: {why}", flush=True)
            return
        print(f"{name}, {length} tokens: {row['ms_per_token']} ({row['best_ms']}) ms a token, {row['planned_mib']} MiB planned, "
              f"{row['peak_mib']} used", flush=True)
        planned = float(row["planned_mib"]) / length
        yield {"series": name, **row}


def summary(rows):
    """Longest against shortest, and bytes a token from the first length to the last."""
    slopes = {}
    for name in dict.fromkeys(row["series"] for row in rows):
        mine = [row for row in rows if row["series"] == name]
        first, last = mine[0], mine[-1]
        span = f"{name}, {first['tokens']} to {last['tokens']} tokens"
        if name in ("decoding", "training"):
            times, best = ([float(row[k]) for row in mine] for k in ("ms_per_token", "best_ms"))
            print(f"{span}: slowest length / fastest {max(times) / min(times):.3f}, by the best of each length "
                  f"{max(best) / min(best):.3f}")
        if name != "decoding" and len(mine) > 1:
            tokens = last["tokens"] - first["tokens"]
            slope = {k: (float(last[k]) - float(first[k])) * 2**20 / tokens for k in ("planned_mib", "peak_mib")}
            slopes[name] = slope["peak_mib"]
            print(f"{span}: {slope['planned_mib']:.0f} bytes a token planned, {slope['peak_mib']:.0f} used")
    if "memory" in slopes and "memory, recompute" in slopes:
        print(f"bytes a token with --recompute: {slopes['memory, recompute'] / slopes['memory']:.3f} of those without")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--furthest", type=int, default=1 << 20, help="tokens")
    parser.add_argument("--furthest-memory", type=int, default=1 << 17, help="tokens of the series on memory")
    parser.add_argument("--memory-layers", type=int, default=12)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--threads", type=int, default=0, help="0: all")
    parser.add_argument("--chunks", type=int, default=200, help="to decode at each length")
    parser.add_argument("--steps", type=int, default=4, help="at least, the first of which does not count")
    parser.add_argument("--csv", default="build/length.csv")
    args = parser.parse_args()
    check_output(args.csv, [], "a table of this program", lambda path: begins_with(path, b"series,tokens,"))
    for program in ("./train", "build/bench"):
        if not os.path.exists(program):
            sys.exit(f"{program} is not here: run this in the repository's root, after make all build/bench")
    rows = list(decode(args))
    with tempfile.TemporaryDirectory() as folder:
        with open("dev/data/demo.txt", "rb") as f, open(os.path.join(folder, "text"), "wb") as out:
            text = f.read()
            longest = max(args.furthest, args.furthest_memory)
            for _ in range(longest * 5 // 4 // len(text) + 1):  # a tenth is kept for validation
                out.write(text)
        enough = lambda length: max(args.steps, 65536 // length + 1)
        rows += series(args, folder, "training", lengths(args.furthest, 4), enough, ["--recompute"])
        deep = ["--num-layers", str(args.memory_layers)]
        one = lambda length: 1
        rows += series(args, folder, "memory", lengths(args.furthest_memory, 2), one, deep)
        rows += series(args, folder, "memory, recompute", lengths(args.furthest_memory, 2), one, [*deep, "--recompute"])
    summary(rows)
    with open(args.csv, "w", newline="") as f:
        writer = csv.DictWriter(f, ["series", "tokens", "ms_per_token", "best_ms", "planned_mib", "peak_mib"])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
