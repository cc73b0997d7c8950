"""Every producer and every quantization scheme, and strategies that draw a call of a pair of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from custom_ops import library
from custom_ops.scales import (
    CODE_DTYPES,
    CODE_MODES,
    GROUP_SIZES,
    INT8_SCALE_MODES,
    SCALE_FORMATS,
    SCALE_LAYOUTS,
    SCALE_MODES,
)
from fusion_passes.testing.strategies import (
    activation_dtypes,
    activation_shapes,
    activations,
    relayouts,
    seeded_normal,
)
from tests.custom_ops.helpers import DEVICE, implementation

SCHEMES = ("group_quant", "token_quant", "tensor_quant", "tensor_quant_static")
ASYMMETRIC = ("token_quant_asymmetric", "tensor_quant_asymmetric", "tensor_quant_static_asymmetric")
"""Beside SCHEMES, for they have other keywords and outputs."""
GATES = ("silu_mul", "gelu_tanh_mul", "clamped_swiglu")
NORMS = ("rms_norm", "add_rms_norm")
PRODUCERS = (*GATES, *NORMS)
PAIRS = [(producer, scheme) for producer in PRODUCERS for scheme in (*SCHEMES, *ASYMMETRIC)]
KEPT = [(producer, scheme) for producer in NORMS for scheme in ("group_quant", "token_quant")]
"""Of which there is `<producer>_and_<scheme>` too."""
WEIGHT_MODES = ("rounded", "float32", "float32_plus_one")
# An implementation to hold against the reference.
KERNELS = ["triton", pytest.param("cuda", marks=pytest.mark.gpu)]


def kernel(op: str, which: str) -> Callable[..., Any]:
    """The implementation of that name; where the op has none, or none that runs here, the test is skipped."""
    implementations = {i.name: i for i in library.ops()[op].implementations}
    if which not in implementations:
        pytest.skip(f"needs an implementation of {op} in {which}")
    if reason := implementations[which].unavailable(torch.device(DEVICE)):
        pytest.skip(f"{which} kernels: {reason}")
    return implementation(op, which)


@dataclass(frozen=True)
class Call:
    """Arguments of an op: those of its producer, those of its scheme, and the keywords of each."""

    inputs: tuple[Any, ...]
    rest: tuple[Any, ...]
    producer_options: dict[str, Any]
    scheme_options: dict[str, Any]

    @property
    def args(self) -> tuple[Any, ...]:
        return (*self.inputs, *self.rest)

    @property
    def options(self) -> dict[str, Any]:
        return self.producer_options | self.scheme_options


def scale_modes(dtype: torch.dtype) -> tuple[str, ...]:
    """The ways in which scales of codes of a dtype are made."""
    return INT8_SCALE_MODES if dtype == torch.int8 else SCALE_MODES


def rest_of(scheme: str, group_size: int = 128, scale: float = 0.0173) -> tuple[Any, ...]:
    """Positional arguments of a scheme after what it quantizes."""
    given = (torch.tensor([scale], device=DEVICE),)
    return {
        "group_quant": (group_size,),
        "tensor_quant_static": given,
        "tensor_quant_static_asymmetric": (
            *given,
            torch.tensor([-7], dtype=torch.int8, device=DEVICE),
        ),
    }.get(scheme, ())


@st.composite
def given_scales(draw: st.DrawFn) -> Tensor:
    """Of one element: usual ones, and what a kernel has to have a way of its own for."""
    value = draw(st.sampled_from((1.0, 0.0123, 3e38, 1e-40, 2.0**-127, 0.0, float("inf"))))
    return torch.full(draw(st.sampled_from(((), (1,), (1, 1)))), value, device=DEVICE)


@st.composite
def given_zero_points(draw: st.DrawFn) -> Tensor:
    """Of one element: of the codes as int8, and as int32 far from them too."""
    dtype = draw(st.sampled_from((torch.int8, torch.int32)))
    values = (0, 3, -7, 127, -128) + (dtype is torch.int32) * (128, -900, 2**22, 2**31 - 1)
    shape = draw(st.sampled_from(((), (1,), (1, 1))))
    return torch.full(shape, draw(st.sampled_from(values)), dtype=dtype, device=DEVICE)


@st.composite
def schemes(draw: st.DrawFn, scheme: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a scheme after the quantized one: all formats, layouts, modes and bounds."""
    if scheme == "tensor_quant_static_asymmetric":
        options = {"code_mode": draw(st.sampled_from(CODE_MODES))}
        return (draw(given_scales()), draw(st.none() | given_zero_points())), options
    if scheme in ASYMMETRIC:
        return (), {
            "min_scale": draw(st.sampled_from((0.0, 1e-5))),
            "scale_mode": draw(st.sampled_from(SCALE_MODES)),
            "code_mode": draw(st.sampled_from(CODE_MODES)),
        }
    options: dict[str, Any] = {
        "dtype": draw(st.sampled_from(CODE_DTYPES)),
        "code_mode": draw(st.sampled_from(CODE_MODES)),
    }
    if scheme == "tensor_quant_static":
        return (draw(given_scales()),), options
    grouped = scheme == "group_quant"
    options |= {
        "min_amax": draw(st.sampled_from((1e-10, 0.0, 1e-4, 1e-38, 1e-42, 3.0))),
        "min_scale": draw(st.sampled_from((0.0, 0.0, 1e-5))),
        "scale_mode": draw(st.sampled_from(scale_modes(options["dtype"]))),
        "scale_format": draw(st.sampled_from(SCALE_FORMATS if grouped else SCALE_FORMATS[:2])),
    }
    if not grouped:
        return (), options
    packed = options["scale_format"] == "ue8m0_packed"
    options["scale_layout"] = draw(st.sampled_from(SCALE_LAYOUTS[2:] if packed else SCALE_LAYOUTS))
    return (draw(st.sampled_from(GROUP_SIZES)),), options


@st.composite
def producers(
    draw: st.DrawFn, producer: str, multiple_of: int = 1, specials: bool = True
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a producer, or one activation for the name "": each tensor anywhere in memory."""
    shape = draw(activation_shapes(2048, multiple_of, min_tokens=1))
    dtype = draw(activation_dtypes())

    def tensor() -> Tensor:
        return draw(relayouts(draw(activations(shape, dtype, specials, DEVICE))))

    if producer == "":
        return (tensor(),), {}
    if producer == "clamped_swiglu" and draw(st.booleans()):
        both = draw(activations((*shape[:-1], 2 * shape[-1]), dtype, specials, DEVICE))
        return (both[..., ::2], both[..., 1::2], 1.702, 7.0), {}
    if producer in GATES:
        clamps = producer == "clamped_swiglu"
        scalars = (draw(st.sampled_from((1.702, -0.5))), draw(st.sampled_from((7.0, 0.3))))
        return (tensor(), tensor(), *(scalars if clamps else ())), {}
    mode = draw(st.sampled_from(WEIGHT_MODES))
    weight_dtype = dtype if mode == "rounded" else draw(st.sampled_from((dtype, torch.float32)))
    weight = seeded_normal(draw, shape[-1:]).to(DEVICE, weight_dtype)
    eps = draw(st.sampled_from((1e-6, 1e-5, 0.0, 0.1)))
    added = (tensor(),) if producer == "add_rms_norm" else ()
    return (tensor(), *added, weight, eps), {"weight_mode": mode}


@st.composite
def calls(draw: st.DrawFn, producer: str, scheme: str) -> Call:
    """A call of `<producer>_<scheme>`, or of the scheme alone for the name ""."""
    rest, scheme_options = draw(schemes(scheme))
    multiple_of = 128 if scheme == "group_quant" else 1
    inputs, producer_options = draw(producers(producer, multiple_of))
    return Call(inputs, rest, producer_options, scheme_options)
