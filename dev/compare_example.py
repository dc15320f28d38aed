"""A Transformer block of PyTorch and its port to JAX, for ./compare. dev/notes/compare.md explains the result.

    python dev/compare_example.py torch torch.safetensors
    python dev/compare_example.py jax jax.safetensors            with a mistake; --fixed: without it
    ./compare torch.safetensors jax.safetensors

The PyTorch side is torch.nn.TransformerEncoderLayer as it is. Both sides draw the same weights and inputs with numpy.
"""

import argparse

import numpy as np

from dump_torch import Dump, dump_jax

B, L, D, H, F = 2, 10, 32, 4, 64
SHAPES = {
    "self_attn.in_proj_weight": (3 * D, D), "self_attn.in_proj_bias": (3 * D,), "self_attn.out_proj.weight": (D, D),
    "self_attn.out_proj.bias": (D,), "linear1.weight": (F, D), "linear1.bias": (F,), "linear2.weight": (D, F),
    "linear2.bias": (D,), "norm1.weight": (D,), "norm1.bias": (D,), "norm2.weight": (D,), "norm2.bias": (D,)}


def numbers():
    """The weights, the input and a direction: the loss is the product of the output with it."""
    rng = np.random.default_rng(2)
    draw = lambda shape: (rng.standard_normal(shape) / np.sqrt(shape[-1] if len(shape) == 2 else 4)).astype(np.float32)
    return {name: draw(shape) for name, shape in SHAPES.items()}, draw((B, L, D)), draw((B, L, D))


def dump_of_torch(path):
    import torch

    weights, x, direction = numbers()
    block = torch.nn.TransformerEncoderLayer(D, H, F, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    block.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    dump = Dump(block)
    loss = (block(torch.from_numpy(x)) * torch.from_numpy(direction)).sum()
    loss.backward()
    # the output of a dropout is that of the attention, of the activation function, or of linear2
    names = {"dropout1": "attention", "dropout": "gelu", "dropout2": "ffn"}
    dump.write(path, loss, rename=lambda name: names.get(name, name))


def dump_of_jax(path, approximate):
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_default_matmul_precision", "highest")
    weights, x, direction = numbers()

    def layernorm(x, weight, bias):
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias

    def loss(tap, w, x, direction):
        linear = lambda name, x: x @ w[name + "weight"].T + w[name + "bias"]
        u = tap("norm1", layernorm(x, w["norm1.weight"], w["norm1.bias"]))
        q, k, v = jnp.split(linear("self_attn.in_proj_", u).reshape(B, L, 3 * H, D // H), 3, axis=2)
        p = jax.nn.softmax(jnp.einsum("bihd,bjhd->bhij", q, k) / jnp.sqrt(D // H))
        x = x + tap("attention", linear("self_attn.out_proj.", jnp.einsum("bhij,bjhd->bihd", p, v).reshape(B, L, D)))
        u = tap("norm2", layernorm(x, w["norm2.weight"], w["norm2.bias"]))
        hidden = tap("gelu", jax.nn.gelu(tap("linear1", linear("linear1.", u)), approximate=approximate))
        x = x + tap("ffn", tap("linear2", linear("linear2.", hidden)))
        return (tap("output", x) * direction).sum()

    dump_jax(path, loss, jax.tree_util.tree_map(jnp.asarray, weights), x, direction)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=["torch", "jax"])
    parser.add_argument("out", metavar="FILE")
    parser.add_argument("--fixed", action="store_true", help="the port without its mistake")
    args = parser.parse_args()
    if args.side == "torch":
        dump_of_torch(args.out)
    else:
        dump_of_jax(args.out, approximate=not args.fixed)  # jax.nn.gelu approximates by tanh unless told otherwise


if __name__ == "__main__":
    main()
