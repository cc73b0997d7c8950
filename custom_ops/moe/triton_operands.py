"""Weights and rows as the expert kernels take them: descriptors for the tensor memory accelerator, or pointers."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from custom_ops.moe.tiles import Tile
from custom_ops.platform import cuda_capability
from custom_ops.triton_math import native_fp8

GROUP = 128
_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def hopper(x: Tensor) -> bool:
    """Whether the device has the tensor memory accelerator, and kernels that start before their predecessor ends."""
    return x.device.type == "cuda" and (cuda_capability(x.device) or (0, 0)) >= (9, 0)


def descriptors(x: Tensor) -> bool:
    """Whether kernels there read by descriptors: apart from `hopper`, as Triton's interpreter checks such reads too."""
    return hopper(x)


def constants(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    w_scale: Tensor | None,
    dtype: torch.dtype,
    tile: Tile,
) -> dict[str, Any]:
    """What both grouped kernels have to know at compile time, and how they are compiled and launched."""
    scaled = w_scale is not None and w_scale.dim() == 3
    if scaled and tile.k != GROUP:
        raise ValueError(f"experts: tile.k is {tile.k}; accepted with block scales: {GROUP}")
    pdl = hopper(rows)
    return {
        "T": _TRITON_DTYPES[dtype],
        "NATIVE_FP8": native_fp8(rows),
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "SWAP": tile.swap,
        "TMA": weight_by_descriptor(weight, tile),
        "N_INNER": n_inner(weight),
        "EVEN_K": weight.shape[2] % tile.k == 0,
        "SCALED": scaled,
        "CHANNEL": w_scale is not None and not scaled,
        "BIAS": bias is not None,
        "KEEP": tile.keep,
        "BAND": tile.band,
        "HALVE": tile.halve,
        "PDL": pdl,
        "AHEAD": tile.ahead if asked_for(rows, weight, tile) is not None else 0,
        "LINE": 128 // weight.element_size(),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        **({"launch_pdl": True} if pdl else {}),
    }


def asked_for(rows: Tensor, weight: Tensor, tile: Tile) -> Tensor | None:
    """The weight whose rows a kernel asks for before it may run; None where it does not."""
    asks = tile.ahead and weight_by_descriptor(weight, tile) and not n_inner(weight)
    return pointer(weight) if asks else None


def resident(tile: Tile, shared_rows: int, rows: Tensor, weight: Tensor) -> int:
    """About how many programs are on the GPU at once, by the shared memory that the stages of `fitting` take."""
    if rows.device.type != "cuda":
        return 0
    itemsize = max(rows.element_size(), weight.element_size())
    return _resident(tile, shared_rows, itemsize, rows.device)


@functools.lru_cache(maxsize=1024)
def _resident(tile: Tile, rows: int, itemsize: int, device: torch.device) -> int:
    properties = _properties(device)
    stages = tile.stages * rows * tile.k * itemsize
    return int(
        properties["multiprocessor_count"] * max(1, properties["max_shared_mem"] // max(stages, 1))
    )


def fitting(tile: Tile, shared_rows: int, rows: Tensor, weight: Tensor) -> Tile:
    """The tile with as many stages as the device has shared memory for."""
    if rows.device.type != "cuda":
        return tile
    itemsize = max(rows.element_size(), weight.element_size())
    return _bounded(tile, shared_rows, itemsize, rows.device)


@functools.lru_cache(maxsize=1024)
def _bounded(tile: Tile, rows: int, itemsize: int, device: torch.device) -> Tile:
    return tile.within(rows, itemsize, _properties(device)["max_shared_mem"])


def _properties(device: torch.device) -> dict[str, int]:
    index = torch.cuda.current_device() if device.index is None else device.index
    found: dict[str, int] = triton.runtime.driver.active.utils.get_device_properties(index)
    return found


def rows_by_descriptor(rows: Tensor, tile: Tile) -> bool:
    """Whether [M, K] rows are read by the tensor memory accelerator: 16-byte pointer and pitch."""
    pitch = rows.stride(0) * rows.element_size()
    return tile.tma and descriptors(rows) and pitch % 16 == 0 and rows.data_ptr() % 16 == 0


def rows_operands(rows: Tensor, block: int, tile: Tile) -> tuple[Any, Any]:
    """[M, K] rows as a kernel takes them, for whole blocks and for halves: descriptors, or their pointer twice."""
    codes = pointer(rows)
    if not rows_by_descriptor(rows, tile):
        return codes, codes
    shape, strides = list(codes.shape), list(codes.stride())
    whole = TensorDescriptor(codes, shape, strides, [block, tile.k])
    if not tile.halve:
        return whole, whole
    return whole, TensorDescriptor(codes, shape, strides, [block // 2, tile.k])


def weight_by_descriptor(weight: Tensor, tile: Tile) -> bool:
    """Whether the tensor memory accelerator reads [E, N, K] weights: also, N or K lies in one piece.

    Each box that it reads begins at 16 bytes, or the kernel ends in an illegal instruction: so does the upper half of
    gate_up, in the middle of N, where N is what lies in one piece.
    """
    if not tile.tma or not descriptors(weight):
        return False
    inner = 1 if n_inner(weight) else 2
    pitches = [weight.stride(i) for i in (0, 1, 2) if i != inner]
    starts = [*pitches, weight.shape[1] // 2] if inner == 1 else pitches
    aligned = all(s * weight.element_size() % 16 == 0 for s in starts) and min(pitches) > 0
    return weight.stride(inner) == 1 and aligned and weight.data_ptr() % 16 == 0


def of_both(tile: Tile, up: Tensor | None) -> Tile:
    """The tile, without the accelerator where that cannot read up, which lies in the strides of gate."""
    return tile if up is None or weight_by_descriptor(up, tile) else replace(tile, tma=False)


def weight_operand(weight: Tensor, columns: int, tile: Tile) -> Any:
    """[E, N, K] weights as a kernel takes them: a descriptor of tiles of so many columns, or their pointer."""
    codes = pointer(weight)
    if not weight_by_descriptor(weight, tile):
        return codes
    e, n, k = weight.stride()
    experts, outputs, channels = weight.shape
    if n_inner(weight):
        shape, strides, block = [experts, channels, outputs], [e, k, n], [1, tile.k, columns]
    else:
        shape, strides, block = [experts, outputs, channels], [e, n, k], [1, columns, tile.k]
    return TensorDescriptor(codes, shape, strides, block)


def n_inner(weight: Tensor) -> bool:
    """Whether [E, N, K] lies as [E, K, N]."""
    return weight.stride(1) == 1 and weight.stride(2) != 1


def pointer(x: Tensor) -> Tensor:
    """FP8 codes as bytes where the device does not know FP8."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn and not native_fp8(x) else x


def vector(x: Tensor | None) -> Tensor | None:
    """A bias [E, N], or the scales [E, N] of channels, in one piece; the scales of blocks as they are."""
    return x.contiguous() if x is not None and x.dim() == 2 else x


def strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    """Of a tensor that may be missing or have fewer dimensions."""
    return (0,) * dims if x is None else (*x.stride(), *(0,) * (dims - x.dim()))
