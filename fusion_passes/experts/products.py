"""A product of rows with the matrix of the expert that each row goes to, in every form that models have.

_grouped_mm(rows, weight [E, in, out], offsets)             rows sorted by expert, offsets their counts added up
grouped_mm_fallback(rows, weight [E, in, out], offsets)     transformers', where _grouped_mm does not compile
bmm(weight[ids] [S, out, in], rows [S, in, 1])              one matrix a row, and its transpose
bmm(rows [S, 1, in], weight[ids] [S, in, out])
bmm(rows [T, 1, in], weight[ids] as [T, in, K * out])       einsum: a row for each token; and its transpose
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor as T
from torch import fx

from fusion_passes import index_map
from fusion_passes.arithmetic import Arithmetic
from fusion_passes.canonical import quantizations
from fusion_passes.compiled_pattern import compile_pattern
from fusion_passes.experts.counts import counted
from fusion_passes.experts.reading import (
    Unlike,
    aten,
    dtype_of,
    element,
    gathered,
    numel,
    strip,
    uncast,
)
from fusion_passes.experts.routing import Routing, ids_of
from fusion_passes.fusion import Fusion, Pattern, Tensor
from fusion_passes.index_map import Size
from fusion_passes.matching import Match, Matcher
from fusion_passes.operations import is_tensor, shape_of

BLOCK = 128
FP8 = torch.float8_e4m3fn
# by name: transformers' operator exists only once transformers has been imported
_ARGUMENTS = (("rows", "input"), ("weight", "mat2"), ("offs", "offs"))
_GROUPED = {"aten._grouped_mm.default", "transformers.grouped_mm_fallback.default"}


@dataclass(frozen=True)
class Weight:
    """[num_experts, out, in] as the graph has it. ``transposed``: ``value`` is [num_experts, in, out]."""

    value: fx.Node
    transposed: bool
    scale: fx.Node | None = None

    @property
    def shape(self) -> tuple[Size, Size, Size]:
        experts, out, inner = shape_of(self.value)
        return (experts, inner, out) if self.transposed else (experts, out, inner)


@dataclass(frozen=True)
class Product:
    """``node`` [S, out] is each row of ``rows`` [S, in] times the weight of its expert.

    sorted: rows come by slot, not by pair. by_token: how many matrices multiply each row, where there is one row for
    each token, and ``node`` has their results one after the other; None: one. of_all: each expert has multiplied all
    tokens, ``node`` is [E, T, out].
    """

    node: fx.Node
    rows: fx.Node
    weight: Weight
    routing: Routing
    sorted: bool
    by_token: Size | None = None
    of_all: bool = False

    @property
    def copies_weights(self) -> bool:
        """Whether the graph makes a matrix for each row first."""
        return self.node.target is aten.bmm.default and not self.of_all


def is_expert_product(node: fx.Node) -> bool:
    """Whether a node is one of the forms above, or would be but for what `product_at` objects to."""
    if node.op != "call_function":
        return False
    if str(node.target) in _GROUPED:
        ranks = [argument.meta["val"].dim() for argument in node.args[:2]]
        return ranks == [2, 3] and len(node.all_input_nodes) > 2
    return node.target is aten.bmm.default and any(
        _gathered_matrices(operand) is not None for operand in node.args
    )


def product_at(node: fx.Node) -> Product:
    """Raises Unlike where rows, weights and ids do not fit together."""
    product = _batched(node) if node.target is aten.bmm.default else _grouped(node)
    if dtype_of(node) not in (torch.bfloat16, torch.float16):
        raise Unlike(node, f"{node.name} is {dtype_of(node)}; supported: bfloat16, float16")
    return product


def _grouped(node: fx.Node) -> Product:
    names = ("rows", "weight", "offs", "bias", "out_dtype")
    given = dict(zip(names, node.args)) | node.kwargs
    rows, weight, offsets = (given.get(new, given.get(old)) for new, old in _ARGUMENTS)
    if given.get("bias") is not None:
        raise Unlike(node, f"{node.name} adds a bias of its own")
    experts = shape_of(weight)[0]
    ids = counted(offsets, experts)
    if ids is None:
        counts = uncast(offsets)
        if counts.target is aten.cumsum.default:
            counts = uncast(counts.args[0])
        raise Unlike(
            offsets,
            f"{offsets.name} is not the number of pairs of each expert, added up"
            + (
                f": {counts.name} is computed outside of this graph, perhaps where the graph breaks, "
                "as it does at torch.bincount and not at torch.histc"
                if counts.op == "placeholder"
                else ""
            ),
        )
    return Product(
        node, strip(rows), weight_of(weight, transposed=True), Routing(ids, experts), True
    )


def _batched(node: fx.Node) -> Product:
    for position, other in ((0, 1), (1, 0)):
        taken = _gathered_matrices(node.args[position])
        if taken is None:
            continue
        weight, index, transposed = taken
        experts = shape_of(weight)[0]
        ids = ids_of(index, experts)
        routing = None if ids is None else Routing(ids, experts)
        read = None if routing is None else routing.read(index)
        if routing is None or read is None:
            raise Unlike(index, f"{index.name} does not hold an expert for each row")
        # of matrix @ row it is [S, out, in] already, of row @ matrix [S, in, out]
        transposed ^= position == 1
        rows = strip(node.args[other])
        inner = shape_of(weight)[1 if transposed else 2]
        if not index_map.same_size(shape_of(node.args[other])[2 if other == 0 else 1], inner):
            raise Unlike(node, f"{node.name} does not multiply rows of {inner} channels")
        batch, pairs = shape_of(node)[0], numel(index)
        each = None if index_map.same_size(batch, pairs) else index_map.divide(pairs, batch)
        return Product(node, rows, weight_of(weight, transposed), routing, read.sorted, each)
    raise AssertionError("not an expert product")


def _gathered_matrices(node: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
    """(weight, index, whether the result is transposed) where a node is a matrix for each row."""
    node, transposed = _untransposed(node)
    taken = gathered(node)
    if taken is None and (turned := _inner_first(node)) is not None:
        turned, again = _untransposed(turned)
        taken, transposed = gathered(turned), transposed == again
    if taken is None or len(shape_of(taken[0])) != 3:
        return None
    return *taken, transposed


def _inner_first(node: fx.Node) -> fx.Node | None:
    """[..., out, in] where a node is [..., in, ..., out] of it: the matrices of a token beside each other."""
    if node.target is not aten.permute.default:
        return None
    shape = shape_of(node.args[0])
    last = len(shape) - 1
    moved = [dim % len(shape) for dim in node.args[1] if shape[dim] != 1]
    rest = [dim for dim in moved if dim != last]
    return node.args[0] if rest == sorted(rest) and moved[-1:] != [last] else None


def _untransposed(node: fx.Node) -> tuple[fx.Node, bool]:
    """The value that a node is a transpose of the last two dimensions of, and whether it is one."""
    transposed = False
    node = strip(node)
    while (swapped := _transpose_of(node)) is not None:
        node, transposed = strip(swapped), not transposed
    return node, transposed


def _transpose_of(node: fx.Node) -> fx.Node | None:
    rank = len(shape_of(node)) if node.op == "call_function" and is_tensor(node) else 0
    if rank < 3:
        return None
    last = [*range(rank - 2), rank - 1, rank - 2]
    if node.target is aten.permute.default and [d % rank for d in node.args[1]] == last:
        return node.args[0]
    if node.target is aten.transpose.int and {d % rank for d in node.args[1:]} == set(last[-2:]):
        return node.args[0]
    return None


def weight_of(node: fx.Node, transposed: bool) -> Weight:
    value, swapped = _untransposed(node)
    transposed ^= swapped
    found = _matched(_DEQUANTIZED_WEIGHT, value)
    if found is None or transposed:
        return Weight(value, transposed)
    codes, scale = found.base("weight"), found.base("scale")
    if not _whole(value, codes, scale, BLOCK**2):
        return Weight(value, transposed)  # of some of the experts that there are codes of
    return Weight(codes, False, scale)


# ---- FP8 ----------------------------------------------------------------------------------------------------------


def _dequantized_weight(weight: T, scale: T) -> T:
    blocks = scale.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    return (weight.float() * blocks).to(torch.bfloat16)


def _dequantized_rows(codes: T, scale: T) -> T:
    groups = codes.unflatten(-1, (-1, BLOCK)).float()
    return (groups * scale.unsqueeze(-1)).flatten(-2).to(torch.bfloat16)


_DEQUANTIZED_WEIGHT = Pattern(
    _dequantized_weight,
    {
        "weight": Tensor("experts", f"row_blocks * {BLOCK}", f"column_blocks * {BLOCK}", dtype=FP8),
        "scale": Tensor("experts", "row_blocks", "column_blocks", dtype=torch.float32),
    },
)
_DEQUANTIZED_ROWS = Pattern(
    _dequantized_rows,
    {
        "codes": Tensor("num_tokens", f"num_groups * {BLOCK}", dtype=FP8),
        "scale": Tensor("num_tokens", "num_groups", dtype=torch.float32),
    },
)
_DEQUANTIZATION = Fusion(
    "dequantization",
    "8-bit codes times their scales",
    0,
    patterns=(_DEQUANTIZED_WEIGHT, _DEQUANTIZED_ROWS),
    rewrite=lambda m: (),
)


def _matched(pattern: Pattern, node: fx.Node) -> Match | None:
    compiled = compile_pattern(pattern)
    matcher = Matcher(_DEQUANTIZATION, compiled, node.graph)
    return matcher.match if matcher.run(compiled.outputs[0], node) else None


def _whole(value: fx.Node, codes: fx.Node, scale: fx.Node, group: int) -> bool:
    """Whether a value has all rows of its codes and of the scales that they have in groups."""
    sizes = (numel(codes), numel(scale) * group)
    return all(index_map.same_size(size, numel(value)) for size in sizes)


class Quantized(NamedTuple):
    """``values`` were quantized in groups of 128 and dequantized again by the nodes ``inside``."""

    values: fx.Node
    min_amax: float
    arithmetic: Arithmetic
    inside: tuple[fx.Node, ...]


def before_quantization(node: fx.Node) -> Quantized | None:
    """What a node was before it was quantized and dequantized again; None where it was not."""
    match = _matched(_DEQUANTIZED_ROWS, strip(node))
    if match is None:
        return None
    codes, scale = match.base("codes"), match.base("scale")
    if not _whole(strip(node), codes, scale, BLOCK):
        return None
    parts = [element(part, {quantizations.group_quant}) for part in (codes, scale)]
    quantization = parts[0][0] if parts[0] is not None else None
    if quantization is None or parts != [(quantization, 0), (quantization, 1)]:
        return None
    values, group_size, min_amax, arithmetic = quantization.args
    if not index_map.same_size(group_size, BLOCK) or not isinstance(min_amax, (int, float)):
        return None
    inside = (*match.nodes.values(), codes, scale, quantization)
    return Quantized(values, float(min_amax), arithmetic, inside)
