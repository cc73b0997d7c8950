"""What is done to a quantized model afterwards: casts, copies, other devices, gradients."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fusion_passes.quantize import (
    SCHEMES,
    quantize_,
)
from tests.fusion_passes.helpers import random
from tests.fusion_passes.linears import Model, assert_fuses, wide

pytestmark = pytest.mark.usefixtures("references")

CASTS = {
    "half": (lambda model: model.half(), torch.float16),
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16),
    "float": (lambda model: model.float(), torch.float32),
    "to": (lambda model: model.to("cpu", torch.float16), torch.float16),
    "type": (lambda model: model.type(torch.float16), torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("scheme", ["fp8_block", "fp8_token", "int8_token"])
def test_a_cast_of_the_model_leaves_codes_and_scales(scheme, cast):
    """Cast to 16 bits they would be right in eager mode, twice as large, and fused by nothing."""
    model = quantize_(Model(), scheme)
    coded = {
        name: tensor.clone()
        for name, tensor in model.layers.state_dict().items()
        if not name.endswith("bias")
    }
    change, dtype = CASTS[cast]
    change(model)
    after = model.layers.state_dict()
    for name, tensor in coded.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name].float(), tensor.float()), name
    assert model.layers[1].bias.dtype == dtype
    assert {layer.compute_dtype for layer in model.layers} == {dtype}
    assert model(torch.arange(8)).dtype == dtype


def test_a_cast_model_still_fuses():
    assert_fuses(quantize_(wide()).half(), random(3, 128, dtype=torch.float16))


def test_a_model_moves_to_another_device_whole():
    model = quantize_(Model()).to("meta", torch.float16)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert model.layers[0].weight.dtype == torch.float8_e4m3fn
    assert model.to_empty(device="cpu").layers[0].weight.device.type == "cpu"


@pytest.mark.parametrize("how", ["deepcopy", "saved", "state_dict", "assign"])
def test_a_copy_computes_the_same_and_fuses(how):
    model, x = quantize_(wide()), random(3, 128)
    file = io.BytesIO()
    if how == "deepcopy":
        again = copy.deepcopy(model)
    elif how == "saved":
        torch.save(model, file)
        again = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    else:
        torch.save(model.state_dict(), file)
        with torch.device("meta" if how == "assign" else "cpu"):
            again = quantize_(wide())
        state = torch.load(io.BytesIO(file.getvalue()))
        again.load_state_dict(state, assign=how == "assign")
    assert torch.equal(again(x), model(x))
    assert_fuses(again, x)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_go_through_as_through_the_weights(scheme, scale):
    """For adapters that are trained on it: no rounding of gradients to 8 bits, whatever the scale of the loss."""
    plain, x = wide(), random(3, 128).requires_grad_()
    model = quantize_(copy.deepcopy(plain), scheme)
    weights = random(3, 128, seed=1).float()
    assert torch.equal(model(x), model(x.detach()))  # the forward is what it is without gradients
    (model(x).float() * weights * scale).sum().backward()
    expected = weights.to(torch.bfloat16).float()
    for linear in reversed(plain):
        expected = expected @ linear.weight.detach().float()
    error = (x.grad.float() / scale - expected).norm() / expected.norm()
    assert float(error) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_compiled_as_they_are(scheme):
    model = quantize_(wide(), scheme)
    gradients = []
    for call in (model, torch.compile(model, backend="fusion_passes")):
        x = random(3, 128).requires_grad_()
        call(x).float().pow(2).sum().backward()
        gradients.append(x.grad.float())
    eager, compiled = gradients
    assert float((compiled - eager).norm() / eager.norm()) < 0.03


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_hooks_and_mode_stay(scheme, training):
    model, seen = wide().train(training), []
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    model[1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(type(module)) or (args, kwargs), with_kwargs=True
    )
    handle = model[1].register_forward_hook(lambda module, args, out: out * 0)
    expected = model[1](model[0](random(3, 128)))
    quantize_(model, scheme)
    assert torch.equal(model(random(3, 128)), expected)
    assert not expected.any()
    handle.remove()
    assert model(random(3, 128)).any()
    assert {module.training for module in model.modules()} == {training}
    assert seen[-1] is SCHEMES[scheme]


@pytest.mark.parametrize("how", ["pruned", "weight_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_weight_that_a_hook_computes_stays_as_it_is(how):
    model = wide()
    if how == "pruned":
        prune.l1_unstructured(model[0], "weight", 0.5)
    else:
        nn.utils.weight_norm(model[0])
    expected = model[0](random(3, 128))
    quantize_(model)
    assert type(model[0]) is nn.Linear
    assert type(model[1]) is SCHEMES["fp8_block"]
    assert torch.equal(model[0](random(3, 128)), expected)
