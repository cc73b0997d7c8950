"""What the tests of LoRA draw: batches of adapters of mixed ranks, and the exact result in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from custom_ops import LoRABatch
from fusion_passes.testing.strategies import relayouts
from tests.custom_ops.helpers import DEVICE

DTYPES = (torch.bfloat16, torch.float16)
RANKS = (1, 2, 7, 8, 16, 17, 33, 64, 100, 256)
CHANNELS = (1, 3, 16, 33, 64, 130)
WIDTHS = (1, 3, 16, 40, 129)
TOKENS = (0, 1, 2, 15, 17, 64, 70)
STALE = 1e30  # what a slot holds past its adapter's rank, of an adapter that was there before


@dataclass
class Batch:
    """A call of lora_linear, and which slot each token has."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: list[Tensor]
    b: list[Tensor]
    scaling: Tensor
    ranks: Tensor
    tensors: tuple[Tensor, Tensor, Tensor]
    slots: list[int]

    @property
    def linear(self) -> tuple:
        return (
            *(self.x, self.weight, self.bias, self.a, self.b, self.scaling, self.ranks),
            *self.tensors,
        )

    @property
    def shrink(self) -> tuple:
        return self.x, self.a, self.ranks, *self.tensors

    @property
    def rows(self) -> Tensor:
        return self.x.reshape(-1, self.x.shape[-1])

    def base(self) -> Tensor:
        """A base for the ops that are given one. What computes its own may differ: see `exact_base`."""
        rows = torch.nn.functional.linear(self.rows, self.weight, self.bias)
        return rows.reshape(*self.x.shape[:-1], self.weight.shape[0])

    def exact_shrink(self) -> tuple[Tensor, Tensor]:
        """y in float64, and the same of the magnitudes."""
        shape = len(self.a), self.rows.shape[0], self.a[0].shape[1]
        y = torch.zeros(shape, dtype=torch.float64, device=self.x.device)
        magnitude = torch.zeros_like(y)
        for token, slot in enumerate(self.slots):
            rank = int(self.ranks[slot]) if slot >= 0 else 0
            for index, a in enumerate(self.a):
                left, right = self.rows[token].double(), a[slot, :rank].double()
                y[index, token, :rank] = right @ left
                magnitude[index, token, :rank] = right.abs() @ left.abs()
        return y, magnitude

    def exact_expand(self, y: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
        """The low-rank product of a y in float64, and the same of the magnitudes."""
        columns = sum(b.shape[1] for b in self.b)
        shape = y.shape[1], columns
        out = torch.zeros(shape, dtype=torch.float64, device=y.device)
        most = torch.zeros_like(out)
        for token, slot in enumerate(self.slots):
            if slot < 0:
                continue
            rank, first = int(self.ranks[slot]), 0
            scaling = float(self.scaling[slot])
            for index, b in enumerate(self.b):
                part = slice(first, first + b.shape[1])
                weights = b[slot, :, :rank].double()
                out[token, part] = weights @ y[index, token, :rank] * scaling
                most[token, part] = weights.abs() @ magnitude[index, token, :rank] * abs(scaling)
                first += b.shape[1]
        return out, most


def normal(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def adapters(
    seed: int, ranks: list[int], most: int, channels: int, widths: list[int], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Slots as a manager leaves them: zero from the rank to the next multiple of 16, stale after that."""
    a = [normal(seed + i, (len(ranks), most, channels), dtype) for i in range(len(widths))]
    b = [normal(seed - i, (len(ranks), width, most), dtype) for i, width in enumerate(widths)]
    stale = min(STALE, torch.finfo(dtype).max)
    for slot, rank in enumerate(ranks):
        after = -(-rank // 16) * 16
        for each in a:
            each[slot, rank:after] = 0
            each[slot, after:] = stale
        for each in b:
            each[slot, :, rank:after] = 0
            each[slot, :, after:] = stale
    return a, b


@st.composite
def batches(draw: st.DrawFn, max_slices: int = 3) -> Batch:
    """Any shapes, strides of x and W, slices of unequal width, ranks of 0 to the most, tokens without an adapter."""
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(10, 2**31))
    count, channels = draw(st.sampled_from(TOKENS)), draw(st.sampled_from(CHANNELS))
    widths = draw(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=max_slices))
    most = draw(st.sampled_from(RANKS))
    num_slots = draw(st.integers(1, 6))
    ranks = draw(st.lists(st.integers(0, most), min_size=num_slots, max_size=num_slots))
    slots = draw(st.lists(st.integers(-1, num_slots - 1), min_size=count, max_size=count))
    batch = LoRABatch(count + draw(st.integers(1, 40)), num_slots, device=DEVICE)
    batch.update(slots)
    a, b = adapters(seed, ranks, most, channels, widths, dtype)
    x = draw(relayouts(normal(seed + 7, (count, channels), dtype)))
    weight = draw(relayouts(normal(seed + 8, (sum(widths), channels), dtype)))
    bias = normal(seed + 9, (sum(widths),), dtype) if draw(st.booleans()) else None
    scaling = normal(seed + 11, (num_slots,), torch.float32)
    if draw(st.booleans()):
        x = x.reshape(1, count, channels)
    return Batch(
        *(x, weight, bias, a, b, scaling, torch.tensor(ranks, dtype=torch.int32, device=DEVICE)),
        *(batch.tensors, slots),
    )


@dataclass
class Single:
    """A call of lora_linear_single."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scaling: float

    @property
    def args(self) -> tuple:
        return self.x, self.weight, self.bias, self.a, self.b, self.scaling

    def exact_delta(self) -> tuple[Tensor, Tensor]:
        """The low-rank product in float64, and the same of the magnitudes."""
        x, a, b = self.x.double(), self.a.double(), self.b.double()
        delta = x @ a.t() @ b.t() * self.scaling
        return delta, x.abs() @ a.abs().t() @ b.abs().t() * abs(self.scaling)


def exact_base(call: Batch | Single) -> tuple[Tensor, Tensor, Tensor]:
    """Of the rows of a call: the base in float64, what one of 16 bits may be off by, and the sum of its magnitudes.

    PyTorch's product is no oracle for it: with other strides it sums in another order (in float16 on a CPU, a quarter
    of all transposed inputs of [18, 130] differ from their copies), and it may round before the bias is added.
    """
    x, weight = call.x.double().reshape(-1, call.x.shape[-1]), call.weight.double()
    product, most = x @ weight.t(), x.abs() @ weight.abs().t()
    step = 0.51 * torch.finfo(call.x.dtype).eps
    slack = (x.shape[1] + 8) * 2.0**-24 * most
    if call.bias is None:
        return product, slack + step * product.abs(), most
    base = product + call.bias.double()
    slack = slack + step * (product.abs() + base.abs())
    return base, slack, most + call.bias.double().abs()


@st.composite
def singles(draw: st.DrawFn, integers: bool = False) -> Single:
    """Any shapes and strides; float32 adapters too. integers: so small that every sum is exact in float32."""
    dtype = draw(st.sampled_from(DTYPES))
    wide = torch.float32 if draw(st.booleans()) else dtype
    seed = draw(st.integers(10, 2**31))
    count, channels = draw(st.sampled_from(TOKENS)), draw(st.sampled_from(CHANNELS))
    rank, columns = draw(st.sampled_from(RANKS)), draw(st.sampled_from(WIDTHS))

    def tensor(which: int, shape: tuple[int, ...], like: torch.dtype) -> Tensor:
        if integers:
            return (normal(seed + which, shape, torch.float32) * 2).round().to(like)
        return normal(seed + which, shape, like)

    x = draw(relayouts(tensor(0, (count, channels), dtype)))
    weight = draw(relayouts(tensor(1, (columns, channels), dtype)))
    bias = tensor(2, (columns,), dtype) if draw(st.booleans()) else None
    a = draw(relayouts(tensor(3, (rank, channels), wide)))
    b = draw(relayouts(tensor(4, (columns, rank), wide)))
    return Single(x, weight, bias, a, b, draw(st.sampled_from((1.0, 2.0, 0.7, -0.3))))
