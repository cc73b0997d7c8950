"""Which adapters are on the host and which in device slots: two least-recently-used caches, one inside the other."""

from __future__ import annotations

from collections import Counter, OrderedDict

__all__ = ["AdapterCacheFull", "TwoLevelCache"]


class AdapterCacheFull(RuntimeError):
    """Nothing can be evicted: every adapter of a level is pinned or in use by a running step."""


class TwoLevelCache:
    """Names only: no tensors, no locks.

    An adapter in a slot is always on the host too. A level that is full makes room by evicting its least recently
    used adapter that is neither pinned nor in use; what leaves the host leaves its slot. A slot whose adapter was
    removed while a step used it is free once the step has ended.
    """

    def __init__(self, max_loaded: int, max_resident: int) -> None:
        if not 1 <= max_resident <= max_loaded:
            raise ValueError(
                f"max_resident is {max_resident}, max_loaded {max_loaded}; accepted: 1 <= max_resident <= max_loaded"
            )
        self.max_loaded, self.max_resident = max_loaded, max_resident
        self.loaded: OrderedDict[str, None] = OrderedDict()  # least recently used first
        self.slots: dict[str, int] = {}
        self.pinned: set[str] = set()
        self.in_use: Counter[int] = Counter()  # by slot: its adapter may be gone
        self._free = set(range(max_resident))

    def require(self, name: str) -> None:
        if name not in self.loaded:
            raise KeyError(
                f"no adapter {name!r} is loaded; loaded: {', '.join(self.loaded) or 'none'}"
            )

    def add(self, name: str) -> str | None:
        """Take a name in; returns the name that was evicted for it."""
        if name in self.loaded:
            raise ValueError(f"an adapter {name!r} is loaded already: remove it first")
        evicted = None
        if len(self.loaded) == self.max_loaded:
            evicted = self._least_recently_used(list(self.loaded), f"max_loaded={self.max_loaded}")
            self.remove(evicted)
        self.loaded[name] = None
        return evicted

    def activate(self, name: str) -> tuple[int, bool]:
        """The slot of an adapter, and whether it is a new one that has to be filled."""
        self.require(name)
        new = name not in self.slots
        if new:
            if not self._free:
                self._vacate(
                    self._least_recently_used(
                        [other for other in self.loaded if other in self.slots],
                        f"max_resident={self.max_resident}",
                    )
                )
            slot = min(self._free)
            self._free.remove(slot)
            self.slots[name] = slot
        self.loaded.move_to_end(name)
        return self.slots[name], new

    def pin(self, name: str) -> tuple[int, bool]:
        result = self.activate(name)
        self.pinned.add(name)
        return result

    def unpin(self, name: str) -> None:
        self.require(name)
        self.pinned.discard(name)

    def remove(self, name: str) -> None:
        """Pinned or not."""
        self.require(name)
        del self.loaded[name]
        self.pinned.discard(name)
        if name in self.slots:
            self._vacate(name)

    def acquire(self, slot: int) -> None:
        self.in_use[slot] += 1

    def release(self, slot: int) -> None:
        self.in_use[slot] -= 1
        if not self.in_use[slot]:
            del self.in_use[slot]
            if slot not in self.slots.values():
                self._free.add(slot)

    def deactivate(self, name: str) -> None:
        """Take an adapter that stays on the host out of its slot."""
        self.pinned.discard(name)
        self._vacate(name)

    def _vacate(self, name: str) -> None:
        slot = self.slots.pop(name)
        if slot not in self.in_use:
            self._free.add(slot)

    def _least_recently_used(self, names: list[str], limit: str) -> str:
        for name in names:
            if name not in self.pinned and self.slots.get(name) not in self.in_use:
                return name
        pinned = [name for name in names if name in self.pinned]
        busy = [name for name in names if name not in self.pinned]
        draining = self.in_use.keys() - self.slots.values()
        raise AdapterCacheFull(
            f"{limit}, and nothing can be evicted: pinned: {', '.join(pinned) or 'none'}; in use by a running step: "
            f"{', '.join(busy) or 'none'}"
            + (
                f" and {len(draining)} that were removed"
                if draining and "resident" in limit
                else ""
            )
        )
