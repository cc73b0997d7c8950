"""moe_align_block_size: a stable sort by expert in whole blocks, against loops in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import custom_ops
from custom_ops import library
from custom_ops.moe import padded_rows
from custom_ops.moe.align import CUDA_MAX_EXPERTS
from tests.custom_ops.helpers import DEVICE, assert_same_bits, implementation
from tests.custom_ops.moe.draws import expert_ids
from tests.custom_ops.schemes import kernel

NAME = "moe_align_block_size"
WHICH = ["reference", pytest.param("cuda", marks=pytest.mark.gpu)]
BLOCKS = (1, 2, 16, 64, 128, 7)


def run_of(which: str):
    return implementation(NAME, which) if which == "reference" else kernel(NAME, which)


def local(ids: Tensor, num_experts: int, expert_map: Tensor | None) -> list[int]:
    """The expert of each pair, -1 elsewhere."""
    table = list(range(num_experts)) if expert_map is None else expert_map.tolist()
    found = [table[i] if 0 <= i < len(table) else -1 for i in ids.flatten().tolist()]
    return [e if 0 <= e < num_experts else -1 for e in found]


def expected(experts: list[int], num_experts: int, block: int) -> tuple[list[int], list[int]]:
    """sorted_ids and block_experts, as far as they are in use."""
    slots: list[int] = []
    blocks: list[int] = []
    for e in range(num_experts):
        own = [pair for pair, expert in enumerate(experts) if expert == e]
        own += [len(experts)] * (-len(own) % block)
        slots += own
        blocks += [e] * (len(own) // block)
    return slots, blocks


@pytest.mark.parametrize("which", WHICH)
@given(routing=expert_ids(), block=st.sampled_from(BLOCKS))
def test_pairs_are_grouped_in_order(which, routing, block):
    ids, num_experts, expert_map = routing
    sorted_ids, block_experts, num_padded = run_of(which)(
        ids, block, num_experts, expert_map=expert_map
    )
    pairs = ids.numel()
    slots, blocks = expected(local(ids, num_experts, expert_map), num_experts, block)
    rows = padded_rows(pairs, num_experts, block)
    assert rows % block == 0
    assert len(slots) <= rows
    assert (sorted_ids.shape, block_experts.shape) == ((rows,), (rows // block,))
    assert {t.dtype for t in (sorted_ids, block_experts, num_padded)} == {torch.int32}
    assert num_padded.tolist() == [len(slots)]
    assert sorted_ids.tolist() == slots + [pairs] * (rows - len(slots))
    assert block_experts.tolist() == blocks + [-1] * (rows // block - len(blocks))


@given(
    pairs=st.integers(0, 3000),
    experts=st.integers(1, 600),
    block=st.integers(1, 300),
    data=st.data(),
)
def test_no_routing_needs_more_rows_and_one_needs_them(pairs, experts, block, data):
    rows = padded_rows(pairs, experts, block)
    counts = [0] * experts
    for _ in range(data.draw(st.integers(0, 5))):
        share = data.draw(st.integers(0, pairs - sum(counts)))
        counts[data.draw(st.integers(0, experts - 1))] += share
    counts[data.draw(st.integers(0, experts - 1))] += pairs - sum(counts)
    assert sum(-(-n // block) * block for n in counts) <= rows
    # A pair for each expert, and the rest to one: as many blocks as there can be.
    worst = [1] * min(pairs, experts) + [0] * (experts - min(pairs, experts))
    worst[0] += pairs - sum(worst)
    blocks = sum(-(-n // block) for n in worst)
    assert blocks * block <= rows
    assert rows - blocks * block < block * min(pairs, experts) + 1


@pytest.mark.parametrize("which", WHICH)
def test_example(which):
    ids = torch.tensor([[0, 2], [2, 3], [0, 9]], device=DEVICE)
    table = torch.tensor([1, 0, 0, -1], dtype=torch.int32, device=DEVICE)
    sorted_ids, block_experts, num_padded = run_of(which)(ids, 4, 2, expert_map=table)
    assert sorted_ids.tolist() == [1, 2, 6, 6, 0, 4, 6, 6, 6, 6, 6, 6]
    assert block_experts.tolist() == [0, 1, -1]
    assert num_padded.tolist() == [8]


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("experts", [1, 5, 256])
def test_no_tokens(which, experts):
    ids = torch.zeros((0, 8), dtype=torch.int64, device=DEVICE)
    sorted_ids, block_experts, num_padded = run_of(which)(ids, 16, experts)
    assert (sorted_ids.shape, block_experts.shape, num_padded.tolist()) == ((0,), (0,), [0])
    assert custom_ops.moe_align_block_size(ids, 16, experts)[2].tolist() == [0]


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [8, 128, 256, 511, CUDA_MAX_EXPERTS])
@pytest.mark.parametrize(
    "tokens",
    [1, 4, 63, 64, 65, 127, 128, 129, 1023, 1025, 4095, 4096, 8193, 16384, 65536, 200_000],
)
def test_sizes_of_the_cuda_kernels(tokens, experts):
    """Up to 512 pairs are one block's. Of more, a block has a tile of 512, from 32768 pairs on of 1024, and from 131072
    on of up to 4096; of more than 524288 several.
    """
    g = torch.Generator().manual_seed(tokens)
    cuda, reference = kernel(NAME, "cuda"), implementation(NAME, "reference")
    for spread, block in ((1, 16), (4, 128), (1, 64)):
        ids = (torch.rand(tokens, 8, generator=g) ** spread * (experts + 1)).long() - int(
            block == 64
        )
        ids = ids.to("cuda", torch.int32 if block == 16 else torch.int64)
        assert_same_bits(cuda(ids, block, experts), reference(ids, block, experts))
        table = torch.full((experts + 1,), -1, dtype=torch.int32)
        here = max(1, experts // 8)
        table[torch.randperm(experts, generator=g)[:here]] = torch.arange(here, dtype=torch.int32)
        table = table.cuda()
        want = reference(ids, block, here, expert_map=table)
        assert_same_bits(cuda(ids, block, here, expert_map=table), want)


@pytest.mark.gpu
@given(
    pairs=st.integers(0, 20_000) | st.integers(0, 1_000_000),
    top_k=st.sampled_from((1, 2, 8)),
    experts=st.integers(1, CUDA_MAX_EXPERTS),
    hot=st.integers(1, CUDA_MAX_EXPERTS),
    block=st.integers(1, 300),
    seed=st.integers(0, 2**31),
)
def test_any_number_of_pairs(pairs, top_k, experts, hot, block, seed):
    """Few experts that are hot have all pairs, so that many of a warp are of the same."""
    g = torch.Generator("cuda").manual_seed(seed)
    shape = (pairs // top_k, top_k)
    ids = torch.randint(-1, min(hot, experts) + 1, shape, device="cuda", generator=g)
    cuda, reference = kernel(NAME, "cuda"), implementation(NAME, "reference")
    assert_same_bits(cuda(ids, block, experts), reference(ids, block, experts))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(2, 2), 4, 8), "topk_ids.dtype is torch.float32; accepted: torch.int32"),
        ((torch.zeros(4).long(), 4, 8), "topk_ids has 1 dimensions; accepted: 2"),
        ((torch.zeros(2, 0).long(), 4, 8), "the last dimension of topk_ids is 0; accepted: 1 or"),
        ((torch.zeros(2, 2).long(), 0, 8), "block_size is 0; accepted: 1 or more"),
        ((torch.zeros(2, 2).long(), 4, 0), "num_experts is 0; accepted: 1 or more"),
        (
            (torch.zeros(2, 2).long(), 2**30, 8),
            r"topk_ids.shape is \(2, 2\), which with padding are .*; accepted: 2147483647 or fewer",
        ),
    ],
)
def test_bad_arguments(args, message):
    with pytest.raises(ValueError, match=f"{NAME}: {message}"):
        custom_ops.moe_align_block_size(*args)


def test_bad_maps():
    ids = torch.zeros(2, 2).long()
    for table, message in (
        (torch.zeros(8).long(), "expert_map.dtype is torch.int64; accepted: torch.int32"),
        (torch.zeros(2, 4).int(), "expert_map has 2 dimensions; accepted: 1"),
        (torch.zeros(0).int(), "the length of expert_map is 0; accepted: 1 or more"),
        (torch.zeros(8, device="meta").int(), "expert_map is on meta; accepted: cpu, as topk_ids"),
    ):
        with pytest.raises(ValueError, match=f"{NAME}: {message}"):
            custom_ops.moe_align_block_size(ids, 4, 8, expert_map=table)


def test_the_cuda_kernel_says_what_it_does_not_take():
    cuda = next(i for i in library.ops()[NAME].implementations if i.name == "cuda")
    ids = torch.zeros(2, 2).long()
    assert cuda.unsupported(ids, 4, 512, expert_map=None) is None
    assert cuda.unsupported(ids, 4, 513, expert_map=None) == (
        "takes at most 512 experts, here are 513"
    )
