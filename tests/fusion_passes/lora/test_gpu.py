"""Adapters on a GPU: captured graphs that serve every adapter, copies that nobody waits for, the real kernels."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fusion_passes.lora import AdapterCacheFull, AdapterManager, from_peft
from tests.fusion_passes.lora.adapters import merged, model, source
from tests.fusion_passes.lora.managers import Counting, counting

pytestmark = pytest.mark.gpu

SOURCES = {
    "small": source(3, targets=("q_proj",), seed=1),
    "wide": source(20, seed=2, lora_alpha=10, use_rslora=True),
    "two": source(8, targets=("v_proj", "down_proj"), seed=3),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def managed(resident: int = 2, loaded: int = 3) -> AdapterManager:
    manager = AdapterManager(
        model().cuda(), max_loaded=loaded, max_resident=resident, max_rank=20, max_tokens=64
    )
    for name, given in SOURCES.items():
        manager.add(name, given)
    return manager


def assert_rows(actual: torch.Tensor, names: list[str | None], ids: torch.Tensor) -> None:
    for row, name in enumerate(names):
        wide = model().double() if name is None else merged(model(), SOURCES[name])
        exact = wide(ids[row : row + 1].cpu())
        error = float((actual[row : row + 1].cpu().double() - exact).norm() / exact.norm())
        assert error < 0.06, f"{name}: {error:.2%} from float64"


MIXTURES: list[list[str | None]] = [
    ["wide", None],
    ["two", "small"],
    ["small", "small"],
    [None, "wide"],
]


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_one_graph_for_every_adapter(mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setenv("FUSION_PASSES", "all")  # torch.compile takes a mode or options
    captures, begin = [], torch.cuda.graph.__enter__

    def counted(self: Any) -> Any:
        captures.append(self)
        return begin(self)

    monkeypatch.setattr(torch.cuda.graph, "__enter__", counted)
    manager = managed(loaded=4)
    ids = torch.randint(0, 20, (2, 3)).cuda()
    manager.compile(mode=mode, fullgraph=True)
    counters.clear()
    after_round = []
    with torch.no_grad():
        for round_ in range(3):
            for names in MIXTURES:
                actual = manager(ids, adapter_names=names).clone()
                assert_rows(actual, names, ids)
            manager.remove("wide")
            manager.add("wide", SOURCES["wide"])
            manager.add(f"more {round_}", SOURCES["two"])
            manager.remove(f"more {round_}")
            after_round.append(len(captures))
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0
    # what one mode captures in the first round serves every mixture, whatever came and went
    assert len(set(after_round)) == 1
    assert bool(captures) == (mode is not None)


def test_a_capture_serves_adapters_that_were_loaded_after_it() -> None:
    manager = managed()
    ids = torch.randint(0, 20, (2, 3)).cuda()
    with torch.no_grad(), manager.step(["wide", "small"], 3):
        manager.model(ids)  # kernels are compiled ahead of the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = manager.model(ids)
    for names in MIXTURES:
        with manager.step(names, 3):
            graph.replay()
            actual = out.clone()
        assert_rows(actual, names, ids)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)
def test_tiles_in_a_compiled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that the table has for batches of large layers, which this model is too small to be given."""
    from custom_ops.lora import hopper_batch, ways

    best, shrink, launched = ways.best, hopper_batch.shrink, []

    def tiled(*call: Any) -> str:
        return ways.TILED if ways.TILED in call[-1] else best(*call)

    def counted(*call: Any) -> torch.Tensor:
        launched.append(call)
        return shrink(*call)

    monkeypatch.setenv("FUSION_PASSES", "all")
    monkeypatch.setattr(ways, "best", tiled)
    monkeypatch.setattr(hopper_batch, "shrink", counted)
    manager = AdapterManager(
        model().cuda(), max_loaded=2, max_resident=2, max_rank=16, max_tokens=64
    )
    for name in ("small", "two"):
        manager.add(name, SOURCES[name])
    ids = torch.randint(0, 20, (3, 17)).cuda()
    manager.compile(fullgraph=True)
    mixtures: list[list[str | None]] = [["two", None, "small"], ["small", "two", "two"]]
    with torch.no_grad():
        for names in mixtures:
            assert_rows(manager(ids, adapter_names=names).clone(), names, ids)
    assert launched


def test_nothing_waits_for_the_gpu() -> None:
    manager = managed()
    ids = torch.randint(0, 20, (2, 3)).cuda()
    with torch.no_grad():
        for names in MIXTURES:
            manager(ids, adapter_names=names)  # allocations, kernels
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for names in MIXTURES:
                manager(ids, adapter_names=names)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_steps_see_whole_adapters_while_others_are_loaded() -> None:
    """Many steps are queued ahead while slots are filled anew: a copy that came too early would show."""
    manager = AdapterManager(
        Counting().eval().requires_grad_(False).cuda(),
        max_loaded=6,
        max_resident=3,
        max_rank=16,
        max_tokens=64,
    )
    stop, failures = threading.Event(), []
    x = torch.ones(4, 3, 64, dtype=torch.bfloat16, device="cuda")
    for k in range(1, 7):
        manager.add(str(k), counting(k))

    def churn() -> None:
        generator = torch.Generator().manual_seed(0)
        while not stop.is_set():
            try:
                manager.activate(str(int(torch.randint(1, 7, (), generator=generator))))
            except AdapterCacheFull:
                pass
            except BaseException as error:
                failures.append(error)
                raise

    thread = threading.Thread(target=churn)
    thread.start()
    outputs = []
    try:
        with torch.no_grad():
            for index in range(300):
                names = [str(index % 6 + 1), None, str((index + 1) % 6 + 1), None]
                outputs.append((names, manager(x, adapter_names=names)))
    finally:
        stop.set()
        thread.join()
    assert not failures
    for names, both in outputs:
        for output in both:
            found = [output[row].float().unique().tolist() for row in range(4)]
            assert found == [[0.0 if name is None else float(name)] for name in names]


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block"])
def test_from_peft_with_the_kernels(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="needs the extra 'models'")
    from tests.models.peft_zoo import NAMES, batch, errors, mixed

    monkeypatch.setenv("FUSION_PASSES", "all")
    peft_model, ids = mixed(scheme, layers=1).cuda(), batch(5, 6).cuda()
    judge = (
        copy.deepcopy(peft_model)
        .cpu()
        .double()(ids.cpu(), adapter_names=NAMES, use_cache=False)
        .logits
    )
    expected: Any = peft_model(ids, adapter_names=NAMES, use_cache=False).logits
    manager = from_peft(peft_model)
    manager.compile(fullgraph=True)
    with torch.no_grad():
        actual = manager(ids, adapter_names=NAMES, use_cache=False).logits
    theirs, ours = (sum(errors(side.cpu(), judge)) for side in (expected, actual))
    assert ours <= 1.25 * theirs + 1e-3


@pytest.mark.parametrize("adapter", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", ["bf16", "fp8_block"])
def test_peft_graphs_with_the_kernels(
    scheme: str, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft", reason="needs the extra 'models'")
    import fusion_passes
    from tests.models.peft_zoo import adapted, errors, implementations
    from tests.models.zoo import tokens

    monkeypatch.setenv("FUSION_PASSES", "all")
    peft_model, ids = adapted("llama", adapter, scheme, layers=1).cuda(), tokens(64).cuda()
    fusion_passes.reset_reports()
    with torch.no_grad():
        expected = peft_model(ids, use_cache=False).logits
        actual = torch.compile(peft_model, backend="fusion_passes")(ids, use_cache=False).logits
    chosen = implementations(fusion_passes.report())
    assert len(chosen) == 7
    assert not any(name.endswith(":reference") for name in chosen), chosen
    assert max(errors(actual.cpu(), expected.cpu())) < (0.02 if scheme == "bf16" else 0.1)
