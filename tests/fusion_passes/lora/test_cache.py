"""The cache against an obvious model of it: a list of names, a list of slots, and a loop."""

from __future__ import annotations

from collections import Counter
from random import Random

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fusion_passes.lora import AdapterCacheFull, AdapterManager
from fusion_passes.lora.cache import TwoLevelCache
from tests.fusion_passes.lora.adapters import PROJECTIONS, model, source

NAMES = tuple("abcdefgh")
SOURCES = {
    name: source(
        1 + index % 3 * 8, blocks=1, targets=("q_proj", "down_proj")[: 1 + index % 2], seed=index
    )
    for index, name in enumerate(NAMES)
}
STEPS = 1000


class Obvious:
    """What the manager should do, said as plainly as possible."""

    def __init__(self, max_loaded: int, max_resident: int) -> None:
        self.max_loaded, self.slots = max_loaded, [None] * max_resident
        self.loaded: list[str] = []  # least recently used first
        self.pinned: set[str] = set()
        self.leases: list[int] = []

    def slot_of(self, name: str) -> int | None:
        return self.slots.index(name) if name in self.slots else None

    def evictable(self, names: list[str]) -> str:
        for name in self.loaded:
            if name in names and name not in self.pinned and self.slot_of(name) not in self.leases:
                return name
        raise AdapterCacheFull

    def add(self, name: str) -> None:
        if name in self.loaded:
            raise ValueError
        if len(self.loaded) == self.max_loaded:
            self.remove(self.evictable(self.loaded))
        self.loaded.append(name)

    def activate(self, name: str) -> int:
        if name not in self.loaded:
            raise KeyError
        if name not in self.slots:
            free = [s for s, held in enumerate(self.slots) if held is None and s not in self.leases]
            slot = free[0] if free else self.slot_of(self.evictable([n for n in self.slots if n]))
            self.slots[slot] = name
        self.loaded.remove(name)
        self.loaded.append(name)
        return self.slot_of(name)

    def pin(self, name: str) -> int:
        slot = self.activate(name)
        self.pinned.add(name)
        return slot

    def unpin(self, name: str) -> None:
        if name not in self.loaded:
            raise KeyError
        self.pinned.discard(name)

    def remove(self, name: str) -> None:
        if name not in self.loaded:
            raise KeyError
        self.loaded.remove(name)
        self.pinned.discard(name)
        if name in self.slots:
            self.slots[self.slot_of(name)] = None

    def remove_all(self) -> None:
        for name in list(self.loaded):
            self.remove(name)

    def acquire(self, name: str) -> int:
        slot = self.activate(name)
        self.leases.append(slot)
        return slot

    def release(self, slot: int) -> None:
        self.leases.remove(slot)


class AgainstTheModel(RuleBasedStateMachine):
    @initialize(max_resident=st.integers(1, 4), more=st.integers(0, 3))
    def make(self, max_resident: int, more: int) -> None:
        self.model = Obvious(max_resident + more, max_resident)
        self.manager = AdapterManager(
            model(1),
            max_loaded=max_resident + more,
            max_resident=max_resident,
            max_rank=32,
            max_tokens=8,
        )
        self.held: dict[int, str] = {}  # what a lease saw in its slot

    def both(self, method: str, *args: object) -> object:
        outcomes = []
        for side in (self.model, self.manager):
            given = args
            if method == "add" and side is self.manager:
                given = (*args, SOURCES[str(args[0])])
            try:
                outcomes.append(getattr(side, method)(*given))
            except (AdapterCacheFull, KeyError, ValueError) as error:
                outcomes.append(type(error))
        assert outcomes[0] == outcomes[1], f"{method}{args}: {outcomes[1]}, expected {outcomes[0]}"
        return outcomes[0]

    @rule(name=st.sampled_from(NAMES))
    def add(self, name: str) -> None:
        self.both("add", name)

    @rule(name=st.sampled_from(NAMES))
    def activate(self, name: str) -> None:
        self.both("activate", name)

    @rule(name=st.sampled_from(NAMES))
    def pin(self, name: str) -> None:
        self.both("pin", name)

    @rule(name=st.sampled_from(NAMES))
    def unpin(self, name: str) -> None:
        self.both("unpin", name)

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name: str) -> None:
        self.both("remove", name)

    @rule(sure=st.integers(0, 9))
    def remove_all(self, sure: int) -> None:
        if sure == 0:
            self.both("remove_all")

    @rule(name=st.sampled_from(NAMES))
    def acquire(self, name: str) -> None:
        slot = self.both("acquire", name)
        if isinstance(slot, int):
            self.held[slot] = name

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.model.leases:
            self.both("release", data.draw(st.sampled_from(self.model.leases)))

    @invariant()
    def same_adapters(self) -> None:
        found = [(info.name, info.slot, info.pinned) for info in self.manager.list()]
        loaded = self.model.loaded
        assert found == [(n, self.model.slot_of(n), n in self.model.pinned) for n in loaded]

    @invariant()
    def slots_hold_whole_adapters(self) -> None:
        """Those that are resident, and those that were removed while they were in use."""
        expected = {slot: name for slot, name in self.held.items() if slot in self.model.leases}
        expected |= {slot: name for slot, name in enumerate(self.model.slots) if name}
        for slot, name in expected.items():
            assert_holds(self.manager, slot, name)


def assert_holds(manager: AdapterManager, slot: int, name: str) -> None:
    config, tensors = SOURCES[name]
    for target in PROJECTIONS:
        layer, stem = manager._linears[f"layers.0.{target}"], f"base_model.model.layers.0.{target}"
        if f"{stem}.lora_A.weight" not in tensors:
            assert layer.ranks[slot] == 0
            continue
        rank = config["r"]
        assert layer.ranks[slot] == rank
        assert layer.scaling[slot] == config["lora_alpha"] / rank
        a, b = (tensors[f"{stem}.lora_{factor}.weight"].bfloat16() for factor in "AB")
        assert torch.equal(layer.lora_a[slot, :rank], a)
        assert torch.equal(layer.lora_b[slot, :, :rank], b)
        padded = -(-rank // 16) * 16
        assert not layer.lora_a[slot, rank:padded].any()
        assert not layer.lora_b[slot, :, rank:padded].any()


TestAgainstTheModel = AgainstTheModel.TestCase
# how often each: caches that are full, with something pinned and something in use most of the time
WEIGHTS = {
    "add": 30,
    "activate": 25,
    "acquire": 12,
    "release": 12,
    "pin": 4,
    "unpin": 4,
    "remove": 12,
    "remove_all": 1,
}


@given(seed=st.integers(0, 2**32), max_resident=st.integers(1, 4), more=st.integers(0, 3))
def test_a_long_walk(seed: int, max_resident: int, more: int) -> None:
    random = Random(seed)
    machine = AgainstTheModel()
    machine.make(max_resident, more)
    done = Counter()
    for _ in range(STEPS):
        (method,) = random.choices([*WEIGHTS], [*WEIGHTS.values()])
        if method == "release":
            if not machine.model.leases:
                continue
            arguments: tuple[object, ...] = (random.choice(machine.model.leases),)
        else:
            arguments = () if method == "remove_all" else (random.choice(NAMES),)
        outcome = machine.both(method, *arguments)
        if method == "acquire" and isinstance(outcome, int):
            machine.held[outcome] = str(arguments[0])
        machine.same_adapters()
        machine.slots_hold_whole_adapters()
        done[outcome if isinstance(outcome, type) else method] += 1
    hypothesis.event(f"{len(done)} outcomes")


@pytest.mark.parametrize(("loaded", "resident"), [(1, 2), (0, 0), (3, 0)])
def test_sizes_that_make_no_sense(loaded: int, resident: int) -> None:
    with pytest.raises(ValueError, match=f"max_resident is {resident}, max_loaded {loaded}"):
        TwoLevelCache(loaded, resident)


def test_all_pinned_says_so_and_changes_nothing() -> None:
    manager = AdapterManager(model(1), max_loaded=2, max_resident=2, max_rank=32)
    for name in "ab":
        manager.add(name, SOURCES[name])
        manager.pin(name)
    before = manager.list()
    with pytest.raises(
        AdapterCacheFull, match=r"max_loaded=2, and nothing can be evicted: pinned: a, b"
    ):
        manager.add("c", SOURCES["c"])
    assert manager.list() == before


def test_all_slots_pinned_or_in_use_says_which() -> None:
    manager = AdapterManager(model(1), max_loaded=4, max_resident=2, max_rank=32)
    for name in "abc":
        manager.add(name, SOURCES[name])
    manager.pin("a")
    slot = manager.acquire("b")
    with pytest.raises(
        AdapterCacheFull, match=r"max_resident=2.*pinned: a; in use by a running step: b"
    ):
        manager.activate("c")
    manager.release(slot)
    assert manager.activate("c") == slot


def test_a_failed_fill_leaves_no_half_of_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = AdapterManager(model(1), max_loaded=2, max_resident=1, max_rank=32)
    manager.add("b", SOURCES["b"])
    layer = manager._linears["layers.0.down_proj"]
    with monkeypatch.context() as patch:
        patch.setattr(
            layer, "fill", lambda slot, factors: (_ for _ in ()).throw(MemoryError("no room"))
        )
        with pytest.raises(MemoryError):
            manager.pin("b")
    (info,) = manager.list()
    assert (info.slot, info.pinned) == (None, False)
    assert_holds(manager, manager.activate("b"), "b")
