"""``fused_moe`` where users of transformers look for it: ``config._experts_implementation = "fusion_passes"``.

It is registered as soon as both packages are imported, in either order. Called eagerly or compiled, by whichever
backend, a module of experts is then one op; the router stays as it is. The experts of FP8 checkpoints (`FP8Experts`)
take the same name: what stock runs for them loops over experts, or calls kernels from a hub that no graph shows.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, fx, nn

import custom_ops
from fusion_passes import torch_internals
from fusion_passes.canonical import recognition
from fusion_passes.experts import reading
from fusion_passes.experts.activations import activation_of

NAME = "fusion_passes"
_WIDTH = 32
_BLOCK = 128


def register() -> None:
    """Make the name known to transformers, which is imported."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def register_fp8() -> None:
    """As `register`, for the experts of FP8 checkpoints."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    ALL_FP8_EXPERTS_FUNCTIONS.register(NAME, fp8_experts_forward)


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers calls for a module of experts: [T, H], [T, K] and [T, K] -> [T, H].

    Raises ValueError where the module is none that ``fused_moe`` computes: an activation that it does not have, or a
    norm after each expert.
    """
    gate_up, down, biases = weights(self)
    return fused(self, hidden_states, top_k_index, top_k_weights, gate_up, down, **biases)


def fp8_experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """As `experts_forward`, for `FP8Experts`: codes with a scale for each 128 x 128 block, activations quantized on the
    fly. The weights of the router are rounded to the dtype of hidden_states, as stock does here.

    Raises ValueError where they are none that ``fused_moe`` computes: other blocks, static scales of activations,
    weights of 4 bits, scales that are powers of two, and as `experts_forward`.
    """
    first = "gate_up_proj" if self.has_gate else "up_proj"
    _check_fp8(self, first)
    return fused(
        self,
        hidden_states,
        top_k_index,
        top_k_weights.to(hidden_states.dtype),
        getattr(self, first),
        self.down_proj,
        gate_up_scale=getattr(self, f"{first}_scale_inv"),
        down_scale=self.down_proj_scale_inv,
    )


def _check_fp8(experts: Any, first: str) -> None:
    weight, scale = getattr(experts, first), getattr(experts, f"{first}_scale_inv")
    blocks = None if experts.block_size is None else tuple(experts.block_size)
    for what, given, accepted in (
        ("activation_scheme", experts.activation_scheme, "dynamic"),
        ("weight_block_size", blocks, (_BLOCK, _BLOCK)),
        (f"{first}.dtype", weight.dtype, torch.float8_e4m3fn),
        (f"{first}_scale_inv.dtype", scale.dtype, torch.float32),
    ):
        if given != accepted:
            raise ValueError(
                f"experts_implementation={NAME!r}: {what} of {type(experts).__name__} is {given}; accepted: {accepted}"
            )


def fused(
    experts: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    **tensors: Any,
) -> Tensor:
    """``fused_moe`` with the activation of a module of experts."""
    return custom_ops.fused_moe(
        hidden_states,
        gate_up,
        down,
        top_k_weights,
        top_k_index,
        **words(experts),
        **tensors,
    )


def words(experts: nn.Module) -> dict[str, Any]:
    """The activation of a module of experts as keywords of ``fused_moe``."""
    names = ("activation", "interleaved", "alpha", "limit")
    return dict(zip(names, activation(experts), strict=True))


def stock(name: str) -> Any:
    """transformers' function behind the name of an experts implementation."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS[name]


def weights(experts: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """[E, out, in] of both products, views where the module keeps them transposed, and its biases."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    gate_up, down = getattr(experts, first), experts.down_proj
    if experts.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    biases = {}
    if experts.has_bias:
        biases = {
            "gate_up_bias": getattr(experts, f"{first}_bias"),
            "down_bias": experts.down_proj_bias,
        }
    return gate_up, down, biases


def activation(experts: Any) -> tuple[str, bool, float, float]:
    """(activation, interleaved, alpha, limit) of a module of experts, found out once.

    Raises ValueError for one that ``fused_moe`` does not have.
    """
    known = experts.__dict__.get("_fused_activation")
    if known is None:
        known = _recognized(id(experts))
        experts.__dict__["_fused_activation"] = known
    return known


@torch.compiler.assume_constant_result
def _recognized(address: int) -> tuple[str, bool, float, float]:
    """Traces what the module at `address` does between its two products, and reads it as the fusion reads a graph.

    An address, since Dynamo of torch 2.11 takes no module as the argument of such a function (`id` guards on the
    module, as 2.13 does for an argument). The caller holds the module, so it is alive.
    """
    experts: Any = ctypes.cast(address, ctypes.py_object).value
    name = type(experts).__name__
    if getattr(experts, "has_post_expert_norm", False):
        raise ValueError(
            f"experts_implementation={NAME!r}: {name} has a norm after each expert; accepted: none"
        )
    width = 2 * _WIDTH if experts.has_gate else _WIDTH
    function = experts._apply_gate if experts.has_gate else experts.act_fn
    graph = torch_internals.trace_pattern(lambda x: function(x), [((3, width), torch.bfloat16)])
    recognition.recognize(graph)
    (output,) = [node for node in graph.nodes if node.op == "output"]
    result = output.args[0][0] if isinstance(output.args[0], (tuple, list)) else output.args[0]
    inside: list[fx.Node] = []
    try:
        words, source, channels, up = activation_of(reading.strip(result), inside)
        if up is not None:
            raise reading.Unlike(up, f"{reading.called(up)}, gate or up, is no half of its input")
        if reading.strip(source).op != "placeholder" or channels not in (None, width):
            raise reading.Unlike(source, f"{reading.called(source)} comes before it")
    except reading.Unlike as why:
        raise ValueError(
            f"experts_implementation={NAME!r}: the activation of {name} is not supported: {why.reason}"
        ) from None
    defaults = custom_ops.ops()["fused_moe"].defaults
    words = {
        key: words.get(key, defaults[key])
        for key in ("activation", "interleaved", "alpha", "limit")
    }
    return words["activation"], words["interleaved"], words["alpha"], words["limit"]
