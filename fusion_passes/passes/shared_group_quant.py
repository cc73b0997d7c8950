"""One activation is quantized once for all the linears that read it.

    q_proj(quantize(x)), k_proj(quantize(x))   ->   q = quantize(x); q_proj(q), k_proj(q)

This is also what leaves a norm with a single reader, so that the norm and the quantization can become one kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from fusion_passes import index_map, torch_internals
from fusion_passes.canonical import asymmetric_quantizations, common_subexpressions, quantizations
from fusion_passes.fusion import Fusion
from fusion_passes.operations import module_path, shape_of
from fusion_passes.reporting import Site

_QUANTIZATIONS = (
    quantizations.group_quant,
    quantizations.tensor_quant,
    quantizations.tensor_quant_static,
    quantizations.block_quant,
    asymmetric_quantizations.token_quant_asymmetric,
)


def _transform(graph: fx.Graph) -> Iterator[Site]:
    for merged, survivor in common_subexpressions.merge(graph):
        if merged.target in _QUANTIZATIONS:
            numel = index_map.product(shape_of(survivor.args[0]))
            saved = 3 * numel  # the 16-bit input is read and the codes are written once less
            yield Site(
                "shared_group_quant",
                module_path(merged),
                bytes_saved=str(saved),
                bytes_saved_here=torch_internals.size_hint(saved, graph),
            )


FUSION = Fusion(
    name="shared_group_quant",
    summary="one activation quantized once for the several linears that read it",
    stage=1,
    transform=_transform,
)
