"""Tokens to the ranks of their experts, and back: two ops that every rank of a process group calls together.

Words: N ranks; E experts in all, of which rank r owns r * E / N up to (r + 1) * E / N; T tokens on this rank; R rows
that it receives, one for each token of any rank that has an expert here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.expert_parallel import groups, reference
from custom_ops.expert_parallel.collective import define
from custom_ops.library import require
from custom_ops.moe.checks import (
    FLOATS,
    check_at_least,
    check_dims,
    check_dtype,
    check_ids,
    check_shape,
)
from custom_ops.quantization.checks import check_device


def ep_dispatch(
    x: Tensor,
    scale: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Send each token once to every rank that owns one of its experts.

    x: float32, bfloat16, float16, float8_e4m3fn or int8, [T, H], any strides. scale: None, or float32, [T, G], which
    travels with x. topk_ids: int32 or int64, [T, K], of all experts; a pair whose id is not in [0, E) goes nowhere.
    topk_weights: float32, bfloat16 or float16, [T, K]. num_experts: E, a multiple of N. group: the `group_name` of a
    process group. All but T must be the same on every rank; T may be 0, and the rank calls the op all the same.

    Returns, with rows by rank they come from and then by token, and every tensor contiguous:
    - recv_x [R, H], bit for bit, and recv_scale [R, G], or [0] without scales.
    - recv_ids, int64 [R, K]: which expert of this rank, in [0, E / N), -1 for one elsewhere.
    - recv_weights [R, K], of the dtype of topk_weights: 0 for an expert elsewhere.
    - counts, int32 [E / N]: the pairs that each expert of this rank has.
    - splits, int32 [2, N], on the CPU: rows sent to and received from each rank; and row_of, int32 [T, N]: as which
      row a token was sent to a rank, -1 for not. `ep_combine` takes both.

    `fused_moe(recv_x, <weights of the experts here>, recv_weights, recv_ids)` is what `ep_combine` takes back.

    Implementations: the reference, torch.distributed (gloo on CPUs, NCCL on GPUs), where the host waits for the
    number of rows. Raises ValueError for another dtype, shape, device, number or group, and ExchangeError, which
    names the op and the rank, if a rank died, did not call the op within the time-out of the group, or called it with
    other dtypes or sizes.
    """
    return torch.ops.custom_ops.ep_dispatch(x, scale, topk_ids, topk_weights, num_experts, group)


def ep_combine(y: Tensor, splits: Tensor, row_of: Tensor, group: str) -> Tensor:
    """Return rows to the ranks that their tokens came from, and add up those of each token.

    y: float32, bfloat16 or float16, [R, H], any strides: for each row that `ep_dispatch` received, the weighted sum
    over the experts of this rank. H need not be that of the tokens. splits, row_of: as `ep_dispatch` returned them.

    Returns [T, H] of y's dtype, contiguous: sums in float32 from rank 0 on, one rounding, so the same bits however
    the rows arrive; zeros for a token that went nowhere. Raises as `ep_dispatch`.
    """
    return torch.ops.custom_ops.ep_combine(y, splits, row_of, group)


def _check_dispatch(
    x: Tensor,
    scale: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    group: str,
) -> None:
    op = "ep_dispatch"
    check_dtype(op, "x", x, reference.DTYPES)
    check_dims(op, "x", x, 2)
    tokens = x.shape[0]
    check_at_least(op, "the last dimension of x", x.shape[1], 1)
    check_ids(op, topk_ids, num_experts, None)
    pair = (tokens, topk_ids.shape[1])
    check_shape(op, "topk_ids", topk_ids, pair)
    check_dtype(op, "topk_weights", topk_weights, FLOATS)
    check_shape(op, "topk_weights", topk_weights, pair)
    check_device(op, "topk_ids", topk_ids, "x", x)
    check_device(op, "topk_weights", topk_weights, "x", x)
    if scale is not None:
        check_dtype(op, "scale", scale, (torch.float32,))
        check_dims(op, "scale", scale, 2)
        check_shape(op, "scale", scale, (tokens, scale.shape[1]))
        check_device(op, "scale", scale, "x", x)
    ranks = groups.size(op, group)
    require(
        num_experts % ranks == 0,
        lambda: (
            f"{op}: num_experts is {num_experts}; accepted: a multiple of the {ranks} ranks of group {group!r}"
        ),
    )


def _empty_dispatch(
    x: Tensor,
    scale: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size()
    ranks, top_k = groups.size("ep_dispatch", group), topk_ids.shape[1]
    scales = (0,) if scale is None else (rows, scale.shape[1])
    return (
        x.new_empty((rows, x.shape[1])),
        x.new_empty(scales, dtype=torch.float32),
        x.new_empty((rows, top_k), dtype=torch.int64),
        topk_weights.new_empty((rows, top_k)),
        x.new_empty(num_experts // ranks, dtype=torch.int32),
        torch.empty((2, ranks), dtype=torch.int32, device="cpu"),
        x.new_empty((x.shape[0], ranks), dtype=torch.int32),
    )


def _check_combine(y: Tensor, splits: Tensor, row_of: Tensor, group: str) -> None:
    op = "ep_combine"
    check_dtype(op, "y", y, FLOATS)
    check_dims(op, "y", y, 2)
    check_at_least(op, "the last dimension of y", y.shape[1], 1)
    ranks = groups.size(op, group)
    check_dtype(op, "splits", splits, (torch.int32,))
    check_shape(op, "splits", splits, (2, ranks))
    if splits.device.type != "cpu":
        raise ValueError(f"{op}: splits is on {splits.device}; accepted: cpu")
    check_dtype(op, "row_of", row_of, (torch.int32,))
    check_dims(op, "row_of", row_of, 2)
    check_shape(op, "row_of", row_of, (row_of.shape[0], ranks))
    check_device(op, "row_of", row_of, "y", y)


def _empty_combine(y: Tensor, splits: Tensor, row_of: Tensor, group: str) -> Tensor:
    return y.new_empty((row_of.shape[0], y.shape[1]))


define(
    ep_dispatch,
    "(Tensor x, Tensor? scale, Tensor topk_ids, Tensor topk_weights, int num_experts, str group)"
    " -> (Tensor recv_x, Tensor recv_scale, Tensor recv_ids, Tensor recv_weights, Tensor counts, Tensor splits,"
    " Tensor row_of)",
    check=_check_dispatch,
    empty=_empty_dispatch,
    reference=reference.ep_dispatch,
)
define(
    ep_combine,
    "(Tensor y, Tensor splits, Tensor row_of, str group) -> Tensor",
    check=_check_combine,
    empty=_empty_combine,
    reference=reference.ep_combine,
)
