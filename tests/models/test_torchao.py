"""torchao's quantized linears: graphs captured on the GPU that it takes to build them, and live where there is one."""

from __future__ import annotations

import pytest
import torch

import fusion_passes
from custom_ops.library import ops
from fusion_passes import manager, settings
from tests.captures import capture, graphs

# one decoder layer: q/k/v and gate/up share one quantization each; o_proj reads attention, which nothing fuses with
SHARED = {"shared_group_quant": 3}
LAST = {"add_rms_norm": 1}  # the norm after the layer, which is quantized by nobody
EXPECTED = {
    "torchao_float8_per_row": {
        "rms_norm_token_quant": 1,
        "add_rms_norm_token_quant": 1,
        "silu_mul_token_quant": 1,
        "token_quant": 1,
    },
    "torchao_float8_per_tensor": {
        "rms_norm_tensor_quant": 1,
        "add_rms_norm_tensor_quant": 1,
        "silu_mul_tensor_quant": 1,
        "tensor_quant": 1,
    },
    "torchao_float8_per_block": {
        "rms_norm_group_quant": 1,
        "add_rms_norm_group_quant": 1,
        "silu_mul_group_quant": 1,
        "group_quant": 1,
        "torchao_blockwise_linear": 7,
    },
}
PRODUCERS = ("", "rms_norm_", "add_rms_norm_", "silu_mul_")
EXPECTED["torchao_int8"] = EXPECTED["torchao_float8_per_row"] | {"scaled_int_mm": 7}
EXPECTED["torchao_float8_per_row"]["rowwise_scaled_mm"] = 7
# both sums are made by the products before them: the norm between has one tensor to read
del EXPECTED["torchao_float8_per_tensor"]["add_rms_norm_tensor_quant"]
EXPECTED["torchao_float8_per_tensor"] |= {"rms_norm_tensor_quant": 2, "scaled_mm_add": 2}
PER_TENSOR_AT_ONE_TOKEN = {
    "rms_norm_token_quant": 2,
    "silu_mul_token_quant": 1,
    "token_quant": 1,
    "scaled_mm_add": 2,
}


@pytest.fixture
def everything() -> object:
    with settings.patch(fusions="all", allow_reference=True):
        yield


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_captured_layer_is_fused(name: str, everything: object) -> None:
    graph = graphs.load(name)
    report = manager.run(graph, settings.current())
    last = {"rms_norm": 1} if "scaled_mm_add" in EXPECTED[name] else LAST
    assert report.matches == EXPECTED[name] | SHARED | last
    assert report.near_misses == []
    assert not any("float8" in str(node.args) for node in graph.nodes), "a cast to float8 is left"


def test_the_rounding_of_the_scale_is_that_of_torchao(everything: object) -> None:
    """torchao rounds the scale of 16-bit values to 16 bits, and its int8 rounds every step."""
    for name, wanted in {
        "torchao_float8_per_row": {"scale_mode": "divide_input"},
        "torchao_int8": {
            "dtype": torch.int8,
            "scale_mode": "divide_input",
            "code_mode": "reciprocal_input",
            "min_scale": 1e-5,
        },
    }.items():
        graph = graphs.load(name)
        manager.run(graph, settings.current())
        overload = ops()["silu_mul_token_quant"].overload
        (node,) = [node for node in graph.nodes if node.target is overload]
        assert node.kwargs == {"min_amax": 0.0} | wanted


def test_zero_points_are_found(everything: object) -> None:
    """Captured on a CPU; on a GPU a division by 255 is a product, which is a scale_mode and not another graph."""
    graph = graphs.load("torchao_int8_asymmetric")
    report = manager.run(graph, settings.current())
    names = [f"{producer}token_quant_asymmetric" for producer in PRODUCERS]
    # the norm after the layer is quantized by nobody
    assert report.matches == dict.fromkeys(names, 1) | {"add_rms_norm": 1, "shared_group_quant": 3}
    # the product subtracts the zero points after it is rounded to 16 bits, and is left to Inductor
    assert {miss.fusion for miss in report.near_misses} == {"scaled_int_mm"}
    overloads = [ops()[name].overload for name in names]
    kwargs = [node.kwargs for node in graph.nodes if node.target in overloads]
    wanted = {"scale_mode": "divide_input", "code_mode": "reciprocal_input", "min_scale": 2.0**-23}
    assert [{k: v for k, v in given.items() if k != "weight_mode"} for given in kwargs] == [
        wanted
    ] * 4


def test_int8_of_all_codes_is_found(everything: object) -> None:
    """What torchao 0.18 makes of Int8DynamicActivationInt8WeightConfig(), captured on a CPU."""
    graph = graphs.load("torchao_int8_version_2")
    report = manager.run(graph, settings.current())
    names = [f"{producer}token_quant" for producer in PRODUCERS]
    assert report.matches == dict.fromkeys(names, 1) | LAST | SHARED
    # on a CPU with VNNI torchao multiplies uint8 by int8, which is left to Inductor
    assert {miss.fusion for miss in report.near_misses} == {"scaled_int_mm"}
    overloads = [ops()[name].overload for name in names]
    kwargs = [node.kwargs for node in graph.nodes if node.target in overloads]
    wanted = {
        "dtype": torch.int8,
        "scale_mode": "divide_full_input",
        "code_mode": "reciprocal",
        "min_amax": 0.0,
        "min_scale": 2.0**-23,
    }
    assert [{k: v for k, v in given.items() if k != "weight_mode"} for given in kwargs] == [
        wanted
    ] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 32])
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_live_layer(name: str, tokens: int) -> None:
    torchao = pytest.importorskip("torchao", reason="needs torchao")
    if (name, tokens) == ("torchao_int8", 1) and not torchao.__version__.startswith("0.17."):
        pytest.skip("needs torchao 0.17: torch._int_mm takes 17 tokens or more")
    from fusion_passes.backend import fusion_passes as backend

    model = capture.layer(capture.schemes()[name], "cuda").requires_grad_(False)
    x = torch.randn(1, tokens, 512, dtype=torch.bfloat16, device="cuda")
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, options={"fusions": "all"}, dynamic=False)
    with torch.no_grad():
        expected = model(inputs_embeds=x, use_cache=False).last_hidden_state
        actual = compiled(inputs_embeds=x, use_cache=False).last_hidden_state
    report = fusion_passes.report()
    wanted = EXPECTED[name]
    if tokens == 1 and name == "torchao_float8_per_tensor":
        wanted = PER_TENSOR_AT_ONE_TOKEN
    assert report.matches.items() >= wanted.items(), report
    chosen = {name for site in report.sites for name in site.implementations}
    assert not any(name.endswith(":reference") for name in chosen), chosen
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    assert error < 0.05, f"hidden states differ by {error:.3%}"
