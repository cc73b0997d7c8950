"""Checkpoints of block-scaled FP8: what is loaded, what does not fit, and that nothing is loaded then."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fusion_passes.quantize import (
    load_fp8_block_,
    quantize_,
    quantize_weight,
)
from tests.fusion_passes.helpers import FP8, everything, fuse_all, random
from tests.fusion_passes.linears import Model

pytestmark = pytest.mark.usefixtures("references")


@pytest.fixture
def checkpoint(tmp_path):
    model = quantize_(Model())
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", tensors


def untouched() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    model = quantize_(Model())
    return model, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    own = model.state_dict()
    return own.keys() == tensors.keys() and all(
        torch.equal(own[k].view(torch.uint8), tensors[k].view(torch.uint8)) for k in own
    )


@pytest.mark.parametrize("kind", ["path", "string", "mapping"])
def test_a_checkpoint_round_trip(checkpoint, kind):
    path, tensors = checkpoint
    assert {n: t.dtype for n, t in tensors.items() if n.startswith("layers.1")} == {
        "layers.1.weight": FP8,
        "layers.1.weight_scale_inv": torch.float32,
        "layers.1.bias": torch.bfloat16,
    }
    model, before = untouched()
    assert not same(model, tensors)
    assert (
        load_fp8_block_(model, {"path": path, "string": str(path), "mapping": tensors}[kind])
        is model
    )
    assert same(model, tensors)
    assert before.keys() == tensors.keys()


def zeros(*shape: int, dtype: torch.dtype = FP8) -> torch.Tensor:
    return torch.zeros(*shape).to(dtype)


BAD = {
    "shape": ("layers.0.weight", zeros(64, 128), r" has shape \(64, 128\); accepted: \(64, 64\)"),
    "scale shape": (
        "layers.0.weight_scale_inv",
        torch.ones(2, 1),
        r" has shape \(2, 1\); accepted: \(1, 1\)",
    ),
    "dtype": (
        "layers.0.weight",
        zeros(64, 64, dtype=torch.bfloat16),
        r" is torch\.bfloat16; accepted: torch\.float8_e4m3fn",
    ),
    "other float8": (
        "layers.0.weight",
        zeros(64, 64, dtype=torch.float8_e5m2),
        r" is torch\.float8_e5m2; accepted: ",
    ),
    "codes for a plain weight": (
        "embed.weight",
        zeros(40, 64),
        r" is torch\.float8_e4m3fn; accepted: torch\.bfloat16",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(checkpoint, what):
    name, tensor, words = BAD[what]
    model, before = untouched()
    with pytest.raises(ValueError, match=name.replace(".", r"\.") + words):
        load_fp8_block_(model, {**checkpoint[1], name: tensor})
    assert same(model, before)


def test_missing_and_unexpected_tensors_are_named_and_nothing_is_loaded(checkpoint):
    tensors = {**checkpoint[1], "layers.7.weight": zeros(1)}
    del tensors["layers.0.weight_scale_inv"]
    model, before = untouched()
    with pytest.raises(
        KeyError, match=r"missing: layers\.0\.weight_scale_inv; unexpected: layers\.7\.weight"
    ):
        load_fp8_block_(model, tensors)
    assert same(model, before)


def test_scales_in_16_bits_are_widened(checkpoint):
    """As Qwen3-FP8 checkpoints have them."""
    scale = torch.full((1, 1), 0.0123, dtype=torch.bfloat16)
    model = load_fp8_block_(untouched()[0], {**checkpoint[1], "layers.0.weight_scale_inv": scale})
    assert model.layers[0].weight_scale_inv.dtype is torch.float32
    assert torch.equal(model.layers[0].weight_scale_inv, scale.float())


def test_not_strict_loads_what_there_is(checkpoint):
    tensors = {
        name: tensor for name, tensor in checkpoint[1].items() if name.startswith("layers.0")
    }
    model, before = untouched()
    load_fp8_block_(model, {**tensors, "rotary.inv_freq": torch.zeros(3)}, strict=False)
    assert same(model, {**before, **tensors})


def test_a_loaded_model_is_fused(checkpoint):
    model = load_fp8_block_(
        quantize_(nn.Sequential(nn.Linear(128, 128, dtype=torch.bfloat16))), _one_linear()
    )
    result = fuse_all(model.eval(), random(3, 128), only=[fusion.name for fusion in everything()])
    assert result.report.matches == {"block_scaled_linear": 1, "group_quant": 1}
    assert result.report.sites[0].module.startswith("0")


def _one_linear() -> dict[str, torch.Tensor]:
    codes, scale = quantize_weight(random(128, 128, seed=5))
    return {"0.weight": codes, "0.weight_scale_inv": scale, "0.bias": random(128)}
