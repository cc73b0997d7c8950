"""Every producer with every scheme: the fused op is the one and then the other, with nothing left out.

Without quantization a producer's implementations may differ by a step here and there. What quantizes it must
not add to that: its codes and scales are, bit for bit, those of what its own implementation returns.
"""

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
from tests.custom_ops.schemes import (
    ASYMMETRIC,
    GATES,
    KERNELS,
    NORMS,
    PAIRS,
    PRODUCERS,
    SCHEMES,
    calls,
    kernel,
    rest_of,
)

every_kernel = pytest.mark.parametrize("which", KERNELS)
every_pair = pytest.mark.parametrize(("producer", "scheme"), PAIRS)


def compose(producer, scheme, call, which):
    """The producer in one implementation, then the reference of the scheme."""
    produced, *rest = outputs(
        implementation(producer, which)(*call.inputs, **call.producer_options)
    )
    quantize = implementation(scheme, "reference")
    return (*outputs(quantize(produced, *call.rest, **call.scheme_options)), *rest)


@every_pair
@given(data=st.data())
def test_the_reference_is_the_composition(producer, scheme, data):
    call = data.draw(calls(producer, scheme))
    fused = implementation(f"{producer}_{scheme}", "reference")(*call.args, **call.options)
    assert_same_bits(fused, compose(producer, scheme, call, "reference"))


@every_kernel
@every_pair
@given(data=st.data())
def test_a_kernel_quantizes_its_own_values_bit_for_bit(producer, scheme, which, data):
    run = kernel(f"{producer}_{scheme}", which)
    call = data.draw(calls(producer, scheme))
    fused = outputs(run(*call.args, **call.options))
    expected = compose(producer, scheme, call, which)
    grouped = producer in NORMS and scheme == "group_quant" and call.rest != (128,)
    if grouped and which == "triton":
        # The kernel of the norm alone sums in groups of 128: here the order of the sum is another.
        for actual, wanted in zip(fused, expected, strict=True):
            assert (actual.shape, actual.stride(), actual.dtype) == (
                wanted.shape, wanted.stride(), wanted.dtype,
            )  # fmt: skip
        assert_same_bits(fused[2:], expected[2:])
        if call.options["scale_format"] == "float32":
            assert_few_flips(fused[:2], expected[:2], most=2**20, fraction=1e-2, at_least=64)
    else:
        assert_same_bits(fused, expected)


@every_pair
def test_signature_schema_and_docstring(producer, scheme):
    """Producer, scheme, and their keywords, in this order: what graphs and C++ kernels rely on."""
    name = f"{producer}_{scheme}"
    op, before, after = (custom_ops.ops()[n] for n in (name, producer, scheme))
    parts = [list(o.signature.parameters.values()) for o in (before, after)]
    keyword = inspect.Parameter.KEYWORD_ONLY
    positional = [p for part in (parts[0], parts[1][1:]) for p in part if p.kind is not keyword]
    keywords = [p for part in parts for p in part if p.kind is keyword]
    assert list(inspect.signature(op.public).parameters.values()) == positional + keywords
    arguments = op.overload._schema.arguments
    assert [a.name for a in arguments] == [p.name for p in positional + keywords]
    assert [a.kwarg_only for a in arguments] == [p.kind is keyword for p in positional + keywords]
    returns = [r.name for r in op.overload._schema.returns]
    residual = ["residual_out"] if producer == "add_rms_norm" else []
    codes = ["q"] if "static" in scheme else ["q", "scale"]
    codes += ["zero_point"] if scheme in ASYMMETRIC and "static" not in scheme else []
    assert returns == codes + residual or returns == [""]
    assert op.public.__doc__.startswith(f"`{scheme}({producer}(...), ...)` as one op.")
    assert op.public.__module__ == before.public.__module__


@every_kernel
@pytest.mark.parametrize("scheme", ["group_quant", "token_quant", "token_quant_asymmetric"])
@pytest.mark.parametrize("producer", PRODUCERS)
def test_a_row_gives_the_same_bits_in_any_batch(producer, scheme, which):
    torch.manual_seed(0)
    rows = [bf16(9, 384, device=DEVICE) for _ in range(1 if producer == "rms_norm" else 2)]
    rest = (bf16(384, device=DEVICE), 1e-6) if producer in NORMS else ()
    rest += (1.702, 7.0) if producer == "clamped_swiglu" else ()
    rest += (128,) if scheme == "group_quant" else ()
    run = kernel(f"{producer}_{scheme}", which)
    whole = run(*rows, *rest)
    for i in range(9):
        assert_same_bits(run(*(t[i] for t in rows), *rest), [t[i] for t in whole])


@every_kernel
@every_pair
def test_rows_longer_than_a_tile(producer, scheme, which):
    run = kernel(f"{producer}_{scheme}", which)
    torch.manual_seed(1)
    hidden = 16384 + 128
    rows = [bf16(2, hidden, device=DEVICE) for _ in range(1 if producer == "rms_norm" else 2)]
    inputs = (*rows, *((bf16(hidden, device=DEVICE), 1e-6) if producer in NORMS else ()))
    inputs += (1.702, 7.0) if producer == "clamped_swiglu" else ()
    extra = rest_of(scheme)
    fused = outputs(run(*inputs, *extra))
    produced, *others = outputs(implementation(producer, which)(*inputs))
    quantized = outputs(implementation(scheme, "reference")(produced, *extra))
    assert_same_bits(fused, (*quantized, *others))


@pytest.mark.parametrize("scheme", [*SCHEMES, *ASYMMETRIC])
@pytest.mark.parametrize("producer", GATES)
def test_halves_of_packed_and_interleaved_tensors_are_read_in_place(producer, scheme, monkeypatch):
    """Neither the halves of one tensor nor its even and odd columns are copied by the Triton kernels."""
    both = bf16(5, 2 * 256, device=DEVICE)
    scalars = (1.702, 7.0) if producer == "clamped_swiglu" else ()
    rest = rest_of(scheme, 64)
    run = implementation(f"{producer}_{scheme}", "triton")
    for gate, up in (both.chunk(2, -1), (both[:, ::2], both[:, 1::2])):
        expected = run(gate.contiguous(), up.contiguous(), *scalars, *rest)
        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "contiguous", None)
            actual = run(gate, up, *scalars, *rest)
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("scheme", [*SCHEMES, *ASYMMETRIC])
@pytest.mark.parametrize("producer", PRODUCERS)
def test_no_tokens(producer, scheme):
    x = bf16(0, 256, device=DEVICE)
    inputs = (x,) if producer == "rms_norm" else (x, x)
    inputs += (bf16(256, device=DEVICE), 1e-6) if producer in NORMS else ()
    inputs += (1.702, 7.0) if producer == "clamped_swiglu" else ()
    args = (*inputs, *rest_of(scheme))
    result = outputs(getattr(custom_ops, f"{producer}_{scheme}")(*args))
    assert_same_bits(result, implementation(f"{producer}_{scheme}", "reference")(*args))
    assert result[0].shape == (0, 256)
