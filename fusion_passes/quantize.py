"""Quantizes the linears of a model, as plain PyTorch that any backend runs and this one fuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

import torch
from torch import nn

from fusion_passes.quantized_linears import (
    Fp8BlockLinear,
    Fp8TokenLinear,
    Int8TokenLinear,
    TokenLinear,
    check_dtype,
    dequantize_weight,
    quantize_weight,
)
from fusion_passes.weight_reads import weights_read

__all__ = [
    "Fp8BlockLinear",
    "Fp8TokenLinear",
    "Int8TokenLinear",
    "dequantize_weight",
    "load_fp8_block_",
    "quantize_",
    "quantize_weight",
]

SCHEMES: Mapping[str, type[Fp8BlockLinear] | type[TokenLinear]] = {
    "fp8_block": Fp8BlockLinear,
    "fp8_token": Fp8TokenLinear,
    "int8_token": Int8TokenLinear,
}


def quantize_(
    model: nn.Module,
    scheme: str = "fp8_block",
    *,
    filter: Callable[[str, Any], bool] | None = None,
) -> nn.Module:
    """Replace the linears of a model, and with "fp8_block" the experts, in place; returns the model.

    scheme: ``"fp8_block"``: :class:`Fp8BlockLinear`, float8 with a scale per 1 x 128 of activations and 128 x 128 of
        weights, and :class:`~fusion_passes.quantize_experts.Fp8BlockExperts` for transformers' modules of experts.
        ``"fp8_token"``, ``"int8_token"``: :class:`Fp8TokenLinear`, :class:`Int8TokenLinear`, with a scale per token of
        activations and per output channel of weights; experts stay as they are.
    filter: ``filter(name, module)`` says which linears and experts to take; None takes all but those that share their
        weight with another module (tied embeddings), the output projection ``lm_head`` and the routers of experts,
        which such checkpoints keep in 16 bits, the adapters of PEFT (``lora_A``, ``lora_B``), and those whose weight
        the model reads itself (``self.wo.weight.dtype`` of T5): it would take 8-bit codes for the weight, so they stay
        as they are, which a warning says.

    Raises ValueError for an unknown scheme, a module that is not bfloat16 or float16, or nothing to quantize.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme is {scheme!r}; accepted: {', '.join(map(repr, SCHEMES))}")
    replacement = SCHEMES[scheme]
    if isinstance(model, nn.Linear):
        raise ValueError(
            "model is itself a torch.nn.Linear, which cannot be replaced in place: use "
            f"{replacement.__name__}.from_linear"
        )
    from fusion_passes import quantize_experts  # here: it imports the kernels

    shared, routers = _shared_weights(model), quantize_experts.routers_of(model)
    experts = list(quantize_experts.experts_of(model)) if scheme == "fp8_block" else []
    if experts and experts[0][1] is model:
        raise ValueError(
            "model is itself a module of experts, which cannot be replaced in place: use Fp8BlockExperts(model)"
        )
    experts = [(name, m) for name, m in experts if filter is None or filter(name, m)]
    take = filter or (
        lambda name, linear: (
            name.split(".")[-1] != "lm_head"
            and name not in routers
            and id(linear.weight) not in shared
            and not {"lora_A", "lora_B"} & set(name.split("."))
        )
    )
    # one whose weight is no parameter computes it in a hook, from others: pruned, or normalized
    linears = [
        (name, m)
        for name, m in model.named_modules()
        if type(m) is nn.Linear and "weight" in m._parameters
    ]
    chosen = [(name, m) for name, m in linears if take(name, m)]
    if filter is None:
        chosen = _without_weights_read(model, chosen)
    others = quantize_experts.unknown_experts_of(model) if scheme == "fp8_block" else []
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        warnings.warn(
            f"quantize_ leaves {others[0]}{more} as it is: it has matrices like those of experts, and of these "
            "fp8_block takes modules of transformers alone, with gate_up_proj (or up_proj) and down_proj",
            stacklevel=2,
        )
    for name, linear in chosen:
        check_dtype(f"{name}.weight", linear.weight)
    for name, module in experts:
        check_dtype(f"{name}.down_proj", module.down_proj)
    if not chosen and not experts:
        raise ValueError(_nothing_to_quantize(model, len(linears)))
    for name, linear in chosen:
        _replace(model, name, replacement.from_linear(linear))
    for name, module in experts:
        _replace(model, name, quantize_experts.Fp8BlockExperts(module))
    return model


def _without_weights_read(
    model: nn.Module, linears: list[tuple[str, nn.Linear]]
) -> list[tuple[str, nn.Linear]]:
    read = weights_read(model)
    left = {name: read[name] for name, _ in linears if name in read}
    if left:
        name, owner = next(iter(left.items()))
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        warnings.warn(
            f"quantize_ leaves {name}{more} as it is: {owner} reads its weight itself, and would take 8-bit codes for "
            "it. filter= takes it all the same",
            stacklevel=3,
        )
    return [(name, linear) for name, linear in linears if name not in left]


def _nothing_to_quantize(model: nn.Module, num_linears: int) -> str:
    alike = {
        type(m) for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
    }
    kinds = ", ".join(sorted(kind.__name__ for kind in alike - {nn.Linear}))
    said = [
        "the model has no torch.nn.Linear to quantize"
        + (f" but {num_linears} that are left out (see filter=)" if num_linears else ""),
        *([f"{kinds} compute in a way of their own, and stay as they are"] if kinds else []),
    ]
    return "; ".join(said)


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, whose hooks and mode it takes over."""
    parent, _, child = name.rpartition(".")
    old = model.get_submodule(name)
    for hooks in _HOOKS:  # the very dictionaries, which the handles of hooks know
        setattr(module, hooks, getattr(old, hooks))
    module.train(old.training)
    setattr(model.get_submodule(parent), child, module)


def load_fp8_block_(
    model: nn.Module,
    source: str | PathLike[str] | Mapping[str, torch.Tensor],
    *,
    strict: bool = True,
) -> nn.Module:
    """Load the tensors of an FP8 block checkpoint into a model whose linears were replaced by :func:`quantize_`.

    source: a safetensors file, or the tensors themselves by name (``...weight``, ``...weight_scale_inv``, ``...bias``
        and whatever else the model has). Experts may have tensors of their own, as in DeepSeek-V3 and Qwen3-MoE
        checkpoints (``...experts.0.gate_proj.weight``), or be together. strict: as in ``load_state_dict``.

    Nothing is loaded unless everything fits. Raises ValueError naming the tensor, its shape and dtype, and what is
    accepted; KeyError for missing or, when strict, unexpected names.
    """
    if isinstance(source, Mapping):
        tensors = dict(source)
    else:
        from safetensors.torch import load_file

        tensors = load_file(source)
    from fusion_passes import quantize_experts

    tensors = quantize_experts.merge_checkpoint(tensors, model)
    own = model.state_dict()
    for name, tensor in tensors.items():
        if name in own and tensor.shape != own[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; accepted: {tuple(own[name].shape)}"
            )
        if (
            name in own
            and torch.float8_e4m3fn in (tensor.dtype, own[name].dtype)
            and tensor.dtype != own[name].dtype
        ):
            raise ValueError(f"{name} is {tensor.dtype}; accepted: {own[name].dtype}")
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if strict and (missing or unexpected):
        raise KeyError(
            f"missing: {', '.join(missing) or 'none'}; unexpected: {', '.join(unexpected) or 'none'}"
        )
    model.load_state_dict(tensors, strict=strict)
    return model


def _shared_weights(model: nn.Module) -> set[int]:
    seen: dict[int, str] = {}
    shared = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if seen.setdefault(id(parameter), name) != name:  # no address: on the meta device all are 0
            shared.add(id(parameter))
    return shared
