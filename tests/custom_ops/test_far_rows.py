"""Rows further apart than 32-bit offsets reach: the third is 2^31 elements and more from the first.

The memory between them is never touched, so that a CPU has room: 4 GiB of addresses, a few pages of memory. An offset
that wraps is one before that memory, where a read ends the process.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.custom_ops.helpers import DEVICE, assert_same_bits, bf16, fp8, outputs
from tests.custom_ops.schemes import ASYMMETRIC, GATES, KERNELS, NORMS, SCHEMES, kernel, rest_of

PITCH = 2**30 + 64
WIDTH = 256


def apart(near: Tensor) -> Tensor:
    """The same three rows, far from each other."""
    memory = torch.empty(2 * PITCH + WIDTH, dtype=near.dtype, device=DEVICE)
    assert 2 * PITCH > 2**31
    return memory.as_strided((3, WIDTH), (PITCH, 1)).copy_(near)


@pytest.fixture(scope="module")
def far() -> Tensor:
    """bfloat16 [3, WIDTH]."""
    return apart(bf16(3, WIDTH, device=DEVICE))


def both(name: str, which: str, *args: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What the implementation makes of rows far apart, and of the same ones side by side."""
    run = kernel(name, which)
    near = [a.contiguous() if isinstance(a, Tensor) and a.dim() == 2 else a for a in args]
    return outputs(run(*args)), outputs(run(*near))


@pytest.mark.parametrize("which", KERNELS)
@pytest.mark.parametrize("scheme", [*SCHEMES, *ASYMMETRIC])
def test_what_quantizes(far: Tensor, which: str, scheme: str) -> None:
    assert_same_bits(*both(scheme, which, far, *rest_of(scheme)))


@pytest.mark.parametrize("which", KERNELS)
@pytest.mark.parametrize("scheme", ["", *SCHEMES, *ASYMMETRIC])
@pytest.mark.parametrize("producer", [*GATES, *NORMS])
def test_what_produces(far: Tensor, which: str, producer: str, scheme: str) -> None:
    weight = torch.ones(WIDTH, dtype=far.dtype, device=DEVICE)
    inputs: tuple[Any, ...] = {
        "rms_norm": (far, weight, 1e-6),
        "add_rms_norm": (far, far, weight, 1e-6),
        "clamped_swiglu": (far, far, 1.702, 7.0),
    }.get(producer, (far, far))
    name = f"{producer}_{scheme}" if scheme else producer
    assert_same_bits(*both(name, which, *inputs, *rest_of(scheme)))


@pytest.mark.parametrize("which", ["triton"])
@pytest.mark.parametrize("operand", ["a", "b"])
@pytest.mark.parametrize("name", ["block_scaled_mm", "scaled_mm"])
def test_products(which: str, name: str, operand: str) -> None:
    a, b = (fp8(3, WIDTH, device=DEVICE) for _ in range(2))
    a_scale, b_scale = {
        "block_scaled_mm": (torch.rand(3, 2, device=DEVICE), torch.rand(1, 2, device=DEVICE)),
        "scaled_mm": (torch.rand(3, 1, device=DEVICE), torch.rand(3, 1, device=DEVICE)),
    }[name]
    a, b = (apart(a), b) if operand == "a" else (a, apart(b))
    assert_same_bits(*both(name, which, a, a_scale, b, b_scale))


def test_an_adapter(far: Tensor) -> None:
    a, b = bf16(16, WIDTH, device=DEVICE), bf16(WIDTH, 16, device=DEVICE)
    assert_same_bits(*both("lora_add_single", "triton", far, far, a, b, 0.5))
