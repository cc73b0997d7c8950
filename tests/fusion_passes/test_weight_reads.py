"""Linears whose weight the model reads itself stay as they are."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusion_passes.quantize import SCHEMES, quantize_
from fusion_passes.weight_reads import weights_read


class Casting(nn.Module):
    """As T5's feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo = nn.Linear(128, 128), nn.Linear(128, 128)
        self.reset(self.wi.weight)

    def reset(self, weight: torch.Tensor) -> None:
        nn.init.normal_(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wo(F.relu(self.wi(x)).to(self.wo.weight.dtype))


class Multiplying(Casting):
    """As Mamba's mixer; and it inherits the read of its base only where it does not override it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wo(x) @ self.wi.weight.T


class Reaching(nn.Module):
    """Reads what a module in it has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(128, 128))
        self.inner.gate = nn.Linear(128, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner[0](x) + F.linear(x, self.inner.gate.weight)


class Quiet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out, self.rest = nn.Linear(128, 128), nn.Linear(128, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(self.out(x))


class Looping(nn.Module):
    """As RWKV, which divides weights of its blocks in place; and linears in a list of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Quiet() for _ in range(2))
        self.heads, self.others = (nn.ModuleList([nn.Linear(128, 128)]) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, (block, other) in enumerate(zip(self.blocks[:1], self.others, strict=True)):
            x = other(block(x)) / (1 + index + block.out.weight.float().abs().amax())
        return x + sum(head.weight.float().sum() for head in self.heads).to(x.dtype)


def test_reads_are_found_where_they_are():
    model = nn.ModuleDict(
        {"a": Casting(), "b": Multiplying(), "c": Reaching(), "d": nn.Linear(1, 1), "e": Looping()}
    )
    assert weights_read(model) == {
        "a.wo": "Casting",
        "b.wi": "Multiplying",
        "c.inner.gate": "Reaching",
        "e.blocks.0.out": "Looping",
        "e.blocks.1.out": "Looping",
        "e.heads.0": "Looping",
    }


def test_a_class_without_sources_has_no_reads():
    made: dict[str, type] = {}
    source = (
        "class Made(nn.Module):\n    def forward(self, x):\n        return self.wi.weight @ x\n"
    )
    exec(source, {"nn": nn}, made)
    model = made["Made"]()
    model.wi = nn.Linear(1, 1)
    assert weights_read(model) == {}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", [Casting, Multiplying, Reaching])
def test_they_stay_and_a_warning_says_so(kind, scheme):
    model = kind().to(torch.bfloat16)
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    (name,) = weights_read(model)
    with torch.no_grad():
        expected = model(x)
        with pytest.warns(UserWarning, match=rf"leaves {name} as it is: {kind.__name__} reads"):
            quantize_(model, scheme)
        assert type(model.get_submodule(name)) is nn.Linear
        assert sum(isinstance(m, SCHEMES[scheme]) for m in model.modules()) == 1
        error = float((model(x) - expected).float().norm() / expected.float().norm())
    assert error < 0.1, "the other linear is quantized, this one is right"


def test_a_filter_takes_them_and_the_linear_refuses_codes():
    model = Casting().to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(model, "fp8_block", filter=lambda name, module: True)
    with pytest.raises(ValueError, match=r"x is torch.float8_e4m3fn; accepted: 16 bits"):
        model(torch.randn(3, 128, dtype=torch.bfloat16))


def test_what_is_no_plain_linear_is_named():
    class Conv1D(nn.Module):
        pass

    class OtherLinear(nn.Linear):
        pass

    model = nn.ModuleDict({"a": Conv1D(), "b": OtherLinear(128, 128)})
    with pytest.raises(
        ValueError, match=r"no torch.nn.Linear to quantize; Conv1D, OtherLinear compute"
    ):
        quantize_(model)
    model["lm_head"] = nn.Linear(128, 128)
    with pytest.raises(
        ValueError, match=r"to quantize but 1 that are left out .* Conv1D, OtherLinear"
    ):
        quantize_(model)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_torchs_encoder_keeps_its_fast_path(scheme):
    """In eval mode it multiplies by linear1.weight and linear2.weight itself; a decoder has no such path."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
    decoder = nn.TransformerDecoderLayer(128, 4, 256, batch_first=True)
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder}).bfloat16().eval()
    x = torch.randn(2, 5, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model["encoder"](x)
        with pytest.warns(
            UserWarning, match=r"encoder.linear1 and 1 more .* TransformerEncoderLayer"
        ):
            quantize_(model, scheme)
        assert torch.equal(model["encoder"](x), expected)
        decoded = model["decoder"](x, x)
    assert decoded.isfinite().all()
    assert {name for name, module in model.named_modules() if type(module) in SCHEMES.values()} == {
        "decoder.linear1",
        "decoder.linear2",
    }
