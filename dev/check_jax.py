"""Compare ./train with megalodon-jax on random configurations, parameters and batches.

    pip install -r dev/requirements-jax.txt
    python dev/check_jax.py --seed 1 --count 6

For each configuration megalodon-jax's initial values plus noise are written as a checkpoint, and ./train runs one step
on it with a random batch. In the dump of ./train, logits and loss must agree with megalodon-jax to a relative L2 error
of 1e-5, and every gradient to 1e-4. The script prints one line per configuration, with its worst gradient, and exits
with status 1 if one fails. Configuration i has the seed --seed + i, so that a failing one can be run alone. Each takes
about 20 s on two cores, mostly for compilation.
"""

import argparse
import os
import subprocess
import sys
import tempfile

import numpy as np
from safetensors.numpy import load_file, save_file

from jax_bridge import config_from_fields, write_checkpoint
from make_jax_fixtures import random_batch, random_tensors, reference, require_version

FLAGS = ("swiglu", "rescale_nffn", "scale_emb", "share_emb", "norm_affine")


def random_case(seed):
    """A small configuration, its batch size and its sequence length.

    A norm over only two features is excluded: where both are nearly equal, or nearly zero, it amplifies rounding
    beyond any fixed tolerance.
    """
    rng = np.random.default_rng(seed)
    fields = {name: bool(rng.integers(2)) for name in FLAGS}
    heads, length = int(rng.integers(1, 4)), int(rng.integers(8, 71))
    fields |= dict(num_heads=heads, z_dim=2 * heads * int(rng.integers(2, 6)),
                   value_dim=heads * int(rng.integers(3, 17)), model_dim=int(rng.choice([18, 24, 30, 36])),
                   norm_num_groups=int(rng.choice([1, 2, 3, 6])),
                   chunk_size=int(rng.choice([length + 3, length, (length + 1) // 2, rng.integers(2, 17)])),
                   cema_ndim=int(rng.choice([1, 2, 4, 8, 16])), ffn_hidden_dim=int(rng.integers(9, 50)),
                   num_layers=int(rng.integers(1, 4)), vocab_size=int(rng.integers(30, 97)),
                   norm_eps=float(rng.choice([1e-5, 1e-3])), rope_base=float(rng.choice([500, 1e4, 1e5])))
    return config_from_fields(fields), int(rng.integers(1, 4)), length


def dump_of_train(train, config, tensors, batch):
    """Runs one step of ./train from these tensors and returns the tensors of its dump."""
    with tempfile.TemporaryDirectory() as folder:
        init, data, dump = (os.path.join(folder, name + ".safetensors") for name in ("init", "batch", "dump"))
        write_checkpoint(init, config, tensors)
        save_file(batch, data)
        command = [train, "--init", init, "--batch", data, "--steps", "1", "--dump", dump]
        command += ["--out", os.path.join(folder, "run"), "--overwrite"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if result.returncode != 0:
            raise RuntimeError(f"{train} exited with {result.returncode}: {result.stderr.strip()}")
        return load_file(dump)


def difference(got, want):
    """Relative L2 error; infinite if the tensor is missing, has another shape, or the reference is all zero."""
    if got is None or got.shape != want.shape or not want.any():
        return np.inf
    return np.linalg.norm(np.subtract(got, want, dtype=np.float64)) / np.linalg.norm(want.astype(np.float64))


def compare(dump, want):
    """(whether all tensors pass, a line with the errors of the logits and of the worst gradient)."""
    found = {name: difference(dump.get(name), value) for name, value in want.items() if "input." not in name}
    passed = all(d <= (1e-4 if name.startswith("grad.") else 1e-5) for name, d in found.items())  # NaN fails
    gradients = {name: d if d == d else np.inf for name, d in found.items() if name.startswith("grad.")}
    worst = max(gradients, key=gradients.get)
    return passed, f"logits {found['act.logits']:.1e}, {worst} {gradients[worst]:.1e}"


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--train", default="./train", help="program to check (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="first seed (default: %(default)s)")
    parser.add_argument("--count", type=int, default=6, help="number of configurations (default: %(default)s)")
    args = parser.parse_args()
    require_version()
    failures = 0
    for seed in range(args.seed, args.seed + args.count):
        config, rows, length = random_case(seed)
        tensors, batch = random_tensors(config, seed), random_batch(config, rows, length, seed)
        want = reference(config, tensors, batch)
        try:
            passed, line = compare(dump_of_train(args.train, config, tensors, batch), want)
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            passed, line = False, str(error)
        failures += not passed
        flags = "".join(" " + name for name in FLAGS if getattr(config, name))
        print(f"{'ok  ' if passed else 'FAIL'} seed {seed}: B {rows} L {length} layers {config.num_layers}"
              f" D {config.model_dim} H {config.num_heads} Z {config.z_dim} E {config.value_dim}"
              f" N {config.cema_ndim} C {config.chunk_size} G {config.norm_num_groups}{flags}: {line}",
              flush=True)
    print(f"{args.count - failures} passed, {failures} failed")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
