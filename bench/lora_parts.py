"""Cases of the lora suite around the linears: the halves of them, a base of any kind, layers on one activation."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import custom_ops
from bench.case import Case, Inputs, Thunk, activation, close
from bench.suites.lora import (
    CLOSE,
    LLAMA_TOKENS,
    MIXED,
    SCALING,
    TOKENS,
    layer,
    mixed_inputs,
    peft_layer,
    single_args,
    single_inputs,
)


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
    x, _, *rest = mixed_inputs(device, **sizes)
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
    (_, _, _, a, b, scaling), _ = single_args(module, x)
    linear = torch.nn.functional.linear
    return base + linear(linear(x, a), b) * scaling


def _add_single(device: torch.device, m: int, n: int, k: int, rank: int) -> Inputs:
    return *single_inputs(device, m, n, k, rank, False), activation(device, m, n)


def _add_single_args(
    module: Any, x: Tensor, base: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (_, _, _, a, b, scaling), _ = single_args(module, x)
    return (x, base, a, b, scaling), {}


def _shrink_single(device: torch.device, m: int, n: int, k: int, rank: int) -> Inputs:
    """x, and A of three layers."""
    return activation(device, m, k), [activation(device, rank, k) / k**0.5 for _ in range(3)]


def _shrink_single_plain(x: Tensor, a: list[Tensor]) -> Tensor:
    return torch.stack([torch.nn.functional.linear(x, each) for each in a])


def _expand_single(device: torch.device, m: int, n: int, k: int, rank: int) -> Inputs:
    """y, the base, and B."""
    b = activation(device, n, rank) / rank**0.5
    return activation(device, m, rank), activation(device, m, n), b


def _expand_single_plain(y: Tensor, base: Tensor, b: Tensor) -> Tensor:
    return base + torch.nn.functional.linear(y, b) * SCALING


def _expand_single_args(
    y: Tensor, base: Tensor, b: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (y, base, b, SCALING), {}


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
    layers = [single_args(each, x)[0][1:] for each in module.layers]
    return (x, *map(list, zip(*layers, strict=True))), {}


def _one_by_one(inputs: Inputs) -> Thunk:
    """The same layers as an op each: what `shared_lora_shrink` makes one of."""
    module, x = inputs
    calls = [single_args(each, x)[0] for each in module.layers]
    return lambda: [custom_ops.lora_linear_single(*call) for call in calls]


def each_of_a_batch(x, weights, biases, a, b, scalings, ranks, *batch):
    """Layers with the adapters of a batch, an op each: query, key and value; gate and up."""
    layers = zip(weights, biases, a, b, scalings, ranks, strict=True)
    return [
        custom_ops.lora_linear(x, weight, bias, [of_a], [of_b], scaling, of_layer, *batch)
        for weight, bias, of_a, of_b, scaling, of_layer in layers
    ]


def _batch_together(
    device: torch.device, m: int, adapters: int, widths: tuple[int, ...], k: int, rank: int
) -> Inputs:
    layers = [mixed_inputs(device, m, adapters, n, k, rank, in_order=False) for n in widths]
    x, _, batch, *_ = layers[0]
    _, weights, _, a, b, scalings, _, ranks = map(list, zip(*layers, strict=True))
    one = [[each for (each,) in slices] for slices in (a, b)]
    return x, weights, [None] * len(widths), *one, scalings, ranks, *batch.tensors


def batch_together_cases(tiny: bool) -> Iterator[Case]:
    widths = ((32, 16), (24, 24, 8)) if tiny else ((4096, 1024, 1024), (14336, 14336))
    k, rank, tokens = (64, 4, (5,)) if tiny else (4096, 16, LLAMA_TOKENS)
    for columns, m in itertools.product(widths, tokens):
        adapters = min(m, 32)
        low_rank = len(columns) * rank * k + sum(columns) * rank
        yield Case(
            name="lora_linears",
            sizes={
                "tokens": m,
                "adapters": adapters,
                "layers": len(columns),
                "n": sum(columns),
                "k": k,
                "rank": rank,
            },
            inputs=partial(_batch_together, m=m, adapters=adapters, widths=columns, k=k, rank=rank),
            plain=each_of_a_batch,
            check=close(CLOSE),
            op="lora_linears",
            op_args=lambda *args: (args, {}),
            fusion="shared_lora_shrink",
            others={"one_by_one": lambda inputs: partial(each_of_a_batch, *inputs)},
            moved_bytes=2 * (m * k + sum(columns) * (k + m) + adapters * low_rank),
            flops=2 * m * sum(columns) * (k + rank) + 2 * m * len(columns) * rank * k,
        )


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
        ("lora_shrink", mixed_inputs, _shrink_plain, _shrink_args),
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
        alone = {"tokens": m, "n": n, "k": k, "rank": rank}
        yield Case(
            name="lora_shrink_single",
            sizes={**alone, "layers": 3},
            inputs=partial(_shrink_single, m=m, n=n, k=k, rank=rank),
            plain=_shrink_single_plain,
            check=close(CLOSE),
            op="lora_shrink_single",
            op_args=lambda x, a: ((x, a), {}),
            moved_bytes=2 * (m * k + 3 * rank * (m + k)),
            flops=6 * m * rank * k,
        )
        yield Case(
            name="lora_expand_single",
            sizes=alone,
            inputs=partial(_expand_single, m=m, n=n, k=k, rank=rank),
            plain=_expand_single_plain,
            check=close(CLOSE),
            op="lora_expand_single",
            op_args=_expand_single_args,
            moved_bytes=2 * (2 * m * n + rank * (m + n)),
            flops=2 * m * rank * n,
        )
