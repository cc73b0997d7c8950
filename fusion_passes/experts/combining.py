"""How the experts' results of a token become one: multiplied by the top-k weights and added up.

sum(rows [T, K, H] * weights [T, K, 1], 1)                  weights in whichever place, rows in whichever order
bmm(weights [T, 1, K], rows [T, K, H])                      and its transpose: einsum and matmul are that, too
zeros[T, H] with each weighted row added to its token's     scatter_add, scatter_reduce, index_add, index_put
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from fusion_passes import index_map
from fusion_passes.experts.products import Product
from fusion_passes.experts.reading import (
    CAST,
    Unlike,
    aten,
    called,
    dtype_of,
    gathered,
    number,
    numel,
    of_rows,
    only_reader,
    order_after,
    order_of,
    strip,
)
from fusion_passes.experts.routing import Index
from fusion_passes.index_map import Size
from fusion_passes.operations import is_tensor, readers, shape_of

_REDUCING = aten.scatter_reduce.two
_ADDING = {
    aten.scatter_add.default, aten.index_add.default, aten.index_put.default, _REDUCING,
}  # fmt: skip


def is_put_back(reader: fx.Node, node: fx.Node, second: Product) -> bool:
    """Whether rows by slot are written to the places of their pairs, each to one, whatever was there before."""
    if reader.target is aten.index_put.default:
        if len(reader.args[1]) != 1 or reader.args[3:4] == (True,):
            return False
        index, rows = reader.args[1][0], reader.args[2]
    elif reader.target is aten.scatter.src and reader.args[1] == 0:
        index, rows = reader.args[2], reader.args[3]
    else:
        return False
    same = strip(rows) is strip(node) and index_map.same_size(numel(rows), numel(reader))
    return same and second.routing.read(of_rows(index, rows)) == Index("pair", True)


@dataclass
class Total:
    """``node`` [T, H] is the sum of the rows of each token. ``weights``: those that the sum itself multiplies by."""

    node: fx.Node
    num_tokens: Size
    top_k: Size
    hidden_size: Size
    weights: fx.Node | None = None
    inside: list[fx.Node] = field(default_factory=list)


def weights(
    product: fx.Node, node: fx.Node, second: Product, by_slot: bool
) -> tuple[fx.Node, torch.dtype]:
    """The top-k weights, one of each pair in the order of pairs, that a product multiplies rows with.

    And the dtype that they have there: they may be sorted first, and cast then.
    """
    node, operands = strip(node), [strip(operand) for operand in product.args if is_tensor(operand)]
    others = [given for given, operand in zip(product.args, operands) if operand is not node]
    if len(operands) != 2 or len(others) != 1:
        raise Unlike(product, f"{product.name} does not multiply by the top-k weights")
    given = others[0]
    if not index_map.same_size(numel(given), numel(second.routing.ids)) or shape_of(given)[-1] != 1:
        raise Unlike(
            product,
            f"{product.name} multiplies the experts' results by {called(strip(given))}, "
            "which is not one top-k weight for each pair",
        )
    found = strip(given)
    spread = index_map.broadcast(shape_of(given), shape_of(product))
    width = index_map.divide(numel(node), numel(given))
    if width is None or not index_map.same_map(
        spread, index_map.collapse([(numel(given), True), (width, False)])
    ):
        raise Unlike(product, f"{product.name} does not multiply each row by one weight")
    promoted = torch.promote_types(dtype_of(second.node), dtype_of(found))
    if dtype_of(product) is not promoted:
        raise Unlike(
            product,
            f"{product.name} multiplies in {dtype_of(product)} by {dtype_of(found)} weights",
        )
    dtype = dtype_of(found)
    if not by_slot:
        return found, dtype
    if found.target is CAST:
        found = strip(found.args[0])
    taken = gathered(found)
    if taken is None or second.routing.read(taken[1]) != Index("pair", True):
        raise Unlike(product, f"{called(found)} is not the top-k weights sorted by expert")
    return strip(taken[0]), dtype


def total_at(reader: fx.Node, node: fx.Node, second: Product, by_slot: bool) -> Total | None:
    """The sum over the experts of a token that a reader of the rows is; None where it is nothing of the kind."""
    if reader.target is aten.sum.dim_IntList:
        return _sum(reader, second, by_slot)
    if reader.target in _ADDING:
        return _added(reader, node, second, by_slot)
    turns: list[fx.Node] = []
    while reader.target is aten.permute.default:
        turns.append(reader)
        reader = only_reader(reader)
    return (
        _product(reader, node, turns, second, by_slot)
        if reader.target is aten.bmm.default
        else None
    )


def _sum(total: fx.Node, second: Product, by_slot: bool) -> Total:
    """The sum is over top_k of [num_tokens, top_k, hidden_size], rows by pair."""
    shape, dims = shape_of(total.args[0]), total.args[1]
    if by_slot:
        raise Unlike(total, f"{total.name} sums rows that are still sorted by expert")
    keeps = len(total.args) > 2 and total.args[2]
    rank = len(shape)
    if rank < 3 or [dim % rank for dim in dims] != [rank - 2] or keeps:
        raise Unlike(total, f"{total.name} does not sum over the experts of a token")
    if dtype_of(total) not in (torch.float32, dtype_of(second.node)):
        raise Unlike(total, f"{total.name} sums in {dtype_of(total)}")
    return Total(total, index_map.product(shape[:-2]), *shape[-2:])


def _product(
    product: fx.Node, node: fx.Node, turns: list[fx.Node], second: Product, by_slot: bool
) -> Total | None:
    """weights [T, 1, K] @ rows [T, K, H], or rows turned to [T, H, K] @ weights [T, K, 1]."""
    end = turns[-1] if turns else strip(node)
    position = next((i for i in (0, 1) if strip(product.args[i]) is end), None)
    if position is None:
        return None
    rows, given = product.args[position], product.args[1 - position]
    num_tokens, *_ = shape_of(rows)
    top_k, hidden_size = shape_of(rows)[1:] if position == 1 else shape_of(rows)[:0:-1]
    shape = (num_tokens, 1, top_k) if position == 1 else (num_tokens, top_k, 1)
    pairs = num_tokens * top_k
    fits = [
        index_map.same_size(pairs, numel(second.routing.ids)),
        index_map.same_size(numel(strip(given)), pairs),  # not the weights of one token for all
        *map(index_map.same_size, shape_of(given), shape),
    ]
    if not all(fits) or not _is_turned(turns, (num_tokens, top_k, hidden_size), position == 0):
        return None
    if by_slot:
        raise Unlike(product, f"{product.name} sums rows that are still sorted by expert")
    return Total(product, num_tokens, top_k, hidden_size, strip(given), turns)


def _is_turned(turns: list[fx.Node], shape: tuple[Size, ...], turned: bool) -> bool:
    """Whether permutations of [T, K, H], with views between them, make [T, H, K] of it, or nothing else than it was."""
    sizes = dict(zip("TKH", shape, strict=True))
    order: str | None = order_of("TKH", sizes)
    for turn in turns:
        order = None if order is None else order_after(turn, order, sizes)
    return order == order_of("THK" if turned else "TKH", sizes)


def _added(total: fx.Node, node: fx.Node, second: Product, by_slot: bool) -> Total | None:
    """Each row is added to the one of its token. Two are rounded as their sum is, more of 16 bits are not."""
    if total.target is aten.index_put.default:
        if len(total.args[1]) != 1 or total.args[3:4] != (True,):
            return None
        index, rows = total.args[1][0], total.args[2]
    else:
        # whether zeros are part of the sum is all the same
        if total.args[1] != 0 or total.kwargs.keys() - {"include_self"}:
            return None
        if total.target is _REDUCING and total.args[4] != "sum":
            return None
        index, rows = total.args[2], total.args[3]
    if strip(rows) is not strip(node) or len(shape_of(rows)) != 2 or len(shape_of(total)) != 2:
        return None
    if not _is_zero(total.args[0]):
        raise Unlike(
            total,
            f"{total.name} adds the experts' results to {called(strip(total.args[0]))}, which is not 0",
        )
    pairs, hidden_size = shape_of(rows)
    num_tokens = shape_of(total)[0]
    top_k = index_map.divide(pairs, num_tokens)
    found = second.routing.read(of_rows(index, rows))
    wanted = [Index("token", by_slot, top_k), *([Index("pair", by_slot)] if top_k == 1 else [])]
    if top_k is None or found not in wanted:
        raise Unlike(total, f"{total.name} does not add each row to that of its token")
    if dtype_of(total) is not torch.float32 and not (isinstance(top_k, int) and top_k <= 2):
        raise Unlike(
            total,
            f"{total.name} adds up {top_k} rows a token in {dtype_of(total)}, rounded one after the other: "
            "a sum over them is rounded once",
        )
    return Total(total, num_tokens, top_k, hidden_size)


def is_one_each(node: fx.Node, second: Product) -> bool:
    """Whether a token has one expert, so that its weighted row is the sum already, and no sum follows."""
    shape = shape_of(second.routing.ids)
    one = len(shape) == 1 or index_map.same_size(shape[-1], 1)
    sums = {aten.sum.dim_IntList, aten.bmm.default, *_ADDING}
    return one and not any(reader.target in sums for reader in readers(node))


def _is_zero(node: fx.Node) -> bool:
    node = strip(node)
    while node.target is CAST:
        node = strip(node.args[0])
    return number(node) == 0
