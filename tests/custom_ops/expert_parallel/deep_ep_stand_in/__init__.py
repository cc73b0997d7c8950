"""A `deep_ep` for tests: the buffers of DeepEP 1.2.1 and 2 between processes, on tensors of any device.

They refuse what the real ones refuse (dtypes, shapes, strides, sizes of buffers), return what they return, and write
into what they write into. Tokens travel by pickle.
"""

from __future__ import annotations

import sys
import types

from tests.custom_ops.expert_parallel.deep_ep_stand_in.buffer import Buffer, Config
from tests.custom_ops.expert_parallel.deep_ep_stand_in.elastic import ElasticBuffer, EPHandle

__all__ = ["Buffer", "Config", "EPHandle", "ElasticBuffer", "install"]


def install() -> types.ModuleType:
    """Make `import deep_ep` find it, and let the implementations of DeepEP run on a CPU."""
    from custom_ops import library
    from custom_ops.expert_parallel import deep_ep, deep_ep_elastic

    module = types.ModuleType("deep_ep")
    module.Buffer, module.Config = Buffer, Config  # type: ignore[attr-defined]
    module.ElasticBuffer, module.EPHandle = ElasticBuffer, EPHandle  # type: ignore[attr-defined]
    sys.modules["deep_ep"] = module
    deep_ep.why_not = lambda device: None
    deep_ep_elastic.why_not = lambda device: None
    library._usable.cache_clear()
    return module
