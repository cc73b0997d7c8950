"""Two parts of one tensor are two values to the matcher, however they are cut; one that is cut twice is one."""

from __future__ import annotations

import pytest
import torch

from fusion_passes import Fusion, Pattern
from fusion_passes import Tensor as Spec
from fusion_passes.testing import fuse
from tests.fusion_passes.helpers import EPS, FP8, fuse_all, random

pytestmark = pytest.mark.usefixtures("references")

# each [3, 128]
CUTS = {
    "the first rows": lambda x: x[:3, :128],
    "the first halves of rows": lambda x: x.view(12, 128)[:3],
    "every fourth half": lambda x: x.view(12, 128)[::4],
    "halves from the fourth on": lambda x: x.view(12, 128)[3:6],
    "the first of each pair of rows": lambda x: x.view(3, 4, 128)[:, 0],
    "one row three times": lambda x: x[:1, :128].expand(3, 128),
}
# spellings that read x twice: as T5 norms, and as quantizations that cast after the largest magnitude was taken
PIECED = {
    "norm": lambda a, b, w: (
        w * (a * torch.rsqrt(b.float().pow(2).mean(-1, keepdim=True) + EPS)).to(a.dtype)
    ),
    "quantization": lambda a, b, w: _codes(a, b.abs().amax(-1, keepdim=True)),
}


def _codes(x: torch.Tensor, amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = amax.float().clamp(min=1e-10) / 448.0
    return (x.float() / scale).clamp(-448.0, 448.0).to(FP8), scale


@pytest.mark.parametrize("second", CUTS)
@pytest.mark.parametrize("first", CUTS)
@pytest.mark.parametrize("kind", PIECED)
def test_two_parts_of_one_tensor_are_two_values(kind: str, first: str, second: str) -> None:
    def pieced(x: torch.Tensor, w: torch.Tensor) -> object:
        return PIECED[kind](CUTS[first](x), CUTS[second](x), w)

    result = fuse_all(pieced, random(6, 256), random(128, seed=1))
    assert bool(result.report.matches) == (first == second), result.report


@pytest.mark.parametrize("second", CUTS)
@pytest.mark.parametrize("first", CUTS)
def test_a_pattern_that_reads_its_input_twice(first: str, second: str) -> None:
    fusion = Fusion(
        "tanh_gate",
        "x * tanh(x)",
        3,
        patterns=(
            Pattern(
                lambda x: x * torch.tanh(x.float()).to(x.dtype),
                {"x": Spec("num_tokens", "hidden_size")},
                name="tanh",
            ),
        ),
        rewrite=lambda m: (m.emit(torch.ops.aten.sin.default, m.tensor("x")),),
    )
    result = fuse(
        lambda x: CUTS[first](x) * torch.tanh(CUTS[second](x).float()).to(x.dtype),
        random(6, 256),
        only=[fusion],
    )
    assert bool(result.report.matches) == (first == second)
