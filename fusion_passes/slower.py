"""The places that a fusion leaves to stock, because a measurement says that stock is faster there.

A fusion is on where it pays, and may be behind at some sizes all the same. The map of sizes (``python -m bench.heat``)
finds those, ``python -m bench tune`` writes them into the tables, and here a place is held against them. Of a fusion
that was measured at some sizes, and has no map, the row that is nearest to a place decides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import custom_ops
from fusion_passes import index_map, tables, torch_internals
from fusion_passes.matching import Match
from fusion_passes.operations import readers

if TYPE_CHECKING:
    from torch import fx

    from fusion_passes.fusion import Fusion
    from fusion_passes.places import Place

_WIDTH = ("hidden_size", "num_groups", "group_size")
"""The names that sizes along a token have in patterns."""


class Left:
    """What a run over one graph leaves to stock. ``arch``: of the graph's device."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self._left: dict[fx.Node, str] = {}

    def why(self, fusion: Fusion, match: Match | Place) -> str | None:
        """Why stock is to have a place, or None.

        What one fusion left is left by those that would take a part of it: stock makes one kernel of all of it, and an
        op in its midst would make two. A quantization whose scales a block-scaled product reads is not left: the op
        writes them in the layout of the product, and stock would leave that to another kernel.
        """
        root = match.outputs[0]
        if root not in self._left:
            found = self._slower(fusion, match)
            if found is None:
                return None
            self._left[root] = found
        return self._left[root]

    def _slower(self, fusion: Fusion, match: Match | Place) -> str | None:
        if not isinstance(match, Match):
            return None
        tokens = match.sizes.get("num_tokens")
        if fusion.measured_as is not None and tokens is not None:
            bounds = torch_internals.size_bounds(tokens, match.graph)
            sizes = fusion.measured_as(match)
            if sizes is None:
                return None
            return tables.slower_nearby(fusion.name, self.arch, sizes, bounds)
        if match.arithmetic is None:
            return None
        width = [match.sizes[name] for name in _WIDTH if name in match.sizes]
        product = custom_ops.ops()["block_scaled_mm"].overload
        if (
            tokens is None
            or not width
            or any(r.target is product for out in match.outputs for r in readers(out))
        ):
            return None
        return tables.slower(
            fusion.name,
            self.arch,
            match.arithmetic.dtype,
            torch_internals.size_bounds(tokens, match.graph),
            torch_internals.size_bounds(index_map.product(width), match.graph),
        )
