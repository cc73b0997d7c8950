"""The key under which Inductor keeps what it made of a graph with these passes.

Whatever changes the output is in it, and nothing else: both packages' sources and tables, the settings, the versions of
what kernels are made with, and everything that is known of fusions that are not ours.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import custom_ops
from fusion_passes.registered import is_shipped, registry
from fusion_passes.settings import Settings

__all__ = ["key", "source_hash"]


def key(settings: Settings, *more: str) -> str:
    """A digest. ``more``: what else it depends on."""
    parts = [
        str(custom_ops.platform.triton_interpret()),
        source_hash(),
        repr(settings.cache_key()),
        *_versions(),
        repr(_foreign_fusions()),
        os.environ.get("CUSTOM_OPS_DISABLE", ""),
        *more,
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@functools.cache
def source_hash() -> str:
    """Of every source file of both packages and of the shipped tables."""
    digest = hashlib.sha256(custom_ops.library.source_hash().encode())
    root = Path(__file__).parent
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".json"):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _versions() -> tuple[str, ...]:
    found = [torch.__version__, repr(custom_ops.platform.cuda_capability())]
    for package in ("triton", "sgl-deep-gemm", "flashinfer-python"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return tuple(found)


def _foreign_fusions() -> list[Any]:
    """What is known of fusions that are not ours: everything they say, and the code of their functions."""
    return [_identity(fusion, ()) for fusion in registry().values() if not is_shipped(fusion)]


def _identity(value: Any, inside: tuple[int, ...]) -> Any:
    """The same for the same source in every process: no address, no order of a set."""
    if id(value) in inside:
        return "itself"
    inside = (*inside, id(value))
    if isinstance(value, types.CodeType):
        return (
            value.co_code,
            value.co_names,
            [_identity(constant, inside) for constant in value.co_consts],
        )
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [
            _identity(part, inside)
            for part in (value.__code__, value.__defaults__, value.__kwdefaults__, cells)
        ]
    if isinstance(value, functools.partial):
        return [_identity(part, inside) for part in (value.func, value.args, value.keywords)]
    if dataclasses.is_dataclass(value):
        return [
            _identity(getattr(value, field.name), inside) for field in dataclasses.fields(value)
        ]
    if isinstance(value, Mapping):
        return [(_identity(k, inside), _identity(v, inside)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return [_identity(item, inside) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(_identity(item, inside)) for item in value)
    text = repr(value)
    if " at 0x" in text:
        named = value if hasattr(value, "__qualname__") else type(value)
        text = f"{named.__module__}.{named.__qualname__}"
    return text
