"""The grouped kernels of experts: every tile against the reference and float64, bits of quantization, the tables."""

from __future__ import annotations

import dataclasses
import importlib
import json
from importlib import resources

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import custom_ops
from custom_ops.moe import reference, tiles
from custom_ops.moe.activation import Activation
from custom_ops.moe.tiles import Aligned, Tile
from custom_ops.quantization.reference import group_quant
from tests.custom_ops.helpers import DEVICE, assert_few_flips, assert_same_bits
from tests.custom_ops.moe.problems import ROUTINGS, WEIGHTS, Shape, assert_as_good, shapes

triton = pytest.importorskip("triton", reason="needs triton")
tl = triton.language
triton_experts = importlib.import_module("custom_ops.moe.triton_experts")
triton_operands = importlib.import_module("custom_ops.moe.triton_operands")
triton_products = importlib.import_module("custom_ops.moe.triton_products")

BLOCKS = (16, 32, 64)
PLAIN = Shape(tokens=33, top_k=2, experts=5, hidden=200, intermediate=136)


def drawn_tiles(weights: str) -> st.SearchStrategy[Tile]:
    """Any tile; codes with scales of blocks, and what is quantized, want 128 of them."""
    sizes = st.just(128) if weights == "fp8_block" else st.sampled_from((32, 64, 128))
    flags = st.booleans()
    return st.builds(
        Tile, sizes, sizes, st.just(4), st.just(2), flags, st.sampled_from((1, 2, 8)), flags, flags
    )


def small(**fixed) -> st.SearchStrategy[Shape]:
    """Mixtures that the interpreter gets through."""
    return shapes(**({"experts": [1, 3, 8], "tokens": [0, 1, 7, 20]} | fixed))


def align(problem, block_size: int) -> Aligned:
    index = custom_ops.moe_align_block_size(
        problem.topk_ids, block_size, problem.sizes.num_experts, expert_map=problem.expert_map
    )
    return Aligned(*index, block_size)


def quantized(problem):
    """hidden_states as `gate_up` takes them."""
    if problem.weights != "fp8_block":
        return problem.hidden_states, None
    x = problem.hidden_states
    codes, scale = group_quant(
        torch.nn.functional.pad(x, (0, -x.shape[1] % 128)), 128, **problem.quantization
    )
    return codes[:, : x.shape[1]], scale


def act_of(problem, aligned: Aligned, tile: Tile | None, quantize: bool):
    x, scale = quantized(problem)
    return triton_experts.gate_up(
        x,
        problem.gate_up,
        aligned,
        problem.sizes.top_k,
        activation=problem.activation,
        bias=problem.gate_up_bias,
        x_scale=scale,
        w_scale=problem.gate_up_scale,
        quantize=quantize,
        dtype=problem.dtype,
        tile=tile,
        **problem.quantization,
    )


def run(problem, block_size: int, first: Tile | None = None, second: Tile | None = None):
    """The mixture by both kernels, reduced as the reference does."""
    aligned = align(problem, block_size)
    quantize = problem.weights == "fp8_block"
    act = act_of(problem, aligned, first, quantize)
    act, scale = act if quantize else (act, None)
    pairs = triton_experts.down(
        act,
        problem.down,
        aligned,
        problem.sizes.pairs,
        bias=problem.down_bias,
        act_scale=scale,
        w_scale=problem.down_scale,
        dtype=problem.dtype,
        tile=second,
    )
    experts = reference.local_experts(
        problem.topk_ids, problem.sizes.num_experts, problem.expert_map
    )
    y = pairs.view(*problem.topk_ids.shape, problem.sizes.hidden_size)
    return reference.reduce(y, problem.topk_weights, experts >= 0)


@given(st.data(), st.sampled_from(BLOCKS), st.sampled_from(WEIGHTS))
def test_any_tile_is_as_good_as_the_reference(data, block_size, weights):
    problem = data.draw(small(weights=weights)).problem()
    out = run(problem, block_size, *(data.draw(drawn_tiles(weights)) for _ in range(2)))
    assert_as_good(out, problem)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("intermediate", [8, 24, 136])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_whose_halves_begin_anywhere(weights, intermediate, interleaved):
    """Codes kept as [E, K, N], where up begins in the middle of N. What a GPU reads by descriptors begins at 16 bytes.

    Elsewhere it ends in an illegal instruction, as this did.
    """
    problem = dataclasses.replace(
        PLAIN,
        tokens=7,
        hidden=40,
        intermediate=intermediate,
        interleaved=interleaved,
        weights=weights,
        transposed=True,
    ).problem()
    tile = Tile(128, 128, 4, 2)
    assert_as_good(run(problem, 16, tile, tile), problem)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="needs Triton's interpreter, which checks what it is to read"
)
@given(st.data(), st.sampled_from(WEIGHTS), st.booleans())
def test_what_is_read_by_descriptors_begins_at_16_bytes(data, weights, transposed):
    drawn = data.draw(small(weights=weights, tokens=[1, 7], transposed=transposed))
    tiles_of = [dataclasses.replace(data.draw(drawn_tiles(weights)), tma=True) for _ in range(2)]
    problem = drawn.problem()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_operands, "descriptors", lambda x: True)
        assert_as_good(run(problem, 16, *tiles_of), problem)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_tables_tile_serves_any_routing(weights, routing):
    problem = dataclasses.replace(PLAIN, weights=weights, routing=routing).problem()
    block_size = triton_experts.block_size(PLAIN.tokens, 2, problem.gate_up, problem.down)
    assert_as_good(run(problem, block_size), problem)


@given(st.data(), st.sampled_from(BLOCKS))
def test_quantization_in_the_epilogue_has_the_bits_of_group_quant(data, block_size):
    problem = data.draw(small(weights="fp8_block", tokens=[1, 7])).problem()
    aligned, tile = align(problem, block_size), Tile(128, 128, 4, 2)
    codes, scale = act_of(problem, aligned, tile, True)
    act = act_of(problem, aligned, tile, False)
    used = aligned.sorted_ids < problem.sizes.pairs
    width = act.shape[1]
    padded = torch.nn.functional.pad(act[used], (0, -width % 128))
    expected, expected_scale = group_quant(padded, 128, **problem.quantization)
    assert_same_bits(codes[used].flatten(), expected[:, :width].flatten())
    assert_same_bits(scale[used].flatten(), expected_scale.flatten())


def test_a_row_has_the_same_bits_in_any_block_and_tile():
    problem = dataclasses.replace(PLAIN, hidden=256, intermediate=256).problem()
    expected = run(problem, 64, Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))
    for swap in (False, True):
        tile = Tile(64, 64, 4, 2, swap, 2, True)
        out = run(problem, 64, tile, tile)
        if DEVICE == "cuda":
            assert_same_bits(out, expected)
        else:  # NumPy sums a transposed product in another order
            assert_as_good(out, problem)


def test_pairs_elsewhere_are_not_written():
    problem = dataclasses.replace(PLAIN, elsewhere=True).problem()
    aligned = align(problem, 16)
    act = act_of(problem, aligned, Tile(64, 64, 4, 2), False)
    inside = aligned.sorted_ids[aligned.sorted_ids < problem.sizes.pairs]
    out = triton_experts.down(
        act, problem.down, aligned, problem.sizes.pairs, tile=Tile(64, 64, 4, 2)
    )
    again = triton_experts.down(
        act, problem.down, aligned, problem.sizes.pairs, tile=Tile(32, 64, 4, 2)
    )
    assert 0 < len(inside) < problem.sizes.pairs
    assert_same_bits(out[inside.long()], again[inside.long()])


def test_no_tokens_and_no_experts():
    none = dataclasses.replace(PLAIN, tokens=0).problem()
    assert run(none, 16).shape == (0, PLAIN.hidden)
    problem = PLAIN.problem()
    ids = torch.full_like(problem.topk_ids, 99)  # of no expert here
    nowhere = dataclasses.replace(problem, topk_ids=ids)
    assert not run(nowhere, 16).any()


def test_tiles_that_cannot_be_used_are_refused():
    problem = dataclasses.replace(PLAIN, weights="fp8_block").problem()
    with pytest.raises(ValueError, match=r"tile.n is 64; accepted with quantize"):
        run(problem, 16, Tile(64, 128, 4, 2))
    with pytest.raises(ValueError, match=r"tile.k is 64; accepted with block scales"):
        run(problem, 16, Tile(128, 64, 4, 2))


def test_fewer_stages_where_shared_memory_is_small():
    tile = Tile(128, 64, 8, 4)
    assert tile.within(384, 2, 232448).stages == 4
    assert tile.within(384, 2, 101376).stages == 1
    assert tile.within(192, 2, 101376).stages == 3


# Activations


@triton.jit
def _activate(gate_ptr, up_ptr, out_ptr, size, limit, GATE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at, mask=at < size)
    up = tl.load(up_ptr + at, mask=at < size)
    out = triton_products.activate(gate, up, 1.702, limit, GATE)
    tl.store(out_ptr + at, out, mask=at < size)


EVERY_GATE = [("silu_mul", 7.0), ("relu2", 7.0)] + [
    (name, limit) for name in ("clamped_swiglu", "clamped_silu_mul") for limit in (7.0, 0.8, 1e-3)
]


@pytest.mark.parametrize(("name", "limit"), EVERY_GATE)
@pytest.mark.parametrize("of_up", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_of_every_number_have_the_bits_of_eager(name, dtype, limit, of_up):
    """But for what one step of float32 in an exponential flips, and seldom: one step, or two where up multiplies it."""
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    up = torch.linspace(-9, 9, len(gate)).to(dtype)
    gate, up = (up, gate) if of_up else (gate, up)
    gate, up = gate.to(DEVICE), up.to(DEVICE)
    out = torch.empty_like(gate)
    _activate[(16,)](gate, up, out, len(gate), limit, GATE=name, BLOCK=4096)
    activation = Activation(name, limit=limit)
    expected = activation.reference(gate if name == "relu2" else torch.cat([gate, up]))
    assert_few_flips(out, expected, at_least=16, most=2 if of_up else 1)


# Tables


def _table_rows():
    folder = resources.files("custom_ops.tables")
    for entry in folder.iterdir():
        if entry.name.startswith(tiles.PREFIX):
            for kind, rows in json.loads(entry.read_text())["tiles"].items():
                for row in rows:
                    yield pytest.param(kind, row, id=f"{entry.name} {kind} {row['pairs']}")


@pytest.mark.parametrize(("kind", "row"), list(_table_rows()))
def test_a_row_of_the_tables_is_chosen_for_its_own_sizes(kind, row):
    dtype = torch.float8_e4m3fn if kind == "fp8_block" else torch.bfloat16
    weight = torch.empty(0, dtype=dtype)
    sizes = (row["experts"], row["hidden"], row["intermediate"])
    choice = tiles.choose(weight, sizes, row["pairs"])
    assert (choice.block_size, choice.pairs) == (row["block_size"], row["pairs"])
    assert choice.gate_up == Tile(**row["gate_up"])
    assert tiles.as_row(choice.down) == row["down"]
    if kind == "fp8_block":
        assert choice.gate_up.n % 128 == 0
        assert (choice.gate_up.k, choice.down.k) == (128, 128)


@given(
    st.tuples(st.integers(1, 512), st.integers(1, 20000), st.integers(1, 20000)),
    st.integers(0, 2**20),
    st.sampled_from((torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8)),
)
def test_there_is_a_choice_for_any_sizes(sizes, pairs, dtype):
    weight = torch.empty(0, dtype=dtype)
    choice = tiles.choose(weight, sizes, pairs)
    same = tiles.choose(weight, sizes, pairs, block_size=choice.block_size)
    assert same.block_size == choice.block_size
    assert tiles.choose(weight, sizes, pairs, few=True).strips is not None


def test_more_pairs_never_take_smaller_blocks():
    weight = torch.empty(0, dtype=torch.bfloat16)
    found = [tiles.choose(weight, (128, 2048, 768), 2**n).block_size for n in range(18)]
    assert found == sorted(found)


# On a GPU, at real sizes but for the number of experts

REAL = {
    "Qwen3-30B-A3B": Shape(tokens=1, top_k=8, experts=16, hidden=2048, intermediate=768),
    "gpt-oss-20b": Shape(
        tokens=1,
        top_k=4,
        experts=8,
        hidden=2880,
        intermediate=2880,
        activation="clamped_swiglu",
        interleaved=True,
        biased=True,
        transposed=True,
    ),
    "GLM-5-Next": Shape(
        tokens=1,
        top_k=8,
        experts=12,
        hidden=4096,
        intermediate=2048,
        activation="clamped_silu_mul",
        limit=0.8,
    ),
    "a slice of DeepSeek-V3": Shape(
        tokens=1, top_k=4, experts=4, hidden=7168, intermediate=2048, elsewhere=True
    ),
}


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 64, 512, 1500])
@pytest.mark.parametrize("weights", ["16_bit", "fp8_block"])
@pytest.mark.parametrize("name", REAL)
def test_real_sizes_against_the_reference(name, weights, tokens):
    shape = dataclasses.replace(REAL[name], tokens=tokens, weights=weights)
    problem = shape.problem("cuda")
    out = run(
        problem, triton_experts.block_size(tokens, shape.top_k, problem.gate_up, problem.down)
    )
    args, kwargs = problem.arguments()
    expected = reference.fused_moe(*args, **kwargs)
    difference = (out.double() - expected.double()).norm() / expected.double().norm()
    # The matrix units keep about 14 bits of a sum of products of FP8 codes.
    assert float(difference) <= (2e-2 if weights == "fp8_block" else 4e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["16_bit", "fp8_block"])
@pytest.mark.parametrize("tokens", [1, 100, 700, 3000])
def test_warps_with_roles_give_the_same_bits(weights, tokens):
    """Half blocks, whole ones, and more tiles than multiprocessors."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    shape = Shape(tokens, 3, 9, 1024, 384, weights=weights, routing="skewed")
    problem = shape.problem("cuda")
    k = 64 if weights == "16_bit" else 128
    expected = run(problem, 128, *[Tile(128, k, 8, 3, halve=True)] * 2)
    assert_same_bits(run(problem, 128, *[Tile(128, k, 4, 4, band=4, roles=True)] * 2), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("options", [{"ahead": 1}, {"ahead": 8}, {"keep": True}])
def test_what_is_asked_of_l2_changes_no_bit(weights, routing, options):
    problem = Shape(64, 2, 24, 512, 384, weights=weights, routing=routing).problem("cuda")
    tile = Tile(128, 128, 4, 2, True)
    asking = dataclasses.replace(tile, **options)
    assert_same_bits(run(problem, 16, asking, asking), run(problem, 16, tile, tile))


@pytest.mark.gpu
@pytest.mark.parametrize("weights", WEIGHTS)
def test_captured_in_a_cuda_graph_without_synchronization(weights):
    problem = dataclasses.replace(PLAIN, hidden=256, intermediate=256, weights=weights).problem()
    expected = run(problem, 16)
    aligned = align(problem, 16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            quantize = weights == "fp8_block"
            act = act_of(problem, aligned, None, quantize)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    first = act[0] if quantize else act
    used = aligned.sorted_ids < problem.sizes.pairs
    again = act_of(problem, aligned, None, quantize)
    assert_same_bits(first[used], (again[0] if quantize else again)[used])
    assert_same_bits(run(problem, 16), expected)
