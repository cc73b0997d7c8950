"""What stock models spell out, in plain PyTorch, and how its fusions are checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, fx

from fusion_passes import Fusion, registry, verify
from fusion_passes import registered as registered_fusions
from fusion_passes.testing import Result, fuse

FP8 = torch.float8_e4m3fn
EPS = 1e-6


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def llama_norm(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def quantize(x: Tensor, group_size: int = 128, min_amax: float = 1e-10) -> tuple[Tensor, Tensor]:
    groups = x.float().unflatten(-1, (-1, group_size))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=min_amax) / 448.0
    return (groups / scale).clamp(-448.0, 448.0).to(FP8).flatten(-2), scale.squeeze(-1)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "divide": lambda x, scale: x / scale,
    "by 1 / scale": lambda x, scale: x * (1.0 / scale),
    "by reciprocal()": lambda x, scale: x * scale.reciprocal(),
}
Reach = Callable[[Tensor], tuple[Tensor, Tensor]]


@st.composite
def zero_points(
    draw: st.DrawFn, reaches: Sequence[Reach]
) -> tuple[Callable[[Tensor], tuple[Tensor, ...]], dict[str, Any]]:
    """A spelling of quantization to int8 with zero points, and the keywords of its op.

    reaches: how the least and the largest value may be found, of which the scale and the zero point have the shape.
    """
    reach, bound = draw(st.sampled_from(reaches)), draw(st.sampled_from((1e-5, 2.0**-23, None)))
    by_tensor, clamps = draw(st.booleans()), draw(st.booleans())
    used = draw(st.sampled_from((torch.float32, torch.int8)))
    returned = draw(st.sampled_from((torch.float32, torch.int8, torch.int32)))
    way = draw(st.sampled_from(sorted(WAYS)))

    def spelt(x: Tensor) -> tuple[Tensor, ...]:
        x = x.float()
        low, high = reach(x)
        zeros = torch.zeros_like(low)
        low = low.clamp(max=0) if clamps else torch.minimum(low, zeros)
        high = high.clamp(min=0) if clamps else torch.maximum(high, zeros)
        scale = (high - low) / (high.new_full((), 255.0) if by_tensor else 255.0)
        scale = scale if bound is None else scale.clamp(min=bound)
        zero = (-128 - torch.round(low / scale)).clamp(-128, 127).to(used)
        codes = (torch.round(WAYS[way](x, scale)) + zero).clamp(-128, 127).to(torch.int8)
        return codes, scale, zero.to(returned)

    code_mode = "divide" if way == "divide" else "reciprocal"
    return spelt, {"min_scale": bound or 0.0, "code_mode": code_mode}


def everything() -> list[Fusion]:
    return list(registry().values())


def fuse_all(
    fn: Callable[..., Any], *args: Any, only: Sequence[str] | None = None, **kwargs: Any
) -> Result:
    """Run fusions (all, or those named) on a call; outputs must be what the semantics allow, no copy added."""
    known = registry()
    fusions = everything() if only is None else [known[name] for name in only]
    result = fuse(fn, *args, only=fusions, **kwargs)
    assert_same(result)
    return result


def assert_same(result: Result) -> None:
    result.after.graph.lint()
    accumulated = any("mm" in str(node.target) for node in result.before.graph.nodes)
    for index, (expected, actual) in enumerate(zip(result.expected, result.actual, strict=True)):
        problem = verify.difference(expected, actual, accumulated)
        assert problem is None, f"output {index}: {problem}\n{result.report}"
        assert expected.numel() < 2 or expected.stride() == actual.stride(), (
            f"strides of output {index}"
        )


def calls(graph: fx.Graph) -> list[str]:
    """The functions that a graph calls, sorted: how often each op is in it."""
    return sorted(str(node.target) for node in graph.nodes if node.op == "call_function")


def misses(result: Result, fusion: str) -> list[str]:
    """The reasons that the report gives for a fusion's near misses."""
    return [miss.reason for miss in result.report.near_misses if miss.fusion == fusion]


NEEDS_ROWS = "needs a torch whose _scaled_mm takes a scale per row on a CPU: 2.13"


def takes_rows() -> bool:
    """Whether eager PyTorch can be the oracle of a float8 product with a scale per row, on a CPU."""
    codes, scale = torch.zeros(16, 16, dtype=FP8), torch.ones(16, 1)
    try:
        torch._scaled_mm(codes, codes.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


@contextmanager
def registered(*fusions: Fusion) -> Iterator[None]:
    """Fusions of somebody else's, for the time of a test."""
    before = dict(registered_fusions._registered)
    try:
        for fusion in fusions:
            registered_fusions.register(fusion)
        yield
    finally:
        registered_fusions._registered.clear()
        registered_fusions._registered.update(before)
