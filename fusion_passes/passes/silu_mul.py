"""SiLU of the gate times the up projection as one kernel.

silu(gate) * up   ->   silu_mul(gate, up)
"""

from __future__ import annotations

from torch.nn.functional import silu

from fusion_passes.fusion import Fusion, Pattern, Tensor

_GATED = Tensor("num_tokens", "intermediate_size")

FUSION = Fusion(
    name="silu_mul",
    summary="SiLU and multiply",
    stage=3,
    priority=-1,
    patterns=(
        Pattern(lambda gate, up: silu(gate) * up, {"gate": _GATED, "up": _GATED}, name="silu_mul"),
    ),
    rewrite=lambda m: (m.call("silu_mul", m.tensor("gate"), m.tensor("up")),),
    bytes_before="6*num_tokens*intermediate_size",
    bytes_after="6*num_tokens*intermediate_size",
)
