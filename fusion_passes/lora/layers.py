"""The layers that stand in a model for its linears while it has adapters.

Each owns its slots: stacked buffers that never move and never change shape, which the manager fills in place. A
compiled graph takes them as inputs, so that adapters come and go without a new one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import custom_ops
from fusion_passes.lora.loading import RANK_STEP, Factors, Site

__all__ = [
    "LoRALinear",
    "SavedModule",
    "StepBuffers",
    "compute_dtype",
    "features",
    "is_linear",
]

ACTIVATION_DTYPES = (torch.bfloat16, torch.float16)


def compute_dtype(linear: nn.Module) -> torch.dtype:
    """The dtype of the activations of a linear, also of one whose weight is quantized."""
    return getattr(linear, "compute_dtype", None) or linear.weight.dtype  # type: ignore[return-value]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear, or GPT-2's Conv1D, which is one with its weight transposed."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def features(linear: Any) -> Site:
    """The widths of a linear."""
    if _is_conv1d(linear):
        return Site(*linear.weight.shape)
    return Site(linear.in_features, linear.out_features)


def _is_conv1d(module: nn.Module) -> bool:
    transformers = sys.modules.get("transformers.pytorch_utils")
    return transformers is not None and isinstance(module, transformers.Conv1D)


class _Fixed(nn.Module):
    """A module whose own buffers keep their place: ``model.to(...)`` changes the dtype of what is inside of it only."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for name, buffer in self._buffers.items():
            probe = torch.empty(0, dtype=buffer.dtype, device=buffer.device)  # type: ignore[union-attr]
            if fn(probe).device != probe.device:
                raise RuntimeError(
                    f"{name} of a {type(self).__name__} is on {probe.device} for good: move the model before it gets "
                    "an AdapterManager"
                )
        if recurse:
            for child in self.children():
                child._apply(fn)
        return self


class StepBuffers(_Fixed):
    """The tensors of the LoRABatch, as buffers that all layers share: CUDA graphs then read them where they are."""

    def __init__(self, tensors: tuple[Tensor, Tensor, Tensor]) -> None:
        super().__init__()
        self.token_slots: Tensor
        self.sorted_tokens: Tensor
        self.tiles: Tensor
        for name, tensor in zip(("token_slots", "sorted_tokens", "tiles"), tensors, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    def slots_of(self, shape: torch.Size) -> Tensor:
        """The slots of the first ``shape.numel()`` tokens, in that shape."""
        # not a slice, which would guard on the number of tokens
        count = torch.arange(shape.numel(), device=self.token_slots.device)
        return self.token_slots.index_select(0, count).view(shape)


class LoRALinear(_Fixed):
    """``base_layer(x)`` plus, token by token, the adapter in the token's slot.

    base_layer: the linear (or Conv1D) itself; a plain one and its adapters are one op, any other (block-FP8) runs as it
    is.
    lora_a [num_slots, R, in_features], lora_b [num_slots, out_features, R]: the slots, in the activation dtype.
    scaling float32 [num_slots], ranks int32 [num_slots]: rank 0 in a slot is no adapter.
    """

    def __init__(
        self,
        base_layer: Any,
        step: StepBuffers,
        num_slots: int,
        max_rank: int,
        scaling: Tensor,
        ranks: Tensor,
    ) -> None:
        super().__init__()
        self.base_layer, self.step = base_layer, step
        self.lora_a: Tensor
        self.lora_b: Tensor
        self.scaling: Tensor
        self.ranks: Tensor
        rank = -(-max_rank // RANK_STEP) * RANK_STEP
        weight, self.site = base_layer.weight, features(base_layer)
        for name, shape in (
            ("lora_a", (rank, self.site.in_features)),
            ("lora_b", (self.site.out_features, rank)),
        ):
            slots = torch.zeros(
                num_slots, *shape, dtype=compute_dtype(base_layer), device=weight.device
            )
            self._slots(name, slots)
        self._slots("scaling", scaling)
        self._slots("ranks", ranks)
        self.transposed = _is_conv1d(base_layer)
        kept = type(base_layer) is nn.Linear or self.transposed
        plain = kept and type(weight) in (Tensor, nn.Parameter)
        self.fused = plain and weight.dtype in ACTIVATION_DTYPES
        self.train(base_layer.training)

    def _slots(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)

    @property
    def weight(self) -> Tensor:
        """That of the linear, for code that looks at its dtype or device."""
        return self.base_layer.weight

    def fill(self, slot: int, factors: Factors) -> None:
        """Put an adapter's factors into a slot, from the host, on the current stream."""
        rank = factors.a.shape[0]
        self.lora_a[slot, :rank].copy_(factors.a, non_blocking=True)
        self.lora_b[slot, :, :rank].copy_(factors.b, non_blocking=True)

    def forward(self, x: Tensor) -> Tensor:
        batch = (self.step.token_slots, self.step.sorted_tokens, self.step.tiles)
        a, b = [self.lora_a], [self.lora_b]
        if self.fused:
            weight, bias = self.base_layer.weight, self.base_layer.bias
            weight = weight.t() if self.transposed else weight
            return custom_ops.lora_linear(x, weight, bias, a, b, self.scaling, self.ranks, *batch)
        base = self.base_layer(x)
        return custom_ops.lora_add(x, base, a, b, self.scaling, self.ranks, *batch)

    def extra_repr(self) -> str:
        slots, rank, _ = self.lora_a.shape
        return f"{slots} slots of rank up to {rank}"


class SavedModule(_Fixed):
    """A linear or an embedding that an adapter may replace altogether (PEFT's ``modules_to_save``).

    Tokens of an adapter without a copy of it, and of none, see the original. A linear is computed once for each slot,
    which pays for classification heads; an embedding is one look-up.
    """

    def __init__(self, original: nn.Module, step: StepBuffers, num_slots: int) -> None:
        super().__init__()
        self.original_module, self.step = original, step
        self.replaced: Tensor
        device = next(original.parameters()).device
        for name, value in original.named_parameters():
            copies = torch.zeros(num_slots, *value.shape, dtype=value.dtype, device=device)
            self.register_buffer(f"saved_{name}", copies, persistent=False)
        replaced = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self.register_buffer("replaced", replaced, persistent=False)
        self.train(original.training)

    @property
    def weight(self) -> Any:
        """The original one, for code that looks at its dtype or device."""
        return self.original_module.weight

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in self.original_module.named_parameters()}

    def fill(self, slot: int, parameters: dict[str, Tensor] | None) -> None:
        """Put a copy into a slot, from the host, on the current stream; None: the slot has none."""
        for name, value in (parameters or {}).items():
            getattr(self, f"saved_{name}")[slot].copy_(value, non_blocking=True)
        self.replaced[slot].fill_(parameters is not None)

    def forward(self, x: Tensor) -> Tensor:
        original, embeds = self.original_module(x), isinstance(self.original_module, nn.Embedding)
        slots = self.step.slots_of(x.shape if embeds else x.shape[:-1])
        weight: Any = self.saved_weight
        taken = ((slots >= 0) & self.replaced[slots.clamp(min=0)]).unsqueeze(-1)
        if embeds:
            rows = x + slots.clamp(min=0).to(x.dtype) * weight.shape[1]
            return torch.where(taken, F.embedding(rows, weight.flatten(0, 1)), original)
        bias: Any = getattr(self, "saved_bias", None)
        result = original
        for slot in range(weight.shape[0]):
            own = F.linear(x, weight[slot], None if bias is None else bias[slot])
            result = torch.where(taken & (slots == slot).unsqueeze(-1), own, result)
        return result
