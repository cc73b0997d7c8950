"""A norm that is quantized and wanted itself: the op with an output more is the one without it, and the norm."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import custom_ops
from tests.custom_ops.helpers import DEVICE, assert_same_bits, bf16, implementation, outputs
from tests.custom_ops.schemes import KEPT, KERNELS, calls, kernel

every_kernel = pytest.mark.parametrize("which", ["reference", *KERNELS])
every_pair = pytest.mark.parametrize(("producer", "scheme"), KEPT)


def check(producer, scheme, which, *args, **options):
    """Bit for bit the op of the pair in the same implementation; and the norm, whose group size may be another."""
    got = outputs(kernel(f"{producer}_and_{scheme}", which)(*args, **options))
    (q, scale, *rest) = outputs(implementation(f"{producer}_{scheme}", which)(*args, **options))
    own = {"weight_mode": options["weight_mode"]} if "weight_mode" in options else {}
    count = len(inspect.signature(custom_ops.ops()[producer].public).parameters) - 1
    normed = outputs(implementation(producer, which)(*args[:count], **own))[0]
    if scheme == "group_quant" and args[-1] != 128 and which == "triton":
        # it sums in groups of its own, so that the norm that is quantized is another by a rounding
        assert got[2].shape == normed.shape
        assert got[2].stride() == normed.stride()
        again = implementation("group_quant", "reference")
        keywords = {key: value for key, value in options.items() if key not in own}
        assert_same_bits(got[:2], outputs(again(got[2], args[-1], **keywords)))
        normed = got[2]
    assert_same_bits(got, (q, scale, normed, *rest))


@every_kernel
@every_pair
@given(data=st.data())
def test_a_kernel_gives_both(producer, scheme, which, data):
    call = data.draw(calls(producer, scheme))
    check(producer, scheme, which, *call.args, **call.options)


@every_kernel
@every_pair
@pytest.mark.parametrize("hidden", [384, 7168, 16384 + 128])
def test_short_and_long_rows(hidden, producer, scheme, which):
    torch.manual_seed(2)
    for tokens in (1, 5, 700) if DEVICE == "cuda" else (2,):
        rows = [bf16(tokens, hidden, device=DEVICE) for _ in range(1 + (producer != "rms_norm"))]
        rest = (128,) if scheme == "group_quant" else ()
        check(producer, scheme, which, *rows, bf16(hidden, device=DEVICE), 1e-6, *rest)


@every_pair
def test_schema_and_docstring(producer, scheme):
    op = custom_ops.ops()[f"{producer}_and_{scheme}"]
    without = custom_ops.ops()[f"{producer}_{scheme}"]
    assert list(op.signature.parameters.values()) == list(without.signature.parameters.values())
    returns = [r.name for r in op.overload._schema.returns]
    residual = ["residual_out"] if producer == "add_rms_norm" else []
    assert returns == ["q", "scale", "out", *residual]
    assert "an output besides" in op.public.__doc__
    assert ", then out" in op.public.__doc__


@every_pair
def test_no_tokens(producer, scheme):
    x = bf16(0, 256, device=DEVICE)
    args = (x,) if producer == "rms_norm" else (x, x)
    args += (bf16(256, device=DEVICE), 1e-6, *((128,) if scheme == "group_quant" else ()))
    result = outputs(getattr(custom_ops, f"{producer}_and_{scheme}")(*args))
    assert_same_bits(
        result, outputs(implementation(f"{producer}_and_{scheme}", "reference")(*args))
    )
