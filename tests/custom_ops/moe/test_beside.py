"""Work on a second stream: the same results, in a CUDA graph too, and memory that nobody else writes meanwhile."""

from __future__ import annotations

import pytest
import torch

from bench import moe_shared
from custom_ops.moe.beside import beside
from tests.custom_ops.helpers import DEVICE, assert_same_bits

BLOCK = moe_shared.Block("small", 4, 2, 128, 128, 256, routed=8)


def test_both_results_in_their_order():
    x = torch.arange(5, device=DEVICE)
    ours, theirs = beside(lambda: x + 1, lambda: x * 2, x.device)
    assert ours.tolist() == [1, 2, 3, 4, 5]
    assert theirs.tolist() == [0, 2, 4, 6, 8]


def test_an_error_of_either_is_seen():
    for first, second in ((int, lambda: int("no")), (lambda: int("no"), int)):
        with pytest.raises(ValueError, match="invalid literal"):
            beside(first, second, torch.device(DEVICE))


@pytest.mark.parametrize("tokens", [1, 9])
def test_shared_experts_beside_routed_ones(tokens):
    device = torch.device(DEVICE)
    with torch.no_grad():
        weights = moe_shared.Weights(BLOCK, device)
        x = torch.randn(tokens, BLOCK.hidden, device=device).bfloat16()
        assert_same_bits(
            moe_shared.side_by_side(weights, x), moe_shared.one_after_the_other(weights, x)
        )


@pytest.mark.gpu
def test_captured_and_replayed_with_other_tokens():
    device = torch.device("cuda")
    with torch.no_grad():
        weights = moe_shared.Weights(BLOCK, device)
        x = torch.randn(9, BLOCK.hidden, device=device).bfloat16()
        for _ in range(3):
            moe_shared.side_by_side(weights, x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = moe_shared.side_by_side(weights, x)
        for _ in range(20):
            x.normal_()
            graph.replay()
            expected = moe_shared.one_after_the_other(weights, x)
            assert float((out.double() - expected.double()).norm()) <= 1e-2 * float(
                expected.double().norm()
            )
