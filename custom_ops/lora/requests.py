"""`RequestBatch`: the requests of a serving loop, row by row, and the adapter of each; writes a `LoRABatch`.

Rows stay where they are from step to step, so that a step in which little changed copies little. A request that goes
leaves a hole, whose tokens have no adapter; `condense` fills holes with the last rows.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from custom_ops.lora.batch import NO_ADAPTER, LoRABatch


@dataclass
class _Request:
    name: Hashable
    slot: int
    num_tokens: int


class RequestBatch:
    """Requests in rows, and how many tokens each has in the next step, which holds the tokens row after row.

    A hole (the row of a request that was removed) has no tokens. Nothing is copied to the device before `commit`.
    """

    def __init__(self, batch: LoRABatch) -> None:
        self.batch = batch
        self._rows: list[_Request | None] = []
        self._row_of: dict[Hashable, int] = {}
        self._changed = False

    def __len__(self) -> int:
        """Requests, holes not counted."""
        return len(self._row_of)

    @property
    def rows(self) -> list[Hashable | None]:
        """The name of the request in each row; None for a hole."""
        return [row and row.name for row in self._rows]

    @property
    def num_tokens(self) -> int:
        """Tokens of the next step."""
        return sum(row.num_tokens for row in self._rows if row)

    def add(self, request_id: Hashable, slot: int, num_tokens: int = 1) -> int:
        """Put a request into the first hole, or a new row, and return the row. slot: -1 for no adapter.

        Raises ValueError for a request that is there, a slot that is none, a negative number of tokens, or more tokens
        than the LoRABatch holds; then nothing has changed. So do the other methods.
        """
        if request_id in self._row_of:
            raise ValueError(
                f"RequestBatch: request_id {request_id!r} is in row {self._row_of[request_id]} already"
            )
        self._check_slot(slot)
        self._check_tokens(num_tokens, self.num_tokens)
        request = _Request(request_id, slot, num_tokens)
        row = next((i for i, there in enumerate(self._rows) if there is None), len(self._rows))
        if row == len(self._rows):
            self._rows.append(request)
        else:
            self._rows[row] = request
        self._row_of[request_id] = row
        self._changed = True
        return row

    def remove(self, request_id: Hashable) -> int:
        """Take a request out, and return its row, which is a hole now."""
        row = self._find(request_id)
        del self._row_of[request_id]
        self._rows[row] = None
        while self._rows and self._rows[-1] is None:
            self._rows.pop()
        self._changed = True
        return row

    def swap(self, first: int, second: int) -> None:
        """Exchange two rows, holes or not. Raises ValueError for a row that is not there."""
        for name, row in (("first", first), ("second", second)):
            if not 0 <= row < len(self._rows):
                raise ValueError(
                    f"RequestBatch: {name} is {row}; accepted: 0 to {len(self._rows) - 1}"
                )
        rows = self._rows
        rows[first], rows[second] = rows[second], rows[first]
        for row in (first, second):
            if there := rows[row]:
                self._row_of[there.name] = row
        while rows and rows[-1] is None:
            rows.pop()
        self._changed = True

    def condense(self) -> dict[int, int]:
        """Fill each hole with the last row, until there is none. Returns the moves, old row -> new row."""
        moves = {}
        hole = 0
        while hole < len(self._rows):
            if self._rows[hole] is None:
                last = self._rows.pop()
                if last is not None:
                    moves[len(self._rows)] = hole
                    self._rows[hole] = last
                    self._row_of[last.name] = hole
                    self._changed = True
                continue
            hole += 1
        return moves

    def set_tokens(self, request_id: Hashable, num_tokens: int) -> None:
        """How many tokens a request has in the next step: those of its prompt, then 1; 0 leaves it out."""
        request = self._request(request_id)
        self._check_tokens(num_tokens, self.num_tokens - request.num_tokens)
        self._changed |= request.num_tokens != num_tokens
        request.num_tokens = num_tokens

    def set_slot(self, request_id: Hashable, slot: int) -> None:
        """Give a request another adapter, or -1 for none."""
        self._check_slot(slot)
        request = self._request(request_id)
        self._changed |= request.slot != slot
        request.slot = slot

    def token_slots(self) -> np.ndarray:
        """int32 [num_tokens], the slots of the tokens of the next step."""
        rows = [row for row in self._rows if row]
        return np.repeat(
            np.array([row.slot for row in rows], np.int32), [row.num_tokens for row in rows]
        )

    def commit(self) -> int:
        """Write the LoRABatch, for the next step. Returns the bytes copied: 0 when nothing changed since the last."""
        if not self._changed:
            return 0
        copied = self.batch.update(self.token_slots())
        self._changed = False
        return copied

    def _find(self, request_id: Hashable) -> int:
        if request_id not in self._row_of:
            raise ValueError(f"RequestBatch: request_id {request_id!r} is in no row")
        return self._row_of[request_id]

    def _request(self, request_id: Hashable) -> _Request:
        request = self._rows[self._find(request_id)]
        assert request is not None
        return request

    def _check_slot(self, slot: int) -> None:
        if not NO_ADAPTER <= slot < self.batch.num_slots:
            raise ValueError(
                f"RequestBatch: slot is {slot}; accepted: -1 (no adapter) to {self.batch.num_slots - 1}"
            )

    def _check_tokens(self, num_tokens: int, others: int) -> None:
        if num_tokens < 0:
            raise ValueError(f"RequestBatch: num_tokens is {num_tokens}; accepted: 0 or more")
        if num_tokens + others > self.batch.max_tokens:
            raise ValueError(
                f"RequestBatch: num_tokens is {num_tokens}, beside {others} of the other requests; "
                f"accepted: up to {self.batch.max_tokens} in all, the max_tokens of the LoRABatch"
            )
