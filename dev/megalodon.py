"""The Megalodon language model in PyTorch, to be read beside megalodon.c: the same functions in the same order.

    python dev/megalodon.py MODEL --prompt "The " --num-tokens 100     the text of ./sample --temperature 0
    python dev/megalodon.py MODEL --batch BATCH --dump OUT             the tensors of ./train --batch BATCH --dump OUT

MODEL is a model file, a folder with model.safetensors (and config.json, if the file has no configuration), or a run's
directory: its newest checkpoint. There are forward passes only. Autograd computes the gradients, which makes them an
independent check of the backward passes of megalodon.c: dev/check_torch.py compares all of them. megalodon.h has the
formulas and the letters, and megalodon.c explains each layer. It has plain loops and no dropout, and tokens are bytes
when it generates text. Needs PyTorch 1.13 or later.
"""

import argparse
import glob
import json
import math
import os
import struct
import sys
from types import SimpleNamespace

import torch

from dump_torch import write_safetensors
from outputs import check_output, is_safetensors

DEFAULTS = dict(
    num_layers=8, model_dim=1024, z_dim=256, value_dim=2048, num_heads=1, ffn_hidden_dim=2048, cema_ndim=16,
    chunk_size=2048, init_mode="he", vocab_size=-1, output_size=-1, norm_num_groups=32, norm_affine=True, norm_eps=1e-5,
    rope_base=None, dropout=0.0, hidden_dropout=0.0, attention_dropout=0.0, swiglu=False, rescale_nffn=False,
    scale_emb=False, share_emb=False, efficient_attn=None, layerwise_ckpt=False,
    cema="complex", timestep_norm="timestep", attention="normalized", two_hop="on")  # other choices: see megalodon.h
COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def megalodon_params(config):
    """{name: shape} of all parameters: the parameter table of megalodon.h."""
    D, N, Z, E, F, V = (getattr(config, name) for name in
                        ("model_dim", "cema_ndim", "z_dim", "value_dim", "ffn_hidden_dim", "vocab_size"))
    table = {"embed.weight": (V, D)}
    for layer in range(config.num_layers):
        rows = {"mega.gamma": (2, Z), "mega.beta": (2, Z), "mega.timenorm.weight": (D,), "mega.timenorm.bias": (D,),
                "mega.cema.alpha": (D, N, 1), "mega.cema.delta": (D, N, 1), "mega.cema.theta": (D, 1, 1),
                "mega.cema.gamma": (D, N, 2), "mega.cema.omega": (D, 1)}
        rows |= {"mega.rmsnorm.weight": (D,)} if config.norm_affine else {}
        rows |= {"mega.wv.weight": (E, D), "mega.wv.bias": (E,), "mega.wz.weight": (Z, D), "mega.wz.bias": (Z,),
                 "mega.wr.weight": (E, D), "mega.wr.bias": (E,), "mega.wh1.weight": (D, D), "mega.wh1.bias": (D,),
                 "mega.wh2.weight": (D, E)}
        rows |= {"nffn.alpha": (D,)} if config.rescale_nffn else {}
        rows |= {"nffn.norm.weight": (D,), "nffn.norm.bias": (D,)} if config.norm_affine else {}
        rows |= {"nffn.fc1.weight": (F, D), "nffn.fc2.weight": (D, F)}
        rows |= {"nffn.fc3.weight": (F, D)} if config.swiglu else {}
        table |= {f"layers.{layer}.{name}": shape for name, shape in rows.items()}
    table |= {"output.final_norm.weight": (D,), "output.final_norm.bias": (D,)}
    return table if config.share_emb else table | {"output.output.weight": (V, D)}


class State:
    """All that a model remembers of the `count` tokens it has read, as in megalodon.h; all rows have read as many."""

    def __init__(self, config, B, dtype):
        G, layers = config.norm_num_groups, config.num_layers
        self.count = 0
        self.norm = [(torch.zeros(B, G).double(), torch.zeros(B, G).double()) for _ in range(layers + 1)]  # mean, M2
        self.h = [torch.zeros(B, config.model_dim, config.cema_ndim).to(COMPLEX[dtype]) for _ in range(layers)]
        self.kv = [(torch.zeros(B, 0, config.z_dim).to(dtype), torch.zeros(B, 0, config.value_dim).to(dtype))
                   for _ in range(layers)]  # rotated keys, and values, of the unfinished chunk


# ----------------------------------------------------------------------------
# layers


def embedding_forward(tokens, embed, scale):
    return scale * embed[tokens]


def timestep_norm_forward(inp, weight, bias, state, count, G, eps):
    """inp (B,L,D). Group norm with the moments of all scalars up to and including token t: Chan's update, in double."""
    B, L, D = inp.shape
    g = D // G
    mean, m2 = state
    out = []
    for t in range(L):
        x = inp[:, t].reshape(B, G, g).double()
        n = (count + t + 1) * g
        if n == g:
            mean = x[..., 0]  # before the first token any value serves as mean
        s1 = (x - mean[..., None]).sum(-1)
        s2 = ((x - mean[..., None]) ** 2).sum(-1)
        mean = mean + s1 / n
        m2 = m2 + s2 - s1 * s1 / n
        rstd = 1 / torch.sqrt(m2 / n + eps)
        y = ((x - mean[..., None]) * rstd[..., None]).to(inp.dtype)
        out.append(y.reshape(B, D) * (weight + 1) + bias)
    return torch.stack(out, 1), (mean, m2)


def cema_coeffs_forward(alpha, delta, theta, gamma, kind):
    """p (D,N), q and g (D,N) complex. kind real: no phases, so that only gamma's real part counts."""
    N = alpha.shape[1]
    a, b = torch.sigmoid(alpha[..., 0]), torch.sigmoid(delta[..., 0])
    n = torch.arange(1, N + 1, dtype=alpha.dtype)
    phi = torch.sigmoid(theta[..., 0]) * 2 * math.pi * n / N
    if kind == "real":
        phi = torch.zeros_like(phi)
    return a, torch.polar(1 - a * b, phi), torch.view_as_complex(gamma.contiguous()) / math.sqrt(N)


def cema_forward(inp, coeffs, omega, h):
    """The recurrence. inp (B,L,D), h (B,D,N) complex."""
    p, q, g = coeffs
    out = []
    for t in range(inp.shape[1]):
        x = inp[:, t]
        h = q * h + p * x[..., None]
        out.append((g * h).real.sum(-1) + omega[:, 0] * x)
    return torch.stack(out, 1), h


def cema_convolution(inp, coeffs, omega, h):
    """The same, as a convolution with k_j = Re sum_n g p q^j by FFT, plus what is left of h after j + 1 tokens."""
    p, q, g = coeffs
    L = inp.shape[1]
    j = torch.arange(L + 1, dtype=inp.dtype)
    powers = torch.polar(q.abs()[..., None] ** j, q.angle()[..., None] * j)  # (D,N,L+1) q^j
    kernel = torch.einsum("dn,dnj->dj", p * g, powers[..., :L]).real
    x = inp.transpose(1, 2)  # (B,D,L), padded to 2 L so that the convolution does not wrap around
    y = torch.fft.irfft(torch.fft.rfft(kernel, n=2 * L) * torch.fft.rfft(x, n=2 * L), n=2 * L)[..., :L]
    y = y + torch.einsum("bdn,dnj->bdj", g * h, powers[..., 1:]).real + omega * x
    h = powers[..., L] * h + p * torch.einsum("dnj,bdj->bdn", powers[..., :L].flip(-1), x.to(q.dtype))
    return y.transpose(1, 2), h


def rmsnorm_forward(inp, weight, eps):
    n = inp / torch.sqrt((inp * inp).mean(-1, keepdim=True) + eps)
    return n if weight is None else n * (weight + 1)


def linear_forward(inp, weight, bias=None):
    return inp @ weight.T if bias is None else inp @ weight.T + bias


def qk_forward(zn, gamma, beta, dz):
    scale = 1 / math.sqrt(dz)
    return zn * (gamma[0] + 1) * scale + beta[0], zn * (gamma[1] + 1) * scale + beta[1]


def rope_table(C, dz, base, dtype):
    """(C,dz/2) complex: the rotations of all positions in a chunk."""
    angle = torch.arange(C).double()[:, None] * base ** (-2.0 * torch.arange(dz // 2).double() / dz)
    return torch.polar(torch.ones_like(angle), angle).to(COMPLEX[dtype])


def rope_forward(inp, table, count, H):
    """Rotates the pairs (2j, 2j+1) of each head; positions count from the start of the chunk."""
    B, L, Z = inp.shape
    pairs = torch.view_as_complex(inp.reshape(B, L, H, -1, 2).contiguous())
    positions = (count + torch.arange(L)) % len(table)
    return torch.view_as_real(pairs * table[positions][:, None]).reshape(B, L, Z)


def qk_layer_forward(z, gamma, beta, H, eps, kind):
    """RMSNorm of each head of z, then q and k, before the rotation. kind standard: no norm."""
    B, L, Z = z.shape
    if kind == "standard":
        return qk_forward(z, gamma, beta, math.sqrt(Z // H))
    zn = rmsnorm_forward(z.reshape(B, L, H, -1), None, eps).reshape(B, L, Z)
    return qk_forward(zn, gamma, beta, Z // H)


def silu_forward(inp):
    return inp * torch.sigmoid(inp)


def gate_forward(a, b):
    return a * silu_forward(b)


def attention_chunk_forward(q, k, v, H):
    """All heads of one chunk. q (B,nq,Z) are the last nq of the nk positions of k (B,nk,Z) and v (B,nk,E)."""
    B, nq, nk = q.shape[0], q.shape[1], k.shape[1]
    scores = torch.einsum("bihd,bjhd->bhij", q.reshape(B, nq, H, -1), k.reshape(B, nk, H, -1))
    later = torch.ones(nq, nk, dtype=torch.bool).triu(nk - nq + 1)
    probabilities = torch.softmax(scores.masked_fill(later, -math.inf), -1)
    return torch.einsum("bhij,bjhd->bihd", probabilities, v.reshape(B, nk, H, -1)).reshape(B, nq, -1)


def attention_forward(q, k, v, cache, C, H):
    """All chunks. cache: rotated keys, and values, of the chunk that the tokens before these have begun."""
    past = cache[0].shape[1]
    k, v = torch.cat([cache[0], k], 1), torch.cat([cache[1], v], 1)
    total = k.shape[1]
    out = []
    for start in range(0, total, C):
        end, first = min(start + C, total), max(start, past)  # first: the chunk's first query
        out.append(attention_chunk_forward(q[:, first - past:end - past], k[:, start:end], v[:, start:end], H))
    begun = total - total % C
    return torch.cat(out, 1), (k[:, begun:], v[:, begun:])


def layernorm_forward(inp, weight, bias, eps):
    centered = inp - inp.mean(-1, keepdim=True)
    n = centered / torch.sqrt((centered * centered).mean(-1, keepdim=True) + eps)
    return n if weight is None else n * (weight + 1) + bias


def rescale_forward(inp, alpha):
    return alpha * inp


def output_loss(x, output, targets):
    """logits (B,L,V) and the mean cross-entropy over the positions whose target is not negative."""
    logits = linear_forward(x, output)
    losses = torch.logsumexp(logits, -1) - logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return logits, losses[targets >= 0].mean()


def timestep_norm_layer_forward(config, x, weight, bias, state, index):
    """TimestepNorm number `index`, or LayerNorm in its place, which has no state."""
    if config.timestep_norm == "layer":
        return layernorm_forward(x, weight, bias, config.norm_eps)
    y, state.norm[index] = timestep_norm_forward(x, weight, bias, state.norm[index], state.count,
                                                 config.norm_num_groups, config.norm_eps)
    return y


def cema_layer_forward(config, w, xt, state, layer, cema):
    if config.cema == "none":
        return xt
    parameters = (w["mega.cema." + name] for name in ("alpha", "delta", "theta", "gamma"))
    coeffs = cema_coeffs_forward(*parameters, config.cema)
    ema, state.h[layer] = cema(xt, coeffs, w["mega.cema.omega"], state.h[layer])
    return ema


# ----------------------------------------------------------------------------
# blocks and model; w: {name: parameter} of the layer, acts: gets the activations of a dump


def mega_forward(config, w, x, layer, state, acts, cema):
    c, eps, H = config, config.norm_eps, config.num_heads
    # xt = TimestepNorm(x),    v = silu(xt Wv' + bv),    mx = RMSNorm(CEMA(xt))
    xt = timestep_norm_layer_forward(c, x, w["mega.timenorm.weight"], w["mega.timenorm.bias"], state, layer)
    v = silu_forward(linear_forward(xt, w["mega.wv.weight"], w["mega.wv.bias"]))
    ema = cema_layer_forward(c, w, xt, state, layer, cema)
    mx = rmsnorm_forward(ema, w.get("mega.rmsnorm.weight"), eps)
    # z = mx Wz' + bz,    q, k: RMSNorm of each head of z, an affine map, a rotation
    z = linear_forward(mx, w["mega.wz.weight"], w["mega.wz.bias"])
    q, k = qk_layer_forward(z, w["mega.gamma"], w["mega.beta"], H, eps, c.attention)
    table = rope_table(c.chunk_size, c.z_dim // H, c.rope_base or 10000.0, x.dtype)
    q_rotated, k_rotated = (rope_forward(inp, table, state.count, H) for inp in (q, k))
    # o = attention(q, k, v)
    o, state.kv[layer] = attention_forward(q_rotated, k_rotated, v, state.kv[layer], c.chunk_size, H)
    # y = (mx Wh1' + bh1) + (o * r) Wh2' + x,    r = silu(mx Wr' + br)
    r_pre = linear_forward(mx, w["mega.wr.weight"], w["mega.wr.bias"])
    gated = gate_forward(o, r_pre)
    y = linear_forward(mx, w["mega.wh1.weight"], w["mega.wh1.bias"]) + linear_forward(gated, w["mega.wh2.weight"]) + x
    acts |= {"mega.timenorm": xt, "mega.cema": ema, "mega.rmsnorm": mx, "mega.q": q, "mega.k": k, "mega.v": v,
             "mega.r": silu_forward(r_pre), "mega.attn": o, "mega.out": y}
    return y


def nffn_forward(config, w, y, x, acts):
    # u = LayerNorm(y),    hidden = silu(u W1') [* (u W3')]
    u = layernorm_forward(y, w.get("nffn.norm.weight"), w.get("nffn.norm.bias"), config.norm_eps)
    f1 = linear_forward(u, w["nffn.fc1.weight"])
    hidden = gate_forward(linear_forward(u, w["nffn.fc3.weight"]), f1) if config.swiglu else silu_forward(f1)
    # out = [alpha *] hidden W2' + x
    f2 = linear_forward(hidden, w["nffn.fc2.weight"])
    out = (rescale_forward(f2, w["nffn.alpha"]) if config.rescale_nffn else f2) + x
    acts |= {"nffn.norm": u, "nffn.out": out}
    return out


def block_forward(config, w, x, layer, state, acts, cema):
    y = mega_forward(config, w, x, layer, state, acts, cema)
    return nffn_forward(config, w, y, y if config.two_hop == "off" else x, acts)


def megalodon_forward(config, params, tokens, state, acts, cema=cema_forward):
    """tokens (B,L) -> the final norm's output (B,L,D). Continues from the state and updates it."""
    x = embedding_forward(tokens, params["embed.weight"], math.sqrt(config.model_dim) if config.scale_emb else 1.0)
    for layer in range(config.num_layers):
        prefix, own = f"layers.{layer}.", {}
        w = {name[len(prefix):]: value for name, value in params.items() if name.startswith(prefix)}
        x = block_forward(config, w, x, layer, state, own, cema)
        acts |= {f"act.{prefix}{name}": value for name, value in own.items()}
    weight, bias = params["output.final_norm.weight"], params["output.final_norm.bias"]
    final = timestep_norm_layer_forward(config, x, weight, bias, state, -1)
    state.count += tokens.shape[1]
    acts["act.final_norm"] = final
    return final


def output_weight(config, params):
    return params["embed.weight" if config.share_emb else "output.output.weight"]


def dump(config, params, batch, state, cema=cema_forward):
    """The tensors of ./train --dump, in its order: inputs, activations, loss, gradients."""
    for value in params.values():
        value.requires_grad_().grad = None
    tensors = dict(batch)
    final = megalodon_forward(config, params, batch["input.tokens"].long(), state, tensors, cema)
    logits, loss = output_loss(final, output_weight(config, params), batch["input.targets"].long())
    loss.backward()
    tensors |= {"act.logits": logits, "loss": loss.reshape(1)}
    return tensors | {"grad." + name: torch.zeros_like(value) if value.grad is None else value.grad
                      for name, value in params.items()}


def generate(config, params, prompt, num_tokens):
    """Yields the prompt's tokens, then num_tokens more, each the most likely one. Tokens are bytes."""
    dtype = params["embed.weight"].dtype
    state, inputs = State(config, 1, dtype), list(prompt)
    yield from inputs
    for _ in range(num_tokens):
        with torch.no_grad():
            final = megalodon_forward(config, params, torch.tensor([inputs]), state, {})
            logits = linear_forward(final[0, -1], output_weight(config, params))
        inputs = [int(logits[:256].argmax())]
        yield inputs[0]


# ----------------------------------------------------------------------------
# files


def read_safetensors(path):
    """(metadata, {name: tensor})"""
    types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
             "I64": torch.int64, "I32": torch.int32}
    if not is_safetensors(path):
        sys.exit(f"error: {path}: is not a safetensors file")
    with open(path, "rb") as file:
        length, = struct.unpack("<Q", file.read(8))
        header, data = json.loads(file.read(length)), file.read()
    metadata, tensors = header.pop("__metadata__", {}), {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        values = torch.frombuffer(bytearray(data[begin:end]), dtype=types[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"])
    return metadata, tensors


def model_file(path):
    """The model file of a folder, which may be a run's directory: that of its newest checkpoint."""
    if not os.path.isdir(path):
        return path
    steps = sorted(glob.glob(os.path.join(path, "step-*[0-9]", "model.safetensors")))
    return steps[-1] if steps else os.path.join(path, "model.safetensors")


def read_model(path, dtype):
    """(configuration, {name: parameter}) of a model file. Other tensors follow from these, and are ignored."""
    metadata, tensors = read_safetensors(path)
    beside = os.path.join(os.path.dirname(path), "config.json")
    if "config" not in metadata and not os.path.exists(beside):
        sys.exit(f"error: {path}: has no configuration, and there is no {beside}")
    fields = json.loads(metadata["config"] if "config" in metadata else open(beside).read())
    if set(fields) - set(DEFAULTS):
        sys.exit(f"error: {path}: the configuration has unknown fields: {sorted(set(fields) - set(DEFAULTS))}")
    config = SimpleNamespace(**(DEFAULTS | fields))
    for name, shape in megalodon_params(config).items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            sys.exit(f"error: {path}: tensor {name} of shape {shape} is missing or has another shape")
    return config, {name: tensors[name].to(dtype) for name in megalodon_params(config)}


def run(args):
    path, dtype = model_file(args.model), getattr(torch, args.dtype)
    if args.dump is not None:
        check_output(args.dump, [args.batch, path], "a safetensors file", is_safetensors)
    config, params = read_model(path, dtype)
    if args.dump is None:
        prompt = args.prompt.encode()
        if not prompt or max(prompt) >= config.vocab_size:
            sys.exit(f"error: --prompt: needs one or more bytes, each below the vocabulary size, {config.vocab_size}")
        for token in generate(config, params, prompt, args.num_tokens):
            sys.stdout.buffer.write(bytes([token]))
            sys.stdout.buffer.flush()
        return
    batch = {name: value for name, value in read_safetensors(args.batch)[1].items() if name.startswith("input.")}
    if set(batch) != {"input.tokens", "input.targets"}:
        sys.exit(f"error: {args.batch}: has no input.tokens and input.targets; give a dump of ./train")
    state = State(config, len(batch["input.tokens"]), dtype)
    cema = cema_convolution if args.convolution else cema_forward
    write_safetensors(args.dump, dump(config, params, batch, state, cema))


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--dtype", choices=["float64", "float32"], default="float64", help="(default: %(default)s)")
    parser.add_argument("--prompt", default="\n", help="the text to continue (default: a line break)")
    parser.add_argument("--num-tokens", type=int, default=256, help="bytes to write (default: %(default)s)")
    parser.add_argument("--batch", metavar="FILE", help="a dump, for its input.tokens and input.targets; needs --dump")
    parser.add_argument("--dump", metavar="FILE", help="write activations, loss and gradients of the batch")
    parser.add_argument("--convolution", action="store_true", help="compute CEMA as a convolution (for --dump)")
    args = parser.parse_args()
    if (args.batch is None) != (args.dump is None):
        parser.error("--batch and --dump need each other")
    try:
        run(args)
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
