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

Edges
-----
The same in every implementation, for float8_e4m3fn with float32 scales. All arithmetic is float32 and
every division is IEEE division, correctly rounded:

    amax  = max |x| over the group          NaN anywhere in the group gives NaN
    amax  = max(amax, min_amax)             NaN stays NaN
    scale = amax / 448
    code  = e4m3(clamp(x / scale, -448, 448))      round to nearest, ties to even; NaN stays NaN

| group                        | scale          | codes                                                  |
| ---------------------------- | -------------- | ------------------------------------------------------ |
| all zero                     | min_amax / 448 | 0                                                      |
| all zero, min_amax = 0       | 0              | NaN (0 / 0, as in eager)                               |
| subnormal values             | as above       | as above; no flush to zero                             |
| x / scale beyond 448         | as above       | saturates to +-448 (rounding of the scale can do that) |
| contains Inf                 | Inf            | NaN where x is Inf, 0 where it is finite               |
| contains NaN                 | NaN            | NaN everywhere                                         |
| exact power of two times 448 | exact          | exact                                                  |
| negative zero                | as above       | -0 (code 0x80)                                         |

Which of the two NaN codes (0x7f, 0xff), and which payload a NaN scale has, is not specified. With no
tokens the outputs are empty, have the strides of their layout, and nothing is launched.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

E4M3_MAX = 448.0
DEFAULT_MIN_AMAX = 1e-10
GROUP_SIZES = (64, 128)
SCALE_LAYOUTS = ("row_major", "column_major", "column_major_tma")
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


def scale_strides(tokens: Sequence[int], groups: int, layout: str) -> list[int]:
    """Strides of a float32 scale of shape `[*tokens, groups]` in one of `SCALE_LAYOUTS`."""
    if layout == "row_major":
        return contiguous_strides([*tokens, groups])
    return [*contiguous_strides(tokens), pitch_of(math.prod(tokens), layout)]


def empty_scale(
    tokens: Sequence[int], groups: int, layout: str, device: torch.device | str
) -> Tensor:
    """An uninitialised float32 scale of shape `[*tokens, groups]` in one of `SCALE_LAYOUTS`."""
    if layout == "row_major":
        return torch.empty((*tokens, groups), dtype=torch.float32, device=device)
    return torch.empty_strided(
        (*tokens, groups),
        scale_strides(tokens, groups, layout),
        dtype=torch.float32,
        device=device,
    )


def to_layout(scale: Tensor, layout: str) -> Tensor:
    """A float32 scale with the exact strides of a layout: itself if it has them already, else a copy."""
    out = empty_scale(scale.shape[:-1], scale.shape[-1], layout, scale.device)
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


def layouts_of(scale: Tensor) -> tuple[str, ...]:
    """The layouts that a scale is in; several when it is (one token, a multiple of 4), none if strided."""
    return tuple(layout for layout in SCALE_LAYOUTS if has_layout(scale, layout))


def as_rows(x: Tensor) -> Tensor:
    """`[..., K]` as `[M, K]` with neighbours along K in memory: a view where strides allow, else a copy.

    Kernels take any row pitch, so a slice of a packed tensor and most views are not copied.
    """
    if x.dim() != 2:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


@dataclass(frozen=True)
class QuantSpec:
    """How a tensor is quantized.

    dtype: dtype of the codes. group_shape: (tokens, channels) that share a scale: (1, 128) for
    activations, (128, 128) for weights. scale_format: "float32". scale_layout: one of `SCALE_LAYOUTS`.
    Raises ValueError for what no op here produces or consumes.
    """

    dtype: torch.dtype = torch.float8_e4m3fn
    group_shape: tuple[int, int] = (1, 128)
    scale_format: str = "float32"
    scale_layout: str = "row_major"

    def __post_init__(self) -> None:
        for name, value, accepted in (
            ("dtype", self.dtype, (torch.float8_e4m3fn,)),
            ("group_shape", self.group_shape, ((1, 64), (1, 128), (128, 128))),
            ("scale_format", self.scale_format, ("float32",)),
            ("scale_layout", self.scale_layout, SCALE_LAYOUTS),
        ):
            if value not in accepted:
                choices = ", ".join(map(str, accepted))
                raise ValueError(f"QuantSpec: {name} is {value}; accepted: {choices}")

    @property
    def max(self) -> float:
        """The largest finite code."""
        return torch.finfo(self.dtype).max

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scale of a tensor of this shape: sizes rounded up to whole groups."""
        rows, columns = self.group_shape
        tokens, channels = shape[:-1], shape[-1]
        if rows > 1:
            tokens = (*tokens[:-1], -(-tokens[-1] // rows))
        return (*tokens, -(-channels // columns))

    def empty(self, shape: Sequence[int], device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Uninitialised (codes, scale) for a tensor of this shape: codes contiguous, scale in its layout."""
        scale_shape = self.scale_shape(shape)
        codes = torch.empty(shape, dtype=self.dtype, device=device)
        return codes, empty_scale(scale_shape[:-1], scale_shape[-1], self.scale_layout, device)


@functools.cache
def activation_spec(group_size: int, scale_layout: str) -> QuantSpec:
    """The spec of `group_quant(x, group_size, scale_layout=...)`."""
    return QuantSpec(group_shape=(1, group_size), scale_layout=scale_layout)
