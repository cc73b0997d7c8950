"""Quantization of activations: per group, per token and per tensor, to FP8 and int8.

The keywords are the same wherever they appear, and `custom_ops.scales` says what each does to the bits:

| keyword      | accepted                                                | meaning                           |
| ------------ | ------------------------------------------------------- | --------------------------------- |
| scale_layout | row_major, column_major, column_major_tma               | strides of the scale              |
| min_amax     | a finite number >= 0                                    | lower bound of a group's amax     |
| dtype        | torch.float8_e4m3fn, torch.int8                         | dtype of the codes                |
| scale_format | float32, ue8m0, ue8m0_packed                            | what a scale is                   |
| min_scale    | a finite number >= 0                                    | lower bound of a scale            |
| scale_mode   | divide, reciprocal, each alone or with _input, _or_one; | how a scale comes of amax         |
|              | of int8 with _full_input, too                           |                                   |
| code_mode    | divide, reciprocal, reciprocal_input                    | how a code comes of x and a scale |
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from custom_ops import library
from custom_ops.implementation import cuda, triton
from custom_ops.library import require
from custom_ops.quantization import reference
from custom_ops.quantization.checks import (
    check_activation,
    check_channels,
    check_choice,
    check_codes,
    check_given,
    check_scales,
)
from custom_ops.quantization.fused import Scheme
from custom_ops.scales import (
    DEFAULT_MIN_AMAX,
    GROUP_SIZES,
    SCALE_FORMATS,
    SCALE_LAYOUTS,
    quant_spec,
)

_UNPACKED = ("float32", "ue8m0")


def group_quant(
    x: Tensor,
    group_size: int,
    *,
    scale_layout: str = "row_major",
    min_amax: float = DEFAULT_MIN_AMAX,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: str = "float32",
    min_scale: float = 0.0,
    scale_mode: str = "divide",
    code_mode: str = "divide",
) -> tuple[Tensor, Tensor]:
    """Quantize to FP8 or int8 with one scale per token and group of channels.

    x: bfloat16 or float16, [..., K], any strides; K is a multiple of group_size.
    group_size: 32, 64 or 128. The keywords: see the module `custom_ops.quantization.ops`; "ue8m0_packed"
    scales have the layout "column_major_tma".

    Returns q, of `dtype`, [..., K], contiguous, and scale, float32, [..., K // group_size], such that x is
    about q * scale. By default:

        scale = max(amax |x|, min_amax) / 448
        q     = e4m3(clamp(x / scale, -448, 448))

    in float32 with IEEE division and ties to even. "ue8m0_packed": scale is int32,
    [..., ceil(K // group_size / 4)], with the exponents of four groups in an element. Every implementation equals
    the reference bit for bit; zero, subnormal, Inf and NaN groups are specified in `custom_ops.scales`.

    Raises ValueError for another dtype, group size or value of a keyword, or a K that is not a multiple of
    group_size. Source: the activation quantization of DeepSeek-V3 (arXiv:2412.19437, 3.3).
    """
    return torch.ops.custom_ops.group_quant(
        x,
        group_size,
        scale_layout=scale_layout,
        min_amax=min_amax,
        dtype=dtype,
        scale_format=scale_format,
        min_scale=min_scale,
        scale_mode=scale_mode,
        code_mode=code_mode,
    )


def token_quant(
    x: Tensor,
    *,
    min_amax: float = DEFAULT_MIN_AMAX,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: str = "float32",
    min_scale: float = 0.0,
    scale_mode: str = "divide",
    code_mode: str = "divide",
) -> tuple[Tensor, Tensor]:
    """Quantize to FP8 or int8 with one scale per token, found from the token itself.

    x: bfloat16 or float16, [..., K], any strides, K >= 1. The keywords: see the module
    `custom_ops.quantization.ops`; scale_format is "float32" or "ue8m0". Returns q, of `dtype`, [..., K], and
    scale, float32, [..., 1], both contiguous, as `group_quant` with one group of K channels.

    torchao's float8 PerRow is min_amax 0 and scale_mode "reciprocal_input" on a GPU; its int8 is min_amax 0,
    min_scale 1e-5, scale_mode "divide_input" or "reciprocal_input" and code_mode "reciprocal_input" in version 1 of
    its configuration, and min_scale 2^-23, scale_mode "reciprocal_full_input" and code_mode "reciprocal" in version 2.
    Every implementation equals the reference bit for bit. Raises ValueError for another dtype, K of 0 or another
    value of a keyword.
    """
    return torch.ops.custom_ops.token_quant(
        x,
        min_amax=min_amax,
        dtype=dtype,
        scale_format=scale_format,
        min_scale=min_scale,
        scale_mode=scale_mode,
        code_mode=code_mode,
    )


def tensor_quant(
    x: Tensor,
    *,
    min_amax: float = DEFAULT_MIN_AMAX,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: str = "float32",
    min_scale: float = 0.0,
    scale_mode: str = "divide",
    code_mode: str = "divide",
) -> tuple[Tensor, Tensor]:
    """Quantize to FP8 or int8 with one scale for all of a tensor, found from the tensor itself.

    x: bfloat16 or float16, [..., K], any strides. The keywords: see the module `custom_ops.quantization.ops`;
    scale_format is "float32" or "ue8m0". Returns q, of `dtype`, [..., K], contiguous, and scale, float32,
    [1]. A token's codes depend on the tokens around it.

    Two passes over memory: the scale is known after the last element. Every implementation equals the
    reference bit for bit. Raises ValueError for another dtype or value of a keyword.
    """
    return torch.ops.custom_ops.tensor_quant(
        x,
        min_amax=min_amax,
        dtype=dtype,
        scale_format=scale_format,
        min_scale=min_scale,
        scale_mode=scale_mode,
        code_mode=code_mode,
    )


def tensor_quant_static(
    x: Tensor,
    scale: Tensor,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    code_mode: str = "divide",
) -> Tensor:
    """Quantize to FP8 or int8 with one scale for all of a tensor, given.

    x: bfloat16 or float16, [..., K], any strides. scale: float32, one element, on the device of x. dtype,
    code_mode: see the module `custom_ops.quantization.ops`. Returns q, of `dtype`, [..., K], contiguous:

        q = e4m3(clamp(x / scale, -448, 448))

    Every implementation equals the reference bit for bit. Raises ValueError for another dtype, a scale that is
    not one float32, or another value of a keyword.
    """
    return torch.ops.custom_ops.tensor_quant_static(x, scale, dtype=dtype, code_mode=code_mode)


def check_group(
    op: str,
    name: str,
    x: Tensor,
    group_size: int,
    *,
    scale_layout: str,
    min_amax: float,
    dtype: torch.dtype,
    scale_format: str,
    min_scale: float,
    scale_mode: str,
    code_mode: str,
) -> None:
    """The arguments of a group quantization of x along its last dimension."""
    check_activation(op, name, x)
    check_choice(op, "group_size", group_size, GROUP_SIZES)
    check_choice(op, "scale_layout", scale_layout, SCALE_LAYOUTS)
    check_scales(
        op, scale_format, SCALE_FORMATS, min_amax, min_scale, scale_mode, dtype == torch.int8
    )
    check_codes(op, dtype, code_mode)
    if scale_format == "ue8m0_packed" and scale_layout != "column_major_tma":
        raise ValueError(
            f"{op}: scale_layout is {scale_layout!r}; accepted with scale_format 'ue8m0_packed': column_major_tma"
        )
    require(
        x.shape[-1] % group_size == 0,
        lambda: (
            f"{op}: the last dimension of {name} is {x.shape[-1]}; accepted: a multiple of "
            f"group_size = {group_size}"
        ),
    )


def _empty_group(
    x: Tensor,
    group_size: int,
    *,
    scale_layout: str,
    min_amax: float,
    dtype: torch.dtype,
    scale_format: str,
    min_scale: float,
    scale_mode: str,
    code_mode: str,
) -> tuple[Tensor, Tensor]:
    spec = quant_spec(dtype, (1, group_size), scale_format, scale_layout)
    return spec.empty(x.shape, x.device)


def check_dynamic(
    op: str,
    name: str,
    x: Tensor,
    *,
    min_amax: float,
    dtype: torch.dtype,
    scale_format: str,
    min_scale: float,
    scale_mode: str,
    code_mode: str,
) -> None:
    """The arguments of a dynamic quantization whose scales are not packed."""
    check_activation(op, name, x)
    check_scales(op, scale_format, _UNPACKED, min_amax, min_scale, scale_mode, dtype == torch.int8)
    check_codes(op, dtype, code_mode)


def _check_token(
    op: str,
    name: str,
    x: Tensor,
    *,
    min_amax: float,
    dtype: torch.dtype,
    scale_format: str,
    min_scale: float,
    scale_mode: str,
    code_mode: str,
) -> None:
    check_activation(op, name, x)
    check_scales(op, scale_format, _UNPACKED, min_amax, min_scale, scale_mode, dtype == torch.int8)
    check_codes(op, dtype, code_mode)
    check_channels(op, name, x)


def _empty_token(
    x: Tensor,
    *,
    min_amax: float,
    dtype: torch.dtype,
    scale_format: str,
    min_scale: float,
    scale_mode: str,
    code_mode: str,
) -> tuple[Tensor, Tensor]:
    return quant_spec(dtype, (1, None), scale_format).empty(x.shape, x.device)


def _empty_tensor(
    x: Tensor,
    *,
    min_amax: float,
    dtype: torch.dtype,
    scale_format: str,
    min_scale: float,
    scale_mode: str,
    code_mode: str,
) -> tuple[Tensor, Tensor]:
    return quant_spec(dtype, (None, None), scale_format).empty(x.shape, x.device)


def _check_static(
    op: str, name: str, x: Tensor, scale: Tensor, *, dtype: torch.dtype, code_mode: str
) -> None:
    check_activation(op, name, x)
    check_codes(op, dtype, code_mode)
    check_given(op, "scale", scale, name, x, (torch.float32,))


def _empty_static(x: Tensor, scale: Tensor, *, dtype: torch.dtype, code_mode: str) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


# The keywords of every dynamic quantization, as a schema has them.
DYNAMIC_KEYWORDS = (
    "float min_amax=1e-10, ScalarType dtype=float8_e4m3fn, str scale_format='float32', "
    "float min_scale=0.0, str scale_mode='divide', str code_mode='divide'"
)
_KERNELS = "custom_ops.quantization.triton_kernels:"

GROUP_QUANT = Scheme(
    library.define(
        group_quant,
        f"(Tensor x, int group_size, *, str scale_layout='row_major', {DYNAMIC_KEYWORDS})"
        " -> (Tensor q, Tensor scale)",
        check=partial(check_group, "group_quant", "x"),
        empty=_empty_group,
        reference=reference.group_quant,
        implementations=(cuda("group_quant"), triton(_KERNELS + "group_quant")),
    ),
    check_group,
)
TOKEN_QUANT = Scheme(
    library.define(
        token_quant,
        f"(Tensor x, *, {DYNAMIC_KEYWORDS}) -> (Tensor q, Tensor scale)",
        check=partial(_check_token, "token_quant", "x"),
        empty=_empty_token,
        reference=reference.token_quant,
        implementations=(cuda("token_quant"), triton(_KERNELS + "token_quant")),
    ),
    _check_token,
)
TENSOR_QUANT = Scheme(
    library.define(
        tensor_quant,
        f"(Tensor x, *, {DYNAMIC_KEYWORDS}) -> (Tensor q, Tensor scale)",
        check=partial(check_dynamic, "tensor_quant", "x"),
        empty=_empty_tensor,
        reference=reference.tensor_quant,
        implementations=(cuda("tensor_quant"), triton(_KERNELS + "tensor_quant")),
    ),
    check_dynamic,
)
TENSOR_QUANT_STATIC = Scheme(
    library.define(
        tensor_quant_static,
        "(Tensor x, Tensor scale, *, ScalarType dtype=float8_e4m3fn, str code_mode='divide')"
        " -> Tensor",
        check=partial(_check_static, "tensor_quant_static", "x"),
        empty=_empty_static,
        reference=reference.tensor_quant_static,
        implementations=(cuda("tensor_quant_static"), triton(_KERNELS + "tensor_quant_static")),
    ),
    _check_static,
)
