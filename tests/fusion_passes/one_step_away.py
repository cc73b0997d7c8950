"""What the tests of functions one step away from a fusion share."""

from __future__ import annotations

import warnings

from fusion_passes import registry
from fusion_passes.testing import fuse
from tests.fusion_passes.helpers import assert_same


def run(fn, *tensors, names, **kwargs):
    """Fuse and compare; a walk or a rewrite that raises is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?s).*raised")
        result = fuse(fn, *tensors, only=[registry()[name] for name in names], **kwargs)
    assert_same(result)
    return result
