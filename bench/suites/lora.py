"""Linear layers with adapters: one for all tokens beside PEFT's, and batches that mix them; every way beside ours.

The sizes that matter most have a case of their own name: `--case lora_named` runs them alone, with stock
`torch.compile` of PEFT's layer, in about two minutes.
"""

from __future__ import annotations

import copy
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
from custom_ops.lora import hopper, ways

TOKENS = (1, 16, 64, 256, 1024, 8192)
MIXED = ((64, 64), (1024, 8), (1024, 64))  # (tokens, adapters) that the issue names
RANKS = (8, 16, 32, 64, 128, 256)
ADAPTERS = (1, 8, 32, 128)
HIDDEN = (1024, 4096, 8192, 16384)
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


def _single(device: torch.device, m: int, n: int, k: int, rank: int, float32: bool) -> Inputs:
    return peft_layer(device, n, k, rank, float32), activation(device, m, k)


def _single_args(module: Any, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    return (x, module.base_layer.weight, None, a, b, module.scaling["default"]), {}


def _base_of_single(inputs: Inputs) -> Thunk:
    module, x = inputs
    return lambda: torch.nn.functional.linear(x, module.base_layer.weight)


def single_cases(tiny: bool) -> Iterator[Case]:
    sizes = [(m, 4096, 4096, 16) for m in TOKENS]
    sizes += [(64, 4096, 4096, rank) for rank in RANKS if rank != 16]
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
            inputs=partial(_single, m=m, n=n, k=k, rank=rank, float32=float32),
            plain=layer,
            check=close(CLOSE),
            op="lora_linear_single",
            op_args=_single_args,
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


def _mixed(
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
    sizes = [(m, adapters, 4096, 16, False) for m, adapters in MIXED]
    sizes += [(m, 1, 4096, 16, True) for m in TOKENS]
    sizes += [(64, 8, 4096, rank, False) for rank in RANKS]
    sizes += [(256, n, 4096, 16, order) for n in ADAPTERS for order in (False, True)]
    sizes += [(64, 8, hidden, 16, False) for hidden in HIDDEN if hidden != 4096]
    for m, adapters, hidden, rank, in_order in [(5, 3, 32, 4, False)] if tiny else sizes:
        bar = MIXED_BARS.get((m, adapters)) if hidden == 4096 else None
        named = (m, adapters) in MIXED and (hidden, rank) == (4096, 16)
        yield Case(
            name="lora_named_batch" if named else "lora_linear",
            sizes={
                "tokens": m,
                "adapters": adapters,
                "n": hidden,
                "k": hidden,
                "rank": rank,
                "sorted": int(in_order),
            },
            inputs=partial(
                _mixed, m=m, adapters=adapters, n=hidden, k=hidden, rank=rank, in_order=in_order
            ),
            plain=_mixed_plain,
            check=close(CLOSE),
            op="lora_linear",
            op_args=_mixed_args,
            moved_bytes=2 * (2 * m * hidden + hidden * hidden)
            + 4 * min(m, adapters) * rank * hidden,
            flops=2 * m * hidden * hidden + 4 * m * rank * hidden,
            others={"base": _base_of_mixed, "peft_mixed": peft_mixed}
            | _ways("batch", m, rank, False),
            targets=(Target("of_base", bar),) if bar else (),
        )


# ---- the halves of them, and a base of any kind ------------------------------------------------------------


def _shrink_plain(x, weight, batch, a, b, scaling, places, ranks):
    return torch.bmm(a[0][places], x[:, :, None])[:, :, 0][None].float()


def _shrink_args(x, weight, batch, a, b, scaling, places, ranks):
    return (x, a, ranks, *batch.tensors), {}


def _added_plain(x, weight, batch, a, b, scaling, places, ranks):
    """weight stands for what is added to: the outcome of any other product."""
    y = torch.bmm(a[0][places], x[:, :, None])
    delta = torch.bmm(b[0][places], y)[:, :, 0] * scaling[places][:, None]
    return weight + delta.to(x.dtype)


def _added(device: torch.device, **sizes: Any) -> Inputs:
    x, _, *rest = _mixed(device, **sizes)
    return x, activation(device, sizes["m"], sizes["n"]), *rest


def _add_args(x, base, batch, a, b, scaling, places, ranks):
    return (x, base, a, b, scaling, ranks, *batch.tensors), {}


def _expand_plain(y, base, batch, a, b, scaling, places, ranks):
    delta = torch.bmm(b[0][places].float(), y[0][:, :, None])[:, :, 0] * scaling[places][:, None]
    return (base + delta).to(base.dtype)


def _expanded(device: torch.device, **sizes: Any) -> Inputs:
    _, *rest = _added(device, **sizes)
    return torch.randn(1, sizes["m"], sizes["rank"], device=device), *rest


def _expand_args(y, base, batch, a, b, scaling, places, ranks):
    return (y, b, base, scaling, ranks, *batch.tensors), {}


def _add_single_plain(module: Any, x: Tensor, base: Tensor) -> Tensor:
    (_, _, _, a, b, scaling), _ = _single_args(module, x)
    linear = torch.nn.functional.linear
    return base + linear(linear(x, a), b) * scaling


def _add_single(device: torch.device, m: int, n: int, k: int, rank: int) -> Inputs:
    return *_single(device, m, n, k, rank, False), activation(device, m, n)


def _add_single_args(
    module: Any, x: Tensor, base: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (_, _, _, a, b, scaling), _ = _single_args(module, x)
    return (x, base, a, b, scaling), {}


def three_of_one_input(x, bases, a, b, scaling, ranks, *batch):
    """Query, key and value of a layer whose linears are quantized: the adapters of each, on one x."""
    return tuple(
        custom_ops.lora_add(x, base, [of_a], [of_b], scaling, ranks, *batch)
        for base, of_a, of_b in zip(bases, a, b, strict=True)
    )


def _three(device: torch.device, **sizes: Any) -> Inputs:
    x, base, batch, a, b, scaling, _, ranks = _added(device, **sizes)
    return x, [base] * 3, a * 3, b * 3, scaling, ranks, *batch.tensors


class Layers(nn.Module):
    """Layers of PEFT on one activation: query, key and value; gate and up."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(each(x) for each in self.layers)


def _together(device: torch.device, m: int, widths: tuple[int, ...], k: int, rank: int) -> Inputs:
    layers = [copy.deepcopy(peft_layer(device, n, k, rank, False)) for n in widths]
    return Layers(layers), activation(device, m, k)


def _together_args(module: Any, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    layers = [_single_args(each, x)[0][1:] for each in module.layers]
    return (x, *map(list, zip(*layers, strict=True))), {}


def _one_by_one(inputs: Inputs) -> Thunk:
    """The same layers as an op each: what `shared_lora_shrink` makes one of."""
    module, x = inputs
    calls = [_single_args(each, x)[0] for each in module.layers]
    return lambda: [custom_ops.lora_linear_single(*call) for call in calls]


def together_cases(tiny: bool) -> Iterator[Case]:
    widths = ((32, 16), (24, 24, 8)) if tiny else ((4096, 1024, 1024), (14336, 14336))
    k, rank, tokens = (64, 4, (5,)) if tiny else (4096, 16, (1, 64, 256, 1024, 8192))
    for columns, m in itertools.product(widths, tokens):
        yield Case(
            name="lora_linears_single",
            sizes={"tokens": m, "layers": len(columns), "n": sum(columns), "k": k, "rank": rank},
            inputs=partial(_together, m=m, widths=columns, k=k, rank=rank),
            plain=layer,
            check=close(CLOSE),
            op="lora_linears_single",
            op_args=_together_args,
            fusion="shared_lora_shrink",
            beside=("lora_linear",),
            moved_bytes=2 * (m * k + sum(columns) * (k + m + rank) + len(columns) * rank * k),
            flops=2 * m * sum(columns) * (k + rank) + 2 * m * len(columns) * rank * k,
            others={"one_by_one": _one_by_one},
        )


def shared_cases(tiny: bool) -> Iterator[Case]:
    sizes = [(5, 3, 32, 4)] if tiny else [(m, 8, 4096, 16) for m in TOKENS]
    for m, adapters, hidden, rank in sizes:
        low_rank = min(m, adapters) * rank * hidden
        yield Case(
            name="shared_lora_shrink",
            sizes={"tokens": m, "adapters": adapters, "n": hidden, "k": hidden, "rank": rank},
            inputs=partial(
                _three, m=m, adapters=adapters, n=hidden, k=hidden, rank=rank, in_order=False
            ),
            plain=three_of_one_input,
            check=close(CLOSE),
            fusion="shared_lora_shrink",
            moved_bytes=2 * (6 * low_rank + 7 * m * hidden),
            flops=12 * m * rank * hidden,
        )


def half_cases(tiny: bool) -> Iterator[Case]:
    halves = (
        ("lora_shrink", _mixed, _shrink_plain, _shrink_args),
        ("lora_expand", _expanded, _expand_plain, _expand_args),
        ("lora_add", _added, _added_plain, _add_args),
    )
    sizes = [(5, 3, 32, 4)] if tiny else [(m, adapters, 4096, 16) for m, adapters in MIXED]
    for (name, inputs, plain, args), (m, adapters, hidden, rank) in itertools.product(
        halves, sizes
    ):
        low_rank = min(m, adapters) * rank * hidden
        yield Case(
            name=name,
            sizes={"tokens": m, "adapters": adapters, "n": hidden, "k": hidden, "rank": rank},
            inputs=partial(
                inputs, m=m, adapters=adapters, n=hidden, k=hidden, rank=rank, in_order=False
            ),
            plain=plain,
            check=close(CLOSE),
            op=name,
            op_args=args,
            moved_bytes=2 * (low_rank + 2 * m * hidden),
            flops=2 * m * rank * hidden,
        )
    for m, n, k, rank in [(5, 32, 64, 4)] if tiny else [(m, 4096, 4096, 16) for m in TOKENS]:
        yield Case(
            name="lora_add_single",
            sizes={"tokens": m, "n": n, "k": k, "rank": rank},
            inputs=partial(_add_single, m=m, n=n, k=k, rank=rank),
            plain=_add_single_plain,
            check=close(CLOSE),
            op="lora_add_single",
            op_args=_add_single_args,
            moved_bytes=2 * (m * k + 2 * m * n + rank * (n + k)),
            flops=2 * m * rank * (n + k),
        )


# ---- the ways -------------------------------------------------------------------------------------------------


def _ways(kind: str, m: int, rank: int, float32: bool) -> dict[str, Any]:
    """Every way that takes such a call: what the table is made of."""
    device = torch.device("cuda", 0)
    if not torch.cuda.is_available():
        return {}
    names = ["apart", "beside"]
    if kind == "single" and m >= 64 and rank <= ways.MAX_FUSED_RANK:
        names.append("fused")
    if not hopper.unavailable(device) and rank % 8 == 0:
        if m <= hopper.MAX_DECODE_TOKENS and rank <= hopper.MAX_DECODE_RANK:
            names += ways.DECODES
        if kind == "single" and m >= 64 and not float32:
            names.append("prefill")
    return {f"way {name}": partial(one_way, kind=kind, way=name) for name in names}


def one_way(inputs: Inputs, kind: str, way: str) -> Thunk:
    """One way, after its result has been held against plain PyTorch's."""
    from custom_ops.lora import linear

    single = kind == "single"
    (args, _), plain = (
        (_single_args(*inputs), layer) if single else (_mixed_args(*inputs), _mixed_plain)
    )
    if way in (*ways.DECODES, "prefill"):
        run = _hopper(kind)
    else:
        run = linear.lora_linear_single if single else linear.lora_linear
    call = partial(run, *args, way=way)
    if problem := close(CLOSE)(plain(*inputs), call()):
        raise AssertionError(f"differs from eager: {problem}")
    return call


@functools.cache
def _hopper(kind: str) -> Any:
    return hopper.load_single() if kind == "single" else hopper.load_batch()


# ---- experts --------------------------------------------------------------------------------------------------


def _experts(
    device: torch.device, m: int, adapters: int, experts: int, top_k: int, h: int, i: int, rank: int
) -> Inputs:
    """The arguments of fused_moe_lora; tokens in turn have each adapter, and random experts."""
    torch.manual_seed(0)
    slots = torch.arange(m, dtype=torch.int32, device=device) % adapters
    scores = torch.rand(m, experts, device=device)
    weights, ids = scores.softmax(-1).topk(top_k)
    shapes = ((2 * i, h), (h, i))
    products = [activation(device, experts, n, k) / k**0.5 for n, k in shapes]
    lora = [
        each
        for n, k in shapes
        for each in (
            activation(device, adapters, experts, rank, k) / k**0.5,
            activation(device, adapters, experts, n, rank) / rank**0.5,
        )
    ]
    scaling = torch.rand(adapters, device=device) + 0.5
    ranks = torch.full((adapters,), rank, dtype=torch.int32, device=device)
    return activation(device, m, h), *products, weights, ids, *lora, scaling, ranks, slots


def _experts_plain(
    x, gate_up, down, weights, ids, up_a, up_b, down_a, down_b, scaling, ranks, slots
):
    """Copies of the weights and the adapters of every pair, and batched products; float32 between the two."""
    top_k = ids.shape[1]
    expert, slot = ids.flatten(), slots.long().repeat_interleave(top_k)

    def linear(rows: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        column = rows[:, :, None]
        base = torch.bmm(weight[expert], column)[:, :, 0]
        y = torch.bmm(a[slot, expert].float(), column.float())
        return (base + torch.bmm(b[slot, expert].float(), y)[:, :, 0] * scaling[slot, None]).to(
            rows.dtype
        )

    gate, up = linear(x.repeat_interleave(top_k, 0), gate_up, up_a, up_b).chunk(2, -1)
    out = linear(torch.nn.functional.silu(gate) * up, down, down_a, down_b)
    pairs = out.view(*ids.shape, -1) * weights[:, :, None]
    return pairs.float().sum(1).to(x.dtype)


def _experts_alone(inputs: Inputs) -> Thunk:
    """The same experts without adapters."""
    return lambda: custom_ops.fused_moe(*inputs[:5])


def expert_cases(tiny: bool) -> Iterator[Case]:
    sizes = (
        [(5, 3, 4, 2, 32, 16, 4)] if tiny else [(m, 4, 64, 8, 2048, 768, 16) for m in (1, 16, 64)]
    )
    for m, adapters, experts, top_k, hidden, width, rank in sizes:
        used = min(m * top_k, experts)
        yield Case(
            name="fused_moe_lora",
            sizes={
                "tokens": m,
                "adapters": adapters,
                "experts": experts,
                "top_k": top_k,
                "h": hidden,
                "i": width,
            },
            inputs=partial(
                _experts,
                m=m,
                adapters=adapters,
                experts=experts,
                top_k=top_k,
                h=hidden,
                i=width,
                rank=rank,
            ),
            plain=_experts_plain,
            check=close(2 * CLOSE),
            op="fused_moe_lora",
            op_args=lambda *inputs: (inputs, {}),
            moved_bytes=6 * used * hidden * width
            + 2 * min(m * top_k, adapters * experts) * rank * (2 * hidden + 3 * width),
            flops=6 * m * top_k * hidden * width,
            others={"fused_moe": _experts_alone},
        )


def cases(tiny: bool = False) -> Iterator[Case]:
    yield from sorted(
        (*single_cases(tiny), *mixed_cases(tiny)), key=lambda case: "named" not in case.name
    )
    yield from together_cases(tiny)
    yield from expert_cases(tiny)
    yield from half_cases(tiny)
    yield from shared_cases(tiny)
