"""Linear layers with adapters: one for all tokens beside PEFT's, and batches that mix them; every way beside ours.

The sizes that matter most have a case of their own name: `--case lora_named` runs them alone, with stock
`torch.compile` of PEFT's layer, in about two minutes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import custom_ops
from bench.case import Case, Inputs, Target, Thunk, activation, close
from custom_ops.lora import hopper, hopper_batch, ways

TOKENS = (1, 16, 64, 256, 1024, 8192)
MIXED = ((64, 64), (1024, 8), (1024, 64))  # (tokens, adapters) that the issue names
RANKS = (8, 16, 32, 64, 128, 256)
ADAPTERS = (1, 8, 32, 128)
HIDDEN = (1024, 4096, 8192, 16384)
LLAMA = ((1024, 4096), (14336, 4096), (4096, 14336))  # N, K of Llama-3-8B, beside 4096 and 4096
LLAMA_TOKENS = (1, 32, 256, 2048)  # of 32 adapters
# tokens -> least time of the base over ours
SINGLE_BARS = {1: 1 / 1.35, 64: 1 / 1.35, 1024: 1 / 1.15, 8192: 1 / 1.15}
MIXED_BARS = {(1024, 8): 1 / 1.3, (1024, 64): 1 / 1.3}
SCALING = 0.5
CLOSE = 1e-2


# ---- one adapter ----------------------------------------------------------------------------------------------


def layer(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


@functools.lru_cache(maxsize=2)
def peft_layer(device: torch.device, n: int, k: int, rank: int, float32: bool) -> nn.Module:
    """A linear layer as `get_peft_model` wraps it; its adapter in float32, which is the default, or in 16 bits."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16))
    config = LoraConfig(r=rank, lora_alpha=int(SCALING * rank), target_modules=["0"])
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=float32).eval()
    for name, weight in wrapped.named_parameters():
        if "lora_" in name:  # B starts as zeros, and would make a wrong product look right
            weight.data = torch.randn_like(weight) / weight.shape[1] ** 0.5
        weight.requires_grad_(False)
    return wrapped.base_model.model[0].to(device)


def single_inputs(device: torch.device, m: int, n: int, k: int, rank: int, float32: bool) -> Inputs:
    return peft_layer(device, n, k, rank, float32), activation(device, m, k)


def single_args(module: Any, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    return (x, module.base_layer.weight, None, a, b, module.scaling["default"]), {}


def _base_of_single(inputs: Inputs) -> Thunk:
    module, x = inputs
    return lambda: torch.nn.functional.linear(x, module.base_layer.weight)


def single_cases(tiny: bool) -> Iterator[Case]:
    sizes = [(m, 4096, 4096, 16) for m in TOKENS]
    sizes += [(64, 4096, 4096, rank) for rank in RANKS if rank != 16]
    sizes += [(m, 4096, 4096, rank) for m in (1, 1024, 8192) for rank in (8, 64, 256)]
    sizes += [(m, hidden, hidden, 16) for m in (1, 64, 1024) for hidden in HIDDEN if hidden != 4096]
    for float32, (m, n, k, rank) in itertools.product(
        (False, True), [(5, 32, 64, 4)] if tiny else sizes
    ):
        # the bars are those of the table: rank 16, 4096 x 4096, a 16-bit adapter
        named = (n, k, rank) == (4096, 4096, 16) and m in SINGLE_BARS
        bar = SINGLE_BARS.get(m) if named and not float32 else None
        yield Case(
            name=("lora_named_single" if named else "lora_linear_single")
            + ("_float32" if float32 else ""),
            sizes={"tokens": m, "n": n, "k": k, "rank": rank},
            inputs=partial(single_inputs, m=m, n=n, k=k, rank=rank, float32=float32),
            plain=layer,
            check=close(CLOSE),
            op="lora_linear_single",
            op_args=single_args,
            fusion="lora_linear",
            moved_bytes=2 * (m * k + n * k + m * n) + (4 if float32 else 2) * rank * (n + k),
            flops=2 * m * n * k + 2 * m * rank * (n + k),
            others={"base": _base_of_single} | _ways("single", m, rank, float32),
            targets=(Target("of_base", bar),) if bar else (),
        )


# ---- many adapters --------------------------------------------------------------------------------------------


def gathered(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: Tensor, slots: Tensor
) -> Tensor:
    """A copy of A and of B for every token, and two batched products: a batch in plain PyTorch."""
    y = torch.bmm(a[slots], x[:, :, None])
    delta = torch.bmm(b[slots], y)[:, :, 0] * scaling[slots][:, None]
    return torch.nn.functional.linear(x, weight) + delta.to(x.dtype)


def peft_mixed(inputs: Inputs) -> Thunk:
    """What PEFT does for `adapter_names`: an adapter at a time, on its tokens; their places already on the GPU.

    PEFT itself makes the lists of places in each call, for which the host waits: no CUDA graph can hold that.
    """
    x, weight, _, a, b, scaling, slots, _ = inputs
    places = [(i, (slots == i).nonzero()[:, 0]) for i in slots.unique().tolist() if i >= 0]
    scales = scaling.tolist()

    def call() -> Tensor:
        out = torch.nn.functional.linear(x, weight)
        for i, at in places:
            y = torch.nn.functional.linear(x[at], a[0][i])
            out[at] += torch.nn.functional.linear(y, b[0][i]) * scales[i]
        return out

    return call


def mixed_inputs(
    device: torch.device, m: int, adapters: int, n: int, k: int, rank: int, in_order: bool
) -> Inputs:
    """x, weight, the batch, [a], [b], scaling, the slot of each token, ranks."""
    slots = np.arange(m, dtype=np.int32) % adapters
    slots = np.sort(slots) if in_order else np.random.default_rng(0).permutation(slots)
    batch = custom_ops.LoRABatch(m, adapters, device=device)
    batch.update(slots)
    a = activation(device, adapters, rank, k) / k**0.5
    b = activation(device, adapters, n, rank) / rank**0.5
    scaling = torch.rand(adapters, device=device) + 0.5
    ranks = torch.full((adapters,), rank, dtype=torch.int32, device=device)
    places = torch.as_tensor(slots, dtype=torch.int64, device=device)
    weight = activation(device, n, k) / k**0.5
    return activation(device, m, k), weight, batch, [a], [b], scaling, places, ranks


def _mixed_plain(x, weight, batch, a, b, scaling, places, ranks):
    return gathered(x, weight, a[0], b[0], scaling, places)


def _mixed_args(x, weight, batch, a, b, scaling, places, ranks):
    return (x, weight, None, a, b, scaling, ranks, *batch.tensors), {}


def _base_of_mixed(inputs: Inputs) -> Thunk:
    return lambda: torch.nn.functional.linear(inputs[0], inputs[1])


def mixed_cases(tiny: bool) -> Iterator[Case]:
    square = [(m, adapters, 4096, 16, False) for m, adapters in MIXED]
    square += [(m, 1, 4096, 16, True) for m in TOKENS]
    square += [(64, 8, 4096, rank, False) for rank in RANKS]
    square += [(256, n, 4096, 16, order) for n in ADAPTERS for order in (False, True)]
    square += [(64, 8, hidden, 16, False) for hidden in HIDDEN if hidden != 4096]
    sizes = [(m, adapters, n, n, rank, order) for m, adapters, n, rank, order in square]
    sizes += [
        (m, min(m, 32), n, k, 16, False) for m in LLAMA_TOKENS for n, k in ((4096, 4096), *LLAMA)
    ]
    for m, adapters, n, k, rank, in_order in (
        [(5, 3, 32, 32, 4, False)] if tiny else dict.fromkeys(sizes)
    ):
        bar = MIXED_BARS.get((m, adapters)) if n == k == 4096 else None
        named = (m, adapters) in MIXED and (n, k, rank) == (4096, 4096, 16)
        yield Case(
            name="lora_named_batch" if named else "lora_linear",
            sizes={
                "tokens": m,
                "adapters": adapters,
                "n": n,
                "k": k,
                "rank": rank,
                "sorted": int(in_order),
            },
            inputs=partial(
                mixed_inputs, m=m, adapters=adapters, n=n, k=k, rank=rank, in_order=in_order
            ),
            plain=_mixed_plain,
            check=close(CLOSE),
            op="lora_linear",
            op_args=_mixed_args,
            moved_bytes=2 * (m * (n + k) + n * k) + 2 * min(m, adapters) * rank * (n + k),
            flops=2 * m * n * k + 2 * m * rank * (n + k),
            others={"base": _base_of_mixed, "peft_mixed": peft_mixed}
            | _ways("batch", m, rank, False),
            targets=(Target("of_base", bar),) if bar else (),
        )


# ---- the ways -------------------------------------------------------------------------------------------------


def _ways(kind: str, m: int, rank: int, float32: bool) -> dict[str, Any]:
    """Every way that takes such a call: what the table is made of."""
    device = torch.device("cuda", 0)
    if not torch.cuda.is_available():
        return {}
    names = [*ways.WITH_BLAS]
    if kind == "single" and m >= 64 and rank <= ways.MAX_FUSED_RANK:
        names.append("fused")
    if not hopper.unavailable(device) and rank % 8 == 0:
        if m <= hopper.MAX_DECODE_TOKENS and rank <= hopper.MAX_DECODE_RANK:
            names += ways.DECODES
        if kind == "batch" and rank in hopper_batch.RANKS:
            names.append(ways.TILED)
        if kind == "single" and m >= 64 and not float32:
            names.append("prefill")
            if rank <= hopper.MAX_PREFILL_OWN_RANK:
                names.append("prefill own")
    return {f"way {name}": partial(one_way, kind=kind, way=name) for name in names}


def one_way(inputs: Inputs, kind: str, way: str) -> Thunk:
    """One way, after its result has been held against plain PyTorch's."""
    from custom_ops.lora import linear

    single = kind == "single"
    (args, _), plain = (
        (single_args(*inputs), layer) if single else (_mixed_args(*inputs), _mixed_plain)
    )
    in_triton: Any = linear.lora_linear_single if single else linear.lora_linear
    run: Any = _hopper(kind) if way in ways.CUDA else in_triton
    call = partial(run, *args, way=way)
    if problem := close(CLOSE)(plain(*inputs), call()):
        raise AssertionError(f"differs from eager: {problem}")
    return call


@functools.cache
def _hopper(kind: str) -> Any:
    return hopper.load_single() if kind == "single" else hopper.load_batch()


def cases(tiny: bool = False) -> Iterator[Case]:
    from bench import lora_experts, lora_parts  # which read this module

    yield from sorted(
        (*single_cases(tiny), *mixed_cases(tiny)), key=lambda case: "named" not in case.name
    )
    yield from lora_parts.together_cases(tiny)
    yield from lora_parts.batch_together_cases(tiny)
    yield from lora_experts.expert_cases(tiny)
    yield from lora_parts.half_cases(tiny)
    yield from lora_parts.shared_cases(tiny)
