"""Quantizes the experts of transformers' models, as plain PyTorch that any backend runs and this one fuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_passes import transformers_experts
from fusion_passes.coded import Coded, straight_through
from fusion_passes.quantized_linears import BLOCK, check_dtype, quantize_weight

__all__ = ["Fp8BlockExperts", "experts_of", "merge_checkpoint", "routers_of"]

_PRODUCTS = ("gate_up_proj", "up_proj", "down_proj")


class Fp8BlockExperts(Coded):
    """Experts with block-scaled FP8 weights and activations quantized on the fly, in plain PyTorch.

    In place of a module of experts of transformers, whose arithmetic between the products it keeps. The tensors are
    those of DeepSeek-V3 and Qwen3-MoE FP8 checkpoints, one expert after the other: ``gate_up_proj`` float8_e4m3fn
    [E, 2 * I, H] (``up_proj`` [E, I, H] without a gate) and ``down_proj`` [E, H, I], also where the model keeps them
    transposed; ``<name>_scale_inv`` float32 with the last two sizes over 128, rounded up (the factor that
    *dequantizes*); ``<name>_bias`` as the model has it. Hidden states and what stands between the products get one
    float32 scale per row and 128 channels.

    The result is what eager PyTorch computes from these words: operands dequantized, rounded to the activation dtype,
    multiplied by the implementation that ``config._experts_implementation`` names: "grouped_mm" and "batched_mm" of
    transformers, which dequantize all weights first, as does compiled code for any other name; "fusion_passes", which
    multiplies the codes; and eagerly, for any other name, one expert after the other.
    """

    def __init__(self, experts: nn.Module) -> None:
        """Raises ValueError unless the weights of ``experts`` are bfloat16 or float16."""
        super().__init__()
        self.down_proj: Tensor
        self.down_proj_scale_inv: Tensor
        self.down_proj_bias: Tensor | None
        for name in [name for name in _PRODUCTS if hasattr(experts, name)]:
            weight: Tensor = getattr(experts, name).detach()
            check_dtype(name, weight)
            self.compute_dtype = weight.dtype
            codes, scales = _quantize(weight.transpose(1, 2) if experts.is_transposed else weight)
            self.register_buffer(name, codes)
            self.register_buffer(f"{name}_scale_inv", scales)
            bias = getattr(experts, f"{name}_bias", None)
            self.register_buffer(f"{name}_bias", None if bias is None else bias.detach().clone())
            delattr(experts, name)
            if bias is not None:
                delattr(experts, f"{name}_bias")
        self.stock: Any = experts  # without its weights: its activation and its settings
        self.first = "gate_up_proj" if self.stock.has_gate else "up_proj"
        self.num_experts = self.down_proj.shape[0]

    @property
    def config(self) -> Any:
        return self.stock.config

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        name = self.config._experts_implementation
        if name == transformers_experts.NAME:
            return self._fused(hidden_states, top_k_index, top_k_weights)
        if name not in ("grouped_mm", "batched_mm"):
            if not torch.compiler.is_compiling():
                return self._one_by_one(hidden_states, top_k_index, top_k_weights)
            name = "grouped_mm"
        run = transformers_experts.stock(name)
        rounded = round_trip(hidden_states)
        return run(_Dequantized(self, hidden_states.dtype), rounded, top_k_index, top_k_weights)

    def _fused(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return transformers_experts.fused(
            self.stock, hidden_states, top_k_index, top_k_weights, **self.tensors()
        )

    def tensors(self) -> dict[str, Any]:
        """The weights, scales and biases, by the names that ``fused_moe`` has for them."""
        first = self.first
        return {
            "gate_up": getattr(self, first),
            "down": self.down_proj,
            "gate_up_bias": getattr(self, f"{first}_bias"),
            "down_bias": self.down_proj_bias,
            "gate_up_scale": getattr(self, f"{first}_scale_inv"),
            "down_scale": self.down_proj_scale_inv,
        }

    def _one_by_one(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """With no more than one expert's weights dequantized at a time; waits for the device."""
        rounded = round_trip(hidden_states)
        ids = top_k_index.flatten()
        pairs = hidden_states.new_zeros(ids.shape[0], hidden_states.shape[-1])
        for expert in ids.unique().tolist():
            if not 0 <= expert < self.num_experts:  # elsewhere
                continue
            chosen = (ids == expert).nonzero().flatten()
            between = self.between(
                self._linear(rounded[chosen // top_k_index.shape[-1]], self.first, expert)
            )
            pairs[chosen] = self._linear(between, "down_proj", expert)
        weighted = pairs.view(*top_k_index.shape, -1) * top_k_weights.unsqueeze(-1)
        return weighted.sum(1).to(hidden_states.dtype)

    def _linear(self, rows: Tensor, name: str, expert: int) -> Tensor:
        bias = getattr(self, f"{name}_bias")
        codes, scales = getattr(self, name)[expert], getattr(self, f"{name}_scale_inv")[expert]
        weight = dequantize(codes.unsqueeze(0), scales.unsqueeze(0), rows.dtype)[0]
        product = F.linear(rows, weight)
        return product if bias is None else product + bias[expert]

    def between(self, rows: Tensor) -> Tensor:
        """What the model does between the products, quantized and dequantized again."""
        gated = self.stock.has_gate
        return round_trip(self.stock._apply_gate(rows) if gated else self.stock.act_fn(rows))

    def extra_repr(self) -> str:
        experts, hidden, width = self.down_proj.shape
        return f"{experts} experts, {hidden} -> {width} -> {hidden}, float8_e4m3fn, {BLOCK} x {BLOCK} blocks"


class _Dequantized:
    """What transformers' experts functions take for ``self``."""

    def __init__(self, experts: Fp8BlockExperts, dtype: torch.dtype) -> None:
        stock = experts.stock
        self.experts, self.num_experts = experts, experts.num_experts
        self.has_gate, self.has_bias, self.is_transposed = stock.has_gate, stock.has_bias, False
        self.is_concatenated = stock.is_concatenated
        self.has_post_expert_norm = getattr(stock, "has_post_expert_norm", False)
        self._is_expert_parallel = getattr(stock, "_is_expert_parallel", False)
        self.down_proj = dequantize(experts.down_proj, experts.down_proj_scale_inv, dtype)
        self.down_proj_bias = experts.down_proj_bias
        codes, scale = (
            getattr(experts, experts.first),
            getattr(experts, f"{experts.first}_scale_inv"),
        )
        weight, bias = dequantize(codes, scale, dtype), getattr(experts, f"{experts.first}_bias")
        if stock.has_gate:
            self.gate_up_proj, self.gate_up_proj_bias = weight, bias
        else:
            self.up_proj, self.up_proj_bias = weight, bias

    def _apply_gate(self, rows: Tensor) -> Tensor:
        return self.experts.between(rows)

    def act_fn(self, rows: Tensor) -> Tensor:
        return self.experts.between(rows)

    def post_expert_norm(self, rows: Tensor) -> Tensor:
        return self.experts.stock.post_expert_norm(rows)


def round_trip(x: Tensor) -> Tensor:
    """[..., K] quantized to FP8 in groups of 128 channels, and dequantized to its dtype again."""
    return straight_through(_round_trip, x)


def _round_trip(x: Tensor) -> Tensor:
    channels = x.shape[-1]
    padding = -channels % BLOCK
    groups = (F.pad(x, (0, padding)) if padding else x).float().unflatten(-1, (-1, BLOCK))
    # literals, and 448 as a tensor: see Fp8BlockLinear.forward
    amax = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10)
    scale = amax / amax.new_full((), 448.0)
    codes = (groups / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    dequantized = (codes.float() * scale).flatten(-2).to(x.dtype)
    return dequantized[..., :channels] if padding else dequantized


def dequantize(codes: Tensor, scale_inv: Tensor, dtype: torch.dtype) -> Tensor:
    """[E, out, in] float8 and [E, ceil(out / 128), ceil(in / 128)] float32 -> ``dtype``, rounded once."""
    _, rows, columns = codes.shape
    blocks = scale_inv.repeat_interleave(BLOCK, 1)[:, :rows]
    blocks = blocks.repeat_interleave(BLOCK, 2)[:, :, :columns]
    return (codes.float() * blocks).to(dtype)


def _quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = zip(*(quantize_weight(expert) for expert in weight))
    return torch.stack(codes), torch.stack(scales)


def experts_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules of a model whose weights are those of experts, as transformers' functions for experts take them."""
    for name, module in model.named_modules():
        weights = [getattr(module, product, None) for product in _PRODUCTS]
        three = [w for w in weights if isinstance(w, nn.Parameter) and w.dim() == 3]
        if len(three) == 2 and hasattr(module, "is_transposed") and hasattr(module, "_apply_gate"):
            yield name, module


def unknown_experts_of(model: nn.Module) -> list[str]:
    """The names of other modules with two matrices or more for each expert, such as w1, w2 and w3 of torchtitan's."""
    known = {id(inner) for _, experts in experts_of(model) for inner in experts.modules()}
    found = []
    for name, module in model.named_modules():
        own = [p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3]
        if len(own) > 1 and len(set(own)) == 1 and id(module) not in known:
            found.append(name or type(module).__name__)
    return found


def routers_of(model: nn.Module) -> set[str]:
    """The names of the linears that choose experts, or weigh a shared one: those checkpoints keep in 16 bits."""
    found = set()
    for name, experts in experts_of(model):
        prefix = name.rpartition(".")[0]
        count = experts.down_proj.shape[0]
        for inner, module in model.get_submodule(prefix).named_modules(prefix=prefix):
            chooses = isinstance(module, nn.Linear) and module.out_features in (1, count)
            if chooses and "attn" not in inner:  # experts may be a part of the layer itself
                found.add(inner)
    return found


def merge_checkpoint(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a checkpoint by the names of a model whose experts are one module.

    ``...experts.7.gate_proj.weight``, ``up_proj``, ``down_proj`` and their ``weight_scale_inv`` become
    ``...experts.gate_up_proj``, ``gate_up_proj_scale_inv`` and so on. Raises KeyError naming an expert's tensor that
    is missing, ValueError where gate and up end within a block of 128 rows, so that no scales of both together exist.
    """
    merged = dict(tensors)
    for prefix, module in model.named_modules():
        if not isinstance(module, Fp8BlockExperts) or f"{prefix}.0.down_proj.weight" not in tensors:
            continue
        gated, width = module.stock.has_gate, module.down_proj.shape[2]
        if gated and width % BLOCK:
            raise ValueError(
                f"{prefix}: gate_proj has {width} rows; accepted for a checkpoint with tensors of each expert: "
                f"a multiple of {BLOCK}"
            )
        first = ("gate_proj", "up_proj") if gated else ("up_proj",)
        for product, names in ((module.first, first), ("down_proj", ("down_proj",))):
            for ours, theirs in (("", "weight"), ("_scale_inv", "weight_scale_inv")):
                rows = []
                for expert in range(module.num_experts):
                    keys = [f"{prefix}.{expert}.{name}.{theirs}" for name in names]
                    rows.append(torch.cat([merged.pop(key) for key in keys]))
                merged[f"{prefix}.{product}{ours}"] = torch.stack(rows)
    return merged
