"""What makes the top-k weights and ids of a mixture of experts, walked out from `aten.topk`.

Upwards, what experts are chosen by, then downwards, what becomes of the weights of the chosen ones:

    logits -> softmax | sigmoid | nothing  (+ correction bias)  (experts of all but the best groups masked)  -> topk
    topk or what was scored at its ids -> softmax | sigmoid | nothing -> / sum -> * scale -> cast

Each step that is there becomes a keyword of one of the routing ops. A step beyond them, such as a scale that is known
only at run time, is left where it is: the op returns what goes into it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fusion_passes import index_map
from fusion_passes.experts.products import is_expert_product, product_at
from fusion_passes.experts.reading import (
    CAST,
    Unlike,
    aten,
    called,
    dtype_of,
    element,
    number,
    numel,
    shaped,
    strip,
)
from fusion_passes.experts.scores import (
    SIXTEEN_BITS,
    TOPK,
    Groups,
    Scores,
    is_topk_over_last,
    over_last,
    scores_of,
    softmax_of,
    unbiased,
    ungrouped,
)
from fusion_passes.fusion import Fusion
from fusion_passes.index_map import Size
from fusion_passes.operations import is_tensor, module_path, readers, shape_of
from fusion_passes.places import Place
from fusion_passes.reporting import NearMiss

OPS = ("topk_softmax", "topk_sigmoid", "grouped_topk")
MAX_EXPERTS = 1024
"""A top-k over more is no router but a sampler."""


@dataclass
class Router:
    """What the walk found, in the words of the routing ops; ``keywords`` without those that have their default."""

    op: str
    logits: fx.Node
    top_k: Size
    weights: fx.Node
    ids: fx.Node
    inside: list[fx.Node]
    keywords: dict[str, Any] = field(default_factory=dict)
    correction_bias: fx.Node | None = None
    groups: tuple[Size, Size] | None = None
    num_tokens: Size = None
    num_experts: Size = None


def find(fusion: Fusion, graph: fx.Graph) -> Iterable[Place | NearMiss]:
    """The routers of a graph that the fusion's op is for; near misses where experts are chosen in another way."""
    chosen = dict(_chosen_ids(graph))
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target is not TOPK:
            continue
        ids = next((u for u in node.users if element(u) == (node, 1)), None)
        if ids is None:
            continue
        is_router = ids in chosen
        found.add(ids)
        try:
            router = _router(node, ids)
        except Unlike as why:
            if is_router and _subject(node) == fusion.name:
                yield NearMiss(fusion.name, chosen[ids], why.node.name, why.reason)
            continue
        if router.op == fusion.name and (is_router or _is_few(router.num_experts)):
            yield _place(fusion, graph, router)
    if fusion.name != "topk_softmax":
        return
    for ids, module in chosen.items():
        maker, _ = element(ids) or (ids, 0)
        if ids not in found and maker.target not in _ops():
            reason = f"the top-k ids are made by {called(maker)}, where topk is expected"
            yield NearMiss(fusion.name, module, ids.name, reason)


def chosen_anywhere(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(router, ids) of every router of a graph, whether it is an op already or the nodes that one stands for."""
    ops = _ops()
    for node in graph.nodes:
        ids = next((user for user in node.users if element(user) == (node, 1)), None)
        if ids is None or not is_tensor(ids):
            continue
        if node.target in ops:
            yield node, ids
        elif node.target is TOPK:
            try:
                router = _router(node, ids)
            except Unlike:
                continue
            if _is_few(router.num_experts):
                yield node, ids


def _ops() -> set[Any]:
    return {getattr(torch.ops.custom_ops, name).default for name in OPS}


def _is_few(experts: Size) -> bool:
    return isinstance(experts, int) and experts <= MAX_EXPERTS


def _chosen_ids(graph: fx.Graph) -> Iterator[tuple[fx.Node, str]]:
    """The ids that experts go by, and the module of those."""
    for node in graph.nodes:
        if node.target is torch.ops.custom_ops.fused_moe.default:
            yield strip(node.args[4]), module_path(node)
        elif is_expert_product(node):
            try:
                yield product_at(node).routing.ids, module_path(node)
            except Unlike:  # reported where the experts are
                continue


def _subject(topk: fx.Node) -> str:
    """The fusion that a router which is like none is a near miss of."""
    node = strip(topk.args[0])
    while node.target in (aten.add.Tensor, aten.where.self):
        if node.target is aten.where.self:
            return "grouped_topk"
        node = strip(node.args[0])
    return "topk_sigmoid" if node.target is aten.sigmoid.default else "topk_softmax"


def _router(topk: fx.Node, ids: fx.Node) -> Router:
    choice, top_k = topk.args[:2]
    by_token = len(shape_of(choice)) > 1 and is_topk_over_last(topk)
    if not by_token or not isinstance(top_k, int):
        raise Unlike(topk, f"{topk.name} is not over the experts of each token")
    inside: list[fx.Node] = [topk, ids]
    choice, groups = ungrouped(choice, inside)
    scored, bias = unbiased(choice, inside)
    scores = scores_of(scored, shape_of(topk.args[0])[-1])
    if groups is not None and groups.of is not choice:
        raise Unlike(groups.of, f"groups are scored by {groups.of.name}, experts by {choice.name}")
    weights = _chosen(topk, ids, scores, bias)
    inside += [weights, *scores.inside]
    router = Router("", scores.logits, top_k, weights, ids, inside, correction_bias=bias)
    *leading, router.num_experts = shape_of(topk.args[0])
    router.num_tokens = index_map.product(leading)
    _name(router, scores, groups, element(weights) is not None)
    _finish(router)
    return router


# ---- the weights of the chosen ------------------------------------------------------------------------------------


def _chosen(topk: fx.Node, ids: fx.Node, scores: Scores, bias: fx.Node | None) -> fx.Node:
    """The weights of the chosen experts: what was chosen by, or the scores at the ids."""
    values = next((u for u in topk.users if element(u) == (topk, 0) and u.users), None)
    # the logits before a cast will do, but not next to scores, nor where a bias is added to them in 16 bits
    alike = (scores.node, scores.logits) if scores.kind == "logits" and bias is None else ()
    gathers = [
        reader
        for reader in readers(ids)
        if reader.target is aten.gather.default
        and _takes_of_each_token(reader, topk)
        and strip(reader.args[2]) is ids
        and strip(reader.args[0]) in (scores.node, *alike)
    ]
    if values is not None and not gathers:
        if bias is not None:
            raise Unlike(values, f"{values.name}, the weights, hold the correction bias")
        return values
    if len(gathers) != 1 or values is not None:
        raise Unlike(ids, f"what is chosen at {ids.name} is not what the experts were scored by")
    return gathers[0]


def _takes_of_each_token(gather: fx.Node, topk: fx.Node) -> bool:
    """Whether a gather of scores by ids takes those of a token from its own, which lie as the top-k has them."""
    (scores, dim, ids), experts = gather.args[:3], shape_of(topk.args[0])[-1]
    shape, taken = shape_of(scores), shape_of(ids)
    alike = all(map(index_map.same_size, shape, (*taken[:-1], experts)))
    return alike and dim % len(shape) == len(shape) - 1


def _name(router: Router, scores: Scores, groups: Groups | None, masked_weights: bool) -> None:
    """The op, and its keywords that say how experts are chosen."""
    keywords = router.keywords
    if groups is not None or scores.kind == "sqrt_softplus":
        if scores.kind == "logits":
            raise Unlike(scores.node, f"{called(scores.node)} is no softmax or sigmoid of logits")
        router.op, router.groups = "grouped_topk", (1, 1)
        keywords["scoring"] = scores.kind
        if groups is not None:
            masked = groups.masked
            if masked_weights:
                if masked != "zero":
                    raise Unlike(groups.choice, "the weight of an expert may be -inf")
                masked = "zero_weight"
            router.groups = (groups.num_groups, groups.topk_groups)
            keywords |= {"group_score": groups.group_score, "masked": masked}
        return
    if scores.kind != "logits":
        router.op = f"topk_{scores.kind}"
        return
    _of_the_chosen(router)


def _of_the_chosen(router: Router) -> None:
    """Chosen by the logits: the weights are the softmax or the sigmoid of the chosen ones."""
    casts = (r for r in readers(router.weights) if r.target is CAST)
    wide = next((r for r in casts if _reads(r, router.weights)), router.weights)
    for reader in readers(wide):
        if reader.target is aten.sigmoid.default and _reads(reader, wide):
            router.op, router.keywords["by_logits"] = "topk_sigmoid", True
            router.inside += [wide, reader]
            router.weights = reader
            return
        for quotient in _quotients(reader):
            softmax = softmax_of(quotient, router.top_k)
            if softmax is not None and softmax[0] is strip(wide):
                router.op, router.keywords["softmax_first"] = "topk_softmax", False
                router.inside += [wide, *softmax[1]]
                router.weights = quotient
                return
    read = ", ".join(called(reader) for reader in readers(wide)) or "nothing"
    raise Unlike(wide, f"{read} reads the chosen logits, where a softmax or sigmoid is expected")


def _quotients(shifted: fx.Node) -> Iterator[fx.Node]:
    """Where the softmax could end of which a node is the subtraction of the largest."""
    if shifted.target is aten._softmax.default:
        yield shifted
    if shifted.target is aten.sub.Tensor:
        for exp in readers(shifted):
            yield from (reader for reader in readers(exp) if reader.target is aten.div.Tensor)


def _finish(router: Router) -> None:
    """Walk down from the weights as far as the op goes: over their sum, times a number, cast."""
    rounded = dtype_of(router.weights) in SIXTEEN_BITS
    if rounded:
        router.keywords["rounded"] = True
    _renormalized(router)
    scaled = _reader(router)
    if scaled is not None and scaled.target is aten.mul.Tensor and _reads(scaled, router.weights):
        scales = [value for value in map(number, scaled.args) if value is not None]
        if scales:
            router.keywords["scale"] = float(scales[0])
            router.inside.append(scaled)
            router.weights = scaled
    cast = _reader(router)
    narrow = cast is not None and cast.target is CAST and dtype_of(cast) in SIXTEEN_BITS
    if cast is not None and narrow and not rounded and _reads(cast, router.weights):
        router.inside.append(cast)
        router.weights = cast
    router.keywords["dtype"] = dtype_of(router.weights)


def _reader(router: Router) -> fx.Node | None:
    """The only reader of the weights, if there is but one."""
    found = list(readers(router.weights))
    return found[0] if len(found) == 1 else None


def _reads(reader: fx.Node, node: fx.Node) -> bool:
    """Whether a reader takes all elements of a node, each once, and makes as many."""
    whole = any(strip(operand) is strip(node) for operand in filter(is_tensor, reader.args))
    return whole and index_map.same_size(numel(reader), numel(node))


def _renormalized(router: Router) -> None:
    """w / (max(sum(w), minimum) + eps)"""
    weights = strip(router.weights)
    found = list(readers(router.weights))
    quotient = next((r for r in found if r.target is aten.div.Tensor), None)
    total = next((r for r in found if over_last(r, aten.sum.dim_IntList)), None)
    if quotient is None or total is None or len(found) != 2:
        return
    if not all(map(is_tensor, quotient.args)) or strip(quotient.args[0]) is not weights:
        return
    if not _is_of_each_token(total, weights, router) or not _reads(quotient, weights):
        return
    if not index_map.same_size(shape_of(quotient.args[1])[-1], 1):  # neither of other tokens
        return
    inside, below = [total, quotient], strip(quotient.args[1])
    keywords: dict[str, Any] = {"renormalize": True}
    plain = below.target is aten.add.Tensor and not below.kwargs
    if plain and (eps := number(below.args[1])) is not None:
        inside.append(below)
        keywords["renormalize_eps"] = float(eps)
        below = strip(below.args[0])
    if below.target is aten.clamp_min.default and (least := number(below.args[1])) is not None:
        inside.append(below)
        keywords["renormalize_min"] = float(least)
        below = strip(below.args[0])
    if below is not total:
        return
    router.keywords |= keywords
    router.inside += inside
    router.weights = quotient


def _is_of_each_token(total: fx.Node, weights: fx.Node, router: Router) -> bool:
    """Whether a sum over the last dimension adds up the weights of a token, as they are."""
    added = total.args[0]
    each = index_map.same_size(shape_of(added)[-1], router.top_k)
    return strip(added) is weights and each and dtype_of(total) is dtype_of(weights)


def _place(fusion: Fusion, graph: fx.Graph, router: Router) -> Place:
    inputs = {"logits": router.logits}
    if router.correction_bias is not None:
        inputs["correction_bias"] = router.correction_bias
    said = [
        *(["rounded"] if router.keywords.get("rounded") else []),
        *(["correction bias"] if router.correction_bias is not None else []),
        *(["renormalized"] if router.keywords.get("renormalize") else []),
        *([f"{router.groups[0]} groups"] if router.groups else []),
    ]
    outputs = [router.weights, router.ids]
    return Place(
        fusion,
        graph,
        ", ".join(said) or "plain",
        outputs,
        list(dict.fromkeys(node for node in router.inside if node not in outputs)),
        inputs,
        {
            "num_tokens": router.num_tokens,
            "num_experts": router.num_experts,
            "top_k": router.top_k,
        },
        constants={"keywords": router.keywords, "groups": router.groups},
        comparable=_in_order,
    )


def _in_order(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The weights of a token in descending order.

    Top-k need not sort what it chooses, and which of two experts with one score it chooses is its own affair.
    """
    return [outputs[0].sort(-1, descending=True).values]


def rewrite(m: Any) -> tuple[fx.Node, fx.Node]:
    """The op of the fusion's name in place of a router."""
    place = m.match
    keywords = dict(place.constants["keywords"])
    tokens, experts = m.size("num_tokens"), m.size("num_experts")
    if "correction_bias" in place.inputs:
        bias = place.inputs["correction_bias"]
        keywords["correction_bias"] = shaped(bias, experts) or m.view(bias, (experts,))
    arguments = [m.size("top_k"), *(place.constants["groups"] or ())]
    logits = m.view(place.inputs["logits"], (tokens, experts))
    node = m.call(place.fusion.name, logits, *arguments, **keywords)
    return m.outputs_of(node, 2)
