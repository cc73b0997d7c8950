"""A model with slots, compiled: one graph, whatever adapters come and go."""

from __future__ import annotations

import pytest
import torch

import fusion_passes
from tests.fusion_passes.lora.managers import SOURCES, assert_close, expected, managed, tokens

pytestmark = pytest.mark.usefixtures("references")


def test_adapters_come_and_go_without_a_new_graph() -> None:
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    manager, counter = managed(resident=2), CompileCounter()
    manager.compile(backend=counter, fullgraph=True)
    addresses = {n: b.data_ptr() for n, b in manager.model.named_buffers()}
    ids = tokens(2, 3)
    with torch.no_grad():
        for round_ in range(3):
            for names in (["wide", None], ["two", "small"], ["head", "head"], [None, None]):
                actual = manager(ids, adapter_names=names)
                for row, name in enumerate(names):
                    assert_close(actual[row : row + 1], expected(name, ids[row : row + 1]))
            manager.pin("two")
            manager.unpin("two")
            manager.remove("wide")
            manager.add("wide", SOURCES["wide"])
            manager.add(f"more {round_}", SOURCES["two"])
            manager.remove_all()
            for name, given_ in SOURCES.items():
                manager.add(name, given_)
    assert counter.frame_count == 1
    assert {n: b.data_ptr() for n, b in manager.model.named_buffers()} == addresses
    torch.compiler.reset()


def test_dynamic_shapes_take_one_graph() -> None:
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    manager, counter = managed(), CompileCounter()
    manager.compile(backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows, length in ((2, 3), (3, 5), (4, 2)):
            ids, names = tokens(rows, length), ["wide", None, "head", "two"][:rows]
            actual = manager(ids, adapter_names=names)
            for row, name in enumerate(names):
                assert_close(actual[row : row + 1], expected(name, ids[row : row + 1]))
    assert counter.frame_count == 1
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_reports")
def test_through_inductor_with_every_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_PASSES_ALLOW_REFERENCE", "1")
    manager, ids = managed(resident=2), tokens(2, 3)
    manager.compile(fullgraph=True, options={"fusions": "all"})
    with torch.no_grad():
        for names in (["wide", "two"], ["head", None], ["small", "wide"]):
            actual = manager(ids, adapter_names=names)
            for row, name in enumerate(names):
                assert_close(actual[row : row + 1], expected(name, ids[row : row + 1]))
    assert len(fusion_passes.reports()) == 1
