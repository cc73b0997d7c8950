"""How a quantization computes: what two quantizations of one tensor may differ in besides their groups."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

MAX = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""The largest magnitude of a symmetric code."""


@dataclass(frozen=True)
class Arithmetic:
    """The roundings of a quantization, in the words of `custom_ops` (see `custom_ops.scales`).

    dtype: of the codes. scale_mode: how the scale comes from the largest magnitude. code_mode: how a code comes from a
    value and its scale. min_scale: lower bound of the scale. scale_format: whether the scale is raised to a power of
    two, "ue8m0", or left as it is, "float32".

    In a pattern it stands for any: a fusion says what is computed, and the graph how it is rounded.
    """

    dtype: torch.dtype = torch.float8_e4m3fn
    scale_mode: str = "divide"
    code_mode: str = "divide"
    min_scale: float = 0.0
    scale_format: str = "float32"

    def arguments(self, *names: str) -> dict[str, Any]:
        """The keyword arguments of a quantizing op, those that are not their default; only ``names``, if given."""
        mine = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value
            for name, value in mine.items()
            if value != getattr(Arithmetic, name) and (not names or name in names)
        }
