"""A linear with one LoRA adapter, as PEFT spells it, becomes one op.

    base + lora_B(lora_A(x)) * scaling                           # adapters in the activation dtype
    (base + lora_B(lora_A(x.float())) * scaling).to(dtype)       # adapters in float32, which is PEFT's default

          ->   lora_linear_single(x, weight, bias, a, b, scaling)    where base is linear(x, weight, bias)
          ->   lora_add_single(x, base, a, b, scaling)               where it is anything else, such as a block-FP8 one

Both round where eager rounds: after every product with 16-bit adapters, once with float32 ones. A scaling of 1.0 is no
operation in a graph, and neither is the transpose of a matrix of rank 1, nor a product with one where there is a GPU:
each is a spelling of its own.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor as T
from torch import fx

from fusion_passes import index_map
from fusion_passes.fusion import Constraint, Fusion, Pattern, Scalar, Tensor
from fusion_passes.matching import Match
from fusion_passes.operations import describe, escapes, read, readers, shape_of, uncut
from fusion_passes.rewriting import Rewrite

aten = torch.ops.aten
MAX_RANK = 256


def _matrices(base: T, x: T, a: T, b: T, scaling: float | None = None) -> T:
    return _scaled_sum(base, F.linear(F.linear(x.to(a.dtype), a), b), scaling)


def _outer(base: T, x: T, a: T, b: T, scaling: float | None = None) -> T:
    return _scaled_sum(base, F.linear(x.to(a.dtype), a) * b.t(), scaling)


def _with_bias(base: T, x: T, a: T, b: T, b_bias: T, scaling: float | None = None) -> T:
    return _scaled_sum(base, F.linear(F.linear(x.to(a.dtype), a), b, b_bias), scaling)


def _scaled_sum(base: T, delta: T, scaling: float | None) -> T:
    return (base + (delta if scaling is None else delta * scaling)).to(base.dtype)


def _pattern(fn: Any, rank: str, name: str, wide: torch.dtype | None, scaled: bool) -> Pattern:
    inputs: dict[str, Any] = {
        "base": Tensor("num_tokens", "out_features"),
        "x": Tensor("num_tokens", "hidden_size"),
        "a": Tensor(rank, "hidden_size", dtype=wide),
        "b": Tensor("out_features", rank, dtype=wide),
        **({"b_bias": Tensor("out_features", dtype=wide)} if fn is _with_bias else {}),
        **({"scaling": Scalar()} if scaled else {}),
    }
    words = [
        "16-bit adapter" if wide is None else "float32 adapter",
        *([name] if name else []),
        *([] if scaled else ["unscaled"]),
    ]
    # found in order to be refused, by the first constraint
    constants = (
        {"refused": "lora_B of the adapter has a bias (lora_bias)"} if fn is _with_bias else {}
    )
    return Pattern(fn, inputs, constants, name=", ".join(words))


def _patterns() -> tuple[Pattern, ...]:
    spellings = (
        (_matrices, "rank", ""),
        (_matrices, "1", "rank 1"),
        (_outer, "1", "outer product"),
        (_with_bias, "rank", "lora_bias"),
    )
    return tuple(
        _pattern(*spelling, wide, scaled)
        for spelling, scaled, wide in itertools.product(
            spellings, (True, False), (None, torch.float32)
        )
    )


def _rewrite(m: Rewrite) -> tuple[Any, ...]:
    scaling = m.match.scalars.get("scaling", 1.0)
    number = float(scaling) if isinstance(scaling, (int, float)) else scaling
    x, a, b = m.tensor("x"), m.tensor("a"), m.tensor("b")
    plain = _plain_linear(m.match)
    if plain is None:
        return (m.call("lora_add_single", x, m.tensor("base"), a, b, number),)
    del m.match.captured["base"]  # it is computed inside now
    return (m.call("lora_linear_single", x, *plain, a, b, number),)


def _plain_linear(match: Match) -> tuple[fx.Node, fx.Node | None] | None:
    """Weight and bias of the linear that computes the base from the adapter's own x, and for nothing else."""
    base = match.base("base")
    operation = describe(base)
    if operation is None or operation.name not in ("aten.mm.default", "aten.addmm.default"):
        return None
    *bias, rows, transposed = operation.operands
    chain = read(rows, None)
    source, mapping = chain[-1]
    whole = index_map.same_map(mapping, ((index_map.product(shape_of(source)), True),))
    cut = uncut([node for node, _ in chain])[1] or uncut([n for n, *_ in match.captured["base"]])[1]
    transpose = describe(transposed)
    if (
        operation.attributes  # alpha or beta
        or source is not match.base("x")
        or not whole
        or cut
        or transpose is None
        or transpose.name != "aten.permute.default"
        or list(transpose.operands[1]) != [1, 0]
        or (bias and len(shape_of(bias[0])) != 1)
        or any(reader not in match.nodes.values() for reader in readers(base))
        or any(user.op == "output" for user in base.users)
    ):
        return None
    return transpose.operands[0], bias[0] if bias else None


def _rank_fits(match: Match) -> bool:
    rank = match.sizes.get("rank", 1)
    return isinstance(rank, int) and 1 <= rank <= MAX_RANK


def _measured_as(match: Match) -> dict[str, Any] | None:
    sizes = {
        "n": match.sizes.get("out_features"),
        "k": match.sizes.get("hidden_size"),
        "rank": match.sizes.get("rank", 1),
    }
    if not all(isinstance(size, int) for size in sizes.values()):
        return None
    wide = match.base("a").meta["val"].dtype == torch.float32
    return {"adapter": "float32" if wide else "16 bits", **sizes}


def _shared(match: Match) -> str | None:
    """What is computed inside and used outside, but for a cast or a transpose, of which a second one costs nothing."""
    for node, user in escapes(match.nodes.values(), match.outputs):
        operation = describe(node)
        if operation is None or operation.name not in ("cast", "aten.permute.default"):
            return f"{node.name} inside of it is also used by {user.name}"
    return None


FUSION = Fusion(
    name="lora_linear",
    summary="a linear and its LoRA adapter (PEFT) as one op",
    stage=1,
    patterns=_patterns(),
    rewrite=_rewrite,
    constraints=(
        Constraint(
            lambda match: "refused" not in match.constants,
            lambda match: match.constants["refused"],
        ),
        Constraint(
            _rank_fits,
            lambda match: (
                f"the rank of the adapter is {match.sizes.get('rank')}; supported: 1 to {MAX_RANK}"
            ),
        ),
        Constraint(lambda match: _shared(match) is None, lambda match: _shared(match) or ""),
    ),
    signature="aten.mm.default aten.addmm.default",
    measured_as=_measured_as,
    allow_shared=True,  # one cast of x to float32 may serve several adapters: see _shared
    # stock: x is read by the shrink, base and delta are written and read; what the rank counts is small
    bytes_before="2*num_tokens*hidden_size + 10*num_tokens*out_features",
    bytes_after="2*num_tokens*hidden_size + 2*num_tokens*out_features",
)
