"""A norm that is quantized and wanted itself: the op with an output more is the one without it, and the norm."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import custom_ops
from tests.custom_ops.helpers import (
    DEVICE,
    assert_few_flips,
    assert_same_bits,
    bf16,
    implementation,
    outputs,
)
from tests.custom_ops.schemes import KEPT, KERNELS, calls, kernel

every_kernel = pytest.mark.parametrize("which", ["reference", *KERNELS])
every_pair = pytest.mark.parametrize(("producer", "scheme"), KEPT)


def check(producer, scheme, which, *args, **options):
    """Bit for bit the op of the pair in the same implementation; and the norm, which Triton may sum otherwise."""
    got = outputs(kernel(f"{producer}_and_{scheme}", which)(*args, **options))
    (q, scale, *rest) = outputs(implementation(f"{producer}_{scheme}", which)(*args, **options))
    own = {"weight_mode": options["weight_mode"]} if "weight_mode" in options else {}
    count = len(inspect.signature(custom_ops.ops()[producer].public).parameters) - 1
    normed = outputs(implementation(producer, which)(*args[:count], **own))[0]
    regrouped = scheme == "group_quant" and args[-1] != 128
    if which == "triton" and (regrouped or got[2].is_cuda):
        # The tile of the pair is not that of the norm alone: some sums, and the norms that are quantized, are others by
        # a rounding.
        assert_few_flips(got[2], normed, fraction=1e-2 if regrouped else 1e-4)
        keywords = {key: value for key, value in options.items() if key not in own}
        rest_of_args = args[-1:] if scheme == "group_quant" else ()
        again = implementation(scheme, "reference")(got[2], *rest_of_args, **keywords)
        q, scale = outputs(again)
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
