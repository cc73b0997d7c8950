"""Puts a match's replacement into the graph: the nodes, their metadata, the views around them."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

import custom_ops
from custom_ops.library import Choice, Op
from fusion_passes import index_map, torch_internals
from fusion_passes.fusion import Tensor
from fusion_passes.index_map import Size
from fusion_passes.matching import Match
from fusion_passes.operations import shape_of
from fusion_passes.places import Place

aten = torch.ops.aten


class NotRewritten(Exception):
    """A match that cannot be rewritten, with the sentence for the report."""


class Rewrite:
    """What a fusion's ``rewrite`` works with: the captured values in, new nodes out.

    Nodes are inserted before the match's first output. Nothing in the graph changes until
    :meth:`commit`; :meth:`abandon` takes back what was emitted.
    """

    def __init__(self, match: Match | Place, allow_reference: bool) -> None:
        self.match: Any = match
        self.graph = match.graph
        self.allow_reference = allow_reference
        self.emitted: list[fx.Node] = []
        self.implementations: list[str] = []
        self._anchor = match.outputs[0]
        self._lead: tuple[Size, ...] | None = None
        self._fake_mode = torch_internals.fake_mode_of(self.graph)

    @property
    def constants(self) -> Any:
        return self.match.constants

    @property
    def dtype(self) -> torch.dtype:
        assert self.match.dtype is not None
        return self.match.dtype

    def size(self, name: str) -> Size:
        return self.match.sizes[name]

    def scalar(self, name: str) -> float | fx.Node:
        """A captured number; a 0-d tensor on the CPU where the value is known only at run time."""
        return self.match.scalars[name]

    def tensor(self, name: str) -> fx.Node:
        """A captured tensor with the trailing dimension that the pattern declares.

        Tensors over tokens keep the leading dimensions of the user's graph, the same for all of them. A node of
        the graph that already has the shape is used; a view is emitted only where there is none.
        """
        spec = self.match.compiled.pattern.inputs[name]
        assert isinstance(spec, Tensor)
        try:
            last = self.match.resolve(spec.shape[-1])
        except ValueError as unknown:
            raise NotRewritten(str(unknown)) from None
        chain = [node for node, *_ in self.match.captured[name]]
        over_tokens = spec.shape[0] == "num_tokens" and len(spec.shape) > 1
        fitting = [
            n for n in chain if n.meta["val"].dim() and index_map.same_size(shape_of(n)[-1], last)
        ]
        if len(spec.shape) == 1:
            fitting = [n for n in fitting if n.meta["val"].dim() == 1]
        elif not over_tokens:
            fitting = [n for n in fitting if n.meta["val"].dim() == len(spec.shape)]
        elif self._lead is not None:
            fitting = [n for n in fitting if _same_shape(shape_of(n)[:-1], self._lead)]
        if fitting:
            chosen = fitting[0]
        else:
            lead = (
                self._lead
                if over_tokens and self._lead is not None
                else _split_lead(shape_of(chain[0]), last)
            )
            chosen = self.view(chain[0], (*lead, last))
        if over_tokens:
            self._lead = shape_of(chosen)[:-1]
        return chosen

    def call(self, op_name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """Emit a custom op. Raises :class:`NotRewritten` where only its reference could run, unless allowed."""
        op = custom_ops.ops()[op_name]
        takes_a_dtype = any(isinstance(value, torch.dtype) for value in op.defaults.values())
        if takes_a_dtype and torch_internals.package_garbles_dtypes():
            raise NotRewritten(
                f"{op_name} takes a dtype, and in a package of torch {torch.__version__} it gets another one"
            )
        choice = choose(op, args, kwargs)
        assert choice.implementation is not None
        name = choice.implementation.name
        if name == "reference" and not self.allow_reference:
            raise NotRewritten(
                f"{op_name} has no fused implementation here ("
                + "; ".join(f"{other}: {why}" for other, why in choice.rejected.items())
                + "); FUSION_PASSES_ALLOW_REFERENCE=1 would use the reference"
            )
        at_run_time = any(
            isinstance(arg, fx.Node) and arg in self.match.scalars.values() for arg in args
        )
        overload = op.tensor_eps if at_run_time else op.overload
        assert overload is not None
        node = self._emit(overload, args, kwargs)
        self.implementations.append(f"{op_name}:{name}")
        return node

    def outputs_of(self, node: fx.Node, count: int) -> tuple[fx.Node, ...]:
        """The elements of a node that returns several tensors."""
        return tuple(self._emit(operator.getitem, (node, index), {}) for index in range(count))

    def view(self, node: fx.Node, shape: Sequence[Size]) -> fx.Node:
        if _same_shape(shape_of(node), shape):
            return node
        symbolic = [i for i, size in enumerate(shape) if not isinstance(size, int)]
        sizes = [
            -1 if [i] == symbolic else self._size_argument(node, size)
            for i, size in enumerate(shape)
        ]
        try:
            return self._emit(aten.view.default, (node, sizes), {})
        except (ValueError, RuntimeError) as error:
            how = f"{node.name} lies in memory so that it is no view of {tuple(shape)}"
            raise NotRewritten(how) from error

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return self._emit(torch.ops.prims.convert_element_type.default, (node, dtype), {})

    def full(self, like: fx.Node, shape: Sequence[Size], value: float) -> fx.Node:
        """A tensor of one number, of the dtype and on the device of a node; one for all matches of a graph."""
        fake = like.meta["val"]
        sizes = [
            size if isinstance(size, int) else self._size_argument(like, size) for size in shape
        ]
        where = {"dtype": fake.dtype, "device": fake.device, "pin_memory": False}
        for node in self.graph.find_nodes(op="call_function", target=aten.full.default):
            if (node.args, node.kwargs) == ((sizes, value), where) and node < self._anchor:
                return node  # each would be a kernel
        return self._emit(aten.full.default, (sizes, value), where)

    def emit(self, target: Any, *args: Any) -> fx.Node:
        return self._emit(target, args, {})

    def finish(self, results: Sequence[fx.Node]) -> list[fx.Node]:
        """The results in the shapes and dtypes of the outputs that they replace."""
        finished = []
        for result, output in zip(results, self.match.outputs, strict=True):
            expected, got = output.meta["val"], result.meta["val"]
            if got.dtype != expected.dtype or got.device != expected.device:
                raise NotRewritten(
                    f"the replacement of {output.name} is {got.dtype} on {got.device}, not {expected.dtype}"
                )
            if _is_contiguous(got) and not _is_contiguous(expected):
                raise NotRewritten(
                    f"{output.name} is transposed in memory; a contiguous one would be copied later"
                )
            finished.append(self.view(result, shape_of(output)))
        return finished

    def commit(self, finished: Sequence[fx.Node]) -> None:
        inside = {*self.emitted, *self.match.nodes.values()}
        for output, node in zip(self.match.outputs, finished, strict=True):
            output.replace_all_uses_with(node, delete_user_cb=lambda user: user not in inside)

    def abandon(self) -> None:
        for node in reversed(self.emitted):
            self.graph.erase_node(node)
        self.emitted.clear()

    def _size_argument(self, node: fx.Node, size: Size) -> int | fx.Node:
        if isinstance(size, int):
            return size
        for source in (
            node,
            *(base for chain in self.match.captured.values() for base, *_ in chain),
            *self.match.outputs[1:],
        ):
            for dim, found in enumerate(shape_of(source)):
                if index_map.same_size(found, size):
                    return self._emit(aten.sym_size.int, (source, dim), {})
        raise NotRewritten(f"no tensor of the match has a dimension of size {size}")

    def _emit(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> fx.Node:
        with self.graph.inserting_before(self._anchor):
            node = self.graph.call_function(target, tuple(args), kwargs)
        self.emitted.append(node)
        with self._fake_mode:
            fake = getattr(target, "fake", target)  # a meaning has a fake of its own
            node.meta["val"] = fake(*self._fake(args), **self._fake(kwargs))
        for key in ("stack_trace", "nn_module_stack"):
            if key in self._anchor.meta:
                node.meta[key] = self._anchor.meta[key]
        return node

    def _fake(self, value: Any) -> Any:
        return fx.node.map_arg(value, lambda node: node.meta["val"])


def choose(op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Choice:
    """What would run an op in a graph; a number that is known only at run time does not matter for it."""

    def value(node: fx.Node) -> Any:
        fake = node.meta["val"]
        return 0.0 if isinstance(fake, torch.Tensor) and fake.dim() == 0 else fake

    fake_args, fake_kwargs = fx.node.map_arg((tuple(args), dict(kwargs)), value)
    return op.choose(*fake_args, **fake_kwargs)


def _is_contiguous(tensor: torch.Tensor) -> bool:
    """As far as that is known without a guard."""
    expected: Size = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        size, stride = torch_internals.size_to_expr(size), torch_internals.size_to_expr(stride)
        if size != 1 and not index_map.same_size(stride, expected):
            return False
        expected = expected * size
    return True


def _same_shape(a: Sequence[Size], b: Sequence[Size]) -> bool:
    return len(a) == len(b) and all(index_map.same_size(x, y) for x, y in zip(a, b, strict=True))


def _split_lead(shape: Sequence[Size], last: Size) -> tuple[Size, ...]:
    """The leading dimensions that are left when the trailing ones are merged into one of size ``last``."""
    for split in range(len(shape), -1, -1):
        if index_map.same_size(index_map.product(shape[split:]), last) and split < len(shape):
            return tuple(shape[:split])
    lead = index_map.divide(index_map.product(shape), last)
    if lead is None:
        raise NotRewritten(
            f"a tensor of shape {tuple(shape)} cannot be viewed with a last dimension of {last}"
        )
    return (lead,)


def would_cycle(match: Match | Place) -> bool:
    """Whether an input of the match depends on one of its outputs by a way outside of it."""
    inside = set(match.nodes.values())
    outputs = [node for node in match.outputs if node is not match.outputs[0]]
    outside = [
        user
        for node in outputs
        for user in node.users
        if user not in inside and user < match.outputs[0]
    ]
    if not outside:
        return False
    first = min(outside)
    stack = [chain[0][0] for chain in match.captured.values()]
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in outside:
            return True
        if node not in seen and not node < first:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return False
