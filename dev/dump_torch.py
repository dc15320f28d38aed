"""Write the tensors of any PyTorch module or JAX function to a file that ./compare reads: activations, the gradients
with respect to them, and the gradients of the parameters. dev/notes/compare.md has an example.

    dump = Dump(module)                                      # before the forward pass
    loss = ...                                               # of module(inputs)
    loss.backward()
    dump.write("a.safetensors", loss)

    dump_jax("b.safetensors", function, params, *inputs)     # the loss is function(tap, params, *inputs), where
                                                             # y = tap("name", y) marks an activation
./compare matches tensors by name: `rename` translates those of one implementation. This file can be copied to another
project. It needs numpy, and PyTorch or JAX.
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
        offsets = [sum(map(len, data)), sum(map(len, data)) + value.nbytes]
        data.append(value.tobytes())
        header[name] = {"dtype": TYPES[value.dtype.name], "shape": value.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + b"".join(data))


class Dump:
    """Records every output of a submodule that is one tensor."""

    def __init__(self, module):
        self.module, self.acts = module, {}
        for name, part in module.named_modules():
            part.register_forward_hook(lambda part, inputs, output, name=name or "output": self.record(name, output))

    def record(self, name, output):
        if not hasattr(output, "detach"):
            return
        calls = sum(known.split("#")[0] == name for known in self.acts)  # a shared submodule is called several times
        self.acts[name + f"#{calls + 1}" * (calls > 0)] = output, output.detach().clone()  # it may change in place
        if output.requires_grad:
            output.retain_grad()

    def write(self, path, loss, rename=lambda name: name):
        acts = {rename(name): value for name, (_, value) in self.acts.items()}
        of_acts = {rename(name): output.grad for name, (output, _) in self.acts.items()}
        grads = {rename(name): value.grad for name, value in self.module.named_parameters()}
        write_dump(path, acts, loss, of_acts, grads)


def dump_jax(path, function, params, *inputs, rename=lambda name: name):
    """params: a tree of dictionaries and lists; {"a": [x]} has the parameter a.0."""
    import jax

    acts = {}
    loss = function(lambda name, value: acts.setdefault(rename(name), value), params, *inputs)
    zeros = {name: jax.numpy.zeros_like(value) for name, value in acts.items()}  # the gradient w.r.t. a zero that is
    add = lambda zeros: lambda name, value: value + zeros[rename(name)]          # added to y is that w.r.t. y
    of_acts, of_params = jax.grad(lambda z, p: function(add(z), p, *inputs), argnums=(0, 1))(zeros, params)
    grads = {}
    for keys, value in jax.tree_util.tree_flatten_with_path(of_params)[0]:
        grads[rename(".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys))] = value
    write_dump(path, acts, loss, of_acts, grads)


def write_dump(path, acts, loss, act_grads, grads):
    """Gradients of activations come from the last to the first, as the backward pass computes them."""
    tensors = {f"act.{name}": value for name, value in acts.items()} | {"loss": loss}
    tensors |= {f"grad.act.{name}": act_grads[name] for name in reversed(acts) if act_grads[name] is not None}
    tensors |= {f"grad.{name}": value for name, value in grads.items() if value is not None}
    write_safetensors(path, tensors)
