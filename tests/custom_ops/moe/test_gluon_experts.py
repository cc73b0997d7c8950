"""The kernels of experts whose warps have roles: the bits of the plain ones at any size and routing."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from custom_ops.moe import reference
from custom_ops.moe.tiles import Tile
from tests.custom_ops.helpers import assert_same_bits
from tests.custom_ops.moe.problems import ROUTINGS, Shape, shapes
from tests.custom_ops.moe.products import BLOCK, MODELS, Products
from tests.custom_ops.moe.test_triton_experts import run

pytest.importorskip("triton", reason="needs triton")
gluon_experts = importlib.import_module("custom_ops.moe.gluon_experts")
gluon_finish = importlib.import_module("custom_ops.moe.gluon_finish")
triton_experts = importlib.import_module("custom_ops.moe.triton_experts")
triton_products = importlib.import_module("custom_ops.moe.triton_products")
gluon = importlib.import_module("triton.experimental.gluon")
gl = importlib.import_module("triton.experimental.gluon.language")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs compute capability 9.0",
    ),
]


def with_roles(weights: str, stages: int = 4, band: int = 4) -> Tile:
    return Tile(128, 64 if weights == "16_bit" else 128, 4, stages, band=band, roles=True)


def plain(weights: str) -> Tile:
    return Tile(128, 64 if weights == "16_bit" else 128, 8, 3, halve=True)


# Each is compiled anew, in seconds: what is drawn are routings, which are not.
SIZES = [  # stages, band, hidden and intermediate size
    (4, 4, 640, 384),  # more than there is shared memory for
    (2, 1, 128, 128),
    (3, 2, 1024, 512),
]


@pytest.mark.parametrize("weights", ["16_bit", "fp8_block"])
@pytest.mark.parametrize(("stages", "band", "hidden", "intermediate"), SIZES)
@settings(max_examples=12)
@given(data=st.data())
def test_the_bits_of_the_plain_kernels(weights, stages, band, hidden, intermediate, data):
    """Columns that fill half of a tile, a single step and a single tile, fewer pairs than programs and more."""
    shape = data.draw(
        shapes(
            weights=weights,
            activation="silu_mul",
            dtype=torch.bfloat16,
            tokens=[1, 7, 64, 130, 300],
            experts=[1, 3, 9, 40],
            hidden=hidden,
            intermediate=intermediate,
            interleaved=False,
            biased=False,
            transposed=False,
        )
    )
    problem = shape.problem("cuda")
    out = run(problem, BLOCK, *[with_roles(weights, stages, band)] * 2)
    assert_same_bits(out, run(problem, BLOCK, *[plain(weights)] * 2))


activate = triton_products.activate
silus = gluon_finish.silus
LINEAR = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def _of_words(gates, ups, out):
    at = gl.program_id(0) * 128 + gl.arange(0, 128, layout=LINEAR)
    gl.store(out + at, silus(gl.load(gates + at), gl.load(ups + at)))


@gluon.jit
def _one_by_one(gates, ups, out):
    at = gl.program_id(0) * 128 + gl.arange(0, 128, layout=LINEAR)
    gl.store(out + at, activate(gl.load(gates + at), gl.load(ups + at), 0.0, 0.0, "silu_mul"))


@pytest.mark.parametrize("seed", range(4))
def test_silu_of_all_gates(seed):
    """The fast inverse and power of two are not exact, their product is, once it is rounded: of all 65536 gates."""
    gates = torch.arange(1 << 16, dtype=torch.int32, device="cuda").to(torch.int16)
    ups = torch.full_like(gates, 0x3F80)  # 1
    if seed > 0:
        generator = torch.Generator("cuda").manual_seed(seed)
        any_bits = torch.randint(1 << 16, gates.shape, device="cuda", generator=generator)
        ups = any_bits.to(torch.int32).to(torch.int16)
    ours, expected = (torch.empty_like(gates).view(torch.bfloat16) for _ in range(2))
    words = [t.view(torch.int32) for t in (gates, ups, ours)]
    _of_words[(words[0].numel() // 128,)](*words, num_warps=4)
    _one_by_one[(gates.numel() // 128,)](
        gates.view(torch.bfloat16), ups.view(torch.bfloat16), expected, num_warps=4
    )
    assert_same_bits(ours, expected)


@pytest.mark.parametrize("weights", ["16_bit", "fp8_block"])
def test_other_activations_and_dtypes(weights):
    shape = Shape(
        300, 2, 5, 256, 256, weights=weights, activation="gelu_tanh_mul", dtype=torch.float16
    )
    problem = shape.problem("cuda")
    out = run(problem, BLOCK, *[with_roles(weights)] * 2)
    assert_same_bits(out, run(problem, BLOCK, *[plain(weights)] * 2))


@pytest.mark.parametrize("weights", ["16_bit", "fp8_block"])
@pytest.mark.parametrize("tokens", [1, 100, 700, 3000])
def test_against_the_reference(weights, tokens):
    problem = Shape(tokens, 3, 9, 1024, 384, weights=weights, routing="skewed").problem("cuda")
    out = run(problem, BLOCK, *[with_roles(weights)] * 2)
    args, kwargs = problem.arguments()
    expected = reference.fused_moe(*args, **kwargs).double()
    difference = (out.double() - expected).norm() / expected.norm()
    # The matrix units keep about 14 bits of a sum of products of FP8 codes.
    assert float(difference) <= (2e-2 if weights == "fp8_block" else 4e-3)


def refused(products: Products) -> list[str | None]:
    """Why the kernels with roles would not take a product."""
    none = {"bias": None, "w_scale": products.gate_up_scale}
    return [
        gluon_experts.unsupported(
            products.x, products.gate_up, products.aligned, gate="silu_mul", **none
        ),
        gluon_experts.unsupported(products.down[0], products.down, products.aligned, **none),
    ]


@pytest.mark.parametrize("routing", [r for r in ROUTINGS if r != "repeated"])
@pytest.mark.parametrize("tokens", [1, 129, 512, 4096, 9000])
@pytest.mark.parametrize("model", MODELS)
def test_sizes_of_models(model, tokens, routing):
    """Twice: which multiprocessor has which tile is another thing each time."""
    products = Products.of(tokens, *MODELS[model], routing)
    assert refused(products) == [None, None]
    expected = products.first(plain("fp8_block"))
    for _ in range(2):
        act = products.first(with_roles("fp8_block"))
        for ours, theirs in zip(act, expected, strict=True):
            assert torch.equal(products.rows(ours), products.rows(theirs))
    wanted = products.second(expected, plain("fp8_block"))
    for _ in range(2):
        assert_same_bits(products.second(expected, with_roles("fp8_block")), wanted)


@pytest.mark.parametrize("weights", ["16_bit", "fp8_block"])
def test_experts_that_are_all_elsewhere_have_no_tile(weights):
    problem = Shape(40, 1, 4, 256, 128, weights=weights, elsewhere=True).problem("cuda")
    problem.topk_ids.fill_(1)  # every other one is elsewhere
    out = run(problem, BLOCK, *[with_roles(weights)] * 2)
    assert not out.any()


def test_a_graph_hands_out_all_tiles_at_each_replay():
    products = Products.of(700, 8, 128, 1024, 384, "skewed")
    expected = products.rows(products.first(with_roles("fp8_block"))[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = products.first(with_roles("fp8_block"))[0]
    for _ in range(5):
        captured.view(torch.uint8).zero_()
        graph.replay()
        assert torch.equal(products.rows(captured), expected)
