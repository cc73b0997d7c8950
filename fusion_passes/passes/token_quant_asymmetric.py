"""Quantization to int8 per token, with a scale and a zero point.

amin, amax, sub, div, clamp, div, round, ..., cast   ->   token_quant_asymmetric(x)
"""

from __future__ import annotations

import torch

from fusion_passes.canonical import asymmetric_quantizations as canonical
from fusion_passes.fusion import Fusion, Pattern, Tensor
from fusion_passes.rewriting import Rewrite


def _rewrite(m: Rewrite) -> tuple[object, ...]:
    assert m.match.arithmetic is not None
    keywords = canonical.keywords(m.match.arithmetic)
    return m.outputs_of(m.call("token_quant_asymmetric", m.tensor("x"), **keywords), 3)


FUSION = Fusion(
    name="token_quant_asymmetric",
    summary="per-token int8 quantization with zero points",
    stage=3,
    priority=-1,
    patterns=(
        Pattern(
            canonical.Asymmetric(bounded=False, zero_point=torch.int8).quantize,
            {"x": Tensor("num_tokens", "hidden_size")},
            name="token_quant_asymmetric",
        ),
    ),
    rewrite=_rewrite,
    needs="token_quant_asymmetric",
    bytes_before="3*num_tokens*hidden_size + 5*num_tokens",
    bytes_after="3*num_tokens*hidden_size + 5*num_tokens",
)
