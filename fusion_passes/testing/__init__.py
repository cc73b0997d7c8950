"""Property tests for fusions, ours and yours.

:func:`assert_fusion_equivalent` runs a fusion on a graph traced from its own patterns, or from any function or
module, and compares with eager; :mod:`~fusion_passes.testing.strategies` draws tensors, shapes, strides and special
values, :mod:`~fusion_passes.testing.fragments` pieces of models. Needs hypothesis, as in
``pip install fusion-passes[test]``.
"""

from fusion_passes.testing.equivalence import (
    Result,
    assert_fusion_equivalent,
    fuse,
    fuse_graphs,
    random_inputs,
)
from fusion_passes.testing.fragments import ModelFragment, model_fragments

__all__ = [
    "ModelFragment",
    "Result",
    "assert_fusion_equivalent",
    "fuse",
    "fuse_graphs",
    "model_fragments",
    "random_inputs",
]
