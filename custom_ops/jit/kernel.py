"""The words of JIT compilation: a problem in a graph, the kernels that it reaches, and who compiles them.

A *problem* is one node of a graph: an op, the implementation that runs it, and arguments whose token count
may be a range. A *kernel* is one compilation that some token counts of it need; many counts, and many
problems, share one. A *compiler* knows which kernels a problem reaches and how to compile each.
`custom_ops.jit.compilers` finds the compiler of an implementation by its name.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

MODES = ("relax", "full")


@dataclass(frozen=True)
class Operand:
    """A tensor argument. A size or stride that the graph does not know is the text of its expression.

    layout: "column_major_tma" for scales that are certainly in that layout of `custom_ops.scales`, else "".
    offset: elements from the start of the memory that it is a view of.
    """

    dtype: str
    shape: tuple[int | str, ...]
    stride: tuple[int | str, ...]
    layout: str = ""
    offset: int | str = 0

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Operand:
        shape, stride = tuple(data["shape"]), tuple(data["stride"])
        return cls(data["dtype"], shape, stride, data["layout"], data.get("offset", 0))


@dataclass(frozen=True)
class Problem:
    """One node of a graph that runs a JIT-compiled implementation.

    arguments: the op's, in the order of its schema: an Operand for a tensor, a tuple for a list, numbers and names
    as they are.
    rows: smallest and largest product of the leading dimensions of the first argument, as far as the graph
    says; None for no upper bound. symbolic: whether that product is a range at all.
    """

    op: str
    implementation: str
    arguments: tuple[Any, ...]
    rows: tuple[int, int | None]
    symbolic: bool

    def range(self, low: int, high: int) -> tuple[int, int] | None:
        """The row counts to compile for when calls have low to high tokens; None if there is none.

        A graph of one size is compiled for that size, whatever is asked for. A lower bound of 2 is where
        Dynamo's symbols begin, which traces 0 and 1 apart, and is taken as 1.
        """
        smallest, largest = self.rows
        if not self.symbolic:
            return (smallest, smallest) if smallest > 0 else None
        low = max(low, 1 if smallest <= 2 else smallest)
        high = high if largest is None else min(high, largest)
        return (low, high) if low <= high else None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Problem:
        low, high = data["rows"]
        arguments = _argument_from_json(data["arguments"])
        return cls(data["op"], data["implementation"], arguments, (low, high), data["symbolic"])


def _argument_from_json(data: Any) -> Any:
    if isinstance(data, (list, tuple)):
        return tuple(_argument_from_json(each) for each in data)
    return Operand.from_json(data) if isinstance(data, Mapping) else data


@dataclass(frozen=True)
class Target:
    """The machine that kernels are for. A plan keeps it, so that a machine without a GPU can replay one.

    arch: as nvcc spells it, such as "9.0a"; "cpu" without a GPU. multiprocessors, driver: of the GPU.
    """

    arch: str
    multiprocessors: int = 0
    driver: str = ""
    name: str = ""


@dataclass(frozen=True)
class Kernel:
    """One compilation. Two kernels are the same if implementation and `spec` are.

    spec: all that the compiler needs, in JSON's types. example: sizes that reach it, such as M, N and K.
    """

    op: str = field(compare=False)
    implementation: str
    spec: tuple[tuple[str, Any], ...]
    example: tuple[tuple[str, int], ...] = field(default=(), compare=False)

    @classmethod
    def of(cls, op: str, implementation: str, spec: Mapping[str, Any], **example: int) -> Kernel:
        return cls(op, implementation, tuple(sorted(spec.items())), tuple(example.items()))

    @property
    def label(self) -> str:
        """A name for progress bars and messages. A spec that fills no line is named by its function and a hash."""
        text = ", ".join(f"{name}={value}" for name, value in self.spec)
        if function := dict(self.spec).get("function"):
            text = f"{function} {hashlib.sha256(text.encode()).hexdigest()[:8]}"
        return f"{self.implementation}({text})"

    def __getitem__(self, name: str) -> Any:
        return dict(self.spec)[name]

    def to_json(self) -> dict[str, Any]:
        return {
            "op": self.op,
            "implementation": self.implementation,
            "spec": dict(self.spec),
            "example": dict(self.example),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Kernel:
        return cls.of(data["op"], data["implementation"], data["spec"], **data["example"])


class NotCovered(ValueError):
    """A problem compiles more than can be named; `kernels` is what can be."""

    def __init__(self, why: str, kernels: Iterable[Kernel] = ()) -> None:
        super().__init__(why)
        self.kernels = tuple(kernels)


class Compiler(abc.ABC):
    """Knows the kernels of one implementation. Importing its module imports none of what it drives.

    name: goes into file names. memory: the most bytes that one compilation takes, which bounds how many run
    at once.
    """

    name: ClassVar[str]
    memory: ClassVar[int] = 1 << 30

    def version(self) -> str:
        """Of what decides which kernels a problem reaches: a plan made with another one does not hold."""
        return ""

    def why_not(self, target: Target) -> str | None:
        """Why it can neither enumerate nor compile here, or None."""
        return None

    def knows(self, op: str) -> bool:
        """Whether it can say which kernels an op reaches; of others they are found by `tracing`."""
        return True

    @abc.abstractmethod
    def kernels(
        self, problem: Problem, low: int, high: int, mode: str, target: Target
    ) -> Iterable[Kernel]:
        """The distinct kernels that low to high rows of a problem reach; those of other compilers as well.

        mode: "full" for every reachable one, "relax" for those of the powers of two and tile boundaries. Raises
        NotCovered, with what is known, or another ValueError for a problem of which nothing is.
        """

    @abc.abstractmethod
    def environment(self, target: Target) -> Mapping[str, str]:
        """What compiled code depends on beside the spec: versions, hashes, architecture, driver."""

    @abc.abstractmethod
    def command(self, kernel: Kernel, folder: Path, target: Target) -> Sequence[str]:
        """The process that compiles a kernel, its output in a private empty folder."""

    @abc.abstractmethod
    def publish(self, kernel: Kernel, folder: Path, target: Target) -> Sequence[Path]:
        """Put the output where the implementation finds it, atomically; the files that must stay as they are."""

    def existing(self, kernel: Kernel, target: Target) -> Sequence[Path] | None:
        """The files of a kernel that somebody else compiled and that can be told to be whole, or None."""
        return None

    def private(self, kernel: Kernel) -> Path | None:
        """Where private folders must lie so that `publish` can rename them; None: beside the markers."""
        return None

    def load(self, kernels: Sequence[Kernel]) -> None:  # noqa: B027  (most have nothing to load)
        """Load compiled kernels into this process, so that no first call has to."""

    def identity(self, kernel: Kernel, target: Target) -> str:
        """The name of what is compiled: another spec, version, driver or architecture has another."""
        parts = [self.name, dict(kernel.spec), dict(self.environment(target))]
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def powers_and_boundaries(low: int, high: int, tiles: Iterable[int]) -> list[int]:
    """The row counts that "relax" looks at: the ends, powers of two, each tile height and one row more."""
    wanted = {low, high, *(1 << bit for bit in range(high.bit_length()))}
    for tile in tiles:
        wanted |= {tile, tile + 1}
    return sorted(m for m in wanted if low <= m <= high)
