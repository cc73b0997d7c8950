"""Low-rank adapters on linear layers: one for all tokens, or another one for every token of a batch."""

from custom_ops.lora.batch import LoRABatch
from custom_ops.lora.experts import fused_moe_lora
from custom_ops.lora.halves import lora_expand_single, lora_shrink_single
from custom_ops.lora.ops import (
    lora_add,
    lora_add_single,
    lora_expand,
    lora_linear,
    lora_linear_single,
    lora_shrink,
)
from custom_ops.lora.requests import RequestBatch
from custom_ops.lora.together import lora_linears, lora_linears_single

__all__ = [
    "LoRABatch",
    "RequestBatch",
    "fused_moe_lora",
    "lora_add",
    "lora_add_single",
    "lora_expand",
    "lora_expand_single",
    "lora_linear",
    "lora_linear_single",
    "lora_linears",
    "lora_linears_single",
    "lora_shrink",
    "lora_shrink_single",
]
