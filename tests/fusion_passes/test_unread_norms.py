"""A norm in a spelling that nobody knows is told, and what is no norm is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters

import fusion_passes
from tests.fusion_passes.helpers import fuse_all, random

pytestmark = pytest.mark.usefixtures("references")


def _deberta_norm(x: torch.Tensor) -> torch.Tensor:
    """The variance is rounded on its way, and cast back."""
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.bfloat16().float().pow(2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-7)


UNREAD = {
    "divided by a root": (lambda x, w: x / torch.sqrt(x.pow(2).mean(-1, True) + 1e-6) * w, "square root"),
    "in float32": (
        lambda x, w: (x.float() / (x.float().square().mean(-1, True) + 1e-6).sqrt()).to(x.dtype) * w,
        "square root",
    ),
    "a sum over its count": (
        lambda x, w: (x.float() * torch.rsqrt((x.float() * x.float()).sum(-1, True) / 128 + 1e-6) * w).to(x.dtype),
        "no known spelling",
    ),
    "in float64": (
        lambda x, w: (x.double() * torch.rsqrt(x.double().pow(2).mean(-1, True) + 1e-6)).to(x.dtype) * w,
        "float32",
    ),
    "of what is centred by something else": (
        lambda x, w: (x - w) / torch.sqrt((x - w).pow(2).mean(-1, True) + 1e-6),
        "square root",
    ),
    "clamped": (lambda x, w: x / x.pow(2).mean(-1, True).clamp(min=1e-6).sqrt() * w, "square root"),
    "normalize": (lambda x, w: F.normalize(x, dim=-1) * 128**0.5 * w, "divides by a length"),
    "normalize in float32": (
        lambda x, w: F.normalize(x.float(), dim=-1).to(x.dtype) * (w + 1) * 128**0.5,
        "divides by a length",
    ),
    "a norm, clamped": (
        lambda x, w: x / x.norm(2, dim=-1, keepdim=True).clamp(min=1e-8) * 128**0.5 * w,
        "divides by a length",
    ),
}  # fmt: skip
NO_NORMS = {
    "a length of one": lambda x, w: x * torch.rsqrt((x * x).sum(-1, True) + 1e-6) * w,
    "normalize, of a length of one": lambda x, w: F.normalize(x, dim=-1) * w,
    "normalize, times another root": lambda x, w: F.normalize(x, dim=-1) * 64**0.5 * w,
    "a length of something else": lambda x, w: x / (x + w).norm(dim=-1, keepdim=True) * 128**0.5,
    "layer norm": lambda x, w: F.layer_norm(x, (128,), w),
    "layer norm, written out": lambda x, w: (
        (x - x.mean(-1, True)) / torch.sqrt((x - x.mean(-1, True)).pow(2).mean(-1, True) + 1e-6) * w
    ),
    "layer norm of DeBERTa": lambda x, w: _deberta_norm(x.float()).to(x.dtype) * w,
    "a deviation": lambda x, w: x / x.float().std(-1, keepdim=True).to(x.dtype) * w,
    "a root of something else": lambda x, w: torch.sqrt(x.abs().mean(-1, True)) * w,
    "a square of a root": lambda x, w: torch.rsqrt(x.abs() + 1) * x.pow(2).mean(-1, True) * w,
}


def misses(fn: Callable[..., torch.Tensor], tokens: int, **kwargs: Any) -> list[str]:
    report = fuse_all(fn, random(tokens, 128), random(128), **kwargs).report
    assert report.matches == {}, report
    return [miss.reason for miss in report.near_misses if miss.fusion == "rms_norm"]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", UNREAD)
def test_an_unread_norm_is_a_near_miss(kind: str, dynamic: bool) -> None:
    fn, words = UNREAD[kind]
    reasons = misses(fn, 5, dynamic=dynamic)
    assert len(reasons) == 1
    assert words in reasons[0]


@pytest.mark.parametrize("kind", NO_NORMS)
def test_what_is_no_norm_is_not_told(kind: str) -> None:
    assert not [
        reason
        for reason in misses(NO_NORMS[kind], 5)
        if "mean of squares" in reason or "length" in reason
    ]


@given(tokens=st.integers(1, 9), eps=st.sampled_from((1e-6, 1e-5, 0.5)), views=st.booleans())
def test_views_and_numbers_on_the_way_do_not_hide_it(tokens: int, eps: float, views: bool) -> None:
    def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        squares = x.float().pow(2)
        squares = squares.reshape(1, -1, 128) if views else squares
        return (x / torch.sqrt(squares.mean(-1).reshape(-1, 1) + eps)).to(x.dtype) * w

    assert len(misses(norm, tokens)) == 1


@pytest.mark.usefixtures("empty_caches", "fresh_reports")
def test_a_width_that_is_asked_for_is_no_guard() -> None:
    """Whether the factor is the root of this width changes what is told, and nothing else."""

    def graphs(backend: str, **kwargs: Any) -> int:
        torch.compiler.reset()
        counters.clear()
        fn, _ = UNREAD["normalize"]
        call = torch.compile(fn, backend=backend, dynamic=True, **kwargs)
        for width in (128, 256, 64):
            inputs = random(5, width), random(width)
            torch.testing.assert_close(call(*inputs), fn(*inputs), rtol=3e-2, atol=3e-2)
        return counters["stats"]["unique_graphs"]

    assert graphs("fusion_passes") == graphs("inductor")
    assert len(fusion_passes.report().near_misses) == 1
