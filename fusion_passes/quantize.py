"""Quantizes the linears of a model, as plain PyTorch that any backend runs and this one fuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from fusion_passes.coded import Coded, straight_through
from fusion_passes.weight_reads import weights_read

__all__ = ["Fp8BlockLinear", "Fp8TokenLinear", "Int8TokenLinear", "load_fp8_block_", "quantize_"]

BLOCK = 128


class Fp8BlockLinear(Coded, nn.Linear):
    """A linear with block-scaled FP8 weights and activations quantized on the fly, in plain PyTorch.

    The tensors are those of DeepSeek-V3 and Qwen3-FP8 checkpoints: ``weight`` float8_e4m3fn [out_features,
    in_features], ``weight_scale_inv`` float32 [ceil(out_features / 128), ceil(in_features / 128)] (the factor that
    *dequantizes*, despite its name), ``bias`` in the activation dtype or None. Activations get one float32 scale
    per token and 128 channels. The result is what eager PyTorch computes from these words: operands dequantized,
    rounded to the activation dtype, multiplied.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        # a torch.nn.Linear to libraries that look for one, such as PEFT, which makes its adapters in compute_dtype
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype = dtype
        self.weight: torch.Tensor
        self.weight_scale_inv: torch.Tensor
        self.bias: torch.Tensor | None  # type: ignore[assignment]
        blocks = (-(-out_features // BLOCK), -(-in_features // BLOCK))
        self.register_buffer(
            "weight",
            torch.zeros(out_features, in_features, dtype=torch.float8_e4m3fn, device=device),
        )
        self.register_buffer(
            "weight_scale_inv", torch.ones(blocks, dtype=torch.float32, device=device)
        )
        self.register_buffer(
            "bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Fp8BlockLinear:
        weight = linear.weight.detach()
        new = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            weight.device,
            weight.dtype,
        )
        new.weight, new.weight_scale_inv = quantize_weight(weight)
        if linear.bias is not None:
            new.bias = linear.bias.detach().clone()
        return new

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_input(self, x)
        rounded = straight_through(self._round_trip, x)
        weight = dequantize_weight(self.weight, self.weight_scale_inv, x.dtype)
        return F.linear(rounded, weight, self.bias)

    def _round_trip(self, x: torch.Tensor) -> torch.Tensor:
        padding = -self.in_features % BLOCK
        groups = F.pad(x, (0, padding)) if padding else x
        groups = groups.float().unflatten(-1, (-1, BLOCK))
        # literals, as torch.compile(dynamic=True) takes a float that has a name for a value that may change; 448 as
        # a tensor, as eager on a GPU divides by a number as it multiplies by the rounded reciprocal
        amax = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10)
        scale = amax / amax.new_full((), 448.0)
        codes = (groups / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        dequantized = (codes.float() * scale).flatten(-2).to(x.dtype)
        return dequantized[..., : self.in_features] if padding else dequantized

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, float8_e4m3fn, {BLOCK} x {BLOCK} blocks"


def _check_input(linear: nn.Linear, x: torch.Tensor) -> None:
    if x.dtype in (torch.float8_e4m3fn, torch.int8):
        raise ValueError(
            f"{type(linear).__name__}: x is {x.dtype}; accepted: 16 bits or more. A model that casts x "
            "to the dtype of this linear's weight has to keep the linear: quantize_ without a filter does"
        )


class _TokenLinear(Coded, nn.Linear):
    """What Fp8TokenLinear and Int8TokenLinear share: everything but their codes."""

    code_dtype: ClassVar[torch.dtype]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        # a torch.nn.Linear to libraries that look for one, such as PEFT, which makes its adapters in compute_dtype
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype = dtype
        self.weight: torch.Tensor
        self.weight_scale: torch.Tensor
        self.bias: torch.Tensor | None  # type: ignore[assignment]
        codes = torch.zeros(out_features, in_features, dtype=self.code_dtype, device=device)
        self.register_buffer("weight", codes)
        self.register_buffer(
            "weight_scale", torch.ones(out_features, 1, dtype=torch.float32, device=device)
        )
        self.register_buffer(
            "bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> _TokenLinear:
        weight = linear.weight.detach()
        biased = linear.bias is not None
        new = cls(linear.in_features, linear.out_features, biased, weight.device, weight.dtype)
        new.weight, new.weight_scale = cls.quantize(weight)
        if biased:
            new.bias = linear.bias.detach().clone()
        return new

    @staticmethod
    def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., features] -> codes [..., features] and a float32 scale [..., 1]."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_input(self, x)
        rounded = straight_through(self._round_trip, x)
        weight = (self.weight.float() * self.weight_scale).to(x.dtype)
        return F.linear(rounded, weight, self.bias)

    def _round_trip(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = self.quantize(x)
        return (codes.float() * scale).to(x.dtype)

    def extra_repr(self) -> str:
        codes = str(self.code_dtype).removeprefix("torch.")
        return f"{self.in_features} -> {self.out_features}, {codes}, per token x per channel"


class Fp8TokenLinear(_TokenLinear):
    """A linear with float8_e4m3fn codes, one scale per output channel of its weight and one per token of its input.

    In plain PyTorch: operands dequantized, rounded to the activation dtype, multiplied. The tensors are those of
    compressed-tensors checkpoints: ``weight`` [out_features, in_features], ``weight_scale`` float32 [out_features, 1],
    ``bias`` in the activation dtype or None.
    """

    code_dtype = torch.float8_e4m3fn

    @staticmethod
    def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # literals, and 448 as a tensor: see Fp8BlockLinear.forward
        values = rows.float()
        amax = values.abs().amax(-1, keepdim=True).clamp(min=1e-10)
        scale = amax / amax.new_full((), 448.0)
        return (values / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale


class Int8TokenLinear(_TokenLinear):
    """As :class:`Fp8TokenLinear`, with int8 codes from -127 to 127."""

    code_dtype = torch.int8

    @staticmethod
    def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = rows.float()
        amax = values.abs().amax(-1, keepdim=True).clamp(min=1e-10)
        scale = amax / amax.new_full((), 127.0)
        return (values / scale).round().clamp(-127.0, 127.0).to(torch.int8), scale


SCHEMES: Mapping[str, type[Fp8BlockLinear] | type[_TokenLinear]] = {
    "fp8_block": Fp8BlockLinear,
    "fp8_token": Fp8TokenLinear,
    "int8_token": Int8TokenLinear,
}


def dequantize_weight(
    weight: torch.Tensor, weight_scale_inv: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """[out, in] float8 and [ceil(out / 128), ceil(in / 128)] float32 -> [out, in] ``dtype``, rounded once."""
    rows, columns = weight.shape
    blocks = weight_scale_inv.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[
        :, :columns
    ]
    return (weight.float() * blocks).to(dtype)


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, in] -> float8_e4m3fn [out, in] and one float32 scale per 128 x 128 block (the last ones may be cut)."""
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [R, 128, C, 128]
    amax = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-10)
    scale = amax / amax.new_full((), 448.0)
    codes = (blocks / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    codes = codes.reshape(padded.shape)[:rows, :columns]
    return codes.contiguous(), scale[:, 0, :, 0].contiguous()


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
    from fusion_passes import quantize_experts  # here: that module is made of this one

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


def check_dtype(name: str, weight: torch.Tensor) -> None:
    if weight.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"{name} is {weight.dtype}; accepted: torch.bfloat16, torch.float16")


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
