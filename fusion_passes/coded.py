"""What modules with 8-bit weights share, whatever they compute: casts that leave the codes alone, and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Coded(nn.Module):
    """A module whose codes and scales keep their dtypes: ``model.half()`` and the like cast the rest of the model.

    Cast codes would be right in eager mode still, and what no fusion is of; cast scales would have lost bits.
    """

    compute_dtype: torch.dtype

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        kept = [
            buffer
            for name, buffer in self._buffers.items()
            if buffer is not None and not name.endswith("bias")
        ]

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            new = fn(tensor)
            if new.dtype != tensor.dtype and any(tensor is buffer for buffer in kept):
                return tensor.to(new.device)
            return new

        like = torch.empty(0, dtype=self.compute_dtype, device=kept[0].device if kept else None)
        super()._apply(moved, recurse)
        self.compute_dtype = fn(like).dtype
        return self


def straight_through(
    round_trip: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """``round_trip(x)``, with the gradient of x itself.

    Differentiated as it is written, a cast to int8 has no gradient, and one to float8 rounds the gradient to 8 bits.
    An exported program is for inference, though it is often traced without ``no_grad``.
    """
    if not (torch.is_grad_enabled() and x.requires_grad) or torch.compiler.is_exporting():
        return round_trip(x)
    with torch.no_grad():
        rounded = round_trip(x)
    return rounded + (x - x.detach())
