"""Experts with adapters, against a loop over tokens and a dict of adapters in float64."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import custom_ops
from custom_ops.moe.activation import Activation
from tests.custom_ops.helpers import DEVICE, fake_mode, implementation
from tests.custom_ops.lora.cases import STALE, normal

NAME = "fused_moe_lora"
WHICH = ("reference", "triton")
few = settings(max_examples=8)


def call(
    seed: int,
    tokens: int = 7,
    top_k: int = 2,
    experts: int = 3,
    hidden: int = 16,
    width: int = 24,
    ranks: tuple[int, ...] = (4, 8, 0),
    most: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    activation: str = "silu_mul",
    bias: bool = False,
    lost: bool = False,
) -> tuple[tuple, dict]:
    """Arguments of the op. lost: some pairs name no expert that there is."""
    rows = width if activation == "relu2" else 2 * width
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1 if lost else 0, experts + lost, (tokens, top_k), generator=generator)
    slots = torch.randint(-1, len(ranks), (tokens + 3,), generator=generator)
    shapes = {"gate_up": (rows, hidden), "down": (hidden, width)}
    weights, adapters, biases = [], [], {}
    for at, (name, (n, k)) in enumerate(shapes.items()):
        weights.append(normal(seed + 1 + at, (experts, n, k), dtype) / k**0.5)
        a = normal(seed + 11 + at, (len(ranks), experts, most, k), dtype) / k**0.5
        b = normal(seed + 21 + at, (len(ranks), experts, n, most), dtype) / most**0.5
        for slot, rank in enumerate(ranks):
            after = -(-rank // 16) * 16
            a[slot, :, rank:after], b[slot, :, :, rank:after] = 0, 0
            a[slot, :, after:] = b[slot, :, :, after:] = min(STALE, torch.finfo(dtype).max)
        adapters += [a, b]
        if bias:
            biases[f"{name}_bias"] = normal(seed + 31 + at, (experts, n), dtype)
    args = (
        normal(seed, (tokens, hidden), dtype),
        *weights,
        normal(seed + 41, (tokens, top_k), torch.float32).softmax(-1),
        ids.to(DEVICE),
        *adapters,
        normal(seed + 51, (len(ranks),), torch.float32),
        torch.tensor(ranks, dtype=torch.int32, device=DEVICE),
        slots.to(torch.int32).to(DEVICE),
    )
    return args, {"activation": activation, **biases}


def exact(args: tuple, kwargs: dict) -> Tensor:
    """Token by token in float64; what is between the products goes through the activation's own roundings."""
    x, gate_up, down, weights, ids, up_a, up_b, down_a, down_b, scaling, ranks, slots = args
    act = Activation(kwargs["activation"])
    adapters = {slot: (float(scaling[slot]), int(rank)) for slot, rank in enumerate(ranks.tolist())}

    def linear(row: Tensor, expert: int, slot: int, weight, bias, a, b) -> Tensor:
        out = weight[expert].double() @ row.double()
        if bias is not None:
            out = out + bias[expert].double()
        if slot >= 0:
            scale, rank = adapters[slot]
            y = a[slot, expert, :rank].double() @ row.double()
            out = out + b[slot, expert, :, :rank].double() @ y * scale
        return out

    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token, row in enumerate(x):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            if not 0 <= expert < gate_up.shape[0]:
                continue
            slot = int(slots[token])
            first = linear(row, expert, slot, gate_up, kwargs.get("gate_up_bias"), up_a, up_b)
            between = act.reference(first.to(x.dtype)[None])[0]
            second = linear(between, expert, slot, down, kwargs.get("down_bias"), down_a, down_b)
            out[token] += second * weight.double()
    return out


def assert_close(out: Tensor, args: tuple, kwargs: dict) -> None:
    expected = exact(args, kwargs)
    eps = torch.finfo(out.dtype).eps
    assert torch.isfinite(out).all()
    worst = float((out.double() - expected).abs().max()) if out.numel() else 0.0
    assert worst <= 12 * eps * (1 + float(expected.abs().max()) if out.numel() else 1), worst


@st.composite
def problems(draw) -> tuple[tuple, dict]:
    most = draw(st.sampled_from((1, 8, 17, 40)))
    return call(
        draw(st.integers(100, 2**30)),
        draw(st.sampled_from((1, 5, 40))),
        draw(st.sampled_from((1, 3))),
        draw(st.sampled_from((1, 4))),
        draw(st.sampled_from((8, 33))),
        draw(st.sampled_from((8, 20))),
        tuple(draw(st.lists(st.integers(0, most), min_size=1, max_size=4))),
        most,
        draw(st.sampled_from((torch.bfloat16, torch.float16))),
        draw(st.sampled_from(("silu_mul", "relu2", "gelu_tanh_mul"))),
        draw(st.booleans()),
        draw(st.booleans()),
    )


@pytest.mark.parametrize("which", WHICH)
@given(problem=problems())
@few
def test_against_float64(which, problem):
    args, kwargs = problem
    assert_close(implementation(NAME, which)(*args, **kwargs), args, kwargs)


@pytest.mark.parametrize("which", WHICH)
def test_without_adapters_it_is_fused_moe(which):
    args, kwargs = call(7, bias=True)
    args[-1].fill_(-1)
    out = implementation(NAME, which)(*args, **kwargs)
    plain = implementation("fused_moe", "reference")(*args[:5], **kwargs)
    step = torch.finfo(out.dtype).eps
    torch.testing.assert_close(out, plain, rtol=2 * step, atol=2 * step)


def test_the_adapter_of_a_token_touches_no_other():
    """Exchange an adapter: only the tokens of its slot change."""
    args, kwargs = call(9, tokens=12, ranks=(8, 8, 8))
    triton = implementation(NAME, "triton")
    before = triton(*args, **kwargs)
    args[5][1] *= 2.0
    after = triton(*args, **kwargs)
    here = args[-1][:12] == 1
    assert here.any()
    assert not here.all()
    assert torch.equal(before[~here], after[~here])
    assert (before[here] != after[here]).any(1).all()


def test_opcheck():
    args, kwargs = call(3, bias=True)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(
        torch.ops.custom_ops.fused_moe_lora.default, args, kwargs, test_utils=checks
    )


def test_no_tokens():
    args, kwargs = call(3)
    cut = (args[0][:0], *args[1:3], args[3][:0], args[4][:0], *args[5:])
    assert custom_ops.fused_moe_lora(*cut, **kwargs).shape == (0, 16)


def changed(at: int, value: Tensor) -> tuple:
    args = list(call(3)[0])
    args[at] = value
    return tuple(args)


good = call(3)[0]
BAD = {
    "dtype": (changed(5, good[5].float()), "gate_up_a.dtype is torch.float32; accepted"),
    "a": (changed(5, good[5][:, :2]), r"gate_up_a.shape is \(3, 2, 8, 16\); accepted: \(3, 3, 8"),
    "b": (changed(6, good[6][..., :4]), r"gate_up_b.shape is \(3, 3, 48, 4\); accepted"),
    "scaling": (changed(9, good[9][:2]), r"scaling.shape is \(2,\); accepted: \(3,\)"),
    "ranks": (changed(10, good[10].long()), "ranks.dtype is torch.int64; accepted: torch.int32"),
    "tokens": (changed(11, good[11][:4]), "token_slots has 4 tokens; accepted: 7 or more"),
    "strides": (
        changed(7, good[7].transpose(2, 3).contiguous().transpose(2, 3)),
        "down_a has strides .*; accepted: contiguous",
    ),
    "rank": (
        changed(5, torch.zeros(3, 3, 257, 16, dtype=good[0].dtype, device=DEVICE)),
        "the rank of gate_up_a is 257; accepted: 1 to 256",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_argument_and_are_the_same_in_fake_and_kernel(case):
    args, message = BAD[case]
    with pytest.raises(ValueError, match=message) as real:
        custom_ops.fused_moe_lora(*args)
    assert str(real.value).startswith(f"{NAME}: ")
    with fake_mode() as fake, pytest.raises(ValueError, match=re.escape(str(real.value))):
        custom_ops.fused_moe_lora(*fake(args))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("experts", [8, 200])
def test_a_captured_graph_serves_other_adapters(experts):
    """No host synchronization; and with 200 experts and 3 slots more runs than the CUDA index of pairs has room for."""
    args, kwargs = call(5, 50, 4, experts, 128, 64, (16, 3, 16), 16)
    triton = implementation(NAME, "triton")
    triton(*args, **kwargs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton(*args, **kwargs)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        args[-1].copy_(torch.randint(-1, 3, args[-1].shape, generator=generator))
        args[4].copy_(torch.randint(0, experts, args[4].shape, generator=generator))
        graph.replay()
        assert_close(out, args, kwargs)
