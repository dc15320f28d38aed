"""Convert a model between our checkpoints and megalodon-jax, bit for bit.

    python dev/jax_bridge.py to-jax IN.safetensors OUT.safetensors     ours to megalodon-jax's
    python dev/jax_bridge.py from-jax IN.safetensors OUT.safetensors   megalodon-jax's to ours
    python dev/jax_bridge.py check IN.safetensors                      round trip, compared bitwise

Both formats are safetensors files. Ours has the released names, and the configuration as JSON under the metadata key
`config`. The other format is the one of megalodon-jax's save_checkpoint and load_checkpoint. megalodon-jax has its own
converter for released checkpoints, but that needs PyTorch and .pth files, so this script maps the names itself.
Setup: pip install -r dev/requirements-jax.txt
"""

import argparse
import json
import os
import sys
import tempfile

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from megalodon_jax import MegalodonConfig, MegalodonForCausalLM, load_checkpoint, save_checkpoint
from megalodon_jax.checkpoint import apply_model_state_dict, model_state_dict
from outputs import check_output, is_safetensors
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

# The fields of our configuration and their defaults. megalodon-jax's own defaults differ for two fields.
DEFAULTS = dict(
    num_layers=8, model_dim=1024, z_dim=256, value_dim=2048, num_heads=1, ffn_hidden_dim=2048, cema_ndim=16,
    chunk_size=2048, init_mode="he", vocab_size=-1, output_size=-1, norm_num_groups=32, norm_affine=True,
    norm_eps=1e-5, rope_base=None, dropout=0.0, hidden_dropout=0.0, attention_dropout=0.0, swiglu=False,
    rescale_nffn=False, scale_emb=False, share_emb=False)
IGNORED = {"efficient_attn", "layerwise_ckpt"}

# Replacements, in this order, that turn megalodon-jax's names into the released names.
RENAMES = (("model.embed.", "embed."), ("model.norm.", "output.final_norm."), ("lm_head.", "output.output."),
           ("model.layers.", "layers."), (".attn.", ".mega."), (".ffn.", ".nffn."),
           (".rmsnorm.gamma", ".rmsnorm.weight"))


def config_from_fields(fields):
    """Our JSON fields -> MegalodonConfig, which validates the values. The model computes in float32 by default."""
    unknown = set(fields) - set(DEFAULTS) - IGNORED
    if unknown:
        raise ValueError(f"configuration has unknown fields: {sorted(unknown)}")
    return MegalodonConfig(**(DEFAULTS | {name: fields[name] for name in fields if name in DEFAULTS}))


def fields_from_config(config):
    """MegalodonConfig -> our JSON fields. Extensions of megalodon-jax to the released model raise ValueError."""
    if config.attention_window is not None:
        raise ValueError("attention_window: sliding windows are not part of the released model")
    if config.effective_output_size != config.vocab_size:
        raise ValueError(f"output_size {config.output_size} differs from vocab_size {config.vocab_size}")
    return {name: getattr(config, name) for name in DEFAULTS} | {"output_size": -1}


def released_name(name):
    for old, new in RENAMES:
        name = name.replace(old, new)
    return name


def to_released(model):
    """Model, or a gradient with the same tree -> {released name: array} of the trained tensors.

    Tied weights appear once, as embed.weight. Both sides store scales as offsets from one, linear weights as (out, in),
    gamma and beta of q and k as (2, Z). Only gamma and omega of CEMA have another layout.
    """
    native = {name: np.asarray(value) for name, value in model_state_dict(model).items()}
    tensors = {}
    for name, value in native.items():
        if name.endswith(".gamma_imag"):
            continue
        if name.endswith(".gamma_real"):  # two (D,N) -> (D,N,2)
            value = np.stack([value, native[name.replace("_real", "_imag")]], axis=-1)
            name = name.removesuffix("_real")
        elif name.endswith(".cema.omega"):  # (D) -> (D,1)
            value = value[:, None]
        tensors[released_name(name)] = value
    return tensors


def blank_model(config):
    """A model whose tensors are only shapes.

    With scale_emb the constructor calls float() on a computed square root, which jax cannot trace. Then the initial
    values are computed, although they are not used.
    """
    key = jax.random.key(0)
    if config.scale_emb:
        return MegalodonForCausalLM(config, key=key)
    return eqx.filter_eval_shape(MegalodonForCausalLM, config, key=key)


def from_released(config, tensors):
    """{released name: array} of exactly the trained tensors -> model."""
    blank = blank_model(config)
    native, used = {}, set()
    for name, want in model_state_dict(blank).items():
        source, part, shape = released_name(name), ..., want.shape
        if name.endswith((".gamma_real", ".gamma_imag")):
            source, part, shape = source[:-5], (..., int(name.endswith("imag"))), (*shape, 2)
        elif name.endswith(".cema.omega"):
            part, shape = (..., 0), (*shape, 1)
        if source not in tensors:
            raise ValueError(f"tensor {source} is missing")
        if tensors[source].shape != shape:
            raise ValueError(f"tensor {source} has shape {tensors[source].shape}, expected {shape}")
        native[name] = jnp.asarray(tensors[source][part], dtype=want.dtype)
        used.add(source)
    if set(tensors) != used:
        raise ValueError(f"tensors that are not in the configuration: {sorted(set(tensors) - used)}")
    return apply_model_state_dict(blank, native)[0]


def derived_tensors(config, tensors):
    """The tensors of a checkpoint that are not trained. They follow from the configuration and the trained tensors."""
    half = config.head_dim // 2
    freqs = config.effective_rope_base ** -(np.arange(half) / half)
    derived = {"rope.freqs": freqs.astype(np.float32)}
    for norm in [f"layers.{i}.mega.timenorm" for i in range(config.num_layers)] + ["output.final_norm"]:
        derived[norm + ".prior_count"] = np.zeros((), np.int64)
        derived[norm + ".prior_mean"] = np.zeros(config.norm_num_groups, np.float32)
        derived[norm + ".prior_logv"] = np.zeros(config.norm_num_groups, np.float32)
    if config.share_emb:
        derived["output.output.weight"] = tensors["embed.weight"]
    return derived


def read_checkpoint(path):
    """Our file, float32 or bfloat16 -> (config, trained tensors as float32). Checks the derived tensors."""
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if "config" not in metadata or "embed.weight" not in tensors:
        raise ValueError("no metadata key `config` or no embed.weight; is this a megalodon-jax file?")
    config = config_from_fields(json.loads(metadata["config"]))
    tolerance = 2e-6 if tensors["embed.weight"].dtype == np.float32 else 2**-8  # of rope.freqs
    tensors = {name: value.astype(np.float32) for name, value in tensors.items()}
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise ValueError(f"tensor {name} has values that are not finite")
    for name, want in derived_tensors(config, tensors).items():
        value = tensors.pop(name, want)
        rtol = tolerance if name == "rope.freqs" else 0.0
        if value.shape != want.shape or not np.allclose(value, want, rtol=rtol, atol=0.0):
            raise ValueError(f"tensor {name} does not have the value that the configuration implies")
    return config, tensors


def write_checkpoint(path, config, tensors):
    """Writes our file format, float32."""
    tensors = {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in tensors.items()}
    metadata = {"config": json.dumps(fields_from_config(config))}
    save_file(tensors | derived_tensors(config, tensors), path, metadata=metadata)


def to_jax(source, target):
    save_checkpoint(from_released(*read_checkpoint(source)), target)


def from_jax(source, target):
    model = load_checkpoint(source, key=jax.random.key(0))
    write_checkpoint(target, model.config, to_released(model))


def check(source):
    """Raises ValueError unless every trained tensor has the same bits after the round trip."""
    with tempfile.TemporaryDirectory() as folder:
        there, back = os.path.join(folder, "jax.safetensors"), os.path.join(folder, "back.safetensors")
        to_jax(source, there)
        from_jax(there, back)
        (config, before), (config_back, after) = read_checkpoint(source), read_checkpoint(back)
    changed = [name for name in before if before[name].tobytes() != after[name].tobytes()]
    if config != config_back or set(before) != set(after) or changed:
        raise ValueError(f"the round trip changed {changed or 'the configuration'}")
    parameters = sum(value.size for value in before.values())
    print(f"{source}: {len(before)} tensors, {parameters} parameters, same bits after the round trip")


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("command", choices=["to-jax", "from-jax", "check"])
    parser.add_argument("files", nargs="+", metavar="FILE")
    args = parser.parse_args()
    if len(args.files) != (1 if args.command == "check" else 2):
        parser.error("check takes one file, to-jax and from-jax take IN and OUT")
    if args.command != "check":
        check_output(args.files[1], args.files[:1], "a safetensors file", is_safetensors)
    jax.config.update("jax_platforms", "cpu")
    try:
        {"to-jax": to_jax, "from-jax": from_jax, "check": check}[args.command](*args.files)
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"{args.files[0]}: {error}")


if __name__ == "__main__":
    main()
