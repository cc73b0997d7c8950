"""Tokens to rows by expert and back: against loops, group_quant, float64, and memory full of NaN."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import custom_ops
from custom_ops.moe import padded_rows
from fusion_passes.testing.strategies import activation_dtypes, relayouts
from tests.custom_ops.helpers import DEVICE, assert_same_bits, bf16, implementation, steps
from tests.custom_ops.moe.draws import expert_ids, generator
from tests.custom_ops.moe.test_align import local
from tests.custom_ops.schemes import KERNELS, kernel, schemes

INDEXING = ["reference", pytest.param("cuda", marks=pytest.mark.gpu)]
EVERY = ["reference", *KERNELS]


def run_of(name: str, which: str):
    return implementation(name, which) if which == "reference" else kernel(name, which)


@st.composite
def tokens_of(draw, count: int, width: int | None = None) -> Tensor:
    """[count, H] of any strides."""
    width = width or draw(st.sampled_from((1, 7, 8, 128, 264)))
    x = torch.randn(count, width, generator=generator(draw)).to(draw(activation_dtypes()))
    return draw(relayouts(x.to(DEVICE)))


def layout_of(experts: list[int], num_experts: int, align: int):
    """row_of_pair, row_experts in use, offsets: by loops."""
    row_of_pair, row_experts, offsets = [-1] * len(experts), [], [0]
    for e in range(num_experts):
        for pair in (p for p, expert in enumerate(experts) if expert == e):
            row_of_pair[pair] = len(row_experts)
            row_experts.append(e)
        row_experts += [-1] * (-len(row_experts) % align)
        offsets.append(len(row_experts))
    return row_of_pair, row_experts, offsets


@pytest.mark.parametrize("which", INDEXING)
@given(routing=expert_ids(), align=st.sampled_from((1, 4, 128)), data=st.data())
def test_every_pair_has_the_row_of_its_token(which, routing, align, data):
    ids, num_experts, expert_map = routing
    x = data.draw(tokens_of(ids.shape[0]))
    options = {"align": align, "expert_map": expert_map}
    rows, row_of_pair, row_experts, offsets = run_of("moe_permute", which)(
        x, ids, num_experts, **options
    )
    total = padded_rows(ids.numel(), num_experts, align)
    assert (rows.shape, rows.dtype, rows.is_contiguous()) == (
        (total, x.shape[1]),
        x.dtype,
        True,
    )
    want = layout_of(local(ids, num_experts, expert_map), num_experts, align)
    assert row_of_pair.tolist() == want[0]
    assert row_experts.tolist() == want[1] + [-1] * (total - len(want[1]))
    assert offsets.tolist() == want[2]
    here = row_of_pair >= 0
    of_pairs = x.repeat_interleave(ids.shape[1], 0)[here].contiguous()
    assert_same_bits(rows[row_of_pair[here].long()], of_pairs)


@pytest.mark.parametrize("which", INDEXING)
@given(routing=expert_ids(most_tokens=33), scheme=schemes("group_quant"), data=st.data())
def test_rows_are_quantized_as_group_quant_does(which, routing, scheme, data):
    ids, num_experts, expert_map = routing
    (group_size,), options = scheme
    x = data.draw(tokens_of(ids.shape[0], data.draw(st.sampled_from((128, 384, 1152)))))
    align = data.draw(st.sampled_from((1, 4, 128)))
    run = run_of("moe_permute_group_quant", which)
    codes, scale, *indices = run(
        x, ids, num_experts, group_size, align=align, expert_map=expert_map, **options
    )
    _, *want = implementation("moe_permute", "reference")(
        x, ids, num_experts, align=align, expert_map=expert_map
    )
    assert_same_bits(indices, want)
    like = torch.empty(codes.shape, dtype=x.dtype, device="meta")
    whole = custom_ops.group_quant(like, group_size, **options)
    assert (codes.stride(), scale.stride()) == tuple(t.stride() for t in whole)
    assert (scale.shape, scale.dtype) == (whole[1].shape, whole[1].dtype)
    alone = implementation("group_quant", "reference")(x, group_size, **options)
    here = indices[0] >= 0
    at = indices[0][here].long()
    for got, once in ((codes, alone[0]), (scale, alone[1])):
        bits = torch.uint8 if got.element_size() == 1 else torch.int32
        of_pairs = once.view(bits).repeat_interleave(ids.shape[1], 0)[here]
        got_bits = got.view(bits)[at]
        assert_same_bits(got_bits.view(got.dtype), of_pairs.view(got.dtype))


def by_loops(of_pairs: Tensor, weights: Tensor, here: list[bool]) -> Tensor:
    """The sum as documented, a pair at a time."""
    tokens, count = weights.shape
    out = torch.zeros(tokens, of_pairs.shape[1], device=of_pairs.device)
    for t in range(tokens):
        for k in range(count):
            if here[t * count + k]:
                out[t] += (of_pairs[t * count + k] * weights[t, k : k + 1]).float()
    return out.to(of_pairs.dtype)


@st.composite
def weights_of(draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    w = torch.rand(shape, generator=generator(draw)).to(DEVICE)
    w = w.to(draw(st.sampled_from((torch.float32, dtype))))
    return w.T.contiguous().T if draw(st.booleans()) else w


@pytest.mark.parametrize("which", EVERY)
@given(routing=expert_ids(most_tokens=7), data=st.data())
def test_unpermute_adds_the_rows_of_a_token_in_order(which, routing, data):
    ids, num_experts, expert_map = routing
    x = data.draw(tokens_of(ids.shape[0]))
    rows, row_of_pair, _, _ = implementation("moe_permute", "reference")(
        x, ids, num_experts, align=4, expert_map=expert_map
    )
    y = torch.full(rows.shape, math.nan, dtype=x.dtype, device=DEVICE)  # padding stays NaN
    used = row_of_pair[row_of_pair >= 0].long()
    y[used] = torch.randn(len(used), y.shape[1], device=DEVICE).to(x.dtype)
    y = data.draw(relayouts(y))
    weights = data.draw(weights_of(tuple(ids.shape), x.dtype))
    got = run_of("moe_unpermute", which)(y, row_of_pair, weights)
    here = [r >= 0 for r in row_of_pair.tolist()]
    of_pairs = torch.zeros(ids.numel(), y.shape[1], dtype=x.dtype, device=DEVICE)
    of_pairs[row_of_pair >= 0] = y[used]
    assert_same_bits(got, by_loops(of_pairs, weights, here))


@pytest.mark.parametrize("which", EVERY)
@given(routing=expert_ids(most_tokens=7), by_ids=st.booleans(), data=st.data())
def test_reduce_adds_what_lies_by_pair(which, routing, by_ids, data):
    ids, num_experts, expert_map = routing
    y = data.draw(tokens_of(ids.numel()))
    weights = data.draw(weights_of(tuple(ids.shape), y.dtype))
    here = [True] * ids.numel()
    options = {}
    if by_ids:
        here = [e >= 0 for e in local(ids, num_experts, expert_map)]
        y[~torch.tensor(here, dtype=torch.bool, device=DEVICE)] = math.nan  # is not read
        options = {"topk_ids": ids, "num_experts": num_experts, "expert_map": expert_map}
    got = run_of("moe_reduce", which)(y, weights, **options)
    assert_same_bits(got, by_loops(y, weights, here))


@pytest.mark.parametrize("which", EVERY)
def test_the_sum_is_that_of_eager_up_to_the_order(which):
    """Stock models write (y * w).view(T, K, H).sum(1).to(dtype)."""
    torch.manual_seed(0)
    y, w = bf16(6 * 8, 128, device=DEVICE), torch.rand(6, 8, device=DEVICE)
    for weights in (w, w.bfloat16()):
        got = run_of("moe_reduce", which)(y, weights)
        product = (y * weights.view(-1, 1)).view(6, 8, 128)
        assert int(steps(got, product.sum(1).to(y.dtype)).max()) <= 1
        exact = product.double().sum(1)
        assert ((got.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("which", INDEXING)
def test_there_and_back(which):
    """Weights that add up to one bring tokens back, whatever the rows between them."""
    torch.manual_seed(0)
    x = bf16(33, 264, device=DEVICE)
    ids = torch.rand(33, 16, device=DEVICE).argsort(-1)[:, :4]
    rows, row_of_pair, _, offsets = run_of("moe_permute", which)(x, ids, 16, align=8)
    weights = torch.full((33, 4), 0.25, device=DEVICE)
    assert_same_bits(custom_ops.moe_unpermute(rows, row_of_pair, weights), x)
    assert int(offsets[-1]) % 8 == 0
    plain = run_of("moe_permute", which)(x, ids, 16)
    counts = torch.bincount(ids.flatten(), minlength=16)
    assert torch.equal(plain[3][1:], counts.cumsum(0).int())


@pytest.mark.parametrize("which", EVERY)
def test_no_tokens(which):
    x, ids = bf16(0, 64, device=DEVICE), torch.zeros(0, 2, dtype=torch.int32, device=DEVICE)
    if which != "triton":
        rows, row_of_pair, row_experts, offsets = run_of("moe_permute", which)(x, ids, 3, align=16)
        assert (rows.shape, row_of_pair.shape, row_experts.shape) == ((0, 64), (0,), (0,))
        assert offsets.tolist() == [0, 0, 0, 0]
    none = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    weights = torch.rand(0, 2, device=DEVICE)
    assert run_of("moe_unpermute", which)(x, none, weights).shape == (0, 64)
    assert run_of("moe_reduce", which)(x, weights).shape == (0, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 512, 1025, 4096, 65536])
def test_sizes_of_the_cuda_kernels(tokens):
    torch.manual_seed(0)
    x = bf16(tokens, 2048 if tokens < 4096 else 320, device="cuda")
    ids = torch.rand(tokens, 128, device="cuda").topk(8).indices
    weights = torch.rand(tokens, 8, device="cuda")
    for align in (1, 128):
        got = kernel("moe_permute", "cuda")(x, ids, 128, align=align)
        want = implementation("moe_permute", "reference")(x, ids, 128, align=align)
        assert_same_bits(got[1:], want[1:])
        at = want[1].long()
        assert torch.equal(got[0][at].view(torch.int16), want[0][at].view(torch.int16))
        for options in ({}, {"scale_layout": "column_major_tma", "scale_format": "ue8m0"}):
            group = 64 if tokens >= 4096 else 128
            quant = "moe_permute_group_quant"
            codes, scale, *_ = kernel(quant, "cuda")(x, ids, 128, group, align=align, **options)
            first = implementation(quant, "reference")(x, ids, 128, group, align=align, **options)
            assert torch.equal(codes[at].view(torch.uint8), first[0][at].view(torch.uint8))
            assert torch.equal(scale[at], first[1][at])
            assert (codes.stride(), scale.stride()) == (first[0].stride(), first[1].stride())
        for w in (weights, weights.bfloat16()):
            args = (want[0], want[1], w)
            assert_same_bits(
                kernel("moe_unpermute", "cuda")(*args),
                implementation("moe_unpermute", "reference")(*args),
            )


@pytest.mark.gpu
def test_more_than_2_31_elements():
    """Rows past 2^31 elements, of tokens whose values say which they are."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    tokens, width = 40_000, 7168
    x = torch.arange(tokens, device="cuda").remainder(251).to(torch.bfloat16)
    x = x[:, None].expand(tokens, width)
    ids = torch.arange(8, device="cuda").expand(tokens, 8)
    rows, row_of_pair, _, _ = kernel("moe_permute", "cuda")(x.contiguous(), ids, 8)
    assert rows.numel() > 2**31
    assert torch.equal(rows[-tokens:, -1], x[:, 0])
    weights = torch.full((tokens, 8), 0.125, device="cuda")
    assert torch.equal(kernel("moe_unpermute", "cuda")(rows, row_of_pair, weights), x)


def bad_calls() -> dict:
    x, ids = bf16(4, 128), torch.zeros(4, 2).long()
    rows, index, w = bf16(8, 128), torch.zeros(8, dtype=torch.int32), torch.rand(4, 2)
    c = custom_ops
    return {
        "dtype": (c.moe_permute, (x.float(), ids, 8), {}, "x.dtype is torch.float32; accepted"),
        "dims": (c.moe_permute, (x[0], ids, 8), {}, "x has 1 dimensions; accepted: 2"),
        "tokens": (c.moe_permute, (x[:3], ids, 8), {}, r"shape is \(4, 2\); accepted: \(3, K\)"),
        "align": (c.moe_permute, (x, ids, 8), {"align": 0}, "align is 0; accepted: 1 or more"),
        "group": (c.moe_permute_group_quant, (x, ids, 8, 96), {}, "group_size is 96; accepted: 32"),
        "index": (c.moe_unpermute, (rows, index.long(), w), {}, "row_of_pair.dtype is torch.int64"),
        "pairs": (c.moe_unpermute, (rows, index[:6], w), {}, "weight for each of the 6 pairs of r"),
        "weights": (
            c.moe_unpermute,
            (rows, index, w.half()),
            {},
            "topk_weights.dtype is torch.flo",
        ),
        "y": (c.moe_reduce, (rows[:6], w), {}, "weight for each of the 6 pairs of y"),
        "ids": (
            c.moe_reduce,
            (rows, w),
            {"topk_ids": ids.T, "num_experts": 8},
            r"topk_ids.shape is \(2, 4\); accepted: \(4, 2\)",
        ),
        "experts": (c.moe_reduce, (rows, w), {"topk_ids": ids}, "num_experts is 0; accepted: 1"),
        "map": (c.moe_reduce, (rows, w), {"expert_map": index}, "expert_map is given without topk"),
    }


@pytest.mark.parametrize("case", bad_calls())
def test_errors_name_the_argument(case):
    op, args, options, message = bad_calls()[case]
    with pytest.raises(ValueError, match=f"{op.__name__}: .*{message}"):
        op(*args, **options)
