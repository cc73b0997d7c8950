"""Expert parallelism: tokens to the ranks that own their experts, and the results back."""

from custom_ops.expert_parallel.buffers import release as release_buffers
from custom_ops.expert_parallel.groups import ExchangeError
from custom_ops.expert_parallel.layer import ep_fused_moe
from custom_ops.expert_parallel.low_latency import ep_combine_low_latency, ep_dispatch_low_latency
from custom_ops.expert_parallel.ops import ep_combine, ep_dispatch

__all__ = [
    "ExchangeError",
    "ep_combine",
    "ep_combine_low_latency",
    "ep_dispatch",
    "ep_dispatch_low_latency",
    "ep_fused_moe",
    "release_buffers",
]
