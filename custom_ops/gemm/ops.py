"""Block-scaled FP8 matrix product: the linear layer of DeepSeek-V3 style FP8 checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops import library
from custom_ops.gemm import cublaslt, deep_gemm, reference
from custom_ops.gemm.reference import BLOCK
from custom_ops.implementation import Implementation, triton
from custom_ops.quantization.ops import check_device
from custom_ops.scales import known

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def block_scaled_mm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """(a * a_scale) @ (b * b_scale).T with 1 x 128 scales for a and 128 x 128 scales for b.

    a: float8_e4m3fn, [..., K]. a_scale: float32, [..., ceil(K / 128)], in any layout of
    `custom_ops.scales` (recognised by its strides). b: float8_e4m3fn, [N, K]. b_scale: float32,
    [ceil(N / 128), ceil(K / 128)]. K and N of any size, any strides. out_dtype: bfloat16, float16 or
    float32. Returns [..., N], contiguous:

        out = out_dtype(sum_k float32(a * a_scale) * float32(b * b_scale))

    The dequantized operands are not rounded to bfloat16 on the way, unlike in eager dequantize-and-matmul,
    which makes the result closer to float64. Order and precision of the sum are the implementation's: on
    Hopper the tensor cores keep about 14 bits within 128 channels, and float32 between them. With
    DeepGEMM and Triton a row gives the same bits in any batch; the reference calls a BLAS, which
    promises no such thing.

    Implementations: cuBLASLt (Hopper, the few shapes that DeepGEMM is slow at), DeepGEMM (Hopper; reads
    "column_major_tma" scales as they are and transposes other layouts with one more small kernel), Triton
    (any strides), reference. Raises ValueError for another dtype, shape or device.
    Source: arXiv:2412.19437, section 3.3.2.
    """
    return torch.ops.custom_ops.block_scaled_mm(a, a_scale, b, b_scale, out_dtype=out_dtype)


def _check(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *, out_dtype: torch.dtype
) -> None:
    op = "block_scaled_mm"
    device = a.device
    for name, tensor, dtype in (
        ("a", a, torch.float8_e4m3fn),
        ("a_scale", a_scale, torch.float32),
        ("b", b, torch.float8_e4m3fn),
        ("b_scale", b_scale, torch.float32),
    ):
        if tensor.dtype is not dtype:
            raise ValueError(f"{op}: {name}.dtype is {tensor.dtype}; accepted: {dtype}")
        if tensor.device != device:
            check_device(op, name, tensor, "a", a)
    if out_dtype not in OUT_DTYPES:
        accepted = ", ".join(map(str, OUT_DTYPES))
        raise ValueError(f"{op}: out_dtype is {out_dtype}; accepted: {accepted}")
    if a.dim() < 1:
        raise ValueError(f"{op}: a has no dimension; accepted: [..., K]")
    if b.dim() != 2:
        raise ValueError(f"{op}: b has {b.dim()} dimensions; accepted: 2, [N, K]")
    k_blocks = -(-a.shape[-1] // BLOCK)
    _check_shape("b", b, (b.shape[0], a.shape[-1]))
    _check_shape("a_scale", a_scale, (*a.shape[:-1], k_blocks))
    _check_shape("b_scale", b_scale, (-(-b.shape[0] // BLOCK), k_blocks))


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    sizes = tensor.shape
    same = len(sizes) == len(shape)
    for have, want in zip(sizes, shape, strict=False):
        same = same and not known(have != want)
    if not same:
        raise ValueError(
            f"block_scaled_mm: {name}.shape is {tuple(sizes)}; accepted: {shape} (a is [..., K], "
            "a_scale [..., ceil(K / 128)], b [N, K], b_scale [ceil(N / 128), ceil(K / 128)])"
        )


def _empty(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *, out_dtype: torch.dtype
) -> Tensor:
    return torch.empty((*a.shape[:-1], b.shape[0]), dtype=out_dtype, device=a.device)


def preferred_scale_layout(device: torch.device | str | int | None = None) -> str:
    """The scale layout of a that block_scaled_mm reads fastest on a device.

    "column_major_tma" where DeepGEMM or cuBLASLt would run, else "row_major".
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return "column_major_tma" if {"cublaslt", "deep_gemm"} & set(OP.usable(where)) else "row_major"


OP = library.define(
    block_scaled_mm,
    "(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, *, ScalarType out_dtype=bfloat16) -> Tensor",
    check=_check,
    empty=_empty,
    reference=reference.block_scaled_mm,
    implementations=(
        Implementation(
            "cublaslt", lambda: cublaslt.block_scaled_mm, cublaslt.unavailable, cublaslt.unsupported
        ),
        Implementation(
            "deep_gemm",
            deep_gemm.load,
            deep_gemm.unavailable,
            deep_gemm.unsupported,
        ),
        triton("custom_ops.gemm.triton_kernels:block_scaled_mm"),
    ),
)
