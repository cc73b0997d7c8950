"""Every scheme, and every pair of a producer and a scheme: bit for bit the composition of the two."""

from __future__ import annotations

import itertools

import pytest
import torch

from custom_ops.scales import CODE_DTYPES, CODE_MODES, GROUP_SIZES
from tests.custom_ops.cuda.inputs import (
    DTYPES,
    inputs_of,
    layouts,
    randn,
    reference,
    with_special,
)
from tests.custom_ops.helpers import assert_same_bits, outputs
from tests.custom_ops.schemes import ASYMMETRIC, PAIRS, SCHEMES, kernel, rest_of, scale_modes

pytestmark = pytest.mark.gpu
MODES = [
    (codes, *modes)
    for codes in CODE_DTYPES
    for modes in itertools.product(scale_modes(codes), CODE_MODES)
]
# A row in a part of a warp, in a warp, in a block; odd; hidden 128 x 33; past what registers hold.
COLS = (1, 7, 33, 127, 128, 384, 1000, 2048, 4224, 5120, 7168, 14336, 16385, 40001)
# One, two, four vectors of a thread, some beyond the row; rows of a warp each; past what registers hold.
PAIR_SIZES = [(1, 128), (3, 384), (300, 1152), (300, 4224), (1031, 4224), (8200, 1024)]
PAIR_SIZES += [(257, 14336), (5, 16384), (3, 20480)]


@pytest.mark.parametrize(("codes", "scale_mode", "code_mode"), MODES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_is_bitwise(ops, scheme: str, codes, scale_mode: str, code_mode: str) -> None:
    run = kernel(scheme, "cuda")
    dynamic = scheme != "tensor_quant_static"
    for rows, cols, dtype in itertools.product((1, 5, 700), COLS, DTYPES):
        if scheme == "group_quant" and cols % 128:
            continue
        x = with_special(randn(rows, cols, dtype=dtype, spread=8))
        x = randn(rows, cols, dtype=dtype, spread=8) if scheme == "tensor_quant" else x
        options = {"dtype": codes, "code_mode": code_mode}
        for bounds in ((0.0, 0.0), (1e-10, 1e-5)) if dynamic else ((0, 0),):
            if dynamic:
                options |= {"scale_mode": scale_mode, "min_amax": bounds[0], "min_scale": bounds[1]}
            rest = rest_of(scheme, (32, 64, 128)[cols // 128 % 3])
            assert_same_bits(run(x, *rest, **options), reference(scheme, x, *rest, **options))


@pytest.mark.parametrize("scheme", [*SCHEMES, *ASYMMETRIC])
def test_schemes_of_other_shapes_and_addresses(ops, scheme: str) -> None:
    run = kernel(scheme, "cuda")
    base = randn(6, 5, 4, 256, dtype=torch.bfloat16, spread=4)
    tensors = [base, base.transpose(0, 2), base[:, ::2], base[::2, :, 1], base[0, 0, 0]]
    tensors += [base[:1, :1], base[0, 0, :1].expand(7, 256), base.flatten(0, 2)]
    tensors += [base.transpose(-1, -2)[..., :1].expand(6, 5, 256, 128), base[..., 1:129]]
    tensors += [
        *layouts(base).values(),
        base[..., ::2],
        base.permute(2, 1, 0, 3),
    ]
    for x in tensors:
        want = reference(scheme, x, *rest_of(scheme))
        assert_same_bits(run(x, *rest_of(scheme)), want)


@pytest.mark.parametrize("scheme", [*SCHEMES, *ASYMMETRIC])
def test_schemes_of_no_elements(ops, scheme: str) -> None:
    """Called as a graph calls it, with no check in Python before it."""
    kernel(scheme, "cuda")
    for shape in ((0, 128), (3, 0, 128)):
        x = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        got = getattr(ops, scheme)(x, *rest_of(scheme))
        assert_same_bits(got, reference(scheme, x, *rest_of(scheme)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("producer", "scheme"), PAIRS)
def test_a_pair_is_the_composition(ops, producer: str, scheme: str, dtype: torch.dtype) -> None:
    """Bit for bit that of its own producer; and of eager's but for what a float32 step of an exp or a mean moves."""
    run, produce = kernel(f"{producer}_{scheme}", "cuda"), kernel(producer, "cuda")
    for (rows, cols), codes in itertools.product(
        PAIR_SIZES,
        CODE_DTYPES,
    ):
        inputs = inputs_of(producer, rows, cols, dtype=dtype)
        for group_size in GROUP_SIZES if scheme == "group_quant" else (128,):
            rest = rest_of(scheme, group_size)
            options = {} if scheme in ASYMMETRIC else {"dtype": codes}
            got = outputs(run(*inputs, *rest, **options))
            values, *residual = outputs(produce(*inputs))
            want = outputs(reference(scheme, values, *rest, **options))
            assert_same_bits(got, (*want, *residual))
