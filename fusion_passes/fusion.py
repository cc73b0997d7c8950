"""What one fusion has to say.

A fusion states its meaning as plain PyTorch functions (:class:`Pattern`), its replacement as a function that
emits custom ops (``rewrite``), its constraints as sentences, and its memory traffic as sympy expressions. It
never mentions FX: the matcher finds the meaning in a user's graph whatever views and spellings surround it.

    FUSION = Fusion(
        name="silu_mul",
        summary="SiLU of the gate times the up projection",
        patterns=(Pattern(lambda gate, up: F.silu(gate) * up, inputs={"gate": ACTIVATION, "up": ACTIVATION}),),
        rewrite=lambda m: (m.call("silu_mul", m.tensor("gate"), m.tensor("up")),),
        ...
    )
    fusion_passes.register(FUSION)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sympy
import torch

if TYPE_CHECKING:
    from torch import fx

    from fusion_passes.matching import Match
    from fusion_passes.places import Place
    from fusion_passes.reporting import NearMiss, Site
    from fusion_passes.rewriting import Rewrite

__all__ = [
    "Constraint",
    "Fusion",
    "Pattern",
    "Scalar",
    "SizeOf",
    "Tensor",
    "default_state",
]


@dataclass(frozen=True)
class Tensor:
    """A tensor that a pattern takes. ``shape``: expressions over size names, such as ``"num_groups * 128"``.

    ``dtype`` None stands for the activation dtype of the match (bfloat16 or float16, one for the whole match).
    The first dimension of a tensor of two or more dimensions counts tokens: in the user's graph it may be
    spread over any number of leading dimensions.
    """

    shape: tuple[str, ...]
    dtype: torch.dtype | None = None

    def __init__(self, *shape: str, dtype: torch.dtype | None = None) -> None:
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "dtype", dtype)


@dataclass(frozen=True)
class Scalar:
    """A number that a pattern takes; whatever the user's graph has in its place is captured."""


@dataclass(frozen=True)
class SizeOf:
    """An int that a pattern takes and uses as the size of a dimension, such as ``group_size``."""

    name: str


@dataclass(frozen=True)
class Pattern:
    """One spelling of what a fusion replaces.

    fn: plain PyTorch, returning a tensor or a tuple of tensors. The first output must depend on all others.
    inputs: for each parameter of ``fn``, in order, what it is.
    constants: what this spelling means, handed to ``rewrite`` as ``match.constants``.
    """

    fn: Callable[..., Any]
    inputs: Mapping[str, Tensor | Scalar | SizeOf]
    constants: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.fn.__name__)


@dataclass(frozen=True)
class Constraint:
    """``holds(match)`` must be true for the rewrite; ``reason(match)`` is the sentence that reports why not.

    An empty sentence reports nothing: the place is the subject of another fusion.
    """

    holds: Callable[[Match], bool]
    reason: Callable[[Match], str]


@dataclass(frozen=True)
class Fusion:
    """One rewrite of a graph.

    name: the name of the file, the toggle, the environment variable and the report row.
    stage: 0 canonical form, 1 whole blocks, 2 consumers, 3 producers; lower stages run first, and within a
        stage ``priority`` decides (higher first, so that the wider pattern gets its chance before the narrower).
    patterns, rewrite: every spelling, and what replaces a match; ``rewrite`` returns one node per output.
    find: instead of patterns, a walk over the graph that yields each place where the fusion's subject is, for
        ``rewrite``, and a near miss where it almost is: for what no pattern can state.
    transform: instead of patterns, a function over the whole graph that returns the sites it changed, and near misses.
    signature: the normalized operation that gives the fusion's subject away, for near misses (see near_miss.py).
    allow_shared: whether values inside the match may also be used outside of it. They are then computed twice,
        which pays only where the outside users are expected to be fused as well.
    exclusive: at most one pattern can match a place, and all end at the node of the signature: so they are tried, and
        traced, one at a time, and the one that matched last is tried first.
    needs: the operation (see operations.py) that every pattern contains; without one in the graph none is traced.
    measured_as: the sizes of a match as the rows of the tables name them, where the nearest of those rows decides
        whether stock is to have a place; it returns None where a size is not known.
    bytes_before, bytes_after: memory traffic as expressions over the size names, counting each tensor that a
        kernel boundary writes or reads. *Before* is what stock Inductor launches for the same computation.
    """

    name: str
    summary: str
    stage: int
    priority: int = 0
    patterns: tuple[Pattern, ...] = ()
    rewrite: Callable[[Rewrite], tuple[Any, ...]] | None = None
    find: Callable[[fx.Graph], Iterable[Place | NearMiss]] | None = None
    transform: Callable[[fx.Graph], Iterable[Site | NearMiss]] | None = None
    constraints: tuple[Constraint, ...] = ()
    signature: str = ""
    allow_shared: bool = False
    exclusive: bool = False
    needs: str = ""
    measured_as: Callable[[Match], dict[str, Any] | None] | None = None
    bytes_before: str = "0"
    bytes_after: str = "0"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(
                f"a fusion's name is lower case letters, digits and underscores, got {self.name!r}"
            )
        ways = [bool(self.patterns), bool(self.find), bool(self.transform)]
        if sum(ways) != 1 or bool(self.transform) == bool(self.rewrite):
            raise ValueError(
                f"{self.name}: give patterns with a rewrite, or a transform, or find with a rewrite"
            )

    @property
    def environment_variable(self) -> str:
        return f"FUSION_PASSES_{self.name.upper()}"

    def default_state(self, arch: str) -> tuple[bool, str]:
        return default_state(self.name, arch)

    def bytes_saved(self) -> sympy.Expr:
        return sympy.expand(_expression(self.bytes_before) - _expression(self.bytes_after))


@functools.cache
def _expression(text: str) -> sympy.Expr:
    names = set(re.findall(r"[a-z_][a-z0-9_]*", text))
    return sympy.sympify(
        text, locals={name: sympy.Symbol(name, positive=True, integer=True) for name in names}
    )


def default_state(name: str, arch: str) -> tuple[bool, str]:
    """Whether a fusion is on by default for an architecture (``"sm_90"``, ``"cpu"``), and why."""
    from fusion_passes import tables

    return tables.default_state(name, arch)
