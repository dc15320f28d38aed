"""Time decoding on a CPU, ./sample beside PyTorch with the same weights, taking turns.

    make train sample
    python3 dev/bench_decode.py --presets demo,enwik8,mega200M --threads 1,2

For each preset, with a vocabulary of 256 bytes, ./train writes a model of random initial values. Both programs read
four bytes and write --num-tokens more, in float32. PyTorch runs dev/megalodon.py token by token, with CEMA's
coefficients computed once. Printed are milliseconds a token: the median of --rounds rounds, each without the start of the program.
Needs PyTorch.
"""
import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

import torch

import megalodon

PROMPT = "Once"


def call(*command):
    if not os.path.exists(command[0]):
        sys.exit(f"error: {command[0]}: not found; run make in the repository root, and this script there, too")
    result = subprocess.run([str(word) for word in command], capture_output=True, errors="replace")
    if result.returncode != 0:
        sys.exit(f"error: {' '.join(map(str, command))}: {result.stderr.strip()}")
    return result.stderr


def ours(model, num_tokens, threads):
    message = call("./sample", "--model", model, "--prompt", PROMPT, "--num-tokens", num_tokens, "--threads", threads)
    return 1e3 / float(re.search(r"wrote \d+, ([\d.]+) tokens/s", message)[1])


def theirs(config, params, num_tokens, threads):
    torch.set_num_threads(threads)
    tokens = megalodon.generate(config, params, PROMPT.encode(), num_tokens)
    for _ in range(len(PROMPT) + 1):  # the prompt, and the token that follows from it
        next(tokens)
    start = time.perf_counter()
    count = sum(1 for _ in tokens)
    return 1e3 * (time.perf_counter() - start) / count


def once(compute):
    """The function, which computes the coefficients of the same tensors only once."""
    known = {}

    def coeffs(*tensors):
        key = tensors[0].data_ptr()
        if key not in known:
            known[key] = (tensors, compute(*tensors))  # the tensors are kept, so that no others get their memory
        return known[key][1]
    return coeffs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", default="demo,enwik8,mega200M", help="(default: %(default)s)")
    parser.add_argument("--threads", default="1,2", help="(default: %(default)s)")
    parser.add_argument("--num-tokens", type=int, default=48, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    args = parser.parse_args()
    megalodon.cema_coeffs_forward = once(megalodon.cema_coeffs_forward)
    print(f"torch {torch.__version__}, ms a token\n\n| preset | threads | megalodon.c | PyTorch |\n|---|---|---|---|")
    for preset in args.presets.split(","):
        with tempfile.TemporaryDirectory() as folder:
            model = os.path.join(folder, "model")
            call("./train", "--preset", preset, "--vocab-size", 256, "--steps", 0, "--val-every", 0, "--out", model)
            config, params = megalodon.read_model(megalodon.model_file(model), torch.float32)
            for threads in map(int, args.threads.split(",")):
                times = [(ours(model, args.num_tokens, threads), theirs(config, params, args.num_tokens, threads))
                         for _ in range(args.rounds)]
                mine, other = map(statistics.median, zip(*times))
                print(f"| {preset} | {threads} | {mine:.3g} | {other:.3g} |", flush=True)


if __name__ == "__main__":
    main()
