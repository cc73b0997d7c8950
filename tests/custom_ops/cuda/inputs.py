"""What the CUDA C++ kernels are given, and how far their answers may lie from the references'."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops import library
from tests.custom_ops.schemes import NORMS

DTYPES = (torch.bfloat16, torch.float16)
SPECIAL = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-40, 6e-8, 448.0, -1.0)
EPS = 1e-6


def reference(name: str, *args, **options):
    """The reference of an op, its keywords by default."""
    op = library.ops()[name]
    return op.reference(*args, **op.defaults | options)


def randn(*shape: int, dtype: torch.dtype, spread: float = 1.0) -> Tensor:
    """Normal values whose rows differ in size by powers of two."""
    x = torch.randn(*shape, device="cuda", dtype=torch.float32)
    rows = torch.randn(*shape[:-1], 1, device="cuda") * spread
    return (x * torch.exp2(rows)).to(dtype)


def with_special(x: Tensor) -> Tensor:
    """x with zero groups and the special values here and there."""
    x = x.clone()
    flat = x.view(-1)
    at = torch.randint(0, flat.numel(), (max(1, flat.numel() // 300),), device="cuda")
    pick = torch.randint(0, len(SPECIAL), at.shape, device="cuda")
    flat[at] = torch.tensor(SPECIAL, device="cuda").to(x.dtype)[pick]
    x[..., :128] *= (torch.rand(*x.shape[:-1], 1, device="cuda") > 0.3).to(x.dtype)
    return x


def steps(codes: Tensor) -> Tensor:
    """The code's place among the values of float8_e4m3fn, -0 and +0 being one; NaN is 1000."""
    bits = codes.view(torch.uint8).int()
    size = bits & 0x7F
    return torch.where(size == 0x7F, 1000, torch.where(bits > 0x7F, -size, size))


def assert_same_quantized(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got[:2], want[:2], strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=0, equal_nan=True)
    a, b = (t[0].contiguous().view(torch.uint8) for t in (got, want))
    nan = ((a & 0x7F) == 0x7F) & ((b & 0x7F) == 0x7F)  # which NaN is not specified
    assert torch.equal(torch.where(nan, 0, a), torch.where(nan, 0, b))


def count_flips(
    got: tuple[Tensor, ...], want: tuple[Tensor, ...], group_size: int
) -> tuple[int, int]:
    """Codes that differ, and codes that differ by more than a step although their scale is the same."""
    for a, b in zip(got[:2], want[:2], strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    apart = (steps(got[0]) - steps(want[0])).abs()
    same = ((got[1] == want[1]) | (got[1].isnan() & want[1].isnan())).repeat_interleave(
        group_size, -1
    )
    return int((apart > 0).sum()), int(((apart > 1) & same).sum())


def assert_few_flips(got: tuple[Tensor, ...], want: tuple[Tensor, ...], group_size: int) -> None:
    flips, far = count_flips(got, want, group_size)
    assert far == 0
    expected = 1e-4 * got[0].numel()
    assert flips <= expected + 4 * expected**0.5 + 2  # four deviations of a count with that mean


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values at other addresses: misaligned, a strided half, padded rows."""
    *lead, cols = x.shape
    shifted = torch.empty(x.numel() + 1, device="cuda", dtype=x.dtype)[1:].view(x.shape)
    packed = torch.empty(*lead, 2 * cols, device="cuda", dtype=x.dtype)[..., cols:]
    odd_pitch = torch.empty(*lead, cols + 3, device="cuda", dtype=x.dtype)[..., :cols]
    return {
        "shifted": shifted.copy_(x),
        "packed": packed.copy_(x),
        "odd pitch": odd_pitch.copy_(x),
    }


def errors(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """Mean and largest error, in units of the last place of what is exact."""
    _, exponent = torch.frexp(exact)
    digits = {torch.bfloat16: 8, torch.float16: 11}[got.dtype]
    smallest = {torch.bfloat16: -125, torch.float16: -13}[got.dtype]
    ulp = torch.exp2(exponent.clamp(min=smallest).double() - digits)
    error = (got.double() - exact).abs() / ulp
    return error.mean().item(), error.max().item()


def norm_weight(cols: int, dtype: torch.dtype, mode: str, float32: bool) -> Tensor:
    base = 0.0 if mode == "float32_plus_one" else 1.0
    weight = base + 0.3 * torch.randn(cols, device="cuda")
    weight[:1] = -0.0
    return weight if float32 else weight.to(dtype)


X = {"device": "cuda", "dtype": torch.bfloat16}


def inputs_of(producer: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple:
    """The arguments of a producer: rows whose sizes differ by powers of two, halves of one tensor."""
    if producer in NORMS:
        rows = [randn(*shape, dtype=dtype, spread=2) for _ in range(1 + (producer != "rms_norm"))]
        return (*rows, norm_weight(shape[-1], dtype, "rounded", False), EPS)
    packed = randn(*shape[:-1], 2 * shape[-1], dtype=dtype, spread=2)
    if producer == "clamped_swiglu":
        return packed[..., ::2], packed[..., 1::2], 1.702, 7.0
    return packed.chunk(2, -1)
