"""`fused_moe_batched`: each row in use is what `fused_moe` makes of it with a weight of one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import custom_ops
from custom_ops.moe import batched
from tests.custom_ops.helpers import DEVICE, assert_same_bits
from tests.custom_ops.moe.problems import ACCEPTED, Shape, error, shapes


def call_of(shape: Shape, rows: int, device: str = DEVICE) -> tuple[tuple, dict]:
    """A batch of that many rows for each expert of a mixture, some of them in use."""
    (_, gate_up, down, *_), kwargs = shape.call(device)
    kwargs.pop("expert_map", None)
    generator = torch.Generator().manual_seed(shape.seed)
    x = torch.randn(shape.experts, rows, shape.hidden, generator=generator).to(device, shape.dtype)
    counts = torch.randint(0, rows + 1, (shape.experts,), generator=generator)
    return (x, counts.int().to(device), gate_up, down), kwargs


def by_fused_moe(args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The rows in use of each expert."""
    x, counts, gate_up, down = args
    found = []
    for expert, count in enumerate(counts.tolist()):
        tokens = x[expert, :count]
        ids = torch.full((count, 1), expert, device=x.device)
        ones = torch.ones(count, 1, device=x.device)
        reference = custom_ops.ops()["fused_moe"].reference
        found.append(reference(tokens, gate_up, down, ones, ids, **kwargs))
    return found


@settings(max_examples=20)
@given(
    shapes(tokens=1, top_k=1, experts=[1, 3], hidden=[128, 136], intermediate=[128, 24]),
    st.sampled_from([1, 2, 7]),
)
def test_rows_are_those_of_fused_moe(shape, rows):
    args, kwargs = call_of(shape, rows)
    out = custom_ops.fused_moe_batched(*args, **kwargs)
    assert out.shape == args[0].shape
    assert out.dtype == shape.dtype
    assert out.is_contiguous()
    for expert, wanted in enumerate(by_fused_moe(args, kwargs)):
        mine = out[expert, : len(wanted)]
        if len(wanted):
            assert error(mine, wanted.double()) <= ACCEPTED[shape.dtype, shape.weights]


@settings(max_examples=10)
@given(shapes(weights="fp8_block", tokens=1, top_k=1, experts=[1, 3], hidden=[128, 256]))
def test_codes_give_the_bits_of_quantizing_inside(shape):
    args, kwargs = call_of(shape, 5)
    codes, scale = custom_ops.group_quant(args[0], 128)
    transposed = scale.transpose(1, 2).contiguous().transpose(1, 2)
    wanted = custom_ops.fused_moe_batched(*args, **kwargs)
    for given_scale in (scale, transposed):
        out = custom_ops.fused_moe_batched(
            codes, *args[1:], hidden_scale=given_scale, out_dtype=shape.dtype, **kwargs
        )
        assert_same_bits(out, wanted)


def test_what_is_not_in_use_does_not_matter():
    args, kwargs = call_of(Shape(1, 1, 3, 128, 128), 8)
    x, counts = args[:2]
    for expert, count in enumerate(counts.tolist()):
        x[expert, count:] = float("nan")
    out = custom_ops.fused_moe_batched(*args, **kwargs)
    for expert, count in enumerate(counts.tolist()):
        assert out[expert, :count].isfinite().all()


def test_opcheck():
    args, kwargs = call_of(Shape(1, 1, 3, 128, 128, biased=True), 8)
    torch.library.opcheck(torch.ops.custom_ops.fused_moe_batched.default, args, kwargs)


def test_no_experts_and_no_rows():
    for shape, rows in ((Shape(1, 1, 3, 128, 128), 0), (Shape(1, 1, 1, 128, 128), 1)):
        args, kwargs = call_of(shape, rows)
        assert custom_ops.fused_moe_batched(*args, **kwargs).shape == args[0].shape


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_states", torch.ones(3, 128), "hidden_states has 2 dimensions; accepted: 3"),
        ("hidden_states", torch.ones(2, 8, 128).bfloat16(), r"shape is \(2, 8, 128\); accepted: the 3 e"),
        ("hidden_states", torch.ones(3, 8, 128), "hidden_states.dtype is torch.float32; accepted"),
        ("counts", torch.ones(3), "counts.dtype is torch.float32; accepted: torch.int32"),
        ("counts", torch.ones(2).int(), r"counts.shape is \(2,\); accepted: \(3,\)"),
        ("down", torch.ones(3, 128, 64).bfloat16(), r"down.shape is \(3, 128, 64\); accepted"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(name, value, message):
    args, kwargs = call_of(Shape(1, 1, 3, 128, 128), 8)
    names = ("hidden_states", "counts", "gate_up", "down")
    given = dict(zip(names, args, strict=True)) | {name: value.to(args[0].device)}
    with pytest.raises(ValueError, match=message):
        custom_ops.fused_moe_batched(*given.values(), **kwargs)


def test_a_number_of_rows_that_is_no_whole_tile_is_not_for_deep_gemm():
    args, kwargs = call_of(Shape(1, 1, 3, 128, 128), 8)
    problem = custom_ops.ops()["fused_moe_batched"].defaults | kwargs
    assert "a multiple of 256 rows for each expert, here are 8" in str(
        batched._unsupported(*args, **problem)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["16_bit", "fp8_block"])
@pytest.mark.parametrize("biased", [False, True])
def test_deep_gemm_equals_the_reference(weights, biased):
    shape = Shape(1, 1, 4, 512, 256, weights=weights, biased=biased)
    args, kwargs = call_of(shape, 256, "cuda")
    choice = custom_ops.explain("fused_moe_batched", *args, **kwargs)
    if choice.implementation.name != "deep_gemm":
        pytest.skip(f"needs DeepGEMM on Hopper: {choice}")
    for expected in (0, 16):
        out = custom_ops.fused_moe_batched(*args, expected=expected, **kwargs)
        for expert, wanted in enumerate(by_fused_moe(args, kwargs)):
            if len(wanted):
                mine = out[expert, : len(wanted)]
                assert error(mine, wanted.double()) <= ACCEPTED[torch.bfloat16, weights]


@pytest.mark.gpu
def test_in_a_cuda_graph():
    """Counts change under the graph, and the results follow."""
    args, kwargs = call_of(Shape(1, 1, 4, 512, 256), 256, "cuda")
    counts = args[1]
    custom_ops.fused_moe_batched(*args, **kwargs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = custom_ops.fused_moe_batched(*args, **kwargs)
    counts.copy_(torch.tensor([256, 0, 3, 17], dtype=torch.int32))
    graph.replay()
    for expert, wanted in enumerate(by_fused_moe(args, kwargs)):
        if len(wanted):
            mine = out[expert, : len(wanted)]
            assert error(mine, wanted.double()) <= ACCEPTED[torch.bfloat16, "16_bit"]
