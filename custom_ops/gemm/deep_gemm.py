"""block_scaled_mm on DeepGEMM (`pip install sgl-deep-gemm`), for Hopper.

DeepGEMM compiles a kernel when it first meets one. `custom_ops.jit.deep_gemm` knows which kernel that is: a
warm-up compiles it ahead, a compilation after a warm-up is counted, and inside a CUDA graph capture a kernel that
is not loaded is an error, not a compilation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from custom_ops import platform
from custom_ops.gemm.reference import BLOCK
from custom_ops.platform import on_device
from custom_ops.scales import as_rows, empty_scale, has_layout, known, pitch_of

# TMA reads and writes rows whose pitch is a multiple of 16 bytes.
_K_MULTIPLE = 16
_N_MULTIPLE = 8

# (device index, M, N, K, strides of the scales) of what has run in this process: nothing is left to compile.
compiled: set[tuple[object, ...]] = set()


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

    Raises RuntimeError for a kernel that would be compiled or loaded inside a CUDA graph capture, JitError
    for one that would be compiled after a strict warm-up.
    """
    n, k = b.shape
    rows = as_rows(a).contiguous()
    m = rows.shape[0]
    out = torch.empty((*a.shape[:-1], n), dtype=out_dtype, device=a.device)
    if m == 0:
        return out
    scale = _scale_rows(a_scale, m)
    left, right = (rows, scale), (b.contiguous(), b_scale.contiguous())
    problem = (a.device.index, m, n, k, scale.stride())
    if problem in compiled:
        _run(left, right, out.view(m, n))
    else:
        _first(left, right, out.view(m, n))
        compiled.add(problem)
    return out


def _run(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], out: Tensor) -> None:
    import deep_gemm

    with on_device(out):
        deep_gemm.fp8_gemm_nt(left, right, out)


def _first(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], out: Tensor) -> None:
    """The first run of a problem in this process, watched for what it compiles."""
    from custom_ops.jit import deep_gemm_first_call as jit

    (m, n), k, scale = out.shape, left[0].shape[1], left[1]
    in_place = scale.stride() == (1, pitch_of(m, "column_major_tma")) and scale.shape[1] > 1
    transposes = scale.is_contiguous() and not in_place
    capturing = torch.cuda.is_current_stream_capturing()
    with jit.first_call(out.device.index, m, n, k, transposes, capturing):
        _run(left, right, out)


def run_once(m: int, n: int, k: int, scale_layout: str) -> None:
    """Run one problem on zeros, on the current GPU, which loads its kernel and compiles it if it must."""
    groups = -(-k // BLOCK)
    a = torch.zeros(m, k, dtype=torch.float8_e4m3fn, device="cuda")
    b = torch.zeros(n, k, dtype=torch.float8_e4m3fn, device="cuda")
    a_scale = empty_scale((m,), groups, scale_layout, a.device)
    b_scale = torch.ones(-(-n // BLOCK), groups, device="cuda")
    block_scaled_mm(a, a_scale, b, b_scale, out_dtype=torch.bfloat16)


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
