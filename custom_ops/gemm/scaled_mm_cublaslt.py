"""scaled_mm on cuBLASLt, as PyTorch calls it: `torch._scaled_mm` for float8, `torch._int_mm` for int8.

`_int_mm` returns int32 sums, which a Triton kernel then scales: one more pass over the output, which a fused Triton
product saves. Which of the two is faster depends on the shape; `custom_ops.tables` knows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops import platform
from custom_ops.gemm.scaled_mm_choice import preferred
from custom_ops.platform import on_device
from custom_ops.scales import as_rows

# cuBLASLt reads 8-bit rows in vectors of 16 bytes.
_FP8_MULTIPLE = 16
# What torch._int_mm checks.
_INT8_MULTIPLE, _INT8_MIN_TOKENS = 8, 17
_ALIGNMENT_BYTES = 16


def unavailable(device: torch.device) -> str | None:
    """Why cuBLASLt cannot run scaled products on a device, or None."""
    if device.type != "cuda":
        return f"needs a CUDA tensor, this one is on {device.type}"
    capability = platform.cuda_capability(device)
    if capability is None or capability < (8, 0):
        return f"needs a GPU of compute capability 8.0 or newer, here is {capability}"
    return None


def unsupported(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    epilogue: str,
) -> str | None:
    """Why it cannot take these arguments, or leaves them to Triton; None otherwise."""
    reason = impossible(a, a_scale, b, b_scale, bias, out_dtype=out_dtype, epilogue=epilogue)
    if reason:
        return reason
    winner = preferred(a, a_scale, b, b_scale)
    if winner is not None and winner.implementation == "triton" and _triton_runs(a.device):
        m, (n, k) = a.numel() // b.shape[1], b.shape
        return f"Triton is faster for M = {m}, N = {n}, K = {k} (custom_ops/tables)"
    return None


def impossible(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    epilogue: str,
) -> str | None:
    """Why it cannot take these arguments at all, or None."""
    n, k = b.shape
    if not (isinstance(n, int) and isinstance(k, int) and isinstance(a.numel(), int)):
        return "a size is not known yet"
    if a.numel() == 0 or n == 0:
        return "there is nothing to multiply"
    if a.dtype == torch.int8:
        return _impossible_int8(a.numel() // k, n, k)
    if k % _FP8_MULTIPLE or n % _FP8_MULTIPLE:
        return f"needs N and K multiples of {_FP8_MULTIPLE}, they are {n} and {k}"
    return _impossible_fp8(a, a_scale, b_scale, bias, out_dtype, epilogue)


def _impossible_int8(m: int, n: int, k: int) -> str | None:
    if m < _INT8_MIN_TOKENS:
        return f"torch._int_mm needs {_INT8_MIN_TOKENS} tokens or more, here are {m}"
    if n % _INT8_MULTIPLE or k % _INT8_MULTIPLE:
        return f"needs N and K multiples of {_INT8_MULTIPLE}, they are {n} and {k}"
    if not platform.has_triton():
        return "triton is not installed, and scales the int32 sums"
    return None


def _impossible_fp8(
    a: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    epilogue: str,
) -> str | None:
    capability = platform.cuda_capability(a.device) or (0, 0)
    per_tensor = a_scale.numel() == b_scale.numel() == 1
    needed = (8, 9) if per_tensor else (9, 0)
    if a.device.type == "cuda" and capability < needed:
        return f"needs compute capability {needed[0]}.{needed[1]} for these scales, here is {capability}"
    if epilogue != "float32":
        return f"multiplies in float32, epilogue is {epilogue!r}"
    if not a_scale.dtype == b_scale.dtype == torch.float32:
        return f"reads float32 scales, these are {a_scale.dtype} and {b_scale.dtype}"
    if not per_tensor and out_dtype != torch.bfloat16:
        return f"writes torch.bfloat16 with scales per token or channel, out_dtype is {out_dtype}"
    if bias is not None and (bias.dtype != out_dtype or out_dtype == torch.float32):
        return f"adds a 16-bit bias of the output's dtype, not {bias.dtype} to {out_dtype}"
    return None


def _triton_runs(device: torch.device) -> bool:
    from custom_ops import library

    return "triton" in library.ops()["scaled_mm"].usable(device)


def scaled_mm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    epilogue: str,
) -> Tensor:
    """As `custom_ops.scaled_mm`. Copies codes that are strided or not on a boundary of 16 bytes."""
    rows, columns = _aligned(as_rows(a)), _aligned(b)
    with on_device(a):
        if a.dtype == torch.int8:
            from custom_ops.gemm.scaled_mm_triton import scale_sums

            sums = torch._int_mm(rows, columns.t())
            out = scale_sums(sums, a_scale, b_scale, bias, out_dtype=out_dtype, epilogue=epilogue)
        else:
            left, right = _fp8_scales(a_scale, b_scale, rows.shape[0], b.shape[0])
            out = torch._scaled_mm(
                rows,
                columns.t(),
                left,
                right,
                bias=None if bias is None else _aligned(bias),
                out_dtype=out_dtype,
                use_fast_accum=False,
            )
    return out.view(*a.shape[:-1], b.shape[0])


def _fp8_scales(a_scale: Tensor, b_scale: Tensor, m: int, n: int) -> tuple[Tensor, Tensor]:
    """Both per tensor or both per row, as `torch._scaled_mm` wants them: one number is repeated beside many."""
    if a_scale.numel() == b_scale.numel() == 1:
        return a_scale.reshape(()), b_scale.reshape(())
    left, right = a_scale.reshape(-1, 1).expand(m, 1), b_scale.reshape(1, -1).expand(1, n)
    return left.contiguous(), right.contiguous()


def _aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % _ALIGNMENT_BYTES == 0 else x.clone()
