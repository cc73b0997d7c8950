"""The experts of a model over the ranks of a process group."""

from fusion_passes.expert_parallel.sharding import ParallelExperts, parallelize_experts_

__all__ = ["ParallelExperts", "parallelize_experts_"]
