"""Measure the time and the memory per token against the number of tokens, in decoding and in training, on the CPU.

    make all build/bench && python dev/bench_length.py --csv dev/notes/length.csv && python dev/plot_length.py

Three series, each from 4096 tokens on:
- decoding: whole chunks, token by token, after 4096, 16384, .. tokens have been read (build/bench --max-tokens);
- training: steps of one sequence of 4096, 16384, .. tokens, --recompute, on dev/data/shakespeare.txt repeated (./train);
- memory: training of 4096, 8192, .. tokens with --memory-layers layers, with and without --recompute.
Times are medians, with the best in brackets, which is more reliable on a busy machine. A length that does not fit into
this machine's memory is left out with a message. Only the standard library is needed. Takes about a quarter of an hour
on two idle cores.
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
    """MiB of memory that a program could allocate now; infinite without /proc/meminfo."""
    try:
        with open("/proc/meminfo") as f:
            return int(re.search(r"MemAvailable: *(\d+) kB", f.read()).group(1)) / 1024
    except OSError:
        return float("inf")


def lengths(longest, factor):
    length = 4096
    while length <= longest:
        yield length
        length *= factor


def decode(args):
    command = ["build/bench", "--preset", args.preset, "--max-tokens", str(args.max_tokens), "--repeats",
               str(args.chunks), "--threads", str(args.threads)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    print(text, end="", flush=True)
    for tokens, ms, best in re.findall(r"after (\d+) tokens, .*: ([\d.]+) \(([\d.]+)\)", text):
        yield {"series": "decoding", "tokens": int(tokens), "ms_per_token": ms, "best_ms": best}


def train(args, folder, length, steps, extra):
    """(row, None) with the median time of the steps after the first, planned and used MiB; or (None, error message)."""
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
    """Trains at each length in turn, until one does not fit into memory."""
    planned = 0.0  # MiB per token, measured at the previous length
    for length in all_lengths:
        if planned * length > available():
            print(f"{name}, {length} tokens: left out: about {planned * length:.0f} MiB are needed, {available():.0f} "
                  "MiB are available", flush=True)
            return
        row, why = train(args, folder, length, steps_of(length), extra)
        if row is None:
            print(f"{name}, {length} tokens: left out: {why}", flush=True)
            return
        print(f"{name}, {length} tokens: {row['ms_per_token']} ({row['best_ms']}) ms/token, {row['planned_mib']} MiB "
              f"planned, {row['peak_mib']} MiB used", flush=True)
        planned = float(row["planned_mib"]) / length
        yield {"series": name, **row}


def summary(rows):
    """Prints how much the time varies between lengths, and the bytes per token from the first length to the last."""
    slopes = {}
    for name in dict.fromkeys(row["series"] for row in rows):
        mine = [row for row in rows if row["series"] == name]
        first, last = mine[0], mine[-1]
        span = f"{name}, {first['tokens']} to {last['tokens']} tokens"
        if name in ("decoding", "training"):
            times, best = ([float(row[k]) for row in mine] for k in ("ms_per_token", "best_ms"))
            print(f"{span}: slowest length / fastest length {max(times) / min(times):.3f}, by the best times "
                  f"{max(best) / min(best):.3f}")
        if name != "decoding" and len(mine) > 1:
            tokens = last["tokens"] - first["tokens"]
            slope = {k: (float(last[k]) - float(first[k])) * 2**20 / tokens for k in ("planned_mib", "peak_mib")}
            slopes[name] = slope["peak_mib"]
            print(f"{span}: {slope['planned_mib']:.0f} bytes/token planned, {slope['peak_mib']:.0f} bytes/token used")
    if "memory" in slopes and "memory, recompute" in slopes:
        print(f"bytes/token with --recompute: {slopes['memory, recompute'] / slopes['memory']:.3f} of those without")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-tokens", type=int, default=1 << 20, help="longest length of decoding and training")
    parser.add_argument("--max-tokens-memory", type=int, default=1 << 17, help="longest length of the memory series")
    parser.add_argument("--memory-layers", type=int, default=12, help="layers in the memory series")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    parser.add_argument("--chunks", type=int, default=200, help="chunks to decode at each length")
    parser.add_argument("--steps", type=int, default=4, help="least number of steps per length; the first is a warm-up")
    parser.add_argument("--csv", default="build/length.csv")
    args = parser.parse_args()
    check_output(args.csv, [], "a table of this program", lambda path: begins_with(path, b"series,tokens,"))
    for program in ("./train", "build/bench"):
        if not os.path.exists(program):
            sys.exit(f"error: {program}: not found; run this in the repository's root, after make all build/bench")
    rows = list(decode(args))
    with tempfile.TemporaryDirectory() as folder:
        with open("dev/data/shakespeare.txt", "rb") as f, open(os.path.join(folder, "text"), "wb") as out:
            text = f.read()
            longest = max(args.max_tokens, args.max_tokens_memory)
            for _ in range(longest * 5 // 4 // len(text) + 1):  # ./train keeps the last tenth for validation
                out.write(text)
        steps_of = lambda length: max(args.steps, 65536 // length + 1)
        rows += series(args, folder, "training", lengths(args.max_tokens, 4), steps_of, ["--recompute"])
        deep = ["--num-layers", str(args.memory_layers)]
        one = lambda length: 1
        for name, extra in (("memory", deep), ("memory, recompute", [*deep, "--recompute"])):
            rows += series(args, folder, name, lengths(args.max_tokens_memory, 2), one, extra)
    summary(rows)
    with open(args.csv, "w", newline="") as f:
        writer = csv.DictWriter(f, ["series", "tokens", "ms_per_token", "best_ms", "planned_mib", "peak_mib"])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
