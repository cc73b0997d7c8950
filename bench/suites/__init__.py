"""One suite per op family, each a module with `cases(tiny: bool)`; tiny sizes test the harness on a CPU."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator

from bench.case import Case


def suites() -> dict[str, Callable[[bool], Iterator[Case]]]:
    """Every suite by name: each module of this package."""
    return {
        module.name: importlib.import_module(f"{__name__}.{module.name}").cases
        for module in pkgutil.iter_modules(__path__)
    }
