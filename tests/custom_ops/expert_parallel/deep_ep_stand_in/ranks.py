"""What all buffers of the stand-in do: refuse, count, and hand everyone what each rank has."""

from __future__ import annotations

from typing import Any

import torch


def hold(condition: bool, what: str) -> None:
    """What an assertion of the C++ library raises."""
    if not condition:
        raise RuntimeError(f"Failed: Assertion error stand_in.cpp:1 '{what}'")


class Ranks:
    """The ranks of a group. `made` and `destroyed` count the buffers of this process."""

    made = 0
    destroyed = 0

    def __init__(self, group: Any, explicitly_destroy: bool) -> None:
        self.group, self.rank, self.group_size = group, group.rank(), group.size()
        self.explicitly_destroy = explicitly_destroy
        Ranks.made += 1

    def destroy(self) -> None:
        assert self.explicitly_destroy, "`explicitly_destroy` flag must be set"
        Ranks.destroyed += 1

    def _everyone(self, mine: Any) -> list[Any]:
        """What each rank gave, by rank."""
        found: list[Any] = [None] * self.group_size
        torch.distributed.all_gather_object(found, mine, self.group)
        return found
