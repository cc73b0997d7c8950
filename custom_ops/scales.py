"""One vocabulary for quantized values and their scales, and the contract for the edges.

A quantized tensor is described by a `QuantSpec`: the dtype of its codes, the shape of the group that
shares a scale, the format of the scale and its layout. Nothing ever changes format or layout implicitly.

Layouts
-------
`x` is `[..., K]`, its leading dimensions are tokens (M of them in total), and a group is `group_size`
neighbours along K, so `scale` is `[..., G]` with `G = ceil(K / group_size)`. `pitch` is the distance,
in elements, from one group's column to the next:

| layout             | strides of a [B, S, G] scale | pitch                                                 |
| ------------------ | ---------------------------- | ----------------------------------------------------- |
| `row_major`        | (S * G, G, 1)                | contiguous                                            |
| `column_major`     | (S, 1, pitch)                | max(1, M)                                             |
| `column_major_tma` | (S, 1, pitch)                | max(1, M) rounded up to 4, that is, to 16 bytes       |

A column-major scale viewed as `[M, G]` has strides (1, pitch). The padding of the TMA-aligned layout
is not visible in the shape. DeepGEMM on Hopper reads that layout as it is. (A TMA box may read up to
12 bytes after the last column; the CUDA caching allocator rounds blocks to 512 bytes, so they exist.)

Arithmetic
----------
T is the dtype of x, MAX is 448 (float8_e4m3fn) or 127 (int8), fl() one rounding to float32. Every operation
is float32 and correctly rounded, unless a T stands before it:

    amax  = max |x| over the group                 NaN anywhere in the group gives NaN
    amax  = max(amax, min_amax)                    NaN stays NaN, here and below
    scale = by scale_mode                          | divide            | fl(amax / MAX)
                                                   | reciprocal        | fl(amax * fl(1 / MAX))
                                                   | divide_input      | T(fl(amax / MAX))
                                                   | reciprocal_input  | T(fl(amax * fl(1 / MAX)))
                                                   | divide_full_input | divide_input, MAX being 127.5
                                                   | reciprocal_full_input | reciprocal_input, MAX being 127.5
                                                   | divide_or_one     | divide, of 1 unless amax > 0
                                                   | reciprocal_or_one | reciprocal, of 1 unless amax > 0
    scale = max(scale, min_scale)                  in the modes ending in _input rounded to T again
    scale = the power of two from scale up         scale_format ue8m0 and ue8m0_packed only
    v     = by code_mode                           | divide            | fl(x / scale)
                                                   | reciprocal        | fl(x * fl(1 / scale))
                                                   | reciprocal_input  | T(x * T(fl(1 / scale)))
    code  = clamp(v, -MAX, MAX) to the nearest code, ties to even; in the full modes, which only int8 has,
            round(v) clamped to -128 .. 127

`reciprocal` is what eager PyTorch computes on a GPU for `amax / 448.0`, and the modes ending in `_input`
are what a graph computes that never leaves T; those ending in `_or_one` are `where(amax > 0, amax, 1) / 448.0`, where
the scale of zeros is 1 / MAX, and so is that of NaN. They differ in bits: none stands for another (but where T is
bfloat16 and the bounds are 0, `divide_input` and `reciprocal_input` are the same for every amax).

A power of two is found from the bits of scale, never by a logarithm: 2^(e - 127) with e = 0..254. As
`ue8m0` it is a float32; as `ue8m0_packed` the bytes e of four neighbouring groups are one int32, the first
group in the lowest byte and the groups past the last one 0, in the layout column_major_tma.

Edges
-----
The same in every implementation, for float32 scales and scale_mode and code_mode "divide":

| group                        | scale          | codes                                                  |
| ---------------------------- | -------------- | ------------------------------------------------------ |
| all zero                     | min_amax / MAX | 0                                                      |
| all zero, min_amax = 0       | 0              | NaN (0 / 0, as in eager)                               |
| subnormal values             | as above       | as above; no flush to zero                             |
| x / scale beyond MAX         | as above       | saturates to +-MAX (rounding of the scale can do that) |
| contains Inf                 | Inf            | NaN where x is Inf, 0 where it is finite               |
| contains NaN                 | NaN            | NaN everywhere                                         |
| exact power of two times MAX | exact          | exact                                                  |
| negative zero                | as above       | -0 (code 0x80)                                         |

An int8 code of NaN is 0, and there is no -0. A power of two below 2^-127 is 2^-127, that of scale 0 too (so
the codes of zeros are 0); that of Inf is Inf and that of NaN is NaN, both of which are the byte 255.

Which of the two NaN codes (0x7f, 0xff), and which payload a NaN scale has, is not specified. With no
tokens the outputs are empty, have the strides of their layout, and nothing is launched; the amax of a
tensor without elements is 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DEFAULT_MIN_AMAX = 1e-10
GROUP_SIZES = (32, 64, 128)
CODE_DTYPES = (torch.float8_e4m3fn, torch.int8)
SCALE_LAYOUTS = ("row_major", "column_major", "column_major_tma")
SCALE_FORMATS = ("float32", "ue8m0", "ue8m0_packed")
SCALE_MODES = (
    "divide",
    "reciprocal",
    "divide_input",
    "reciprocal_input",
    "divide_or_one",
    "reciprocal_or_one",
)
ALL_CODES = ("divide_full_input", "reciprocal_full_input")
INT8_SCALE_MODES = (*SCALE_MODES, *ALL_CODES)
CODE_MODES = ("divide", "reciprocal", "reciprocal_input")
BLOCK = 128  # side of the blocks of a weight
GROUPS_PER_WORD = 4  # exponents in an int32 of ue8m0_packed
TMA_ALIGNMENT_BYTES = 16


def known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes certainly holds, without adding a guard when they are symbolic."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def at_least_one(size: int) -> int:
    """max(1, size), symbolic sizes included."""
    if isinstance(size, int):
        return size or 1
    return size if known(size >= 1) else torch.sym_max(1, size)


def contiguous_strides(shape: Sequence[int]) -> list[int]:
    """Strides that `torch.empty(shape)` has: an empty dimension counts as one."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step = step * at_least_one(size)
    return strides[::-1]


def pitch_of(num_tokens: int, layout: str, itemsize: int = 4) -> int:
    """Elements from one column of a column-major scale to the next."""
    pitch = at_least_one(num_tokens)
    if layout == "column_major_tma":
        step = TMA_ALIGNMENT_BYTES // itemsize
        pitch = (pitch + step - 1) // step * step
    return pitch


def code_max(dtype: torch.dtype) -> float:
    """The largest magnitude of a code: 448 for float8_e4m3fn; 127 for int8, whose -128 is not used."""
    return 448.0 if dtype == torch.float8_e4m3fn else 127.0


def uses_all_codes(scale_mode: str) -> bool:
    """Whether int8 codes begin at -128, and their scale is amax / 127.5."""
    return scale_mode in ALL_CODES


def divisor_of(dtype: torch.dtype, scale_mode: str) -> float:
    """What a largest magnitude is divided by: MAX."""
    return 127.5 if uses_all_codes(scale_mode) else code_max(dtype)


def scale_strides(tokens: Sequence[int], groups: int, layout: str) -> list[int]:
    """Strides of a 4-byte scale of shape `[*tokens, groups]` in one of `SCALE_LAYOUTS`.

    A column-major one of a batch of one, [1, T, groups], has the stride of an outermost dimension there: of the T that
    it would have otherwise, Inductor asks whether it is below the pitch, and adds a guard on T.
    """
    if layout == "row_major":
        return contiguous_strides([*tokens, groups])
    pitch = pitch_of(math.prod(tokens), layout)
    strides = contiguous_strides(tokens)
    for dim, size in enumerate(tokens[:-1]):
        if known(size == 1):
            strides[dim] = pitch * at_least_one(groups)
    return [*strides, pitch]


def empty_scale(
    tokens: Sequence[int],
    groups: int,
    layout: str,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """An uninitialised scale of shape `[*tokens, groups]` in one of `SCALE_LAYOUTS`; int32 if packed."""
    if layout == "row_major":
        return torch.empty((*tokens, groups), dtype=dtype, device=device)
    strides = scale_strides(tokens, groups, layout)
    return torch.empty_strided((*tokens, groups), strides, dtype=dtype, device=device)


def to_layout(scale: Tensor, layout: str) -> Tensor:
    """A scale with the exact strides of a layout: itself if it has them already, else a copy."""
    out = empty_scale(scale.shape[:-1], scale.shape[-1], layout, scale.device, scale.dtype)
    return scale if scale.stride() == out.stride() else out.copy_(scale)


def to_contiguous(x: Tensor) -> Tensor:
    """As `x.contiguous()`, but with the strides of `torch.empty(x.shape)` in dimensions of size 1 too."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return x if x.stride() == out.stride() else out.copy_(x)


def has_layout(scale: Tensor, layout: str) -> bool:
    """Whether a scale is certainly in a layout. Strides of dimensions of size 1 do not matter.

    With symbolic sizes this is what is statically known, and adds no guard.
    """
    wanted = scale_strides(scale.shape[:-1], scale.shape[-1], layout)
    return all(
        known(size == 1) or known(have == want)
        for size, have, want in zip(scale.shape, scale.stride(), wanted, strict=True)
    )


def as_rows(x: Tensor, max_step: int = 1) -> Tensor:
    """`[..., K]` as `[M, K]` with a step of at most max_step along K: a view where strides allow, else a copy.

    Kernels take any row pitch, so a slice of a packed tensor and most views are not copied.
    """
    if x.dim() != 2:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if 1 <= x.stride(-1) <= max_step or x.shape[-1] <= 1 else x.contiguous()


@dataclass(frozen=True)
class QuantSpec:
    """How a tensor is quantized.

    dtype: dtype of the codes. group_shape: (tokens, channels) that share a scale, None for all of them:
    (1, 128) per group, (1, None) per token, (None, None) per tensor, (128, 128) for weights.
    scale_format: one of `SCALE_FORMATS`. scale_layout: one of `SCALE_LAYOUTS`.
    Raises ValueError for what no op here produces or consumes.
    """

    dtype: torch.dtype = torch.float8_e4m3fn
    group_shape: tuple[int | None, int | None] = (1, 128)
    scale_format: str = "float32"
    scale_layout: str = "row_major"

    def __post_init__(self) -> None:
        per_group = [(1, size) for size in GROUP_SIZES]
        shapes = (*per_group, (1, None), (None, None), (BLOCK, BLOCK))
        layouts: tuple[str, ...] = SCALE_LAYOUTS
        formats: tuple[str, ...] = SCALE_FORMATS
        if self.group_shape not in per_group:
            layouts, formats = ("row_major",), ("float32", "ue8m0")
        elif self.scale_format == "ue8m0_packed":
            layouts = ("column_major_tma",)
        for name, value, accepted in (
            ("dtype", self.dtype, CODE_DTYPES),
            ("group_shape", self.group_shape, shapes),
            ("scale_format", self.scale_format, formats),
            ("scale_layout", self.scale_layout, layouts),
        ):
            if value not in accepted:
                choices = ", ".join(map(str, accepted))
                raise ValueError(f"QuantSpec: {name} is {value}; accepted: {choices}")

    @property
    def max(self) -> float:
        """The largest magnitude of a code."""
        return code_max(self.dtype)

    @property
    def scale_dtype(self) -> torch.dtype:
        """dtype of the scale: float32, or int32 where four exponents are packed into one element."""
        return torch.int32 if self.scale_format == "ue8m0_packed" else torch.float32

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scale of a tensor of this shape: sizes rounded up to whole groups and words."""
        rows, columns = self.group_shape
        if rows is None:
            return (1,)
        tokens, channels = shape[:-1], shape[-1]
        if rows > 1:
            tokens = (*tokens[:-1], -(-tokens[-1] // rows))
        if columns is None:
            return (*tokens, 1)
        if self.scale_format == "ue8m0_packed":
            columns = columns * GROUPS_PER_WORD
        return (*tokens, -(-channels // columns))

    def empty(self, shape: Sequence[int], device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Uninitialised (codes, scale) for a tensor of this shape: codes contiguous, scale in its layout."""
        *tokens, groups = self.scale_shape(shape)
        codes = torch.empty(shape, dtype=self.dtype, device=device)
        return codes, empty_scale(tokens, groups, self.scale_layout, device, self.scale_dtype)

    def empty_of_experts(
        self, shape: Sequence[int], device: torch.device | str
    ) -> tuple[Tensor, Tensor]:
        """The same for [experts, tokens, K], where the scale of each expert is in the layout on its own."""
        experts, tokens, groups = self.scale_shape(shape)
        size = tokens if self.scale_layout == "row_major" else pitch_of(tokens, self.scale_layout)
        strides = scale_strides((tokens,), groups, self.scale_layout)
        scale = torch.empty_strided(
            (experts, tokens, groups),
            (at_least_one(size) * at_least_one(groups), *strides),
            dtype=self.scale_dtype,
            device=device,
        )
        return torch.empty(shape, dtype=self.dtype, device=device), scale


quant_spec = functools.cache(QuantSpec)  # an op makes the same few over and over
