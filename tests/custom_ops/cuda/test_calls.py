"""How the ops are called: addresses, streams, graphs, devices, what they refuse, schemas."""

from __future__ import annotations

import pytest
import torch

from custom_ops import library
from custom_ops.scales import SCALE_LAYOUTS
from tests.custom_ops.cuda.inputs import (
    DTYPES,
    EPS,
    X,
    assert_same_quantized,
    layouts,
    randn,
    with_special,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES)
def test_alignment_does_not_matter(ops, dtype: torch.dtype) -> None:
    x = with_special(randn(37, 384, dtype=dtype))
    up = with_special(randn(37, 384, dtype=dtype))
    clean = randn(37, 384, dtype=dtype)
    weight = randn(384, dtype=dtype)
    odd_weight = torch.empty(385, device="cuda", dtype=dtype)[1:].copy_(weight)
    quantized = ops.group_quant(x, 128)
    product, product_q = ops.silu_mul(x, up), ops.silu_mul_group_quant(x, up, 128)
    normed = ops.add_rms_norm_group_quant(clean, up.nan_to_num(0, 1, 1), weight, EPS, 64)
    for name, other in layouts(x).items():
        assert_same_quantized(ops.group_quant(other, 128), quantized)
        torch.testing.assert_close(
            ops.silu_mul(other, layouts(up)[name]), product, rtol=0, atol=0, equal_nan=True
        )
        assert_same_quantized(ops.silu_mul_group_quant(other, up, 128), product_q)
        other_clean, residual = layouts(clean)[name], layouts(up.nan_to_num(0, 1, 1))[name]
        for w in (weight, odd_weight):
            again = ops.add_rms_norm_group_quant(other_clean, residual, w, EPS, 64)
            assert_same_quantized(again, normed)
            assert torch.equal(again[2], normed[2])


def test_current_stream_and_graph(ops) -> None:
    x = randn(64, 1024, dtype=torch.bfloat16)
    want = ops.group_quant(x, 128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # fails unless the launch goes to the capturing stream
        got = ops.group_quant(x, 128)
    x.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got[1], want[1] * 2)


def test_device_of_the_tensor(ops) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = randn(4, 256, dtype=torch.bfloat16)
    got = ops.group_quant(x.to("cuda:1"), 128)
    assert got[0].device == torch.device("cuda:1")
    assert_same_quantized(tuple(t.to("cuda:0") for t in got), ops.group_quant(x, 128))
    assert torch.cuda.current_device() == 0


BAD = {
    "must be on a CUDA device": lambda ops: ops.rms_norm(
        torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(8, **X), EPS
    ),
    "on the device of": lambda ops: ops.rms_norm(
        torch.ones(2, 8, **X), torch.ones(8, dtype=torch.bfloat16), EPS
    ),
    "group_size": lambda ops: ops.group_quant(torch.ones(2, 256, **X), 16),
    "dtype must": lambda ops: ops.group_quant(torch.ones(2, 128, **X), 128, dtype=torch.uint8),
    "scale_format must": lambda ops: ops.token_quant(
        torch.ones(2, 128, **X), scale_format="ue8m0_packed"
    ),
    "for scale_format 'ue8m0_packed'": lambda ops: ops.group_quant(
        torch.ones(2, 128, **X), 128, scale_format="ue8m0_packed"
    ),
    "scale_mode must": lambda ops: ops.token_quant(torch.ones(2, 128, **X), scale_mode="log"),
    "code_mode must": lambda ops: ops.tensor_quant(torch.ones(2, 128, **X), code_mode="log"),
    "scale must be float32": lambda ops: ops.tensor_quant_static(
        torch.ones(2, 128, **X), torch.ones(2, device="cuda")
    ),
    "zero_point must be int8": lambda ops: ops.tensor_quant_static_asymmetric(
        torch.ones(2, 128, **X), torch.ones(1, device="cuda"), torch.ones(1, device="cuda")
    ),
    "min_scale must": lambda ops: ops.token_quant(torch.ones(2, 128, **X), min_scale=-1.0),
    "multiple of group_size": lambda ops: ops.group_quant(torch.ones(2, 100, **X), 128),
    "scale_layout": lambda ops: ops.group_quant(torch.ones(2, 128, **X), 128, scale_layout="row"),
    "min_amax": lambda ops: ops.group_quant(torch.ones(2, 128, **X), 128, min_amax=-1.0),
    "bfloat16 or float16": lambda ops: ops.group_quant(torch.ones(2, 128, device="cuda"), 128),
    "shape of gate": lambda ops: ops.silu_mul(torch.ones(2, 8, **X), torch.ones(2, 9, **X)),
    "dtype of gate": lambda ops: ops.silu_mul(torch.ones(2, 8, **X), torch.ones(2, 8, **X).half()),
    "weight must be contiguous": lambda ops: ops.rms_norm(
        torch.ones(2, 8, **X), torch.ones(9, **X), EPS
    ),
    "weight_mode must": lambda ops: ops.rms_norm(
        torch.ones(2, 8, **X), torch.ones(8, **X), EPS, weight_mode="gemma"
    ),
    "'rounded'": lambda ops: ops.rms_norm(torch.ones(2, 8, **X), torch.ones(8, device="cuda"), EPS),
    "shape of x": lambda ops: ops.add_rms_norm(
        torch.ones(2, 8, **X), torch.ones(1, 8, **X), torch.ones(8, **X), EPS
    ),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_arguments(ops, words: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=words):
        BAD[words](ops)


def test_schemas_are_those_of_the_ops(ops) -> None:
    for name, op in library.ops().items():
        if hasattr(ops, name):
            ours = str(getattr(ops, name).default._schema)
            assert ours == str(op.overload._schema).replace("custom_ops::", "custom_ops_cuda::")


@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
def test_opcheck(ops, layout: str) -> None:
    x = randn(3, 5, 256, dtype=torch.bfloat16)
    weight = torch.ones(256, **X)
    tests = ("test_schema", "test_faketensor")
    quant = {"scale_layout": layout}
    torch.library.opcheck(ops.group_quant.default, (x, 128), quant, test_utils=tests)
    torch.library.opcheck(
        ops.silu_mul_group_quant.default, (x, x.clone(), 64), quant, test_utils=tests
    )
    arguments = (x, x.clone(), weight, EPS, 128)
    torch.library.opcheck(ops.add_rms_norm_group_quant.default, arguments, quant, test_utils=tests)
