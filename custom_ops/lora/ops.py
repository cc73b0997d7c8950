"""LoRA for a batch in which every token may use another adapter: shrink, expand, and the linear layer with both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from custom_ops import library
from custom_ops.implementation import Implementation, triton
from custom_ops.library import require
from custom_ops.lora import hopper, reference
from custom_ops.lora.checks import (
    check_adapter,
    check_base,
    check_batch,
    check_expand_weights,
    check_linear,
    check_shrink_weights,
    check_slices,
    tokens_of,
)
from custom_ops.quantization.checks import (
    ACTIVATION_DTYPES,
    check_activation,
    check_choice,
    check_device,
)
from custom_ops.scales import known

_BATCH = "Tensor token_slots, Tensor sorted_tokens, Tensor tiles"


def lora_shrink(
    x: Tensor,
    a: Sequence[Tensor],
    ranks: Tensor,
    token_slots: Tensor,
    sorted_tokens: Tensor,
    tiles: Tensor,
) -> Tensor:
    """y[s, t] = x[t] @ a[s][slot of t].T in float32, for each slice s of a layer and each token t.

    x: bfloat16 or float16, [..., H] of T tokens. a: of x's dtype, one [num_slots, R, H] per slice (q, k and v; gate and
    up), contiguous, R from 1 to 256. ranks: int32 [num_slots], the rank of the adapter in a slot, up to R: rows of a
    from there up to the next multiple of 16 must be zero, those after that are never read. token_slots, sorted_tokens,
    tiles: the tensors of a `LoRABatch`, which has room for T tokens or more; slot -1 is no adapter. What the batch
    holds is read from the device when the kernel runs, so that a captured CUDA graph serves any mixture of adapters.
    Returns float32 [slices, T, R], contiguous: 0 for tokens without an adapter and from the rank on.

    Order of the sums is the implementation's, and Triton's depends on T. Implementations: Triton, reference. Raises
    ValueError for another dtype, shape, stride or device. Source: arXiv:2106.09685, arXiv:2310.18547.
    """
    return torch.ops.custom_ops.lora_shrink(x, a, ranks, token_slots, sorted_tokens, tiles)


def _check_shrink(
    x: Tensor,
    a: Sequence[Tensor],
    ranks: Tensor,
    token_slots: Tensor,
    sorted_tokens: Tensor,
    tiles: Tensor,
) -> None:
    op = "lora_shrink"
    check_activation(op, "x", x)
    check_shrink_weights(op, a, x)
    batch = token_slots, sorted_tokens, tiles
    check_batch(op, "x", tokens_of(x), x, a[0].shape[0], ranks, *batch)


def _empty_shrink(
    x: Tensor,
    a: Sequence[Tensor],
    ranks: Tensor,
    token_slots: Tensor,
    sorted_tokens: Tensor,
    tiles: Tensor,
) -> Tensor:
    return torch.empty((len(a), tokens_of(x), a[0].shape[1]), dtype=torch.float32, device=x.device)


SHRINK = library.define(
    lora_shrink,
    f"(Tensor x, Tensor[] a, Tensor ranks, {_BATCH}) -> Tensor",
    check=_check_shrink,
    empty=_empty_shrink,
    reference=reference.lora_shrink,
    implementations=(triton("custom_ops.lora.linear:lora_shrink"),),
)


def lora_expand(
    y: Tensor,
    b: Sequence[Tensor],
    base: Tensor | None,
    scaling: Tensor,
    ranks: Tensor,
    token_slots: Tensor,
    sorted_tokens: Tensor,
    tiles: Tensor,
) -> Tensor:
    """out[t] = base[t] + scaling[slot of t] * y[s, t] @ b[s][slot of t].T, the slices s side by side.

    y: float32 [slices, T, R], as `lora_shrink` returns it. b: bfloat16 or float16, one [num_slots, width, R] per slice,
    contiguous, of any widths. base: of b's dtype, [..., sum of the widths] of T tokens, any row pitch; None adds to
    nothing. scaling: float32 [num_slots]. The others: as for `lora_shrink`; columns of b from the rank up to the next
    multiple of 16 must be zero. Returns a new tensor of base's shape ([T, sum of the widths] without one), contiguous;
    tokens without an adapter have their base. All in float32, rounded once to b's dtype T:

        out = T(float32(base) + (sum_r y * b) * scaling)

    Order of the sum is the implementation's; Triton reads y to 16 bits. Implementations: Triton, reference. Raises
    ValueError for another dtype, shape, stride or device. Source: arXiv:2106.09685, arXiv:2310.18547.
    """
    return torch.ops.custom_ops.lora_expand(
        y, b, base, scaling, ranks, token_slots, sorted_tokens, tiles
    )


def _check_expand(
    y: Tensor,
    b: Sequence[Tensor],
    base: Tensor | None,
    scaling: Tensor,
    ranks: Tensor,
    token_slots: Tensor,
    sorted_tokens: Tensor,
    tiles: Tensor,
) -> None:
    op = "lora_expand"
    check_choice(op, "y.dtype", y.dtype, (torch.float32,))
    if y.dim() != 3 or known(y.shape[0] != len(b)):
        raise ValueError(
            f"{op}: y.shape is {tuple(y.shape)}; accepted: [{len(b)}, T, rank], a part for each of b"
        )
    check_expand_weights(op, b, y.shape[2], "y", y)
    if base is not None:
        check_device(op, "base", base, "y", y)
        check_choice(op, "base.dtype", base.dtype, (b[0].dtype,))
        columns = sum(each.shape[1] for each in b)
        accepted = f"[..., {columns}] of {y.shape[1]} tokens, as y"
        right = base.dim() >= 1 and not known(base.shape[-1] != columns)
        require(
            right and not known(tokens_of(base) != y.shape[1]),
            lambda: f"{op}: base.shape is {tuple(base.shape)}; accepted: {accepted}",
        )
    batch = token_slots, sorted_tokens, tiles
    check_batch(op, "y", y.shape[1], y, b[0].shape[0], ranks, *batch, scaling)


def _empty_expand(
    y: Tensor,
    b: Sequence[Tensor],
    base: Tensor | None,
    scaling: Tensor,
    ranks: Tensor,
    token_slots: Tensor,
    sorted_tokens: Tensor,
    tiles: Tensor,
) -> Tensor:
    columns = sum(each.shape[1] for each in b)
    tokens = (y.shape[1],) if base is None else base.shape[:-1]
    return torch.empty((*tokens, columns), dtype=b[0].dtype, device=y.device)


EXPAND = library.define(
    lora_expand,
    f"(Tensor y, Tensor[] b, Tensor? base, Tensor scaling, Tensor ranks, {_BATCH}) -> Tensor",
    check=_check_expand,
    empty=_empty_expand,
    reference=reference.lora_expand,
    implementations=(triton("custom_ops.lora.linear:lora_expand"),),
)


def lora_add(
    x: Tensor,
    base: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Tensor,
    ranks: Tensor,
    token_slots: Tensor,
    sorted_tokens: Tensor,
    tiles: Tensor,
) -> Tensor:
    """`lora_expand(lora_shrink(x, a, ...), b, base, ...)` in one op: for any base, such as that of an FP8 linear.

    Faster than the two, since the partial sums of the shrink are added up by the expand. x and base: of one dtype, with
    the same leading dimensions. Arguments, rounding, errors: as those of the two. Returns a new tensor as base.
    Source: arXiv:2106.09685, arXiv:2310.18547.
    """
    return torch.ops.custom_ops.lora_add(
        x, base, a, b, scaling, ranks, token_slots, sorted_tokens, tiles
    )


def _check_add(
    x: Tensor,
    base: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Tensor,
    ranks: Tensor,
    token_slots: Tensor,
    sorted_tokens: Tensor,
    tiles: Tensor,
) -> None:
    op = "lora_add"
    check_activation(op, "x", x)
    check_device(op, "base", base, "x", x)
    _check_adapters(op, x, a, b)
    check_base(op, base, x.shape[:-1], sum(each.shape[1] for each in b), x.dtype)
    batch = token_slots, sorted_tokens, tiles
    check_batch(op, "x", tokens_of(x), x, a[0].shape[0], ranks, *batch, scaling)


def _check_adapters(op: str, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    check_shrink_weights(op, a, x)
    check_expand_weights(op, b, a[0].shape[1], "x", x)
    check_slices(op, a, b)
    check_choice(op, "b[0].dtype", b[0].dtype, (x.dtype,))
    require(
        not known(b[0].shape[0] != a[0].shape[0]),
        lambda: f"{op}: b has {b[0].shape[0]} slots; accepted: {a[0].shape[0]}, as a",
    )


def _empty_add(
    x: Tensor,
    base: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Tensor,
    ranks: Tensor,
    token_slots: Tensor,
    sorted_tokens: Tensor,
    tiles: Tensor,
) -> Tensor:
    return torch.empty(base.shape, dtype=base.dtype, device=base.device)


ADD = library.define(
    lora_add,
    f"(Tensor x, Tensor base, Tensor[] a, Tensor[] b, Tensor scaling, Tensor ranks, {_BATCH}) -> Tensor",
    check=_check_add,
    empty=_empty_add,
    reference=reference.lora_add,
    implementations=(triton("custom_ops.lora.linear:lora_add"),),
)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Tensor,
    ranks: Tensor,
    token_slots: Tensor,
    sorted_tokens: Tensor,
    tiles: Tensor,
) -> Tensor:
    """A linear layer with the adapters of a batch: `lora_add(x, linear(x, weight, bias), a, b, ...)`, fused.

    weight: of x's dtype, [sum of the widths of b, H], any row pitch. bias: [sum of the widths], of x's dtype. The rest:
    as for `lora_add`. With T one rounding to x's dtype, everything else float32:

        out = T(T(x @ weight.T + bias) + ((x @ a.T) @ b.T) * scaling)

    The low-rank product is not rounded on its way, unlike in an eager PEFT layer of 16 bits, which brings the result
    closer to float64. Implementations: CUDA C++ (Hopper; for few tokens one kernel after the shrink, else the BLAS and
    then the adapters), Triton (the BLAS, and the adapters beside it), reference; custom_ops/tables/lora_sm_90.json says
    which is faster where. Source: arXiv:2106.09685, arXiv:2310.18547.
    """
    return torch.ops.custom_ops.lora_linear(
        x, weight, bias, a, b, scaling, ranks, token_slots, sorted_tokens, tiles
    )


def _check_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Tensor,
    ranks: Tensor,
    token_slots: Tensor,
    sorted_tokens: Tensor,
    tiles: Tensor,
) -> None:
    op = "lora_linear"
    check_linear(op, x, weight, bias)
    _check_adapters(op, x, a, b)
    columns = sum(each.shape[1] for each in b)
    require(
        not known(columns != weight.shape[0]),
        lambda: (
            f"{op}: the widths of b are {columns} in sum; accepted: {weight.shape[0]}, the rows of weight"
        ),
    )
    batch = token_slots, sorted_tokens, tiles
    check_batch(op, "x", tokens_of(x), x, a[0].shape[0], ranks, *batch, scaling)


def _empty_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Tensor,
    ranks: Tensor,
    token_slots: Tensor,
    sorted_tokens: Tensor,
    tiles: Tensor,
) -> Tensor:
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


LINEAR = library.define(
    lora_linear,
    "(Tensor x, Tensor weight, Tensor? bias, Tensor[] a, Tensor[] b, Tensor scaling, Tensor ranks, "
    f"{_BATCH}) -> Tensor",
    check=_check_lora_linear,
    empty=_empty_linear,
    reference=reference.lora_linear,
    implementations=(
        Implementation("cuda", hopper.load_batch, hopper.unavailable, hopper.unsupported_batch),
        triton("custom_ops.lora.linear:lora_linear"),
    ),
)


# ---- one adapter for all tokens -----------------------------------------------------------------------------


def lora_linear_single(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """A linear layer with one adapter for all tokens, in the roundings of PEFT's layer.

    x: bfloat16 or float16, [..., H]. weight: of x's dtype, [N, H], bias: [N] or None. a: [rank, H], b: [N, rank], rank
    from 1 to 256, both of x's dtype or both float32; any row pitch. Returns [..., N], contiguous. With T one rounding
    to x's dtype and base = T(x @ weight.T + bias):

        16-bit adapter:    out = T(base + T(T(T(x @ a.T) @ b.T) * scaling))
        float32 adapter:   out = T(float32(base) + ((float32(x) @ a.T) @ b.T) * scaling), in float32 throughout

    Order of the sums is the implementation's; Triton's products of a float32 adapter have 22 bits or more of each
    factor. Implementations: CUDA C++ (Hopper, where custom_ops/tables/lora_sm_90.json says so), Triton, reference.
    Raises ValueError for another dtype, shape or device. Source: arXiv:2106.09685.
    """
    return torch.ops.custom_ops.lora_linear_single(x, weight, bias, a, b, scaling)


def _check_linear_single(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> None:
    check_linear("lora_linear_single", x, weight, bias)
    check_adapter("lora_linear_single", x, weight.shape[0], a, b)


def _empty_linear_single(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)


LINEAR_SINGLE = library.define(
    lora_linear_single,
    "(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scaling) -> Tensor",
    check=_check_linear_single,
    empty=_empty_linear_single,
    reference=reference.lora_linear_single,
    implementations=(
        Implementation("cuda", hopper.load_single, hopper.unavailable, hopper.unsupported_single),
        triton("custom_ops.lora.linear:lora_linear_single"),
    ),
)


def lora_add_single(x: Tensor, base: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """`lora_linear_single` for any base, such as that of an FP8 linear.

    base: of x's dtype, [..., N] with x's leading dimensions. The other arguments, rounding, errors: as there. Returns a
    new tensor, contiguous. Source: arXiv:2106.09685.
    """
    return torch.ops.custom_ops.lora_add_single(x, base, a, b, scaling)


def _check_add_single(x: Tensor, base: Tensor, a: Tensor, b: Tensor, scaling: float) -> None:
    op = "lora_add_single"
    check_activation(op, "x", x)
    check_device(op, "base", base, "x", x)
    check_choice(op, "base.dtype", base.dtype, ACTIVATION_DTYPES)
    if base.dim() != x.dim():
        raise ValueError(f"{op}: base has {base.dim()} dimensions; accepted: {x.dim()}, as x")
    check_base(op, base, x.shape[:-1], base.shape[-1], x.dtype)
    check_adapter(op, x, base.shape[-1], a, b)


def _empty_add_single(x: Tensor, base: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return torch.empty(base.shape, dtype=base.dtype, device=base.device)


ADD_SINGLE = library.define(
    lora_add_single,
    "(Tensor x, Tensor base, Tensor a, Tensor b, float scaling) -> Tensor",
    check=_check_add_single,
    empty=_empty_add_single,
    reference=reference.lora_add_single,
    implementations=(triton("custom_ops.lora.linear:lora_add_single"),),
)
