"""Device functions of the gated activations: tiles in, a tile of the same dtype out, every rounding of eager."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from custom_ops.triton_math import INTERPRET, exp, round_to, to_float32

_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _tanh(v):
    if INTERPRET:  # no libdevice; 1 + tanh, which is what it is for, has the same absolute error
        magnitude = tl.abs(v)
        t = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
        t = tl.where(v < 0, t * -1.0, t)
    else:
        t = libdevice.tanh(v)
    return t


@triton.jit
def produce(gate, up, alpha, limit, GATE: tl.constexpr):
    """What is quantized or stored: gate itself for GATE "none", else the gated activation of that name."""
    T: tl.constexpr = gate.dtype
    if GATE == "none":
        out = gate
    else:
        g = to_float32(gate)
        u = to_float32(up)
        if GATE == "silu_mul":
            left = round_to(tl.div_rn(g, 1.0 + exp(-g)), T)
        elif GATE == "gelu_tanh_mul":
            inner = _SQRT_2_OVER_PI * (g + _CUBIC * (g * g * g))
            left = round_to(0.5 * g * (1.0 + _tanh(inner)), T)
        else:
            bound = to_float32(round_to(tl.full(g.shape, limit, tl.float32), T))
            g = tl.where(g > bound, bound, g)  # NaN is not above the bound, and stays
            u = tl.where(u > bound, bound, u)
            u = tl.where(u < -bound, -bound, u)
            inner = to_float32(round_to(g * alpha, T))
            one = tl.full(g.shape, 1.0, tl.float32)
            sigmoid = to_float32(round_to(tl.div_rn(one, one + exp(-inner)), T))
            left = round_to(g * sigmoid, T)
            u = to_float32(round_to(u + 1.0, T))
        out = round_to(to_float32(left) * u, T)
    return out
