"""Orders the copies into slots, and the steps that read them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from fusion_passes.lora import loading
from fusion_passes.lora.loading import Adapter

__all__ = ["Transfers"]


class Transfers:
    """Orders the copies into slots, which have a stream of their own, and the steps that read them. Idle on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if self.on_gpu else None
        self._filled: dict[int, Any] = {}
        self._used: dict[int, list[Any]] = {}
        self._last_step: Any = None

    def pinned(self, adapter: Adapter) -> Adapter:
        """The adapter in page-locked memory, from which a copy does not wait."""
        if not self.on_gpu:
            return adapter
        factors = {
            site: loading.Factors(f.a.pin_memory(), f.b.pin_memory(), f.rank, f.scaling)
            for site, f in adapter.factors.items()
        }
        saved = {
            site: {name: value.pin_memory() for name, value in parameters.items()}
            for site, parameters in adapter.saved.items()
        }
        return Adapter(adapter.name, adapter.rank, factors, saved)

    @contextlib.contextmanager
    def filling(self, slot: int) -> Iterator[None]:
        if not self.on_gpu:
            yield
            return
        for event in self._used.pop(slot, ()):  # steps that read what was in the slot
            self._stream.wait_event(event)
        with torch.cuda.stream(self._stream):
            yield
        self._filled[slot] = self._stream.record_event()

    def before_use(self, slot: int) -> None:
        if self.on_gpu:
            torch.cuda.current_stream(self.device).wait_event(self._filled[slot])

    def after_use(self, slot: int) -> None:
        if self.on_gpu:
            event = torch.cuda.current_stream(self.device).record_event()
            pending = [e for e in self._used.get(slot, ()) if not e.query()]
            self._used[slot] = [*pending, event]

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """One step after another, also where threads have streams of their own: they share the batch's tensors."""
        if not self.on_gpu:
            yield
            return
        stream = torch.cuda.current_stream(self.device)
        if self._last_step is not None:
            stream.wait_event(self._last_step)
        try:
            yield
        finally:
            self._last_step = stream.record_event()
