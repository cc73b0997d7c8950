"""`ElasticBuffer` of DeepEP 2, as far as the project calls it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.custom_ops.expert_parallel.deep_ep_stand_in.ranks import Ranks, hold


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


class ElasticBuffer(Ranks):
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
        super().__init__(group, explicitly_destroy)
        self.most, self.hidden, self.top_k = num_max_tokens_per_rank, hidden, num_topk
        self.deterministic = deterministic

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
        hold(top_k <= self.top_k and num_experts % self.group_size == 0, "num_topk")
        for named in topk_idx.tolist():
            known = [expert for expert in named if expert >= 0]
            hold(len(known) == len(set(known)) and all(e < num_experts for e in known), "distinct")
        local, rows = num_experts // self.group_size, self.group_size * most
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
        hold(ends.shape == (self.group_size,) and ends.is_contiguous(), "psum")
        count = int(ends[-1]) if len(x) == most * self.group_size else len(x)
        sent: list[dict] = [{} for _ in range(self.group_size)]
        for row in range(count):
            sent[int(metadata[row, 1]) // top_k][int(metadata[row, 0]) % most] = x[row]
        back = [other[self.rank] for other in self._everyone(sent)]
        out = torch.zeros(len(ids), x.shape[1])
        local = handle.num_experts // self.group_size
        for token, named in enumerate(ids.tolist()):
            for rank in dict.fromkeys(expert // local for expert in named if expert >= 0):
                out[token] += back[rank][token].float()
        return out.bfloat16(), None, None
