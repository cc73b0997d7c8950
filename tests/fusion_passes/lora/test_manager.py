"""A model with slots: what its tokens see, in which order it may be asked what, from how many threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import custom_ops
import fusion_passes
from fusion_passes.lora import AdapterCacheFull, AdapterManager
from fusion_passes.quantize import Fp8BlockLinear
from tests.fusion_passes.lora.adapters import merged, model, source

SOURCES = {
    "small": source(3, targets=("q_proj",), seed=1),
    "wide": source(20, seed=2, lora_alpha=10, use_rslora=True),
    "two": source(8, targets=("v_proj", "down_proj"), seed=3),
    "head": source(
        4,
        targets=("down_proj",),
        seed=4,
        modules_to_save=["score"],
        saved={
            "score.weight": torch.linspace(-1, 1, 160).view(5, 32),
            "score.bias": torch.arange(5.0),
        },
    ),
}


@pytest.fixture(scope="module", autouse=True)
def references() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUSTOM_OPS_DISABLE", "triton")  # its interpreter takes seconds
        yield
    torch.compiler.reset()


def managed(resident: int = 4, **options: Any) -> AdapterManager:
    defaults = {"max_loaded": 8, "max_rank": 20, "max_tokens": 64, "modules_to_save": ["score"]}
    manager = AdapterManager(model(), **{**defaults, "max_resident": resident, **options})
    for name, given_ in SOURCES.items():
        manager.add(name, given_)
    return manager


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 20, (rows, length), generator=torch.Generator().manual_seed(seed))


def expected(name: str | None, ids: torch.Tensor) -> torch.Tensor:
    base = model()
    wide = base.double() if name is None else merged(base, SOURCES[name])
    return wide(ids)


def assert_close(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """Within a few roundings to bfloat16 of float64; see below for how far apart adapters are."""
    error = float((actual.double() - exact).norm() / exact.norm())
    assert error < 0.06, f"{error:.2%} from float64"


def test_adapters_of_these_tests_differ() -> None:
    ids = tokens(2, 5)
    outputs = [expected(name, ids) for name in (None, *SOURCES)]
    for index, output in enumerate(outputs):
        for other in outputs[:index]:
            assert (output - other).norm() > 0.3 * output.norm()


@given(
    names=st.lists(st.sampled_from((None, "__base__", *SOURCES)), min_size=1, max_size=6),
    length=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_each_row_sees_its_adapter(names: list[str | None], length: int, seed: int) -> None:
    manager, ids = managed(), tokens(len(names), length, seed)
    with torch.no_grad():
        actual = manager(ids, adapter_names=names)
        for row, name in enumerate(names):
            exact = expected(None if name == "__base__" else name, ids[row : row + 1])
            assert_close(actual[row : row + 1], exact)


@given(data=st.data(), resident=st.integers(1, 3))
def test_more_adapters_than_slots_take_turns(data: st.DataObject, resident: int) -> None:
    manager = managed(resident)
    with torch.no_grad():
        for _ in range(4):
            names = data.draw(
                st.lists(st.sampled_from(sorted(SOURCES)), min_size=1, max_size=resident)
            )
            ids = tokens(len(names), 2)
            actual = manager(ids, adapter_names=names)
            for row, name in enumerate(names):
                assert_close(actual[row : row + 1], expected(name, ids[row : row + 1]))


def test_requests_of_unequal_lengths_side_by_side() -> None:
    manager, ids = managed(), tokens(1, 9)
    with torch.no_grad(), manager.step(["wide", None, "small"], num_tokens=[2, 3, 4]):
        actual = manager.model(ids)
    bounds = ((0, 2, "wide"), (2, 5, None), (5, 9, "small"))  # no token looks at another here
    for start, end, name in bounds:
        assert_close(actual[:, start:end], expected(name, ids[:, start:end]))


def test_outside_of_a_step_the_model_is_the_base_model() -> None:
    manager, ids = managed(), tokens(2, 3)
    with torch.no_grad():
        base = model()(ids)
        assert_close(manager(ids), expected(None, ids))
        manager(ids, adapter_names=["wide", "two"])
        assert torch.equal(manager.model(ids), base)


def test_base_weights_and_their_names_stay() -> None:
    manager, base = managed(), model()
    own = {
        n.replace(".base_layer", "").replace(".original_module", ""): v
        for n, v in manager.model.state_dict().items()
    }
    assert own.keys() == base.state_dict().keys()
    assert all(torch.equal(value, own[name]) for name, value in base.state_dict().items())


def test_a_quantized_linear_keeps_its_own_forward() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            linear = nn.Linear(128, 128, dtype=torch.bfloat16)
            self.layers = nn.ModuleList([Fp8BlockLinear.from_linear(linear)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[0](x)

    torch.manual_seed(0)
    wide, x = Wide().eval(), torch.randn(1, 3, 128, dtype=torch.bfloat16)
    base = wide(x)
    a, b = torch.randn(4, 128) * 0.1, torch.randn(128, 4) * 0.1
    manager = AdapterManager(wide, max_loaded=1, max_resident=1, max_rank=16)
    manager.add(
        "a",
        (
            {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["layers.0"]},
            {"layers.0.lora_A.weight": a, "layers.0.lora_B.weight": b},
        ),
    )
    with torch.no_grad():
        actual = manager(x, adapter_names=["a"])
    delta = 2 * x.double() @ a.bfloat16().double().T @ b.bfloat16().double().T
    assert_close(actual, base.double() + delta)
    assert type(wide.layers[0].base_layer) is Fp8BlockLinear


class Looked(nn.Module):
    """An embedding that adapters may replace."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 32, dtype=torch.bfloat16)
        self.layers = nn.ModuleList([nn.Linear(32, 32, dtype=torch.bfloat16)])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.layers[0](self.embed(input_ids))


def test_an_embedding_to_save() -> None:
    torch.manual_seed(0)
    looked = Looked().eval().requires_grad_(False)
    weight, base = looked.layers[0].weight.double(), looked.embed.weight.double()
    bias = looked.layers[0].bias.double()
    table = torch.randn(7, 32)
    manager = AdapterManager(
        looked, max_loaded=2, max_resident=2, max_rank=16, modules_to_save=["embed"]
    )
    factors = {
        "layers.0.lora_A.weight": torch.zeros(1, 32),
        "layers.0.lora_B.weight": torch.zeros(32, 1),
    }
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["layers.0"]}
    manager.add("plain", (config, factors))
    manager.add("own", (config | {"modules_to_save": ["embed"]}, factors | {"embed.weight": table}))
    ids = torch.tensor([[0, 6], [6, 1], [3, 3]])
    actual = manager(ids, adapter_names=["plain", "own", None])
    rows = torch.stack([base[ids[0]], table.bfloat16().double()[ids[1]], base[ids[2]]])
    assert_close(actual, rows @ weight.T + bias)


# Arguments


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_rank": 0}, "max_rank is 0; accepted: 1 to 256"),
        ({"max_rank": 257}, "max_rank is 257; accepted: 1 to 256"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        (
            {"target_modules": ["q_proj", "query"]},
            "target_modules names 'query', which is no module",
        ),
        ({"target_modules": ["embed"]}, "target_modules names 'embed', which is a Embedding"),
        ({"modules_to_save": ["layers"]}, "modules_to_save names layers, a ModuleList"),
        ({"modules_to_save": ["head"]}, "modules_to_save names 'head', which is no module"),
    ],
)
def test_arguments_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    base = model()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=words):
        AdapterManager(base, **{"max_loaded": 2, "max_resident": 1, **options})
    assert [name for name, _ in base.named_modules()] == names


def test_a_model_of_another_dtype() -> None:
    with pytest.raises(
        ValueError, match=r"layers\.0\.q_proj computes in torch\.float32; accepted: torch\.bfloat16"
    ):
        AdapterManager(model().float(), max_loaded=1, max_resident=1)
    mixed = model()
    mixed.layers[1].half()
    with pytest.raises(
        ValueError, match=r"layers\.1\.q_proj computes in torch\.float16; accepted: torch\.bfloat16"
    ):
        AdapterManager(mixed, max_loaded=1, max_resident=1)


def test_one_manager_a_model() -> None:
    manager = managed()
    with pytest.raises(ValueError, match="has an AdapterManager already"):
        AdapterManager(manager.model, max_loaded=1, max_resident=1)


def test_a_model_without_linears() -> None:
    with pytest.raises(ValueError, match=r"no torch\.nn\.Linear"):
        AdapterManager(nn.Sequential(nn.LayerNorm(4)), max_loaded=1, max_resident=1)


STEPS = {
    r"num_tokens is \[1\] for 2 adapters": (["wide", None], [1]),
    r"num_tokens is \[-1\]": (["wide"], [-1]),
    "num_tokens sums to 65; accepted: up to max_tokens=64": (["wide"], 65),
    "adapters has 3 different ones; accepted: up to max_resident=2": (["wide", "two", "head"], 1),
}


@pytest.mark.parametrize("words", STEPS)
def test_steps_that_do_not_fit(words: str) -> None:
    manager = managed(resident=2)
    names, counts = STEPS[words]
    with pytest.raises(ValueError, match=words), manager.step(names, counts):
        pass
    assert all(info.slot is None for info in manager.list())


def test_an_unknown_adapter_names_those_that_are_known() -> None:
    manager = managed()
    with pytest.raises(
        KeyError, match="no adapter 'french' is loaded; loaded: small, wide, two, head"
    ):
        manager(tokens(1, 2), adapter_names=["french"])
    with pytest.raises(ValueError, match="'wide' is loaded already"):
        manager.add("wide", SOURCES["wide"])
    with torch.no_grad():
        manager(tokens(1, 2), adapter_names=["wide"])  # nothing is stuck


@pytest.mark.parametrize("count", [0, 3])
def test_names_for_other_rows(count: int) -> None:
    with pytest.raises(ValueError, match=f"adapter_names has {count} names for 2 rows"):
        managed()(tokens(2, 2), adapter_names=["wide"] * count)


def test_rows_that_cannot_be_told() -> None:
    with pytest.raises(ValueError, match="pass input_ids or inputs_embeds"):
        managed()(torch.zeros(3, dtype=torch.int64), adapter_names=["wide"])


def test_a_step_within_a_step() -> None:
    manager = managed()
    with (
        manager.step(["wide"]),
        pytest.raises(RuntimeError, match="a step is running in this thread"),
    ):
        manager.step(["two"]).__enter__()
    with manager.step(["two"]):
        pass


def test_a_step_that_fails_gives_its_slots_back() -> None:
    manager = managed(resident=1)

    def fails() -> None:
        with manager.step(["wide"]):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    manager.activate("two")


def test_what_a_step_uses_stays() -> None:
    manager, ids = managed(resident=2, max_loaded=4), tokens(1, 3)
    with torch.no_grad(), manager.step(["wide"], 3):
        manager.pin("two")
        with pytest.raises(AdapterCacheFull, match="in use by a running step: wide"):
            manager.activate("small")
        manager.remove("wide")
        with pytest.raises(AdapterCacheFull, match="and 1 that were removed"):
            manager.activate("small")
        assert_close(manager.model(ids), expected("wide", ids))
    assert manager.activate("small") == 0


def test_moving_the_model_afterwards_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="move the model before it gets an AdapterManager"):
        managed().model.to("meta")
    manager = managed()
    manager.model.to(torch.bfloat16).to("cpu").eval()
    slots = [m for m in manager.model.modules() if hasattr(m, "lora_a")]
    assert all(m.scaling.dtype is torch.float32 and m.ranks.dtype is torch.int32 for m in slots)


# Compiled


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


# Threads


class Counting(nn.Module):
    """Adapter ``k`` makes every element of both outputs exactly ``k``: half an adapter shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(64, 256, bias=False, dtype=torch.bfloat16) for _ in range(2)
        )
        for layer in self.layers:
            nn.init.zeros_(layer.weight)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layers[0](x), self.layers[1](x)


class Interrupted(Counting):
    """Lets another thread run in the middle of it."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = self.layers[0](x)
        time.sleep(0.001)
        return first, self.layers[1](x)


def counting(value: int) -> Any:
    tensors = {}
    for index in range(2):
        tensors[f"layers.{index}.lora_A.weight"] = torch.full((4, 64), 1 / 64)
        tensors[f"layers.{index}.lora_B.weight"] = torch.full((256, 4), value / 4)
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["layers.0", "layers.1"],
    }
    return config, tensors


@pytest.mark.parametrize("compiled", [False, True])
def test_adapters_are_added_while_another_thread_runs_the_model(compiled: bool) -> None:
    manager = AdapterManager(
        Counting().eval().requires_grad_(False),
        max_loaded=6,
        max_resident=3,
        max_rank=16,
        max_tokens=64,
    )
    if compiled:
        torch.compiler.reset()
        manager.compile(backend="aot_eager", fullgraph=True)
    values = {f"adapter {k}": k for k in range(1, 9)}
    stop, failures = threading.Event(), []
    x = torch.ones(4, 3, 64, dtype=torch.bfloat16)

    def churn(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        while not stop.is_set():
            name = f"adapter {int(torch.randint(1, 9, (), generator=generator))}"
            action = int(torch.randint(0, 8, (), generator=generator))
            try:
                if action == 0:
                    manager.remove(name)
                elif action < 4:
                    manager.add(name, counting(values[name]))
                else:
                    manager.activate(name)
            except (KeyError, ValueError, AdapterCacheFull):
                pass  # another thread was faster, or a step uses every slot
            except BaseException as error:
                failures.append(error)
                raise

    threads = [threading.Thread(target=churn, args=(seed,)) for seed in (1, 2)]
    seen, generator = 0, torch.Generator().manual_seed(0)
    deadline = time.monotonic() + 60
    for thread in threads:
        thread.start()
    try:
        with torch.no_grad():
            while seen < 80 and time.monotonic() < deadline:
                loaded = [info.name for info in manager.list()]
                if len(loaded) < 2:
                    continue
                picks = torch.randint(0, len(loaded), (2,), generator=generator).tolist()
                names = [loaded[picks[0]], None, loaded[picks[1]], loaded[picks[0]]]
                try:
                    outputs = manager(x, adapter_names=names)
                except (KeyError, AdapterCacheFull):
                    continue
                seen += 1
                for output in outputs:
                    wanted = [0 if name is None else values[name] for name in names]
                    found = [output[row].float().unique().tolist() for row in range(4)]
                    assert found == [[value] for value in wanted]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert seen == 80


def test_steps_of_two_threads_do_not_mix() -> None:
    manager = AdapterManager(
        Interrupted().eval().requires_grad_(False),
        max_loaded=4,
        max_resident=2,
        max_rank=16,
        max_tokens=64,
    )
    for k in range(1, 5):
        manager.add(str(k), counting(k))
    wrong: list[Any] = []

    def run(own: tuple[str, str]) -> None:
        x = torch.ones(2, 5, 64, dtype=torch.bfloat16)
        with torch.no_grad():
            for _ in range(20):
                try:
                    outputs = manager(x, adapter_names=own)
                except BaseException as error:
                    wrong.append(error)
                    raise
                for output in outputs:
                    found = [output[row].float().unique().tolist() for row in range(2)]
                    if found != [[float(name)] for name in own]:
                        wrong.append((own, found))

    threads = [threading.Thread(target=run, args=(own,)) for own in (("1", "2"), ("3", "4"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_request_that_lives_many_steps() -> None:
    """With the persistent batch of custom_ops: slots are acquired once, the batch is written for each step."""
    manager, requests = managed(resident=2), None
    requests = custom_ops.RequestBatch(manager.batch)
    slots = {name: manager.acquire(name) for name in ("wide", "small")}
    requests.add("r0", slots["wide"], 3)
    requests.add("r1", slots["small"], 2)
    requests.commit()
    ids = tokens(1, 5)
    with torch.no_grad():
        actual = manager.model(ids)
    assert_close(actual[:, :3], expected("wide", ids[:, :3]))
    assert_close(actual[:, 3:], expected("small", ids[:, 3:]))
    with pytest.raises(AdapterCacheFull):
        manager.activate("two")
    for slot in slots.values():
        manager.release(slot)
    manager.activate("two")
