"""`Buffer.low_latency_dispatch` and `low_latency_combine`: room for each expert, rows in any order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.custom_ops.expert_parallel.deep_ep_stand_in.ranks import Ranks, hold

HIDDEN = (2048, 2560, 4096, 5120, 6144, 7168, 8192)


class LowLatency(Ranks):
    """The half of `Buffer` for few tokens."""

    low_latency_mode: bool
    num_qps: int
    num_rdma_bytes: int

    @staticmethod
    def get_low_latency_rdma_size_hint(tokens: int, hidden: int, ranks: int, experts: int) -> int:
        row = 16 + hidden * 2 + hidden // 128 * 4
        return ((4 * experts * tokens * row + 8 * experts) // 128 + 2) * 128

    def _checked(self, topk_idx: Tensor, tokens: int, hidden: int, experts: int) -> None:
        hold(self.low_latency_mode, "low_latency_mode")
        hold(hidden in HIDDEN, "Unsupported hidden")
        hold(topk_idx.dim() == 2 and topk_idx.is_contiguous(), "topk_idx")
        hold(topk_idx.dtype == torch.int64 and topk_idx.shape[1] <= 11, "topk_idx")
        hold(len(topk_idx) <= tokens, "tokens <= num_max_dispatch_tokens_per_rank")
        hold(experts % self.group_size == 0, "num_experts % num_ranks == 0")
        hold(experts // self.group_size <= self.num_qps, "num_rc_per_pe >= num_local_experts")
        need = self.get_low_latency_rdma_size_hint(tokens, hidden, self.group_size, experts)
        hold(need <= self.num_rdma_bytes, "layout.total_bytes <= num_rdma_bytes")

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Any = None,
        dispatch_wait_recv_cost_stats: Any = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple:
        most, hidden = num_max_dispatch_tokens_per_rank, x.shape[1]
        hold(x.dim() == 2 and x.is_contiguous() and x.dtype == torch.bfloat16, "x")
        hold(x.data_ptr() % 16 == 0 and len(x) == len(topk_idx), "x")
        hold(self.group_size * most % 4 == 0, "TMA requires a multiple of 4")
        self._checked(topk_idx, most, hidden, num_experts)
        codes, scales = _cast(x) if use_fp8 else (x, torch.empty(len(x), 0))
        local, rows = num_experts // self.group_size, self.group_size * most
        everyone = self._everyone((codes.view(torch.uint8), scales, topk_idx.tolist()))
        packed = torch.full((local, rows, hidden * codes.element_size()), 255, dtype=torch.uint8)
        packed_scales = torch.full((local, hidden // 128, rows), torch.nan).transpose(1, 2)
        sources = torch.full((local, rows), -7, dtype=torch.int32)
        ranges = torch.zeros(local, self.group_size, dtype=torch.int64)
        counts = torch.zeros(local, dtype=torch.int32)
        for expert in range(local):
            # Ranks and tokens arrive in any order: here in the reverse one.
            for rank in reversed(range(self.group_size)):
                data, scale, ids = everyone[rank]
                found = [t for t, ks in enumerate(ids) if self.rank * local + expert in ks][::-1]
                first = int(counts[expert])
                place = slice(first, first + len(found))
                packed[expert, place], sources[expert, place] = data[found], torch.tensor(found)
                if use_fp8:
                    packed_scales[expert, place] = scale[found]
                ranges[expert, rank] = len(found) | first << 32
                counts[expert] += len(found)
        handle = sources, ranges, most, hidden, num_experts
        received: Any = packed.view(codes.dtype)
        if use_fp8:
            received = received, packed_scales
        return received, counts, handle, None, None

    def low_latency_combine(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: tuple, **more: Any
    ) -> tuple:
        sources, ranges, most, hidden, experts = handle
        local = experts // self.group_size
        hold(x.shape == (local, self.group_size * most, hidden) and x.is_contiguous(), "x")
        hold(x.dtype == torch.bfloat16 and x.data_ptr() % 16 == 0, "x")
        hold(topk_idx.shape == topk_weights.shape and topk_weights.is_contiguous(), "topk_weights")
        hold(topk_weights.dtype == torch.float32, "topk_weights")
        hold(sources.shape == x.shape[:2] and sources.dtype == torch.int32, "src_info")
        hold(ranges.shape == (local, self.group_size) and ranges.dtype == torch.int64, "layout")
        self._checked(topk_idx, most, hidden, experts)
        mine: list[dict] = [{} for _ in range(self.group_size)]
        for expert in range(local):
            for rank in range(self.group_size):
                count, first = int(ranges[expert, rank]) % 2**32, int(ranges[expert, rank]) >> 32
                for row in range(first, first + count):
                    key = self.rank * local + expert, int(sources[expert, row])
                    mine[rank][key] = x[expert, row]
        found: dict = {}
        for other in self._everyone(mine):
            found |= other[self.rank]
        out = torch.zeros(len(topk_idx), hidden)
        for token, (ids, weights) in enumerate(zip(topk_idx.tolist(), topk_weights, strict=True)):
            for expert, weight in zip(ids, weights, strict=True):
                if expert >= 0:
                    product = found[expert, token].double() * weight.double()
                    out[token] = (out[token].double() + product).float()
        return out.bfloat16(), None, None


def _cast(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of x * (448 / amax) and scales amax * (1 / 448)."""
    grouped = x.float().unflatten(1, (-1, 128))
    amax = grouped.abs().amax(2, keepdim=True).clamp(min=1e-4)
    codes = (grouped * torch.tensor(448.0).div(amax)).to(torch.float8_e4m3fn)
    return codes.flatten(1), (amax * torch.tensor(1 / 448.0)).squeeze(2)
