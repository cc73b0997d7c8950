"""Tests of fusion_passes.expert_parallel and its fusion."""
