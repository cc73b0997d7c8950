"""`LoRABatch`: which adapter each token of a step has, in device buffers that stay where they are.

The ops of this folder read it from the device, so that a captured CUDA graph or a compiled model serves any mixture of
adapters: only the content changes. It is written with asynchronous copies from pinned memory, on the current stream,
after whatever still reads the step before and ahead of what reads this one; the host waits for nothing.

Tokens with the same adapter are worked on together, in tiles of at most 16 or 64 of them, whichever the kernel takes.
A tile is (slot, first, count, 0): the tokens sorted_tokens[first : first + count]. Those without an adapter come last,
in tiles of slot -1; after the last tile, count is 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

TILE_TOKENS = (16, 64)
NO_ADAPTER = -1


class LoRABatch:
    """The adapters of the tokens of one step.

    max_tokens: of a step. num_slots: slots that adapters can be in. max_active: different adapters in a step, at most;
    as many as there are slots if None. device: of the buffers.

    token_slots: int32 [max_tokens], the slot of each token, -1: no adapter. sorted_tokens: int32 [max_tokens], the
    tokens in the order of their slots. tiles: int32 [2, max_tiles, 4], those of 16 and those of 64 tokens. All three
    are views of one buffer, and are the same tensors for ever.

    Raises ValueError for sizes below 1.
    """

    def __init__(
        self,
        max_tokens: int,
        num_slots: int,
        *,
        max_active: int | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        most = min(num_slots, max_tokens)
        max_active = most if max_active is None else max_active
        for name, size in (("max_tokens", max_tokens), ("num_slots", num_slots)):
            if size < 1:
                raise ValueError(f"LoRABatch: {name} is {size}; accepted: 1 or more")
        if not 1 <= max_active <= num_slots:
            raise ValueError(
                f"LoRABatch: max_active is {max_active}; accepted: 1 to num_slots, {num_slots}"
            )
        self.max_tokens = max_tokens
        self.num_slots = num_slots
        self.max_active = max_active
        self.num_tokens = 0
        self._tiles = most_tiles(max_tokens, max_active)
        self._room = room = max_tokens + max_tokens % 2  # a tile is read as one, from 16 bytes
        size = 2 * room + len(TILE_TOKENS) * self._tiles * 4
        self._buffer = torch.empty(size, dtype=torch.int32, device=device)
        self._written = np.zeros(0, np.int32)  # what the buffer holds
        self.token_slots = self._buffer[:max_tokens]
        self.sorted_tokens = self._buffer[room : room + max_tokens]
        self.tiles = self._buffer[2 * room :].view(len(TILE_TOKENS), self._tiles, 4)
        self.update(())

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """(token_slots, sorted_tokens, tiles), in the order in which the ops take them."""
        return self.token_slots, self.sorted_tokens, self.tiles

    def update(self, token_slots: Sequence[int] | np.ndarray) -> int:
        """Write the slots of a step's tokens, -1 for no adapter; the tokens after them have none. Returns bytes copied.

        Only the spans that differ from the step before are copied, on the current stream. Raises ValueError for more
        than max_tokens tokens, a slot that is not -1 to num_slots - 1, more than max_active different ones.
        """
        slots = np.asarray(token_slots, dtype=np.int32).reshape(-1)
        if len(slots) > self.max_tokens:
            raise ValueError(
                f"LoRABatch: token_slots has {len(slots)} tokens; accepted: up to max_tokens, {self.max_tokens}"
            )
        if len(slots) and not NO_ADAPTER <= slots.min() <= slots.max() < self.num_slots:
            bad = int(slots.max() if slots.max() >= self.num_slots else slots.min())
            raise ValueError(
                f"LoRABatch: token_slots holds {bad}; accepted: -1 (no adapter) to {self.num_slots - 1}"
            )
        content = self._content(slots)
        self.num_tokens = len(slots)
        return self._write(content)

    def _content(self, slots: np.ndarray) -> np.ndarray:
        every = np.full(self.max_tokens, NO_ADAPTER, np.int32)
        every[: len(slots)] = slots
        # unsigned, -1 is the largest, so that tokens without an adapter come last
        order = np.argsort(every.view(np.uint32), kind="stable").astype(np.int32)
        ordered = every[order]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        counts = np.diff(np.r_[starts, self.max_tokens])
        active = int((ordered[starts] != NO_ADAPTER).sum())
        if active > self.max_active:
            raise ValueError(
                f"LoRABatch: token_slots has {active} different adapters; accepted: up to max_active, {self.max_active}"
            )
        tiles = np.zeros((len(TILE_TOKENS), self._tiles, 4), np.int32)
        for level, size in zip(tiles, TILE_TOKENS, strict=True):
            per_run = -(-counts // size)
            run = np.repeat(np.arange(len(starts)), per_run)
            within = np.arange(len(run)) - np.repeat(np.cumsum(per_run) - per_run, per_run)
            level[: len(run), 0] = ordered[starts[run]]
            level[: len(run), 1] = starts[run] + within * size
            level[: len(run), 2] = np.minimum(counts[run] - within * size, size)
        pad = np.zeros(self._room - self.max_tokens, np.int32)
        return np.concatenate((every, pad, order, pad, tiles.reshape(-1)))

    def _write(self, content: np.ndarray) -> int:
        """Copy what changed, a span of each part of the buffer."""
        first = len(self._written) == 0
        ends = np.cumsum([0, self._room, self._room, *([4 * self._tiles] * len(TILE_TOKENS))])
        copied = 0
        for start, end in itertools.pairwise(ends):
            part = content[start:end]
            changed = (
                np.array([0, end - start - 1])
                if first
                else np.flatnonzero(part != self._written[start:end])
            )
            if len(changed):
                low, high = int(changed[0]), int(changed[-1]) + 1
                self._copy(int(start) + low, part[low:high])
                copied += 4 * (high - low)
        self._written = content
        return copied

    def _copy(self, start: int, values: np.ndarray) -> None:
        # a new staging tensor each time: torch's allocator of pinned memory hands out a block again only when the
        # copies from it are done, so that nothing is overwritten under a copy and nobody waits
        pinned = self._buffer.device.type == "cuda"
        staging = torch.empty(len(values), dtype=torch.int32, pin_memory=pinned)
        staging.numpy()[:] = values
        self._buffer[start : start + len(values)].copy_(staging, non_blocking=True)


def most_tiles(max_tokens: int, max_active: int) -> int:
    """Tiles of 16 that so many tokens of so many adapters, and of none, can be in, at most."""
    return -(-max_tokens // TILE_TOKENS[0]) + max_active
