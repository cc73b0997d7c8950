"""The edge-case table, row by row, for every op that quantizes: its Triton and CUDA kernels against the reference.

An op with a producer is held against the producer of the same implementation and the reference of the scheme, so that
what a producer's own sum or exponential may move is no part of it. `TestEdges` in test_edges.py says what the values
are; here is that every op and every implementation agrees on them. More than 2^31 elements are in
cuda/test_many_elements.py and in the tests of each family, as they need a GPU's memory.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from custom_ops import library
from custom_ops.scales import CODE_DTYPES
from tests.custom_ops.helpers import DEVICE, assert_same_bits, implementation, outputs
from tests.custom_ops.schemes import (
    ASYMMETRIC,
    GATES,
    KEPT,
    KERNELS,
    NORMS,
    PAIRS,
    SCHEMES,
    kernel,
    rest_of,
)

QUANTIZING = [
    *((f"{producer}_{scheme}", producer, scheme) for producer, scheme in PAIRS),
    *((f"{producer}_and_{scheme}", producer, scheme) for producer, scheme in KEPT),
    *((scheme, "", scheme) for scheme in (*SCHEMES, *ASYMMETRIC)),
    ("block_quant", "", "block_quant"),
    ("silu_mul_group_quant_masked", "silu_mul", "masked"),
]
IDS = [name for name, *_ in QUANTIZING]
ELSEWHERE = {"moe_permute_group_quant"}
"""Quantizes while it permutes: tests/custom_ops/moe/test_permute.py."""


def neighbours(dtype: torch.dtype) -> list[float]:
    """Powers of two and the values one step to either side."""
    found = []
    for power in (-30, -1, 0, 3, 7):
        at = torch.tensor(2.0**power, dtype=dtype)
        bits = at.view(torch.int16)
        found += [float((bits + step).view(dtype)) for step in (-1, 0, 1)]
    return found


def rows(edge: str, dtype: torch.dtype) -> list[list[float]]:
    """The values at the start of each row; the rest of a row is zeros."""
    tiny = 6e-8 if dtype is torch.float16 else 2.0**-130
    most = float(torch.finfo(dtype).max)
    return {
        "zero": [[0.0], [-0.0, 0.0]],
        "subnormal": [[tiny, -tiny], [tiny, 1.0]],
        "saturating": [[most, -most, 1.0], [2.77, -2.77], [1000.0, 1.01]],
        "infinite": [[math.inf, 1.0], [-math.inf, 0.0], [math.inf, -math.inf, 3.0]],
        "nan": [[math.nan, 1.0], [1.0, math.nan, math.inf]],
        "powers of two": [[x, -x, 1.0] for x in neighbours(dtype)],
    }[edge]


EDGES = ("zero", "subnormal", "saturating", "infinite", "nan", "powers of two")
WIDTHS = (1, 7, 33, 129, 128 * 33)
"""Odd ones, and 33 groups; what has groups takes those multiples of them."""


def values(edge: str, dtype: torch.dtype, width: int) -> Tensor:
    table = rows(edge, dtype)
    x = torch.zeros(len(table), width, dtype=dtype)
    for row, start in zip(x, table, strict=True):
        count = min(width, len(start))
        row[:count] = torch.tensor(start[:count]).to(dtype)
        if width > 200:  # a second group, or the far end of the row
            row[-count:] = row[:count].clone()
    return x.to(DEVICE)


def produced(producer: str, x: Tensor, which: str) -> tuple[tuple, tuple[Tensor, ...]]:
    """The producer's arguments, and what its own implementation makes of them."""
    other = torch.ones_like(x)
    inputs: tuple = (x,)
    if producer in GATES:
        inputs = (x, other, *((1.702, 7.0) if producer == "clamped_swiglu" else ()))
    elif producer in NORMS:
        weight = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
        inputs = (*((x, torch.zeros_like(x)) if producer == "add_rms_norm" else (x,)), weight, 1e-6)
    if not producer:
        return inputs, (x,)
    return inputs, outputs(implementation(producer, which)(*inputs))


def check(name: str, producer: str, scheme: str, which: str, x: Tensor) -> None:
    run = kernel(name, which)
    if scheme == "masked":
        packed = torch.cat([x, torch.ones_like(x)], -1)[None]
        counts = torch.tensor([x.shape[0]], dtype=torch.int32, device=DEVICE)
        for dtype in CODE_DTYPES:
            options = {"dtype": dtype}
            got = outputs(run(packed, counts, 128, **options))
            inside = implementation("silu_mul_group_quant", which)
            want = outputs(inside(*packed.chunk(2, -1), 128, **options))
            # the scales of an expert lie otherwise than those of a tensor
            assert_same_bits(*([t.reshape(-1).contiguous() for t in side] for side in (got, want)))
        return
    inputs, (value, *rest) = produced(producer, x, which)
    if "_and_" in name:
        rest = [value, *rest]
    positional = rest_of(scheme)
    for dtype in (None,) if scheme in ASYMMETRIC else CODE_DTYPES:
        for mode in ("divide", "reciprocal_input"):
            options = {} if dtype is None else {"dtype": dtype}
            options["code_mode"] = mode
            got = run(*inputs, *positional, **options)
            want = implementation(scheme, "reference")(value, *positional, **options)
            assert_same_bits(got, (*outputs(want), *rest))


def test_every_op_that_quantizes_is_in_the_table():
    made = {name for name in library.ops() if "quant" in name}
    assert made == set(IDS) | ELSEWHERE


@pytest.mark.parametrize("which", KERNELS)
@pytest.mark.parametrize(("name", "producer", "scheme"), QUANTIZING, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("edge", EDGES)
def test_a_row_of_the_table(edge, dtype, name, producer, scheme, which):
    check(name, producer, scheme, which, values(edge, dtype, 256))


@pytest.mark.parametrize("which", KERNELS)
@pytest.mark.parametrize(("name", "producer", "scheme"), QUANTIZING, ids=IDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width, name, producer, scheme, which):
    if scheme in ("group_quant", "masked") and width % 128:
        pytest.skip(f"groups of 128 need a width that they divide, not {width}: a ValueError")
    torch.manual_seed(width)
    tokens = 3 if width < 1000 or DEVICE == "cuda" else 1  # the interpreter takes seconds
    x = torch.randn(tokens, width, device=DEVICE).to(torch.bfloat16)
    check(name, producer, scheme, which, x)


@pytest.mark.parametrize("which", KERNELS)
@pytest.mark.parametrize(("name", "producer", "scheme"), QUANTIZING, ids=IDS)
def test_no_tokens(name, producer, scheme, which):
    check(name, producer, scheme, which, torch.zeros(0, 256, dtype=torch.bfloat16, device=DEVICE))
