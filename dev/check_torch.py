"""Compare the double build of ./train with dev/megalodon.py, whose gradients are autograd's.

    pip install -r dev/requirements-torch.txt        or, on Debian: apt install python3-torch
    make build/double/train build/double/sample
    python dev/check_torch.py

For each small configuration, random parameters and a random batch are written to files, and ./train runs one step on
them. Its dump must have the same tensors as that of dev/megalodon.py, and each activation, the loss and each gradient
must agree to a relative L2 error of 1e-11. Rounding alone gave at most 2e-15 for activations and 4e-14 for gradients
with four seeds; the margin is for other processors and libraries. As a trial, a factor of 1 + 1e-10 in the gradient
w.r.t. CEMA's theta failed in each of them. CEMA is computed as a recurrence and as a convolution.

Then the state: ./train --carry-state runs three steps, and the dump of the third must agree with a pass that continues
from the tokens of the first two. And ./sample --temperature 0, which decodes token by token, must write the same text.
The script prints one line per comparison and exits with status 1 if one fails.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile

import torch

import megalodon
from dump_torch import write_safetensors

TOLERANCE = 1e-11

# B, L and what differs from BASE. A norm over only two features is excluded: where both are nearly equal, it amplifies
# rounding beyond any fixed tolerance. So is a chunk of one token, whose attention has no gradient.
BASE = dict(num_layers=2, model_dim=24, num_heads=1, z_dim=8, value_dim=20, ffn_hidden_dim=28, vocab_size=41,
            cema_ndim=4, chunk_size=16, norm_num_groups=4)
CASES = {
    "plain, whole chunks": (2, 48, {}),
    "swiglu, ragged last chunk": (2, 37, dict(swiglu=True)),
    "sequence shorter than a chunk": (3, 11, dict(swiglu=True, norm_num_groups=8)),
    "three heads, last chunk of one token": (1, 33, dict(num_heads=3, z_dim=18, value_dim=27)),
    "shared embedding": (2, 40, dict(share_emb=True, num_heads=2)),
    "shared and scaled embedding, rescaled FFN": (1, 35, dict(share_emb=True, scale_emb=True, rescale_nffn=True)),
    "no affine norms, one group": (2, 30, dict(norm_affine=False, norm_num_groups=1, chunk_size=7)),
    "odd sizes, swiglu, no affine norms, rescaled FFN": (
        2, 29, dict(model_dim=21, norm_num_groups=7, z_dim=10, value_dim=13, ffn_hidden_dim=17, cema_ndim=3,
                    chunk_size=5, swiglu=True, norm_affine=False, rescale_nffn=True, scale_emb=True)),
    "one CEMA mode, other eps and rotary base": (2, 41, dict(cema_ndim=1, norm_eps=1e-3, rope_base=500.0)),
    "four layers, 150 tokens, two heads": (
        1, 150, dict(num_layers=4, num_heads=2, cema_ndim=16, chunk_size=64, swiglu=True)),
    "real CEMA": (2, 37, dict(cema="real", swiglu=True)),
    "no CEMA, LayerNorm for TimestepNorm": (2, 37, dict(cema="none", timestep_norm="layer")),
    "standard attention, one hop": (2, 37, dict(attention="standard", two_hop="off", num_heads=2)),
    "all parts replaced": (2, 29, dict(cema="real", timestep_norm="layer", attention="standard", two_hop="off")),
}
UNUSED = {"real": ("mega.cema.theta",), "none": ("mega.cema.",)}  # parameters whose gradient is 0, for choices of cema
BYTES = dict(vocab_size=256, chunk_size=8, num_heads=2, swiglu=True)
CEMA = {"recurrence": megalodon.cema_forward, "convolution": megalodon.cema_convolution}


def config_of(fields):
    return argparse.Namespace(**(megalodon.DEFAULTS | BASE | fields))


def random_params(config, generator):
    """Weights that keep activations near one; all others are noise, so that no bias, scale or offset is zero."""
    params = {}
    for name, shape in megalodon.megalodon_params(config).items():
        linear = len(shape) == 2 and shape[1] > 1 and name.endswith("weight")
        scale = shape[1] ** -0.5 if linear else 0.5
        params[name] = (scale * torch.randn(shape, generator=generator)).double()  # drawn as float32, which files hold
    return params


def write_model(path, config, params):
    """A checkpoint, float32."""
    tensors = {name: value.float() for name, value in params.items()}
    if config.share_emb:
        tensors["output.output.weight"] = tensors["embed.weight"]
    write_safetensors(path, tensors, {"config": json.dumps(vars(config))})


def run(*command):
    result = subprocess.run(command, capture_output=True, timeout=300)
    if result.returncode != 0:
        raise RuntimeError(f"{command[0]} exited with {result.returncode}: {result.stderr.decode().strip()}")
    return result.stdout


def differences(got, want, unused=()):
    """{name: relative L2 error}; infinite if the tensor is missing, has another shape, or the reference is all zero.
    Gradients of `unused` parameters must be zero."""
    found = {}
    for name in sorted(set(got) | set(want)):
        a, b = got.get(name), want.get(name)
        if name.startswith("grad.") and any(part in name for part in unused):
            found[name] = torch.inf if a is None or b is None or a.shape != b.shape or a.any() or b.any() else 0.0
        elif a is None or b is None or a.shape != b.shape or a.dtype != b.dtype or not b.any():
            found[name] = torch.inf
        elif name.startswith("input."):
            found[name] = 0.0 if torch.equal(a, b) else torch.inf
        else:
            found[name] = ((a - b).norm() / b.norm()).item()
    return found


class Checks:
    """Counts and prints."""

    def __init__(self):
        self.passed = self.failed = 0

    def verdict(self, ok, line):
        self.passed, self.failed = self.passed + ok, self.failed + (not ok)
        print(f"{'ok  ' if ok else 'FAIL'} {line}", flush=True)

    def compare(self, name, got, want, unused=()):
        found = differences(got, want, unused)
        worst = {}
        for kind in ("act.", "grad."):
            of_kind = {n: d if d == d else torch.inf for n, d in found.items() if n.startswith(kind)}
            worst[kind] = max(of_kind, key=of_kind.get)
        failed = [n for n, d in found.items() if not d <= TOLERANCE]  # NaN fails
        line = f"{name}: {len(found)} tensors, " + ", ".join(f"{n} {found[n]:.1e}" for n in worst.values())
        self.verdict(not failed, line + (f"; {len(failed)} over {TOLERANCE:.0e}: {failed[:3]}" if failed else ""))


def check_batches(checks, train, folder, generator):
    init, data, out = (os.path.join(folder, name + ".safetensors") for name in ("init", "batch", "dump"))
    for name, (B, L, fields) in CASES.items():
        config = config_of(fields)
        params = random_params(config, generator)
        batch = {f"input.{part}": torch.randint(config.vocab_size, (B, L), generator=generator, dtype=torch.int32)
                 for part in ("tokens", "targets")}
        batch["input.targets"][:, L // 2] = -1  # a position that is not counted
        write_model(init, config, params)
        write_safetensors(data, batch)
        run(train, "--init", init, "--batch", data, "--steps", "1", "--dump", out)
        got = megalodon.read_safetensors(out)[1]
        for kind, cema in CEMA.items():
            want = megalodon.dump(config, params, batch, megalodon.State(config, B, torch.float64), cema)
            checks.compare(f"{name}, {kind}", got, want, UNUSED.get(fields.get("cema"), ()))


def check_state(checks, train, folder, generator):
    """Three steps with a learning rate of zero, so that the parameters stay. Step 3 continues from steps 1 and 2."""
    init, text = os.path.join(folder, "init.safetensors"), os.path.join(folder, "text")
    config = config_of(BYTES)
    params, rows, length, dumps = random_params(config, generator), 2, 16, []
    write_model(init, config, params)
    with open(text, "wb") as file:
        file.write(bytes(torch.randint(256, (1000,), generator=generator).tolist()))
    for step in (1, 2, 3):
        out = os.path.join(folder, f"step-{step}.safetensors")
        run(train, "--init", init, "--data", text, "--carry-state", "--batch-size", str(rows), "--seq-len", str(length),
            "--steps", str(step), "--lr", "0", "--val-every", "0", "--dump", out)
        dumps.append(megalodon.read_safetensors(out)[1])
    for kind, cema in CEMA.items():
        state = megalodon.State(config, rows, torch.float64)
        for step in (0, 1):
            with torch.no_grad():
                megalodon.megalodon_forward(config, params, dumps[step]["input.tokens"].long(), state, {}, cema)
        batch = {name: value for name, value in dumps[2].items() if name.startswith("input.")}
        want = megalodon.dump(config, params, batch, state, cema)
        checks.compare(f"a state carried over two steps, {kind}", dumps[2], want)


def check_sample(checks, sample, folder, generator):
    init = os.path.join(folder, "init.safetensors")
    config = config_of(BYTES)
    write_model(init, config, random_params(config, generator))
    config, params = megalodon.read_model(init, torch.float64)
    for prompt in ("A", "a whole chunk of", "The prompt ends inside the fifth chunk"):
        want = run(sample, "--model", init, "--temperature", "0", "--num-tokens", "100", "--prompt", prompt)
        got = bytes(megalodon.generate(config, params, prompt.encode(), 100))
        checks.verdict(got == want, f"./sample writes the same text after a prompt of {len(prompt)} bytes: "
                                    f"{len(want)} bytes, {len(set(want))} different ones")


# Forward functions of megalodon.c without a counterpart: two layers at once, and what states and ranks need.
ONLY_IN_C = {"linear_silu_forward", "begin_forward", "layers_forward"}


def check_names(checks):
    """dev/megalodon.py is read beside megalodon.c, so it has the same functions in the same order."""
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "megalodon.c")) as file:
        in_c = [name for name in re.findall(r"^(?:static )?void (\w+_forward)\(", file.read(), re.MULTILINE)
                if name not in ONLY_IN_C]
    with open(megalodon.__file__) as file:
        in_python = re.findall(r"^def (\w+_forward)\(", file.read(), re.MULTILINE)
    only = sorted(set(in_c) ^ set(in_python))
    checks.verdict(in_c == in_python, f"dev/megalodon.py has the {len(in_c)} forward functions of megalodon.c, in order"
                                      + (f"; only one of them has {only}" if only else ""))


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--train", default="build/double/train", help="program to check (default: %(default)s)")
    parser.add_argument("--sample", default="build/double/sample", help="program to check (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of parameters and batches (default: %(default)s)")
    args = parser.parse_args()
    checks, generator = Checks(), torch.Generator().manual_seed(args.seed)
    check_names(checks)
    with tempfile.TemporaryDirectory() as folder:
        for check, program in ((check_batches, args.train), (check_state, args.train), (check_sample, args.sample)):
            try:
                check(checks, program, folder, generator)
            except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
                checks.verdict(False, str(error))
    print(f"{checks.passed} passed, {checks.failed} failed")
    return checks.failed > 0


if __name__ == "__main__":
    sys.exit(main())
