"""quantize_ and its checkpoints: the values against float64, what is replaced, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fusion_passes
from fusion_passes.quantize import (
    SCHEMES,
    Fp8BlockLinear,
    Fp8TokenLinear,
    Int8TokenLinear,
    dequantize_weight,
    quantize_,
    quantize_weight,
)
from tests.fusion_passes.helpers import FP8, fuse_all, random
from tests.fusion_passes.linears import Model

pytestmark = pytest.mark.usefixtures("references")

features = st.sampled_from((1, 64, 100, 128, 129, 200, 256, 300))
dtypes = st.sampled_from((torch.bfloat16, torch.float16))


def exact_scale(block: torch.Tensor, least: float = 1e-10) -> float:
    """The scale of a block in float32 steps: the largest magnitude over 448, rounded once."""
    amax = max(float(block.double().abs().max()), float(torch.tensor(least)))
    return float(torch.tensor(amax / 448.0, dtype=torch.float64).float())


@given(
    rows=features,
    columns=features,
    dtype=dtypes,
    seed=st.integers(0, 9),
    magnitude=st.sampled_from((1.0, 1e-4, 30.0)),
)
def test_each_block_of_a_weight_has_its_scale(rows, columns, dtype, seed, magnitude):
    weight = (random(rows, columns, dtype=torch.float32, seed=seed) * magnitude).to(dtype)
    codes, scale = quantize_weight(weight)
    assert (codes.shape, codes.dtype, scale.dtype) == (weight.shape, FP8, torch.float32)
    assert scale.shape == (math.ceil(rows / 128), math.ceil(columns / 128))
    assert codes.is_contiguous()
    assert scale.is_contiguous()
    for i, j in ((0, 0), (scale.shape[0] - 1, scale.shape[1] - 1)):
        here = slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128)
        expected = exact_scale(weight[here])
        assert float(scale[i, j]) == pytest.approx(expected, rel=2**-23)
        # the largest magnitude is 448, the largest code; half a step there is 16
        error = (codes[here].double() * float(scale[i, j]) - weight[here].double()).abs()
        assert float(codes[here].float().abs().max()) == 448.0
        assert bool(
            (
                error
                <= torch.maximum(
                    weight[here].double().abs() * 2**-4, torch.tensor(float(scale[i, j]) * 2**-10)
                )
            ).all()
        )


def test_a_weight_of_zeros():
    codes, scale = quantize_weight(torch.zeros(128, 256, dtype=torch.bfloat16))
    assert torch.equal(codes.float(), torch.zeros(128, 256))
    assert torch.equal(scale, torch.full((1, 2), 1e-10) / 448.0)


@given(
    inputs=features,
    outputs=features,
    bias=st.booleans(),
    dtype=dtypes,
    lead=st.sampled_from(((), (1,), (3,), (2, 2), (0,))),
)
def test_the_forward_is_what_its_words_mean(inputs, outputs, bias, dtype, lead):
    """Dequantized operands multiplied in float64; eager rounds the operands once, and the result."""
    linear = nn.Linear(inputs, outputs, bias, dtype=dtype)
    linear.requires_grad_(False)
    module, x = Fp8BlockLinear.from_linear(linear), random(*lead, inputs, dtype=dtype)
    out = module(x)
    assert (out.shape, out.dtype) == ((*lead, outputs), dtype)
    blocks = (
        module.weight_scale_inv.double()
        .repeat_interleave(128, 0)[:outputs]
        .repeat_interleave(128, 1)[:, :inputs]
    )
    weight = module.weight.double() * blocks
    rows = []
    for row in x.reshape(-1, inputs).double():
        for start in range(0, inputs, 128):
            scale = exact_scale(row[start : start + 128])
            q = torch.tensor([float(v) for v in (row[start : start + 128] / scale).float()]).to(FP8)
            row[start : start + 128] = q.double() * scale
        rows.append(row)
    if not rows:
        return
    exact = torch.stack(rows) @ weight.T + (linear.bias.double() if bias else 0)
    steps = torch.finfo(dtype).eps
    bound = 3 * steps * (torch.stack(rows).abs() @ weight.T.abs()) + 2 * steps * exact.abs() + 1e-6
    flipped = 0.02 * (
        torch.stack(rows).abs() @ weight.T.abs()
    )  # a code on the edge may round either way
    assert bool(((out.reshape(-1, outputs).double() - exact).abs() <= bound + flipped).all())


@given(
    inputs=st.sampled_from((128, 256)),
    outputs=st.sampled_from((64, 128, 200)),
    bias=st.booleans(),
    dtype=dtypes,
)
def test_it_becomes_a_block_scaled_gemm(inputs, outputs, bias, dtype):
    module = Fp8BlockLinear.from_linear(nn.Linear(inputs, outputs, bias, dtype=dtype)).eval()
    assert fuse_all(module, random(5, inputs, dtype=dtype)).report.matches == {
        "block_scaled_linear": 1,
        "group_quant": 1,
    }


def test_dequantization_rounds_once():
    codes, scale = quantize_weight(random(200, 300))
    blocks = scale.double().repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    assert torch.equal(
        dequantize_weight(codes, scale, torch.float32), (codes.double() * blocks).float()
    )
    assert dequantize_weight(codes, scale, torch.bfloat16).dtype is torch.bfloat16


def kinds(model: nn.Module) -> dict[str, str]:
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if name and "Linear" in type(module).__name__
    }


def test_linears_are_replaced_in_place():
    model = Model()
    before = model(torch.arange(8)).detach()
    assert fusion_passes.quantize_(model) is model
    assert kinds(model) == {
        "layers.0": "Fp8BlockLinear",
        "layers.1": "Fp8BlockLinear",
        "head": "Fp8BlockLinear",
        "lm_head": "Linear",
    }
    assert model.layers[0].bias is None
    assert model.layers[1].bias is not None
    assert not list(model.layers.parameters())  # nothing to train is left in them
    error = (
        model(torch.arange(8)).detach().double() - before.double()
    ).norm() / before.double().norm()
    assert 0 < float(error) < 0.1
    assert "64 -> 64, float8_e4m3fn, 128 x 128 blocks" in repr(model)


def test_tied_weights_are_left_alone():
    model = quantize_(Model(tied=True))
    assert kinds(model)["head"] == "Linear"
    assert model.head.weight is model.embed.weight


def test_a_filter_has_the_last_word():
    model = quantize_(
        Model(),
        filter=lambda name, linear: name in ("layers.1", "lm_head") and linear.out_features > 0,
    )
    assert kinds(model) == {
        "layers.0": "Linear",
        "layers.1": "Fp8BlockLinear",
        "head": "Linear",
        "lm_head": "Fp8BlockLinear",
    }


def test_a_subclass_may_mean_something_else():
    class MyLinear(nn.Linear):
        pass

    model = nn.Sequential(
        MyLinear(64, 64, dtype=torch.bfloat16), nn.Linear(64, 64, dtype=torch.bfloat16)
    )
    assert kinds(quantize_(model)) == {"0": "MyLinear", "1": "Fp8BlockLinear"}


def test_a_model_without_data_yet():
    """Made on the meta device, to be filled from a checkpoint: no two of its weights are one."""
    with torch.device("meta"):
        model = Model(tied=True)
    assert kinds(quantize_(model)) == {
        "layers.0": "Fp8BlockLinear",
        "layers.1": "Fp8BlockLinear",
        "head": "Linear",
        "lm_head": "Linear",
    }
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        (
            Model,
            {"scheme": "fp8"},
            ["scheme", "'fp8'", "accepted: 'fp8_block', 'fp8_token', 'int8_token'"],
        ),
        (
            lambda: Model(dtype=torch.float32),
            {},
            ["layers.0.weight", "torch.float32", "torch.bfloat16, torch.float16"],
        ),
        (lambda: nn.Sequential(nn.ReLU()), {}, ["no torch.nn.Linear"]),
        (Model, {"filter": lambda name, linear: False}, ["no torch.nn.Linear"]),
        (lambda: nn.Linear(64, 64, dtype=torch.bfloat16), {}, ["Fp8BlockLinear.from_linear"]),
        (
            lambda: nn.Linear(64, 64, dtype=torch.bfloat16),
            {"scheme": "int8_token"},
            ["Int8TokenLinear.from_linear"],
        ),
    ],
)
def test_what_cannot_be_quantized_is_refused(make, arguments, words):
    model = make()
    with pytest.raises(ValueError, match=".*".join(map(_escaped, words))):
        quantize_(model, **arguments)
    assert not any(isinstance(module, Fp8BlockLinear) for module in model.modules())


def _escaped(text: str) -> str:
    return text.replace(".", r"\.")


# --- a scale per token and per channel -------------------------------------------------------------------------

token_linears = st.sampled_from((Fp8TokenLinear, Int8TokenLinear))


@given(
    linear=token_linears,
    rows=features,
    columns=features,
    dtype=dtypes,
    seed=st.integers(0, 9),
    magnitude=st.sampled_from((1.0, 1e-4, 30.0)),
)
def test_each_row_of_a_weight_has_its_scale(linear, rows, columns, dtype, seed, magnitude):
    weight = (random(rows, columns, dtype=torch.float32, seed=seed) * magnitude).to(dtype)
    codes, scale = linear.quantize(weight)
    end = 448.0 if linear is Fp8TokenLinear else 127.0
    assert (codes.shape, codes.dtype) == (weight.shape, linear.code_dtype)
    assert (scale.shape, scale.dtype) == ((rows, 1), torch.float32)
    amax = weight.double().abs().amax(1, keepdim=True).clamp(min=1e-10)
    assert torch.allclose(scale.double(), amax / end, rtol=2**-23, atol=0)
    assert bool((codes.double().abs().amax(1) == end).all()) or float(amax.min()) <= 1e-10
    half_step = codes.double().abs() * 2**-4 + 2**-10 if linear is Fp8TokenLinear else 0.5 + 2**-14
    assert bool(((codes.double() - weight.double() / scale.double()).abs() <= half_step).all())


@given(
    linear=token_linears,
    inputs=features,
    outputs=features,
    bias=st.booleans(),
    dtype=dtypes,
    lead=st.sampled_from(((), (1,), (3,), (2, 2), (0,))),
)
def test_the_forward_per_token_is_what_its_words_mean(linear, inputs, outputs, bias, dtype, lead):
    plain = nn.Linear(inputs, outputs, bias, dtype=dtype).requires_grad_(False)
    module, x = linear.from_linear(plain), random(*lead, inputs, dtype=dtype)
    out = module(x)
    assert (out.shape, out.dtype) == ((*lead, outputs), dtype)
    codes, scale = linear.quantize(x)
    wide = codes.double() * scale.double()
    weight = module.weight.double() * module.weight_scale.double()
    exact = wide @ weight.T + (plain.bias.double() if bias else 0)
    step, magnitude = torch.finfo(dtype).eps, wide.abs() @ weight.T.abs()
    assert bool(
        ((out.double() - exact).abs() <= 3 * step * magnitude + 2 * step * exact.abs() + 1e-6).all()
    )


@given(
    linear=token_linears,
    inputs=st.sampled_from((96, 200, 256)),
    outputs=st.sampled_from((64, 200)),
    bias=st.booleans(),
    dtype=dtypes,
)
def test_it_becomes_a_quantization_and_a_scaled_gemm(linear, inputs, outputs, bias, dtype):
    module = linear.from_linear(nn.Linear(inputs, outputs, bias, dtype=dtype)).eval()
    assert fuse_all(module, random(5, inputs, dtype=dtype)).report.matches == {
        "scaled_linear": 1,
        "token_quant": 1,
    }


@pytest.mark.parametrize(("scheme", "linear"), SCHEMES.items())
def test_a_scheme_is_one_call(scheme, linear):
    model = Model()
    before = model(torch.arange(8)).detach().double()
    quantize_(model, scheme)
    assert [type(model.layers[0]), type(model.head)] == [linear, linear]
    assert type(model.lm_head) is nn.Linear
    error = (model(torch.arange(8)).detach().double() - before).norm() / before.norm()
    assert 0 < float(error) < (0.03 if scheme == "int8_token" else 0.1)
    assert "64 -> 64, " in repr(model)
    again = quantize_(Model(), scheme)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(torch.arange(8)), model(torch.arange(8)))


@pytest.mark.parametrize("scheme", SCHEMES)
@given(width=st.integers(0, 400).filter(lambda width: width != 200), lead=st.integers(0, 2))
def test_an_x_of_another_width_is_named(scheme, width, lead):
    linear = SCHEMES[scheme](200, 64)
    x = torch.zeros(*(2,) * lead, width, dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=rf"x is \({'2, ' * lead}{width},?\); accepted: \[\.\.\., 200\]"
    ):
        linear(x)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_linear_alone_with_dynamic_true(scheme):
    """x comes straight in, its width a symbol until the linear says what it is."""
    model = nn.Sequential(SCHEMES[scheme].from_linear(nn.Linear(256, 64).bfloat16()))
    result = fuse_all(model, random(5, 256), dynamic=True)
    product = "block_scaled_linear" if scheme == "fp8_block" else "scaled_linear"
    assert result.report.matches[product] == 1, result.report
    assert [
        site for site in result.report.sites if site.sizes.get("num_tokens", "").startswith("s")
    ]
