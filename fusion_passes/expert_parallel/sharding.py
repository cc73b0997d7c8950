"""Shards the experts of transformers' models over the ranks of a process group, in place.

    experts(x, ids, weights)

        ->   rows, ids, weights = ep_dispatch(x, ids, weights)      each token to the ranks of its experts
             rows = fused_moe(rows, <the experts here>, weights, ids)
             ep_combine(rows)                                       and the results back, added up

Rank r of N keeps experts r * E / N up to (r + 1) * E / N. Router, shared experts and all else stay whole on every rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import custom_ops
from custom_ops import expert_parallel as ops
from custom_ops.expert_parallel import groups
from custom_ops.moe.problem import BATCH_ALIGN
from fusion_passes import torch_internals, transformers_experts
from fusion_passes.expert_parallel.plain import plain_experts
from fusion_passes.quantize_experts import Fp8BlockExperts, experts_of

__all__ = ["ParallelExperts", "parallelize_experts_"]

MODES = ("high_throughput", "low_latency")
_OP = "parallelize_experts_"


def parallelize_experts_(
    model: nn.Module, group: Any, *, mode: str = "high_throughput", max_tokens: int = 0
) -> nn.Module:
    """Keep on this rank its share of each module of experts, in place; returns the model.

    model: with modules of experts as transformers has them (Qwen3-MoE, DeepSeek-V3, Mixtral, gpt-oss and others whose
        experts are one tensor for each product), in bfloat16, float16 or float32, or quantized by
        ``quantize_(model, "fp8_block")`` before. The same model on every rank: what is dropped is not sent anywhere.
        A model on the meta device is sharded as any other, and ``load_state_dict(..., assign=True)`` fills it.
    group: a process group (``torch.distributed.group.WORLD``) or its ``group_name``. All of its ranks must call the
        model together, each with tokens of its own, as many as it has, also none.
    mode: ``"high_throughput"``: a token goes once to each rank that has one of its experts, and the host waits for the
        number of rows; Inductor captures what lies between these ops in CUDA graphs, and the ops themselves in none.
        ``"low_latency"``, for decoding in bfloat16: each token goes to each of its experts in tensors of fixed shapes,
        nobody waits, and all of it is captured. Block-scaled experts get FP8 codes, rounded as DeepEP rounds them
        (``custom_ops.expert_parallel.ep_dispatch_low_latency``), not as eager does.
    max_tokens: the most tokens that a rank has in one call. For ``"low_latency"``, which needs it, rounded up until an
        expert has a multiple of 256 rows (128 tokens for 2 ranks). For ``"high_throughput"`` 0 allows any number; with
        more, each rank receives the rows of the worst case, most of them empty, so that the host need not wait for
        their number and one CUDA graph of the experts serves every routing, where 0 records one for each number.

    What was one function of [T, H] tokens is ``ep_dispatch``, ``fused_moe`` of the received rows and ``ep_combine`` (or
    the three of low latency), run eagerly or compiled, by any backend, in one graph. Where the data says how many rows
    there are (``"high_throughput"`` without ``max_tokens``), that takes ``fullgraph=True`` or
    ``torch._dynamo.config.capture_dynamic_output_shape_ops``, which this function turns on for the process.

    16-bit results differ from those of one rank by one rounding for each rank that has experts of a token. float32
    experts, which ``fused_moe`` does not have, run in plain PyTorch, every expert here over every row: for comparing
    with one rank, not for speed.

    ``state_dict()`` has the names of the stock model, and this rank's experts in them. ``load_state_dict`` takes that,
    or the tensors of the whole model, of which it keeps this rank's share. Inference only: the ops have no derivative.

    Raises ValueError, before anything is changed, for an unknown group or mode, and naming the module: for a number of
    experts that is no multiple of the ranks, experts that are sharded already, an activation that ``fused_moe`` does
    not have, or a model without experts.
    """
    name = group if isinstance(group, str) else getattr(group, "group_name", None)
    if not isinstance(name, str):
        raise ValueError(
            f"{_OP}: group is {group!r}; accepted: a process group, or the group_name of one"
        )
    pg = groups.resolve(_OP, name)
    if mode not in MODES:
        raise ValueError(f"{_OP}: mode is {mode!r}; accepted: {', '.join(map(repr, MODES))}")
    low_latency = mode == "low_latency"
    if max_tokens < low_latency:
        accepted = "1 or more" if low_latency else "0, for any number, or more"
        raise ValueError(
            f"{_OP}: max_tokens is {max_tokens}; accepted for mode {mode!r}: {accepted}"
        )
    found = list(_experts_of(model))
    if not found:
        raise ValueError(
            f"{_OP}: {type(model).__name__} has no experts; accepted: a transformers model whose experts are modules "
            "with gate_up_proj (or up_proj) and down_proj of three dimensions"
        )
    for path, experts in found:
        _check(path, experts, pg.size(), low_latency)
    if low_latency:
        step = BATCH_ALIGN // math.gcd(BATCH_ALIGN, pg.size())
        max_tokens = -(-max_tokens // step) * step
    elif not max_tokens:
        torch_internals.capture_sizes_from_data()
    for _, experts in found:
        count = experts.down_proj.shape[0]
        _shard(experts, Share(name, pg.rank(), pg.size(), count, mode, max_tokens))
    return model


class Share:
    """Which of ``num_experts`` experts a rank of a group has, and how tokens come to it."""

    def __init__(
        self,
        group: str,
        rank: int,
        ranks: int,
        num_experts: int,
        mode: str = MODES[0],
        max_tokens: int = 0,
    ) -> None:
        self.group, self.rank, self.ranks, self.num_experts = group, rank, ranks, num_experts
        self.mode, self.max_tokens = mode, max_tokens
        local = num_experts // ranks
        self.first, self.last = rank * local, (rank + 1) * local

    def of(self, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor with a first dimension of all experts, in memory of its own."""
        return tensor[self.first : self.last].clone(memory_format=torch.contiguous_format)


class ParallelExperts(nn.Module):
    """What the class of a sharded module of experts derives from, before its own class."""

    share: Share
    down_proj: Tensor
    num_experts: int

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], [T, K] and [T, K] -> [T, H], together with the other ranks."""
        share = self.share
        if share.mode == "low_latency":
            return self._low_latency(hidden_states, top_k_index, top_k_weights)
        out = ops.ep_dispatch(
            hidden_states,
            None,
            top_k_index,
            top_k_weights,
            share.num_experts,
            share.group,
            max_tokens=share.max_tokens,
        )
        y = self._local(out[0], out[2], out[3])
        return ops.ep_combine(y, *out[5:], share.group)

    def _low_latency(self, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        share, tensors = self.share, self._tensors()
        fp8 = "gate_up_scale" in tensors
        out = ops.ep_dispatch_low_latency(
            hidden_states, ids, share.num_experts, share.max_tokens, share.group, fp8=fp8
        )
        pairs = share.ranks * hidden_states.shape[0] * ids.shape[1]
        batch = custom_ops.fused_moe_batched(
            out[0],
            out[2],
            expected=-(-pairs // share.num_experts),
            hidden_scale=out[1] if fp8 else None,
            **tensors,
            **transformers_experts.words(getattr(self, "stock", self)),
        )
        return ops.ep_combine_low_latency(batch, ids, weights, *out[3:], share.group)

    def _tensors(self) -> dict[str, Any]:
        """The weights here, by the names that the ops have for them."""
        if isinstance(self, Fp8BlockExperts):
            return self.tensors()
        gate_up, down, biases = transformers_experts.weights(self)
        return {"gate_up": gate_up, "down": down, **biases}

    def _local(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum over the experts here of each received row; ids are -1 for those elsewhere."""
        stock: Any = self
        if isinstance(self, Fp8BlockExperts):
            return self._fused(rows, ids, weights)
        gate_up, down, biases = transformers_experts.weights(self)
        if rows.dtype == torch.float32:
            return plain_experts(stock, rows, ids, weights, gate_up, down, **biases)
        return transformers_experts.fused(self, rows, ids, weights, gate_up, down, **biases)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Takes the share out of what has all experts; ``state_dict`` is the loader's own copy of the mapping."""
        for name, _ in _tensors_of(self):
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.dim() and len(given) == self.share.num_experts:
                state_dict[prefix + name] = self.share.of(given)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        share = self.share
        said = super().extra_repr()
        here = f"experts {share.first} to {share.last - 1} of {share.num_experts}, rank {share.rank} of {share.ranks}"
        return f"{said}, {here}" if said else here


def _experts_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules of experts, quantized or not."""
    yield from experts_of(model)
    for name, module in model.named_modules():
        if isinstance(module, Fp8BlockExperts):
            yield name, module


def _check(path: str, experts: Any, ranks: int, low_latency: bool) -> None:
    if isinstance(experts, ParallelExperts):
        share = experts.share
        raise ValueError(
            f"{_OP}: {path} is sharded already, over the {share.ranks} ranks of group {share.group!r}; accepted: "
            "experts that are whole"
        )
    count = experts.down_proj.shape[0]
    if count % ranks:
        raise ValueError(
            f"{_OP}: {path} has {count} experts; accepted: a multiple of the {ranks} ranks of the group"
        )
    for name, tensor in _tensors_of(experts):
        if low_latency and tensor.dtype in (torch.float16, torch.float32) and "scale" not in name:
            raise ValueError(
                f"{_OP}: {path}.{name} is {tensor.dtype}; accepted for mode 'low_latency': torch.bfloat16, or "
                "float8 by quantize_"
            )
        if len(tensor) != count:
            raise ValueError(
                f"{_OP}: {path}.{name} has the shape {tuple(tensor.shape)}; accepted: a first dimension of {count} "
                "experts"
            )
    try:
        transformers_experts.activation(getattr(experts, "stock", experts))
    except ValueError as error:
        raise ValueError(f"{_OP}: {path}: {error}") from None


def _tensors_of(experts: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The module's own tensors by name."""
    yield from experts.named_parameters(recurse=False)
    yield from experts.named_buffers(recurse=False)


def _shard(experts: Any, share: Share) -> None:
    for name, tensor in list(_tensors_of(experts)):
        mine = share.of(tensor.detach())
        if isinstance(tensor, nn.Parameter):
            setattr(experts, name, nn.Parameter(mine, requires_grad=tensor.requires_grad))
        else:
            setattr(experts, name, mine)
    experts.share, experts.num_experts = share, share.last - share.first
    own: Any = type(experts)
    experts.__class__ = _parallel(own)


@functools.cache
def _parallel(stock: Any) -> Any:
    """A subclass for each class of experts, as a module keeps its class to whoever asks for it by isinstance."""
    return type(f"Parallel{stock.__name__}", (ParallelExperts, stock), {})
