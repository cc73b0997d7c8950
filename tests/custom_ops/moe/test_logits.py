"""The float32 logits of routers: as near to float64 as eager's, whatever the sizes and strides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import linear

import custom_ops
from tests.custom_ops.helpers import DEVICE, assert_same_bits

triton_logits = pytest.importorskip("custom_ops.moe.triton_logits", reason="needs triton")

DTYPES = (torch.bfloat16, torch.float16)


def drawn(tokens: int, experts: int, hidden: int, dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator) + 0.1
    weight = torch.randn(experts, hidden, generator=generator) * hidden**-0.5
    return x.to(DEVICE, dtype), weight.to(DEVICE, dtype)


def error(logits: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    """The norm of what float64 says otherwise, over that of a sum of magnitudes: what rounding is relative to."""
    truth = linear(x.double(), weight.double())
    most = linear(x.double().abs(), weight.double().abs())
    return float((logits.double() - truth).norm() / most.norm())


@given(
    st.sampled_from((1, 2, 7, 33, 70)),
    st.sampled_from((1, 3, 8, 20, 129)),
    st.sampled_from((1, 8, 40, 200, 512)),
    st.sampled_from(DTYPES),
    st.sampled_from(sorted(set(triton_logits.TILES.values()))),
    st.integers(0, 2**20),
)
def test_any_tile_is_right(tokens, experts, hidden, dtype, tile, seed):
    x, weight = drawn(tokens, experts, hidden, dtype, seed)
    logits = triton_logits.router_logits(x, weight, tile)
    assert logits.dtype == torch.float32
    assert logits.shape == (tokens, experts)
    assert error(logits, x, weight) <= 1e-7


@given(st.sampled_from((0, 1, 5)), st.sampled_from(DTYPES), st.booleans(), st.booleans())
def test_any_strides(tokens, dtype, sliced, transposed):
    x, weight = drawn(tokens, 12, 48, dtype)
    expected = custom_ops.router_logits(x, weight)
    wide = torch.cat((x, x), 1)[:, :48] if sliced else x
    kept = weight.t().contiguous().t() if transposed else weight
    assert_same_bits(custom_ops.router_logits(wide, kept), expected)
    assert_same_bits(custom_ops.router_logits(x.view(1, tokens, 48), weight)[0], expected)


def test_nan_and_infinity_stay_with_their_token():
    x, weight = drawn(3, 8, 64, torch.bfloat16)
    clean = custom_ops.router_logits(x, weight)
    x[1, 5], x[1, 6] = float("nan"), float("inf")
    logits = custom_ops.router_logits(x, weight)
    assert logits[1].isnan().all()
    assert_same_bits(logits[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("tile", sorted(set(triton_logits.TILES.values())), ids=str)
def test_a_token_has_the_same_bits_among_others(tile):
    """Of one tile: sums of a row do not depend on the others."""
    x, weight = drawn(16, 24, 200, torch.bfloat16)
    every = triton_logits.router_logits(x, weight, tile)
    for count in (1, 5):
        assert_same_bits(triton_logits.router_logits(x[:count], weight, tile), every[:count])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x, w: (x.float(), w), "x.dtype is torch.float32; accepted"),
        (lambda x, w: (x, w.half()), "weight.dtype is torch.float16; accepted: torch.bfloat16"),
        (lambda x, w: (x, w[:, :8]), r"weight.shape is \(4, 8\)"),
        (lambda x, w: (x, w[0]), "weight has 1 dimensions; accepted: 2"),
    ],
)
def test_errors_name_the_argument(change, match):
    x, weight = drawn(2, 4, 16, torch.bfloat16)
    with pytest.raises(ValueError, match=f"router_logits: {match}"):
        custom_ops.router_logits(*change(x, weight))


def test_opcheck():
    torch.library.opcheck(
        torch.ops.custom_ops.router_logits.default, drawn(3, 4, 16, torch.bfloat16)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 16, 64, 512, 4096])
@pytest.mark.parametrize(
    ("experts", "hidden"), [(256, 7168), (160, 5120), (128, 4096), (384, 7168), (64, 2048)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_further_from_float64_than_eager(dtype, experts, hidden, tokens):
    """Of a single token too, where eager adds up channels in more parts than of many, and is up to 3 times as near."""
    x, weight = drawn(tokens, experts, hidden, dtype)
    eager = linear(x.float(), weight.float())
    assert error(custom_ops.router_logits(x, weight), x, weight) <= error(eager, x, weight)


@pytest.mark.gpu
def test_captured_without_synchronization():
    x, weight = drawn(7, 256, 7168, torch.bfloat16)
    expected = custom_ops.router_logits(x, weight)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            logits = custom_ops.router_logits(x, weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(logits, expected)
