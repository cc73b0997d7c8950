"""Weights of the top-k experts of each token as a matrix [T, E], 0 for all other experts.

zeros[T, E].scatter(1, top-k ids, top-k weights)
sigmoid(full[T, E](-inf).scatter(1, top-k ids, top-k logits))          Llama 4
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fusion_passes import index_map, torch_internals
from fusion_passes.experts.reading import (
    CAST,
    Unlike,
    aten,
    called,
    dtype_of,
    number,
    numel,
    order_after,
    order_of,
    strip,
    uncast,
)
from fusion_passes.experts.routing import choice_of
from fusion_passes.experts.scores import TOPK, is_topk_over_last
from fusion_passes.index_map import Size
from fusion_passes.operations import describe, read, shape_of


@dataclass(frozen=True)
class Spread:
    """A matrix [T, E] of weights, 0 but where a scatter wrote ``written`` [T, K] by the top-k ids.

    then: the pointwise operations from what was scattered to the matrix, in order. scores: what the top-k is of.
    """

    matrix: fx.Node
    ids: fx.Node
    written: fx.Node
    then: tuple[fx.Node, ...]
    scores: fx.Node


def before_cast(node: fx.Node) -> fx.Node:
    """What was widened to float32, where a node is that and nothing else."""
    source = strip(node)
    widened = source.target is CAST and dtype_of(source) is torch.float32
    inner: fx.Node = source.args[0] if widened else node
    return inner if shape_of(inner) == shape_of(node) else node


def factor_of(
    given: fx.Node, reader: fx.Node, order: str, sizes: Mapping[str, Size]
) -> fx.Node | None:
    """The matrix [T, E] of which a product multiplies each row with one element. order: of the rows."""
    rows = sizes["E"] * sizes["T"]
    wanted = index_map.collapse([(rows, True), (sizes["H"], False)])
    by_token, by_expert = (order_of(names, sizes) for names in ("TEH", "ETH"))
    if order not in (by_token, by_expert) or not index_map.same_size(
        numel(reader), rows * sizes["H"]
    ):
        return None
    for node, mapping in read(before_cast(given), shape_of(reader)):
        if not index_map.same_map(mapping, wanted) or not index_map.same_size(numel(node), rows):
            continue
        if order == by_token:
            return strip(node)
        if node.target is aten.permute.default and order_after(node, "TE", sizes) == "ET":
            return strip(node.args[0])
    return None


def spread_of(matrix: fx.Node, num_tokens: Size, experts: Size) -> Spread:
    """How a matrix of weights was made. Raises Unlike where experts that nobody chose may have a weight."""
    node = strip(matrix)
    then: list[fx.Node] = []
    while node.target is not aten.scatter.src:
        operation, sources = describe(node), node.all_input_nodes
        pointwise = operation is not None and operation.kind == "pointwise" and not node.kwargs
        if not pointwise or len(sources) != 1:
            raise Unlike(
                node,
                f"{called(node)} has a weight for each token and expert, and is not what a scatter by top-k ids wrote "
                "into zeros: all tokens are multiplied with all experts",
            )
        then.insert(0, node)
        node = strip(sources[0])
    base, dim, index, written = node.args
    shape, chosen = shape_of(node), shape_of(index)
    ids = uncast(index)
    choice = choice_of(ids)
    fits = (
        dim % len(shape) == len(shape) - 1
        and index_map.same_size(shape[-1], experts)
        and index_map.same_size(numel(node), num_tokens * experts)
        and all(map(index_map.same_size, shape[:-1], chosen[:-1]))
        and chosen == shape_of(written)
    )
    if not fits or choice is None or not _is_of_each_token(choice, numel(node), experts):
        raise Unlike(
            node, f"{called(node)} does not write the weights of each token by its top-k ids"
        )
    source, casts = _before_casts(base)
    background = number(source)
    if background is None or _after_all(background, dtype_of(source), [*casts, *then]) != 0:
        raise Unlike(node, f"{called(node)} leaves weights that are not 0 to experts nobody chose")
    return Spread(strip(matrix), ids, written, tuple(then), choice.args[0])


def _is_of_each_token(choice: fx.Node, weights: Size, experts: Size) -> bool:
    """Whether a top-k, or the op of a router, chooses among the experts of each token."""
    shape = shape_of(choice.args[0])
    last = choice.target is not TOPK or is_topk_over_last(choice)
    whole = index_map.same_size(index_map.product(shape), weights)
    return last and whole and index_map.same_size(shape[-1], experts)


def _before_casts(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """What a node is a cast of, and the casts in order."""
    node = strip(node)
    casts: list[fx.Node] = []
    while node.target is CAST:
        casts.insert(0, node)
        node = strip(node.args[0])
    return node, casts


def _after_all(value: float, dtype: torch.dtype, operations: Sequence[fx.Node]) -> float:
    """What pointwise operations make of a number."""
    with torch_internals.real_tensors():
        result = torch.tensor([value], dtype=dtype)
        for node in operations:
            args = fx.node.map_arg(node.args, lambda _, now=result: now)
            result = node.target(*args)
        return float(result)
