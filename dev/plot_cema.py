"""Plots the impulse responses of CEMA: python dev/plot_cema.py MODEL.safetensors OUT.png

The impulse response of a channel is k[j] = Re sum_n gamma_n/sqrt(N) p_n q_n^j: the contribution of a token to the
output j tokens later. Left: the channels of every layer, sorted by the length of their response. Right: some channels of
the last layer. Needs numpy, safetensors and matplotlib.
"""
import json
import sys

import matplotlib
import numpy as np
from safetensors import safe_open

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LENGTH = 512


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def impulse_response(model, layer):
    """k (D, LENGTH), by the formulas of cema_coeffs_forward in megalodon.c."""
    alpha, delta, theta, gamma = (
        model.get_tensor(f"layers.{layer}.mega.cema.{name}").astype(np.float64)
        for name in ("alpha", "delta", "theta", "gamma")
    )
    N = alpha.shape[1]
    p = sigmoid(alpha[..., 0])
    phi = sigmoid(theta[..., 0]) * 2 * np.pi / N * np.arange(1, N + 1)
    if json.loads(model.metadata()["config"]).get("cema") == "real":
        phi = np.zeros_like(phi)
    q = (1 - p * sigmoid(delta[..., 0])) * np.exp(1j * phi)
    g = (gamma[..., 0] + 1j * gamma[..., 1]) / np.sqrt(N)
    return np.stack([(g * p * q**j).sum(1).real for j in range(LENGTH)], 1)


def main(path, out):
    model = safe_open(path, "np")
    layers = json.loads(model.metadata()["config"])["num_layers"]
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), dpi=110)
    for layer in range(layers):
        k = impulse_response(model, layer)
        power = np.cumsum(k**2, 1)
        reach = (power < 0.99 * power[:, -1:]).sum(1) + 1  # tokens that contain 99 % of the energy of k
        left.plot(np.linspace(0, 100, len(reach)), np.sort(reach), label=f"layer {layer}")
        if layer == layers - 1:
            for d in np.argsort(reach)[[len(reach) // 10, len(reach) // 2, len(reach) * 9 // 10, -1]]:
                right.plot(k[d] / np.abs(k[d]).max(), linewidth=1, label=f"channel {d}")
    left.set_xlabel("channels, %")
    left.set_ylabel("tokens with 99 % of the energy of k")
    left.legend(fontsize=7)
    right.set_xlim(0, 2 * reach.max())
    right.set_xlabel("delay j, tokens")
    right.set_ylabel(f"k[j] of layer {layers - 1}, divided by its maximum")
    right.legend(fontsize=7)
    for ax in (left, right):
        ax.grid(alpha=0.3)
    fig.tight_layout()
    fig.savefig(out)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
