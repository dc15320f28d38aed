"""Write the tensors of any PyTorch module or JAX function to a file that ./compare reads. dev/notes/compare.md has an
example.

    dump = Dump(module)                        # before the forward pass
    loss = ...                                 # of module(inputs)
    loss.backward()
    dump.write("a.safetensors", loss)

    dump_jax("b.safetensors", function, params, *inputs)     # function(params, *inputs) returns (loss, {name: tensor})

./compare matches tensors by name, so both implementations need the same names: `rename` translates them. This file can
be copied to another project. It needs numpy, and PyTorch or JAX.
"""

import json
import struct

import numpy as np

TYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32"}


def write_safetensors(path, tensors, metadata=None):
    """Writes {name: tensor of PyTorch, JAX or numpy}. Types that numpy lacks, such as bfloat16, become float32."""
    header, data = {"__metadata__": metadata} if metadata else {}, []
    for name, value in tensors.items():
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            value = value.float() if str(value.dtype) == "torch.bfloat16" else value
        value = np.asarray(value)
        value = value if value.dtype.name in TYPES else value.astype(np.float32)
        start = sum(map(len, data))
        data.append(value.tobytes())
        header[name] = {"dtype": TYPES[value.dtype.name], "shape": value.shape, "data_offsets": [start, start + value.nbytes]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + b"".join(data))


class Dump:
    """Records the output of every submodule that returns one tensor, and the gradient of the loss w.r.t. it."""

    def __init__(self, module):
        self.module, self.acts = module, {}
        for name, part in module.named_modules():
            part.register_forward_hook(lambda part, inputs, output, name=name or "output": self.record(name, output))

    def record(self, name, output):
        if not hasattr(output, "detach"):
            return
        calls = sum(known.split("#")[0] == name for known in self.acts)  # a shared submodule is called several times
        self.acts[name + f"#{calls + 1}" * (calls > 0)] = output
        if output.requires_grad:
            output.retain_grad()

    def write(self, path, loss, rename=lambda name: name):
        """act.*, loss, then grad.* of the activations from the last to the first, then grad.* of the parameters."""
        tensors = {f"act.{rename(name)}": value for name, value in self.acts.items()} | {"loss": loss}
        grads = {f"act.{name}": value.grad for name, value in reversed(self.acts.items())}
        grads |= {name: value.grad for name, value in self.module.named_parameters()}
        tensors |= {f"grad.{rename(name)}": value for name, value in grads.items() if value is not None}
        write_safetensors(path, tensors)


def dump_jax(path, function, params, *inputs, rename=lambda name: name):
    """act.*, loss, and grad.* of params, a tree of dictionaries and lists, by their path: {"a": [x]} has a.0."""
    import jax

    (loss, acts), grads = jax.value_and_grad(function, has_aux=True)(params, *inputs)
    tensors = {f"act.{rename(name)}": value for name, value in acts.items()} | {"loss": loss}
    for path_of, value in jax.tree_util.tree_flatten_with_path(grads)[0]:
        name = ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path_of)
        tensors[f"grad.{rename(name)}"] = value
    write_safetensors(path, tensors)
