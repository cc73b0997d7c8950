"""Strategies that the tests of routing and index ops share."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.custom_ops.helpers import DEVICE

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EXPERTS = (1, 2, 3, 8, 16, 33, 60, 64, 128, 160, 256, 300)
SKEWS = ("uniform", "skewed", "one", "few", "out of range")


def generator(draw: st.DrawFn) -> torch.Generator:
    return torch.Generator().manual_seed(draw(st.integers(0, 2**31)))


@st.composite
def logits(draw: st.DrawFn, experts: int, special: bool = True) -> Tensor:
    """[T, E] on a coarse grid, so that there are ties and nothing nearly ties; NaN and Inf in some."""
    tokens = draw(st.sampled_from((0, 1, 2, 3, 5)))
    g = generator(draw)
    spread = draw(st.sampled_from((4, 32)))
    x = torch.randint(1, spread + 1, (tokens, experts), generator=g) / 8
    if special and draw(st.booleans()):
        dice = torch.rand(tokens, experts, generator=g)
        x[dice < 0.05] = -0.0
        x[(dice > 0.05) & (dice < 0.1)] = 0.0
        x[(dice > 0.1) & (dice < 0.3)] = -torch.inf
        x[(dice > 0.3) & (dice < 0.32)] = torch.nan
    return x.to(draw(st.sampled_from(FLOATS))).to(DEVICE)


@st.composite
def router_calls(
    draw: st.DrawFn, special: bool = True, rounded: bool = True
) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """(op, arguments, keywords) of a routing op."""
    experts = draw(st.sampled_from(EXPERTS))
    x = draw(logits(experts, special))
    top_k = draw(st.sampled_from([k for k in (1, 2, 3, 6, 8, 40, experts) if k <= experts]))
    options: dict[str, Any] = {
        "renormalize": draw(st.booleans()),
        "renormalize_eps": draw(st.sampled_from((0.0, 1e-20, 1e-6))),
        "renormalize_min": draw(st.sampled_from((0.0, 1e-3))),
        "scale": draw(st.sampled_from((1.0, 2.5))),
        "rounded": rounded and draw(st.booleans()),
        "dtype": draw(st.sampled_from(FLOATS)),
    }
    if draw(st.booleans()):
        bias = torch.randint(-2, 3, (experts,), generator=generator(draw)) / 4
        options["correction_bias"] = bias.to(draw(st.sampled_from(FLOATS))).to(DEVICE)
    op = draw(st.sampled_from(("topk_softmax", "topk_sigmoid", "grouped_topk")))
    if op == "topk_softmax":
        return op, (x, top_k), options | {"softmax_first": draw(st.booleans())}
    if op == "topk_sigmoid":
        return op, (x, top_k), options | {"by_logits": draw(st.booleans())}
    groups = draw(st.sampled_from([g for g in range(1, 33) if experts % g == 0]))
    options["scoring"] = draw(st.sampled_from(("sigmoid", "softmax", "sqrt_softplus")))
    options["masked"] = draw(st.sampled_from(("-inf", "zero", "zero_weight")))
    pairs = experts // groups >= 2
    options["group_score"] = draw(st.sampled_from(("max", "top2") if pairs else ("max",)))
    return op, (x, top_k, groups, draw(st.integers(1, groups))), options


@st.composite
def expert_ids(draw: st.DrawFn, most_tokens: int = 70) -> tuple[Tensor, int, Tensor | None]:
    """topk_ids [T, K], how many experts are here, and the map to them or None."""
    experts = draw(st.sampled_from(EXPERTS))
    tokens = draw(st.sampled_from([t for t in (0, 1, 2, 7, 33, 70, 400) if t <= most_tokens]))
    count = draw(st.sampled_from((1, 2, 3, 8)))
    g = generator(draw)
    shape = (tokens, count)
    skew = draw(st.sampled_from(SKEWS))
    if skew == "uniform":
        ids = torch.randint(0, experts, shape, generator=g)
    elif skew == "skewed":
        ids = (torch.rand(shape, generator=g) ** 6 * experts).long()
    elif skew == "one":
        ids = torch.full(shape, experts // 2)
    elif skew == "few":
        ids = torch.randint(0, experts, (2,), generator=g)[torch.randint(0, 2, shape, generator=g)]
    else:
        ids = torch.randint(-3, experts + 4, shape, generator=g)
    ids = ids.to(draw(st.sampled_from((torch.int32, torch.int64)))).to(DEVICE)
    if draw(st.booleans()):  # every second of a wider tensor
        ids = torch.stack([ids, ids + 1], -1)[..., 0]
    if draw(st.booleans()):
        return ids, experts, None
    here = draw(st.integers(1, experts))
    table = torch.full((experts,), -1, dtype=torch.int32)
    table[torch.randperm(experts, generator=g)[:here]] = torch.arange(here, dtype=torch.int32)
    return ids, here, table.to(DEVICE)
