"""Shared experts beside routed ones: the bits of one after the other, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import linear

import custom_ops
from custom_ops.moe import reference
from custom_ops.moe.beside import beside
from tests.custom_ops.helpers import DEVICE, assert_same_bits, implementation
from tests.custom_ops.moe import shared_draws
from tests.custom_ops.moe.problems import Shape, shapes

NAMES = ("gate", "up", "down")


def weights(shape: Shape, width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(shape.seed + 1)
    sizes = ((width, shape.hidden), (width, shape.hidden), (shape.hidden, width))
    return [
        (torch.randn(size, generator=generator) * size[1] ** -0.5).to(DEVICE, shape.dtype)
        for size in sizes
    ]


def alone(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    between = torch.nn.functional.silu(linear(x, gate)) * linear(x, up)
    return linear(between, down)


def assert_alike(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits on a CPU; on a GPU, silu of ours and of eager may differ by one rounding."""
    if actual.device.type == "cpu":
        assert_same_bits(actual, expected)
        return
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).norm()
    assert float(difference) <= 1e-2 * float(expected.double().norm())


@given(
    shapes(tokens=[0, 1, 2, 7], experts=[1, 3, 8], hidden=[8, 40, 128], intermediate=[8, 136]),
    st.sampled_from((8, 24)),
)
def test_each_result_is_that_of_its_experts_alone(shape, width):
    args, kwargs = shape.call()
    shared = weights(shape, width)
    routed, ours = custom_ops.fused_moe_and_shared(*args, *shared, **kwargs)
    # without a GPU both are the reference: Triton's interpreter adds up in another order, now and then a rounding
    routed_alone = (
        custom_ops.fused_moe if routed.is_cuda else implementation("fused_moe", "reference")
    )
    assert_same_bits(routed, routed_alone(*args, **kwargs))
    assert_alike(ours, alone(args[0], *shared))


@pytest.mark.parametrize("which", range(3))
def test_a_shared_weight_of_another_dtype_or_shape_is_refused(which):
    shape = Shape(2, 2, 4, 40, 8)
    args, kwargs = shape.call()
    for name, change in (
        ("dtype is torch.float32", lambda w: w.float()),
        ("shape is", lambda w: torch.cat((w, w), 1)),
    ):
        shared = weights(shape, 24)
        shared[which] = change(shared[which])
        match = f"fused_moe_and_shared: shared_{NAMES[which]}.{name}"
        with pytest.raises(ValueError, match=match.replace(".", r"\.")):
            custom_ops.fused_moe_and_shared(*args, *shared, **kwargs)


def test_where_there_are_no_streams_one_comes_after_the_other():
    said = []
    assert beside(lambda: said.append(1), lambda: said.append(2), torch.device("cpu")) == (
        None,
        None,
    )
    assert said == [1, 2]


def test_the_reference_is_both():
    shape = Shape(5, 2, 4, 40, 24)
    args, kwargs = shape.call("cpu")
    shared = [weight.cpu() for weight in weights(shape, 16)]
    routed, ours = custom_ops.fused_moe_and_shared(*args, *shared, **kwargs)
    assert_same_bits(routed, reference.fused_moe(*args, **kwargs))
    assert_same_bits(ours, alone(args[0], *shared))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_captured_it_has_the_bits_of_a_call(tokens):
    """Again and again: a race between the streams would show now and then."""
    shape = Shape(tokens, 4, 16, 1024, 512)
    args, kwargs = shape.call("cuda")
    shared = weights(shape, 2048)
    for _ in range(2):
        expected = custom_ops.fused_moe_and_shared(*args, *shared, **kwargs)
    assert_same_bits(expected[0], custom_ops.fused_moe(*args, **kwargs))
    assert_alike(expected[1], alone(args[0], *shared))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            results = [custom_ops.fused_moe_and_shared(*args, *shared, **kwargs) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(30):
        graph.replay()
        torch.cuda.synchronize()
        for found in results:
            for ours, wanted in zip(found, expected, strict=True):
                assert_same_bits(ours, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [1, 2])
def test_thousands_of_draws_in_a_row(seed):
    drawn, wrong, worst = shared_draws.run(seed, 2000)
    print(f"{drawn} drawn, {wrong} wrong, {worst:.1e}")
    assert drawn > shared_draws.BETWEEN
    assert wrong == 0
    assert worst <= 1e-2


@pytest.mark.gpu
def test_several_processes_on_one_gpu():
    """Their kernels take turns on it, so that streams are cut at other places."""
    command = [sys.executable, "-m", "tests.custom_ops.moe.shared_draws"]
    processes = [
        subprocess.Popen([*command, str(seed), "1000"], stdout=subprocess.PIPE, text=True)
        for seed in range(3)
    ]
    said = [process.communicate(timeout=90)[0].strip() for process in processes]
    print(said)
    assert [process.returncode for process in processes] == [0, 0, 0], said


@pytest.mark.gpu
def test_on_a_gpu_it_runs_on_two_streams():
    shape = Shape(4, 2, 4, 128, 128)
    args, kwargs = shape.call("cuda")
    choice = custom_ops.explain("fused_moe_and_shared", *args, *weights(shape, 64), **kwargs)
    assert choice.implementation is not None
    assert choice.implementation.name == "streams"
