"""LoRABatch and RequestBatch against obvious models of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from custom_ops.lora import LoRABatch, RequestBatch
from custom_ops.lora.batch import TILE_TOKENS
from tests.custom_ops.helpers import DEVICE

MOST = 150


def assert_consistent(batch: LoRABatch, slots: list[int]) -> None:
    """What the buffers say is what a loop over the tokens says."""
    every = [*slots, *[-1] * (batch.max_tokens - len(slots))]
    assert batch.token_slots.tolist() == every
    order = batch.sorted_tokens.tolist()
    last = batch.num_slots
    assert order == sorted(
        range(batch.max_tokens), key=lambda t: every[t] if every[t] >= 0 else last
    )
    for level, size in zip(batch.tiles.tolist(), TILE_TOKENS, strict=True):
        used = [tile for tile in level if tile[2]]
        assert level[: len(used)] == used  # after the last tile there is none
        position = 0
        for slot, first, count, _ in used:
            assert first == position
            assert 1 <= count <= size
            assert {every[token] for token in order[first : first + count]} == {slot}
            position += count
        assert position == batch.max_tokens
        # a tile is short only where its adapter has no more tokens
        short = [tile[0] for tile in used if tile[2] < size]
        assert len(short) == len(set(short))


@st.composite
def steps(draw):
    """Sizes of a LoRABatch, and the slots of a few steps."""
    num_slots = draw(st.integers(1, 8))
    most = draw(st.integers(1, MOST))
    slots = st.lists(st.integers(-1, num_slots - 1), max_size=most)
    return most, num_slots, draw(st.lists(slots, min_size=1, max_size=4))


@given(steps())
def test_every_step_is_what_a_loop_says(drawn):
    most, num_slots, sequence = drawn
    batch = LoRABatch(most, num_slots, device=DEVICE)
    tensors = batch.tensors
    addresses = [tensor.data_ptr() for tensor in tensors]
    for slots in sequence:
        batch.update(slots)
        assert batch.num_tokens == len(slots)
        assert_consistent(batch, slots)
        assert batch.update(slots) == 0  # nothing changed, nothing is copied
    assert [tensor.data_ptr() for tensor in batch.tensors] == addresses
    assert all(old is new for old, new in zip(tensors, batch.tensors, strict=True))


@given(st.integers(1, 300), st.integers(1, 40), st.data())
@settings(max_examples=15)
def test_kernels_launch_enough_programs(tokens, num_slots, data):
    """The bound that a launch takes from the sizes alone covers every tile of its tokens."""
    from custom_ops.lora.launch import Tokens

    batch = LoRABatch(tokens + data.draw(st.integers(0, 70)), num_slots, device=DEVICE)
    slots = data.draw(st.lists(st.integers(-1, num_slots - 1), min_size=tokens, max_size=tokens))
    batch.update(slots)
    view = Tokens(torch.zeros(num_slots), batch.sorted_tokens, batch.tiles)
    order = batch.sorted_tokens.tolist()
    for size in TILE_TOKENS:
        level = view.of_size(size).tolist()
        needed = [
            i
            for i, (_, first, count, _) in enumerate(level)
            if any(token < tokens for token in order[first : first + count])
        ]
        assert max(needed) < view.bound(tokens, size)


@given(st.integers(1, 300), st.integers(1, 40))
@settings(max_examples=15)
def test_tiles_begin_on_16_bytes(tokens, num_slots):
    tiles = LoRABatch(tokens, num_slots, device=DEVICE).tiles
    assert tiles.data_ptr() % 16 == 0
    assert tiles[1].data_ptr() % 16 == 0


def test_only_what_changed_is_copied():
    batch = LoRABatch(4096, 64, device=DEVICE)
    slots = np.arange(1000) % 64
    assert batch.update(slots) > 4000
    slots[500] = 7
    slots[501] = 500 % 64
    assert batch.update(slots) < 4 * 4096


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "max_tokens is 0; accepted: 1 or more"),
        ((4, 0), "num_slots is 0; accepted: 1 or more"),
    ],
)
def test_sizes_are_checked(arguments, message):
    with pytest.raises(ValueError, match=f"LoRABatch: {message}"):
        LoRABatch(*arguments, device=DEVICE)


def test_steps_are_checked_and_a_bad_one_changes_nothing():
    with pytest.raises(ValueError, match="max_active is 5; accepted: 1 to num_slots, 4"):
        LoRABatch(8, 4, max_active=5, device=DEVICE)
    batch = LoRABatch(8, 4, max_active=2, device=DEVICE)
    batch.update([0, 1, -1])
    for slots, message in (
        ([0] * 9, "token_slots has 9 tokens; accepted: up to max_tokens, 8"),
        ([4], "token_slots holds 4; accepted: -1 .no adapter. to 3"),
        ([-2], "token_slots holds -2"),
        ([0, 1, 2], "has 3 different adapters; accepted: up to max_active, 2"),
    ):
        with pytest.raises(ValueError, match=message):
            batch.update(slots)
        assert_consistent(batch, [0, 1, -1])


class Requests(RuleBasedStateMachine):
    """Arrivals, departures and changes of adapters, against a list of rows and a loop over it."""

    def __init__(self):
        super().__init__()
        self.requests = RequestBatch(LoRABatch(40, 5, device=DEVICE))
        self.rows = []  # [name, slot, tokens] or None for a hole
        self.names = 0

    def named(self):
        return [row for row in self.rows if row]

    @rule(slot=st.integers(-1, 4), tokens=st.integers(0, 12))
    def add(self, slot, tokens):
        self.names += 1
        if sum(row[2] for row in self.named()) + tokens > 40:
            with pytest.raises(ValueError, match=f"num_tokens is {tokens}, beside"):
                self.requests.add(self.names, slot, tokens)
            return
        hole = self.rows.index(None) if None in self.rows else len(self.rows)
        self.rows[hole : hole + 1] = [[self.names, slot, tokens]]
        assert self.requests.add(self.names, slot, tokens) == hole

    @precondition(lambda self: self.named())
    @rule(data=st.data())
    def remove(self, data):
        row = data.draw(st.sampled_from(self.named()))
        at = self.rows.index(row)
        assert self.requests.remove(row[0]) == at
        self.rows[at] = None
        self._trim()

    @precondition(lambda self: self.named())
    @rule(data=st.data(), slot=st.integers(-1, 4), tokens=st.integers(0, 3))
    def change(self, data, slot, tokens):
        row = data.draw(st.sampled_from(self.named()))
        self.requests.set_slot(row[0], slot)
        row[1] = slot
        if sum(other[2] for other in self.named()) - row[2] + tokens <= 40:
            self.requests.set_tokens(row[0], tokens)
            row[2] = tokens

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def swap(self, data):
        first, second = (data.draw(st.integers(0, len(self.rows) - 1)) for _ in range(2))
        self.requests.swap(first, second)
        self.rows[first], self.rows[second] = self.rows[second], self.rows[first]
        self._trim()

    @rule()
    def condense(self):
        before = list(self.rows)
        moves = self.requests.condense()
        kept = len(self.named())
        after = [before[{new: old for old, new in moves.items()}.get(i, i)] for i in range(kept)]
        assert sorted(row[0] for row in after) == sorted(row[0] for row in self.named())
        assert all(old >= kept > new for old, new in moves.items())
        self.rows = after

    @rule()
    def commit(self):
        self.requests.commit()
        assert_consistent(
            self.requests.batch, [row[1] for row in self.named() for _ in range(row[2])]
        )
        assert self.requests.commit() == 0

    @invariant()
    def same_rows(self):
        assert self.requests.rows == [row and row[0] for row in self.rows]
        assert len(self.requests) == len(self.named())

    def _trim(self):
        while self.rows and self.rows[-1] is None:
            self.rows.pop()


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)


def test_requests_are_checked():
    requests = RequestBatch(LoRABatch(4, 2, device=DEVICE))
    requests.add("a", 0)
    for call, message in (
        (lambda: requests.add("a", 1), "request_id 'a' is in row 0 already"),
        (lambda: requests.add("b", 2), r"slot is 2; accepted: -1 .no adapter. to 1"),
        (lambda: requests.add("b", 0, -1), "num_tokens is -1; accepted: 0 or more"),
        (lambda: requests.remove("c"), "request_id 'c' is in no row"),
        (lambda: requests.swap(0, 1), "second is 1; accepted: 0 to 0"),
        (lambda: requests.set_tokens("a", 5), "num_tokens is 5, beside 0 of the other requests"),
    ):
        with pytest.raises(ValueError, match=f"RequestBatch: {message}"):
            call()
    assert requests.rows == ["a"]
