"""A `deep_ep` for tests: the `Buffer` of DeepEP 1.2.1 between processes, on tensors of any device.

It refuses what the real one refuses (dtypes, shapes, strides, sizes of buffers), returns what it returns, and writes
into what it writes into. Tokens travel by pickle.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NVL_PEERS = 8
HIDDEN = (2048, 2560, 4096, 5120, 6144, 7168, 8192)


def hold(condition: bool, what: str) -> None:
    """What an assertion of the C++ library raises."""
    if not condition:
        raise RuntimeError(f"Failed: Assertion error stand_in.cpp:1 '{what}'")


class Config:
    """How many SMs work, and how many tokens go at a time."""

    def __init__(
        self, num_sms: int = 20, send: int = 6, recv: int = 256, rdma_send: int = 6, rdma_recv=256
    ) -> None:
        hold(num_sms >= 0, "num_sms >= 0")
        hold(0 < send < recv, "send < recv")
        self.num_sms, self.send, self.recv = num_sms, send, recv

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        hold(num_ranks < NVL_PEERS or num_ranks % NVL_PEERS == 0, "num_ranks")
        queues = self.num_sms // 2 * min(num_ranks, NVL_PEERS)
        token = hidden_bytes + 16 + 128 * 8 + 128 * 4 + 128 * 4
        size = queues * 5 * 4 + queues * self.recv * token
        return (size + 127) // 128 * 128


class Buffer:
    """Moves rows between the ranks of a group. `made` and `destroyed` count."""

    num_sms = 20
    made = 0
    destroyed = 0

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        comm: Any = None,
    ) -> None:
        hold(num_nvl_bytes % 128 == 0, "num_nvl_bytes")
        hold(num_rdma_bytes % 128 == 0, "num_rdma_bytes")
        hold(num_rdma_bytes == 0 or low_latency_mode, "low_latency_mode")
        if low_latency_mode:
            assert num_qps_per_rank > 0
        self.group, self.rank, self.group_size = group, group.rank(), group.size()
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.num_qps = low_latency_mode, num_qps_per_rank
        self.explicitly_destroy = explicitly_destroy
        self._not_waited_for = False
        self._everyone((num_nvl_bytes, num_rdma_bytes, low_latency_mode))
        Buffer.made += 1

    def destroy(self) -> None:
        assert self.explicitly_destroy, "`explicitly_destroy` flag must be set"
        self._everyone("destroyed")
        Buffer.destroyed += 1

    def _everyone(self, mine: Any) -> list[Any]:
        found: list[Any] = [None] * self.group_size
        torch.distributed.all_gather_object(found, mine, self.group)
        return found

    # High throughput

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple:
        hold(topk_idx.dim() == 2 and topk_idx.is_contiguous(), "topk_idx")
        hold(topk_idx.dtype == torch.int64, "topk_idx.data_ptr<int64_t>()")
        ids = topk_idx.tolist()
        local = num_experts // self.group_size
        in_rank = torch.zeros(len(ids), self.group_size, dtype=torch.bool)
        per_expert = torch.zeros(num_experts, dtype=torch.int32)
        for token, named in enumerate(ids):
            for expert in named:
                if 0 <= expert < num_experts:
                    in_rank[token, expert // local] = True
                    per_expert[expert] += 1
        per_rank = in_rank.sum(0).int()
        to = topk_idx.device
        return per_rank.to(to), None, per_expert.to(to), in_rank.to(to), None

    def _channels(self, tokens: int, config: Config) -> list[int]:
        """The channel of each token."""
        each = -(-tokens // (config.num_sms // 2))
        return [token // each for token in range(tokens)]

    def _room(self, config: Config, row_bytes: int, extra: int) -> None:
        queues = config.num_sms // 2 * self.group_size
        need = queues * (16 + config.recv * (row_bytes + 4 + extra))
        hold(need <= self.num_nvl_bytes, "size <= num_nvl_bytes")

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        handle: tuple | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple:
        assert handle is None
        assert num_tokens_per_rank is not None
        assert is_token_in_rank is not None
        assert num_tokens_per_expert is not None
        assert topk_idx is not None
        assert topk_weights is not None
        x, scales = x if isinstance(x, tuple) else (x, None)
        config = config or Config(self.num_sms, 6, 256)
        tokens, hidden = x.shape
        hold(config.num_sms % 2 == 0, "num_sms")
        hold(self.group_size in (2, 4, 8), "Unsupported ranks")
        hold(x.dim() == 2 and x.is_contiguous() and x.data_ptr() % 16 == 0, "x")
        hold(x.dtype in (torch.bfloat16, torch.float8_e4m3fn), "documented dtypes")
        row_bytes = hidden * x.element_size()
        hold(row_bytes % 32 == 0 and row_bytes // 2 + 8 <= 8192, "hidden_int4 % 2 == 0")
        hold(is_token_in_rank.shape == (tokens, self.group_size), "is_token_in_rank")
        experts = len(num_tokens_per_expert)
        hold(experts // self.group_size <= 128, "num_experts / num_ranks <= kNumThreads")
        hold(topk_idx.shape == topk_weights.shape and len(topk_idx) == tokens, "topk")
        hold(topk_idx.is_contiguous() and topk_weights.is_contiguous(), "topk contiguous")
        hold(topk_weights.dtype == torch.float32 and topk_idx.shape[1] <= 32, "topk_weights")
        if scales is not None:
            hold(x.element_size() == 1 and scales.dtype == torch.float32, "x_scales")
            hold(scales.dim() == 2 and len(scales) == tokens, "x_scales")
        groups = 0 if scales is None else scales.shape[1]
        self._room(config, row_bytes, 12 * topk_idx.shape[1] + 4 * groups)

        channels = self._channels(tokens, config)
        local, count = experts // self.group_size, config.num_sms // 2
        goes = is_token_in_rank.tolist()
        send_head = torch.full((tokens, self.group_size), -1, dtype=torch.int32)
        starts = torch.zeros(self.group_size, count, dtype=torch.int32)
        for rank in range(self.group_size):
            places = [0] * count
            for token in range(tokens):
                if goes[token][rank]:
                    send_head[token, rank] = places[channels[token]]
                    places[channels[token]] += 1
            starts[rank] = torch.tensor([sum(places[:channel]) for channel in range(count)])
        mine = {
            "x": x.cpu().view(torch.uint8) if x.numel() else torch.empty(tokens, row_bytes).byte(),
            "scales": torch.empty(tokens, 0) if scales is None else scales.cpu().contiguous(),
            "ids": topk_idx.cpu(),
            "weights": topk_weights.cpu(),
            "goes": is_token_in_rank.cpu(),
            "starts": starts,
        }
        everyone = self._everyone(mine)
        kept = [other["goes"][:, self.rank].nonzero()[:, 0] for other in everyone]
        rows = {
            name: torch.cat([o[name][k] for o, k in zip(everyone, kept, strict=True)]).contiguous()
            for name in ("x", "scales", "ids", "weights")
        }
        ids = rows["ids"] - self.rank * local
        here = (ids >= 0) & (ids < local)
        ids = torch.where(here, ids, -1)
        weights = torch.where(here, rows["weights"], 0.0)
        counts = [int((ids == expert).sum()) for expert in range(local)]
        arrived = torch.cat(kept).int()
        # Of the real one the host would take the counts of a dispatch that is still on its way for those of this one.
        hold(num_worst_tokens > 0 or not self._not_waited_for, "an illegal memory access")
        self._not_waited_for |= num_worst_tokens > 0
        if num_worst_tokens:
            hold(num_worst_tokens >= len(arrived), "an illegal memory access")
            more = num_worst_tokens - len(arrived)
            counts, rows["x"] = (
                [],
                torch.cat([rows["x"], rows["x"].new_full((more, row_bytes), 255)]),
            )
            rows["scales"] = _more(rows["scales"], more, torch.nan)
            ids, weights = _more(ids, more, -1), _more(weights, more, torch.nan)
            arrived = _more(arrived.unsqueeze(1), more, -9).flatten()
        prefix = torch.stack([other["goes"].sum(0) for other in everyone]).cumsum(0).int()
        prefix[:, torch.arange(self.group_size) != self.rank] = -5  # as its buffer happens to be
        recv_starts = torch.stack([other["starts"][self.rank] for other in everyone])
        own_starts = torch.zeros_like(starts)
        to = x.device
        handle = (prefix, own_starts, recv_starts, arrived)
        handle = (*(t.to(to) for t in handle), is_token_in_rank, send_head.to(to))
        received = torch.empty(len(rows["x"]), hidden, dtype=x.dtype)
        if received.numel():
            received = rows["x"].view(x.dtype)
        received = received.to(to)
        if scales is not None:
            received = received, rows["scales"].to(to)
        return received, ids.to(to), weights.to(to), counts, handle, None

    def combine(
        self,
        x: Tensor,
        handle: tuple,
        topk_weights: Tensor | None = None,
        bias: Any = None,
        config: Config | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple:
        prefix, _, starts, sources, _, send_head = handle
        config = config or Config(self.num_sms, 6, 256)
        count = config.num_sms // 2
        hold(x.dim() == 2 and x.is_contiguous() and x.data_ptr() % 16 == 0, "x")
        hold(x.dtype == torch.bfloat16, "Unsupported type")
        hold(x.shape[1] * 2 % 512 == 0, "whole warps at __syncwarp")
        for name, tensor in {"src": sources, "prefix": prefix, "starts": starts}.items():
            hold(tensor.dtype == torch.int32 and tensor.is_contiguous(), name)
        hold(send_head.dtype == torch.int32 and send_head.is_contiguous(), "send_head")
        hold(sources.shape == (len(x),), "src_idx.size(0) == num_tokens")
        hold(prefix.shape == (self.group_size, self.group_size), "rank_prefix_matrix")
        hold(starts.shape == (self.group_size, count), "channel_prefix_matrix")
        self._room(config, x.shape[1] * 2, 0)

        ends = [0, *prefix[:, self.rank].tolist()]
        queues = []  # [rank][channel]: rows that go back to it
        for rank in range(self.group_size):
            rows = x[ends[rank] : ends[rank + 1]].cpu()
            cuts = [*starts[rank].tolist(), len(rows)]
            queues.append([rows[cuts[c] : cuts[c + 1]] for c in range(count)])
        back = [other[self.rank] for other in self._everyone(queues)]
        tokens = len(send_head)
        channels = self._channels(tokens, config)
        out = torch.zeros(tokens, x.shape[1])
        heads = send_head.tolist()
        for token in range(tokens):
            for rank in range(self.group_size):
                if heads[token][rank] >= 0:
                    out[token] += back[rank][channels[token]][heads[token][rank]].float()
        send_head.copy_(torch.where(send_head < 0, -1000, send_head))
        return out.to(x.dtype).to(x.device), None, None

    # Low latency

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


def _more(rows: Tensor, count: int, value: float) -> Tensor:
    """Rows of one value after those that are there."""
    return torch.cat([rows, rows.new_full((count, rows.shape[1]), value)])


def _cast(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of x * (448 / amax) and scales amax * (1 / 448)."""
    grouped = x.float().unflatten(1, (-1, 128))
    amax = grouped.abs().amax(2, keepdim=True).clamp(min=1e-4)
    codes = (grouped * torch.tensor(448.0).div(amax)).to(torch.float8_e4m3fn)
    return codes.flatten(1), (amax * torch.tensor(1 / 448.0)).squeeze(2)


@dataclass
class EPHandle:
    """What `ElasticBuffer.combine` takes of a dispatch."""

    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: Tensor
    num_recv_tokens: int
    num_expanded_tokens: int
    num_recv_tokens_per_expert_list: list
    psum_num_recv_tokens_per_scaleup_rank: Tensor
    psum_num_recv_tokens_per_expert: Tensor
    num_unaligned_recv_tokens_per_expert: Tensor
    recv_src_metadata: Tensor
    dst_buffer_slot_idx: Tensor
    token_metadata_at_forward: Tensor | None
    channel_linked_list: Tensor | None


class ElasticBuffer:
    """That of DeepEP 2, on one host, without expanding and without waiting for the host."""

    def __init__(
        self,
        group: Any,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        self.group, self.rank, self.ranks = group, group.rank(), group.size()
        self.most, self.hidden, self.top_k = num_max_tokens_per_rank, hidden, num_topk
        self.deterministic, self.explicitly_destroy = deterministic, explicitly_destroy
        Buffer.made += 1

    def destroy(self) -> None:
        assert self.explicitly_destroy
        Buffer.destroyed += 1

    def _everyone(self, mine: Any) -> list[Any]:
        found: list[Any] = [None] * self.ranks
        torch.distributed.all_gather_object(found, mine, self.group)
        return found

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Any = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple:
        assert topk_idx is not None
        assert topk_weights is not None
        assert num_experts is not None
        assert num_max_tokens_per_rank is not None
        assert do_cpu_sync is not None
        x, scale = x if isinstance(x, tuple) else (x, None)
        most, top_k = num_max_tokens_per_rank, topk_idx.shape[1]
        hold(not do_cpu_sync and x.is_contiguous() and topk_idx.is_contiguous(), "contiguous")
        hold(topk_idx.dtype == torch.int64 and topk_weights.dtype == torch.float32, "dtypes")
        hold(len(x) <= most <= self.most and x.shape[1] <= self.hidden, "tokens")
        hold(top_k <= self.top_k and num_experts % self.ranks == 0, "num_topk")
        for named in topk_idx.tolist():
            known = [expert for expert in named if expert >= 0]
            hold(len(known) == len(set(known)) and all(e < num_experts for e in known), "distinct")
        local, rows = num_experts // self.ranks, self.ranks * most
        mine = x.view(torch.uint8), scale, topk_idx, topk_weights
        recv_x = torch.full((rows, x.shape[1] * x.element_size()), 255, dtype=torch.uint8)
        recv_scale = torch.full((rows, 0 if scale is None else scale.shape[1]), torch.nan)
        recv_ids = torch.full((rows, top_k), 77)
        recv_weights = torch.full((rows, top_k), torch.nan)
        metadata = torch.full((rows, 2 + top_k), -5, dtype=torch.int32)
        ends, row = [], 0
        for source, (data, scales, ids, weights) in enumerate(self._everyone(mine)):
            for token, named in enumerate(ids):
                here = (named >= self.rank * local) & (named < (self.rank + 1) * local)
                if not here.any():
                    continue
                recv_x[row], recv_weights[row] = data[token], weights[token]
                recv_ids[row] = torch.where(here, named - self.rank * local, -1)
                if scales is not None:
                    recv_scale[row] = scales[token]
                metadata[row, 0] = source * most + token
                metadata[row, 1] = source * top_k + int(here.int().argmax())
                row += 1
            ends.append(row)
        if not self.deterministic:
            raise RuntimeError("rows of a rank would come in any order")
        nothing = torch.zeros(0, dtype=torch.int32)
        psum = torch.tensor(ends, dtype=torch.int32)
        given = (False, num_experts, 1, most, 20, topk_idx, rows, rows, [], psum, nothing, nothing)
        handle = EPHandle(*given, metadata, nothing, None, None)
        received: Any = recv_x.view(x.dtype)
        if scale is not None:
            received = received, recv_scale
        return received, recv_ids, recv_weights, handle, None

    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Any = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple:
        metadata, ids = handle.recv_src_metadata, handle.topk_idx
        most, top_k = handle.num_max_tokens_per_rank, handle.topk_idx.shape[1]
        ends = handle.psum_num_recv_tokens_per_scaleup_rank
        hold(x.dtype == torch.bfloat16 and x.is_contiguous(), "x")
        hold(metadata.shape == (len(x), top_k + 2) and metadata.is_contiguous(), "num_topk + 2")
        hold(metadata.dtype == torch.int32 and ends.dtype == torch.int32, "int")
        hold(ids.dtype == torch.int64 and ids.is_contiguous(), "combined_topk_idx")
        hold(len(ids) <= most <= self.most and top_k <= self.top_k, "buffer size")
        hold(ends.shape == (self.ranks,) and ends.is_contiguous(), "psum")
        count = int(ends[-1]) if len(x) == most * self.ranks else len(x)
        sent: list[dict] = [{} for _ in range(self.ranks)]
        for row in range(count):
            sent[int(metadata[row, 1]) // top_k][int(metadata[row, 0]) % most] = x[row]
        back = [other[self.rank] for other in self._everyone(sent)]
        out = torch.zeros(len(ids), x.shape[1])
        local = handle.num_experts // self.ranks
        for token, named in enumerate(ids.tolist()):
            for rank in dict.fromkeys(expert // local for expert in named if expert >= 0):
                out[token] += back[rank][token].float()
        return out.bfloat16(), None, None


def install() -> types.ModuleType:
    """Make `import deep_ep` find it, and let the implementations of DeepEP run on a CPU."""
    from custom_ops import library
    from custom_ops.expert_parallel import deep_ep, deep_ep_elastic

    module = types.ModuleType("deep_ep")
    module.Buffer, module.Config = Buffer, Config  # type: ignore[attr-defined]
    module.ElasticBuffer, module.EPHandle = ElasticBuffer, EPHandle  # type: ignore[attr-defined]
    sys.modules["deep_ep"] = module
    deep_ep.why_not = lambda device: None
    deep_ep_elastic.why_not = lambda device: None
    library._usable.cache_clear()
    return module
