"""Gate and up as two weights, one step away from those that are found: none fires, and the reason is named."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusion_passes
from fusion_passes import registry
from fusion_passes.quantize_experts import dequantize, round_trip
from fusion_passes.quantized_linears import quantize_weight
from fusion_passes.testing import fuse
from tests.fusion_passes.apart_code import Block, Form, run
from tests.fusion_passes.helpers import assert_same, misses

pytestmark = pytest.mark.usefixtures("references")


class Rolled(Block):
    """Up is no product of a weight alone."""

    def both(self, product):
        gate = product(self.w1)
        return gate, product(self.w3.roll(1, 0)) * 2 + gate


class Third(Block):
    """The activation reads a third product as well."""

    def between(self, gate, up):
        return super().between(gate, up) * gate


class Biased(Block):
    def grouped(self, x, weights, ids):
        flat = ids.reshape(-1).sort().values
        self.bias = self.w1[:, :, 0][flat]
        return super().grouped(x, weights, ids)

    def both(self, product):
        gate, up = super().both(product)
        return gate + self.bias, up


class Turned(Block):
    """Up lies the other way around in memory."""

    def __init__(self, form):
        super().__init__(form)
        self.register_buffer("turned", self.w3.transpose(1, 2).contiguous())

    def both(self, product):
        return product(self.w1), product(self.turned.transpose(1, 2))


class Linear(Block):
    """Up is no product of the experts."""

    def both(self, product):
        gate = product(self.w1)
        return gate, torch.cat([gate, gate], -1)[..., ::2].contiguous()


class Doubled(Block):
    """Gate is up as well."""

    def both(self, product):
        gate = product(self.w1)
        return gate, gate


class UpClamped(Block):
    def between(self, gate, up):
        return F.silu(gate) * up.clamp(min=-0.8, max=0.8)


class Biased3(Biased):
    """Of up alone."""

    def both(self, product):
        gate, up = Block.both(self, product)
        return gate, up + self.bias


class TwoActivations(Block):
    def between(self, gate, up):
        return F.silu(gate) * F.silu(up)


class Relu(Block):
    def between(self, gate, up):
        return up * F.relu(gate)


class Wide(Block):
    """Rounds once, where eager's SiLU in 16 bits and the op round twice."""

    def between(self, gate, up):
        return (F.silu(gate.float()) * up.float()).to(gate.dtype)


OUTSIDE = {
    "gate is up": (Doubled, Form(), "is both gate and up"),
    "a clamp of up alone": (UpClamped, Form(), "clamps gate or up before they are multiplied"),
    "a bias of up alone": (Biased3, Form(), "are products of their own with a bias"),
    "two activations": (TwoActivations, Form(), "the activation reads .*, where a product is expected"),
    "relu": (Relu, Form("batched"), "none of the activations that are fused: silu_mul, "),
    "float32 between": (Wide, Form("einsum"), "in torch.float32 and rounded to torch.bfloat16 once"),
    "a weight that is made": (Rolled, Form(), "not in pairs: experts are fused that are two each"),
    "a third factor": (Third, Form(), "before the second product is none of the activations"),
    "a bias": (Biased, Form(), "are products of their own with a bias: it is fused where one weight has both"),
    "strides": (Turned, Form(), "differ in their sizes or in how they lie in memory"),
    "no product": (Linear, Form(), "gate or up, is not a half of the product's channels"),
    "many rows in 16 bits": (Block, Form(before="wide", top_k=4, back="scatter_add"), "adds up 4 rows a token"),
    "weighted rows in 16 bits": (Block, Form(back="scatter_add"), "rounds each weighted row to torch.bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_one_step_outside(name):
    kind, form, reason = OUTSIDE[name]
    result = run(form, kind(form))
    assert "fused_moe" not in result.report.matches, result.report
    reasons = misses(result, "fused_moe")
    assert any(re.search(reason, found) for found in reasons), reasons
    assert_same(result)


def test_up_by_other_ids():
    class OtherIds(Block):
        def batched(self, x, weights, ids):
            flat, other = ids.reshape(-1), ids.flip(1).reshape(-1)
            rows = x.repeat_interleave(2, 0).unsqueeze(-1)
            between = F.silu(torch.bmm(self.w1[flat], rows)) * torch.bmm(self.w3[other], rows)
            out = torch.bmm(self.w2[flat], between).view(*ids.shape, -1)
            return (out * weights.unsqueeze(-1)).sum(1).to(x.dtype)

    form = Form("batched")
    result = run(form, OtherIds(form))
    assert "fused_moe" not in result.report.matches
    assert any("different top-k ids" in reason for reason in misses(result, "fused_moe"))


@pytest.mark.parametrize("form", ["grouped", "einsum", "batched"])
def test_up_of_other_rows(form):
    """Of the tokens before it, say: the same weights, sizes and ids."""

    class OtherRows(Block):
        def grouped(self, x, weights, ids):
            self.x = x.roll(1, 0)
            flat = ids.reshape(-1)
            counts = torch.histc(flat.float(), self.form.experts, 0, self.form.experts)
            self.offsets = counts.cumsum(0, dtype=torch.int32)
            self.rows = self.x[torch.argsort(flat, stable=True) // self.form.top_k]
            return super().grouped(x, weights, ids)

        def einsum(self, x, weights, ids):
            self.x, self.ids = x.roll(1, 0), ids
            return super().einsum(x, weights, ids)

        def batched(self, x, weights, ids):
            self.x, self.ids = x.roll(1, 0), ids
            return super().batched(x, weights, ids)

        def both(self, product):
            if self.form.form == "grouped":
                up = torch._grouped_mm(self.rows, self.w3.transpose(-2, -1), offs=self.offsets)
            elif self.form.form == "einsum":
                up = torch.einsum("ti,tkoi->tko", self.x, self.w3[self.ids])
            else:
                rows = self.x.repeat_interleave(self.form.top_k, 0).unsqueeze(-1)
                up = torch.bmm(self.w3[self.ids.reshape(-1)], rows)
            return product(self.w1), up

    form = Form(form)
    result = run(form, OtherRows(form))
    assert "fused_moe" not in result.report.matches
    assert any("multiply different rows" in reason for reason in misses(result, "fused_moe"))
    assert_same(result)


def test_fp8_weights_apart_are_named():
    """The op has one scale for both: without this, that of up would be left out."""

    class Fp8(Block):
        def __init__(self, form):
            super().__init__(form)
            for name in ("w1", "w2", "w3"):
                codes, scales = zip(*(quantize_weight(w) for w in getattr(self, name)), strict=True)
                self.register_buffer(f"{name}_codes", torch.stack(codes))
                self.register_buffer(f"{name}_scale", torch.stack(scales))

        def forward(self, x):
            for name in ("w1", "w2", "w3"):
                codes, scale = getattr(self, f"{name}_codes"), getattr(self, f"{name}_scale")
                setattr(self, name, dequantize(codes, scale, torch.bfloat16))
            return super().forward(round_trip(x))

        def between(self, gate, up):
            return round_trip(super().between(gate, up))

    form = Form(hidden=256, width=128)
    result = run(form, Fp8(form))
    assert "fused_moe" not in result.report.matches
    reasons = misses(result, "fused_moe")
    assert any("are products of their own of FP8 weights" in reason for reason in reasons), reasons
    assert_same(result)


@pytest.mark.parametrize("form", ["grouped", "batched"])
def test_rows_that_are_masked_by_something_else(form):
    """Rows of experts that are elsewhere may be set to 0, as nobody reads them; these are read."""

    class Masked(Block):
        def weighted(self, rows, weights):
            every_third = torch.arange(rows.shape[0]) % 3 == 0
            return rows.masked_fill(every_third.unsqueeze(-1), 0.0)

    form = Form(form)
    result = run(form, Masked(form))
    assert "fused_moe" not in result.report.matches
    assert misses(result, "fused_moe")
    assert_same(result)


def test_rows_that_are_weighted_in_float64():
    """float32 rounds such a product otherwise before it is rounded to 16 bits."""

    class Double(Block):
        def weighted(self, rows, weights):
            return (rows.double() * weights.double().reshape(-1, 1)).to(rows.dtype)

    form = Form(before="wide")
    result = run(form, Double(form))
    assert "fused_moe" not in result.report.matches
    assert misses(result, "fused_moe")
    assert_same(result)


def test_weights_before_and_after_are_named():
    def both(x, w1, w2, w3, weights, ids):
        flat = ids.reshape(-1)
        rows = (x.repeat_interleave(2, 0) * weights.reshape(-1, 1)).unsqueeze(-1)
        between = F.silu(torch.bmm(w1[flat], rows)) * torch.bmm(w3[flat], rows)
        out = torch.bmm(w2[flat], between).view(*ids.shape, -1)
        return (out * weights.unsqueeze(-1)).sum(1)

    block = Block(Form())
    x = block.inputs()[0]
    weights, ids = block.route(x)
    given = (x, block.w1, block.w2, block.w3, weights.bfloat16(), ids)
    result = fuse(both, *given, only=[registry()["fused_moe"]])
    assert result.report.matches == {}
    assert "more than one top-k weight was applied to" in misses(result, "fused_moe")[0]


def test_quantize_leaves_them_and_says_so():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(128, 128, dtype=torch.bfloat16)
            self.experts = nn.Module()
            for name in ("w1", "w2", "w3"):
                weight = nn.Parameter(torch.zeros(4, 128, 128, dtype=torch.bfloat16))
                self.experts.register_parameter(name, weight)

    model = Model()
    with pytest.warns(
        UserWarning, match="leaves experts as it is: it has matrices like those of experts"
    ):
        fusion_passes.quantize_(model, "fp8_block")
    assert model.experts.w1.dtype is torch.bfloat16
    assert type(model.proj) is not nn.Linear
