"""Several layers with one adapter each on one activation: what each of them is alone, bit for bit."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import custom_ops
from custom_ops.lora import hopper, linear, linears
from fusion_passes.testing.strategies import relayouts
from tests.custom_ops.helpers import DEVICE, assert_same_bits, fake_mode, implementation
from tests.custom_ops.lora.cases import normal

NAME = "lora_linears_single"
WHICH = ("reference", "triton")
few = settings(max_examples=10)


@st.composite
def calls(draw) -> tuple:
    """One to four layers of any widths, some of one rank."""
    dtype = draw(st.sampled_from((torch.bfloat16, torch.float16)))
    wide = torch.float32 if draw(st.booleans()) else dtype
    seed, channels = draw(st.integers(10, 2**31)), draw(st.sampled_from((3, 16, 130)))
    x = draw(relayouts(normal(seed, (draw(st.sampled_from((1, 5, 70))), channels), dtype)))
    layers = []
    for index in range(draw(st.integers(1, 4))):
        first, rank = seed + 10 * index, draw(st.sampled_from((1, 8, 17, 80)))
        columns = draw(st.sampled_from((1, 16, 40)))
        layers.append(
            (
                draw(relayouts(normal(first + 1, (columns, channels), dtype))),
                normal(first + 2, (columns,), dtype) if draw(st.booleans()) else None,
                draw(relayouts(normal(first + 3, (rank, channels), wide))),
                draw(relayouts(normal(first + 4, (columns, rank), wide))),
                draw(st.sampled_from((1.0, 0.7, -0.3))),
            )
        )
    return x, *map(list, zip(*layers, strict=True))


@pytest.mark.parametrize("which", WHICH)
@given(call=calls())
@few
def test_each_is_what_it_is_alone(which, call):
    x, *lists = call
    together = implementation(NAME, which)(*call)
    alone = implementation("lora_linear_single", which)
    assert len(together) == len(lists[0])
    for out, *layer in zip(together, *lists, strict=True):
        assert out.is_contiguous()
        assert_same_bits(out, alone(x, *layer))


@pytest.mark.parametrize("fits", [True, False])
def test_one_shrink_for_the_adapters_of_one_rank(monkeypatch, fits):
    """And of one row pitch, which a kernel has once."""
    launched, shrink = [], linear.launch.shrink

    def counting(x, a, *rest, **named):
        launched.append(len(a))
        return shrink(x, a, *rest, **named)

    monkeypatch.setattr(linear.launch, "shrink", counting)
    _, _, a, *_ = layers = sample()[1:]
    if not fits:
        a[1] = normal(9, (8, 40), a[1].dtype)[:, :32]
    implementation(NAME, "triton")(sample()[0], *layers)
    assert sorted(launched) == ([1, 2] if fits else [1, 1, 1])


@pytest.mark.parametrize("rounded", [None, torch.bfloat16])
@pytest.mark.parametrize("splits", [1, 3])
def test_the_parts_of_a_shrink(rounded, splits):
    """What the kernels for Hopper take: sums rounded to 16 bits, without splits."""
    x, _, _, a, *_ = sample()
    tile = linear.launch.ShrinkTile(16, 16, splits, 4, 2)
    together = linears.shrink_together(x.view(6, 32), a, tile, dtype=rounded)
    for y, matrix in zip(together, a, strict=True):
        alone = linear.launch.shrink(x.view(6, 32), (matrix,), None, tile)
        if rounded:
            alone = linear.launch.round_sums(alone, rounded)[None]
        assert_same_bits(y.flatten(), alone.flatten())


def sample() -> tuple:
    x = normal(1, (2, 3, 32), torch.bfloat16)
    sizes = (16, 8), (40, 8), (8, 3)
    weights = [normal(2 + i, (n, 32), torch.bfloat16) for i, (n, _) in enumerate(sizes)]
    a = [normal(12 + i, (rank, 32), torch.bfloat16) for i, (_, rank) in enumerate(sizes)]
    b = [normal(22 + i, (n, rank), torch.bfloat16) for i, (n, rank) in enumerate(sizes)]
    return x, weights, [None, weights[1][:, 0].clone(), None], a, b, [0.5, 1.0, 2.0]


def test_opcheck():
    torch.library.opcheck(
        torch.ops.custom_ops.lora_linears_single.default,
        sample(),
        test_utils=[
            *("test_schema", "test_autograd_registration", "test_faketensor"),
            "test_aot_dispatch_dynamic",
        ],
    )


def test_no_tokens():
    x, *lists = sample()
    outs = custom_ops.lora_linears_single(x[:0], *lists)
    assert [out.shape for out in outs] == [(0, 3, 16), (0, 3, 40), (0, 3, 8)]


def changed(index: int, value: object) -> tuple:
    call = list(sample())
    call[index] = value
    return tuple(call)


x, weights, biases, a, b, scalings = sample()
BAD = {
    "no layer": ((x, [], [], [], [], []), "weights is empty; accepted: one or more layers"),
    "biases": (changed(2, biases[:2]), "biases has 2 layers; accepted: 3, as weights"),
    "scalings": (changed(5, scalings[:1]), "scalings has 1 layers; accepted: 3, as weights"),
    "weight": (changed(1, [weights[0][:, :8], *weights[1:]]), r"weight.shape is \(16, 8\)"),
    "rank": (changed(3, [a[0][:4], *a[1:]]), r"b.shape is \(16, 8\); accepted: \[16, 4\]"),
    "dtypes": (
        changed(3, [a[0], a[1].float(), a[2]])[:4] + ([b[0], b[1].float(), b[2]], scalings),
        r"a\[1\].dtype is torch.float32; accepted: torch.bfloat16",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_argument_and_are_the_same_in_fake_and_kernel(case):
    args, message = BAD[case]
    with pytest.raises(ValueError, match=message) as real:
        custom_ops.lora_linears_single(*args)
    assert str(real.value).startswith(f"{NAME}: ")
    with fake_mode() as fake, pytest.raises(ValueError, match=re.escape(str(real.value))):
        custom_ops.lora_linears_single(*fake(args))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)
@pytest.mark.parametrize("tokens", [1, 40, 300, 1100, 4200])
@pytest.mark.parametrize("wide", [False, True])
def test_on_hopper(tokens, wide):
    """The chosen implementation, its Triton twin, and one layer after the other, all in a CUDA graph."""
    dtype = torch.float32 if wide else torch.bfloat16
    sizes = (512, 16), (256, 16), (256, 8)
    call = (
        normal(1, (tokens, 1024), torch.bfloat16),
        [normal(2 + i, (n, 1024), torch.bfloat16) / 32 for i, (n, _) in enumerate(sizes)],
        [None] * 3,
        [normal(12 + i, (rank, 1024), dtype) / 32 for i, (_, rank) in enumerate(sizes)],
        [normal(22 + i, (n, rank), dtype) / 4 for i, (n, rank) in enumerate(sizes)],
        [0.5, 1.0, 2.0],
    )
    ways = [custom_ops.lora_linears_single, implementation(NAME, "triton")]
    if not hopper.unsupported_together(*call):
        ways.append(hopper.load_together())
    expected = [
        custom_ops.lora_linear_single(call[0], *layer) for layer in zip(*call[1:], strict=True)
    ]
    for way in ways:
        way(*call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = way(*call)
        for out in outs:
            out.zero_()
        graph.replay()
        for out, other in zip(outs, expected, strict=True):
            step = torch.finfo(out.dtype).eps
            torch.testing.assert_close(out, other, rtol=2 * step, atol=4 * step)


def test_where_it_runs():
    names = [each.name for each in custom_ops.ops()[NAME].implementations]
    assert names == ["cuda", "triton", "reference"]
    if DEVICE == "cpu":
        assert hopper.unavailable(torch.device("cpu")) == "needs a CUDA tensor, this one is on cpu"
