"""Where a walk over the graph found the subject of a fusion that no pattern can state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fusion_passes.index_map import IndexMap, Size

if TYPE_CHECKING:
    from fusion_passes.fusion import Fusion


@dataclass
class Place:
    """To ``rewrite`` functions, ``verify`` and the report what a :class:`~fusion_passes.matching.Match` is.

    spelling: the way of writing that was found, for the report. outputs: the nodes that the rewrite replaces. inside:
    the nodes that go away with them; another reader of one of them keeps the place as it is. inputs: what is read, by
    name. sizes: by the names that the fusion's bytes are made of. limits: for inputs that are indices, the number that
    they stay below. constants: whatever else the rewrite needs. comparable: what of the outputs' values ``verify``
    compares. tolerance: of a result that is accumulated, as ``verify`` has it; None: the usual.
    """

    fusion: Fusion
    graph: fx.Graph
    spelling: str
    outputs: Sequence[fx.Node]
    inside: Sequence[fx.Node]
    inputs: Mapping[str, fx.Node]
    sizes: Mapping[str, Size]
    limits: Mapping[fx.Node, int] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    scalars: Mapping[str, float | fx.Node] = field(default_factory=dict)
    comparable: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]] = list
    tolerance: float | None = None

    @property
    def nodes(self) -> dict[fx.Node, fx.Node]:
        return {node: node for node in (*self.inside, *self.outputs)}

    @property
    def captured(self) -> dict[str, list[tuple[fx.Node, IndexMap, IndexMap]]]:
        return {name: [(node, (), ())] for name, node in self.inputs.items()}

    @property
    def dtype(self) -> torch.dtype:
        return self.outputs[0].meta["val"].dtype

    @property
    def device(self) -> torch.device:
        return self.outputs[0].meta["val"].device
