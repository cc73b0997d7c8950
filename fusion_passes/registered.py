"""All fusions: those of this package, of other packages (an entry point), and of the user."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterable

from fusion_passes.fusion import Fusion
from fusion_passes.settings import check_fusion_name

ENTRY_POINT_GROUP = "fusion_passes.fusions"

_registered: dict[str, Fusion] = {}
_loaded: dict[str, Fusion] | None = None


def register(fusion: Fusion) -> Fusion:
    """Add a fusion of your own.

    Raises ValueError when another fusion or a setting already has its name.
    """
    check_fusion_name(fusion.name)
    known = registry()
    if known.get(fusion.name, fusion) is not fusion:
        raise ValueError(f"a fusion named {fusion.name!r} is already registered")
    _registered[fusion.name] = fusion
    return fusion


def registry() -> dict[str, Fusion]:
    """Every known fusion by name, in the order in which they run."""
    global _loaded
    if _loaded is None:
        _loaded = {}
        for fusion in (*_shipped(), *_from_entry_points()):
            if fusion.name in _loaded:
                raise ValueError(f"two fusions are named {fusion.name!r}")
            _loaded[fusion.name] = fusion
    everything = {**_loaded, **_registered}
    return dict(
        sorted(everything.items(), key=lambda item: (item[1].stage, -item[1].priority, item[0]))
    )


def is_shipped(fusion: Fusion) -> bool:
    """Whether it is one of ours, unchanged: what changes it is then in the hash of our sources."""
    from fusion_passes import passes

    module = sys.modules.get(f"{passes.__name__}.{fusion.name}")
    return getattr(module, "FUSION", None) is fusion


def _shipped() -> Iterable[Fusion]:
    from fusion_passes import passes

    for module in pkgutil.iter_modules(passes.__path__):
        if not module.name.startswith("_"):
            fusion = importlib.import_module(f"{passes.__name__}.{module.name}").FUSION
            if fusion.name != module.name:
                raise ValueError(f"passes/{module.name}.py names its fusion {fusion.name!r}")
            yield fusion


def _from_entry_points() -> Iterable[Fusion]:
    from importlib.metadata import entry_points

    for entry in entry_points(group=ENTRY_POINT_GROUP):
        fusion = entry.load()
        if not isinstance(fusion, Fusion):
            raise TypeError(
                f"the entry point {entry.name!r} of {ENTRY_POINT_GROUP} is no Fusion: {fusion!r}"
            )
        yield fusion
