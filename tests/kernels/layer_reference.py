"""The layers of :mod:`dive_fast.kernels.layers` in float64 NumPy, with gradients derived by hand.

Rows are ``(R, W)``; each function takes upstream gradients and returns values and gradients by name.
"""

import numpy as np
import scipy.special


def biased_activation(x, bias, kind, upstream):
    """``y = act(x + bias)``, ``dx = dy act'(x + bias)`` and ``dbias``, its column sums."""
    z = x if bias is None else x + bias
    if kind == "quick_gelu":
        gate = scipy.special.expit(1.702 * z)
        slope = 1.702 * gate * (1 - gate)
    elif kind == "gelu":
        gate = scipy.special.ndtr(z)
        slope = np.exp(-z * z / 2) / np.sqrt(2 * np.pi)
    else:
        scale = np.sqrt(2 / np.pi)
        tanh = np.tanh(scale * (z + 0.044715 * z**3))
        gate = (1 + tanh) / 2
        slope = (1 - tanh**2) / 2 * scale * (1 + 3 * 0.044715 * z**2)
    gradient = upstream * (gate + z * slope)
    return {"output": z * gate, "x": gradient, "bias": gradient.sum(0)}


def add_layer_norm(total, weight, bias, eps, upstream_sum, upstream_normed):
    """The norm of rows ``total``, and gradients of ``total`` and of the parameters.

    ::

        h = (total - mean) / sqrt(variance + eps)      g = dnormed weight
        dtotal = dsum + (g - mean(g) - h mean(g h)) / sqrt(variance + eps)
    """
    centered = total - total.mean(1, keepdims=True)
    reciprocal = 1 / np.sqrt((centered**2).mean(1, keepdims=True) + eps)
    unit = centered * reciprocal
    scaled = upstream_normed * weight
    means = scaled.mean(1, keepdims=True), (scaled * unit).mean(1, keepdims=True)
    gradient = upstream_sum + (scaled - means[0] - unit * means[1]) * reciprocal
    return {
        "normed": unit * weight + bias,
        "x": gradient,
        "branch": gradient,
        "branch_bias": gradient.sum(0),
        "weight": (upstream_normed * unit).sum(0),
        "bias": upstream_normed.sum(0),
    }
