"""block_scaled_mm on FlashInfer (`pip install flashinfer-python`, 0.6.6), for Hopper.

Of FlashInfer's FP8 products one fits what the ops here promise on Hopper: `gemm.fp8_blockscale_gemm_sm90`, which is
TensorRT-LLM's build of DeepGEMM and multiplies by the transposed problem below 32 tokens. The others do not:
`gemm_fp8_nt_groupwise` and `gemm_fp8_nt_blockscaled` ask for SM100 and newer (flashinfer/gemm/gemm_base.py, 0.6.6), and
`bmm_fp8`, one scale for each tensor, sets cuBLASLt's fast accumulation (include/flashinfer/gemm/bmm_fp8.cuh), where
`scaled_mm` promises partial sums in float32: with it, it would be the same library as `torch._scaled_mm`.

It runs only where a table in `custom_ops/tables` says that it was the fastest, and stands first then. It compiles for
minutes when it first runs, which a warm-up does ahead, and again for each new N x K, of which the warm-up says that it
does not cover it; inside a CUDA graph capture either is an error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops import platform, tables
from custom_ops.gemm.deep_gemm import needs_hopper
from custom_ops.gemm.reference import BLOCK
from custom_ops.platform import on_device
from custom_ops.scales import as_rows, known, pitch_of, to_layout

KIND = "float8_e4m3fn block"
"""How the tables call the product."""
UNNAMED = "FlashInfer compiles block-scaled products by itself, for every N x K"
_N_MULTIPLE = 64
_LAYOUT = "column_major_tma"

# (device index, M, N, K) of what has run in this process: nothing is left to compile.
compiled: set[tuple[object, ...]] = set()


def unavailable(device: torch.device) -> str | None:
    """Why FlashInfer cannot run on a device, or None. Does not import it, which takes seconds."""
    if reason := needs_hopper(device):
        return reason
    if not platform.has_package("flashinfer"):
        return "flashinfer is not installed (pip install flashinfer-python)"
    version = tuple(int(part) for part in (torch.version.cuda or "0").split(".")[:2])
    if version < (12, 8):
        return f"needs CUDA 12.8, torch was built with {torch.version.cuda}"
    return None


def unsupported(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *, out_dtype: torch.dtype
) -> str | None:
    """Why it cannot take these arguments, or is not known to be the fastest with them; None otherwise."""
    if reason := impossible(a, a_scale, b, b_scale, out_dtype=out_dtype):
        return reason
    (n, k), m = b.shape, a.numel() // b.shape[1]
    capability = platform.cuda_capability(a.device) or (9, 0)
    best = tables.best("block_scaled_mm", KIND, capability, m, n, k)
    # it compiles for each N x K, so what another one took is no reason to
    if best is None or best.implementation != "flashinfer" or not best.exact:
        return (
            f"was not measured to be the fastest for M = {m}, N = {n}, K = {k} (custom_ops/tables)"
        )
    return None


def impossible(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *, out_dtype: torch.dtype
) -> str | None:
    """Why it cannot take these arguments at all, or None."""
    if out_dtype != torch.bfloat16:
        return f"writes torch.bfloat16, out_dtype is {out_dtype}"
    n, k = b.shape
    if not (isinstance(n, int) and isinstance(k, int) and isinstance(a.numel(), int)):
        return "a size is not known yet"
    if not (known(k > 0) and k % BLOCK == 0 and n > 0 and n % _N_MULTIPLE == 0):
        return f"needs K a multiple of {BLOCK} and N of {_N_MULTIPLE}; b is {n} x {k}"
    if a.numel() == 0:
        return "there is nothing to multiply"
    return None


def block_scaled_mm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *, out_dtype: torch.dtype
) -> Tensor:
    """As `custom_ops.block_scaled_mm`. Copies scales that are not column_major_tma, and strided codes.

    Raises RuntimeError inside a CUDA graph capture for a problem that has not run yet.
    """
    from custom_ops.jit import flashinfer as modules
    from custom_ops.jit import tracing

    n, k = b.shape
    out = torch.empty((*a.shape[:-1], n), dtype=out_dtype, device=a.device)
    if (trace := tracing.current()) is not None:
        modules.note(trace, "block_scaled_mm", "fp8_blockscale_gemm_90", UNNAMED)
        return out
    rows = as_rows(a).contiguous()
    m = rows.shape[0]
    problem = (a.device.index, m, n, k)
    if problem not in compiled and a.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"block_scaled_mm: FlashInfer has not run M = {m}, N = {n}, K = {k} yet and may have to compile a kernel, "
            "which must not happen while a CUDA graph is captured; run the op once before the capture"
        )
    from flashinfer.gemm import fp8_blockscale_gemm_sm90

    if problem not in compiled:
        modules.first_call("block_scaled_mm", "fp8_blockscale_gemm_90")
    with on_device(a):
        fp8_blockscale_gemm_sm90(
            rows,
            b.contiguous(),
            _columns(a_scale, m),
            b_scale.contiguous(),
            out=out.view(m, n),
        )
    compiled.add(problem)
    return out


def _columns(a_scale: Tensor, m: int) -> Tensor:
    """a_scale as [M, G], one token beside the next and groups a multiple of 16 bytes apart."""
    groups = a_scale.shape[-1]
    pitch = pitch_of(m, _LAYOUT)
    return to_layout(a_scale, _LAYOUT).as_strided((m, groups), (1, pitch))
