"""`Buffer` and `Config` of DeepEP 1.2.1: `dispatch` and `combine` of many tokens; few are in `low_latency.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.custom_ops.expert_parallel.deep_ep_stand_in.low_latency import LowLatency
from tests.custom_ops.expert_parallel.deep_ep_stand_in.ranks import hold

NVL_PEERS = 8


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


class Buffer(LowLatency):
    """Moves rows between the ranks of a group."""

    num_sms = 20

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
        super().__init__(group, explicitly_destroy)
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.num_qps = low_latency_mode, num_qps_per_rank
        self._not_waited_for = False
        self._everyone((num_nvl_bytes, num_rdma_bytes, low_latency_mode))

    def destroy(self) -> None:
        super().destroy()
        self._everyone("destroyed")

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


def _more(rows: Tensor, count: int, value: float) -> Tensor:
    """Rows of one value after those that are there."""
    return torch.cat([rows, rows.new_full((count, rows.shape[1]), value)])
