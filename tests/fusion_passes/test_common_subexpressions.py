"""Equal computations become one node, and what only looks equal stays two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from fusion_passes import torch_internals
from fusion_passes.canonical import common_subexpressions
from tests.fusion_passes.helpers import random

X = random(4, 6, dtype=torch.float32)
INT = torch.arange(-3, 3)


def counted(graph: fx.Graph) -> Counter[str]:
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")


def merged(fn: Callable[..., Any], *args: Tensor) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A call's graph, and a copy in which equal nodes are one."""
    (before,) = torch_internals.capture(fn, *args)
    graph = fx.Graph()
    graph.output(graph.graph_copy(before.graph, {}))
    after = fx.GraphModule(before, graph)
    common_subexpressions.merge(after.graph)
    after.graph.lint()
    after.recompile()
    return before, after


@given(
    twice=st.integers(2, 4),
    fn=st.sampled_from(
        (torch.exp, torch.t, lambda x: x[1:], lambda x: x.sum(-1), lambda x: x + 0.5)
    ),
)
def test_equal_computations_are_one(twice, fn):
    before, after = merged(lambda x: sum(fn(x).cos() for _ in range(twice)), X)
    assert counted(before.graph)["aten.cos.default"] == twice
    assert counted(after.graph)["aten.cos.default"] == 1
    assert all(map(torch.equal, after(X), before(X)))


ALIKE: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "a number of another type": (lambda x: (x + 1) * 1.0 + (x + 1.0) * (x * True), INT),
    "a zero with a sign": (lambda x: (x / 0.0).clamp(-1, 1) * 2 + (x / -0.0).clamp(-1, 1), X),
    "another dtype": (lambda x: x.to(torch.float64).sum() + x.to(torch.float16).sum(), X),
    "another dimension": (lambda x: x.cumsum(0) + x.cumsum(1), X),
}


@pytest.mark.parametrize("name", ALIKE)
def test_what_differs_stays(name: str) -> None:
    fn, x = ALIKE[name]
    before, after = merged(fn, x)
    assert counted(after.graph) == counted(before.graph)
    assert all(map(torch.equal, after(x), before(x)))


NEW: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "random numbers": (lambda x: torch.rand_like(x) - torch.rand_like(x), "rand"),
    "dropout": (
        lambda x: torch.dropout(x, 0.5, True) - torch.dropout(x, 0.5, True),
        "rand|dropout",
    ),
    "rows that the data decides": (lambda x: (x.nonzero(), x.nonzero() + 1), "nonzero"),
}


@pytest.mark.parametrize("name", NEW)
def test_what_is_new_each_time_stays(name: str) -> None:
    fn, words = NEW[name]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        before, after = merged(fn, X)
    found = [
        sum(
            count
            for target, count in counted(each.graph).items()
            if any(w in target for w in words.split("|"))
        )
        for each in (before, after)
    ]
    assert found[0] >= 2
    assert found[1] == found[0]


@pytest.mark.parametrize("target", [torch.ops.aten.add_.Tensor, torch.ops.aten.empty.memory_format])
def test_what_is_written_to_stays(target: Any) -> None:
    """Memory of its own, and a second write."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    args = (x, 1) if target is torch.ops.aten.add_.Tensor else ([3],)
    nodes = [graph.call_function(target, args) for _ in range(2)]
    for node in (x, *nodes):
        node.meta["val"] = torch.empty(3)
    graph.output(graph.call_function(torch.ops.aten.sub.Tensor, tuple(nodes)))
    assert common_subexpressions.merge(graph) == []


@pytest.mark.parametrize("fn", [torch.exp, lambda x: x.view(-1), lambda x: x.exp()[1:]])
def test_two_results_are_two_tensors(fn: Callable[[Tensor], Tensor]) -> None:
    """Who called may write to one of them."""
    before, after = merged(lambda x: (fn(x + 1), fn(x + 1)), X)
    assert len(set(after.graph.output_node().args[0])) == 2
    first, second = after(X)
    assert torch.equal(first, before(X)[0])
    first.zero_()
    assert torch.equal(second, before(X)[1])
