"""Comparisons and sample calls that the tests of custom_ops share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from custom_ops import library

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def outputs(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def implementation(op: str, name: str) -> Callable[..., Any]:
    """One implementation of an op, called with the arguments of the op."""
    declared = library.ops()[op]
    chosen = next(i for i in declared.implementations if i.name == name)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound, keywords = declared._bind(args, kwargs)
        return chosen.function(*bound, **keywords)

    return call


def steps(actual: Tensor, expected: Tensor) -> Tensor:
    """How many representable values lie between two tensors of one dtype; two NaNs are equal."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    ordered = []
    for t in (actual, expected):
        bits = t.contiguous().view(_INTEGERS[t.element_size()]).to(torch.int64)
        magnitude = bits & (2 ** (8 * t.element_size() - 1) - 1)
        ordered.append(torch.where(bits < 0, -magnitude, magnitude))
    nan_actual, nan_expected = actual.float().isnan(), expected.float().isnan()
    distance = (ordered[0] - ordered[1]).abs()
    distance[nan_actual & nan_expected] = 0
    distance[nan_actual ^ nan_expected] = 2**40
    return distance


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Same dtype, shape, strides and bits, except that any NaN equals any NaN; -0 is not 0."""
    for a, e in zip(outputs(actual), outputs(expected), strict=True):
        assert a.stride() == e.stride()
        different = steps(a, e) != 0
        assert not different.any(), (
            f"{int(different.sum())} of {a.numel()} differ, first at {different.nonzero()[0].tolist()}"
        )
        zero = (a.float() == 0) & (e.float() == 0)
        assert torch.equal(a.float().signbit()[zero], e.float().signbit()[zero])


def assert_few_flips(
    actual: Any, expected: Any, most: int = 1, fraction: float = 1e-4, at_least: int = 2
) -> None:
    """Same strides; at most `fraction` of the values (or `at_least` of them) differ, by `most` steps."""
    for a, e in zip(outputs(actual), outputs(expected), strict=True):
        assert a.stride() == e.stride()
        distance = steps(a, e)
        count, largest = int((distance != 0).sum()), int(distance.max() if a.numel() else 0)
        assert largest <= most, f"{count} of {a.numel()} differ, by up to {largest} steps"
        assert count <= max(at_least, fraction * a.numel()), f"{count} of {a.numel()} differ"


@contextmanager
def fake_mode() -> Iterator[Callable[[Any], Any]]:
    """A FakeTensorMode, and a function that turns the tensors of a structure into fakes."""
    with FakeTensorMode() as mode:
        yield lambda tree: pytree.tree_map_only(Tensor, mode.from_tensor, tree)


def assert_refused(op: Callable[..., Any], args: Any, kwargs: dict[str, Any], message: str) -> None:
    """A ValueError that names the op, the same with fakes. message: a pattern of it."""
    with pytest.raises(ValueError, match=message) as real:
        op(*args, **kwargs)
    assert str(real.value).startswith(f"{op.__name__}: ")
    with fake_mode() as fake, pytest.raises(ValueError, match=message) as faked:
        op(*fake(args), **fake(kwargs))
    assert str(faked.value) == str(real.value)


def bf16(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randn(shape).to(torch.bfloat16).to(device)


def fp8(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randn(shape).to(torch.float8_e4m3fn).to(device)


def samples(device: str = "cpu", tokens: tuple[int, ...] = (2, 3), hidden: int = 256) -> list:
    """(op name, args, kwargs): a call of every op, in the layouts and modes that it has."""
    x, r = bf16(*tokens, hidden, device=device), bf16(*tokens, hidden, device=device)
    w = bf16(hidden, device=device)
    packed = bf16(*tokens, 2 * hidden, device=device)
    gate, up = packed.chunk(2, -1)
    a, b = fp8(*tokens, hidden, device=device), fp8(130, hidden, device=device)
    a_scale = torch.rand(*tokens, hidden // 128, device=device)
    b_scale = torch.rand(2, hidden // 128, device=device)
    tma = {"scale_layout": "column_major_tma"}
    packed_scale = {**tma, "scale_format": "ue8m0_packed"}
    int8 = {"dtype": torch.int8, "min_amax": 0.0, "min_scale": 1e-5, "scale_mode": "divide_input"}
    given = torch.tensor([0.02], device=device)
    zero = torch.tensor([-7], dtype=torch.int8, device=device)
    even, odd = packed[..., ::2], packed[..., 1::2]
    swiglu = (1.702, 7.0)
    experts = bf16(2, math.prod(tokens), 2 * hidden, device=device)
    counts = torch.full(experts.shape[:1], experts.shape[1], dtype=torch.int32, device=device)
    return [
        ("group_quant", (x, 128), {}),
        ("group_quant", (x, 64), {"scale_layout": "column_major", "min_amax": 0.0}),
        ("group_quant", (packed[..., hidden:], 128), tma),
        ("group_quant", (x, 32), {**packed_scale, **int8}),
        ("token_quant", (x,), {}),
        ("token_quant", (packed[..., hidden:],), {**int8, "code_mode": "reciprocal_input"}),
        ("tensor_quant", (x,), {}),
        ("tensor_quant_static", (x, given), {"dtype": torch.int8}),
        ("block_quant", (x.flatten(0, -2) if tokens else x.view(1, -1),), {}),
        ("token_quant_asymmetric", (x,), {"min_scale": 1e-5}),
        ("tensor_quant_asymmetric", (packed[..., hidden:],), {"scale_mode": "reciprocal_input"}),
        ("tensor_quant_static_asymmetric", (x, given, zero.int()), {"code_mode": "reciprocal"}),
        ("silu_mul", (gate, up), {}),
        ("silu_mul_group_quant", (gate, up, 128), tma),
        ("silu_mul_group_quant", (gate, up, 64), {}),
        ("silu_mul_token_quant", (gate, up), int8),
        ("silu_mul_token_quant_asymmetric", (gate, up), {"min_scale": 1e-5}),
        ("silu_mul_tensor_quant", (gate, up), {}),
        ("silu_mul_tensor_quant_static", (gate, up, given), {}),
        ("silu_mul_tensor_quant_asymmetric", (gate, up), {}),
        ("silu_mul_tensor_quant_static_asymmetric", (gate, up, given, zero), {}),
        ("silu_mul_group_quant_masked", (experts, counts, 64), {}),
        ("gelu_tanh_mul", (gate, up), {}),
        ("gelu_tanh_mul_group_quant", (gate, up, 32), {"scale_format": "ue8m0"}),
        ("gelu_tanh_mul_token_quant", (gate, up), {}),
        ("gelu_tanh_mul_token_quant_asymmetric", (gate, up), {"scale_mode": "divide_input"}),
        ("gelu_tanh_mul_tensor_quant", (gate, up), {}),
        ("gelu_tanh_mul_tensor_quant_static", (gate, up, given), {}),
        ("gelu_tanh_mul_tensor_quant_asymmetric", (gate, up), {}),
        ("gelu_tanh_mul_tensor_quant_static_asymmetric", (gate, up, given, zero), {}),
        ("clamped_swiglu", (even, odd, *swiglu), {}),
        ("clamped_swiglu_group_quant", (even, odd, *swiglu, 128), packed_scale),
        ("clamped_swiglu_token_quant", (even, odd, *swiglu), {}),
        ("clamped_swiglu_token_quant_asymmetric", (even, odd, *swiglu), {}),
        ("clamped_swiglu_tensor_quant", (even, odd, *swiglu), {}),
        ("clamped_swiglu_tensor_quant_static", (even, odd, *swiglu, given), {}),
        ("clamped_swiglu_tensor_quant_asymmetric", (even, odd, *swiglu), {}),
        ("clamped_swiglu_tensor_quant_static_asymmetric", (even, odd, *swiglu, given, zero), {}),
        ("rms_norm", (x, w, 1e-6), {}),
        ("rms_norm", (x, w.float(), 1e-6), {"weight_mode": "float32_plus_one"}),
        ("add_rms_norm", (x, r, w, 1e-6), {}),
        ("add_rms_norm", (x, r, w.float(), 1e-6), {"weight_mode": "float32"}),
        ("rms_norm_group_quant", (x, w, 1e-6, 128), tma),
        ("rms_norm_token_quant", (x, w, 1e-6), int8),
        ("rms_norm_token_quant_asymmetric", (x, w, 1e-6), {"min_scale": 1e-5}),
        ("rms_norm_tensor_quant", (x, w, 1e-6), {}),
        ("rms_norm_tensor_quant_static", (x, w, 1e-6, given), {}),
        ("add_rms_norm_group_quant", (x, r, w, 1e-6, 128), {}),
        ("add_rms_norm_group_quant", (gate, up, w, 1e-6, 64), {"scale_layout": "column_major"}),
        ("add_rms_norm_token_quant", (x, r, w, 1e-6), {}),
        ("rms_norm_and_group_quant", (x, w, 1e-6, 128), tma),
        ("rms_norm_and_token_quant", (x, w, 1e-6), int8),
        ("add_rms_norm_and_group_quant", (x, r, w, 1e-6, 128), {}),
        ("add_rms_norm_and_token_quant", (x, r, w, 1e-6), {}),
        ("add_rms_norm_token_quant_asymmetric", (x, r, w, 1e-6), {}),
        ("add_rms_norm_tensor_quant", (x, r, w, 1e-6), {}),
        ("add_rms_norm_tensor_quant_static", (x, r, w, 1e-6, given), {}),
        ("rms_norm_tensor_quant_asymmetric", (x, w, 1e-6), {"min_scale": 1e-5}),
        ("rms_norm_tensor_quant_static_asymmetric", (x, w, 1e-6, given, zero), {}),
        ("add_rms_norm_tensor_quant_asymmetric", (x, r, w, 1e-6), {}),
        ("add_rms_norm_tensor_quant_static_asymmetric", (x, r, w, 1e-6, given, zero), {}),
        ("block_scaled_mm", (a, a_scale, b, b_scale), {}),
        ("block_scaled_mm", (a, a_scale, b, b_scale), {"out_dtype": torch.float32}),
    ]


SAMPLE_IDS = [f"{i}-{name}" for i, (name, _, _) in enumerate(samples())]
