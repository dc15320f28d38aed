"""Make the test fixtures tests/data/jax_*.safetensors with megalodon-jax, an independent implementation.

    pip install -r dev/requirements-jax.txt       megalodon-jax 0.2.2, jax 0.10.2, equinox 0.13.8
    python dev/make_jax_fixtures.py               all fixtures; with names, only those
    python dev/make_jax_fixtures.py --double DIR  .expect files in float64, from the .init files, into DIR

For each configuration X, jax_X.init.safetensors is a checkpoint. All its parameters differ from their usual initial
values. jax_X.expect.safetensors holds:

    input.tokens, input.targets   int32 (B,L), random; a target is not the next token
    act.logits, loss              the loss is the mean cross-entropy over all positions
    grad.<parameter>              gradient of that loss, unclipped; tied weights once, under embed.weight
    train.losses, .grad_norms     five AdamW steps on this batch, each value before its update

Everything is computed in float32 on the CPU with fixed seeds. Another CPU may round the last bits differently. --double
shows the size of rounding errors: relative to float64, the float32 logits have a relative L2 error of 6e-7, the
gradients of 4e-6, the training losses and norms of 2e-7.
"""

import argparse
import importlib.metadata
import os
import re
import sys

import jax
import jax.numpy as jnp

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_default_matmul_precision", "highest")
if "--double" in sys.argv:
    # megalodon-jax casts to jnp.float32 everywhere. Redefining the name before its import makes it compute in double.
    jax.config.update("jax_enable_x64", True)
    jnp.float32, jnp.complex64 = jnp.float64, jnp.complex128

import equinox as eqx
import numpy as np
from megalodon_jax import MegalodonForCausalLM
from safetensors.numpy import save_file

from jax_bridge import config_from_fields, from_released, read_checkpoint, to_released, write_checkpoint

DEV = os.path.dirname(os.path.abspath(__file__))
DATA = os.path.join(os.path.dirname(DEV), "tests", "data")

# name: (B, L, configuration). Many sizes are odd, so that a wrong stride or tail is detected. No norm is over only two
# features: where both are nearly equal, or nearly zero, rounding would exceed the tolerance.
FIXTURES = {
    "plain": (3, 48, dict(num_layers=2, model_dim=24, num_heads=1, z_dim=8, value_dim=32, ffn_hidden_dim=28,
                          vocab_size=41, cema_ndim=16, chunk_size=16, norm_num_groups=4)),
    "short": (2, 20, dict(num_layers=2, model_dim=25, num_heads=2, z_dim=12, value_dim=34, ffn_hidden_dim=28,
                          vocab_size=53, cema_ndim=4, chunk_size=64, norm_num_groups=5, swiglu=True)),
    "equal": (1, 32, dict(num_layers=2, model_dim=24, num_heads=3, z_dim=18, value_dim=36, ffn_hidden_dim=28,
                          vocab_size=96, cema_ndim=1, chunk_size=32, norm_num_groups=8, share_emb=True)),
    "ragged": (2, 50, dict(num_layers=2, model_dim=28, num_heads=2, z_dim=8, value_dim=26, ffn_hidden_dim=22,
                           vocab_size=47, cema_ndim=4, chunk_size=16, norm_num_groups=7, swiglu=True,
                           rescale_nffn=True, rope_base=500.0)),
    "noaffine": (3, 31, dict(num_layers=2, model_dim=27, num_heads=1, z_dim=6, value_dim=31, ffn_hidden_dim=9,
                             vocab_size=40, cema_ndim=8, chunk_size=8, norm_num_groups=1, norm_affine=False)),
    "tied": (1, 37, dict(num_layers=2, model_dim=27, num_heads=3, z_dim=12, value_dim=39, ffn_hidden_dim=23,
                         vocab_size=61, cema_ndim=3, chunk_size=9, norm_num_groups=9, swiglu=True,
                         scale_emb=True, share_emb=True, rope_base=100000.0)),
    "deep": (1, 45, dict(num_layers=4, model_dim=16, num_heads=2, z_dim=12, value_dim=22, ffn_hidden_dim=18,
                         vocab_size=44, cema_ndim=2, chunk_size=7, norm_num_groups=2, norm_eps=1e-3,
                         rescale_nffn=True, scale_emb=True)),
    "wide": (2, 33, dict(num_layers=1, model_dim=48, num_heads=3, z_dim=24, value_dim=54, ffn_hidden_dim=30,
                         vocab_size=50, cema_ndim=16, chunk_size=20, norm_num_groups=16, swiglu=True)),
}


def require_version():
    """Exits unless the pinned version of megalodon-jax is installed, because it defines the fixtures."""
    with open(os.path.join(DEV, "requirements-jax.txt")) as file:
        pinned = re.search(r"^megalodon-jax==(\S+)", file.read(), re.MULTILINE)[1]
    installed = importlib.metadata.version("megalodon-jax")
    if installed != pinned:
        sys.exit(f"error: megalodon-jax {installed} is installed, {pinned} is needed: "
                 "pip install -r dev/requirements-jax.txt")


def random_tensors(config, seed):
    """megalodon-jax's initial values plus noise, so that no bias, offset or imaginary part is zero."""
    noise = np.random.default_rng(seed)
    tensors = to_released(MegalodonForCausalLM(config, key=jax.random.key(seed)))
    for name, value in tensors.items():
        scale = np.float32(0.5 if ".cema." in name else 0.1)
        tensors[name] = value + scale * noise.standard_normal(value.shape, dtype=np.float32)
    return tensors


def random_batch(config, batch, length, seed):
    """Random tokens and targets, under the names of a dump."""
    rows = np.random.default_rng(seed).integers(config.vocab_size, size=(2, batch, length), dtype=np.int32)
    return {"input.tokens": rows[0], "input.targets": rows[1]}


@eqx.filter_jit
@eqx.filter_value_and_grad(has_aux=True)
def loss_and_logits(model, tokens, targets):
    """Mean cross-entropy over all positions. megalodon-jax's compute_loss is not used, since it shifts the targets."""
    logits, _ = model(tokens)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
    return -picked.mean(), logits


def reference(config, tensors, batch):
    """Logits, loss and gradients of megalodon-jax for one batch, under the names of a dump."""
    model = from_released(config, tensors)
    (loss, logits), gradient = loss_and_logits(model, batch["input.tokens"], batch["input.targets"])
    gradients = {"grad." + name: value for name, value in to_released(gradient).items()}
    return batch | {"act.logits": np.asarray(logits), "loss": np.asarray(loss).reshape(1)} | gradients


def train(config, tensors, batch, steps=5, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, decay=0.1, clip=1.0):
    """AdamW steps on one batch, every parameter decays -> losses and gradient norms before each update."""
    tensors = dict(tensors)
    moment1, moment2 = dict.fromkeys(tensors, 0.0), dict.fromkeys(tensors, 0.0)
    losses, norms = [], []
    for k in range(1, steps + 1):
        result = reference(config, tensors, batch)
        gradients = {name: result["grad." + name] for name in tensors}
        norm = np.sqrt(sum(np.square(g).sum() for g in gradients.values()))
        losses.append(result["loss"][0])
        norms.append(norm)
        for name, g in gradients.items():
            g = g * min(1.0, clip / (norm + 1e-6))
            moment1[name] = beta1 * moment1[name] + (1 - beta1) * g
            moment2[name] = beta2 * moment2[name] + (1 - beta2) * g * g
            update = moment1[name] / (1 - beta1**k) / (np.sqrt(moment2[name] / (1 - beta2**k)) + eps)
            tensors[name] = tensors[name] * (1 - lr * decay) - lr * update
    return {"train.losses": np.array(losses), "train.grad_norms": np.array(norms)}


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FIXTURES))
    parser.add_argument("--double", metavar="DIR", help="compute in float64 and write .expect files to DIR")
    args = parser.parse_args()
    if set(args.names) - set(FIXTURES):
        parser.error(f"the fixtures are {', '.join(FIXTURES)}")
    require_version()
    os.makedirs(args.double or DATA, exist_ok=True)
    for seed, (name, (rows, length, fields)) in enumerate(FIXTURES.items()):
        if args.names and name not in args.names:
            continue
        init = os.path.join(DATA, f"jax_{name}.init.safetensors")
        expect = os.path.join(args.double or DATA, f"jax_{name}.expect.safetensors")
        if not args.double:
            config = config_from_fields(fields)
            write_checkpoint(init, config, random_tensors(config, seed))
        config, tensors = read_checkpoint(init)
        batch = random_batch(config, rows, length, seed)
        result = reference(config, tensors, batch) | train(config, tensors, batch)
        save_file(result, expect)
        norms = " ".join(f"{norm:.4f}" for norm in result["train.grad_norms"])
        print(f"{expect}: loss {result['loss'][0]:.6f}, gradient norms {norms}", flush=True)


if __name__ == "__main__":
    main()
