"""Products of 8-bit operands, alone and as the linear layers that quantize their input."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import custom_ops
from bench.case import Case, Inputs, Target, Thunk, activation, close, same
from custom_ops.gemm.reference import BLOCK

TOKENS = (1, 16, 64, 256, 1024, 4096)
# The linears of a Llama-3-8B layer, N x K: q, k and v in one; the output; gate and up in one; down.
LLAMA = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
# What torchao leaves apart: k or v; gate or up.
APART = ((1024, 4096), (14336, 4096))
FP8, INT8 = torch.float8_e4m3fn, torch.int8
KINDS = ((FP8, "tensor"), (FP8, "token"), (INT8, "token"))


def block_scaled_mm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """Dequantize to bfloat16 and multiply, which is what a model without an FP8 kernel does."""
    wide_a = a.float() * a_scale.repeat_interleave(BLOCK, dim=-1)
    blocks = b_scale.repeat_interleave(BLOCK, dim=0).repeat_interleave(BLOCK, dim=1)
    return wide_a.to(torch.bfloat16) @ (b.float() * blocks).to(torch.bfloat16).t()


def raw_deep_gemm(inputs: Inputs) -> Thunk:
    """The library's own call on prepared operands and a preallocated result."""
    import deep_gemm

    a, a_scale, b, b_scale = inputs
    out = torch.empty(a.shape[0], b.shape[0], dtype=torch.bfloat16, device=a.device)
    return lambda: deep_gemm.fp8_gemm_nt((a, a_scale), (b, b_scale), out)


def linear(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def _operands(device: torch.device, m: int, n: int, k: int) -> Inputs:
    layout = custom_ops.gemm.preferred_scale_layout(device)
    a, a_scale = custom_ops.group_quant(activation(device, m, k), BLOCK, scale_layout=layout)
    weight = activation(device, n // BLOCK, BLOCK, k // BLOCK, BLOCK).float()
    b_scale = weight.abs().amax(dim=(1, 3)) / 448.0
    b = (weight / b_scale[:, None, :, None]).to(torch.float8_e4m3fn).reshape(n, k)
    return a, a_scale, b, b_scale


@lru_cache(maxsize=1)
def _module(device: torch.device, n: int, k: int) -> nn.Module:
    import fusion_passes

    model = nn.Sequential(nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16))
    fusion_passes.quantize_(model, "fp8_block")
    return model.eval()


def _linear_inputs(device: torch.device, m: int, n: int, k: int) -> Inputs:
    return _module(device, n, k), activation(device, m, k)


def scaled_mm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """Dequantize to bfloat16 and multiply, which is what a model without an 8-bit kernel does."""
    wide_a, wide_b = a.float() * a_scale, b.float() * b_scale
    return torch.nn.functional.linear(wide_a.to(torch.bfloat16), wide_b.to(torch.bfloat16))


def scaled_int_mm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """As torchao spells it, with 16-bit scales."""
    return torch._int_mm(a, b.t()) * a_scale * b_scale


def raw_scaled_mm(inputs: Inputs, fast: bool) -> Thunk:
    """PyTorch's own call on prepared operands."""
    a, a_scale, b, b_scale = inputs
    right = b_scale if b_scale.numel() == 1 else b_scale.t()
    return lambda: torch._scaled_mm(
        a, b.t(), a_scale, right, out_dtype=torch.bfloat16, use_fast_accum=fast
    )


def raw_int_mm(inputs: Inputs) -> Thunk:
    """The int32 sums alone, which nothing has scaled yet."""
    a, _, b, _ = inputs
    return lambda: torch._int_mm(a, b.t())


def one_way(inputs: Inputs, tile: str) -> Thunk:
    """scaled_mm by one Triton tile, or by cuBLASLt where tile is "": what `bench tune` chooses from."""
    from custom_ops.gemm import scaled_mm_cublaslt, scaled_mm_triton

    how: dict[str, Any] = {"out_dtype": torch.bfloat16, "epilogue": "float32"}
    if tile:
        return partial(scaled_mm_triton.scaled_mm, *inputs, **how, tile=tile)
    return partial(scaled_mm_cublaslt.scaled_mm, *inputs, **how)


def _codes(values: Tensor, dtype: torch.dtype, per_row: bool) -> Inputs:
    largest = 448.0 if dtype is FP8 else 127.0
    amax = values.float().abs().amax(-1, keepdim=True)
    scale = (amax if per_row else amax.amax().reshape(1, 1)) / largest
    codes = values.float() / scale
    return (codes if dtype is FP8 else codes.round()).clamp(-largest, largest).to(dtype), scale


def _scaled_operands(
    device: torch.device, m: int, n: int, k: int, dtype: torch.dtype, per_row: bool
) -> Inputs:
    a, b = activation(device, m, k), activation(device, n, k)
    return *_codes(a, dtype, per_row), *_codes(b, dtype, per_row)


def rowwise_scaled_mm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """As torchao's float8 PerRow spells it."""
    return torch._scaled_mm(
        a, b.t(), a_scale, b_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )


def scaled_mm_add(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, residual: Tensor
) -> Tensor:
    """The end of attention or of an MLP in a layer that torchao has quantized per tensor."""
    product = torch._scaled_mm(
        a, b.t(), a_scale, b_scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return residual + product


def _sum_operands(device: torch.device, m: int, n: int, k: int) -> Inputs:
    return *_scaled_operands(device, m, n, k, FP8, False), activation(device, m, n)


def _int_mm_operands(device: torch.device, m: int, n: int, k: int) -> Inputs:
    a, a_scale, b, b_scale = _scaled_operands(device, m, n, k, INT8, True)
    return a, a_scale.to(torch.bfloat16), b, b_scale.to(torch.bfloat16).flatten()


def _ways(m: int, dtype: torch.dtype) -> dict[str, Any]:
    """PyTorch's own calls, and the ways among which the table chooses; on a GPU."""
    if not torch.cuda.is_available():
        return {}
    from custom_ops.gemm.scaled_mm_triton import TILES

    # of the tiles those that could win: few rows for few tokens
    tiles = (
        [t for t in TILES.values() if t.m <= 64]
        if m <= 64
        else [t for t in TILES.values() if t.m >= 64]
    )
    ways = {f"tile {tile.name}": partial(one_way, tile=tile.name) for tile in tiles}
    if dtype is INT8:
        return ways | (
            {"cublaslt": partial(one_way, tile=""), "raw_int_mm": raw_int_mm} if m > 16 else {}
        )
    return ways | {
        "cublaslt": partial(one_way, tile=""),
        "raw_scaled_mm": partial(raw_scaled_mm, fast=False),
        "raw_scaled_mm_fast_accum": partial(raw_scaled_mm, fast=True),
    }


@lru_cache(maxsize=1)
def _token_module(device: torch.device, n: int, k: int, scheme: str) -> nn.Module:
    import fusion_passes

    model = nn.Sequential(nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16))
    fusion_passes.quantize_(model, scheme)
    return model.eval()


def _token_linear_inputs(device: torch.device, m: int, n: int, k: int, scheme: str) -> Inputs:
    return _token_module(device, n, k, scheme), activation(device, m, k)


def _deep_gemm_runs() -> bool:
    return torch.cuda.is_available() and "deep_gemm" in custom_ops.ops()["block_scaled_mm"].usable(
        torch.device("cuda", torch.cuda.current_device())
    )


def _here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def flashinfer(operands: Inputs) -> Thunk:
    """FlashInfer whatever the table says; it compiles for minutes when it first runs."""
    from custom_ops.gemm import flashinfer_sm90

    return lambda: flashinfer_sm90.block_scaled_mm(*operands, out_dtype=torch.bfloat16)


def cases(tiny: bool = False) -> Iterator[Case]:
    yield from block_scaled_cases(tiny)
    yield from scaled_cases(tiny)
    yield from rowwise_cases(tiny)
    yield from sum_cases(tiny)


def scaled_cases(tiny: bool) -> Iterator[Case]:
    shapes, tokens = (((64, 96),), (20,)) if tiny else (LLAMA, TOKENS)
    apart = () if tiny else APART
    for (n, k), (dtype, scales) in (
        *itertools.product(shapes, KINDS),
        *itertools.product(apart, KINDS[-1:]),
    ):
        for m in tokens:
            yield Case(
                # the name is the kind of product in the tables: see bench.tuning
                name=f"scaled_mm_{str(dtype).removeprefix('torch.')}_{scales}",
                sizes={"tokens": m, "n": n, "k": k},
                inputs=partial(
                    _scaled_operands, m=m, n=n, k=k, dtype=dtype, per_row=scales == "token"
                ),
                plain=scaled_mm,
                check=close(1e-2),
                op="scaled_mm",
                op_args=lambda *operands: (operands, {}),
                moved_bytes=m * k + n * k + 2 * m * n,
                flops=2 * m * n * k,
                others=_ways(m, dtype),
            )
    for scheme, m in itertools.product(("fp8_token", "int8_token"), tokens):
        n, k = shapes[0]
        yield Case(
            name=f"scaled_linear_{scheme}",
            sizes={"tokens": m, "n": n, "k": k},
            inputs=partial(_token_linear_inputs, m=m, n=n, k=k, scheme=scheme),
            plain=linear,
            check=close(2e-2),
            fusion="scaled_linear",
            beside=("token_quant",),
            moved_bytes=2 * m * k + n * k + 2 * m * n,
            flops=2 * m * n * k,
        )
    for (n, k), m in itertools.product(shapes, tokens):
        if m > 16:  # torch._int_mm takes no fewer
            yield Case(
                name="scaled_int_mm",
                sizes={"tokens": m, "n": n, "k": k},
                inputs=partial(_int_mm_operands, m=m, n=n, k=k),
                plain=scaled_int_mm,
                check=same,
                fusion="scaled_int_mm",
                moved_bytes=m * k + n * k + 2 * m * n,
                flops=2 * m * n * k,
            )


def rowwise_cases(tiny: bool) -> Iterator[Case]:
    """What torchao's layers have: which of them `torch._scaled_mm` keeps is for the table to say."""
    shapes, tokens = (((64, 96),), (4,)) if tiny else ((*APART, *LLAMA[1::2]), TOKENS)
    for (n, k), m in itertools.product(shapes, tokens):
        yield Case(
            name="rowwise_scaled_mm",
            sizes={"tokens": m, "n": n, "k": k},
            inputs=partial(_scaled_operands, m=m, n=n, k=k, dtype=FP8, per_row=True),
            plain=rowwise_scaled_mm,
            check=close(1e-2),
            fusion="rowwise_scaled_mm",
            moved_bytes=m * k + n * k + 2 * m * n,
            flops=2 * m * n * k,
        )


def sum_cases(tiny: bool) -> Iterator[Case]:
    """The products that a residual is added to: the output's and the down projection's."""
    shapes, tokens = (((64, 96),), (4,)) if tiny else (LLAMA[1::2], TOKENS)
    for (n, k), m in itertools.product(shapes, tokens):
        yield Case(
            name="scaled_mm_add",
            sizes={"tokens": m, "n": n, "k": k},
            inputs=partial(_sum_operands, m=m, n=n, k=k),
            plain=scaled_mm_add,
            check=close(1e-2),
            op="scaled_mm_add",
            op_args=lambda *operands: (operands, {"fast_sums": True}),
            fusion="scaled_mm_add",
            moved_bytes=m * k + n * k + 4 * m * n,
            flops=2 * m * n * k,
        )


def block_scaled_cases(tiny: bool) -> Iterator[Case]:
    n, k = (128, 256) if tiny else (4096, 7168)
    others: dict[str, Any] = {"raw_deep_gemm": raw_deep_gemm} if _deep_gemm_runs() else {}
    if "flashinfer" in custom_ops.ops()["block_scaled_mm"].usable(_here()):
        others["flashinfer"] = flashinfer
    for m in (4,) if tiny else TOKENS:
        yield Case(
            name="block_scaled_mm",
            sizes={"tokens": m, "n": n, "k": k},
            inputs=partial(_operands, m=m, n=n, k=k),
            plain=block_scaled_mm,
            check=close(1e-2),
            op="block_scaled_mm",
            op_args=lambda *operands: (operands, {}),
            moved_bytes=m * k + n * k + 2 * m * n,
            flops=2 * m * n * k,
            others=others,
            targets=(Target("of_raw_deep_gemm", 0.97),) if m == 4096 else (),
        )
    for m in (4,) if tiny else TOKENS:
        yield Case(
            name="block_scaled_linear",
            sizes={"tokens": m, "n": n, "k": k},
            inputs=partial(_linear_inputs, m=m, n=n, k=k),
            plain=linear,
            check=close(2e-2),
            fusion="block_scaled_linear",
            beside=("group_quant",),
            moved_bytes=2 * m * k + n * k + 2 * m * n,
            flops=2 * m * n * k,
        )
