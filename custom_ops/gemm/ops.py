"""Matrix products of quantized operands: block-scaled (DeepSeek-V3 style), and with a scale per token and channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from custom_ops import library
from custom_ops.gemm import (
    cublaslt,
    deep_gemm,
    flashinfer_sm90,
    reference,
    scaled_mm_cublaslt,
)
from custom_ops.gemm.reference import BLOCK
from custom_ops.implementation import Implementation, triton
from custom_ops.quantization.checks import check_choice, check_device
from custom_ops.scales import known

OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CODE_DTYPES = (torch.float8_e4m3fn, torch.int8)
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPILOGUES = ("float32", "out_dtype", "out_dtype_between")
# A product of two int8 codes is at most 2^14, so that an int32 holds the sum of fewer than 2^17 of them.
MAX_INT8_K = 2**17 - 1


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

    Implementations: FlashInfer (Hopper, where the tables in `custom_ops/tables` have it as the fastest), cuBLASLt
    (Hopper, the few shapes that DeepGEMM is slow at), DeepGEMM (Hopper; reads
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
            "flashinfer",
            lambda: flashinfer_sm90.block_scaled_mm,
            flashinfer_sm90.unavailable,
            flashinfer_sm90.unsupported,
        ),
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


def scaled_mm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    epilogue: str = "float32",
) -> Tensor:
    """(a * a_scale) @ (b * b_scale).T + bias, with one scale per tensor, token or output channel.

    a: float8_e4m3fn or int8, [..., K]. a_scale: one element (per tensor), or [..., 1] (per token). b: of the dtype
    of a, [N, K], as `torch.nn.Linear` keeps weights. b_scale: one element, or [N] or [N, 1] (per channel). Scales are
    float32, bfloat16 or float16, and read as float32. bias: [N], of out_dtype or float32. Any strides. out_dtype:
    bfloat16, float16 or float32. K: any for float8; up to 131071 for int8, so that no sum leaves int32. Returns
    [..., N], contiguous. With fl() one rounding to float32 and T one to out_dtype:

        sum = sum_k a * b                                   int8: exact; float8: a float32
        epilogue "float32":    out = T(fl(fl(fl(sum) * a_scale) * b_scale) [+ bias, once more rounded to float32])
        epilogue "out_dtype":  out = T(T(T(sum) * a_scale) * b_scale), then T(out + bias)
        epilogue "out_dtype_between":  out = T(T(fl(sum) * a_scale) * b_scale), then T(out + bias)

    The second is what eager PyTorch computes for `torch._int_mm(a, b.T) * a_scale * b_scale + bias` with 16-bit
    scales, the third what torchao's Int8Tensor does with float32 ones. int8 has the same bits in every implementation
    and any batch. For float8, order and precision of the sum are the implementation's, and cuBLASLt (which does not say
    in which order it multiplies the scales either) picks its kernel by the number of tokens, so that a row may differ
    in the last bits from one batch to another. All of them promote partial sums to float32, at the latest after 128
    channels: cuBLASLt runs with `use_fast_accum=False`, as the dequantize-and-multiply that this op stands for sums in
    float32. A graph that calls `torch._scaled_mm` itself keeps its call, and the `use_fast_accum` that it asked for.

    Implementations: cuBLASLt (`torch._scaled_mm`; `torch._int_mm` and a kernel for the scales), Triton, reference; why
    none of FlashInfer's is among them on Hopper, `custom_ops.gemm.flashinfer_sm90` says. The tables in
    `custom_ops/tables` say which is faster where. Raises ValueError for another dtype, shape or device.
    """
    return torch.ops.custom_ops.scaled_mm(
        a, a_scale, b, b_scale, bias, out_dtype=out_dtype, epilogue=epilogue
    )


def _check_scaled(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    epilogue: str,
) -> None:
    op = "scaled_mm"
    check_choice(op, "a.dtype", a.dtype, CODE_DTYPES)
    check_choice(op, "b.dtype", b.dtype, (a.dtype,))
    check_choice(op, "a_scale.dtype", a_scale.dtype, SCALE_DTYPES)
    check_choice(op, "b_scale.dtype", b_scale.dtype, SCALE_DTYPES)
    check_choice(op, "out_dtype", out_dtype, OUT_DTYPES)
    check_choice(op, "epilogue", epilogue, EPILOGUES)
    operands = {"a_scale": a_scale, "b": b, "b_scale": b_scale}
    for name, tensor in (operands | ({} if bias is None else {"bias": bias})).items():
        check_device(op, name, tensor, "a", a)
    if a.dim() < 1:
        raise ValueError(f"{op}: a has no dimension; accepted: [..., K]")
    if b.dim() != 2:
        raise ValueError(f"{op}: b has {b.dim()} dimensions; accepted: 2, [N, K]")
    n, k = b.shape
    require_one_of(op, "b", b, [(n, a.shape[-1])])
    if a.dtype == torch.int8 and known(k > MAX_INT8_K):
        raise ValueError(f"{op}: K is {k}; accepted for int8: up to {MAX_INT8_K}")
    if not one_element(a_scale):
        require_one_of(op, "a_scale", a_scale, [(*a.shape[:-1], 1)], "or one element")
    if not one_element(b_scale):
        require_one_of(op, "b_scale", b_scale, [(n,), (n, 1)], "or one element")
    if bias is not None:
        check_choice(op, "bias.dtype", bias.dtype, tuple(dict.fromkeys((out_dtype, torch.float32))))
        require_one_of(op, "bias", bias, [(n,)])


def one_element(scale: Tensor) -> bool:
    """Whether a scale certainly is one number for the whole tensor."""
    return known(scale.numel() == 1)


def require_one_of(
    op: str, name: str, tensor: Tensor, shapes: Sequence[tuple[int, ...]], more: str = ""
) -> None:
    """Raises ValueError where a tensor certainly has none of these shapes."""
    for shape in shapes:
        if tensor.dim() == len(shape) and not any(
            known(have != want) for have, want in zip(tensor.shape, shape, strict=True)
        ):
            return
    accepted = ", ".join([*map(str, shapes), *([more] if more else [])])
    raise ValueError(f"{op}: {name}.shape is {tuple(tensor.shape)}; accepted: {accepted}")


def _empty_scaled(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    epilogue: str,
) -> Tensor:
    return torch.empty((*a.shape[:-1], b.shape[0]), dtype=out_dtype, device=a.device)


SCALED_MM = library.define(
    scaled_mm,
    "(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor? bias=None, *, "
    "ScalarType out_dtype=bfloat16, str epilogue='float32') -> Tensor",
    check=_check_scaled,
    empty=_empty_scaled,
    reference=reference.scaled_mm,
    implementations=(
        Implementation(
            "cublaslt",
            lambda: scaled_mm_cublaslt.scaled_mm,
            scaled_mm_cublaslt.unavailable,
            scaled_mm_cublaslt.unsupported,
        ),
        triton("custom_ops.gemm.scaled_mm_triton:scaled_mm"),
    ),
)
