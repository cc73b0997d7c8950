"""block_scaled_mm on DeepGEMM (`pip install sgl-deep-gemm`), for Hopper.

DeepGEMM compiles a kernel when it first meets a problem, which must not happen inside a CUDA graph
capture: a shape that has not run before the capture is an error there, not a compilation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from custom_ops import platform
from custom_ops.platform import on_device
from custom_ops.scales import as_rows, has_layout, known, pitch_of

# TMA reads and writes rows whose pitch is a multiple of 16 bytes.
_K_MULTIPLE = 16
_N_MULTIPLE = 8

# (device index, M, N, K) of the problems whose kernel has been compiled and loaded in this process.
compiled: set[tuple[int, int, int, int]] = set()


def needs_hopper(device: torch.device) -> str | None:
    """Why a library with float32 block scales cannot run on a device, or None."""
    if device.type != "cuda":
        return f"needs a CUDA tensor, this one is on {device.type}"
    capability = platform.cuda_capability(device)
    if capability != (9, 0):
        # Blackwell wants UE8M0 scales; the scales here are float32 and are never changed silently.
        return f"needs compute capability 9.0 for float32 scales, here is {capability}"
    return None


def unavailable(device: torch.device) -> str | None:
    """Why DeepGEMM cannot run on a device, or None."""
    if reason := needs_hopper(device):
        return reason
    if not platform.has_deep_gemm():
        return "deep_gemm is not installed (pip install sgl-deep-gemm apache-tvm-ffi)"
    return None


def unsupported(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *, out_dtype: torch.dtype
) -> str | None:
    """Why DeepGEMM cannot take these arguments, or None. Symbolic sizes must be statically known to fit."""
    if out_dtype != torch.bfloat16:
        return f"writes torch.bfloat16, out_dtype is {out_dtype}"
    (n, k) = b.shape
    if not (known(k > 0) and known(k % _K_MULTIPLE == 0)):
        return f"needs K a positive multiple of {_K_MULTIPLE} (TMA), K is {k}"
    if not (known(n > 0) and known(n % _N_MULTIPLE == 0)):
        return f"needs N a positive multiple of {_N_MULTIPLE} (TMA), N is {n}"
    return None


def load() -> Callable[..., Tensor]:
    """Import DeepGEMM and start its runtime.

    The runtime keeps a workspace of 32 MiB that it allocates when it is first used. In a first call under
    `mode="reduce-overhead"` that memory would come from the CUDA graph's pool, and Inductor rightly refuses
    a tensor that lives there unseen; so it is allocated here, when the op is made ready.
    """
    import deep_gemm

    deep_gemm.get_num_sms()
    return block_scaled_mm


def block_scaled_mm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *, out_dtype: torch.dtype
) -> Tensor:
    """As `custom_ops.block_scaled_mm`. Reads a_scale in place when it is column_major_tma; otherwise
    DeepGEMM transposes it into that layout with a kernel of its own. Strided codes are copied.

    Raises RuntimeError for a problem that would be compiled inside a CUDA graph capture.
    """
    import deep_gemm

    n, k = b.shape
    rows = as_rows(a).contiguous()
    m = rows.shape[0]
    out = torch.empty((*a.shape[:-1], n), dtype=out_dtype, device=a.device)
    if m == 0:
        return out
    problem = (a.device.index, m, n, k)
    if problem not in compiled and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"block_scaled_mm: DeepGEMM has not run M={m}, N={n}, K={k} yet and may have to compile "
            "a kernel for it, which must not happen while a CUDA graph is captured; run the op once "
            "with these sizes before the capture"
        )
    left = (rows, _scale_rows(a_scale, m))
    right = (b.contiguous(), b_scale.contiguous())
    with on_device(a):
        deep_gemm.fp8_gemm_nt(left, right, out.view(m, n))
    compiled.add(problem)
    return out


def _scale_rows(a_scale: Tensor, m: int) -> Tensor:
    """a_scale as [M, G]. Spelled out for the TMA-aligned layout: with one token a view may take any
    stride for the tokens, and DeepGEMM would transpose what is in place already.
    """
    if a_scale.dim() == 2 and a_scale.stride(0) == 1:
        return a_scale
    groups = a_scale.shape[-1]
    if has_layout(a_scale, "column_major_tma"):
        return a_scale.as_strided((m, groups), (1, pitch_of(m, "column_major_tma")))
    return a_scale.reshape(m, groups)
