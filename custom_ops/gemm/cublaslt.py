"""block_scaled_mm on cuBLASLt (`torch._scaled_mm`, CUDA 12.9 or newer), for Hopper.

It stands before DeepGEMM, and takes only what DeepGEMM is slow at: where 256 x 128 tiles fill one wave of
the multiprocessors, DeepGEMM picks them and turns multicast off, and the L2 cache becomes the limit. On an
H100 (DeepGEMM 0.1.4 against cuBLASLt, microseconds, M x N x K): 1024 x 4096 x 4096 90 : 28,
1024 x 4096 x 14336 288 : 99, 4096 x 1024 x 4096 91 : 29; elsewhere DeepGEMM is ahead or within 10%
(4096 x 14336 x 4096 361 : 404, 64 x 4096 x 4096 7.0 : 13.6). Without DeepGEMM it takes all it can.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from custom_ops.gemm import deep_gemm
from custom_ops.scales import as_rows, known

_TILE_M, _TILE_N = 256, 128


def unavailable(device: torch.device) -> str | None:
    """Why cuBLASLt cannot run block-scaled products on a device, or None."""
    if reason := deep_gemm.needs_hopper(device):
        return reason
    version = tuple(int(part) for part in (torch.version.cuda or "0").split(".")[:2])
    if version < (12, 9):
        return f"needs CUDA 12.9, torch was built with {torch.version.cuda}"
    return None


def unsupported(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *, out_dtype: torch.dtype
) -> str | None:
    """Why it cannot take these arguments, or leaves them to DeepGEMM; None otherwise."""
    if out_dtype != torch.bfloat16:
        return f"writes torch.bfloat16, out_dtype is {out_dtype}"
    (n, k), m = b.shape, a.numel() // max(1, b.shape[1]) if isinstance(b.shape[1], int) else None
    if not (
        isinstance(n, int) and isinstance(k, int) and k and k % 512 == 0 and n and n % 128 == 0
    ):
        return f"needs K a multiple of 512 and N of 128, so that scales lie 16 bytes apart; b is {n} x {k}"
    if not isinstance(m, int):
        return "the number of tokens is not known yet"
    if m == 0 or m % 4:
        return f"needs a number of tokens divisible by 4 (16 bytes of scales), not {m}"
    if not known(a_scale.stride(-1) == m):
        return "needs column-major scales"
    if deep_gemm.unavailable(a.device) is None and not _one_wave(m, n, a.device):
        return f"DeepGEMM is faster for M = {m}, N = {n}"
    return None


def _one_wave(m: int, n: int, device: torch.device) -> bool:
    tiles = -(-m // _TILE_M) * -(-n // _TILE_N)
    count = _multiprocessors(device)
    return count // 2 < tiles <= count


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def block_scaled_mm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *, out_dtype: torch.dtype
) -> Tensor:
    """As `custom_ops.block_scaled_mm`, for column-major scales whose pitch is the number of tokens."""
    rows = as_rows(a).contiguous()
    m, groups = rows.shape[0], a_scale.shape[-1]
    out = torch._scaled_mm(
        rows,
        b.contiguous().t(),
        a_scale.as_strided((m, groups), (1, m)),
        b_scale.contiguous().t(),
        out_dtype=out_dtype,
        use_fast_accum=False,
    )
    return out.view(*a.shape[:-1], b.shape[0])
