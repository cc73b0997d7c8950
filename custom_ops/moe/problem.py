"""The arguments of `fused_moe` under their names, and the sizes that parts and tables ask about."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from custom_ops.moe.activation import Activation

FP8 = torch.float8_e4m3fn
BATCH_ALIGN = 256


@dataclass(frozen=True)
class Sizes:
    """num_tokens may be symbolic, and what is computed from it."""

    num_tokens: int
    top_k: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    gate_up_rows: int

    @property
    def pairs(self) -> int:
        """How many pairs of a token and an expert there are, wherever the experts are."""
        return self.num_tokens * self.top_k

    def rows(self, align: int) -> int:
        """Rows of a contiguous layout whose experts are padded to a multiple of align: a bound, without data."""
        most = torch.sym_min(self.pairs, self.num_experts)
        return (self.pairs + most * (align - 1)) // align * align

    def batch_rows(self) -> int:
        """Rows of an expert in a batched layout, whole tiles of a masked product: it stores no part of one.

        As many as there are pairs: all tokens may name one expert, and a token may name it more than once.
        """
        return -(-self.pairs // BATCH_ALIGN) * BATCH_ALIGN


@dataclass(frozen=True, eq=False)
class Problem:
    """One call of `fused_moe`; the names are its own."""

    hidden_states: Tensor
    gate_up: Tensor
    down: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    activation: Activation
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gate_up_scale: Tensor | None = None
    down_scale: Tensor | None = None
    expert_map: Tensor | None = None
    min_amax: float = 1e-10
    scale_mode: str = "divide"
    code_mode: str = "divide"
    hidden_scale: Tensor | None = None
    out_dtype: torch.dtype = torch.bfloat16
    routed_experts: int = 0
    up: Tensor | None = None

    @classmethod
    def of(
        cls,
        hidden_states: Tensor,
        gate_up: Tensor,
        down: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        activation: str = "silu_mul",
        interleaved: bool = False,
        alpha: float = 1.702,
        limit: float = 7.0,
        **kwargs: Any,
    ) -> Problem:
        """From the arguments of the op, whose defaults for FP8 these are."""
        act = Activation(activation, interleaved, alpha, limit)
        return cls(hidden_states, gate_up, down, topk_weights, topk_ids, act, **kwargs)

    @functools.cached_property
    def sizes(self) -> Sizes:
        tokens, hidden = self.hidden_states.shape
        experts, rows, _ = self.gate_up.shape
        if self.up is not None:
            rows *= 2
        return Sizes(
            tokens, self.topk_ids.shape[1], experts, hidden, self.activation.width(rows), rows
        )

    @property
    def first_weights(self) -> tuple[Tensor, ...]:
        """Of the first product: gate_up, or gate and up where they are apart."""
        return (self.gate_up,) if self.up is None else (self.gate_up, self.up)

    @property
    def everywhere(self) -> int:
        """How many experts topk_ids may name, here and elsewhere, as far as anybody says."""
        if self.expert_map is not None:
            return max(self.expert_map.shape[0], 1)
        return max(self.routed_experts, self.sizes.num_experts, 1)

    @property
    def weights(self) -> str:
        """What the weights are, in the words of the parts."""
        return {FP8: "fp8_block", torch.int8: "int8_channel"}.get(self.gate_up.dtype, "16_bit")

    @property
    def dtype(self) -> torch.dtype:
        """Of the result, and of hidden_states unless they are codes."""
        return self.hidden_states.dtype if self.hidden_scale is None else self.out_dtype

    @property
    def quantization(self) -> dict[str, Any]:
        """How activations are quantized, as keywords of `group_quant`."""
        return {
            "min_amax": self.min_amax,
            "scale_mode": self.scale_mode,
            "code_mode": self.code_mode,
        }

    def of_tokens(self, start: int, stop: int) -> Problem:
        """The same for some of the tokens."""
        return replace(
            self,
            hidden_states=self.hidden_states[start:stop],
            topk_weights=self.topk_weights[start:stop],
            topk_ids=self.topk_ids[start:stop],
            hidden_scale=None if self.hidden_scale is None else self.hidden_scale[start:stop],
        )

    def arguments(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Back to the arguments of the op."""
        names = [field.name for field in fields(self)]
        act = self.activation
        keywords = {name: getattr(self, name) for name in names[6:]}
        keywords |= {
            "activation": act.name,
            "interleaved": act.interleaved,
            "alpha": act.alpha,
            "limit": act.limit,
        }
        return tuple(getattr(self, name) for name in names[:5]), keywords
