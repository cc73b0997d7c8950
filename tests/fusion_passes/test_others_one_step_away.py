"""Adapters and quantizations one step away from those that are found: none fires, or the result is still right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fusion_passes.helpers import random
from tests.fusion_passes.one_step_away import run

pytestmark = pytest.mark.usefixtures("references")


# ---- LoRA ---------------------------------------------------------------------------------------------------------


def _lora(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, change: str) -> tuple[Tensor, ...]:
    base = F.linear(x * 2 if change == "base of another x" else x, weight)
    inner = x.to(a.dtype)
    if change == "scaled x":
        inner = inner * 0.5
    shrunk = F.linear(inner, a)
    if change == "scaled between":
        shrunk = shrunk * 0.5
    if change == "activation between":
        shrunk = F.relu(shrunk)
    delta = F.linear(shrunk, b)
    if change == "magnitude":
        delta = delta * b[:, 0]
    if change == "scaled by tokens":
        delta = delta * x[..., :1].to(a.dtype)
    if change == "other order of products":
        delta = F.linear(x.to(a.dtype), b @ a)
    if change == "subtracted":
        return ((base - delta * 2.0).to(x.dtype),)
    if change == "alpha":
        return (torch.add(base, delta * 2.0, alpha=3).to(x.dtype),)
    if change == "scaled sum":
        return (((base + delta) * 2.0).to(x.dtype),)
    if change == "scaled twice":
        return ((base + delta * 2.0 * 0.3).to(x.dtype),)
    if change == "scaled base":
        return ((base * 0.5 + delta * 2.0).to(x.dtype),)
    if change == "two adapters":
        return ((base + delta * 2.0 + F.linear(F.linear(inner, a.flip(0)), b) * 0.5).to(x.dtype),)
    if change == "the same adapter twice":
        return ((base + delta * 2.0 + delta * 0.5).to(x.dtype),)
    if change == "nested":
        return ((base + F.linear(F.linear(base.to(a.dtype), a[:, :32]), b) * 2.0).to(x.dtype),)
    if change == "rows of the first":
        return ((base + delta[:1] * 2.0).to(x.dtype),)
    if change == "one row":
        return ((base[:1] + delta[:1] * 2.0).to(x.dtype),)
    if change == "rows of some":
        return ((base[:2] + delta[:2] * 2.0).to(x.dtype),)
    if change == "delta transposed":
        return (
            (base + delta.reshape(delta.shape[-1], -1).t().reshape(delta.shape) * 2.0).to(x.dtype),
        )
    result = (base + delta * 2.0).to(x.dtype)
    if change == "base outside":
        return result, base
    if change == "delta outside":
        return result, delta
    if change == "shrunk outside":
        return result, shrunk
    return (result,)


LORA = (
    "", "base of another x", "scaled x", "scaled between", "activation between", "magnitude", "scaled by tokens",
    "other order of products", "subtracted", "alpha", "scaled sum", "scaled twice", "scaled base", "two adapters",
    "the same adapter twice", "nested", "rows of the first", "one row", "rows of some", "delta transposed",
    "base outside", "delta outside", "shrunk outside",
)  # fmt: skip


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("rank", "tokens"), [(1, 4), (8, 4), (8, 1)])
@pytest.mark.parametrize("change", LORA)
def test_lora_one_step_away(change, rank, tokens, wide):
    dtype = torch.float32 if wide else torch.bfloat16
    tensors = (
        random(tokens, 32),
        random(32, 32) / 6,
        random(rank, 32, dtype=dtype) / 6,
        random(32, rank, dtype=dtype),
    )
    result = run(lambda *given: _lora(*given, change), *tensors, names=("lora_linear",))
    assert change or result.report.matches == {"lora_linear": 1}


# ---- quantizations ------------------------------------------------------------------------------------------------


def _asymmetric(x: Tensor, change: str) -> tuple[Tensor, ...]:
    x = x.float()
    dim = 0 if change == "of channels" else -1
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    if change == "of everything":
        low, high = x.amin().reshape(1, 1), x.amax().reshape(1, 1)
    if change == "of other tokens":
        low = low.flip(0)
    if change != "range without zero":
        low, high = low.clamp(max=0), high.clamp(min=1 if change == "range with one" else 0)
    levels = {"254": 254.0, "256": 256.0}.get(change, 255.0)
    scale = ((high - low) / levels).clamp(min=1e-5)
    if change == "bound from above":
        scale = ((high - low) / levels).clamp(max=0.01)
    least = {"unsigned": 0, "-127": -127}.get(change, -128)
    start = high if change == "from the highest" else low
    zero = (least - torch.round(start / scale)).clamp(-128, 127)
    if change == "zero added":
        zero = (least + torch.round(start / scale)).clamp(-128, 127)
    if change == "zero not rounded":
        zero = (least - start / scale).clamp(-128, 127)
    values = x / scale
    if change == "rounded later":
        codes = torch.round(values + zero)
    elif change == "rounded down":
        codes = torch.floor(values) + zero
    elif change == "zero subtracted":
        codes = torch.round(values) - zero
    else:
        codes = torch.round(values) + zero
    codes = codes.clamp(-128, 100 if change == "clamped to 100" else 127)
    return (
        codes.to(torch.int8),
        scale * 2 if change == "twice the scale" else scale,
        zero.to(torch.int8),
    )


ASYMMETRIC = (
    "", "of channels", "of everything", "of other tokens", "range without zero", "range with one", "254", "256",
    "bound from above", "unsigned", "-127", "from the highest", "zero added", "zero not rounded", "rounded later",
    "rounded down", "zero subtracted", "clamped to 100", "twice the scale",
)  # fmt: skip


@pytest.mark.parametrize("change", ASYMMETRIC)
def test_asymmetric_quantization_one_step_away(change):
    x = random(4, 64) + 0.25
    names = ("token_quant_asymmetric", "tensor_quant_asymmetric")
    result = run(lambda x: _asymmetric(x, change), x, names=names)
    per_tensor = change == "of everything"
    assert set(result.report.matches) <= {names[per_tensor]}
    assert len(result.report.matches) == (per_tensor or change in ("", "twice the scale"))


def _in_blocks(x: Tensor, change: str) -> tuple[Tensor, Tensor]:
    size = 64 if change == "smaller blocks" else 128
    blocks = x.float().unflatten(1, (-1, size)).unflatten(0, (-1, 128))
    dims = {"rows": (3,), "columns": (1,), "across": (0, 3)}.get(change, (1, 3))
    amax = (
        blocks.amax(dims, keepdim=True)
        if change == "no abs"
        else blocks.abs().amax(dims, keepdim=True)
    )
    if change == "square":
        amax = blocks.square().amax(dims, keepdim=True)
    amax = amax.clamp(max=2.0) if change == "bound from above" else amax.clamp(min=1e-4)
    scale = amax / (amax.new_full((), 240.0 if change == "240" else 448.0))
    values = blocks * scale if change == "multiplied" else blocks / scale
    limit = 400.0 if change == "clamped to 400" else 448.0
    codes = values.clamp(-limit, limit).to(torch.float8_e4m3fn)
    return codes.reshape(x.shape), scale


BLOCKS = (
    "", "smaller blocks", "rows", "columns", "across", "no abs", "square", "bound from above", "240", "multiplied",
    "clamped to 400",
)  # fmt: skip


@pytest.mark.parametrize("change", BLOCKS)
def test_block_quantization_one_step_away(change):
    result = run(lambda x: _in_blocks(x, change), random(256, 384), names=("block_quant",))
    assert len(result.report.matches) == (change == "")
