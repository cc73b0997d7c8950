"""More rows than a grid has in y, more than 2^31 elements, more than 2^31 threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from custom_ops.quantization import reference as quantization
from custom_ops.scales import CODE_DTYPES, SCALE_LAYOUTS
from tests.custom_ops.cuda.inputs import EPS, assert_same_quantized, randn, reference
from tests.custom_ops.helpers import assert_same_bits, outputs
from tests.custom_ops.schemes import ASYMMETRIC, GATES, NORMS, SCHEMES, kernel, rest_of

pytestmark = pytest.mark.gpu


def test_more_rows_than_a_grid_has_in_y(ops) -> None:
    x = randn(200_003, 128, dtype=torch.bfloat16, spread=4)
    want = quantization.group_quant(x, 64, scale_layout="column_major", min_amax=1e-10)
    assert_same_quantized(ops.group_quant(x, 64, scale_layout="column_major"), want)
    weight = torch.ones(128, device="cuda", dtype=torch.bfloat16)
    got = ops.rms_norm(x, weight, EPS)
    assert torch.equal(got[-5:], ops.rms_norm(x[-5:], weight, EPS))


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(ops) -> None:
    cols = 8192
    rows = 2**31 // cols + 77
    x = torch.empty(rows, cols, device="cuda", dtype=torch.bfloat16)
    x.view(torch.int16).random_(0x3C00, 0x4100)
    weight = torch.ones(cols, device="cuda", dtype=torch.bfloat16)
    for layout in SCALE_LAYOUTS:
        whole = ops.group_quant(x, 128, scale_layout=layout)
        part = ops.group_quant(x[-100:], 128, scale_layout="row_major")
        for a, b in zip(whole, part, strict=True):
            assert torch.equal(a[-100:].contiguous().view(torch.uint8), b.view(torch.uint8))
        del whole
    for name, op in {
        "silu_mul": lambda t: ops.silu_mul_group_quant(t, t, 128),
        "norm": lambda t: ops.rms_norm_group_quant(t, weight, EPS, 128),
    }.items():
        whole, part = op(x), op(x[-100:])
        for a, b in zip(whole, part, strict=True):
            assert torch.equal(a[-100:].view(torch.uint8), b.view(torch.uint8)), name
        del whole
    half = x[:, : cols // 2]  # the same offsets through the scalar path
    odd = torch.as_strided(x.view(-1), half.shape, half.stride(), 1)
    whole, part = ops.group_quant(odd, 128), ops.group_quant(odd[-100:].clone(), 128)
    assert torch.equal(whole[0][-100:].view(torch.uint8), part[0].view(torch.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
def test_more_than_2_to_the_31_threads(ops, layout: str) -> None:
    """The numbers of the threads need 64 bits. The rows are one row: 2^34 elements would not fit."""
    row = randn(1, 8192, dtype=torch.bfloat16)
    codes, scale = ops.group_quant(row.expand(2**21 + 5, 8192), 128, scale_layout=layout)
    want = quantization.group_quant(row, 128, scale_layout="row_major", min_amax=1e-10)
    for at in (0, 2**20, 2**21 - 1, 2**21 + 4):
        assert torch.equal(codes[at].view(torch.uint8), want[0][0].view(torch.uint8))
    assert bool((scale == want[1]).all())


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [*SCHEMES, *ASYMMETRIC])
def test_schemes_of_more_than_2_to_the_31_elements(ops, scheme: str) -> None:
    """2^31 + 8192 elements: the last row lies past the reach of 32-bit offsets."""
    run = kernel(scheme, "cuda")
    cols = 8192
    x = torch.empty(2**31 // cols + 1, cols, device="cuda", dtype=torch.bfloat16)
    x.view(torch.int16).random_(0x3C00, 0x4100)
    if scheme in ("tensor_quant", "tensor_quant_asymmetric"):
        x[-1, -1] = 100.0  # the largest of all, and the last
    got = [t[-1:] if t.numel() > 1 else t for t in outputs(run(x, *rest_of(scheme)))]
    want = outputs(reference(scheme, x[-1:], *rest_of(scheme)))
    assert_same_bits(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", CODE_DTYPES)
def test_blocks_of_more_than_2_to_the_31_elements(ops, dtype: torch.dtype) -> None:
    """The last row is a block row of its own, as 2^31 elements are a whole number of them."""
    run = kernel("block_quant", "cuda")
    cols = 8192
    x = torch.empty(2**31 // cols + 1, cols, device="cuda", dtype=torch.bfloat16)
    x.view(torch.int16).random_(0x3C00, 0x4100)
    got = [t[-1:] for t in outputs(run(x, dtype=dtype))]
    assert_same_bits(got, outputs(reference("block_quant", x[-1:].clone(), dtype=dtype)))
    odd = torch.as_strided(x.view(-1), (x.shape[0], cols - 1), x.stride(), 1)  # no vectors
    got = [t[-1:] for t in outputs(run(odd, dtype=dtype))]
    assert_same_bits(got, outputs(reference("block_quant", odd[-1:].clone(), dtype=dtype)))


@pytest.mark.slow
@pytest.mark.parametrize("producer", GATES)
def test_gates_of_more_than_2_to_the_31_elements(ops, producer: str) -> None:
    cols = 8192
    x = torch.empty(2**31 // cols + 1, cols, device="cuda", dtype=torch.bfloat16)
    x.view(torch.int16).random_(0x3C00, 0x4100)
    numbers = (1.702, 7.0) if producer == "clamped_swiglu" else ()
    for scheme in ("group_quant", "token_quant", "tensor_quant_static", "token_quant_asymmetric"):
        run = kernel(f"{producer}_{scheme}", "cuda")
        rest = (*numbers, *rest_of(scheme))
        got, want = outputs(run(x, x, *rest)), outputs(run(x[-3:], x[-3:], *rest))
        assert_same_bits([t[-3:].contiguous() for t in got], [t.contiguous() for t in want])
        del got


@pytest.mark.slow
@pytest.mark.parametrize("producer", NORMS)
def test_norms_of_more_than_2_to_the_31_elements(ops, producer: str) -> None:
    cols = 8192
    x = torch.empty(2**31 // cols + 1, cols, device="cuda", dtype=torch.bfloat16)
    x.view(torch.int16).random_(0x3C00, 0x4100)
    weight = torch.ones(cols, device="cuda", dtype=torch.bfloat16)
    for scheme in ("token_quant", "tensor_quant_static", "token_quant_asymmetric"):
        run = kernel(f"{producer}_{scheme}", "cuda")
        args = (*((x, x) if producer == "add_rms_norm" else (x,)), weight, EPS, *rest_of(scheme))
        few = [t[-3:] if isinstance(t, Tensor) and t.dim() == 2 else t for t in args]
        got, want = outputs(run(*args)), outputs(run(*few))
        assert_same_bits([t[-3:] for t in got], want)
        del got
