"""On a GPU: every way, CUDA graphs whose adapters change under them, addresses beyond 2^31."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import custom_ops
from custom_ops.lora import hopper, hopper_batch, linear, ways
from tests.custom_ops.lora.cases import Batch, Single, adapters, exact_base, normal
from tests.custom_ops.lora.test_ops import SPLIT, assert_expanded, assert_within

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16)
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)
# three blocks share a tile where a GPU does not hold so many clusters of four
DECODES = (*ways.DECODES, "decode 128x3")
PREFILLS = ("prefill", "prefill own")
SINGLE_WAYS = (*DECODES, *PREFILLS, "fused", *ways.WITH_BLAS)
BATCH_WAYS = (*DECODES, *ways.WITH_BLAS)
LIBRARY = (*ways.WITH_BLAS, ways.TILED)  # the ways whose base the BLAS makes


@functools.cache
def runner(kind: str, way: str):
    """The function that takes a way by its name."""
    if way in (*DECODES, *PREFILLS, ways.TILED):
        run = hopper.load_single() if kind == "single" else hopper.load_batch()
    else:
        run = linear.lora_linear_single if kind == "single" else linear.lora_linear
    return functools.partial(run, way=way)


@st.composite
def single_calls(draw, floats=(True, False)) -> Single:
    seed = draw(st.integers(10, 2**31))
    tokens = draw(st.sampled_from((1, 7, 16, 17, 32, 50, 64, 100, 129, 300)))
    channels = draw(st.sampled_from((8, 64, 72, 512, 1000, 4104)))
    columns = draw(st.sampled_from((8, 64, 136, 384, 1032, 4096)))
    rank = draw(st.sampled_from((8, 16, 24, 40, 64, 128, 256)))
    dtype = draw(st.sampled_from(DTYPES))
    own = torch.float32 if draw(st.sampled_from(floats)) else dtype
    return Single(
        normal(seed, (tokens, channels), dtype),
        normal(seed + 1, (columns, channels), dtype),
        normal(seed + 2, (columns,), dtype) if draw(st.booleans()) else None,
        normal(seed + 3, (rank, channels), own),
        normal(seed + 4, (columns, rank), own),
        0.7,
    )


def assert_single(way: str, call: Single) -> None:
    out = runner("single", way)(*call.args)
    base, bound = base_of(call, library=way in LIBRARY)
    delta, magnitude = call.exact_delta()
    eps = torch.finfo(out.dtype).eps
    steps = 4 * eps if call.a.dtype == out.dtype else SPLIT
    bound += steps * (base.abs() + magnitude) + eps * (base + delta).abs()
    assert_within(out, base + delta, bound)


def base_of(call: Single | Batch, library: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The base in float64, and what a base may be off by.

    library: the BLAS makes it, which may round the sums of parts of the channels to 16 bits before it adds them up
    (torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction, on by default).
    """
    base, slack, most = exact_base(call)
    return base, slack + (torch.finfo(call.x.dtype).eps * most if library else 0.0)


@on_hopper
@pytest.mark.parametrize("way", DECODES)
@given(call=single_calls())
@settings(max_examples=20)
def test_single_in_the_decode_kernel(way, call):
    assert_single(way, call)


@on_hopper
@pytest.mark.parametrize("way", PREFILLS)
@given(call=single_calls(floats=(False,)))
@settings(max_examples=20)
def test_single_in_the_prefill_kernel(way, call):
    assume(way == "prefill" or call.a.shape[0] <= hopper.MAX_PREFILL_OWN_RANK)
    assert_single(way, call)


@on_hopper
@pytest.mark.parametrize("way", PREFILLS)
@pytest.mark.parametrize(("tokens", "columns", "rank"), [(2300, 4096, 16), (8192, 1032, 32)])
def test_more_tiles_than_multiprocessors(way, tokens, columns, rank):
    """Blocks take tile after tile, and wait for what others have made of the tokens; twice in one graph."""
    dtype, channels = torch.bfloat16, 512
    call = Single(
        normal(1, (tokens, channels), dtype),
        normal(2, (columns, channels), dtype),
        normal(3, (columns,), dtype),
        normal(4, (rank, channels), dtype),
        normal(5, (columns, rank), dtype),
        0.7,
    )
    assert_single(way, call)
    first = runner("single", way)(*call.args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [runner("single", way)(*call.args) for _ in range(2)]
    for _ in range(3):
        for out in outs:
            out.zero_()
        graph.replay()
        for out in outs:
            assert torch.equal(out, first)


@on_hopper
@pytest.mark.parametrize("way", ["fused", *ways.WITH_BLAS])
@given(call=single_calls())
@settings(max_examples=3)  # Triton compiles a kernel for most of them
def test_single_in_triton(way, call):
    assert_single(way, call)


@on_hopper
@pytest.mark.parametrize("way", [way for way in SINGLE_WAYS if way != "fused"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rounding_of_peft_is_there(way, dtype):
    """Integers: sums are exact in any order, so that a missing or a further rounding would be seen."""

    def integers(which: int, shape: tuple[int, ...]) -> torch.Tensor:
        return (normal(which, shape, torch.float32) * 2).round().to(dtype)

    x, weight = integers(1, (60, 256)), integers(2, (384, 256))
    a, b = integers(3, (16, 256)), integers(4, (384, 16))
    eager = torch.nn.functional.linear(x, weight)
    eager = eager + torch.nn.functional.linear(torch.nn.functional.linear(x, a), b) * 0.7
    assert torch.equal(runner("single", way)(x, weight, None, a, b, 0.7), eager)


def mixed(
    seed, tokens, channels, widths, ranks, most, dtype, bias, spare=5
) -> tuple[Batch, object]:
    batch = custom_ops.LoRABatch(tokens + spare, len(ranks), device="cuda")
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randint(-1, len(ranks), (tokens,), generator=generator).tolist()
    batch.update(slots)
    a, b = adapters(seed + 20, ranks, most, channels, widths, dtype)
    call = Batch(
        normal(seed, (tokens, channels), dtype),
        normal(seed + 1, (sum(widths), channels), dtype),
        normal(seed + 2, (sum(widths),), dtype) if bias else None,
        *(a, b, normal(seed + 3, (len(ranks),), torch.float32)),
        torch.tensor(ranks, dtype=torch.int32, device="cuda"),
        *(batch.tensors, slots),
    )
    return call, batch


@st.composite
def batch_calls(draw) -> Batch:
    most = draw(st.sampled_from((8, 16, 40, 128)))
    return mixed(
        draw(st.integers(10, 2**30)),
        draw(st.sampled_from((1, 7, 16, 30, 64, 90))),
        draw(st.sampled_from((8, 72, 512))),
        draw(st.sampled_from(([8], [200], [128, 256], [256, 128, 136]))),
        draw(st.lists(st.integers(0, most), min_size=1, max_size=9)),
        most,
        draw(st.sampled_from(DTYPES)),
        draw(st.booleans()),
    )[0]


def assert_batch(way: str, call: Batch) -> None:
    assert_linear(runner("batch", way)(*call.linear), call, way in LIBRARY)


def assert_linear(out: torch.Tensor, call: Batch, library: bool) -> None:
    """base + low-rank product, against float64: the BLAS is no oracle for the kernel."""
    delta, magnitude = call.exact_expand(*call.exact_shrink())
    base, bound = base_of(call, library)
    assert_within(out, base + delta, bound + SPLIT * magnitude + step_of(out, delta))


@on_hopper
@pytest.mark.parametrize("way", DECODES)
@given(call=batch_calls())
@settings(max_examples=20)
def test_batch_in_the_decode_kernel(way, call):
    assert_batch(way, call)


@st.composite
def tiled_calls(draw) -> Batch:
    """What shrink and expand take in tiles of 16 tokens, a warp by itself: few tokens and many, of any ranks."""
    most = draw(st.sampled_from(hopper_batch.RANKS))
    return mixed(
        draw(st.integers(10, 2**30)),
        draw(st.sampled_from((1, 15, 17, 90, 513, 1030))),
        draw(st.sampled_from((8, 72, 264, 512, 2056, 4096))),
        draw(st.sampled_from(([8], [520], [64, 200], [1024, 64, 64, 136]))),
        draw(st.lists(st.integers(0, most), min_size=1, max_size=40)),
        most,
        torch.bfloat16,
        draw(st.booleans()),
        spare=draw(st.integers(0, 40)) * 2
        + 1,  # the tiles begin on 16 bytes with an even number of tokens
    )[0]


@on_hopper
@given(call=tiled_calls())
@settings(max_examples=40)
def test_batch_in_tiles(call):
    assert_batch(ways.TILED, call)


@on_hopper
def test_tiles_take_no_other_alignment():
    call, _ = mixed(3, 60, 64, [64], [16], 16, torch.bfloat16, False)
    slots, order, tiles = call.tensors
    off = torch.empty(tiles.numel() + 1, dtype=torch.int32, device="cuda")[1:].view(tiles.shape)
    call.tensors = slots, order, off.copy_(tiles)
    assert not hopper_batch.takes(call.x, call.b, off)
    with pytest.raises(ValueError, match=r"tiles must be int32 .* on 16 bytes"):
        runner("batch", ways.TILED)(*call.linear)


@on_hopper
@pytest.mark.parametrize(
    ("way", "dtype"),
    [*itertools.product(BATCH_WAYS, DTYPES), (ways.TILED, torch.bfloat16)],
)
def test_what_an_adapter_holds_reaches_no_other_tokens(way, dtype):
    """Not even what is not finite: in an adapter, and where one was whose rank was larger."""
    call, _ = mixed(7, 60, 256, [256], [16, 16, 3, 16], 64, dtype, False)
    for b in call.b:
        b[1, 3] = float("inf")
        b[1, 5] = float("nan")
        b[:, :, 16:] = float("nan")
    for a in call.a:
        a[:, 16:] = float("nan")
    out = runner("batch", way)(*call.linear)
    slots = torch.tensor(call.slots, device="cuda")
    assert not out[slots == 1][:, [3, 5]].isfinite().any()
    for b in call.b:
        b[1] = 0.0
    call.ranks[1] = 0
    others = slots != 1
    call.x, call.slots = call.x[others], slots[others].tolist()
    assert_linear(out[others], call, way in LIBRARY)


@on_hopper
@pytest.mark.parametrize(("of_x", "of_a", "scaling"), [(1e-3, 1.0, 0.7), (2.0, 2000.0, 1e-4)])
@pytest.mark.parametrize("way", BATCH_WAYS)
def test_sums_outside_the_range_of_float16(way, of_x, of_a, scaling):
    """y is float32: no way may round it to the dtype of x."""
    call, _ = mixed(9, 60, 256, [256], [16, 8, 16], 16, torch.float16, False)
    call.x.mul_(of_x)
    call.a[0].mul_(of_a)
    call.scaling.fill_(scaling)
    assert_batch(way, call)


@on_hopper
@pytest.mark.parametrize("way", ways.WITH_BLAS)
@given(call=batch_calls())
@settings(max_examples=3)
def test_batch_in_triton(way, call):
    assert_batch(way, call)


@st.composite
def many_tokens(draw) -> Batch:
    """What the expand takes in tiles of 16 tokens by 512 columns."""
    return mixed(
        draw(st.integers(10, 2**30)),
        draw(st.sampled_from((513, 700, 1030))),
        draw(st.sampled_from((72, 512))),
        draw(st.sampled_from(([8], [520], [1032, 136]))),
        draw(st.lists(st.integers(0, 16), min_size=1, max_size=80)),
        16,
        draw(st.sampled_from(DTYPES)),
        draw(st.booleans()),
    )[0]


@on_hopper
@pytest.mark.parametrize("way", ways.WITH_BLAS)
@given(call=many_tokens())
@settings(max_examples=4)
def test_many_tokens_of_a_batch(way, call):
    assert_batch(way, call)


def step_of(out, delta):
    return torch.finfo(out.dtype).eps * (delta.abs() + out.double().abs().nan_to_num(0.0, 0.0, 0.0))


@on_hopper
@pytest.mark.parametrize("way", [*BATCH_WAYS, ways.TILED])
def test_a_captured_graph_serves_other_adapters(way):
    """One capture, then other tokens for other slots, other contents of a slot, and no adapter at all."""
    ranks = [8, 16, 3, 0, 16]
    call, batch = mixed(5, 60, 256, [256, 128], ranks, 16, torch.bfloat16, True)
    run = runner("batch", way)
    run(*call.linear)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(*call.linear)
    generator = torch.Generator().manual_seed(0)
    for count in (60, 13, 0):
        call.slots = torch.randint(-1, 5, (count,), generator=generator).tolist()
        batch.update(call.slots)
        call.slots += [-1] * (60 - count)
        call.a[0][1] *= 0.5
        call.x.copy_(normal(count, (60, 256), torch.bfloat16))
        graph.replay()
        assert_linear(out, call, way in LIBRARY)


@on_hopper
@pytest.mark.parametrize(
    ("kind", "way"),
    [*itertools.product(("single", "batch"), BATCH_WAYS), ("batch", ways.TILED)],
)
def test_kernels_one_after_the_other(kind, way):
    """Each reads what the one before it wrote, many times in one graph: none may start on it too early."""
    channels = 512
    call, _ = mixed(5, 50, channels, [channels], [16] * 4, 16, torch.bfloat16, False)
    call.weight /= channels**0.5
    tail = (
        (call.weight, None, call.a[0][0], call.b[0][0], 0.01)
        if kind == "single"
        else call.linear[1:]
    )
    call.scaling *= 0.01
    run = runner(kind, way)

    def chain() -> torch.Tensor:
        x = call.x
        for _ in range(40):
            x = run(x, *tail)
        return x

    one_by_one = call.x
    for _ in range(40):
        one_by_one = run(one_by_one, *tail)
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for _ in range(5):
        graph.replay()
        assert torch.equal(out, one_by_one)


def test_slots_beyond_two_to_the_31_elements():
    """The last slot of buffers of more than 2^31 elements: 64-bit offsets."""
    slots, rank, channels = 5200, 16, 26000
    free = torch.cuda.mem_get_info()[0]
    if free < 12 << 30:
        pytest.skip(f"needs 12 GiB of free GPU memory, here are {free >> 30}")
    a = torch.zeros(slots, rank, channels, dtype=torch.bfloat16, device="cuda")
    b = torch.zeros(slots, channels, rank, dtype=torch.bfloat16, device="cuda")
    assert a.numel() > 2**31
    a[-1] = normal(1, (rank, channels), torch.bfloat16)
    b[-1] = normal(2, (channels, rank), torch.bfloat16)
    batch = custom_ops.LoRABatch(4, slots, device="cuda")
    batch.update([slots - 1, 0])
    x, base = normal(3, (2, channels), torch.bfloat16), normal(4, (2, channels), torch.bfloat16)
    scaling = torch.ones(slots, device="cuda")
    ranks = torch.full((slots,), rank, dtype=torch.int32, device="cuda")
    out = custom_ops.lora_add(x, base, [a], [b], scaling, ranks, *batch.tensors)
    delta = b[-1].double() @ (a[-1].double() @ x[0].double())
    most = b[-1].double().abs() @ (a[-1].double().abs() @ x[0].double().abs())
    assert_expanded(out[:1], base[:1], delta[None], most[None])
    assert torch.equal(out[1], base[1])
