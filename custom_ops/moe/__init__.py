"""Mixture of experts: routing, pairs of tokens and experts in order, and the whole block as one op."""

from custom_ops.moe.align import moe_align_block_size, padded_rows
from custom_ops.moe.batched import fused_moe_batched
from custom_ops.moe.logits import router_logits
from custom_ops.moe.ops import fused_moe
from custom_ops.moe.permute import moe_permute, moe_permute_group_quant, moe_reduce, moe_unpermute
from custom_ops.moe.routing import grouped_topk, topk_sigmoid, topk_softmax
from custom_ops.moe.shared import fused_moe_and_shared

__all__ = [
    "fused_moe",
    "fused_moe_and_shared",
    "fused_moe_batched",
    "grouped_topk",
    "moe_align_block_size",
    "moe_permute",
    "moe_permute_group_quant",
    "moe_reduce",
    "moe_unpermute",
    "padded_rows",
    "router_logits",
    "topk_sigmoid",
    "topk_softmax",
]
