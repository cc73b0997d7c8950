"""Hypothesis strategies for property tests of kernels and fusions: shapes, dtypes, strides, values.

A tensor is drawn as a seed, a magnitude and a few planted special values, so that drawing a large one
costs no more than drawing a small one and a failure is reported in a few words. Needs `hypothesis`
(`pip install fusion-passes[test]`), which nothing else in this package imports.

    @given(x=activations(shape=activation_shapes(multiple_of=128)))
    def test_mine(x): ...
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

ACTIVATION_DTYPES = (torch.bfloat16, torch.float16)
# Empty, one, a vector width and one off it, primes, past a tile.
TOKEN_COUNTS = (0, 1, 2, 3, 7, 8, 13, 31, 64, 67, 129)
# Where the values of a tensor lie; the outer ones overflow or underflow when squared in float32.
MAGNITUDES = (1.0, 1.0, 1e-3, 30.0, 1e3, 1e-7, 1e-25, 1e30)
MEMORY_LAYOUTS = ("contiguous", "offset", "pitched", "packed", "strided", "transposed")


def activation_dtypes() -> st.SearchStrategy[torch.dtype]:
    """bfloat16 or float16."""
    return st.sampled_from(ACTIVATION_DTYPES)


@st.composite
def token_shapes(draw: st.DrawFn, max_tokens: int = 129, min_tokens: int = 0) -> tuple[int, ...]:
    """Leading dimensions `[...]` of at most max_tokens tokens: none, one or two, sizes 0 and 1 included."""
    counts = [n for n in TOKEN_COUNTS if min_tokens <= n <= max_tokens]
    tokens = draw(st.sampled_from(counts))
    if tokens == 1 and draw(st.booleans()):
        return ()
    if draw(st.booleans()):
        return (tokens,)
    divisors = [d for d in range(1, tokens + 1) if tokens % d == 0] or [1]
    outer = draw(st.sampled_from(divisors))
    return (outer, tokens // outer)


@st.composite
def hidden_sizes(draw: st.DrawFn, max_size: int = 640, multiple_of: int = 1) -> int:
    """A last dimension from 1 (or multiple_of) to max_size; odd and prime ones too where allowed."""
    most = max_size // multiple_of
    steps = [n for n in (1, 2, 3, 5, 7, 8, 16, 33, 64, 127, 128, 257, 515, 640) if n <= most]
    return draw(st.sampled_from(steps)) * multiple_of


@st.composite
def activation_shapes(
    draw: st.DrawFn,
    max_elements: int = 8192,
    multiple_of: int = 1,
    max_hidden: int = 640,
    min_tokens: int = 0,
) -> tuple[int, ...]:
    """`[..., K]` with K a multiple of multiple_of and at most max_elements elements."""
    hidden = draw(hidden_sizes(max_hidden, multiple_of))
    tokens = draw(token_shapes(max(1, min(129, max_elements // hidden)), min_tokens))
    return (*tokens, hidden)


def special_values(dtype: torch.dtype) -> list[float]:
    """Values at which quantization and rounding go wrong, all representable in dtype.

    Zeros of both signs, subnormals, exact powers of two, the e4m3 limits and a tie between two of its codes, the
    largest finite value, infinities, NaN.
    """
    info = torch.finfo(dtype)
    return [
        0.0,
        -0.0,
        info.smallest_normal,
        info.smallest_normal / 4,
        -info.smallest_normal / 2,
        1.0,
        -(2.0**-6),
        2.0**-10,
        256.0,
        448.0,
        -464.0,
        17 / 16,
        info.max,
        math.inf,
        -math.inf,
        math.nan,
    ]


@st.composite
def activations(
    draw: st.DrawFn,
    shape: tuple[int, ...] | st.SearchStrategy[tuple[int, ...]] = (),
    dtype: torch.dtype | st.SearchStrategy[torch.dtype] | None = None,
    specials: bool = True,
    device: str = "cpu",
) -> Tensor:
    """A contiguous tensor of normal values with, if `specials`, special values and constant runs in it.

    shape, dtype: themselves or strategies; dtype is bfloat16 or float16 by default.
    """
    size = draw(shape) if isinstance(shape, st.SearchStrategy) else tuple(shape)
    if not isinstance(dtype, torch.dtype):
        dtype = draw(activation_dtypes() if dtype is None else dtype)
    magnitude = draw(st.sampled_from(MAGNITUDES)) if specials else 1.0
    x = (seeded_normal(draw, size) * magnitude).to(dtype).flatten()
    if specials and x.numel():
        for _ in range(draw(st.integers(0, 4))):
            start = draw(st.integers(0, x.numel() - 1))
            run = draw(st.sampled_from((1, 1, 2, 64, 128, 300)))
            x[start : start + run] = draw(st.sampled_from(special_values(dtype)))
    return x.reshape(size).to(device)


def seeded_normal(draw: st.DrawFn, shape: Sequence[int]) -> Tensor:
    """float32 values of a standard normal distribution from a drawn seed."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    return torch.randn(tuple(shape), generator=generator)


@st.composite
def relayouts(draw: st.DrawFn, x: Tensor, layouts: Sequence[str] = MEMORY_LAYOUTS) -> Tensor:
    """The values of x in another place in memory: one of MEMORY_LAYOUTS.

    offset: one element off any alignment. pitched: rows further apart than they are long. packed: one
    half of a tensor with twice the columns. strided: every second column. transposed: last dimension
    not the fastest.
    """
    return relayout(x, draw(st.sampled_from(tuple(layouts))))


def relayout(x: Tensor, layout: str) -> Tensor:
    """The values of x in the memory layout of that name (see `relayouts`); what surrounds them is NaN."""
    last = x.shape[-1]
    if layout == "contiguous":
        return x.contiguous()
    if layout == "offset":
        out = _nan((x.numel() + 1,), x)[1:].view(x.shape)
    elif layout == "pitched":
        out = _nan((*x.shape[:-1], last + 3), x)[..., :last]
    elif layout == "packed":
        out = _nan((*x.shape[:-1], 2 * last), x)[..., last:]
    elif layout == "strided":
        out = _nan((*x.shape[:-1], 2 * last), x)[..., ::2]
    elif layout == "transposed":
        out = _nan(tuple(reversed(x.shape)), x).permute(*reversed(range(x.dim())))
    else:
        raise ValueError(f"layout is {layout!r}; accepted: {', '.join(MEMORY_LAYOUTS)}")
    return out.copy_(x)


def _nan(shape: tuple[int, ...], like: Tensor) -> Tensor:
    # float8 has no fill kernel on every device: go through float32.
    return torch.full(shape, math.nan, device=like.device).to(like.dtype)


@st.composite
def fp8_codes(
    draw: st.DrawFn,
    shape: tuple[int, ...] | st.SearchStrategy[tuple[int, ...]],
    device: str = "cpu",
) -> Tensor:
    """A contiguous float8_e4m3fn tensor of finite codes, all of them equally likely."""
    size = draw(shape) if isinstance(shape, st.SearchStrategy) else tuple(shape)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    magnitude = torch.randint(0, 127, size, generator=generator, dtype=torch.uint8)
    sign = torch.randint(0, 2, size, generator=generator, dtype=torch.uint8) * 128
    return (magnitude + sign).view(torch.float8_e4m3fn).to(device)


@st.composite
def positive_scales(draw: st.DrawFn, shape: tuple[int, ...], device: str = "cpu") -> Tensor:
    """A contiguous float32 tensor of scales from about 1e-4 to 1e1."""
    return (seeded_normal(draw, shape) * 2 - 3).exp().to(device)
